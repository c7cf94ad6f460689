"""Memory and time of a distillation loss over a real vocabulary: in chunks, against all logits at once.

    OPENBLAS_NUM_THREADS=1 python benchmarks/losses_bench.py [--chunks 16 32 64 128 256] [--positions 2048]

Forward KL and its gradients, float32, vocabulary 151,936, hidden size 896: with a live teacher (its head
projects as well) and with a cached one (top 64 and tail); by the last hidden states alone, as under LoRA,
whose head is frozen, and also by the student's head. Naive is the formula on all logits, differentiated by
MLX. Every variant runs in a process of its own: what is measured is the growth of its
resident memory, because MLX's counter also counts memory that is never touched (on a GPU it is the counter,
since nothing else is there). Time is that of the processor on a CPU. Gradients are compared at 256
positions, where both fit one process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import record

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_distill.losses import Targets, Top, forward_kl
from mlx_distill.losses.chunks import Arrays, chunked_sum
from mlx_distill.losses.outcomes import outcomes
from mlx_distill.losses.sums import sum_last
from mlx_distill.models.head import Head
from mlx_distill.options import Train
from mlx_distill.train import chunk_of

VOCABULARY, HIDDEN, TOP = 151_936, 896, 64
KINDS = ("live", "cached", "live, head trains", "cached, head trains")


class OnlyHead(nn.Module):
    """The least that `Head` can split, which tries it on three tokens."""

    def __init__(self, vocabulary: int, hidden: int):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(3, hidden), nn.Linear(hidden, vocabulary, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.embed(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # kind and chunk, in the child
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one[0], int(arguments.one[1]), arguments.positions)))
        return
    lines: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        naive = child(kind, 0, arguments.positions, arguments.repeats)
        chosen = chosen_chunk(kind)
        for chunk in sorted({*arguments.chunks, chosen}):
            one = child(kind, chunk, arguments.positions, arguments.repeats)
            lines += compared(kind, chunk, chunk == chosen, one, naive, arguments.positions)
        agreement = child(kind, -1, 256, 1)
        lines.append(
            {
                "name": f"gradient_difference, {kind}",
                "value": agreement["difference"],
                "unit": "norm of the difference/norm, chunked and naive",
                "config": {"positions": 256, "chunk": 64},
            }
        )
    record("losses", lines)


def chosen_chunk(kind: str) -> int:
    """The chunk that training takes by default."""
    budget = Train.model_fields["logits_mib"].default
    return chunk_of(budget, VOCABULARY, logits=1 if kind.startswith("cached") else 2)


def compared(
    kind: str, chunk: int, chosen: bool, one: dict[str, float], naive: dict[str, float], positions: int
) -> list[dict[str, Any]]:
    """Lines of one chunk size; those of the default one have names without it."""
    side, _, head = kind.partition(", ")
    names = {
        "live": ("kd_live_peak_memory_ratio", "kd_time_ratio"),
        "cached": ("kd_peak_memory_ratio", "kd_cached_time_ratio"),
    }
    config = {
        "teacher": side,
        "head": head or "frozen",
        "chunk": chunk,
        "vocabulary": VOCABULARY,
        "positions": positions,
        "hidden": HIDDEN,
        "blas": mlx_distill.BLAS,
        "chunked": one,
        "naive": naive,
    }
    values = [(name, one[key] / naive[key]) for name, key in zip(names[side], ("memory", "cpu"), strict=True)]
    if head:
        own = VOCABULARY * HIDDEN * 4 / 1e6  # the head's gradient, which is a result
        beside = (one["memory"] - own) / (naive["memory"] - own)
        config["share_of_head_gradient"] = own / naive["memory"]
        values.append((f"{names[side][0]} beside the head's gradient", beside))
    ending = (f", {head}" if head else "") + ("" if chosen else f", chunk {chunk}")
    return [
        {"name": f"{name}{ending}", "value": value, "unit": "chunked/naive", "config": config}
        for name, value in values
    ]


def child(kind: str, chunk: int, positions: int, repeats: int) -> dict[str, float]:
    """Medians over processes of their own."""
    command = [sys.executable, __file__, "--one", kind, str(chunk), "--positions", str(positions)]
    found = []
    for _ in range(repeats):
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(answer.splitlines()[-1]))
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    print(kind, chunk, medians, file=sys.stderr, flush=True)
    return medians


def measured(kind: str, chunk: int, positions: int) -> dict[str, float]:
    """Memory (MB that the process grew by) and seconds of one variant; chunk 0 is naive, -1 compares both."""
    if not mx.metal.is_available():
        mx.set_cache_limit(2 << 30)  # as in training on a CPU
    model, fixed, hidden, teacher = inputs(kind, positions)
    if chunk < 0:
        found, wanted = (gradients(kind, one, model, fixed, hidden, teacher)()[1] for one in (64, 0))
        differences = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
        return {"difference": max(differences)}
    run = gradients(kind, chunk, model, fixed, hidden, teacher)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, active = watch_memory(), mx.get_active_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    mx.eval(run())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if before is None:
        return {"memory": (mx.get_peak_memory() - active) / 1e6, "wall": wall, "cpu": wall}
    return {"memory": resident("VmHWM") - before, "wall": wall, "cpu": cpu}


def inputs(kind: str, positions: int) -> tuple[OnlyHead, Arrays, mx.array, OnlyHead | None]:
    """A student's head, what is fixed, its last hidden states, and a teacher's head."""
    mx.random.seed(0)
    model = OnlyHead(VOCABULARY, HIDDEN)
    model.lm_head.weight = 3 * model.lm_head.weight  # far enough from flat that there is something to learn
    hidden = mx.random.normal((1, positions, HIDDEN))
    fixed: Arrays = {"labels": mx.zeros((1, positions), dtype=mx.int32)}
    teacher = None
    if kind.startswith("cached"):
        first = mx.random.randint(0, VOCABULARY - TOP, (1, positions, 1))
        log_p = mx.log(mx.softmax(mx.random.normal((1, positions, TOP + 1)), axis=-1))
        fixed |= {"indices": first + mx.arange(TOP), "log_p": log_p[..., :TOP], "log_tail": log_p[..., TOP]}
    else:
        teacher = OnlyHead(VOCABULARY, HIDDEN)
        teacher.lm_head.weight = 3 * teacher.lm_head.weight
        fixed["last"] = mx.random.normal((1, positions, HIDDEN))
        mx.eval(teacher.parameters())
    if "trains" not in kind:
        model.freeze()
    mx.eval(model.parameters(), fixed, hidden)
    return model, fixed, hidden, teacher


def gradients(
    kind: str, chunk: int, model: OnlyHead, fixed: Arrays, hidden: mx.array, teacher: OnlyHead | None
) -> Callable[[], tuple[mx.array, list[mx.array]]]:
    """Loss, and its gradients by the hidden states and, unless it is frozen, the head."""
    head = Head(model, VOCABULARY)
    of_teacher = Head(teacher, VOCABULARY) if teacher is not None else None

    def targets(fixed: Arrays) -> Targets:
        if of_teacher is not None:
            return Targets(fixed["labels"], mx.stop_gradient(of_teacher.logits(fixed["last"])))
        return Targets(fixed["labels"], top=Top(fixed["indices"], fixed["log_p"], fixed["log_tail"]))

    def in_chunk(logits: Arrays, fixed: Arrays, _: Arrays) -> tuple[mx.array, Arrays]:
        return forward_kl(logits["student"], targets(fixed)).sum(-1).sum(), {}

    def total(hidden: mx.array, weight: mx.array) -> mx.array:
        model.lm_head.weight = weight
        if chunk:
            return chunked_sum(in_chunk, head, {"student": hidden}, fixed, chunk)[0]
        log_p, log_q = outcomes(head.logits(hidden), targets(fixed))
        return sum_last(mx.exp(log_p) * (log_p - log_q)).sum(-1).sum()

    places = (0, 1) if "trains" in kind else (0,)
    value_and_gradients = mx.value_and_grad(total, argnums=places)
    weight = model.lm_head.weight

    def run() -> tuple[mx.array, list[mx.array]]:
        value, found = value_and_gradients(hidden, weight)
        return value, list(found)

    return run


def relative(found: mx.array, wanted: mx.array) -> float:
    """Norm of the difference over the norm, summed row by row."""
    rows = [mx.sqrt(mx.square(a).sum(-1).sum()) for a in (found - wanted, wanted)]
    return float(rows[0] / rows[1])


def watch_memory() -> float | None:
    """Forget the peak so far; MB that the process has, or None where the system or a GPU cannot tell."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists() or mx.default_device() != mx.cpu:
        return None
    peak.write_text("5", encoding="utf-8")
    return resident("VmRSS")


def resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


if __name__ == "__main__":
    main()
