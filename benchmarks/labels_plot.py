"""Draws docs/labels_curve.svg from the newest `labels_curve` lines of results/recipes.jsonl.

python benchmarks/labels_plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STYLES = {"teacher": ("#777777", "--"), "student": ("#1f6feb", "-"), "baseline": ("#d9822b", "-")}


def curve() -> dict[str, dict[int, float]]:
    """Model -> labels -> pass@1; a later line replaces an earlier one."""
    found: dict[str, dict[int, float]] = {model: {} for model in STYLES}
    for text in (HERE / "results" / "recipes.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        model = line["name"].removeprefix("labels_curve: ").removesuffix(" pass@1")
        if line["config"]["recipe"] == "labels_curve" and line["unit"] == "pass@1" and model in found:
            found[model][line["config"]["labels"]] = line["value"]
    return found


def main() -> None:
    points = curve()
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for model, (color, style) in STYLES.items():
        labels = sorted(points[model])
        axes.plot(
            labels, [100 * points[model][n] for n in labels], style, color=color, marker="o", label=model
        )
    axes.set(xscale="log", xlabel="labelled examples", ylabel="pass@1, %", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "labels_curve.svg", metadata={"Date": None})
    for labels in sorted(points["student"]):
        row = [f"{100 * points[model][labels]:.1f}" for model in ("baseline", "student")]
        print(f"| {labels} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
