"""Draws docs/losses_modes.svg: what each divergence makes of a student that is too small.

The teacher has two modes among 60 outcomes; the student is a discretised normal distribution, two numbers,
and so must choose. Each loss is minimised by plain gradient descent from the same ten starts; the lowest is
shown. Nothing is random. A quarter of a minute on one core:

python benchmarks/losses_plot.py
"""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np

from mlx_distill.losses import LOSSES, Targets

HERE = Path(__file__).parent
OUTCOMES, VALLEY, STEPS, RATE = 60, 29, 10_000, 0.05
PLACES = mx.arange(OUTCOMES).astype(mx.float32)
STARTS = [(center, width) for center in (5.0, 17.0, 30.0, 43.0, 55.0) for width in (3.0, 10.0)]
SHOWN: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("jensen_shannon", {"beta": 0.1}),
    ("adaptive_kl", {}),
    ("total_variation", {}),
    ("reverse_kl", {}),
    ("jensen_shannon", {}),
    ("skewed_forward_kl", {}),
    ("skewed_reverse_kl", {}),
]


def normal(center: mx.array, width: mx.array) -> mx.array:
    """Logits over the outcomes, of normal distributions rounded to whole numbers."""
    return -(((PLACES - center[..., None]) / width[..., None]) ** 2) / 2


def teacher() -> mx.array:
    """Two modes: 65 % around 15, 35 % around 43, and 1 % of all spread evenly."""
    modes = mx.softmax(normal(mx.array([15.0, 43.0]), mx.array([3.0, 4.0])), axis=-1)
    p = 0.99 * (mx.array([0.65, 0.35])[:, None] * modes).sum(0) + 0.01 / OUTCOMES
    return mx.log(p)


def student(parameters: mx.array) -> mx.array:
    """(starts, 2) to logits (1, starts, outcomes). Both numbers are scaled to be of size one."""
    return normal(10 * parameters[:, 0], mx.exp(parameters[:, 1]))[None]


def fit(loss: str, options: dict[str, Any]) -> tuple[float, float, float, np.ndarray]:
    """Center, width, nats and probabilities of the best student, after `STEPS` steps from each start."""
    labels = mx.zeros((1, len(STARTS)), dtype=mx.int32)
    targets = Targets(labels, mx.broadcast_to(teacher(), (1, len(STARTS), OUTCOMES)))
    parameters = mx.array([[center / 10, math.log(width)] for center, width in STARTS])
    slope = mx.grad(lambda x: LOSSES[loss](student(x), targets, **options).sum())
    step = mx.compile(lambda x: x - RATE * slope(x))
    for _ in range(STEPS):
        parameters = step(parameters)
        mx.eval(parameters)
    nats = np.array(LOSSES[loss](student(parameters), targets, **options)[0])
    best = int(nats.argmin())
    scaled, log_width = np.array(parameters)[best]
    q = np.array(mx.softmax(student(parameters)[0, best], axis=-1))
    return 10 * float(scaled), math.exp(log_width), float(nats[best]), q


def main() -> None:
    p = np.array(mx.exp(teacher()))
    matplotlib.rcParams["svg.hashsalt"] = "losses_modes"  # names inside the file, otherwise random
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.4), sharex=True, sharey=True)
    print("| loss | center | width | mass on the left mode | in the valley, of the teacher's | value |")
    print("|---|---|---|---|---|---|")
    for axis, (loss, options) in zip(axes.flat, SHOWN, strict=True):
        center, width, nats, q = fit(loss, options)
        name = ", ".join([loss, *(f"{option} {number}" for option, number in options.items())])
        left, valley = q[:VALLEY].sum(), q[VALLEY] / p[VALLEY]
        print(f"| {name} | {center:.1f} | {width:.1f} | {100 * left:.0f} % | x {valley:.2g} | {nats:.3f} |")
        axis.fill_between(range(OUTCOMES), p, color="#bbbbbb", label="teacher", linewidth=0)
        axis.plot(range(OUTCOMES), q, color="#1f6feb", label="student")
        axis.set_title(name, fontsize=10)
        axis.set_yticks([])
    axes.flat[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "losses_modes.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
