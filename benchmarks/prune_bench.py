"""A student cut out of its teacher and healed, against one trained from random weights on the same tokens.

    OPENBLAS_NUM_THREADS=1 python benchmarks/prune_bench.py --seeds 0 1 2
    python benchmarks/prune_bench.py --table

The teacher is the embedded one; the students learn the docstrings of 1,000 functions in the same batches, and
are measured on 200 docstrings of the held-out split `valid`: nats a label, and KL to the teacher. A function
has several right docstrings, so the labels are one sample of what the teacher knows. (Of code it is certain:
there it says what the labels say, and healing by either gives the same student.)

- `fifth`: a fifth of the weights. Which start and which objective: cut out or random, KL or cross-entropy.
- `half`: as many weights as two of the four layers have. What is cut, and who chooses it.

A seed draws the batches, the random weights and the random choices. A run that is kept in
results/prune.jsonl is not repeated. The batches of a seed are the same for every student: the teacher reads
each of them once. Rows, tasks and steps were chosen on seed 7.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import numpy as np
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batch, Batches, Encoded
from mlx_distill.data.template import encode
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.losses import Targets
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.options import Prune, Shape
from mlx_distill.prune.choose import choose
from mlx_distill.prune.importance import Statistics, loss_changes, measure
from mlx_distill.prune.plan import plan_from
from mlx_distill.prune.surgery import cut
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import train

TRAIN, VALID, MEASURED = 1000, 200, 32768  # rows, rows, tokens
STEPS = {"fifth": 200, "half": 100}
KL, CE = "{forward_kl: {}}", "{cross_entropy: {}}"
WIDTH: dict[str, Any] = {"axes": ["hidden", "feed_forward", "heads"]}
DEPTH: dict[str, Any] = {"sizes": {"num_hidden_layers": 2}}
HALF = 492_160  # weights of two of the four layers


class Way(NamedTuple):
    """How a student begins, and what it learns from."""

    prune: dict[str, Any]
    objective: str
    random_start: bool = False


WAYS = {
    "fifth": {
        "cut out, KL": Way({**WIDTH, "ratio": 0.2}, KL),
        "cut out, cross-entropy": Way({**WIDTH, "ratio": 0.2}, CE),
        "random weights, KL": Way({**WIDTH, "ratio": 0.2}, KL, True),
        "random weights, cross-entropy": Way({**WIDTH, "ratio": 0.2}, CE, True),
        "cut out by magnitude, KL": Way({**WIDTH, "ratio": 0.2, "by": "magnitude"}, KL),
        "cut out at random, KL": Way({**WIDTH, "ratio": 0.2, "by": "random"}, KL),
    },
    "half": {
        "width": Way({**WIDTH, "parameters": HALF}, KL),
        "width, at random": Way({**WIDTH, "parameters": HALF, "by": "random"}, KL),
        "depth, by influence": Way({**DEPTH, "layers_by": "influence"}, KL),
        "depth, by loss": Way({**DEPTH, "layers_by": "loss"}, KL),
        "depth, every other": Way({**DEPTH, "layers_by": "every_other"}, KL),
        "depth, at random": Way({**DEPTH, "layers_by": "random"}, KL),
        "random weights": Way({**WIDTH, "parameters": HALF}, KL, True),
    },
}


class Remembering(LiveTeacher):
    """A teacher that reads each batch once."""

    def __init__(self, loaded: Loaded, vocabulary: int):
        super().__init__(loaded, vocabulary)
        self._read: dict[bytes, Targets] = {}

    def targets(self, batch: Batch) -> Targets:
        key = np.array(batch.tokens).tobytes()
        if key not in self._read:
            self._read[key] = super().targets(batch)
            mx.eval(self._read[key])
        return self._read[key]


def run(seeds: list[int]) -> None:
    loaded = models.load("embedded", "teacher.model")
    drawn = pocket.rows("summary", "train", TRAIN, seed=1), pocket.rows("summary", "valid", VALID)
    rows, valid = ([encode(row, loaded.tokenizer) for row in part] for part in drawn)
    vocabulary = max(loaded.tokenizer.get_vocab().values()) + 1
    read = measure(loaded, rows, MEASURED)
    changes = loss_changes(loaded, rows, MEASURED, vocabulary)
    known = {(line["name"], line["config"].get("seed")) for line in kept_lines()}
    for seed in seeds:
        teacher = Remembering(loaded, vocabulary)
        for size, ways in WAYS.items():
            for name, way in ways.items():
                if (f"{size}: {name}", seed) not in known:
                    student = begin(loaded, read, changes, way, seed)
                    one(f"{size}: {name}", student, way, STEPS[size], seed, rows, valid, teacher)
    ratios(seeds)


def begin(loaded: Loaded, read: Statistics, changes: Any, way: Way, seed: int) -> Loaded:
    """The student before training."""
    options = Prune(**way.prune)
    planned = plan_from(loaded.config, options, bytes_each=4)
    if way.random_start:
        return fresh(planned.config, loaded, seed)
    kept = choose(loaded, planned.rounds[-1], options, read, seed=seed, changes=changes)
    return cut(loaded, kept, read.inputs)


def fresh(config: dict[str, Any], loaded: Loaded, seed: int) -> Loaded:
    """A new model of a config, with random weights."""
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {key: config[key] for key in (*keys, "num_key_value_heads", "head_dim")}
    return models.build(Shape(**shape), loaded.tokenizer, seed)


def one(
    name: str,
    student: Loaded,
    way: Way,
    steps: int,
    seed: int,
    rows: list[Encoded],
    valid: list[Encoded],
    teacher: LiveTeacher,
) -> None:
    """Train and measure a student, and keep a line."""
    fixed = ["train.log_every=0", "train.save_every=0", "train.eval_every=0", "data.prompts=null"]
    how = recipe.load(
        find_recipe("quickstart"),
        [*fixed, f"objective={way.objective}", f"train.steps={steps}", f"seed={seed}"],
    )
    vocabulary, started = teacher.vocabulary, time.perf_counter()
    before = fidelity(student.model, valid, vocabulary, teacher=teacher)[0]
    batches, log = Batches(rows, how.train.batch_tokens, seed), Quiet()
    asked = [teacher] if way.objective == KL else []
    used = train(student.model, asked, batches, how, vocabulary, log)  # pyright: ignore[reportArgumentType]
    found = fidelity(student.model, valid, vocabulary, teacher=teacher)[0]
    config = {
        "seed": seed,
        "steps": steps,
        "batch_tokens": how.train.batch_tokens,
        "train_tokens": used.train_tokens,
        "parameters": parameter_count(student.model),
        "of": parameter_count(teacher.model),
        "prune": way.prune,
        "kl": found["kl"],
        "top1_agreement": found["top1_agreement"],
        "nll_before": before["nll"],
        "kl_before": before["kl"],
        "seconds": time.perf_counter() - started,
    }
    print(seed, name, round(found["nll"], 4), round(found["kl"], 4), file=sys.stderr, flush=True)
    record("prune", [{"name": name, "value": found["nll"], "unit": "nats/label, valid", "config": config}])


def ratios(seeds: list[int]) -> None:
    """What the runs of all seeds come to: ratios of validation losses, their median."""
    found = {(line["name"], line["config"].get("seed")): line["value"] for line in kept_lines()}
    lines = []
    for name, above, below in (
        ("pruned_kl_over_pruned_ce", "cut out, KL", "cut out, cross-entropy"),
        ("pruned_ce_over_random", "cut out, cross-entropy", "random weights, cross-entropy"),
    ):
        each = [found[f"fifth: {above}", seed] / found[f"fifth: {below}", seed] for seed in seeds]
        config = {"seeds": seeds, "each": each, "steps": STEPS["fifth"]}
        lines.append({"name": name, "value": statistics.median(each), "unit": "nll/nll", "config": config})
    record("prune", lines)


def kept_lines() -> list[dict[str, Any]]:
    path = RESULTS / "prune.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def table() -> None:
    """What is kept, as Markdown."""
    for size, ways in WAYS.items():
        print(f"\n| {size} | weights | nll | KL | KL before healing | seeds |\n|---|---|---|---|---|---|")
        for name in ways:
            found = [line for line in kept_lines() if line["name"] == f"{size}: {name}"]
            if found:
                told = [line["config"] for line in found]
                cells = [spread([line["value"] for line in found]), spread([one["kl"] for one in told])]
                before = spread([one["kl_before"] for one in told])
                weights = f"{told[0]['parameters']:,}"
                print(f"| {name} | {weights} | {' | '.join(cells)} | {before} | {len(found)} |")


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(2 << 30)  # as in training on a CPU
    print(mlx_distill.BLAS, file=sys.stderr)
    run(arguments.seeds)


if __name__ == "__main__":
    main()
