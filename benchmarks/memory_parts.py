"""What constants of `mlx_distill/memory` were fitted to: single losses, readings, steps of random layers.

    MALLOC_MMAP_THRESHOLD_=65536 OPENBLAS_NUM_THREADS=1 python benchmarks/memory_parts.py

Told are growth of resident memory and MLX's own counter: of losses and readings as arrays of (places,
vocabulary), of layers as multiples of what `memory/work.py` says that one layer keeps. The threshold makes
glibc give back to the system at once what MLX frees, so that many things can be measured in one process.
On Linux.
"""

from collections.abc import Callable
from typing import Any

import mlx_distill  # noqa: F401  (before mlx, whose BLAS it replaces)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from plan_bench import drawn, words

from mlx_distill import models
from mlx_distill.cache.capture import _likeliest
from mlx_distill.data.batch import Encoded
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.losses import Targets, Top
from mlx_distill.memory.batches import Shape as BatchShape
from mlx_distill.memory.sizes import sizes_of
from mlx_distill.memory.work import ARRAYS, _kept
from mlx_distill.models.head import Head
from mlx_distill.objective import Objective, Voice
from mlx_distill.options import Shape, Student, Term
from mlx_distill.resident import resident
from mlx_distill.score import nll_of_rows
from mlx_distill.student import add_adapters, checkpoint_layers
from mlx_distill.teacher import LiveTeacher

PLACES = 2048
NARROW: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Bytes by which work raises resident memory and MLX's counter."""
    mx.clear_cache()
    before, active = resident("VmRSS"), mx.get_active_memory()
    resident("VmHWM", reset_peak=True)
    mx.reset_peak_memory()
    work()
    after = resident("VmHWM")
    assert before is not None and after is not None
    return after - before, mx.get_peak_memory() - active


def tell(what: str, found: tuple[float, float], unit: float, of: str) -> None:
    print(f"{what:48} resident {found[0] / unit:5.2f}  counter {found[1] / unit:5.2f}  {of}", flush=True)


def losses(vocabulary: int) -> None:
    tokenizer = words(vocabulary)
    student, teacher = (models.build(Shape(**NARROW), tokenizer, seed).model for seed in (1, 2))
    last_norm: Any = student.model.norm  # type: ignore[union-attr]
    teacher.freeze()
    random = np.random.default_rng(0)
    tokens = mx.array(random.integers(10, vocabulary, size=(PLACES // 64, 64)).astype(np.int32))
    labels, weights, places = tokens.reshape(1, -1), mx.ones((1, PLACES)), mx.arange(PLACES)
    last, top = mx.zeros((1, PLACES, 16)), mx.full((1, PLACES, 32), 0.01)
    stored = Top(mx.random.randint(0, vocabulary, top.shape), mx.log(top), mx.log(mx.full((1, PLACES), 0.68)))
    mx.eval(student.parameters(), teacher.parameters(), labels, weights, places, last, stored)
    targets = {
        "live": Targets(labels, last=last),
        "stored": Targets(labels, top=stored),
        "labels": Targets(labels),
    }
    heads = {"live": [Voice(1.0, Head(teacher, vocabulary))], "stored": [Voice(1.0)], "labels": []}

    def tried(names: tuple[str, ...], how: str, moves: bool) -> None:
        student.unfreeze()
        if not moves:
            student.freeze()
            last_norm.unfreeze()
        terms = {name: Term(weight=1.0) for name in names}
        objective = Objective(terms, student, vocabulary, heads[how], chunk=PLACES)

        def loss(_: Any) -> mx.array:
            return objective.sums(tokens, places, weights, [targets[how]], {})[0]

        found = measured(lambda: mx.eval(nn.value_and_grad(student, loss)(student)))
        what = f"{' + '.join(names)}, {how}{', head moves' if moves else ''}"
        tell(what, found, 4.0 * vocabulary * PLACES, "arrays")

    for moves in (False, True):
        tried(("cross_entropy",), "labels", moves)
        for how in ("stored", "live"):
            for name in ARRAYS if how == "live" else ["forward_kl"]:
                tried((name,), how, moves)
            tried(("forward_kl", "cross_entropy"), how, moves)


def readings(vocabulary: int) -> None:
    tokenizer = words(vocabulary)
    model = models.build(Shape(**NARROW), tokenizer, 1).model
    teacher = LiveTeacher(models.build(Shape(**NARROW), tokenizer, 2), vocabulary)
    mx.eval(model.parameters(), teacher.model.parameters())
    count = min(4096, 2**24 // vocabulary) // 64
    for start in (1, 33):
        rows = [Encoded([5] * 65, start)] * count
        share = f"{65 - start} of 64 places, V {vocabulary}"
        unit = 4.0 * vocabulary * 64 * count
        tell(
            f"scores, {share}",
            measured(lambda rows=rows: nll_of_rows(model, rows, vocabulary)),
            unit,
            "arrays",
        )
        tell(
            f"measures, {share}",
            measured(lambda rows=rows: fidelity(model, rows, vocabulary)),
            unit,
            "arrays",
        )
        compared = measured(lambda rows=rows: fidelity(model, rows, vocabulary, teacher=teacher))
        tell(f"compares, {share}", compared, unit, "arrays")
    last = mx.zeros((1, 64 * count, 16))
    mx.eval(last)
    found = measured(lambda: _likeliest(teacher.head.logits(last), 32, 1.0))
    tell(f"stores, V {vocabulary}", found, 4.0 * vocabulary * 64 * count, "arrays")


def layers(seed: int) -> None:
    """A step of layers alone, their gradients included, and a reading."""
    random = np.random.default_rng(seed)
    options = {**drawn(seed).student, "num_hidden_layers": int(random.integers(2, 7))}
    width, tokenizer = 16 * int(random.integers(2, 26)), words(500)
    tokens = mx.array(random.integers(10, 500, size=(int(random.integers(500, 3000)) // width + 1, width)))
    how = ("full", "lora", "checkpointing")[seed % 3]
    loaded = models.build(Shape(**options), tokenizer, 1)
    if how == "lora":
        add_adapters(loaded.model, Student.model_validate({"model": "x", "method": "lora"}), 1)
    if how == "checkpointing":
        checkpoint_layers(loaded.model)
    head = Head(loaded.model, 500)
    mx.eval(loaded.model.parameters(), tokens)
    loss = nn.value_and_grad(loaded.model, lambda _: head.hidden(tokens).sum())
    shape = BatchShape(tokens.shape[0], width, 0)
    one = 4.0 * shape.tokens * _kept(sizes_of(options, 0, 0, 500), width)
    name = f"{options['model_type']}, {options['num_hidden_layers']} layers, {how}"
    tell(f"{name}, reads", measured(lambda: mx.eval(head.hidden(tokens))), one, "layers")
    tell(f"{name}, learns", measured(lambda: mx.eval(loss(loaded.model))), one, "layers")


if __name__ == "__main__":
    mx.set_cache_limit(8 << 30)
    losses(4000)
    for vocabulary in (4000, 4096):
        readings(vocabulary)
    for seed in range(2000, 2012):
        layers(seed)
