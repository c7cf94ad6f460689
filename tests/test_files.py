"""Files that are complete or absent: in which order they reach the drive, and what a full one leaves."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill import files
from mlx_distill.files import make_folder, write_folder, write_json, write_text
from mlx_distill.interrupt import Interrupted


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "b.txt").write_text("b", encoding="utf-8")
    mx.save_safetensors(str(folder / "a.safetensors"), {"a": mx.arange(4)})


class Drive:
    """What reaches the drive, in order: paths that are flushed, and renames."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen: list[str] = []
        self.paths: dict[int, str] = {}
        replace, opened = os.replace, os.open

        def noted(path: Any, *how: Any) -> int:
            descriptor = opened(path, *how)
            self.paths[descriptor] = Path(path).name
            return descriptor

        def renamed(before: Any, after: Any) -> None:
            self.seen.append(f"{Path(before).name} -> {Path(after).name}")
            replace(before, after)

        patch.setattr(os, "open", noted)
        patch.setattr(os, "replace", renamed)

    def flushed(self, descriptor: int) -> None:
        self.seen.append(self.paths.pop(descriptor, "a file"))


FOLDER_IN_ORDER = ["a.safetensors", "inner", "b.txt", ".step.part", ".step.part -> step", "checkpoints"]


def test_a_folder_is_on_the_drive_before_it_has_its_name(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        drive = Drive(patch)
        patch.setattr(files, "flush", drive.flushed)
        write_folder(tmp_path / "checkpoints" / "step", fill)
        assert drive.seen == [tmp_path.name, *FOLDER_IN_ORDER]
        drive.seen.clear()
        write_text(tmp_path / "file", "x")
        assert drive.seen == ["a file", ".file.part -> file", tmp_path.name]


def test_folders_that_are_made_on_the_way_are_on_the_drive(tmp_path: Path) -> None:
    """Else the power may take the name of a folder whose content was flushed."""
    with pytest.MonkeyPatch.context() as patch:
        drive = Drive(patch)
        patch.setattr(files, "flush", drive.flushed)
        for _ in range(2):
            make_folder(tmp_path / "runs" / "name" / "samples")
    assert drive.seen == [tmp_path.name, "runs", "name"]


def test_on_macos_the_drive_empties_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F_FULLFSYNC for every file, MLX's too, and every folder; plain fsync leaves them in the drive's."""
    drive = Drive(monkeypatch)

    def control(descriptor: int, command: int) -> int:
        assert command == 51
        drive.flushed(descriptor)
        return 0

    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("plain fsync"))
    write_folder(tmp_path / "checkpoints" / "step", fill)
    assert drive.seen == [tmp_path.name, *FOLDER_IN_ORDER]


def test_where_full_flushes_are_not_known_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    reason, plain = errno.ENOTSUP, list[int]()

    def control(*_: int) -> int:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", plain.append)
    files.flush(7)
    assert plain == [7]
    reason = errno.EIO  # a drive that fails is not asked again in another way
    with pytest.raises(OSError, match="Input/output"):
        files.flush(7)
    assert plain == [7]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_drive_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(tmp_path / "a.json", 2)
    assert caught.value.filename == str(tmp_path / "a.json")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [
        ("a.json", "1\n")
    ]


def old_and_new(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_folder(folder, lambda path: write_text(path / "weights", "old"))
    return folder


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_drive_leaves_the_folder_as_it_was(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flushed = old_and_new(tmp_path), 0

    def flush(_: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == at:
            full()

    monkeypatch.setattr(files, "flush", flush)
    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, lambda path: write_text(path / "weights", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Interrupted(signal.SIGINT)])
def test_a_rename_that_fails_puts_the_older_folder_back(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = old_and_new(tmp_path), os.replace

    def fails(before: Path, after: Path) -> None:
        if before.name == ".model.part":
            raise error
        replace(before, after)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(type(error)):
        write_folder(folder, lambda path: write_text(path / "weights", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("drive_is_full", [True, False])
def test_a_kill_between_the_renames_costs_no_folder(
    drive_is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one has given its name away, and the new one has none yet."""
    folder = old_and_new(tmp_path)
    os.replace(folder, tmp_path / ".model.old")
    write_folder(tmp_path / ".model.part", lambda path: write_text(path / "weights", "half of the new"))
    if drive_is_full:
        monkeypatch.setattr(files, "flush", full)
        with pytest.raises(OSError, match="No space left"):
            write_folder(folder, lambda path: write_text(path / "weights", "new"))
    else:
        write_folder(folder, lambda path: write_text(path / "weights", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text(encoding="utf-8") == ("old" if drive_is_full else "new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
@pytest.mark.parametrize(("drive_is_full", "reason"), [(True, errno.ENOSPC), (False, errno.EIO)])
def test_what_mlx_does_not_say_the_drive_does(drive_is_full: bool, reason: int, tmp_path: Path) -> None:
    def onto_a_full_device(folder: Path) -> None:
        (folder / "a.safetensors").symlink_to("/dev/full")
        if drive_is_full:  # then for the next file too
            (folder / ".probe.part").symlink_to("/dev/full")
        mx.save_safetensors(str(folder / "a.safetensors"), {"a": mx.arange(4)})

    with pytest.raises(OSError) as caught:
        write_folder(tmp_path / "model", onto_a_full_device)
    assert caught.value.errno == reason
    assert not list(tmp_path.iterdir())


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        write_folder(tmp_path / "model", wrong)
    assert not list(tmp_path.iterdir())
