"""What a training stage writes: metrics that go on where its checkpoint is, and are JSON."""

import io
import json
import math
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_recipe

from mlx_distill import checkpoint, stage_log
from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.drive import resumable_if_full
from mlx_distill.errors import Stopped
from mlx_distill.optimizer import make_optimizer
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog


@pytest.fixture
def log(tmp_path: Path) -> StageLog:
    return StageLog(Run(tmp_path, Console(io.StringIO())), "student")


def save_and_restore(log: StageLog, step: int) -> None:
    model = tiny_model().model
    optimizer = make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    log.save(model, optimizer, Counters(step=step))
    assert log.restore(model, optimizer).step == step


def test_metrics_of_steps_that_are_taken_again_are_dropped(log: StageLog, tmp_path: Path) -> None:
    lines = [
        {"step": step, "stage": stage, "loss": 1.0} for step in (1, 2, 3) for stage in ("student", "baseline")
    ]
    path = tmp_path / "metrics.jsonl"
    broken = "[" * 99999 + "\n" + '{"step": 4, "sta'
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + broken, encoding="utf-8")
    save_and_restore(log, 2)
    kept = [
        (line["stage"], line["step"])
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    # The other stage's lines, and those up to the checkpoint; what a kill or a drive has damaged is gone.
    assert kept == [("student", 1), ("baseline", 1), ("student", 2), ("baseline", 2), ("baseline", 3)]


def test_what_json_holds_and_python_takes_for_the_end_of_a_line_costs_none(
    log: StageLog, tmp_path: Path
) -> None:
    """U+2028 may stand in the name of a file, and so in the rows that a line names."""
    log.event(1, {"spike": 9.0}, ["rows\u2028of\x85mine.jsonl:17"])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    save_and_restore(log, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before != b""


def test_numbers_that_json_does_not_have_are_left_out(log: StageLog, tmp_path: Path) -> None:
    log.validation(3, {"nll": math.inf, "kl": math.nan, "top1_agreement": 0.5})
    assert json.loads(
        (tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=pytest.fail
    ) == {
        "step": 3,
        "stage": "student",
        "valid_top1_agreement": 0.5,
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_full_drive_is_told_by_name(log: StageLog, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(Stopped, match=r"the drive is full \(.*/metrics\.jsonl\); make room"),
        resumable_if_full(),
    ):
        log.validation(1, {"nll": 1.0})


def test_metrics_are_on_the_drive_before_the_checkpoint(
    log: StageLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on from there writes only what follows; their name, too, or the power may take it."""
    log.validation(1, {"nll": 1.0})
    done: list[Path] = []
    monkeypatch.setattr(stage_log, "flush_path", done.append)
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, *_: (folder.mkdir(parents=True), done.append(folder))
    )
    log.save(tiny_model().model, None, Counters(step=2))
    assert done == [tmp_path / "metrics.jsonl", tmp_path, tmp_path / "checkpoints" / "step-000002"]
