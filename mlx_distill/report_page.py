"""What every page of a report is made of: tables, the details at its foot, and the templates that hold them.

Whatever a model wrote is hostile text: the templates escape all of it, and the page forbids itself every
outside request and every script.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.drive import stopped_by
from mlx_distill.errors import RunFolderError
from mlx_distill.files import write_text
from mlx_distill.odd_files import odd
from mlx_distill.run_record import RunRecord

Line = tuple[str, int, Mapping[str, Any]]  # of a table: its name, colour and METRICS
KNOWN = (("Quality", m.QUALITY), ("Cost", m.COST))
RUNS = (1, 2, 4, 5, 6, 7, 0, 3)  # colours of runs side by side
NO_MATPLOTLIB = "Figures are left out: pip install 'mlx-distill[report]' adds them."
# What a page may have; a page that lacks a part leaves it out.
_EMPTY: dict[str, Any] = {
    "verdict": [],
    "warnings": [],
    "runs": [],
    "facts": [],
    "comparisons": None,
    "tables": [],
    "differences": None,
    "costs": [],
    "figures": [],
    "figures_title": "Curves",
    "figures_first": False,
    "disagreements": None,
    "samples": [],
    "lineage": [],
    "memory": None,
    "tasks": None,
    "commands": [],
    "details": [],
    "notes": [],
    "sandbox": None,
    "highlighted": "student",
}
_PARTS = (  # key of the page, the id of its section, its name in the list of parts
    ("comparisons", "differences", "Differences"),
    ("tables", "numbers", "Numbers"),
    ("differences", "recipes", "Recipes"),
    ("costs", "costs", "What quality costs"),
    ("figures", "curves", "Curves"),
    ("disagreements", "disagreement", "Disagreement"),
    ("samples", "samples", "Samples"),
    ("lineage", "data", "Data"),
    ("memory", "memory", "Memory"),
    ("details", "how", "How it was made"),
)
_VERSIONS = {  # key of environment.json: as the page writes it
    "mlx_distill": "mlx_distill {}",
    "commit": "commit {}",
    "mlx": "MLX {}",
    "mlx_lm": "mlx-lm {}",
    "python": "Python {}",
    "device": "on {}",
    "memory_gib": "{} GiB of memory",
    "platform": "{}",
    "started": "started {}",
}


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
        spread = any(f"{x.name}_spread" in metrics for x in columns for metrics in everything.values())
        note = "± is half the distance between the quartiles of the repeats." if spread else ""
        if columns:
            made.append(
                {"title": title, "columns": columns, "groups": filled, "reasons": reasons, "note": note}
            )
    return made


def speed_table(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Speed at several lengths of the prompt, where more than one was measured."""
    groups: dict[float, list[Line]] = {}
    for name, color, metrics in lines:
        found = metrics.get("speed")
        for one in found if isinstance(found, list) else []:
            length = m.number(one.get("prompt_tokens")) if isinstance(one, dict) else None
            if length is not None:
                groups.setdefault(length, []).append((name, color, one))
    if len(groups) < 2:
        return []
    headed = [(f"a prompt of {length:,.0f} tokens", groups[length]) for length in sorted(groups)]
    return tables(headed, [("Speed by the length of the prompt", m.COST)])


def _cell(metric: m.Metric, metrics: Mapping[str, Any], reasons: list[str]) -> dict[str, Any]:
    """One number as written, its exact value, and the number of the footnote where there is none."""
    cell: dict[str, Any] = {"text": None, "exact": "", "why": "not asked for", "note": None, "spread": None}
    if metric.name not in metrics:
        return cell
    value, raw = metric.measured(metrics), metrics[metric.name]
    if value is not None:
        stderr = metric.stderr(metrics)
        around = stderr or metric.spread(metrics)
        spread = metric.write(around) if around else None
        filled = {"text": metric.write(value), "exact": repr(value), "spread": spread}
        return cell | filled | {"stderr": bool(stderr)}
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
        if run.recipe:
            found.append({"title": f"Recipe{of}", "text": run.recipe, "pairs": {}})
        if run.environment:
            environment = {key: _plain(value) for key, value in run.environment.items()}
            found.append({"title": f"Command and environment{of}", "text": "", "pairs": environment})
    return found


def commands(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The exact command of each run, and the versions it ran with, in one line."""
    return [
        {
            "name": run.name if len(runs) > 1 else None,
            "line": str(run.environment.get("command") or "").replace(
                "__main__.py", "python -m mlx_distill", 1
            ),
            "versions": " · ".join(
                written.format(_plain(run.environment[key]))
                for key, written in _VERSIONS.items()
                if run.environment.get(key) is not None
            ),
        }
        for run in runs
        if run.environment
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def sandbox_of(models: m.Models) -> tuple[str | None, list[str]]:
    """How the programs that models wrote were held, and a warning where that is little."""
    from mlx_distill.evaluate.sandbox.backends import PROTECTING

    held = dict.fromkeys(
        str(value)
        for found in models.values()
        for key, value in found.items()
        if (key == "sandbox" or key.endswith("_sandbox")) and value
    )
    weak = [kind for kind in held if kind not in PROTECTING]
    warning = (
        f"The programs that the models wrote ran where nothing held them (sandbox: {', '.join(weak)}): they "
        "could read and change files as you can, their own scores among them. Trust these numbers as far as "
        "you trust the models."
    )
    return ", ".join(held) or None, [warning] if weak else []


def write_page(page: dict[str, Any], path: Path) -> Path:
    """Render and put in place in one move, so that a reader never meets half a page.

    Args:
        page: `title`, `kind`, and of `_EMPTY` what it has.
    """
    if what := odd(path):  # which writing would replace
        raise RunFolderError(f"{path}: {what}, and no file; choose another place")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "pages")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = {**_EMPTY, **page}
    cells = [cell for t in page["tables"] for _, rows in t["groups"] for *_, row in rows for cell in row]
    page["has_stderr"] = any(cell.get("stderr") for cell in cells)
    page["parts"] = [(id, name) for key, id, name in _PARTS if page[key]]
    # A model may write half of a surrogate pair, which no file can hold.
    html = environment.get_template("report.html.j2").render(page)
    html = html.encode("utf-8", errors="replace").decode("utf-8")
    try:
        write_text(path, html)
    except OSError as error:
        unwritable = RunFolderError(f"{path}: cannot be written ({error.strerror}); choose another place")
        raise stopped_by(error) or unwritable from None
    return path
