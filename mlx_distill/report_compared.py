"""Two models side by side: differences with their intervals, and what a student saves."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_distill import metrics as m
from mlx_distill.run_record import RunRecord

Key = tuple[Any, ...]  # of a row: its text, and which of several with one text

_SCORED = {"code": "pass@1", "exact": "exact_match", "summary": "rougeL", "choice": "accuracy"}  # by task
_KINDS = {"better": ("better", "▲"), "worse": ("worse", "▼")}
_FIRST = ("pass@1", "exact_match", "rougeL", "accuracy", "top1_agreement", "kl", "nll")  # what comes first
_SAVED = (  # metric, what a smaller and a larger ratio is called
    ("size_mib", "size on disk", "smaller", "larger"),
    ("decode_tokens_per_second", "writing", "slower", "faster"),
    ("time_to_first_token_ms", "first token", "sooner", "later"),
    ("peak_memory_gib", "memory", "less", "more"),
    ("joules_per_token", "energy", "less", "more"),
)


def comparisons(found: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any] | None:
    """The differences as rows, by metric: the interval is drawn with better on the right.

    Args:
        found: as in `evaluation.json`; what is no comparison is left out.
        names: of models, as people read them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        if m.number(one.get("difference")) is not None and isinstance(one.get("metric"), str):
            groups.setdefault(one["metric"], []).append(one)
    if not groups:
        return None
    places = {name: place for place, name in enumerate(_FIRST)}
    made = [
        _group(metric, groups[metric], names)
        for metric in sorted(groups, key=lambda name: places.get(name, 0 if "pass@1" in name else 99))
    ]
    levels = [m.number(one.get("level")) for rows in groups.values() for one in rows]
    level = next((f"{100 * level:.0f} %" for level in levels if level), "confidence")
    return {
        "title": "Differences, and how sure they are",
        "groups": made,
        "folded": ", ".join(group["name"] for group in made[1:]),
        "note": (
            f"Bars: {level} intervals, paired by problem; the mark is the difference itself, better on the "
            "right, on a square root scale. A bar that crosses 0 says that the test rows cannot tell the two "
            "apart. It does not cover the spread between seeds."
        ),
    }


def _group(name: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    metric = m.METRICS.get(name) or m.Metric(name, "")
    ends = [m.number(one.get(key)) for one in rows for key in ("difference", "low", "high")]
    most = max(abs(end) for end in ends if end is not None) or 1.0
    sign = -1 if metric.better == "lower" else 1

    def at(value: float) -> float:
        """Per cent from the left; the square root lets a small difference be seen beside a large one."""
        return 50 + 50 * sign * float(np.sign(value)) * (abs(value) / most) ** 0.5

    made = []
    for one in rows:
        low, high, difference = (m.number(one.get(key)) for key in ("low", "high", "difference"))
        assert difference is not None
        kind, symbol = _KINDS.get(str(one.get("verdict")), ("none", "○"))
        made.append(
            {
                "model": names.get(str(one.get("model")), str(one.get("model"))),
                "other": names.get(str(one.get("other")), str(one.get("other"))),
                "at": f"{at(difference):.2f}",
                "difference": f"{_signed(metric, difference)} {_unit(metric)}".rstrip(),
                "exact": repr(difference),
                "kind": kind,
                "sign": symbol,
                "verdict": str(one.get("verdict")),
                **_span(metric, low, high, at),
            }
        )
    counts = {m.number(one.get("problems")) for one in rows}
    number = f", {counts.pop():,.0f} rows" if len(counts) == 1 and None not in counts else ""
    better = f" ({metric.better} is better)" if metric.better else ""
    return {"name": name, "title": f"{metric.name.replace('_', ' ')}{better}{number}", "rows": made}


def _span(
    metric: m.Metric, low: float | None, high: float | None, at: Callable[[float], float]
) -> dict[str, str]:
    """Where the bar stands, and the interval in words."""
    if low is None or high is None:
        return {"left": "0", "width": "0", "interval": "too few rows for an interval"}
    left, right = sorted((at(low), at(high)))
    words = f"{_signed(metric, low)} to {_signed(metric, high)}"
    return {"left": f"{left:.2f}", "width": f"{right - left:.2f}", "interval": words}


def _unit(metric: m.Metric) -> str:
    return "points" if metric.unit == "%" else metric.unit


def _signed(metric: m.Metric, value: float) -> str:
    """ "+63.8", "−0.12", and 0 without a sign."""
    text = metric.write(abs(value))
    if text == metric.write(0.0):
        return text
    return f"{'−' if value < 0 else '+'}{text}"


def facts(models: m.Models) -> list[dict[str, Any]]:
    """What the student saves beside its teacher, as ratios; what was not measured in both is left out."""
    teacher, student = models.get("teacher"), models.get("student")
    if not teacher or not student:
        return []
    found = []
    for name, title, fewer, more in _SAVED:
        metric = m.METRICS[name]
        mine, theirs = metric.measured(student), metric.measured(teacher)
        if not mine or not theirs or mine < 0 or theirs < 0:
            continue
        others = []
        for other in [one for one in m.ordered(models) if one.startswith("student-")][:3]:
            value = metric.measured(models[other])
            if value and value > 0:
                others.append(f"{other}: {_times(value / theirs, fewer, more)}")
        unit = f" {metric.unit}" if metric.unit else ""
        found.append(
            {
                "name": title,
                "big": _times(mine / theirs, fewer, more),
                "detail": f"{metric.write(mine)} against {metric.write(theirs)}{unit}",
                "others": others,
            }
        )
    return found


def _times(ratio: float, fewer: str, more: str) -> str:
    """0.2 as "5.0 × smaller"."""
    larger = ratio if ratio >= 1 else 1 / ratio
    text = f"{larger:.1f}" if larger < 9.95 else f"{larger:,.0f}"
    return "the same" if text == "1.0" else f"{text} × {more if ratio > 1 else fewer}"


def between_runs(runs: Sequence[RunRecord]) -> tuple[list[dict[str, Any]], list[str]]:
    """The students of the runs against the first run's, on the rows that both answered.

    Returns:
        comparisons as in `evaluation.json`, whose models are the runs' names; and why one is missing or is of
        some rows alone.
    """
    from mlx_distill.evaluate.statistics import comparisons as compare

    first, found, notes = _scores(runs[0]), list[dict[str, Any]](), list[str]()
    for run in runs[1:]:
        theirs = _scores(run)
        for metric in dict.fromkeys([*first, *theirs]):
            one, other = theirs.get(metric, {}), first.get(metric, {})
            both, most = [key for key in one if key in other], max(len(one), len(other))
            if len(both) < most:
                shared = f"share {len(both):,} of {most:,} rows" if both else "share no row"
                notes.append(
                    f"{run.name} and {runs[0].name} {shared} scored by {metric}; only those are compared."
                )
            if both:
                sums = (np.array([scores[key] for key in both], np.float64) for scores in (one, other))
                pair = {
                    name: {metric: array} for name, array in zip(("student", "teacher"), sums, strict=True)
                }
                names = {"model": run.name, "other": runs[0].name}
                found += [{**row, **names} for row in compare(pair, seed=0)]
    return found, notes


def _scores(run: RunRecord) -> dict[str, dict[Key, tuple[float, int]]]:
    """Of the student: metric -> row -> the mean of its scores, and 1, as `paired` has it."""
    found: dict[str, dict[Key, tuple[float, int]]] = {}
    for key, row in _rows(run).items():
        metric = _SCORED.get(row.get("task", ""))
        answer = row["answers"]["student"]
        raw = answer.get("scores")
        scores = [m.number(x) for x in (raw if isinstance(raw, list) and raw else [answer.get("score")])]
        numbers = [x for x in scores if x is not None]
        if metric is not None and len(numbers) == len(scores):
            name = f"{row['set']}_{metric}" if row.get("set") else metric
            found.setdefault(name, {})[key] = (sum(numbers) / len(numbers), 1)
    return found


def _rows(run: RunRecord) -> dict[Key, dict[str, Any]]:
    """Rows that the student answered, by their text; one text may be asked twice."""
    found: dict[Key, dict[str, Any]] = {}
    seen = Counter[tuple[str, ...]]()
    for row in run.answers:
        given = row.get("answers")
        if isinstance(given, dict) and isinstance(given.get("student"), dict):
            text = tuple(str(row.get(key)) for key in ("set", "task", "prompt", "reference"))
            seen[text] += 1
            found[*text, seen[text]] = row
    return found


def side_by_side(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What the students of the runs made of the same rows, as lines of samples/evaluation.jsonl."""
    answered = [_rows(run) for run in runs]
    made = []
    for key, row in answered[0].items():
        given = {
            run.name: rows[key]["answers"]["student"]
            for run, rows in zip(runs, answered, strict=True)
            if key in rows
        }
        if len(given) > 1:
            made.append({**row, "answers": given})
    return made
