"""What an evaluation can be trusted with, and how long it takes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/evaluate_bench.py --humaneval HumanEval.jsonl [--repeats 5]

- humaneval_execution_seconds: all tests of the 164 problems, on their published solutions, in the sandbox.
- sandbox_attacks_tried, sandbox_attacks_won: the programs of tests/attacks.py, each in every way in which
  tests are run, in this machine's sandbox.
- false_better_rate: pairs of equal models that the verdict tells apart (benchmarks/verdict_simulation.py).
- batched_evaluation_speedup: answers of the embedded teacher to held-out functions and their tests, 64 at
  once against one by one.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx_distill  # before mlx: it puts a fast BLAS in front

# isort: split

import mlx.core as mx
from record import record
from verdict_simulation import false_better_rate

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.answering import judge
from mlx_distill.evaluate.code import pass_at_1
from mlx_distill.evaluate.published import published
from mlx_distill.options import Evaluate

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from attacks import try_all

ROWS = 64  # functions that are answered


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What an evaluation can be trusted with, and how long it takes."
    )
    parser.add_argument("--humaneval", required=True, help="the published JSONL file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    lines = [execution(arguments.humaneval, arguments.repeats), *attacks(), batched(arguments.repeats)]
    record("evaluate", [*lines, false_better_rate()])


def execution(file: str, repeats: int) -> dict[str, Any]:
    """Seconds for the tests of all problems, servers started anew each time."""
    rows = published("humaneval", file, None).rows
    answers = [row.completion or "" for row in rows]
    seconds, found = [], {}
    for _ in range(repeats + 1):  # the first warms up
        before = time.perf_counter()
        found, _ = pass_at_1(rows, answers, seconds=5.0)
        seconds.append(time.perf_counter() - before)
    config = {"problems": found["problems"], "passed": found["pass@1"], "sandbox": found["sandbox"]}
    return {
        "name": "humaneval_execution_seconds",
        "value": statistics.median(seconds[1:]),
        "unit": "s",
        "spread": [min(seconds[1:]), max(seconds[1:])],
        "config": {**config, "repeats": repeats},
    }


def attacks() -> list[dict[str, Any]]:
    tried, won = try_all()
    for line in won:
        print(f"won: {line}", file=sys.stderr)
    config = {"sandbox": sandbox.backend()}
    return [
        {"name": "sandbox_attacks_tried", "value": tried, "unit": "attacks", "config": config},
        {"name": "sandbox_attacks_won", "value": len(won), "unit": "attacks", "config": config},
    ]


def batched(repeats: int) -> dict[str, Any]:
    """How much faster a task is scored 64 answers at a time than one by one, round by round."""
    teacher = models.load("embedded", "teacher.model")
    rows = pocket.rows("code", "test", ROWS)
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    seconds: dict[int, list[float]] = {1: [], ROWS: []}
    scores = set()
    for _ in range(repeats + 1):  # the first warms up
        for size, found in seconds.items():
            before = clock()
            how = Evaluate(tasks=["code"], batch_size=size, max_tokens=100)
            scores.add(judge(f"batch {size}", teacher, rows, how)[0]["pass@1"])
            found.append(clock() - before)
    ratios = [one / all_ for one, all_ in zip(seconds[1][1:], seconds[ROWS][1:], strict=True)]
    return {
        "name": "batched_evaluation_speedup",
        "value": statistics.median(ratios),
        "unit": f"time one by one / {ROWS} at once",
        "spread": [min(ratios), max(ratios)],
        "config": {"rows": ROWS, "pass@1": sorted(scores), "repeats": repeats, "blas": mlx_distill.BLAS},
    }


if __name__ == "__main__":
    main()
