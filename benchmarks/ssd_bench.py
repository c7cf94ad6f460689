"""Simple self-distillation: the paper's toy in closed form, and learned models with the controls it needs.

    python benchmarks/ssd_bench.py                            # the toy; a second
    python benchmarks/ssd_bench.py --learned locks pocket     # the grids: half an hour of one core
    python benchmarks/ssd_bench.py --table                    # what is kept, as Markdown

- locks: a network of 20,000 weights that has learned strings of the toy's automaton (ssd_locks.py). Its
  chance of a right string is exact.
- pocket: the recipes self_distillation/pocket_base and self_distillation/pocket, run in full up to the end
  of training, at each temperature and truncation of the samples that are learned. pass@1 is that of the
  test split at the temperature with the best pass@1 of the valid split, pass@5 at that with the best pass@5.

The controls are the model before, decoded at its own best temperature, and samples drawn at temperature 1
without truncation, whose expected gradient is zero. Every finished setting is kept at once in `--out`, and
one that is there is not repeated; `--record` keeps all of it in results/ssd.jsonl in place of that.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import ssd_locks
import ssd_toy
from record import RESULTS, record

from mlx_distill import models, pipeline, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.console import Console
from mlx_distill.data import sources
from mlx_distill.evaluate.answering import judge
from mlx_distill.models import Loaded
from mlx_distill.options import Sampling


class Arm(NamedTuple):
    """How the samples that are learned are drawn; None of these: the model before."""

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0

    @property
    def name(self) -> str:
        cut = [f"top-k {self.top_k}"] if self.top_k else []
        cut += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return f"T {self.temperature:g}, {' and '.join(cut) or 'all tokens'}"


BASE = "base"
ARMS = {
    "locks": [Arm(t, None, p) for p in (1.0, ssd_toy.TRAIN_TOP_P) for t in (0.7, 0.9, 1.0, 1.3, 1.6)],
    "pocket": [Arm(t, *cut) for cut in ((None, 1.0), (10, 0.8)) for t in (0.7, 1.0, 1.3, 1.6, 2.0)],
}

COLUMNS = {  # heading -> key of a line
    "locks": {"right, %": "value", "decoded at": "temperature", "closed form, %": "closed_form"},
    "pocket": {
        "pass@1, %": "value",
        "decoded at": "pass@1 temperature",
        "pass@5, %": "pass@5",
        "decoded at ": "pass@5 temperature",
        "rows learned": "rows",
    },
}


def toy() -> list[dict[str, Any]]:
    """The numbers of the toy."""
    settings = (ssd_toy.TRAIN_TEMPERATURE, ssd_toy.TRAIN_TOP_P)
    found = {
        "toy_base_best": ssd_toy.best(ssd_toy.BASE),
        "toy_ssd_best": ssd_toy.best(ssd_toy.distilled(*settings)),
        "toy_wrong_order_best": ssd_toy.best(ssd_toy.distilled(*settings, ssd_toy.truncate_first)),
        "toy_fixed_point_best": ssd_toy.best(ssd_toy.distilled(1.0, 1.0)),
    }
    config = {"train_temperature": settings[0], "train_top_p": settings[1], "top_p": ssd_toy.TOP_P}
    return [
        {"name": name, "value": best.success, "unit": "", "config": config, "temperature": best.temperature}
        for name, best in found.items()
    ]


def locks(seed: int, arms: list[Arm], wanted: set[str]) -> Iterator[dict[str, Any]]:
    """A line for each setting of a learned automaton."""
    before = ssd_locks.base(seed)
    if BASE in wanted:
        yield {
            "name": BASE,
            **_exact(ssd_locks.best(before)),
            "closed_form": ssd_toy.best(ssd_toy.BASE).success,
        }
    for arm in arms:
        if arm.name in wanted:
            student, rows = ssd_locks.distilled(before, Sampling(**arm._asdict()), seed)
            theory = ssd_toy.best(ssd_toy.distilled(arm.temperature, arm.top_p)).success
            yield {"name": arm.name, "rows": rows, **_exact(ssd_locks.best(student)), "closed_form": theory}


def _exact(best: ssd_toy.Best) -> dict[str, Any]:
    return {"value": best.success, "temperature": best.temperature}


def pocket(seed: int, arms: list[Arm], wanted: set[str], root: Path) -> Iterator[dict[str, Any]]:
    """A line for each setting of the recipes on `pocket`."""
    draws = [f"seed={seed}", f"data.prompts.seed={seed + 1}"]
    before = _trained(
        "pocket_base", [f"seed={seed}", f"data.train.seed={seed + 1}"], f"base-seed{seed}", root
    )
    if BASE in wanted:
        yield {"name": BASE, **_measured(before, seed)}
    for arm in arms:
        if arm.name in wanted:
            given = [f"generate.{key}={json.dumps(value)}" for key, value in arm._asdict().items()]
            name = arm.name.replace(", ", "-").replace(" ", "_")
            folder = _trained(
                "pocket", [*draws, *given, f"student.model={before}"], f"{name}-seed{seed}", root
            )
            log = (folder.parent.parent / "samples" / "generated.jsonl").read_text(encoding="utf-8")
            kept = [json.loads(line)["kept"] for line in log.splitlines()]
            yield {"name": arm.name, "rows": sum(kept), "written": len(kept), **_measured(folder, seed)}


def _trained(name: str, overrides: list[str], run: str, root: Path) -> Path:
    """The student of one of the recipes, trained now or before."""
    loaded = recipe.load(find_recipe(f"self_distillation/{name}"), [*overrides, f"name={run}"])
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        resume = (root / run).exists()
        return (
            pipeline.run(loaded, Console(quiet), upto="train", root=root, resume=resume)
            / "models"
            / "student"
        )


def _measured(folder: Path, seed: int) -> dict[str, Any]:
    """Both scores on the test split, each at its best temperature on the valid split, which is given too."""
    how = recipe.load(find_recipe("self_distillation/pocket"))
    assert how.data.valid is not None and how.data.test is not None
    valid, test = sources.read(how.data.valid, "valid"), sources.read(how.data.test, "test")
    loaded = models.load(str(folder), "student.model")
    curve = {t: _scores(loaded, valid, how, t, seed) for t in how.evaluate.temperatures}
    found: dict[str, Any] = {"valid": curve}
    done: dict[float, dict[str, float]] = {}
    for metric, key in (("pass@1", "value"), ("pass@5", "pass@5")):
        best = max(curve, key=lambda t: (curve[t][metric], -t))
        done[best] = done.get(best) or _scores(loaded, test, how, best, seed)
        found |= {key: done[best][metric], f"{metric} temperature": best}
    return found


def _scores(
    loaded: Loaded, rows: list[Any], how: recipe.Recipe, temperature: float, seed: int
) -> dict[str, float]:
    options = how.evaluate.model_copy(update={"temperature": temperature})
    size = max(loaded.tokenizer.get_vocab().values()) + 1
    found, _ = judge("student", loaded, rows, options, vocabulary=size, seed=seed)
    return {name: found[name] for name in ("pass@1", "pass@1_stderr", "pass@5")}


def table(lines: list[dict[str, Any]]) -> None:
    """Means over seeds with the smallest and largest value, and each seed's temperatures, as Markdown."""
    for part, columns in COLUMNS.items():
        of_part = [line for line in lines if line["config"].get("part") == part]
        if not of_part:
            continue
        print(f"\n{part}\n\n| learned samples | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for name in [BASE, *(arm.name for arm in ARMS[part])]:
            found = [line for line in of_part if line["name"] == name]
            if found:
                cells = [_cell([line[key] for line in found if key in line], key) for key in columns.values()]
                print(f"| {name} | {' | '.join(cells)} |")


def _cell(values: list[float], key: str) -> str:
    if not values:
        return ""
    if "temperature" in key:
        return ", ".join(f"{value:g}" for value in values)
    scale, digits = (1, 0) if key == "rows" else (100, 1)
    mean, low, high = (f"{scale * f(values):.{digits}f}" for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learned", nargs="+", choices=list(ARMS), default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of settings, such as base; all, if left out")
    parser.add_argument("--runs", type=Path, default=Path("runs/ssd"), help="folder of the runs on pocket")
    parser.add_argument("--out", type=Path, default=Path("runs/ssd.jsonl"))
    parser.add_argument("--record", action="store_true", help="keep what is found in results/ssd.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    out = RESULTS / "ssd.jsonl" if arguments.record else arguments.out
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    if arguments.table:
        table(kept)
        return
    mx.set_cache_limit(2 << 30)
    if not arguments.learned:
        _keep(toy(), out, arguments.record)
    for seed in arguments.seeds:
        for part in arguments.learned:
            done = {line["name"] for line in kept if line["config"] == {"part": part, "seed": seed}}
            wanted = set(arguments.only or [BASE, *(arm.name for arm in ARMS[part])]) - done
            if not wanted:
                continue
            if part == "locks":
                found = locks(seed, ARMS[part], wanted)
            else:
                found = pocket(seed, ARMS[part], wanted, arguments.runs)
            started = time.perf_counter()
            for line in found:
                line |= {"unit": "", "config": {"part": part, "seed": seed}}
                _keep([{**line, "seconds": time.perf_counter() - started}], out, arguments.record)
                started = time.perf_counter()


def _keep(lines: list[dict[str, Any]], out: Path, recorded: bool) -> None:
    if recorded:
        record("ssd", lines)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for line in lines:
            text = json.dumps({"bench": "ssd", **line})
            file.write(text + "\n")
            print(text, flush=True)


if __name__ == "__main__":
    main()
