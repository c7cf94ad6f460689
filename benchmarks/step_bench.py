"""What a step of distillation costs beside plain fine-tuning, and beside PyTorch, on the same shapes.

    OPENBLAS_NUM_THREADS=1 python benchmarks/step_bench.py [--repeats 5] [--vocabularies 32768 4096]

A llama of 4 layers and width 256, batches of 8 x 256, float32, AdamW. Names without a shape are those of
the first: a vocabulary of 32,768, and half of the labels counted, since prompts are not.
`cached_step_ratio` is our step with
stored targets (top 64 and tail) over a plain MLX step as a user would write it: cross entropy on all
logits, AdamW, one eval, compiled. `live_step_ratio` is our step with a live teacher over (the plain step +
the teacher's forward pass, its logits included). `torch_step_ratio` and `torch_plain_ratio` are tokens per
second, ours over PyTorch's, of a step with a live teacher and of a plain one, and `torch_teacher_ratio` of
the teacher's forward pass alone; where PyTorch is not installed they are left out. All in one process, the
variants in turn, after a warm-up; on a CPU the time is that of the processor. A ratio is the median over
rounds, its spread the smallest and the largest.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import record

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_distill import models, recipe
from mlx_distill.cache import CachedTeacher, write_cache
from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.models import Loaded
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Shape
from mlx_distill.recipe import Recipe
from mlx_distill.teacher import LiveTeacher, NoTeacher, Teaches
from mlx_distill.train import make_objective, make_step

ROWS, WIDTH, TOP = 8, 256, 64
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": WIDTH,
}
Step = Callable[[], None]  # runs one step to its end


class Ids:
    """As much of a tokenizer as building a model takes."""

    eos_token_id, bos_token_id = 1, None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32768, 4096])
    parser.add_argument("--counted", nargs="+", choices=["all", "half"], default=["half", "all"])
    arguments = parser.parse_args()
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(2 << 30)  # as in training on a CPU
    lines = []
    for vocabulary in arguments.vocabularies:
        for counted in arguments.counted:
            first = vocabulary == arguments.vocabularies[0] and counted == arguments.counted[0]
            suffix = "" if first else f" at vocabulary {vocabulary}, {counted} counted"
            lines += measure(vocabulary, counted, arguments.repeats, suffix)
    record("step", lines)


def measure(vocabulary: int, counted: str, repeats: int, suffix: str) -> list[dict[str, Any]]:
    """Lines of one shape."""
    rows = rows_of(vocabulary, start=1 if counted == "all" else WIDTH // 2)
    with tempfile.TemporaryDirectory() as folder:
        steps = mlx_steps(vocabulary, rows, Path(folder) / "cache")
        try:
            import torch_step
        except ImportError:
            print("PyTorch is not installed: its ratios are left out", file=sys.stderr)
        else:
            steps |= torch_step.steps(SIZES, vocabulary, make_batch(rows))
        seconds = in_turn(steps, repeats)
    config = {
        "vocabulary": vocabulary,
        "counted": counted,
        "batch": [ROWS, WIDTH],
        "shape": SIZES,
        "repeats": repeats,
        "blas": mlx_distill.BLAS,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }
    ratios = {
        "cached_step_ratio": [a / b for a, b in zip(seconds["cached"], seconds["plain"], strict=True)],
        "live_step_ratio": [
            a / (b + c) for a, b, c in zip(seconds["live"], seconds["plain"], seconds["teacher"], strict=True)
        ],
        "our_plain_step_ratio": [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)],
    }
    if "torch live" in seconds:
        for name, theirs, ours in (
            ("step", "torch live", "live"),
            ("plain", "torch plain", "ours"),
            ("teacher", "torch teacher", "teacher"),
        ):
            pairs = zip(seconds[theirs], seconds[ours], strict=True)
            ratios[f"torch_{name}_ratio"] = [a / b for a, b in pairs]
    return [
        {
            "name": name + suffix,
            "value": statistics.median(values),
            "spread": [min(values), max(values)],
            "unit": "tokens/s, ours/PyTorch" if name.startswith("torch") else "time/time",
            "config": config,
        }
        for name, values in ratios.items()
    ]


def in_turn(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the first two rounds trace and compile, and are not kept."""
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            before = clock()
            step()
            if turn >= 2:
                seconds[name].append(clock() - before)
    print({name: round(statistics.median(s), 3) for name, s in seconds.items()}, file=sys.stderr, flush=True)
    return seconds


def rows_of(vocabulary: int, start: int) -> list[Encoded]:
    random = np.random.default_rng(0)
    return [Encoded(random.integers(2, vocabulary, size=WIDTH + 1).tolist(), start) for _ in range(ROWS)]


def mlx_steps(vocabulary: int, rows: list[Encoded], folder: Path) -> dict[str, Step]:
    """Our steps with each kind of teacher, the plain one, and the teacher alone."""
    teacher = LiveTeacher(loaded(vocabulary, seed=9), vocabulary)
    write_cache(folder, teacher, rows, top_k=TOP, precision="compact", made_of={})
    batch = make_batch(rows)._replace(rows=tuple(range(len(rows))))

    def look() -> None:
        mx.eval(teacher.targets(batch).last)

    return {
        "plain": plain_step(vocabulary, rows),
        "ours": our_step(vocabulary, batch, None, {"cross_entropy": {}}),
        "cached": our_step(vocabulary, batch, CachedTeacher(folder, rows, {}), {"forward_kl": {}}),
        "live": our_step(vocabulary, batch, teacher, {"forward_kl": {}}),
        "teacher": whole_forward(teacher, batch),
        "teacher without its head": look,
    }


def whole_forward(teacher: LiveTeacher, batch: Any) -> Step:
    return lambda: mx.eval(teacher.logits(batch.tokens))


def loaded(vocabulary: int, seed: int) -> Loaded:
    return models.build(Shape(**SIZES), Ids(vocabulary), seed)


def our_step(vocabulary: int, batch: Any, teacher: Teaches | None, objective: dict[str, Any]) -> Step:
    """One step, as `train.train` takes it."""
    options = recipe_of(objective, teacher)
    student = loaded(vocabulary, seed=0).model
    student.train()
    optimizer = make_optimizer(options.train)
    optimizer.init(student.trainable_parameters())
    teachers = [teacher] if teacher is not None else []
    functions = make_step(make_objective(student, teachers, options, vocabulary), optimizer, options)

    def step() -> None:
        targets = [one.targets(batch) for one in teachers or [NoTeacher()]]
        sums, parts = functions.gradients(batch, targets, {})
        size = functions.update(sums, batch.counted.sum(), parts)
        mx.eval(student.state, optimizer.state, parts, size)

    return step


def recipe_of(objective: dict[str, Any], teacher: Teaches | None) -> Recipe:
    options: dict[str, Any] = {
        "name": "bench",
        "student": {"shape": SIZES},
        "teacher": {"model": "embedded"},
        "data": {"train": {"source": "pocket", "rows": 10}},
        "objective": objective,
        "train": {"steps": 1000, "learning_rate": 1e-4},
    }
    if isinstance(teacher, CachedTeacher):
        options["teacher"] = {"model": "embedded", "source": "cache", "top_k": TOP}
    return recipe.decode(options)


def plain_step(vocabulary: int, rows: list[Encoded]) -> Step:
    """Fine-tuning as one would write it by hand: nothing of ours but the model."""
    model = loaded(vocabulary, seed=0).model
    optimizer = optimizers.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())
    batch = make_batch(rows)

    def loss(tokens: mx.array, labels: mx.array, counted: mx.array) -> mx.array:
        values = nn.losses.cross_entropy(model(tokens), labels)
        return (values * counted).sum() / counted.sum()

    value_and_gradients = nn.value_and_grad(model, loss)

    def update(tokens: mx.array, labels: mx.array, counted: mx.array) -> mx.array:
        value, gradients = value_and_gradients(tokens, labels, counted)
        optimizer.update(model, gradients)
        return value

    changed = [model.state, optimizer.state]
    compiled = mx.compile(update, inputs=changed, outputs=changed)

    def step() -> None:
        mx.eval(compiled(batch.tokens, batch.labels, batch.counted), model.state, optimizer.state)

    return step


if __name__ == "__main__":
    main()
