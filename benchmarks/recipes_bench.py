"""What the bundled pocket recipes reach: every model's scores over several seeds, in runs of their own.

    python benchmarks/recipes_bench.py quickstart summarization/pocket --seeds 0 1 2
    python benchmarks/recipes_bench.py labels_curve --seeds 0 --labels 50 100 200 500 1000 2000 5000

A seed is that of the recipe (initial weights, order) and draws other labels and prompts as well. Runs go to
`runs/`; a run that is there and finished is read, not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record

METRICS = ("pass@1", "rougeL", "kl", "nll", "parameters", "size_mib")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--labels", nargs="+", type=int, default=[None])
    parser.add_argument("overrides", nargs="*", default=[], help="key=value after `--`")
    arguments = parser.parse_args()
    recipes = [name for name in arguments.recipes if "=" not in name]
    overrides = [name for name in arguments.recipes if "=" in name] + arguments.overrides
    lines: list[dict[str, Any]] = []
    for recipe in recipes:
        for labels in arguments.labels:
            runs = [run(recipe, seed, labels, overrides) for seed in arguments.seeds]
            lines += summary(recipe, arguments.seeds, labels, runs)
    record("recipes", lines)


def run(recipe: str, seed: int, labels: int | None, overrides: list[str]) -> dict[str, Any]:
    """Metrics of every model of one run, and its seconds."""
    name = f"{recipe.replace('/', '-')}-seed{seed}" + (f"-labels{labels}" if labels else "")
    folder = Path("runs") / name
    settings = [
        f"name={name}",
        f"seed={seed}",
        f"data.train.seed={seed + 1}",
        f"data.prompts.seed={seed + 1}",
    ]
    settings += [f"data.train.rows={labels}"] if labels else []
    started = time.perf_counter()
    if not (folder / "report.html").exists():
        command = [sys.executable, "-m", "mlx_distill", "run", recipe, *settings, *overrides]
        subprocess.run([*command, *(["--resume"] if folder.exists() else [])], check=True, stdout=sys.stderr)
        (folder / "seconds").write_text(str(time.perf_counter() - started), encoding="utf-8")
    models = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
    seconds = folder / "seconds"
    return {
        "models": models,
        "seconds": float(seconds.read_text(encoding="utf-8")) if seconds.exists() else None,
    }


def summary(
    recipe: str, seeds: list[int], labels: int | None, runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A line a model and metric: the mean over seeds, the spread, and each value."""
    lines = []
    config = {"recipe": recipe, "seeds": seeds, **({"labels": labels} if labels else {})}
    for model in runs[0]["models"]:
        for metric in METRICS:
            values = [one["models"][model].get(metric) for one in runs]
            if all(value is not None for value in values):
                lines.append(_line(recipe, f"{model} {metric}", metric, values, config))
    if all(one["seconds"] is not None for one in runs):
        lines.append(_line(recipe, "seconds", "s", [one["seconds"] for one in runs], config))
    return lines


def _line(recipe: str, name: str, unit: str, values: list[float], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": f"{recipe}: {name}",
        "value": statistics.fmean(values),
        "spread": [min(values), max(values)],
        "values": values,
        "unit": unit,
        "config": config,
    }


if __name__ == "__main__":
    main()
