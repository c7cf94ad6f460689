"""How long an earlier run of the same recipe took, as its folder tells."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeGuard

from mlx_distill.layout import FINGERPRINT
from mlx_distill.plain_json import parse_object


class Timed(NamedTuple):
    """Seconds of a run that was done, or begun."""

    step_seconds: float | None  # of a training step, in the mean; None: none was logged
    stages: dict[str, float]  # of each stage that was done, or begun
    step: int = 0  # the last one that was logged

    @classmethod
    def of(cls, folder: Path, fingerprint: str) -> Self | None:
        """None where the folder holds no run of this fingerprint, or one that cannot be read."""
        try:
            if (folder / FINGERPRINT).read_text(encoding="utf-8").strip() != fingerprint:
                return None
            lines = _objects(folder / "metrics.jsonl")
            times = folder / "times.json"
            stages = parse_object(times.read_bytes(), finite=True) if times.exists() else {}
        except (OSError, ValueError):
            return None
        took = {name: float(seconds) for name, seconds in stages.items() if _is_number(seconds)}
        for line in reversed(lines):
            step, seconds = line.get("step"), line.get("seconds")
            if line.get("stage") == "student" and type(step) is int and step > 0 and _is_number(seconds):
                return cls(seconds / step, took, step)
        return cls(None, took)


def _objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; a line that a kill cut off is none."""
    found = []
    # Not `splitlines`, which also splits at U+2028 and others that the name of a file may hold.
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            found.append(parse_object(line, finite=True))
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float)
