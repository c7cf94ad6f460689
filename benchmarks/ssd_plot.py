"""Draws docs/ssd_toy.svg: the toy of simple self-distillation, in closed form. A second:

python benchmarks/ssd_plot.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ssd_toy import (
    BASE,
    TEMPERATURES,
    TOP_P,
    TRAIN_TEMPERATURE,
    TRAIN_TOP_P,
    best,
    cut,
    distilled,
    success,
    temper,
    truncate_first,
)

HERE = Path(__file__).parent
MODELS = [
    ("base", BASE, "#888888"),
    ("self-distilled", distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P), "#1f6feb"),
    (
        "self-distilled, truncated\nbefore the temperature",
        distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P, truncate_first),
        "#d1242f",
    ),
]


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "ssd_toy"  # names inside the file, otherwise random
    figure, (curves, lock, fork) = plt.subplots(1, 3, figsize=(10, 3.4), width_ratios=[2, 1, 1])
    for name, model, color in MODELS:
        values = [100 * success(model, t, TOP_P) for t in TEMPERATURES.tolist()]
        top = best(model)
        curves.plot(TEMPERATURES, values, color=color, label=name)
        curves.plot(top.temperature, 100 * top.success, "o", color=color)
        curves.annotate(
            f"{100 * top.success:.2f} % at {top.temperature:.2f}",
            (top.temperature, 100 * top.success),
            textcoords="offset points",
            xytext=(5, 5) if name == "self-distilled" else (-5, 4),
            ha="left" if name == "self-distilled" else "right",
            color=color,
            fontsize=9,
        )
    curves.set_xlabel("temperature of decoding")
    curves.set_ylabel("programs that are right, %")
    curves.set_xlim(0, 3)
    curves.set_ylim(0, 17)
    curves.legend(frameon=False, fontsize=8, loc="upper left")
    for axis, title, place in ((lock, "at a lock", "lock"), (fork, "at the fork", "fork")):
        for shift, (name, model, color) in zip((-0.2, 0.2), MODELS[:2], strict=True):
            # Each at its own best temperature; hollow is what top-p cuts there.
            whole = temper(getattr(model, place), best(model).temperature)
            kept = whole * (cut(whole, TOP_P) > 0)
            places = [i + shift for i in range(8)]
            axis.bar(places, 100 * whole[:8], 0.4, facecolor="none", edgecolor=color, linewidth=0.6)
            axis.bar(places, 100 * kept[:8], 0.4, color=color, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(8), ["right", *("" for _ in range(7))], fontsize=8)
        axis.set_ylabel("probability, %")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "ssd_toy.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
