"""The run folder: made, gone on with, replaced or refused; stages done once; checkpoints to rely on."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model, tiny_recipe

from mlx_distill import checkpoint
from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.errors import RunFolderError
from mlx_distill.optimizer import make_optimizer
from mlx_distill.recipe import Recipe, load
from mlx_distill.run import Run
from mlx_distill.run_folder import open_run
from mlx_distill.stage_log import StageLog


class Silence:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


@pytest.fixture
def console() -> Console:
    return Console(Silence())  # type: ignore[arg-type]


def opened(recipe: Recipe, root: Path, print_: str = "0", **how: Any) -> Run:
    return open_run(recipe, print_, Console(Silence()), root=root, **how)  # type: ignore[arg-type]


def test_a_new_folder_says_what_it_is(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    run = opened(recipe, tmp_path / "my runs", "abc")
    assert run.folder == tmp_path / "my runs" / "tiny"
    assert load(run.folder / "recipe.yaml") == recipe
    assert (run.folder / "fingerprint").read_text(encoding="utf-8") == "abc\n"
    known = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    names = "mlx_distill mlx mlx_lm python platform machine device memory_gib commit blas command started"
    assert set(names.split()) <= known.keys()
    assert not list(run.folder.rglob("*.part"))


def test_a_taken_folder(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    opened(recipe, tmp_path).stage("train", lambda: {"rows": 3})
    with pytest.raises(RunFolderError, match="--resume.*--overwrite.*name=tiny-2"):
        opened(recipe, tmp_path)
    assert opened(recipe, tmp_path, resume=True).stages() == {"train": {"rows": 3}}
    assert opened(recipe, tmp_path, overwrite=True).stages() == {}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"train": {"steps": 5}}, "`train.steps` was 4 and is 5"),
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"objective": {"cross_entropy": {}}}, "`objective.forward_kl` was {'weight': 1.0, "),
        ({"teacher": {"model": "other"}}, "`teacher.model` was 'embedded' and is 'other'"),
        # What does not matter is not named, even if it stands first.
        ({"evaluate": {"tasks": ["speed"]}, "train": {"steps": 5}}, "`train.steps` was 4 and is 5"),
    ],
)
def test_another_recipe_does_not_go_on(tmp_path: Path, sections: dict[str, Any], field: str) -> None:
    run = opened(tiny_recipe(), tmp_path)
    before = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    with pytest.raises(RunFolderError) as caught:
        opened(tiny_recipe(**sections), tmp_path, "1", resume=True)
    assert f"was made by another recipe ({field}" in str(caught.value)
    assert (run.folder / "recipe.yaml").read_text(encoding="utf-8") == before


def test_other_data_does_not_go_on(tmp_path: Path) -> None:
    opened(tiny_recipe(), tmp_path, "0")
    with pytest.raises(RunFolderError, match="other data or other weights under the same names"):
        opened(tiny_recipe(), tmp_path, "1", resume=True)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_what_is_no_run_folder_is_left_alone(tmp_path: Path, how: dict[str, bool]) -> None:
    thesis = tmp_path / "tiny" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work", encoding="utf-8")
    with pytest.raises(RunFolderError, match="no run folder"):
        opened(tiny_recipe(), tmp_path, **how)
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("left", [[], [".fingerprint.part"]])
def test_a_folder_that_a_kill_left_empty_goes_on(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "tiny").mkdir()
    for name in left:
        (tmp_path / "tiny" / name).write_text("01", encoding="utf-8")
    assert opened(tiny_recipe(), tmp_path, resume=True).stages() == {}


def test_overwrite_does_not_follow_a_link(tmp_path: Path) -> None:
    real = opened(tiny_recipe(), tmp_path / "elsewhere").folder
    (tmp_path / "tiny").symlink_to(real)
    with pytest.raises(RunFolderError, match="cannot be written"):
        opened(tiny_recipe(), tmp_path, overwrite=True)
    assert (real / "recipe.yaml").exists()


def test_overwrite_does_not_remove_what_the_recipe_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened(tiny_recipe(), Path("runs"))
    for sections in (
        {"teacher": {"model": "runs/tiny/models/student"}},
        {"data": {"valid": "runs/tiny/v.jsonl"}},
    ):
        with pytest.raises(RunFolderError, match=r"runs/tiny holds runs/tiny/.*, which the recipe reads"):
            opened(tiny_recipe(**sections), Path("runs"), overwrite=True)
    assert Path("runs/tiny/recipe.yaml").exists()


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    run, done = opened(tiny_recipe(), tmp_path), []
    for _ in range(2):
        assert run.stage("train", lambda: done.append("train") or {"rows": 3}) == {"rows": 3}
    assert done == ["train"]
    run.forget({"train"})
    run.stage("train", lambda: done.append("again") or {})
    assert done == ["train", "again"]


def test_a_stage_that_fails_is_not_finished(tmp_path: Path) -> None:
    run = opened(tiny_recipe(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.stage("train", lambda: {"rows": 1 // 0})
    assert run.stages() == {}


def test_what_cannot_be_written_in_a_stage_is_told_in_a_line(tmp_path: Path) -> None:
    """As in a folder whose permissions have changed since the run began."""
    run = opened(tiny_recipe(), tmp_path)

    def refused(path: Path) -> dict[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    within = run.folder / "checkpoints" / ".step-000002.part"
    with pytest.raises(
        RunFolderError, match=r"step-000002\.part: cannot be written .*, and go on with --resume"
    ):
        run.stage("train", lambda: refused(within))
    with pytest.raises(PermissionError):  # data of the user's, of which others say more
        run.stage("train", lambda: refused(tmp_path / "rows.jsonl"))


def test_a_fingerprint_that_cannot_be_read_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    opened(tiny_recipe(), tmp_path)
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(RunFolderError, match=r"fingerprint: cannot be read \(Permission denied\)"):
        opened(tiny_recipe(), tmp_path, resume=True)


def test_a_folder_that_cannot_be_read_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tiny_recipe(), tmp_path)
    monkeypatch.setattr(os, "access", lambda path, how: not how & os.R_OK)
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("it was read"))
    with pytest.raises(RunFolderError, match=r"tiny cannot be written; check its permissions"):
        opened(tiny_recipe(), tmp_path, resume=True)


def test_a_part_of_a_run_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tiny_recipe(), tmp_path)
    (run.folder / "checkpoints").mkdir()
    monkeypatch.setattr(os, "access", lambda path, how: path.name != "checkpoints")
    with pytest.raises(RunFolderError, match=r"tiny/checkpoints cannot be written; check its permissions"):
        opened(tiny_recipe(), tmp_path, resume=True)


def test_a_stage_with_other_options_is_done_again_with_what_follows(tmp_path: Path) -> None:
    run = opened(tiny_recipe(), tmp_path)
    for name, options in {"train": None, "quantize": {"bits": 4}, "evaluate": None}.items():
        run.stage(name, dict, options)
    run.stage("quantize", dict, {"bits": 4})
    assert list(run.stages()) == ["train", "quantize", "evaluate"]
    run.stage("quantize", dict, {"bits": 8})
    assert run.stages() == {"train": {}, "quantize": {"options": {"bits": 8}}}


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    run = opened(tiny_recipe(), tmp_path)
    rows = [{"prompt": "a\u2028b\x85c\nd", "answer": None, "tokens": [1, 2]}, {"prompt": "ünïcode 🙂"}]
    run.write_rows("generated", rows)
    assert run.read_rows("generated") == rows


def damage_by_truncation(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def damage_by_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_one_bit, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, console: Console, damage: Any, name: str
) -> None:
    log, model = StageLog(Run(tmp_path, console), "student"), tiny_model().model
    optimizer = make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    before = {}
    for step in (2, 4):
        model.load_weights([(key, value + 1) for key, value in tree_flatten(model.parameters())])
        before[step] = dict(tree_flatten(model.parameters()))
        mx.eval(before[step])
        log.save(model, optimizer, Counters(step=step, tokens=10 * step, window_losses={"forward_kl": 0.5}))
    damage(tmp_path / "checkpoints" / "step-000004" / name)
    other = tiny_model(seed=5).model
    counters = log.restore(other, optimizer)
    assert counters == Counters(step=2, tokens=20, window_losses={"forward_kl": 0.5})
    found = dict(tree_flatten(other.parameters()))
    assert all(mx.array_equal(found[key], before[2][key]) for key in found)


def test_a_manifest_answers_for_itself(tmp_path: Path) -> None:
    """A flipped bit in the counters is still JSON, and the files are as they were."""
    model, optimizer = tiny_model().model, make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    checkpoint.save(tmp_path / "step-000002", model, optimizer, {"step": 2, "tokens": 40})
    manifest = tmp_path / "step-000002" / checkpoint.MANIFEST
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"tokens": 40', '"tokens": 41'), encoding="utf-8"
    )
    assert checkpoint.damage(tmp_path / "step-000002") == "manifest.json is not as it was written"


def test_the_newest_two_checkpoints_of_a_stage_are_kept(tmp_path: Path, console: Console) -> None:
    run, model = Run(tmp_path, console), tiny_model().model
    optimizer = make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    for stage in ("student", "baseline"):
        for step in (2, 4, 999_998, 1_000_000):  # one digit more sorts behind, not before
            StageLog(run, stage).save(model, optimizer, Counters(step=step))
    folder = tmp_path / "checkpoints"
    steps = ["step-1000000", "step-999998"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*steps, *(f"baseline-{name}" for name in steps)]
    )
    newest = checkpoint.newest(folder, "")
    assert newest is not None and newest.name == "step-1000000"


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    """A kill while it is written leaves a folder under another name."""
    model, optimizer = tiny_model().model, make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    folder = tmp_path / "step-000002"

    def killed(temporary: Path) -> None:
        (temporary / "weights.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    from mlx_distill.files import write_folder

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, killed)
    assert checkpoint.newest(tmp_path, "") is None
    checkpoint.save(folder, model, optimizer, {"step": 2})  # the leftover is no obstacle
    assert checkpoint.newest(tmp_path, "") == folder
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
