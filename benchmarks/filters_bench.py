"""What each filter costs: seconds for the pocket corpus's own answers, as if a model had written them.

    python benchmarks/filters_bench.py

Each filter looks at all answers by itself, as it does where no other was there before it. Perplexity is the
embedded teacher's. What is dropped is given too: none of these answers is wrong, so all that `parses`,
`language` or `perplexity` take here they take wrongly. Last, how much of the corpora's own answers repeats.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from record import record

import mlx_distill  # noqa: F401 - before mlx, for its BLAS
from mlx_distill import models
from mlx_distill.data import pocket, stdlib
from mlx_distill.data.template import encode
from mlx_distill.filters import FILTERS, Material, reasons
from mlx_distill.filters.repetition import repeated_share
from mlx_distill.options import Filters
from mlx_distill.score import nll_of_rows
from mlx_distill.written import Written

SETTINGS = {
    "stubs": [True],
    "min_tokens": [5],
    "max_tokens": [100],
    "repetition": [0.5, 0.8],
    "parses": [True],
    "language": ["en"],
    "decontaminate": [8, 13],
    "verified": [True],
    "perplexity": [20.0],
    "duplicates": [1.0, 0.9, 0.8, 0.5],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    assert SETTINGS.keys() == FILTERS.keys()

    teacher = models.load("embedded", "teacher.model")
    vocabulary = max(teacher.tokenizer.get_vocab().values()) + 1
    rows = pocket.rows("both", "train", arguments.answers, 0, 0)
    encoded = [encode(row, teacher.tokenizer) for row in rows]
    written = [
        Written(i, 0, row, row.answer() or "", one.tokens[one.start :], True)
        for i, (row, one) in enumerate(zip(rows, encoded, strict=True))
    ]
    material = Material(
        held_out=[*pocket.rows("both", "valid", 200, 0, 0), *pocket.rows("both", "test", 300, 0, 0)],
        nll=lambda some: nll_of_rows(teacher.model, [encoded[one.prompt] for one in some], vocabulary),
    )
    lines = []
    for name, values in SETTINGS.items():
        for value in values:
            seconds, dropped = timed(
                written, Filters.model_validate({name: value}), material, arguments.repeats
            )
            config = {"answers": len(written), "corpus": "pocket", "task": "both", "value": value}
            lines.append(
                {
                    "name": f"{name} {value}",
                    "value": round(statistics.median(seconds), 3),
                    "spread": [round(min(seconds), 3), round(max(seconds), 3)],
                    "dropped": dropped,
                    "unit": "s",
                    "config": config,
                }
            )
    record("filters", lines + repeats())


def repeats(count: int = 1000) -> list[dict[str, Any]]:
    """Of the answers of each corpus the 99th percentile of `repeated_share`, and the largest."""
    lines = []
    for corpus in (pocket, stdlib):
        for task in ("code", "summary"):
            shares = [repeated_share(row.answer() or "") for row in corpus.rows(task, "train", count, 0, 0)]
            name = corpus.__name__.rpartition(".")[2]
            lines.append(
                {
                    "name": f"repeated share of {name} {task}, 99th percentile",
                    "value": round(float(np.quantile(shares, 0.99)), 3),
                    "largest": round(max(shares), 3),
                    "unit": "share of words",
                    "config": {"answers": len(shares), "corpus": name, "task": task},
                }
            )
    return lines


def timed(
    written: Sequence[Written], options: Filters, material: Material, repeats: int
) -> tuple[list[float], int]:
    """Seconds of each repeat, and how many answers are dropped."""
    seconds, dropped = [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        found = reasons(written, options, material)
        seconds.append(time.perf_counter() - start)
        dropped = sum(reason is not None for reason in found)
    return seconds, dropped


if __name__ == "__main__":
    main()
