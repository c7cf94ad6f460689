"""What each objective is worth on the embedded teacher: the same student, rows and tokens, another loss.

    python benchmarks/objectives_bench.py few --seeds 0 1 2
    python benchmarks/objectives_bench.py noisy --seeds 0 1 2
    python benchmarks/objectives_bench.py --table

Two scenarios of code generation, both 300 steps of 1,024 tokens:

- few: 100 functions with bodies, 3,000 docstrings that the teacher answers greedily. The student learns from
  both; the baseline from the 100 alone.
- noisy: 1,000 functions with bodies, 3 of 10 of them the body of another function. The student learns from
  these very rows, wrong ones too; the teacher says at each token what it would have written there.

A seed draws rows, initial weights and order. Scores are of 150 functions of the held-out split. Every
finished run is kept in results/objectives.jsonl at once, and one that is there is not repeated.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batch, Batches, Encoded, at_places, counted_places
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.answering import judge
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.generate import generate
from mlx_distill.losses import Targets
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import teacher_layers
from mlx_distill.models import Loaded
from mlx_distill.recipe import Recipe
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher, Teaches
from mlx_distill.train import train

STEPS, TOKENS, LABELS, PROMPTS, NOISY, WRONG, TEST = 300, 1024, 100, 3000, 1000, 0.3, 150
KL: dict[str, Any] = {"forward_kl": {}}
# name -> objective, and what a recipe says of the teacher beside its name
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "baseline: labels alone": ({"cross_entropy": {}}, {}),
    "cross_entropy on the teacher's answers": ({"cross_entropy": {}}, {}),
    "forward_kl": (KL, {}),
    "forward_kl + 0.5 cross_entropy": ({**KL, "cross_entropy": {"weight": 0.5}}, {}),
    "forward_kl, top 8 and tail": (KL, {"top_k": 8}),
    "reverse_kl": ({"reverse_kl": {}}, {}),
    "jensen_shannon, normalized": ({"jensen_shannon": {"normalize": True}}, {}),
    "skewed_forward_kl": ({"skewed_forward_kl": {}}, {}),
    "skewed_reverse_kl": ({"skewed_reverse_kl": {}}, {}),
    "adaptive_kl": ({"adaptive_kl": {}}, {}),
    "total_variation": ({"total_variation": {}}, {}),
    "reverse_kl + cross_entropy": ({"reverse_kl": {}, "cross_entropy": {}}, {}),
    "jensen_shannon, normalized + cross_entropy": (
        {"jensen_shannon": {"normalize": True}, "cross_entropy": {}},
        {},
    ),
    "skewed_reverse_kl + cross_entropy": ({"skewed_reverse_kl": {}, "cross_entropy": {}}, {}),
    "forward_kl + hidden_cosine, last": ({**KL, "hidden_cosine": {}}, {}),
    "forward_kl + hidden_mse, uniform, balanced": (
        {**KL, "hidden_mse": {"layers": "uniform", "balanced": True, "weight": 0.1}},
        {},
    ),
    "forward_kl + attention_relations, last": ({**KL, "attention_relations": {}}, {}),
}
METRICS = ("pass@1", "kl", "nll", "top1_agreement", "ece")


class Remembering(LiveTeacher):
    """A live teacher that reads each row once: exactly its targets, at half the time of a step."""

    def __init__(self, loaded: Loaded, vocabulary: int, rows: Sequence[Encoded]):
        super().__init__(loaded, vocabulary)
        self.rows, self.known = rows, dict[int, np.ndarray]()

    def targets(self, batch: Batch) -> Targets:
        places = counted_places(batch)
        if any(row not in self.known for row in batch.rows):
            found, start = np.array(super().targets(batch).last)[0], 0
            for row in batch.rows:
                size = len(self.rows[row].tokens) - self.rows[row].start
                self.known[row], start = found[start : start + size], start + size
        last = np.concatenate([self.known[row] for row in batch.rows])
        last = np.pad(last, ((0, places.size - len(last)), (0, 0)))
        return Targets(at_places(batch.labels, places), last=mx.array(last)[None])


def options(objective: dict[str, Any], teacher: dict[str, Any], seed: int) -> Recipe:
    return recipe.decode(
        {
            "name": "bench",
            "seed": seed,
            "student": {
                "shape": {
                    "hidden_size": 64,
                    "intermediate_size": 160,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 8,
                }
            },
            "teacher": {"model": "embedded", **teacher},
            "data": {"train": {"source": "pocket", "rows": LABELS}},
            "objective": objective,
            "train": {
                "steps": STEPS,
                "batch_tokens": TOKENS,
                "learning_rate": 4e-3,
                "warmup": 30,
                "weight_decay": 0.1,
                "beta2": 0.99,
                "compile": False,
                "log_every": 0,
                "save_every": 0,
            },
            "evaluate": {"tasks": ["code"], "max_tokens": 100, "batch_size": 150},
        }
    )


def answered(teacher: Loaded, rows: list[Row]) -> list[Encoded]:
    """The rows with the teacher's own greedy answers, as the tokens that it wrote."""
    prompts = [encode_prompt(row, teacher.tokenizer) for row in rows]
    ends = end_of_turn_ids(teacher.tokenizer)
    answers = generate(teacher.model, prompts, ends, max_tokens=100, batch_size=256)
    end = teacher.tokenizer.eos_token_id
    return [
        Encoded([*prompt, *answer.tokens, end], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.finished and decode_answer(answer.tokens, teacher.tokenizer).strip()
    ]


def rows_of(scenario: str, seed: int, teacher: Loaded) -> dict[str, list[Encoded]]:
    """Rows for the baseline, for cross entropy on the teacher's answers, and for all other objectives."""
    if scenario == "few":
        rows = pocket.rows("code", "train", LABELS + PROMPTS, seed=seed + 1)
        labels = [encode(row, teacher.tokenizer) for row in rows[:LABELS]]
        written = [*labels, *answered(teacher, rows[LABELS:])]
        return {"baseline": labels, "answers": written, "all": written}
    rows = pocket.rows("code", "train", NOISY, seed=seed + 1)
    random = np.random.default_rng([seed, 7])
    wrong = random.permutation(NOISY)[: int(WRONG * NOISY)].tolist()
    noisy = list(rows)
    for place, other in zip(wrong, [*wrong[1:], wrong[0]], strict=True):
        noisy[place] = dataclasses.replace(rows[place], completion=rows[other].completion)
    labels = [encode(row, teacher.tokenizer) for row in noisy]
    return {"baseline": labels, "answers": answered(teacher, rows), "all": labels}


def score(
    student: Loaded, teacher: LiveTeacher, test: list[Row], vocabulary: int, how: Recipe
) -> dict[str, Any]:
    encoded = [encode(row, student.tokenizer) for row in test]
    found = fidelity(student.model, encoded, vocabulary, teacher=teacher)[0]
    return found | judge("student", student, test, how.evaluate)[0]


def run(scenario: str, seed: int, known: set[tuple[str, int, str]]) -> None:
    """Every objective at one seed."""
    teacher = models.load("embedded", "teacher.model")
    vocabulary = max(teacher.tokenizer.get_vocab().values()) + 1
    rows, remembering = rows_of(scenario, seed, teacher), dict[str, Remembering]()
    test, judging = pocket.rows("code", "test", TEST), LiveTeacher(teacher, vocabulary)
    for name, (objective, said) in OBJECTIVES.items():
        if (scenario, seed, name) in known:
            continue
        kind = {"baseline: labels alone": "baseline"}.get(name, "answers" if "answers" in name else "all")
        how = options(objective, said, seed)
        student = make_student(how.student, teacher.tokenizer, seed)
        looks = any(MENU[loss].family in ("hidden", "attention") for loss in objective)
        if looks:
            depths: list[Any] = [student.model.layers, teacher.model.layers]
            layers = teacher_layers(how.objective, *map(len, depths))
            taught: list[Teaches] = [LiveTeacher(teacher, vocabulary, layers)]
        elif any(MENU[loss].needs_teacher for loss in objective):
            taught = [remembering.setdefault(kind, Remembering(teacher, vocabulary, rows[kind]))]
        else:
            taught = []
        batches = Batches(rows[kind], how.train.batch_tokens, seed)
        started = time.perf_counter()
        log: Any = Quiet()
        used = train(student.model, taught, batches, how, vocabulary, log)
        found = score(student, judging, test, vocabulary, how)
        line = {
            "name": f"{scenario}: {name}",
            "value": found["pass@1"],
            "unit": "pass@1",
            "config": {
                "scenario": scenario,
                "seed": seed,
                "objective": objective,
                "teacher": said,
                "steps": STEPS,
                "batch_tokens": how.train.batch_tokens,
            },
            **{metric: found[metric] for metric in METRICS},
            "train_tokens": used.train_tokens,
            "train_seconds": used.train_seconds,
            "seconds": time.perf_counter() - started,
        }
        record("objectives", [line])


def kept() -> list[dict[str, Any]]:
    path = RESULTS / "objectives.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def table() -> None:
    """Means over seeds and the smallest and largest value, as Markdown."""
    lines = kept()
    for scenario in ("few", "noisy"):
        print(f"\n{scenario}\n\n| objective | " + " | ".join(METRICS) + " |")
        print("|---" * (1 + len(METRICS)) + "|")
        for name in OBJECTIVES:
            found = [line for line in lines if line["name"] == f"{scenario}: {name}"]
            if found:
                cells = [cell([line[metric] for line in found], metric) for metric in METRICS]
                print(f"| {name} | " + " | ".join(cells) + " |")


def cell(values: list[float], metric: str) -> str:
    scale, digits = (100, 1) if metric in ("pass@1", "top1_agreement") else (1, 3)
    mean, low, high = (scale * f(values) for f in (statistics.fmean, min, max))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="?", choices=("few", "noisy"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if arguments.scenario is None:
        parser.error("name a scenario, or --table")
    mx.set_cache_limit(2 << 30)
    known = {
        (line["config"]["scenario"], line["config"]["seed"], line["name"].partition(": ")[2])
        for line in kept()
    }
    for seed in arguments.seeds:
        run(arguments.scenario, seed, known)


if __name__ == "__main__":
    main()
