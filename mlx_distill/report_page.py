"""What every page of a report is made of: tables, the details at its foot, and the template that holds them.

Whatever a model wrote is hostile text: the template escapes all of it, and the page forbids itself every
outside request and every script.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import RunFolderError
from mlx_distill.files import write_text
from mlx_distill.run_record import RunRecord

Line = tuple[str, int, Mapping[str, Any]]  # of a table: its name, colour and METRICS
KNOWN = (("Quality", m.QUALITY), ("Cost", m.COST))
RUNS = (1, 2, 4, 5, 6, 7, 0, 3)  # colours of runs side by side


def tables(
    groups: Sequence[tuple[str | None, Sequence[Line]]],
    known: Sequence[tuple[str, Sequence[m.Metric]]] | None = None,
) -> list[dict[str, Any]]:
    """Tables with the columns that any row has.

    Args:
        known: titles and their columns; None: what the models can do, what they cost, and what else was
            measured.
    """
    everything = {f"{i} {j}": row[2] for i, (_, rows) in enumerate(groups) for j, row in enumerate(rows)}
    titles = known if known is not None else (*KNOWN, ("Also measured", m.others(everything)))
    made = []
    for title, listed in titles:
        columns = [x for x in listed if any(x.name in metrics for metrics in everything.values())]
        reasons: list[str] = []
        filled = [
            (
                heading,
                [(name, color, [_cell(x, found, reasons) for x in columns]) for name, color, found in rows],
            )
            for heading, rows in groups
        ]
        if columns:
            made.append({"title": title, "columns": columns, "groups": filled, "reasons": reasons})
    return made


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


def details(runs: list[RunRecord]) -> list[dict[str, Any]]:
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


def write_page(page: dict[str, Any], path: Path) -> Path:
    """Render and put in place in one move, so that a reader never meets half a page."""
    from jinja2 import Environment, StrictUndefined

    source = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(autoescape=True, **options).from_string(source)
    cells = [cell for t in page["tables"] for _, rows in t["groups"] for *_, row in rows for cell in row]
    page = {"highlighted": "student", "figures_title": "Curves", "figures_first": False, **page}
    page["has_spread"] = any(cell["spread"] for cell in cells)
    # A model may write half of a surrogate pair, which no file can hold.
    html = template.render(page).encode("utf-8", errors="replace").decode("utf-8")
    try:
        write_text(path, html)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    return path
