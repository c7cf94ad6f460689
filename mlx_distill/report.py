"""`report.html`: one self-contained page that shows what a run did, read off its folder alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import MissingExtra, RecipeError
from mlx_distill.report_page import RUNS, details, tables, write_page
from mlx_distill.report_samples import samples
from mlx_distill.run_record import RunRecord, read_run
from mlx_distill.strict_yaml import parse_yaml
from mlx_distill.verdict import verdict

_CURVES = (
    ("loss", "Training loss, nats/token"),
    ("valid_nll", "nll on validation rows, nats/token"),
    ("valid_kl", "KL to the teacher on validation rows, nats/token"),
)


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds.

    Raises:
        NotFound: no evaluation.json there. DataError: it cannot be read as one.
        RunFolderError: the page cannot be written.
    """
    run = read_run(Path(folder))
    models = m.ordered(run.models)
    rows = [(None, [(m.label(name, run.models), m.color(name), run.models[name]) for name in models])]
    stages = ("student", "baseline")
    curves = [(m.label(stage, run.models), m.color(stage), run.log, stage, False) for stage in stages]
    figures, missing = _figures(curves, run.models)
    page = {
        "title": run.name,
        "kind": "Distillation report" if "teacher" in run.models else "Training report",
        "verdict": verdict(run.models),
        "tables": tables(rows),
        "figures": figures,
        "notes": [*missing, *run.unreadable],
        "samples": samples(run.answers, run.models),
        "generated": _lineage(run.generated),
        "sandbox": next((x["sandbox"] for x in run.models.values() if x.get("sandbox")), None),
        "details": details([run]),
        "differences": None,
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
    stages = [(stage, dashed) for stage, dashed in (("student", False), ("baseline", True))]
    curves = [
        (run.name + (", baseline" if dashed else ""), colors[run.name], run.log, stage, dashed)
        for run in runs
        for stage, dashed in stages
    ]
    students = {run.name: run.models["student"] for run in runs if "student" in run.models}
    figures, missing = _figures(curves, students, colors)
    page = {
        "title": " · ".join(run.name for run in runs),
        "kind": f"{len(runs)} runs side by side",
        "verdict": [],
        "tables": tables(groups),
        "figures": figures,
        "notes": [*missing, *(line for run in runs for line in run.unreadable)],
        "samples": [],
        "generated": None,
        "sandbox": None,
        "details": details(runs),
        "differences": _differences(runs),
    }
    return write_page(page, Path(out))


def _figures(
    curves: list[tuple[str, int, list[dict[str, Any]], str, bool]],
    models: m.Models,
    colors: Mapping[str, int] = m.COLORS,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures that the numbers allow, and a line on what is missing."""
    from mlx_distill import figures

    found = []
    try:
        for key, title in _CURVES:
            lines = []
            for label, color, log, stage, dashed in curves:
                points = _points(log, stage, key)
                if len(points) > 1:
                    lines.append(figures.Curve(label, color, list(points), list(points.values()), dashed))
            if lines:
                note = "Each minimises its own losses; compare on validation rows." if key == "loss" else ""
                note = note if len(lines) > 1 else ""
                found.append(
                    {"title": title, "svg": figures.curves(key, lines), "lines": lines, "note": note}
                )
        shown = ("pass@1", "exact_match", "rougeL", "top1_agreement", "kl", "nll")
        for metric in (x for x in m.QUALITY if x.name in shown):
            points = _sizes(figures.Point, metric, models, colors)
            if len(points) > 1:
                title = f"Size against {metric.name}"
                svg = figures.sizes("sizes", points, f"{metric.name} {metric.unit}".strip(), "MiB on disk")
                found.append({"title": title, "svg": svg, "lines": [], "note": ""})
                break
    except MissingExtra:
        return [], ["Curves are left out: pip install 'mlx-distill[report]' adds them."]
    return found, []


def _points(log: list[dict[str, Any]], stage: str, key: str) -> dict[float, float]:
    """Step -> value. A resumed run writes some steps twice; the later line counts."""
    points = {}
    for line in log:
        step, value = m.number(line.get("step")), m.number(line.get(key))
        if line.get("stage") == stage and step is not None and value is not None:
            points[step] = value
    return dict(sorted(points.items()))


def _sizes(point: Any, metric: m.Metric, models: m.Models, colors: Mapping[str, int]) -> list[Any]:
    points = []
    factor = 100 if metric.unit == "%" else 1
    for name in m.ordered(models):
        size, value = m.number(models[name].get("size_mib")), metric.measured(models[name])
        if size and value is not None:
            stderr = factor * (metric.stderr(models[name]) or 0.0)
            before = "pruned" if m.is_pruned(models) else "before"
            label = {"student_before": before, "baseline": "baseline"}.get(name, name)
            points.append(point(label, colors.get(name, 4), size, factor * value, stderr))
    return points


def _lineage(generated: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not generated:
        return None
    kept = sum(1 for row in generated if row.get("kept"))
    reasons = [str(row.get("reason") or "no reason given") for row in generated if not row.get("kept")]
    dropped = Counter(reason.partition(":")[0] for reason in reasons)  # the filter, without what it measured
    return {"written": len(generated), "kept": kept, "dropped": dropped.most_common()}


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
