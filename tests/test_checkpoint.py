"""Checkpoints: what the manifest answers for, what is passed over, what stays, and a full drive."""

import errno
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model, tiny_recipe

from mlx_distill import checkpoint, files
from mlx_distill.checkpoint import MANIFEST
from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.drive import resumable_if_full
from mlx_distill.errors import RunFolderError, Stopped
from mlx_distill.optimizer import make_optimizer
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog


class Stage:
    """A training stage with nothing but its checkpoints; weights of step n are n."""

    def __init__(self, folder: Path, keep: int = 2):
        self.said, self.folder = io.StringIO(), folder / "checkpoints"
        self.log = StageLog(Run(folder, Console(self.said)), "student", keep)
        self.model, self.optimizer = tiny_model().model, make_optimizer(tiny_recipe().train)
        self.optimizer.init(self.model.trainable_parameters())

    def save(self, step: int) -> None:
        arrays: Any = tree_flatten(self.model.parameters())
        self.model.load_weights([(name, mx.full(value.shape, step)) for name, value in arrays])
        self.log.save(self.model, self.optimizer, Counters(step=step, tokens=10 * step))

    def restore(self) -> int:
        """The step that it goes on from, after a look at weights and counters."""
        counters = self.log.restore(self.model, self.optimizer)
        assert counters.tokens == 10 * counters.step
        arrays: Any = tree_flatten(self.model.parameters())
        if counters.step:
            assert {float(value.min()) for _, value in arrays} == {float(counters.step)}
            assert {float(value.max()) for _, value in arrays} == {float(counters.step)}
        return counters.step

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_the_manifest_has_sizes_digests_and_what_made_it(tmp_path: Path) -> None:
    Stage(tmp_path).save(2)
    folder = tmp_path / "checkpoints" / "step-000002"
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["files"] == {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("optimizer.safetensors", "weights.safetensors")
    }
    assert manifest["counters"]["step"] == 2
    assert manifest["made_with"] == checkpoint.made_with()
    names = "mlx mlx_lm numpy mlx_distill device os blas blas_threads"
    assert all(manifest["made_with"][name] for name in names.split())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def no_object(file: Path) -> None:
    file.write_text("[]", encoding="utf-8")


def names_nothing(file: Path) -> None:
    manifest = {"files": {}, "counters": {}}
    file.write_text(json.dumps({**manifest, "sha256": checkpoint._digest_of(manifest)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("weights.safetensors", cut, r"weights\.safetensors has \d+ bytes in place of \d+"),
        ("weights.safetensors", flip, r"weights\.safetensors has another SHA-256"),
        ("optimizer.safetensors", Path.unlink, r"optimizer\.safetensors is missing"),
        (MANIFEST, Path.unlink, r"manifest\.json is missing"),
        (MANIFEST, cut, r"manifest\.json cannot be read"),
        (MANIFEST, no_object, r"manifest\.json cannot be read"),
        (MANIFEST, names_nothing, r"manifest\.json names no weights"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_used(
    name: str, damage: Any, why: str, tmp_path: Path
) -> None:
    stage = Stage(tmp_path)
    for step in (2, 4):
        stage.save(step)
    damage(stage.folder / "step-000004" / name)
    assert stage.restore() == 2
    [line, going_on] = stage.said.getvalue().splitlines()
    assert line.startswith(f"student: {stage.folder / 'step-000004'} is damaged: ")
    assert line.endswith("; step-000002 is used")
    assert pytest.raises(AssertionError, match=why).matches(AssertionError(line))
    assert going_on == "student: going on from step 2"


def test_without_one_before_it_training_starts_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save(2)
    flip(stage.folder / "step-000002" / "weights.safetensors")
    assert Stage(tmp_path).restore() == 0
    fresh = Stage(tmp_path)
    fresh.restore()
    assert fresh.said.getvalue().endswith("has another SHA-256; training starts anew\n")


def test_one_made_elsewhere_is_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = checkpoint.made_with()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "made_with", lambda: {**here, "mlx": "0.1", "os": "Plan 9"})
        Stage(tmp_path).save(2)
    stage = Stage(tmp_path)
    assert stage.restore() == 2
    assert stage.said.getvalue().splitlines()[1] == (
        f"student: the checkpoint was made with mlx 0.1, now {here['mlx']}, os Plan 9, now {here['os']}; "
        "the same bits are promised only for the same machine and versions"
    )


def other_weights(stage: Stage) -> None:
    stage.model = tiny_model(num_hidden_layers=3).model


def other_counters(stage: Stage) -> None:
    checkpoint.save(stage.folder / "step-000004", stage.model, stage.optimizer, {"step": 4, "steps": 4})


@pytest.mark.parametrize(
    ("other", "why"),
    [(other_weights, r"9 weights differ, such as .*layers\.2\."), (other_counters, "'steps'")],
)
def test_one_of_another_student_is_refused_in_a_line(other: Any, why: str, tmp_path: Path) -> None:
    """As after another version of a library has named things otherwise: no weight is left to chance."""
    stage = Stage(tmp_path)
    stage.save(2)
    other(stage)
    with pytest.raises(
        RunFolderError, match=rf"step-00000\d: .*not of this student \(.*{why}.*--overwrite"
    ) as e:
        stage.restore()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_stay_as_are_asked_for(keep: int, tmp_path: Path) -> None:
    stage = Stage(tmp_path, keep)
    for step in (2, 4, 6, 8, 10):
        stage.save(step)
    assert stage.names() == ["step-000006", "step-000008", "step-000010"][3 - keep :]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_one_does_not_cost_the_one_just_made(keep: int, tmp_path: Path) -> None:
    """Kept by number alone, the damaged one would stay and the new one go."""
    stage = Stage(tmp_path, 2)
    for step in (2, 8):
        stage.save(step)
    cut(stage.folder / "step-000008" / "weights.safetensors")
    again = Stage(tmp_path, keep)
    assert again.restore() == 2
    again.save(3)  # `save_every` is another now
    assert again.names() == ["step-000002", "step-000003"][2 - keep :]
    assert Stage(tmp_path).restore() == 3


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save(2)
    for name in (".step-000004.part", ".step-000004.old", ".baseline-step-000004.part"):
        (stage.folder / name).mkdir()
        (stage.folder / name / "weights.safetensors").write_text("half", encoding="utf-8")
    assert stage.restore() == 2
    assert stage.names() == [".baseline-step-000004.part", "step-000002"]  # the other stage's is its own


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_drive_that_fails_costs_no_checkpoint(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each flush of the save in turn; with one checkpoint kept, the last good one is the only one."""
    flush, left = files.flush, 0

    def failing(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(reason, "no")
        flush(descriptor)

    monkeypatch.setattr(files, "flush", failing)
    stage, said = Stage(tmp_path, keep=1), list[Stopped]()
    stage.save(2)
    while "step-000004" not in stage.names():
        left = len(said) + 1
        try:
            with resumable_if_full():
                stage.save(4)
        except Stopped as error:
            said.append(error)
        left = 0
        # The last flush is that of the folder in which the new one has its name already.
        new = "step-000004" in stage.names()
        assert stage.names()[-2:] == (["step-000002", "step-000004"] if new else ["step-000002"])
        assert Stage(tmp_path).restore() == (4 if new else 2)
    assert len(said) >= 6
    what = "the drive fails (" if reason == errno.EIO else "the drive is full ("
    assert all(str(error).startswith(what) and "\n" not in str(error) for error in said)
    assert {error.exit_code for error in said} == {75}
