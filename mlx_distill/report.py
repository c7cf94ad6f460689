"""`report.html`: one self-contained page that shows what a run did, read off its folder alone.

Whatever a model wrote is hostile text: the template escapes all of it, and the page forbids itself every
outside request and every script.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import MissingExtra, RecipeError, RunFolderError
from mlx_distill.files import write_text
from mlx_distill.report_samples import samples
from mlx_distill.run_record import RunRecord, read_run
from mlx_distill.strict_yaml import parse_yaml
from mlx_distill.verdict import verdict

_CURVES = (
    ("loss", "Training loss, nats/token"),
    ("valid_nll", "nll on validation rows, nats/token"),
    ("valid_kl", "KL to the teacher on validation rows, nats/token"),
)
_RUNS = (1, 2, 4, 5, 6, 7, 0, 3)  # colours of runs side by side

Line = tuple[str, int, Mapping[str, Any]]  # of a table: its name, colour and METRICS


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds.

    Raises:
        NotFound: no evaluation.json there. DataError: it cannot be read as one.
        RunFolderError: the page cannot be written.
    """
    run = read_run(Path(folder))
    models = m.ordered(run.models)
    rows = [(None, [(m.label(name), m.color(name), run.models[name]) for name in models])]
    curves = [(m.label(stage), m.color(stage), run.log, stage, False) for stage in ("student", "baseline")]
    figures, missing = _figures(curves, run.models)
    page = {
        "title": run.name,
        "kind": "Distillation report" if "teacher" in run.models else "Training report",
        "verdict": verdict(run.models),
        "tables": _tables(rows),
        "figures": figures,
        "notes": [*missing, *run.unreadable],
        "samples": samples(run.answers),
        "generated": _lineage(run.generated),
        "sandbox": next((x["sandbox"] for x in run.models.values() if x.get("sandbox")), None),
        "details": _details([run]),
        "differences": None,
    }
    return _write(page, Path(folder) / "report.html")


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that shows several runs side by side.

    Raises:
        NotFound, DataError, RunFolderError: as `write_report`, naming the folder.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [run._replace(name=str(folder)) for run, folder in zip(runs, folders, strict=True)]
    colors = {run.name: _RUNS[i % 8] for i, run in enumerate(runs)}
    groups = []
    models = dict.fromkeys(name for run in runs for name in m.ordered(run.models))
    for model in sorted(models, key=lambda name: (name != "student", name == "student_before")):
        rows = [(run.name, colors[run.name], run.models[model]) for run in runs if model in run.models]
        groups.append((m.label(model), rows))
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
        "tables": _tables(groups),
        "figures": figures,
        "notes": [*missing, *(line for run in runs for line in run.unreadable)],
        "samples": [],
        "generated": None,
        "sandbox": None,
        "details": _details(runs),
        "differences": _differences(runs),
    }
    return _write(page, Path(out))


def _tables(groups: Sequence[tuple[str | None, list[Line]]]) -> list[dict[str, Any]]:
    """What the models can do, what they cost, and what else was measured: columns that any row has."""
    everything = {f"{i} {j}": row[2] for i, (_, rows) in enumerate(groups) for j, row in enumerate(rows)}
    titles = (("Quality", m.QUALITY), ("Cost", m.COST), ("Also measured", m.others(everything)))
    tables = []
    for title, known in titles:
        columns = [x for x in known if any(x.name in metrics for metrics in everything.values())]
        reasons: list[str] = []
        filled = [
            (
                heading,
                [(name, color, [_cell(x, found, reasons) for x in columns]) for name, color, found in rows],
            )
            for heading, rows in groups
        ]
        if columns:
            tables.append({"title": title, "columns": columns, "groups": filled, "reasons": reasons})
    return tables


def _cell(metric: m.Metric, metrics: Mapping[str, Any], reasons: list[str]) -> dict[str, Any]:
    """One number as written, its exact value, and the number of the footnote where there is none."""
    cell: dict[str, Any] = {"text": None, "exact": "", "why": "not asked for", "note": None, "spread": None}
    if metric.name not in metrics:
        return cell
    value, raw = metric.measured(metrics), metrics[metric.name]
    if value is not None:
        stderr = metric.stderr(metrics)
        spread = metric.write(stderr) if stderr else None
        return cell | {"text": metric.write(value), "exact": repr(value), "spread": spread}
    if raw is not None:  # not a finite number: shown as it is
        return cell | {"text": str(raw), "exact": str(raw)}
    why = str(metrics.get(metric.name + "_why") or "no reason given")
    if why not in reasons:
        reasons.append(why)
    return cell | {"why": why, "note": reasons.index(why) + 1}


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
            label = {"student_before": "before", "baseline": "baseline"}.get(name, name)
            points.append(point(label, colors.get(name, 4), size, factor * value, stderr))
    return points


def _lineage(generated: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not generated:
        return None
    kept = sum(1 for row in generated if row.get("kept"))
    reasons = [str(row.get("reason") or "no reason given") for row in generated if not row.get("kept")]
    dropped = Counter(reason.partition(":")[0] for reason in reasons)  # the filter, without what it measured
    return {"written": len(generated), "kept": kept, "dropped": dropped.most_common()}


def _details(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Recipe and environment of each run, folded away at the foot of the page."""
    found = []
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        environment = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in run.environment.items()
        }
        if run.recipe:
            found.append({"title": f"Recipe{of}", "text": run.recipe, "pairs": {}})
        if environment:
            found.append({"title": f"Command and environment{of}", "text": "", "pairs": environment})
    return found


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


def _write(page: dict[str, Any], path: Path) -> Path:
    """Render and put in place in one move, so that a reader never meets half a page."""
    from jinja2 import Environment, StrictUndefined

    source = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(autoescape=True, **options).from_string(source)
    cells = [cell for t in page["tables"] for _, rows in t["groups"] for *_, row in rows for cell in row]
    page["has_spread"] = any(cell["spread"] for cell in cells)
    # A model may write half of a surrogate pair, which no file can hold.
    html = template.render(page).encode("utf-8", errors="replace").decode("utf-8")
    try:
        write_text(path, html)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    return path
