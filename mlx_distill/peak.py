"""The most memory that each stage of a run took, beside what was predicted: `memory.json`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.files import write_json
from mlx_distill.memory import Estimate
from mlx_distill.plain_json import parse_object
from mlx_distill.resident import GIB, resident


class PeakMemory:
    """Measures stages, and keeps what it found in the run folder.

    On a GPU that is the peak of MLX's own counter. On the CPU it is how far the resident memory of the
    process rose above what it was before the first stage: MLX's counter counts buffers there that were
    never touched.
    """

    def __init__(self, folder: Path, predicted: Estimate):
        self.path, self.predicted = folder / "memory.json", predicted
        self.on_gpu = mx.default_device() == mx.gpu
        mx.clear_cache()  # of what was there before the run
        self.base = 0 if self.on_gpu else resident("VmRSS")

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Measure one stage. Work that an error ends leaves no number."""
        mx.clear_cache()  # what earlier stages let go is nobody's
        if self.on_gpu:
            mx.reset_peak_memory()
        else:
            resident("VmHWM", reset_peak=True)
        yield
        peak = mx.get_peak_memory() if self.on_gpu else resident("VmHWM")
        told = peak is not None and self.base is not None
        self._keep(stage, max(0, (peak or 0) - (self.base or 0)) / GIB if told else None)

    def measured(self, stage: str) -> float | None:
        """GiB that a stage took; None where nobody could tell."""
        return _measured(self.path).get(stage)

    def _keep(self, stage: str, gib: float | None) -> None:
        how, found = "MLX's counter" if self.on_gpu else "resident memory of the process", self.predicted
        told = self.on_gpu or self.base is not None
        teachers = {"teachers": sum(found.teachers.values())}
        predicted = {"student": found.student, **teachers, "logits": found.logits, "together": found.together}
        content: dict[str, Any] = {
            "predicted_gib": predicted,  # of training, with everything that is live then
            "predicted_stages_gib": {name: parts.together for name, parts in found.by_stage.items()},
            "measured_gib": {**_measured(self.path), stage: gib},
            "machine_gib": found.machine if math.isfinite(found.machine) else None,
            "how": how if told else None,
            "why": None if told else "no GPU, and this system does not tell peak resident memory",
        }
        write_json(self.path, content)


def _measured(path: Path) -> dict[str, float | None]:
    """What earlier stages took, and those of the process before."""
    try:
        found = parse_object(path.read_bytes(), finite=True).get("measured_gib")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
