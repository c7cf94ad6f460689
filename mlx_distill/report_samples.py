"""The rows that a report shows: what each model made of the same prompt."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlx_distill import metrics as m

_SAMPLES = 6
_LONGEST = 2000  # characters of one text in the page


def samples(answers: list[dict[str, Any]], models: m.Models) -> list[dict[str, Any]]:
    """A few rows, one of each outcome in turn, those on which the models differ first.

    Args:
        models: of the run, whose names and order the answers take.

    An outcome is a task, who was right and who wrong; each sample says how many rows had the same, so that
    a rare success cannot pass for the rule.
    """
    outcomes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in answers:
        given = row.get("answers")
        if isinstance(given, dict) and given and all(isinstance(x, dict) for x in given.values()):
            rights = tuple((name, _right(x)) for name, x in sorted(given.items()))
            outcomes.setdefault((row.get("task"), rights), []).append(row)
    alike = {outcome: len({right for _, right in outcome[1]}) < 2 for outcome in outcomes}
    ranked = sorted(outcomes, key=lambda outcome: (alike[outcome], -len(outcomes[outcome])))
    picked: list[tuple[dict[str, Any], int]] = []
    for turn in range(max((len(rows) for rows in outcomes.values()), default=0)):
        found = [outcomes[outcome] for outcome in ranked]
        picked += [(rows[turn], len(rows)) for rows in found if turn < len(rows)]
        if len(picked) >= _SAMPLES:
            break
    tasks = Counter(row.get("task") for row in answers)
    return [_sample(row, same, tasks[row.get("task")], models) for row, same in picked[:_SAMPLES]]


def _sample(row: dict[str, Any], same: int, rows: int, models: m.Models) -> dict[str, Any]:
    given = row["answers"]
    places = {name: place for place, name in enumerate(m.ordered(models))}
    shown = [
        {
            "label": m.label(name, models),
            "color": m.color(name),
            "text": _clip(given[name].get("text")),
            "right": _right(given[name]),
            "score": m.number(given[name].get("score")),
            "why": given[name].get("why"),
        }
        for name in sorted(m.ordered(given), key=lambda name: places.get(name, len(places)))
    ]
    return {
        "prompt": _clip(row.get("prompt")),
        "reference": _clip(row.get("reference")),
        "summary": row.get("task") == "summary",
        "answers": shown,
        "same": same,
        "rows": rows,
    }


def _right(answer: Mapping[str, Any]) -> bool:
    """Programs score 0 or 1; summaries are told apart at a ROUGE-L of one half."""
    return (m.number(answer.get("score")) or 0.0) >= 0.5


def _clip(text: Any) -> str:
    text = "" if text is None else str(text).strip("\n")
    more = len(text) - _LONGEST
    return f"{text[:_LONGEST]}\n[{more:,} more characters]" if more > 0 else text
