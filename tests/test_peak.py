"""Memory of a stage, measured where this system tells it."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill import peak
from mlx_distill.memory import Estimate
from mlx_distill.peak import PeakMemory

PREDICTED = Estimate(1.0, 2.0, 3.0, 4.0, 5.0, {"teacher": 6.0, "teacher.others.0": 7.0}, 100.0)
ON_CPU = mx.default_device() == mx.cpu


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "memory.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(peak.resident("VmHWM") is None and ON_CPU, reason="nothing tells memory here")
def test_a_stage_that_takes_memory_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    mx.clear_cache()  # what tests before have freed could be taken again without growing
    memory = PeakMemory(tmp_path, PREDICTED)
    with memory.of("idle"):
        pass
    with memory.of("train"):
        held = mx.full((1 << 16, 1 << 10), 1.0)
        mx.eval(held)  # 0.25 GiB, gone before the stage ends
        del held
    with memory.of("evaluate"):
        pass
    found = read(tmp_path)
    assert found["measured_gib"]["train"] > 0.24
    assert found["measured_gib"]["evaluate"] < found["measured_gib"]["train"] - 0.2  # the peak was its own
    assert found["measured_gib"]["idle"] < 0.05
    assert (found["why"], found["machine_gib"]) == (None, 100.0)
    assert found["predicted_gib"] == {"student": 10.0, "teachers": 13.0, "logits": 5.0, "together": 28.0}


def test_stages_of_the_process_before_are_kept(tmp_path: Path) -> None:
    with PeakMemory(tmp_path, PREDICTED).of("train"):
        pass
    with PeakMemory(tmp_path, PREDICTED).of("evaluate"):
        pass
    assert list(read(tmp_path)["measured_gib"]) == ["train", "evaluate"]


def test_what_was_damaged_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"measured_gib": {"train": NaN}}', encoding="utf-8")
    with PeakMemory(tmp_path, PREDICTED).of("evaluate"):
        pass
    assert list(read(tmp_path)["measured_gib"]) == ["evaluate"]


def test_a_stage_that_failed_has_no_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), PeakMemory(tmp_path, PREDICTED).of("train"):
        raise ValueError("no")
    assert not (tmp_path / "memory.json").exists()


@pytest.mark.skipif(not ON_CPU, reason="a GPU's counter is MLX's own")
def test_where_nothing_is_told_the_reason_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "resident", lambda *_, **__: None)
    with PeakMemory(tmp_path, PREDICTED).of("train"):
        pass
    found = read(tmp_path)
    assert found["measured_gib"] == {"train": None}
    assert found["how"] is None and "does not tell" in found["why"]
