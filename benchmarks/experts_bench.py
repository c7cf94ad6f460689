"""A teacher with experts: its experts pruned by importance and at random, and turned into a dense student.

    python benchmarks/experts_bench.py --seeds 0 1 2

Runs the recipes of recipes/mixture_of_experts: the teacher once, each student once a seed, for equally many
tokens. The dense student from random weights has the shape of the one made of experts, and the learning rate
that suits it: the teacher's own. Runs go to `runs/`; one that is there is read, not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import record

from mlx_distill import models, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.data.template import encode
from mlx_distill.preflight import read_rows
from mlx_distill.prune.importance import measure

FOLDER = "mixture_of_experts"
TEACHER = "moe-teacher"
NEW = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
NEW |= {"num_attention_heads": 4, "max_position_embeddings": 512}
STUDENTS = {  # name -> recipe and overrides
    "experts by importance": ("pruned_experts", []),
    "experts at random": ("pruned_experts", ["student.prune.by=random"]),
    "dense from experts": ("dense_student", []),
    "dense from random weights": (
        "dense_student",
        ["student.prune=null", f"student.shape={json.dumps(NEW)}", "train.learning_rate=4e-3"],
    ),
}
UNITS = {"kl": "nats a token", "nll": "nats a token", "pass@1": "share", "parameters": "weights"}
LEAN = ["evaluate.baseline=false", "evaluate.tasks=[fidelity, code]", "train.eval_every=0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, for the students")
    arguments = parser.parse_args()
    teacher = ran("teacher", TEACHER, [])
    lines = [
        {"name": f"teacher: {metric}", "value": teacher["student"][metric], "unit": unit}
        for metric, unit in UNITS.items()
    ]
    lines += routing()
    for name, (of, overrides) in STUDENTS.items():
        runs = []
        for seed in arguments.seeds:
            settings = [f"seed={seed}", f"data.train.seed={seed + 1}", *overrides, *LEAN]
            folder = f"{TEACHER}-{name.replace(' ', '-')}-seed{seed}"
            runs.append(ran(of, folder, settings + arguments.overrides))
        for stage, metric in ((s, m) for s in ("student_before", "student") for m in UNITS):
            values = [run[stage][metric] for run in runs]
            when = "before" if stage == "student_before" else "after"
            lines.append(
                {
                    "name": f"{name}, {when}: {metric}",
                    "value": statistics.fmean(values),
                    "spread": [min(values), max(values)],
                    "unit": UNITS[metric],
                }
            )
    config = {"recipes": FOLDER, "seeds": arguments.seeds, "overrides": arguments.overrides}
    record("experts", [{**line, "config": config} for line in lines])


def ran(name: str, folder: str, settings: list[str]) -> dict[str, Any]:
    """Metrics of the models of one run of a recipe."""
    found = Path("runs") / folder / "evaluation.json"
    if not found.exists():
        again = ["--resume"] if found.parent.exists() else []
        command = [sys.executable, "-m", "mlx_distill", "run", f"{FOLDER}/{name}", f"name={folder}"]
        subprocess.run([*command, *settings, *again], check=True, stdout=sys.stderr)
    return json.loads(found.read_text(encoding="utf-8"))["models"]


def routing() -> list[dict[str, Any]]:
    """How evenly the teacher routes tokens of the data of its students."""
    loaded = models.load(f"runs/{TEACHER}/models/student", "model")
    options = recipe.load(find_recipe(f"{FOLDER}/pruned_experts"))
    rows = [encode(row, loaded.tokenizer) for row in read_rows(options.data)["train"]]
    read = measure(loaded, rows, 65536)
    return [
        {"name": f"teacher: {which.__name__} share of tokens, layer {layer}", "value": float(which(routed))}
        | {"unit": "share"}
        for layer, routed in enumerate(read.routed)
        for which in (min, max)
    ]


if __name__ == "__main__":
    main()
