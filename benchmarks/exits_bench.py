"""What training an early exit does: to the middle layer, to answers drafted there, and to the last layer.

    python benchmarks/exits_bench.py --seeds 0 1 2

Runs recipes/early_exits.yaml once a seed, and compares the embedded model before with the student after: nll
and pass@1 of layer 2 and of the last layer, and 200 held-out prompts answered by drafting at layer 2, token
for token against plain decoding. Runs go to `runs/`; one that is there is read, not repeated.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import record

from mlx_distill import models, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.data import pocket
from mlx_distill.data.template import encode, encode_prompt, end_of_turn_ids
from mlx_distill.evaluate.answering import judge
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.models.early_exit import Stack, answer_early
from mlx_distill.models.first_layers import first_layers
from mlx_distill.models.speculate import speculate

EXIT, DRAFTS, PROMPTS, MAX_TOKENS = 2, (1, 2, 3, 5), 200, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", default=[], help="key=value")
    arguments = parser.parse_args()
    lines = [
        {"name": f"before: {name}", **line} for name, line in look(models.load("embedded", "model")).items()
    ]
    after = [look(trained(seed, arguments.overrides)) for seed in arguments.seeds]
    for name, first in after[0].items():
        values = [found[name]["value"] for found in after]
        lines.append(
            {
                "name": f"after: {name}",
                "value": statistics.fmean(values),
                "spread": [min(values), max(values)],
                "unit": first["unit"],
            }
        )
    config = {"recipe": "early_exits", "seeds": arguments.seeds, "overrides": arguments.overrides}
    record("exits", [{**line, "config": config} for line in lines])


def trained(seed: int, overrides: list[str]) -> Loaded:
    """The student of one run of the recipe."""
    folder = Path("runs") / f"early-exits-seed{seed}"
    if not (folder / "models" / "student").exists():
        settings = [f"name={folder.name}", f"seed={seed}", f"data.train.seed={seed + 1}", *overrides]
        command = [sys.executable, "-m", "mlx_distill", "train", "early_exits", *settings, "--overwrite"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return models.load(str(folder / "models" / "student"), "model")


def look(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """What a model does at its exit, at its end, and with both together."""
    rows = pocket.rows("code", "test", PROMPTS)
    encoded = [encode(row, loaded.tokenizer) for row in rows]
    vocabulary = max(loaded.tokenizer.get_vocab().values()) + 1
    how = recipe.load(find_recipe("early_exits")).evaluate
    found: dict[str, dict[str, Any]] = {}
    for name, model in ((f"layer {EXIT}", first_layers(loaded, EXIT)), ("last layer", loaded)):
        nll = fidelity(model.model, encoded, vocabulary)[0]["nll"]
        found[f"{name} nll"] = {"value": nll, "unit": "nats a token"}
        passed = judge(name, model, rows, how)[0]["pass@1"]
        found[f"{name} pass@1"] = {"value": passed, "unit": "share"}
    stack, stop = Stack(loaded.model), end_of_turn_ids(loaded.tokenizer)
    prompts = [encode_prompt(row, loaded.tokenizer) for row in rows]
    plain, seconds = [], []
    for prompt in prompts:
        started = time.process_time()
        plain.append(answer_early(stack, prompt, exits=(), threshold=1.0, stop=stop, max_tokens=MAX_TOKENS))
        seconds.append(time.process_time() - started)
    for draft in DRAFTS:
        answers, drafted = [], []
        for prompt in prompts:
            started = time.process_time()
            answers.append(speculate(stack, prompt, exit=EXIT, draft=draft, stop=stop, max_tokens=MAX_TOKENS))
            drafted.append(time.process_time() - started)
        tokens = sum(len(answer.tokens) + answer.finished for answer in answers)
        values = {
            "identical answers": (
                sum(a.tokens == b.tokens for a, b in zip(answers, plain, strict=True)),
                f"of {PROMPTS}",
            ),
            "tokens per call": (tokens / sum(answer.calls for answer in answers), "tokens"),
            "accepted": (
                sum(answer.accepted for answer in answers) / sum(answer.drafted for answer in answers),
                "share of drafted tokens",
            ),
            "speedup": (sum(seconds) / sum(drafted), "plain / drafted CPU time"),
        }
        found |= {
            f"draft {draft}, {name}": {"value": value, "unit": unit} for name, (value, unit) in values.items()
        }
    early = [
        answer_early(stack, prompt, exits=(EXIT,), threshold=0.9, stop=stop, max_tokens=MAX_TOKENS)
        for prompt in prompts
    ]
    layers = [layer for answer in early for layer in answer.exits]
    found["threshold 0.9, answered early"] = {
        "value": sum(layer == EXIT for layer in layers) / len(layers),
        "unit": "share of tokens",
    }
    found["threshold 0.9, identical answers"] = {
        "value": sum(a.tokens == b.tokens for a, b in zip(early, plain, strict=True)),
        "unit": f"of {PROMPTS}",
    }
    return found


if __name__ == "__main__":
    main()
