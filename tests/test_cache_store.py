"""A cache folder: refused by the field that differs, shared, gone on with to the same bytes, never half."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import rows_of, tiny_model

from mlx_distill import files
from mlx_distill.cache import CachedTeacher, Store, capture, described, fill, refuse_other, write_cache
from mlx_distill.cache.shards import key_of, read_arrays
from mlx_distill.cache.store import MANIFEST
from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.errors import DataError, Stopped
from mlx_distill.teacher import LiveTeacher

V = 50
ROWS = rows_of([9, 4, 13, 7, 30, 2, 1, 22, 15, 16])
MADE_OF: dict[str, Any] = {
    "teacher": "01" * 32,
    "tokenizer": "23" * 32,
    "chat_template": "45" * 32,
    "count": "completion",
}


@pytest.fixture(scope="module")
def live() -> LiveTeacher:
    return LiveTeacher(tiny_model(V, seed=9), V)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SHARD", 30)


def write(folder: Path, live: LiveTeacher, rows: list[Encoded] = ROWS, **kept: Any) -> Path:
    write_cache(folder, live, rows, made_of=MADE_OF, **{"top_k": 8, "precision": "compact", **kept})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(live: LiveTeacher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "SHARD", 30)
        return content(write(tmp_path_factory.mktemp("cache") / "whole", live))


def test_what_lies_in_the_folder(undisturbed: dict[str, bytes]) -> None:
    shards = [f"{number:05d}" for number in range(4)]
    files = {f"{shard}.{kind}" for shard in shards for kind in ("json", "safetensors")}
    assert undisturbed.keys() == {"manifest.json", "tokens.safetensors", *files}
    manifest = json.loads(undisturbed["manifest.json"])
    assert manifest.items() >= MADE_OF.items()
    assert manifest == described(vocabulary=V, top_k=8, precision="compact", **MADE_OF)
    told = [json.loads(undisturbed[f"{shard}.json"]) for shard in shards]
    assert [one["rows"] for one in told] == [4, 1, 4, 1]  # cut where 30 counted labels are reached
    assert [one["places"] for one in told] == [33, 30, 40, 16]
    assert all(0 < one["kl_mean"] <= one["kl_max"] < 1e-3 for one in told)
    assert all(
        one["bytes"] == len(undisturbed[f"{shard}.safetensors"])
        for one, shard in zip(told, shards, strict=True)
    )


def test_a_shard_is_an_ordinary_safetensors_file(live: LiveTeacher, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", live)
    arrays: Any = mx.load(str(folder / "00000.safetensors"))
    mapped = read_arrays(folder / "00000.safetensors")
    assert (
        arrays.keys()
        == mapped.keys()
        == {"keys", "starts", "low_starts", "high", "low", "values", "reach", "tail"}
    )
    for name, array in arrays.items():
        assert (array == mx.array(mapped[name])).all()
    assert bytes(mapped["keys"][0]) == key_of(ROWS[0])


def test_rows_of_other_content_have_other_keys() -> None:
    row = Encoded([1, 2, 3, 4], 2)
    assert (
        len(
            {
                key_of(row),
                key_of(row._replace(start=3)),
                key_of(Encoded([1, 2, 3], 2)),
                key_of(Encoded([2, 1, 3, 4], 2)),
            }
        )
        == 4
    )
    assert key_of(row) == key_of(row._replace(weight=0.5))


class Killed(BaseException):
    """Stands for the end of the process at this instant."""


@pytest.mark.parametrize("after", range(12))
def test_gone_on_with_after_any_write_it_leaves_the_same_bytes(
    after: int,
    live: LiveTeacher,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ended in the middle of the n-th file, with half of it on the drive."""
    count, write_bytes = 0, files.write_bytes

    def ending(path: Path, content: bytes) -> None:
        nonlocal count
        if count == after:
            path.with_name(f".{path.name}.part").write_bytes(content[: len(content) // 2])
            raise Killed
        count += 1
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        for module in ("files", "cache.shards", "cache.store"):
            patch.setattr(f"mlx_distill.{module}.write_bytes", ending)
        with contextlib.suppress(Killed):
            write(tmp_path / "cache", live)
    assert count == min(after, 10)  # files there are
    write(tmp_path / "cache", live)
    assert content(tmp_path / "cache") == undisturbed


def test_the_teacher_does_not_read_a_row_twice(
    live: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is equal to another, nor one that another run has stored."""
    read: list[int] = []
    plain = live.targets

    def spy(batch: Any) -> Any:
        read.append(int(batch.counted.sum()))
        return plain(batch)

    monkeypatch.setattr(live, "targets", spy)
    folder = write(tmp_path / "cache", live, [*ROWS[:4], ROWS[0], ROWS[2]])
    assert sum(read) == 9 + 4 + 13 + 7
    before = content(folder)
    read.clear()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert fill(Store(folder, manifest), live, [ROWS[5], *ROWS[:3], ROWS[6]]) == 2
    assert sum(read) == 2 + 1
    after = content(folder)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"00001.json", "00001.safetensors"}
    read.clear()
    assert fill(Store(folder, manifest), live, ROWS[:6]) == 1  # one was missing still
    assert fill(Store(folder, manifest), live, ROWS[:6]) == 0
    assert sum(read) == 30


def test_another_run_that_adds_at_the_same_time_is_waited_for(live: LiveTeacher, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", live, ROWS[:2])
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Stopped, match="another run is adding to this cache"):
        write(folder, live)
    os.close(descriptor)
    write(folder, live)


OTHER = [
    ("teacher", "67" * 32, r"the weights of another teacher \(0101\S+, and this run\'s is 6767\S+\)"),
    ("tokenizer", "67" * 32, "another tokenizer"),
    ("chat_template", None, r"another chat template \(4545\S+, and this run's is null\)"),
    ("count", "all", r'another `count` \("completion", and this run\'s is "all"\)'),
    ("top_k", 9, r"another `top_k` \(8, and this run's is 9\)"),
    ("temperature", 2.0, "another `temperature`"),
    ("precision", "exact", "another `precision`"),
    ("vocabulary", 51, "another `vocabulary`"),
    ("hidden", [1], "another `hidden`"),
    ("format", 2, r"another format \(1, and"),
]


@pytest.mark.parametrize(("field", "value", "said"), OTHER, ids=[field for field, *_ in OTHER])
def test_another_cache_is_refused_by_the_field_that_differs(
    field: str, value: Any, said: str, live: LiveTeacher, tmp_path: Path
) -> None:
    folder = write(tmp_path / "cache", live, ROWS[:2])
    wanted = {**json.loads((folder / "manifest.json").read_bytes())}
    refuse_other(folder, wanted)
    refuse_other(tmp_path / "none", wanted)  # what does not exist will be made
    wanted[field] = value
    for refused in (lambda: refuse_other(folder, wanted), lambda: CachedTeacher(folder, ROWS[:2], wanted)):
        with pytest.raises(DataError, match=rf"cache was made with {said}.*; name another folder") as error:
            refused()
        assert "\n" not in str(error.value)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(DataError, match=r"`teacher.cache`: \S+letters is no cache and not empty"):
        refuse_other(tmp_path / "letters", {})
    (tmp_path / "empty").mkdir()
    refuse_other(tmp_path / "empty", {})
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="is no cache"):
        refuse_other(tmp_path / "file", {})
    (tmp_path / "letters" / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read; remove the folder"):
        refuse_other(tmp_path / "letters", {})


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


BROKEN = {
    "00001.safetensors, a byte short": cut,
    "00001.safetensors, a bit in the middle": flip,
    "00001.safetensors, gone": Path.unlink,
    "00001.json, cut": lambda path: path.write_text(path.read_text(encoding="utf-8")[:60], encoding="utf-8"),
    "00001.json, a bit of the digest": lambda path: flip(path, 40),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_shard_is_noticed_and_read_again(
    what: str, live: LiveTeacher, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = write(tmp_path / "cache", live)
    BROKEN[what](folder / what.partition(",")[0])
    batch = make_batch([ROWS[0], ROWS[4]])._replace(rows=(0, 4))
    with pytest.raises(DataError, match=r"00001\.safetensors: damaged|lacks 1 of 10 rows") as error:
        CachedTeacher(folder, ROWS, MADE_OF).targets(batch)
    assert "go on with --resume" in str(error.value)
    said = Store(folder, MADE_OF).drop_damaged()
    assert [line.partition(": ")[0] for line in said] == [str(folder / "00001.safetensors")]
    write(folder, live)
    assert content(folder) == undisturbed


def test_all_shards_go_with_the_numbering_of_tokens(
    live: LiveTeacher, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    for broken in (flip, Path.unlink):
        folder = write(tmp_path / "cache", live)
        broken(folder / "tokens.safetensors")
        assert len(Store(folder, MADE_OF).drop_damaged()) == 4
        write(folder, live)
        assert content(folder) == undisturbed


def test_rows_that_are_missing_are_counted(live: LiveTeacher, tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", live, ROWS[:3])
    with pytest.raises(DataError, match=r"lacks 2 of 5 rows; go on with --resume"):
        CachedTeacher(folder, ROWS[:5], MADE_OF)
    with pytest.raises(DataError, match="no such cache"):
        CachedTeacher(tmp_path / "none", ROWS, MADE_OF)
    assert not (tmp_path / "none").exists()


def test_a_full_drive_leaves_what_was_whole(
    live: LiveTeacher, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third shard does not fit: two are there, and nothing else is."""
    flush, calls = files.flush, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise OSError(errno.ENOSPC, "No space left on device", "drive")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "cache", live)
    left = content(tmp_path / "cache")
    assert left.items() < undisturbed.items()
    assert {"00001.json", "00001.safetensors"} < left.keys()
    assert not any(name.startswith((".", "00002")) for name in left)
    write(tmp_path / "cache", live)
    assert content(tmp_path / "cache") == undisturbed
    shutil.rmtree(tmp_path / "cache")


def test_a_field_that_may_be_null_may_be_missing(live: LiveTeacher, tmp_path: Path) -> None:
    """As after damage to its name: the reader then finds the field, and null in it."""
    made = described(vocabulary=V, top_k=8, precision="compact", **MADE_OF)
    Store(tmp_path / "cache", made)
    path = tmp_path / "cache" / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"sampled"', '"sasampled"'), encoding="utf-8")
    assert Store(tmp_path / "cache", made).manifest["sampled"] is None


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 9999])
def test_a_manifest_that_is_none_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    made = described(vocabulary=V, top_k=8, precision="compact", **MADE_OF)
    Store(tmp_path / "cache", made)
    (tmp_path / "cache" / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match="manifest.json cannot be read; remove the folder, or name another"):
        Store(tmp_path / "cache", made)
