"""How far one measurement of speed lies from the next, of the same model on the same machine.

    OPENBLAS_NUM_THREADS=1 python benchmarks/speed_bench.py

The embedded teacher is measured as `mlx-distill evaluate` does it, RUNS times. Of each metric and prompt
length the value is the largest of the medians by the smallest: 1 would be a measure without error. `spread`
has the smallest and the largest of the spreads that the measurements themselves tell, as shares of their
medians. It takes seconds. What else the machine does decides, so `elsewhere` has the share of its processor
time that others took meanwhile, where Linux tells it.
"""

import os
from pathlib import Path
from typing import Any

from record import record

from mlx_distill.evaluate.speed import NAMES, measure_speed
from mlx_distill.hub import model_folder

RUNS, LENGTHS = 5, [128, 512]
PROBE = list(range(5, 105))  # tokens of the prompts, which cost the same whatever they are


def _own() -> float:
    """Processor seconds of this process and of those that it started."""
    return sum(os.times()[:4])


def _busy() -> tuple[float, float]:
    """Processor seconds that the machine was idle, and that it was not; zeros where it does not tell."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0, 0.0
    ticks = [
        int(number) / os.sysconf("SC_CLK_TCK") for number in path.read_text(encoding="utf-8").split()[1:9]
    ]
    idle = ticks[3] + ticks[4]
    return idle, sum(ticks) - idle


def main() -> None:
    folder = model_folder("embedded", "teacher.model")
    all_before, own_before = _busy(), _own()
    found = [measure_speed(folder, PROBE, LENGTHS)["speed"] for _ in range(RUNS)]
    idle, busy = (after - before for after, before in zip(_busy(), all_before, strict=True))
    elsewhere = (busy - (_own() - own_before)) / (busy + idle) if busy else None
    lines = []
    for i, length in enumerate(LENGTHS):
        for name in NAMES:
            rows = [run[i] for run in found]
            values = [row[name] for row in rows if row[name] is not None]
            if not values:
                continue
            shares = [row.get(f"{name}_spread", 0.0) / row[name] for row in rows]
            config: dict[str, Any] = {"medians": values, "runs": RUNS, "elsewhere": elsewhere}
            lines.append(
                {
                    "name": f"{name}, {length} tokens",
                    "value": max(values) / min(values),
                    "spread": [min(shares), max(shares)],
                    "unit": "largest/smallest median",
                    "config": config,
                }
            )
    record("speed", lines)


if __name__ == "__main__":
    main()
