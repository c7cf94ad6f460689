"""`report.html`: one self-contained page that shows what a run did, read off its folder alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill import report_figures as figures
from mlx_distill.errors import RecipeError
from mlx_distill.report_compared import between_runs, comparisons, facts, side_by_side
from mlx_distill.report_disagreement import disagreements
from mlx_distill.report_lineage import lineage, memory
from mlx_distill.report_page import RUNS, commands, details, sandbox_of, speed_table, tables, write_page
from mlx_distill.report_samples import samples, shown
from mlx_distill.report_tasks import tasks, unlike
from mlx_distill.run_record import RunRecord, read_run
from mlx_distill.strict_yaml import parse_yaml
from mlx_distill.verdict import verdict


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds.

    Raises:
        NotFound: no evaluation.json there. DataError: it cannot be read as one.
        RunFolderError: the page cannot be written.
    """
    run = read_run(Path(folder))
    models = run.models
    names = {name: m.label(name, models) for name in m.ordered(models)}
    lines = [(label, m.color(name), models[name]) for name, label in names.items()]
    colors = {name: m.color(name) for name in models}
    logs = [figures.Log(m.label(s, models), m.color(s), run.log, s) for s in ("student", "baseline")]
    curves, missing = figures.drawn(lambda: figures.curves(logs))
    costs, _ = figures.drawn(lambda: figures.costs(models, colors, figures.short_names(models)))
    sandbox, warnings = sandbox_of(models)
    page = {
        "title": run.name,
        "kind": "Distillation report" if "teacher" in models else "Training report",
        "verdict": verdict(models, run.comparisons),
        "warnings": warnings,
        "facts": facts(models),
        "comparisons": comparisons(run.comparisons, names),
        "tables": [*tables([(None, lines)]), *speed_table(lines)],
        "costs": costs,
        "figures": curves,
        "disagreements": disagreements(run.disagreements, models),
        "samples": samples(run.answers, shown(models)),
        "lineage": lineage([run]),
        "memory": memory([run]),
        "tasks": tasks([run]),
        "sandbox": sandbox,
        **_foot([run], missing),
    }
    return write_page(page, Path(folder) / "report.html")


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that shows several runs side by side.

    Raises:
        NotFound, DataError, RunFolderError: as `write_report`, naming the folder.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [run._replace(name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    colors = {run.name: RUNS[i % 8] for i, run in enumerate(runs)}
    groups = []
    models = dict.fromkeys(name for run in runs for name in m.ordered(run.models))
    for model in sorted(models, key=lambda name: (name != "student", name == "student_before")):
        having = [run for run in runs if model in run.models]
        rows = [(run.name, colors[run.name], run.models[model]) for run in having]
        alike = having[0].models if all(m.is_pruned(run.models) for run in having) else None
        groups.append((m.label(model, alike), rows))
    logs = [
        figures.Log(run.name + (", baseline" if dashed else ""), colors[run.name], run.log, stage, dashed)
        for run in runs
        for stage, dashed in (("student", False), ("baseline", True))
    ]
    students = {run.name: run.models["student"] for run in runs if "student" in run.models}
    curves, missing = figures.drawn(lambda: figures.curves(logs))
    costs, _ = figures.drawn(lambda: figures.costs(students, colors, {}))
    compared, unpaired = between_runs(runs)
    page = {
        "title": " · ".join(run.name for run in runs),
        "kind": f"{len(runs)} runs side by side",
        "warnings": unlike(runs),
        "runs": [
            {"name": run.name, "color": colors[run.name], "line": verdict(run.models, run.comparisons)[0]}
            for run in runs
        ],
        "comparisons": comparisons(compared, {}),
        "tables": tables(groups),
        "differences": _differences(runs),
        "costs": costs,
        "figures": curves,
        "samples": samples(side_by_side(runs), {run.name: (run.name, colors[run.name]) for run in runs}),
        "lineage": lineage(runs),
        "memory": memory(runs),
        "tasks": tasks(runs),
        **_foot(runs, [*missing, *unpaired]),
    }
    return write_page(page, Path(out))


def _foot(runs: list[RunRecord], notes: Sequence[str]) -> dict[str, Any]:
    unreadable = [line for run in runs for line in run.unreadable]
    return {"commands": commands(runs), "details": details(runs), "notes": [*notes, *unreadable]}


def _differences(runs: list[RunRecord]) -> dict[str, Any] | None:
    """Recipe keys in which the runs differ: path -> one value a run."""
    flat = []
    for run in runs:
        try:
            flat.append(_flatten(parse_yaml(run.recipe, "recipe.yaml")))
        except RecipeError:
            return None
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = {key: [tree.get(key, "–") for tree in flat] for key in keys if key != "name"}
    return {"runs": [run.name for run in runs], "rows": {k: v for k, v in rows.items() if len(set(v)) > 1}}


def _flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = json.dumps(value)
    return flat
