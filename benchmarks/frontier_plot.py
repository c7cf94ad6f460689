"""Keeps what `mlx-distill compress` measured, draws docs/frontier.svg from it, and prints it as a table.

Quality against size alone: timings need a machine that does nothing else meanwhile.

python benchmarks/frontier_plot.py runs/frontier-frontier/frontier.json
python benchmarks/frontier_plot.py       # draws the newest of results/frontier.jsonl again
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from record import RESULTS, record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
COLORS = ("#1f6feb", "#d9822b", "#2a9d6f", "#8a4bb5")
KEPT = ("run", "model", "ratio", "parameters", "size_gib", "kl", "bits_per_weight")
HEAD = ("model", "weights", "bits a weight", "MiB", "pass@1, %", "KL", "on the front")


def keep(path: Path) -> None:
    """Append every model of a frontier.json to `results/frontier.jsonl`."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    score = tree["score"]
    lines = []
    for point in tree["points"]:
        config = {key: point.get(key) for key in KEPT}
        config |= {"stderr": point.get(f"{score}_stderr"), "line": tree["line"]["score"]}
        config["front"] = point["front"]["size"]
        config["pick"] = tree["pick"] == {"run": point["run"], "model": point["model"]}
        name = f"{tree['name']}: {point['run']} {point['model']}"
        lines.append({"name": name, "value": point[score], "unit": score, "config": config})
    record("frontier", lines)


def newest() -> list[dict[str, Any]]:
    """The last line of each model, those of the newest commit alone, the teacher first."""
    text = (RESULTS / "frontier.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    of_commit = [line for line in lines if line["commit"] == lines[-1]["commit"]]
    return list({line["name"]: line for line in of_commit}.values())


def row(point: dict[str, Any]) -> list[str]:
    config = point["config"]
    name = "teacher" if config["model"] == "teacher" else f"{config['run']} {config['model']}"
    bits, kl = config["bits_per_weight"], config["kl"]
    return [
        f"**{name}**" if config["pick"] else name,
        f"{config['parameters']:,}",
        "32" if bits is None else f"{bits:.1f}",
        f"{1024 * config['size_gib']:.2f}",
        f"{100 * point['value']:.1f} ± {100 * config['stderr']:.1f}",
        "" if kl is None else f"{kl:.3f}",
        "yes" if config["front"] else "",
    ]


def draw(points: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    runs = list(dict.fromkeys(point["config"]["run"] for point in points))
    for point in points:
        config, teacher = point["config"], point["config"]["model"] == "teacher"
        at, value, spread = 1024 * config["size_gib"], 100 * point["value"], 100 * config["stderr"]
        color = "#555555" if teacher else COLORS[runs.index(config["run"]) % len(COLORS)]
        axes.errorbar([at], [value], yerr=[spread], color=color, fmt="D" if teacher else "o", markersize=5)
        short = config["model"].removeprefix("student-")
        axes.annotate(short, (at, value), (4, -11), textcoords="offset points", fontsize=7, color=color)
        if config["pick"]:
            axes.plot([at], [value], "o", mfc="none", mec="#000000", markersize=14)
    front = sorted(
        (1024 * one["config"]["size_gib"], 100 * one["value"]) for one in points if one["config"]["front"]
    )
    axes.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=1, zorder=0)
    axes.axhline(100 * points[0]["config"]["line"], color="#000000", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="MiB on disk", ylabel="pass@1, %", ylim=(-4, 106))
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    for color, run in zip(COLORS, runs, strict=False):
        axes.plot([], [], "o", color=color, label=run)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "frontier"
    figure.savefig(DOCS / "frontier.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("frontier", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.frontier is not None:
        keep(arguments.frontier)
    points = newest()
    draw(points)
    for cells in [HEAD, ["---"] * len(HEAD), *map(row, points)]:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
