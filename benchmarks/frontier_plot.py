"""Keeps what `mlx-distill compress` measured, draws docs/frontier.svg from it, and prints it as a table.

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
KEPT = ("run", "model", "ratio", "parameters", "size_gib", "kl", "ms_per_token", "front")


def keep(path: Path) -> None:
    """Append every model of a frontier.json to `results/frontier.jsonl`."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    score = tree["score"]
    lines = []
    for point in tree["points"]:
        config = {key: point.get(key) for key in KEPT}
        config |= {"stderr": point.get(f"{score}_stderr"), "line": tree["line"]["score"]}
        picked = tree["pick"] == {"run": point["run"], "model": point["model"]}
        line = {"name": f"{tree['name']}: {point['run']} {point['model']}", "value": point[score]}
        lines.append({**line, "unit": score, "config": {**config, "pick": picked}})
    record("frontier", lines)


def newest() -> list[dict[str, Any]]:
    """The last line of each model, those of the newest commit alone, the teacher first."""
    text = (RESULTS / "frontier.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    of_commit = [line for line in lines if line["commit"] == lines[-1]["commit"]]
    return list({line["name"]: line for line in of_commit}.values())


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
    print(
        "\n| model | weights | MiB | pass@1, % | KL | ms a token | front of |\n|---|---|---|---|---|---|---|"
    )
    for point in points:
        print(row(point))


def row(point: dict[str, Any]) -> str:
    config = point["config"]
    name = "teacher" if config["model"] == "teacher" else f"{config['run']} {config['model']}"
    kl = "" if config["kl"] is None else f"{config['kl']:.3f}"
    fronts = ", ".join(cost for cost, on in config["front"].items() if on)
    cells = [f"**{name}**" if config["pick"] else name, f"{config['parameters']:,}"]
    cells += [
        f"{1024 * config['size_gib']:.3f}",
        f"{100 * point['value']:.1f} ± {100 * config['stderr']:.1f}",
    ]
    speed = f"{config['ms_per_token']:.2f}"
    return f"| {' | '.join([*cells, kl, speed, fronts])} |"


def draw(points: list[dict[str, Any]]) -> None:
    figure, both = plt.subplots(1, 2, figsize=(9.6, 3.9), sharey=True)
    runs = list(dict.fromkeys(point["config"]["run"] for point in points))
    costs = (("size", "MiB on disk"), ("latency", "milliseconds a token"))
    for axes, (cost, title) in zip(both, costs, strict=True):
        front = []
        for point in points:
            config, teacher = point["config"], point["config"]["model"] == "teacher"
            at = 1024 * config["size_gib"] if cost == "size" else config["ms_per_token"]
            color = "#555555" if teacher else COLORS[runs.index(config["run"]) % len(COLORS)]
            value, spread = 100 * point["value"], 100 * config["stderr"]
            axes.errorbar([at], [value], yerr=[spread], color=color, fmt="D" if teacher else "o")
            short = "teacher" if teacher else config["model"].removeprefix("student-")
            axes.annotate(short, (at, value), (5, -9), textcoords="offset points", fontsize=7, color=color)
            if config["pick"]:
                axes.plot([at], [value], "o", mfc="none", mec="#000000", markersize=14)
            if config["front"][cost]:
                front.append((at, value))
        front.sort()
        axes.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=1, zorder=0)
        axes.axhline(100 * points[0]["config"]["line"], color="#000000", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", xlabel=title, ylim=(-4, 104))
        axes.grid(alpha=0.3)
    both[0].set_ylabel("pass@1, %")
    for color, run in zip(COLORS, runs, strict=False):
        both[0].plot([], [], "o", color=color, label=run)
    both[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "frontier"
    figure.savefig(DOCS / "frontier.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
