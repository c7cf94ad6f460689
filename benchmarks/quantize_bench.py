"""Weights in few bits: the KL to the unquantized model by each method, and what a quantized teacher teaches.

    OPENBLAS_NUM_THREADS=1 python benchmarks/quantize_bench.py methods --models FOLDER
    OPENBLAS_NUM_THREADS=1 python benchmarks/quantize_bench.py elsewhere --models FOLDER
    OPENBLAS_NUM_THREADS=1 python benchmarks/quantize_bench.py taught
    OPENBLAS_NUM_THREADS=1 python benchmarks/quantize_bench.py ratios
    python benchmarks/quantize_bench.py --table

- methods: the quickstart's student, trained from random weights for 250 steps by forward KL on all labels,
  one for each of three seeds (kept in FOLDER, to be made once); and the embedded teacher, for which the three
  seeds draw the rows. Each is quantized at 2, 3, 4 and 8 bits in groups of 32 with scales and biases in
  float32, so that every method at one width takes the same bytes, those of `mixed` at most. The value is the
  mean KL(unquantized || quantized) over all labels of 150 functions of the held-out split, which nothing is
  learned or chosen by. dwq and qad learn towards the unquantized model, at the defaults but for the steps.
  They, awq and gptq are kept where they are nearer on 64 rows of the validation split, as in a run. gptq has
  no 3 bits. `mixed qad` learns in the widths of `mixed`.
- elsewhere: the students at 3 bits, learned on functions as above, and measured on 64 summaries, of which
  they have seen none.
- taught: the quickstart's student, taught for 100 steps by the teacher in few bits (weights rounded to the
  nearest and stored as floats again, which is faster on a CPU and the same numbers), its KL to the whole
  teacher and its loss on the same held-out rows.
- ratios: of what `methods` kept: the KL of the learned method (dwq or qad) that is nearer on the validation
  rows of a seed, over that of rounding to the nearest, on the test rows; the median over the seeds.

A line that is kept in results/quantize.jsonl is not measured again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx_distill  # noqa: F401 - before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.data.template import encode
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize
from mlx_distill.quantize.fake import learned
from mlx_distill.quantize.layerwise import awq_quantized, gptq_quantized, packed
from mlx_distill.quantize.learned import finished, in_learning, recipe_of
from mlx_distill.quantize.levels import levels
from mlx_distill.quantize.mixed import allocated, layer_harms
from mlx_distill.quantize.rounding import quantized
from mlx_distill.recipe import Recipe
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import train

SEEDS, BITS = (0, 1, 2), (2, 3, 4, 8)
STEPS = {"student": 60, "teacher": 40}  # of learning
MIXED = [2, 3, 4, 6]
METHODS = {
    "rtn": BITS,
    "mixed": (3, 4),
    "awq": (2, 3, 4, 8),
    "gptq": (2, 4, 8),
    "dwq": BITS,
    "qad": BITS,
    "mixed qad": (3, 4),
}
TAUGHT = (None, 8, 4, 3, 2)


class Rows(NamedTuple):
    """Rows, all of whose labels count."""

    train: list[Encoded]
    valid: list[Encoded]
    test: list[Encoded]


def rows_of(tokenizer: Any, seed: int) -> Rows:
    """Those to learn from differ by seed; those to be measured on do not."""
    drawn = (
        pocket.rows("code", "train", 3000, seed=seed + 1),
        pocket.rows("code", "valid", 64),
        pocket.rows("code", "test", 150),
    )
    return Rows(*([encode(row, tokenizer, count="all") for row in part] for part in drawn))


def quickstart(*overrides: str) -> Recipe:
    fixed = ["train.log_every=0", "train.save_every=0", "train.eval_every=0", "data.prompts=null"]
    return recipe.load(find_recipe("quickstart"), [*fixed, "objective={forward_kl: {}}", *overrides])


def vocabulary_of(loaded: Loaded) -> int:
    return max(loaded.tokenizer.get_vocab().values()) + 1


def students(folder: Path) -> None:
    """The quickstart's student after a short training, one a seed, where it is not there yet."""
    for seed in SEEDS:
        if (folder / f"student-{seed}" / "model.safetensors").exists():
            continue
        teacher = models.load("embedded", "teacher.model")
        rows, vocabulary = rows_of(teacher.tokenizer, seed), vocabulary_of(teacher)
        how = quickstart("train.steps=250", f"seed={seed}")
        student = make_student(how.student, teacher.tokenizer, seed)
        taught(student, LiveTeacher(teacher, vocabulary), rows, how, vocabulary)
        found = fidelity(student.model, rows.test, vocabulary, teacher=LiveTeacher(teacher, vocabulary))[0]
        print(f"student {seed}: KL to the teacher {found['kl']:.3f}", file=sys.stderr, flush=True)
        models.save(folder / f"student-{seed}", student)


def taught(student: Loaded, teacher: LiveTeacher, rows: Rows, how: Recipe, vocabulary: int) -> None:
    log: Any = Quiet()
    batches = Batches(rows.train, how.train.batch_tokens, how.seed)
    train(student.model, [teacher], batches, how, vocabulary, log)


def methods(folder: Path) -> None:
    students(folder)
    known = {name_of(line) for line in kept_lines()}
    # What the target needs first, then the rest.
    for kind in ("student", "teacher"):
        for seed in SEEDS:
            one = Measured(kind, seed, folder)
            for method, widths in METHODS.items():
                for bits in widths:
                    if (f"kl, {kind}, {bits} bits, {method}", seed) not in known:
                        one.measure(method, bits)


class Measured:
    """A model that is quantized in every way, with the rows that it learns from and is measured on."""

    def __init__(self, kind: str, seed: int, folder: Path):
        self.kind, self.seed = kind, seed
        self.source = "embedded" if kind == "teacher" else str(folder / f"student-{seed}")
        whole = self.load()
        self.rows, self.vocabulary = rows_of(whole.tokenizer, seed), vocabulary_of(whole)
        self.whole = LiveTeacher(whole, self.vocabulary)
        self.harms: Any = None  # of each layer, once they are measured

    def load(self) -> Loaded:
        return models.load(self.source, "model")

    def measure(self, method: str, bits: int, name: str = "kl", rows: list[Encoded] | None = None) -> None:
        """Quantize, measure on the test rows or on others, and keep the line."""
        started, more = time.process_time(), dict[str, Any]()
        options = {"bits": bits, "group_size": 32}
        level = levels(Quantize.model_validate(options))[0]
        if method in ("dwq", "qad"):
            made, more = self.learn(method, options, None)
        elif method == "mixed qad":
            made, more = self.learn("qad", options, self.mixed_bits(options))
        elif method == "mixed":
            chosen = self.mixed_bits(options)
            made = quantized(self.load(), level.grid, chosen)
        else:
            level = levels(Quantize.model_validate({**options, "method": method}))[0]
            tokens = packed(self.rows.train[:64])
            make: dict[str, Callable[[], Loaded]] = {
                "rtn": lambda: quantized(self.load(), level.grid),
                "awq": lambda: awq_quantized(self.load(), level, tokens),
                "gptq": lambda: gptq_quantized(self.load(), level, tokens),
            }
            made = make[method]()
        seconds = time.process_time() - started
        arrays: Any = tree_flatten(made.model.parameters())
        size = sum(array.nbytes for _, array in arrays)
        if method in ("awq", "gptq"):
            made, more = self.nearer(quantized(self.load(), level.grid), made)
        found = self.kl(as_floats(made), self.rows.test if rows is None else rows)
        config = {
            "seed": self.seed,
            "bytes": size,
            "cpu_seconds": round(seconds, 1),
            "group_size": 32,
            **more,
        }
        name = f"{name}, {self.kind}, {bits} bits, {method}"
        record("quantize", [{"name": name, "value": found, "unit": "nats/token", "config": config}])

    def nearer(self, rounded: Loaded, made: Loaded) -> tuple[Loaded, dict[str, Any]]:
        """What was made, if it is nearer than the rounded model on validation rows; both become floats."""
        before, after = (self.kl(as_floats(one), self.rows.valid) for one in (rounded, made))
        told = {"valid_before": before, "valid_after": after, "kept": after < before}
        return made if after < before else rounded, told

    def learn(self, method: str, options: dict[str, Any], bits: Any) -> tuple[Loaded, dict[str, Any]]:
        steps = STEPS[self.kind]
        chosen = {**options, "method": method, "steps": steps, "towards": "student"}
        level = levels(Quantize.model_validate(chosen))[0]
        how = recipe_of(quickstart(f"seed={self.seed}"), level.options, "student", self.source)
        student = in_learning(self.load(), level, bits, seed=self.seed)
        before = self.kl(student, self.rows.valid)
        taught(student, self.whole, self.rows, how, self.vocabulary)
        after = self.kl(student, self.rows.valid)
        tokens = how.train.batch_tokens
        told = {"valid_before": before, "valid_after": after, "kept": after < before}
        told |= {"steps": steps, "batch_tokens": tokens, "learning_rate": level.options.learning_rate}
        return finished(self.load(), level, bits, learned(student.model) if after < before else {}), told

    def mixed_bits(self, options: dict[str, Any]) -> dict[str, int]:
        """The width of each layer, at the size of one width for all."""
        level = levels(Quantize.model_validate({**options, "mixed": MIXED}))[0]
        rows, loaded = self.rows.train[:24], self.load()
        if self.harms is None:
            self.harms = layer_harms(loaded, level.options, rows, self.vocabulary)
        return allocated(loaded, level, rows, self.vocabulary, harms=self.harms)[0]

    def kl(self, loaded: Loaded, rows: list[Encoded]) -> float:
        return fidelity(loaded.model, rows, self.vocabulary, teacher=self.whole)[0]["kl"]


def as_floats(loaded: Loaded) -> Loaded:
    """The same weights, stored as floats: a CPU multiplies them sixty times faster."""
    from mlx_lm.utils import dequantize_model

    return loaded._replace(model=dequantize_model(loaded.model))


def elsewhere(folder: Path) -> None:
    """What was learned on functions, on summaries."""
    known = {name_of(line) for line in kept_lines()}
    for seed in SEEDS:
        one = Measured("student", seed, folder)
        tokenizer = one.load().tokenizer
        rows = [encode(row, tokenizer, count="all") for row in pocket.rows("summary", "test", 64)]
        for method in ("rtn", "dwq", "qad"):
            if (f"kl on summaries, student, 3 bits, {method}", seed) not in known:
                one.measure(method, 3, "kl on summaries", rows)


def taught_in_few_bits() -> None:
    """Students of teachers in few bits."""
    known = {name_of(line) for line in kept_lines()}
    for seed in SEEDS:
        whole = models.load("embedded", "teacher.model")
        rows, vocabulary = rows_of(whole.tokenizer, seed), vocabulary_of(whole)
        judge = LiveTeacher(whole, vocabulary)
        for bits in TAUGHT:
            name = f"student's kl, taught in {bits} bits" if bits else "student's kl, taught by the whole"
            if (name, seed) in known:
                continue
            teacher, own = judge, 0.0
            if bits is not None:
                grid = levels(Quantize.model_validate({"bits": bits, "group_size": 32}))[0].grid
                rounded = as_floats(quantized(models.load("embedded", "teacher.model"), grid))
                teacher = LiveTeacher(rounded, vocabulary)
                own = fidelity(rounded.model, rows.test, vocabulary, teacher=judge)[0]["kl"]
            how = quickstart("train.steps=100", f"seed={seed}")
            student = make_student(how.student, whole.tokenizer, seed)
            taught(student, teacher, rows, how, vocabulary)
            found = fidelity(student.model, rows.test, vocabulary, teacher=judge)[0]
            config = {"seed": seed, "steps": 100, "nll": found["nll"], "teachers_own_kl": own}
            line = {"name": name, "value": found["kl"], "unit": "nats/token", "config": config}
            record("quantize", [line])


def ratios() -> None:
    """The learned method that is nearer on validation rows, over rounding, on the test rows."""
    lines = []
    for kind in ("student", "teacher"):
        for bits in BITS:
            found: dict[int, tuple[float, str]] = {}
            for seed in SEEDS:
                one = {m: line_of(f"kl, {kind}, {bits} bits, {m}", seed) for m in ("rtn", "dwq", "qad")}
                if not all(one.values()):
                    continue
                best = min(
                    ("dwq", "qad"),
                    key=lambda m: min(one[m]["config"][key] for key in ("valid_before", "valid_after")),
                )
                found[seed] = one[best]["value"] / one["rtn"]["value"], best
            if found:
                values = [ratio for ratio, _ in found.values()]
                suffix = "" if kind == "student" else ", teacher"
                config = {"seeds": list(found), "each": values, "methods": [m for _, m in found.values()]}
                lines.append(
                    {
                        "name": f"learned_kl_ratio_{bits}bit{suffix}",
                        "value": statistics.median(values),
                        "unit": "learned/rtn",
                        "config": config,
                    }
                )
    record("quantize", lines)


def kept_lines() -> list[dict[str, Any]]:
    path = RESULTS / "quantize.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def name_of(line: dict[str, Any]) -> tuple[str, Any]:
    return line["name"], line["config"].get("seed")


def line_of(name: str, seed: int) -> Any:
    """The last kept line of this name and seed; None without one."""
    return next((line for line in reversed(kept_lines()) if name_of(line) == (name, seed)), None)


def table() -> None:
    """What is kept, as Markdown: medians over the seeds, and the range."""

    def cell(name: str, digits: int = 2) -> str:
        found = [line for seed in SEEDS if (line := line_of(name, seed)) is not None]
        values = [line["value"] for line in found]
        if not values:
            return ""
        spread = f" ({min(values):.{digits}g} to {max(values):.{digits}g})" if len(values) > 1 else ""
        return f"{statistics.median(values):.{digits}g}{spread}"

    for kind in ("student", "teacher"):
        print(f"\n| {kind} | " + " | ".join(f"{bits} bits" for bits in BITS) + " |")
        print("|---" * (len(BITS) + 1) + "|")
        for method in METHODS:
            print(
                f"| {method} | " + " | ".join(cell(f"kl, {kind}, {bits} bits, {method}") for bits in BITS),
                "|",
            )
        sizes = [line_of(f"kl, {kind}, {bits} bits, rtn", 0) for bits in BITS]
        print(
            "| bytes | " + " | ".join(f"{line['config']['bytes']:,}" if line else "" for line in sizes), "|"
        )
    for method in ("rtn", "dwq", "qad"):
        print(f"on summaries, 3 bits, {method}: {cell(f'kl on summaries, student, 3 bits, {method}')}")
    print("\n| taught by | its own KL | student's KL to the whole teacher | nll |\n|---|---|---|---|")
    for bits in TAUGHT:
        name = f"student's kl, taught in {bits} bits" if bits else "student's kl, taught by the whole"
        found = [line for seed in SEEDS if (line := line_of(name, seed)) is not None]
        if found:
            nll = statistics.median(line["config"]["nll"] for line in found)
            own = found[0]["config"]["teachers_own_kl"]
            print(f"| {f'{bits} bits' if bits else 'the whole'} | {own:.2g} | {cell(name, 3)} | {nll:.3f} |")
    for line in kept_lines():
        if "ratio" in line["name"]:
            each = ", ".join(f"{value:.2f}" for value in line["config"]["each"])
            print(f"{line['name']}: {line['value']:.3f} ({each}; {', '.join(line['config']['methods'])})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("methods", "elsewhere", "taught", "ratios"))
    parser.add_argument("--models", type=Path, help="folder of the students, made there once")
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if arguments.what == "ratios":
        ratios()
        return
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(2 << 30)  # as in training on a CPU
    if arguments.what is None or (arguments.what != "taught" and arguments.models is None):
        parser.error("name what to measure, and for methods and elsewhere --models; or --table")
    if arguments.what == "methods":
        methods(arguments.models)
    elif arguments.what == "elsewhere":
        elsewhere(arguments.models)
    else:
        taught_in_few_bits()


if __name__ == "__main__":
    main()
