"""Worked steps against answers alone: one teacher, one kind of student, as many counted tokens.

    python benchmarks/traces_bench.py --seeds 0 1 2 --record
    python benchmarks/traces_bench.py --table

The teacher of recipes/reasoning/pocket_trace_teacher.yaml is trained first, unless it stands in the folder
already. It answers the prompts of recipes/reasoning/pocket_traces.yaml greedily; what equals its reference is
kept. The student of that recipe then learns from these answers alone, with cross entropy, in the ways of
`data.reasoning.learn`:

- both: steps and answers, for the recipe's steps. The counted tokens that this takes are the budget.
- answer, two_tasks: until as many tokens are counted. An answer is short, so these see many more rows.
- answer, as many steps: the answers alone for the recipe's steps.

Scores are exact matches on held-out rows, on those of each length, and on functions longer than any learned.
A seed draws the weights and the order of rows. Finished runs are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.asked import answered
from mlx_distill.bundled import find_recipe
from mlx_distill.counters import Counters
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batches
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.answering import judge
from mlx_distill.evaluate.exact import score
from mlx_distill.generate import generate
from mlx_distill.models import Loaded
from mlx_distill.options import Reasoning, Source
from mlx_distill.reasoning import as_learned, split, weigh
from mlx_distill.recipe import Recipe
from mlx_distill.student import make_student
from mlx_distill.train import train

TEST, LONGER = 500, 200  # rows
WAYS = {"both": "both", "answer": "answer", "two_tasks": "two_tasks", "answer, as many steps": "answer"}


class Telling(Quiet):
    """Says now and then how it goes."""

    def metrics(self, counters: Counters, *_: Any) -> None:
        loss = sum(counters.window_losses.values()) / counters.window_weight
        print(f"step {counters.step}  loss {loss:.3f}  {counters.seconds:.0f} s", file=sys.stderr)
        counters.close_window()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/traces-bench"), help="of what is kept")
    parser.add_argument(
        "--teacher", nargs="*", default=[], metavar="KEY=VALUE", help="for the teacher's recipe"
    )
    parser.add_argument("--student", nargs="*", default=[], metavar="KEY=VALUE", help="for the student's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--record", action="store_true", help="append to results/traces.jsonl, too")
    parser.add_argument("--table", action="store_true", help="print what is recorded, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table(read(RESULTS / "traces.jsonl"))
        return
    mx.set_cache_limit(2 << 30)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    teacher = trained(folder, arguments.teacher)
    options = recipe.load(find_recipe("reasoning/pocket_traces"), arguments.student)
    bench = Bench(teacher, options, kept_answers(folder, teacher, options))
    lines = read(folder / "lines.jsonl")
    todo = [("teacher", None), *((way, seed) for seed in arguments.seeds for way in arguments.ways)]
    for way, seed in todo:
        if any((line["config"]["way"], line["config"]["seed"]) == (way, seed) for line in lines):
            continue
        line = bench.line(way, seed)
        lines.append(line)
        with (folder / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if arguments.record:
            record("traces", [line])
    table(lines)


def read(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def trained(folder: Path, overrides: list[str]) -> Loaded:
    """The teacher, made by its recipe."""
    made = folder.resolve() / "runs" / "pocket-trace-teacher" / "models" / "student"
    if not made.exists():
        path = find_recipe("reasoning/pocket_trace_teacher").resolve()
        command = [sys.executable, "-m", "mlx_distill", "train", str(path), *overrides, "--overwrite"]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
    return models.load(str(made), "teacher.model")


def kept_answers(folder: Path, teacher: Loaded, options: Recipe) -> list[Row]:
    """The prompts with the teacher's greedy answers, where these equal the reference."""
    prompts, marks = options.data.prompts, options.data.reasoning
    assert isinstance(prompts, Source) and prompts.rows is not None and marks is not None
    rows = pocket.rows("trace", "train", prompts.rows, prompts.start, prompts.seed)
    path = folder / "answers.json"
    if not path.exists():
        answers = generate(
            teacher.model,
            [encode_prompt(row, teacher.tokenizer) for row in rows],
            end_of_turn_ids(teacher.tokenizer),
            max_tokens=options.generate.max_tokens,
            batch_size=options.generate.batch_size,
        )
        texts = [decode_answer(answer.tokens, teacher.tokenizer) for answer in answers]
        path.write_text(json.dumps(texts), encoding="utf-8")
    whole = [
        answered(row, text)
        for row, text in zip(rows, json.loads(path.read_text(encoding="utf-8")), strict=True)
    ]
    return [row for row in whole if score(row, split(row.completion or "", marks)[1])]


class Bench:
    """Students of one recipe, and what they score."""

    def __init__(self, teacher: Loaded, options: Recipe, rows: list[Row]):
        self.teacher, self.options, self.rows = teacher, options, rows
        self.vocabulary = max(teacher.tokenizer.get_vocab().values()) + 1
        self.budget: dict[int, int] = {}  # counted tokens of `both`, by seed

    def line(self, way: str, seed: int | None) -> dict[str, Any]:
        """One run, measured."""
        started = time.process_time()
        config: dict[str, Any] = {"way": way, "seed": seed, "kept": len(self.rows)}
        if seed is None:
            found = self.scores(self.teacher)
        else:
            student, used = self.student(way, seed)
            found = {**self.scores(student), **used}
        seconds = time.process_time() - started
        name = way if seed is None else f"{way}, seed {seed}"
        line = {"name": name, "value": found["test"], "unit": "exact_match", "config": config}
        return {**line, **found, "cpu_seconds": seconds}

    def student(self, way: str, seed: int) -> tuple[Loaded, dict[str, Any]]:
        """A student that learned in one of the ways, and what that took."""
        batches = self.batches(WAYS[way], seed)
        steps = self.options.train.steps
        if way in ("answer", "two_tasks"):
            if seed not in self.budget:
                both = self.batches("both", seed)
                self.budget[seed] = sum(counted(both, i) for i in range(steps))
            steps = steps_for(batches, self.budget[seed])
        changed = self.options.train.model_copy(update={"steps": steps, "save_every": 0})
        options = self.options.model_copy(update={"train": changed, "seed": seed, "teacher": None})
        student = make_student(options.student, self.teacher.tokenizer, seed)
        log: Any = Telling()
        used = train(student.model, [], batches, options, self.vocabulary, log)
        read_tokens = sum(batches[i].tokens.size for i in range(min(steps, 50))) / min(steps, 50) * steps
        return student, {
            "steps": steps,
            "counted_tokens": used.train_tokens,
            "tokens_read": round(read_tokens),
            "train_seconds": used.train_seconds,
        }

    def batches(self, learn: Any, seed: int) -> Batches:
        marks = Reasoning(learn=learn)
        learned = [one for row in self.rows for one in as_learned(row, marks)]
        encoded = [encode(row, self.teacher.tokenizer) for row, _ in learned]
        encoded = weigh(encoded, [task for _, task in learned], marks)
        return Batches(encoded, self.options.train.batch_tokens, seed)

    def scores(self, model: Loaded) -> dict[str, Any]:
        """Exact match on held-out rows, of each number of operations, and on longer functions."""
        found: dict[str, Any] = {}
        by_length: dict[int, list[float]] = defaultdict(list)
        for split_name, count in (("test", TEST), ("longer", LONGER)):
            rows = pocket.rows("trace", split_name, count)
            marks = self.options.data.reasoning
            metrics, judged = judge("model", model, rows, self.options.evaluate, reasoning=marks)
            found[split_name] = metrics["exact_match"]
            for row, [answer] in zip(rows, judged, strict=True):
                by_length[(row.prompt or "").count("\n") - 2].append(answer.score)
        return {**found, "by_operations": {n: statistics.fmean(by_length[n]) for n in sorted(by_length)}}


def counted(batches: Batches, index: int) -> int:
    return int(batches[index].counted.sum())


def steps_for(batches: Batches, budget: int) -> int:
    """Steps until so many tokens are counted."""
    steps = total = 0
    while total < budget:
        total += counted(batches, steps)
        steps += 1
    return steps


def table(lines: list[dict[str, Any]]) -> None:
    """Means over seeds and the smallest and largest value, as Markdown."""
    lengths = sorted({int(n) for line in lines for n in line["by_operations"]})
    heads = ["test", *(f"{n} operations" for n in lengths), "counted tokens", "tokens read", "steps"]
    print("| | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")
    for way in ("teacher", *WAYS):
        found = [line for line in lines if line["config"]["way"] == way]
        if not found:
            continue
        cells = [cell([line["test"] for line in found])]
        for n in lengths:
            cells.append(cell([{int(k): v for k, v in line["by_operations"].items()}[n] for line in found]))
        for key in ("counted_tokens", "tokens_read", "steps"):
            known = [line[key] for line in found if key in line]
            cells.append(f"{statistics.fmean(known):,.0f}" if known else "")
        print(f"| {way} | " + " | ".join(cells) + " |")


def cell(values: list[float]) -> str:
    mean, low, high = (100 * f(values) for f in (statistics.fmean, min, max))
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
