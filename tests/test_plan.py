"""`plan` and `--fit` from the command line; what is said of memory, drive and time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import command, make

from mlx_distill.cache.capture import write_cache
from mlx_distill.cache.store import described
from mlx_distill.cache.tokens import TokenCode
from mlx_distill.disk import bytes_of
from mlx_distill.memory import Parts
from mlx_distill.recipe import load
from mlx_distill.timed import Timed
from mlx_distill.unfetched import Unfetched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plan"))


def lend(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_distill.memory.estimates.machine_gib", lambda: gib)


def test_memory_drive_and_time_are_told_without_a_weight(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("mlx_distill.models.load", refuse)
    monkeypatch.setattr("mlx_distill.models.loading.load", refuse, raising=False)
    before = sorted(folder.rglob("*"))
    ended = command(folder, capsys, "plan", "recipe.yaml")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    heading = next(line for line in lines if line.startswith("memory, GiB"))
    assert heading.split()[2:] == [*Parts._fields, "together"]
    named = [line.split("  ")[0] for line in lines[lines.index(heading) + 1 :]]
    assert named[:3] == ["probes of teachers", "probes", "train"] and "evaluate" in named[:5]
    assert any(line.startswith("drive, GiB: models ") and line.endswith("that are free") for line in lines)
    assert any(line.startswith("time: unknown until a step has been timed") for line in lines)
    assert any(
        line.startswith("parameters: about ") and line.endswith("all of which train") for line in lines
    )
    assert not any("saves" in line for line in lines)
    assert sorted(folder.rglob("*")) == before  # and nothing was written


def test_changes_are_named_where_memory_is_short(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lend(0.0001, monkeypatch)
    ended = command(folder, capsys, "plan", "recipe.yaml", "train.batch_tokens=4096")
    assert "which does not fit in the 0.0001 GiB that a run may take here" in ended.out
    assert "train.batch_tokens=" in ended.out and "(the same is learned)" in ended.out
    assert "run with --fit: " in ended.out


def test_a_run_warns_in_a_line_and_changes_nothing_unasked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lend(0.0001, monkeypatch)
    wide = ["train.batch_tokens=4096", "train.steps=1", "evaluate.baseline=false", "train.compile=false"]
    ended = command(folder, capsys, "train", "recipe.yaml", "name=asked", *wide)
    assert ended.code == 0, ended.err
    told = [line for line in (ended.out.splitlines() + ended.err) if "the machine lends" in line]
    assert len([line for line in told if line.startswith("memory: ")]) == 1
    assert load(folder / "runs/asked/recipe.yaml").train.batch_tokens == 4096

    ended = command(folder, capsys, "train", "recipe.yaml", "name=fitted", *wide, "--fit")
    assert ended.code == 0, ended.err
    assert "--fit: train.batch_tokens=" in ended.out + "\n".join(ended.err)
    train = load(folder / "runs/fitted/recipe.yaml").train
    assert train.batch_tokens < 4096 and train.batch_tokens * train.micro_batches == 4096
    memory = json.loads((folder / "runs/fitted/memory.json").read_text(encoding="utf-8"))
    assert memory["predicted_stages_gib"]["train"] == memory["predicted_gib"]["together"]


def test_time_is_that_of_the_same_recipe_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["name=timed", "train.steps=2", "evaluate.baseline=false", "train.compile=false"]
    assert command(folder, capsys, "train", "recipe.yaml", *wide).code == 0
    ended = command(folder, capsys, "plan", "recipe.yaml", *wide)
    assert "time: training 00:00:0" in ended.out and "s a step as in runs/timed" in ended.out
    ended = command(folder, capsys, "plan", "recipe.yaml", *wide, "train.learning_rate=1e-3")
    assert "time: unknown" in ended.out  # another run, which may take other time
    metrics = folder / "runs/timed/metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "stage": "student", "seconds": 90}\n', encoding="utf-8"
    )  # as if it had been stopped there
    ended = command(folder, capsys, "plan", "recipe.yaml", *wide)
    assert "training 00:03:00, at 90 s a step" in ended.out
    assert "1 of 2 steps were done, which leaves 00:01:30 to `run --resume`" in ended.out
    assert "baseline" not in ended.out.split("time: ")[1]
    (folder / "runs/timed/fingerprint").write_text(
        fingerprint_of(folder, capsys, *wide[1:-2], wide[-1]), encoding="utf-8"
    )
    ended = command(folder, capsys, "plan", "recipe.yaml", *wide[:2], wide[-1])
    assert "the baseline's steps, at most as long each, come on top" in ended.out


def fingerprint_of(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    said = command(folder, capsys, "plan", "recipe.yaml", *overrides).out
    return said.partition("fingerprint: ")[2].split()[0]


def test_a_system_that_tells_nothing_of_its_memory(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("mlx_distill.doctor.os.sysconf", fail)
    monkeypatch.setattr("mlx_distill.doctor.LIMIT", folder / "none")
    ended = command(folder, capsys, "plan", "recipe.yaml")
    assert ended.code == 0 and "this system does not tell how much memory there is" in ended.out
    assert "saves" not in ended.out
    fast = ["name=untold", "train.steps=1", "evaluate.baseline=false", "train.compile=false"]
    ended = command(folder, capsys, "train", "recipe.yaml", *fast)
    assert ended.code == 0, ended.err
    assert json.loads((folder / "runs/untold/memory.json").read_text(encoding="utf-8"))["machine_gib"] is None
    assert (
        json.loads((folder / "runs/untold/environment.json").read_text(encoding="utf-8"))["memory_gib"]
        is None
    )


def test_a_model_that_is_not_here_is_planned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its headers, as `test_unfetched.py` has them; what they replace is told."""

    def headers(self: Unfetched, name: str, where: str, trust: bool) -> Path:
        self.gib[name] = 7.5
        return folder / "teacher"

    monkeypatch.setattr(Unfetched, "_headers_of", headers)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ended = command(folder, capsys, "plan", "recipe.yaml", "teacher.model=lab/large")
    assert ended.code == 0, ended.err
    assert "lab/large is not on this machine: a run fetches 7.5 GiB of weights first" in ended.out
    assert "fingerprint" not in ended.out  # which follows from weights


def test_what_tells_no_time(tmp_path: Path) -> None:
    assert Timed.of(tmp_path, "x") is None
    (tmp_path / "fingerprint").write_text("x\n", encoding="utf-8")
    assert Timed.of(tmp_path, "x") == Timed(None, {})
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "stage": "student", "seconds": 1}\n{"step": 4, "stage": "student", "seconds": 2.0}\n'
        '{"step": 9, "stage": "baseline", "seconds": 1}\n{"step": 8, "sta',
        encoding="utf-8",
    )
    (tmp_path / "times.json").write_text('{"train": 3, "cache": null}', encoding="utf-8")
    assert Timed.of(tmp_path, "x") == Timed(0.5, {"train": 3.0}, 4)
    (tmp_path / "times.json").write_text("{", encoding="utf-8")
    assert Timed.of(tmp_path, "x") is None


@pytest.mark.parametrize("precision", ["compact", "exact"])
def test_a_cache_takes_what_its_formulas_say(precision: str, tmp_path: Path) -> None:
    """Uniformly drawn sets, for which no numbering is better than another."""
    from tiny import rows_of, tiny_model

    from mlx_distill.teacher import LiveTeacher

    size, kept = 4096, 32
    rows = rows_of([200] * 6, size)
    teacher = LiveTeacher(tiny_model(size), size)
    write_cache(tmp_path / "cache", teacher, rows, made_of={}, top_k=kept, precision=precision)
    measured = sum(path.stat().st_size for path in (tmp_path / "cache").glob("0*.safetensors"))
    told = bytes_of(described(vocabulary=size, top_k=kept, precision=precision)) * 200 * 6
    assert told == pytest.approx(measured, rel=0.1)


def test_the_plain_code_is_the_one_that_sets_would_be_written_in() -> None:
    random = np.random.default_rng(0)
    sets = np.stack([random.choice(1000, 8, replace=False) for _ in range(200)])
    code = TokenCode.plain(1000, 8)
    order = np.take_along_axis(sets, code.sort(sets), axis=-1)
    high, _, widths = code.encode(order)
    took = (high.nbytes + widths.sum() / 8) / 200
    assert bytes_of({"vocabulary": 1000, "top_k": 8, "sampled": None, "precision": None}) == pytest.approx(
        took, rel=0.02
    )
