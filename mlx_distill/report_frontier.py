"""`frontier.json` and `frontier.html`: quality against what it costs, of all models that `compress` made."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.errors import MissingExtra
from mlx_distill.files import write_json
from mlx_distill.frontier import COSTS, LATENCY, METRICS, SIZE, Frontier, Point, sentence
from mlx_distill.report_page import NO_MATPLOTLIB, RUNS, commands, details, tables, write_page
from mlx_distill.run_record import RunRecord

_TIMES = (
    "Each run timed its own models, one run after the other; the teacher's numbers are the first run's. "
    "Which model is the smallest above the line was read off the test rows themselves, so its score there "
    "flatters it a little: measure it once more on other rows."
)
_SMALL = 1 / 4  # GiB; where all models are smaller, the page says MiB
_MIB = m.METRICS["size_mib"]


def write_frontier(folder: Path, found: Frontier, runs: Sequence[RunRecord], name: str) -> Path:
    """Write both files into a folder that exists, and give the page.

    Args:
        runs: that were compared, for their recipes and environments at the foot of the page.

    Raises:
        RunFolderError: the page cannot be written.
    """
    write_json(folder / "frontier.json", as_tree(found, runs, name))
    figures, missing = _figures(found)
    page = {
        "title": name,
        "kind": f"{len(found.points)} models of {len(runs)} {'run' if len(runs) == 1 else 'runs'}",
        "verdict": [sentence(found)],
        "tables": _tables(found),
        "figures": figures,
        "figures_title": "What quality costs",
        "figures_first": True,
        "highlighted": None if found.pick is None else found.points[found.pick].name,
        "notes": [_TIMES, *missing, *(line for run in runs for line in run.unreadable)],
        "commands": commands(runs),
        "details": details(list(runs)),
    }
    return write_page(page, folder / "frontier.html")


def as_tree(found: Frontier, runs: Sequence[RunRecord], name: str) -> dict[str, Any]:
    """What `frontier.json` holds."""
    points = [
        {
            "run": point.run,
            "model": point.model,
            "ratio": point.ratio,
            **point.metrics,
            "front": {cost: found.front[cost][i] for cost in COSTS},
        }
        for i, point in enumerate(found.points)
    ]
    named = {"pick": found.pick, "closest": found.closest}
    return {
        "schema": 1,
        "name": name,
        "runs": [run.name for run in runs],
        "score": found.score,
        "line": {"share": found.share, "score": found.line},
        "points": points,
        **{
            key: None if i is None else {"run": found.points[i].run, "model": found.points[i].model}
            for key, i in named.items()
        },
        "sentence": sentence(found),
    }


def console_lines(found: Frontier) -> list[str]:
    """The table and its sentence, for a terminal."""
    columns = _columns(found)
    head = ["", *(f"{x.heading}{f', {x.unit}' if x.unit else ''}" for x in columns), "front"]
    rows = [head]
    for i, point in enumerate(found.points):
        shown = _shown(found, point)
        cells = ["-" if x.measured(shown) is None else x.write(shown[x.name]) for x in columns]
        rows.append([("> " if i == found.pick else "  ") + point.name, *cells, _fronts(found, i)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return [*lines, "", sentence(found)]


def _columns(found: Frontier) -> list[m.Metric]:
    """Of the table: those that any model has, and the three costs."""
    size = _MIB if _in_mib(found) else SIZE
    named = [m.METRICS["parameters"], size, METRICS[found.score]]
    named += [x for x in m.QUALITY if x.name != found.score]
    named += [x for x in m.COST if x.name in ("bits_per_weight", "sparsity", "decode_tokens_per_second")]
    named += [LATENCY, METRICS["joules_per_token"]]
    always = (size.name, found.score, *COSTS.values())
    there = {name for point in found.points for name in point.metrics}
    return [x for x in named if x.name in there or x.name in always]


def _shown(found: Frontier, point: Point) -> dict[str, Any]:
    """The numbers of a point with its size in the unit of the page."""
    gib = m.number(point.metrics["size_gib"])
    mib = {"size_mib": 1024 * gib} if gib is not None and _in_mib(found) else {}
    return {**point.metrics, **mib}


def _in_mib(found: Frontier) -> bool:
    sizes = [m.number(point.metrics["size_gib"]) for point in found.points]
    return all(size is None or size < _SMALL for size in sizes)


def _fronts(found: Frontier, i: int) -> str:
    return ", ".join(cost for cost in COSTS if found.front[cost][i])


def _tables(found: Frontier) -> list[dict[str, Any]]:
    colors = _colors(found)
    rows = [(point.name, colors[point.name], _shown(found, point)) for point in found.points]
    made = tables([(None, rows)], [("All models", _columns(found))])
    for table in made:
        table["columns"].append(m.Metric("front", "no other model is better and costs no more"))
        for i, (_, _, cells) in enumerate(table["groups"][0][1]):
            cells.append({"text": _fronts(found, i), "exact": "", "why": "", "note": None, "spread": None})
    return made


def _colors(found: Frontier) -> dict[str, int]:
    """A colour a run, and the teacher's own."""
    runs = list(dict.fromkeys(point.run for point in found.points if point.model != "teacher"))
    return {
        point.name: 0 if point.model == "teacher" else RUNS[runs.index(point.run) % 6]
        for point in found.points
    }


def _figures(found: Frontier) -> tuple[list[dict[str, Any]], list[str]]:
    """A chart a cost; where it was not measured, why."""
    from mlx_distill import figures

    made = []
    empty: dict[str, Any] = {"svg": "", "said": "", "lines": [], "bars": []}
    axes = {"size": "MiB on disk" if _in_mib(found) else "GiB on disk", "latency": "milliseconds a token"}
    for cost in COSTS:
        title = f"{found.score} against {cost}"
        points, front, reasons = _points(found, cost)
        if len(points) < 2:
            why = f"Not drawn: {'; '.join(reasons) or 'fewer than two models have both'}."
            made.append({**empty, "title": title, "note": why})
            continue
        score = METRICS[found.score]
        factor = 100 if score.unit == "%" else 1
        try:
            svg = figures.sizes(
                cost,
                points,
                f"{found.score} {score.unit}".strip(),
                axes.get(cost, "joules a token"),
                front=front,
                line=None if found.line is None else factor * found.line,
            )
        except MissingExtra:
            return [], [NO_MATPLOTLIB]
        said = "; ".join(f"{p.label} {m.three_digits(p.quality)} at {m.three_digits(p.size)}" for p in points)
        drawn = {"svg": svg, "said": f"{title}: {said}.", "lines": _legend(found)}
        made.append({**empty, **drawn, "title": title, "note": "; ".join(reasons)})
    return made, []


def _points(found: Frontier, cost: str) -> tuple[list[Any], list[Any], list[str]]:
    """The points of a chart, those of them on the front, the cheapest first, and why others are missing."""
    from mlx_distill.figures import Point as Dot

    score, colors = METRICS[found.score], _colors(found)
    factor = 100 if score.unit == "%" else 1
    dots, front, reasons = list[Dot](), list[Dot](), dict[str, None]()
    for i, point in enumerate(found.points):
        shown = _shown(found, point)
        field = "size_mib" if cost == "size" and _in_mib(found) else COSTS[cost]
        at, value = m.number(shown.get(field)), score.measured(shown)
        if at is None or at <= 0 or value is None:
            missing = found.score if value is None else COSTS[cost]
            reasons[f"{point.name}: {shown.get(f'{missing}_why') or 'not measured'}"] = None
            continue
        singled = i == found.pick or point.model == "teacher"
        dot = Dot(
            _short(found, point),
            colors[point.name],
            at,
            factor * value,
            factor * (score.stderr(shown) or 0.0),
            i == found.pick,
            "always" if singled else "if there is room" if found.front[cost][i] else "never",
        )
        dots.append(dot)
        if found.front[cost][i]:
            front.append(dot)
    if not dots:  # which model it is that was not measured says nothing then
        reasons = dict.fromkeys(reason.partition(": ")[2] for reason in reasons)
    return dots, sorted(front, key=lambda dot: dot.size), list(reasons)


def _short(found: Frontier, point: Point) -> str:
    """A name for a chart: what sets the run apart, and the width, such as "r0.50 4bit"."""
    if point.model == "teacher":
        return "teacher"
    runs = {one.run: one.run.split("-") for one in found.points if one.model != "teacher"}
    places = zip(*runs.values(), strict=False)
    shared = len(list(takewhile(lambda words: len(set(words)) == 1, places)))
    return " ".join([*runs[point.run][shared:], point.model.removeprefix("student-")])


def _legend(found: Frontier) -> list[Any]:
    """What the colours stand for, where there are several runs, and the line."""
    from mlx_distill.figures import Curve

    runs = {point.run: _colors(found)[point.name] for point in found.points if point.model != "teacher"}
    colors = [Curve(run, color, (), ()) for run, color in runs.items()] if len(runs) > 1 else []
    share = f"{m.percent(found.share).removesuffix('.0')} % of the teacher's {found.score}"
    line = [Curve(share, 0, (), (), dashed=True)] if found.line is not None else []
    return [*colors, *line]
