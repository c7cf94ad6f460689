"""A teacher with other tokens than the student's: bits per byte with and without it, at equal tokens.

    python benchmarks/tokenizers_bench.py path/to/stories260K path/to/stories.txt --seeds 0 1 2

Runs recipes/other_tokenizer.yaml once a seed and variant, on stories written as docs/own_model.md does, in a
folder `tokenizers_bench`; a finished run is read, not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import record

VARIANTS = {
    "as in the recipe": [],
    "by_beginning false": ["objective.cross_tokenizer.by_beginning=false"],
}
SPLITS = (("train", 0, 3000), ("valid", 3000, 3100), ("test", 3100, 3200))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("overrides", nargs="*", default=[], help="key=value")
    arguments = parser.parse_args()
    folder = Path("tokenizers_bench")
    write_data(folder / "data", arguments.stories)
    lines = []
    for variant in arguments.variants:
        found = [
            run(folder, variant, seed, arguments.teacher.resolve(), arguments.overrides)
            for seed in arguments.seeds
        ]
        config = {
            "recipe": "other_tokenizer",
            "variant": variant,
            "seeds": arguments.seeds,
            "overrides": arguments.overrides,
        }
        for model in found[0]:
            values = [one[model]["bits_per_byte"] for one in found]
            lines.append(
                {
                    "name": f"{variant}: {model} bits_per_byte",
                    "value": statistics.fmean(values),
                    "spread": [min(values), max(values)],
                    "values": values,
                    "unit": "bits a byte",
                    "config": config,
                }
            )
    record("tokenizers", lines)


def run(folder: Path, variant: str, seed: int, teacher: Path, overrides: list[str]) -> dict[str, Any]:
    """Metrics of every model of one run."""
    name = f"{variant.replace(' ', '-')}-seed{seed}"
    result = folder / "runs" / name / "evaluation.json"
    if not result.exists():
        settings = [f"name={name}", f"seed={seed}", f"teacher.model={teacher}", "evaluate.tasks=[fidelity]"]
        command = [sys.executable, "-m", "mlx_distill", "run", "other_tokenizer", *settings]
        command += [*VARIANTS[variant], *overrides, "--overwrite"]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
    return json.loads(result.read_text(encoding="utf-8"))["models"]


def write_data(folder: Path, stories: Path) -> None:
    told = [story.strip() for story in stories.read_text(encoding="utf-8").split("<|endoftext|>")]
    told = [story for story in told if story]
    folder.mkdir(parents=True, exist_ok=True)
    for split, begin, end in SPLITS:
        lines = [json.dumps({"text": story}) + "\n" for story in told[begin:end]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
