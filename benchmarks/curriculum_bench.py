"""Rows in an order against rows in random order; and what replay keeps of a first task.

    python benchmarks/curriculum_bench.py order --seeds 0 1 2 --record
    python benchmarks/curriculum_bench.py replay --seeds 0 1 2 --record
    python benchmarks/curriculum_bench.py --table

Students have 174,528 weights and learn from labels with cross entropy, 1,024 tokens a step. A seed draws
rows, weights and order. Scores are of the held-out split; KL is to the embedded teacher.

- order: 50 steps on 100 functions, all rows alike, give the student that every arm begins with. Then come 200
  steps on 2,000 other functions, about one and a half times through them, in one order or another.
- replay: 300 steps on 2,000 functions whose bodies are asked for (code), then 100 steps on 1,000 whose
  docstrings are (summary), with a share of rows of the first kind among them.

With --record, finished runs are kept in results/curriculum.jsonl at once, and are not repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.data import pocket
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.evaluate.answering import judge
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.lessons import Lessons, make_batches
from mlx_distill.models import Loaded
from mlx_distill.recipe import Recipe
from mlx_distill.score import nll_of_rows
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import train

FIRST, LABELS = 50, 100  # steps and rows before any order
STEPS, ROWS, TEST = 200, 2000, 150
CODE_STEPS, SUMMARY_STEPS, SUMMARIES = 300, 100, 1000
SHARES = (0.0, 0.05, 0.2)
DIFFICULTIES = ("length", "teacher_nll", "student_loss")
PACES: dict[str, dict[str, Any]] = {
    "competence": {"pace": "competence"},
    "sorted": {"pace": "sorted"},
    "weighted": {"pace": "weighted"},
    "competence, reverse": {"pace": "competence", "reverse": True},
}
METRICS = {
    "order": ("pass@1", "kl", "nll"),
    "replay": ("code pass@1", "code kl", "code nll", "summary rougeL", "summary nll"),
}


class Bench:
    """The teacher, the student of one seed, and what is measured of it."""

    def __init__(self, seed: int):
        self.seed, self.teacher = seed, models.load("embedded", "teacher.model")
        self.vocabulary = max(self.teacher.tokenizer.get_vocab().values()) + 1
        self.judging = LiveTeacher(self.teacher, self.vocabulary)
        self.student: Loaded = make_student(self.options(1).student, self.teacher.tokenizer, seed)

    def options(self, steps: int, data: dict[str, Any] | None = None, **changes: Any) -> Recipe:
        """The recipe of a training run; `changes` are options of `train`."""
        return recipe.decode(
            {
                "name": "bench",
                "seed": self.seed,
                "student": {
                    "shape": {
                        "hidden_size": 64,
                        "intermediate_size": 160,
                        "num_hidden_layers": 3,
                        "num_attention_heads": 8,
                    },
                    "tokenizer": {"pieces": 512},  # never trained: rows come encoded
                },
                "data": data or {"train": {"source": "pocket", "rows": ROWS}},
                "objective": {"cross_entropy": {}},
                "train": {
                    "steps": steps,
                    "batch_tokens": 1024,
                    "learning_rate": 4e-3,
                    "warmup": min(30, steps - 1),
                    "weight_decay": 0.1,
                    "beta2": 0.99,
                    "compile": False,
                    "log_every": 0,
                    "save_every": 0,
                    **changes,
                },
                "evaluate": {"tasks": ["code", "summary"], "max_tokens": 100, "batch_size": TEST},
            }
        )

    def rows(self, source: str, task: str, count: int, start: int = 0) -> Lessons:
        rows = pocket.rows(task, "train", count, start=start, seed=self.seed + 1)
        encoded = [encode(row, self.teacher.tokenizer) for row in rows]
        return Lessons(rows, encoded, [source] * count, [None] * count)

    def learn(self, learned: Lessons, how: Recipe, difficulties: np.ndarray | None = None) -> float:
        """Train the student as it is now; the seconds it took."""
        log: Any = Quiet()
        batches = make_batches(learned, how, difficulties)
        return train(self.student.model, [], batches, how, self.vocabulary, log).train_seconds

    def weights(self) -> list[tuple[str, mx.array]]:
        flat: Any = tree_flatten(self.student.model.parameters())
        return flat

    def score(self, test: list[Row]) -> dict[str, Any]:
        encoded = [encode(row, self.teacher.tokenizer) for row in test]
        found = fidelity(self.student.model, encoded, self.vocabulary, teacher=self.judging)[0]
        return found | judge("student", self.student, test, self.options(1).evaluate)[0]


def joined(*parts: Lessons) -> Lessons:
    return Lessons(*([*chain(*columns)] for columns in zip(*parts, strict=True)))


def order(seed: int, known: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Every order at one seed."""
    bench = Bench(seed)
    test = pocket.rows("code", "test", TEST)
    bench.learn(bench.rows("train", "code", LABELS), bench.options(FIRST))
    before, learned = bench.weights(), bench.rows("train", "code", ROWS, start=LABELS)
    found = {
        "length": np.array([len(row.tokens) - row.start for row in learned.encoded], dtype=np.float64),
        "teacher_nll": nll_of_rows(bench.teacher.model, learned.encoded, bench.vocabulary),
        "student_loss": nll_of_rows(bench.student.model, learned.encoded, bench.vocabulary),
    }
    even = np.zeros(ROWS)  # nothing is more difficult than anything else: the sampler alone
    arms: dict[str, tuple[dict[str, Any] | None, np.ndarray | None]] = {
        "before": (None, None),
        "shuffled": ({}, None),
        "drawn evenly": ({"curriculum": {"by": "length", "start": 1.0}}, even),
    }
    for by in DIFFICULTIES:
        for name, pace in PACES.items():
            # The recipe would refuse a loss under a new student; this one has learned.
            arms[f"{by}: {name}"] = ({"curriculum": {"by": "length", **pace}}, found[by])
    for name, (changes, difficulties) in arms.items():
        if (f"order: {name}", seed) in known:
            continue
        started = time.perf_counter()
        bench.student.model.load_weights(before)
        if changes is not None:
            bench.learn(learned, bench.options(STEPS, **changes), difficulties)
        scores = bench.score(test)
        yield {
            "name": f"order: {name}",
            "value": scores["pass@1"],
            "unit": "pass@1",
            "config": {"seed": seed, "steps": STEPS, "rows": ROWS, "batch_tokens": 1024},
            **{metric: scores[metric] for metric in METRICS["order"]},
            "seconds": time.perf_counter() - started,
        }


def replay(seed: int, known: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """The second task with every share of the first, at one seed."""
    if all((f"replay: {name}", seed) in known for name in replays()):
        return
    bench = Bench(seed)
    tests = {task: pocket.rows(task, "test", TEST) for task in ("code", "summary")}
    code = bench.rows("replay.0", "code", ROWS)
    bench.learn(code, bench.options(CODE_STEPS))
    before, summaries = bench.weights(), bench.rows("train", "summary", SUMMARIES, start=ROWS)
    for name, share in replays().items():
        if (f"replay: {name}", seed) in known:
            continue
        started = time.perf_counter()
        bench.student.model.load_weights(before)
        if share is not None:
            source = {"source": "pocket", "rows": SUMMARIES, "task": "summary"}
            again = {"source": "pocket", "rows": ROWS, "task": "code", "weight": share}
            data = {"train": source, "replay": [again] if share else []}
            bench.learn(joined(summaries, code) if share else summaries, bench.options(SUMMARY_STEPS, data))
        scores = {f"{task} {key}": v for task in tests for key, v in bench.score(tests[task]).items()}
        yield {
            "name": f"replay: {name}",
            "value": scores["code pass@1"],
            "unit": "pass@1 of the first task",
            "config": {"seed": seed, "steps": [CODE_STEPS, SUMMARY_STEPS], "batch_tokens": 1024},
            **{metric: scores[metric] for metric in METRICS["replay"]},
            "seconds": time.perf_counter() - started,
        }


def replays() -> dict[str, float | None]:
    return {"before": None, **{f"{share:.0%} of rows": share for share in SHARES}}


def kept(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def table(lines: list[dict[str, Any]]) -> None:
    """Means over seeds and the smallest and largest value, as Markdown."""
    for experiment, metrics in METRICS.items():
        names = list(dict.fromkeys(line["name"] for line in lines if line["name"].startswith(experiment)))
        if not names:
            continue
        print(f"\n| {experiment} | " + " | ".join(metrics) + " |\n|---" + "|---" * len(metrics) + "|")
        for name in names:
            found = [line for line in lines if line["name"] == name]
            cells = [cell([line[metric] for line in found], metric) for metric in metrics]
            print(f"| {name.partition(': ')[2]} | " + " | ".join(cells) + " |")


def cell(values: list[float], metric: str) -> str:
    scale, digits = (100, 1) if metric.endswith(("pass@1", "rougeL")) else (1, 3)
    mean, low, high = (scale * f(values) for f in (statistics.fmean, min, max))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", choices=("order", "replay"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--record", action="store_true", help="keep the lines in results/curriculum.jsonl")
    parser.add_argument("--table", nargs="?", const=RESULTS / "curriculum.jsonl", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        table(kept(arguments.table))
        return
    if arguments.experiment is None:
        parser.error("name an experiment, or --table")
    mx.set_cache_limit(2 << 30)
    lines = kept(RESULTS / "curriculum.jsonl") if arguments.record else []
    known = {(line["name"], line["config"]["seed"]) for line in lines}
    for seed in arguments.seeds:
        for line in (order if arguments.experiment == "order" else replay)(seed, known):
            if arguments.record:
                record("curriculum", [line])
            else:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
