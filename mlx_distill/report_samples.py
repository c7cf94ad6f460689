"""The rows that a report shows: what each model made of the same prompt, and who solved how many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill import metrics as m

_SAMPLES = 6  # of a task
_FEWER = 3  # of each, where there are several
_OUTCOMES = 6
_LONGEST = 4000  # characters of one text in the page
_LINES, _WIDTH = 12, 64  # of a text, before the rest is folded away
_TITLES = {
    "code": "Programs",
    "summary": "Summaries",
    "exact": "Answers",
    "choice": "Multiple choice",
    "humaneval": "HumanEval",
    "mbpp": "MBPP",
}

Outcome = tuple[tuple[str, bool], ...]  # who was right: (model, right)
Shown = Mapping[str, tuple[str, int]]  # model: its name as people read it, and its colour; in order


def shown(models: m.Models) -> Shown:
    """The models of a run, the controls last: they say the least."""
    last = ("baseline", "student_before")
    names = sorted(m.ordered(models), key=lambda name: last.index(name) if name in last else -1)
    return {name: (m.label(name, models), m.color(name)) for name in names}


def samples(answers: Sequence[Mapping[str, Any]], models: Shown) -> list[dict[str, Any]]:
    """By published set and task: how often each outcome was, and a few rows, one of each outcome in turn.

    Args:
        answers: lines of samples/evaluation.jsonl; what is none is left out.
        models: names and order that the answers take.

    An outcome is who was right and who wrong; each sample says how many rows had the same, so that a rare
    success cannot pass for the rule. The rows on which the models differ come first.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in answers:
        given = row.get("answers")
        if isinstance(given, dict) and given and all(isinstance(x, dict) for x in given.values()):
            published, task = (str(x) if x else "" for x in (row.get("set"), row.get("task")))
            groups.setdefault((published, task), []).append(row)
    most = _SAMPLES if len(groups) < 2 else _FEWER
    order = sorted(groups, key=lambda group: group[0] != "")  # the user's own rows first
    return [_group(*group, groups[group], models, most) for group in order]


def _group(
    published: str, task: str, rows: Sequence[Mapping[str, Any]], models: Shown, most: int
) -> dict[str, Any]:
    by_outcome: dict[Outcome, list[Mapping[str, Any]]] = {}
    for row in rows:
        outcome = tuple((name, _right(x)) for name, x in sorted(row["answers"].items()))
        by_outcome.setdefault(outcome, []).append(row)
    alike = {outcome: len({right for _, right in outcome}) < 2 for outcome in by_outcome}
    ranked = sorted(by_outcome, key=lambda outcome: (alike[outcome], -len(by_outcome[outcome])))
    picked: list[tuple[Mapping[str, Any], int]] = []
    for turn in range(max(map(len, by_outcome.values()))):
        found = [by_outcome[outcome] for outcome in ranked]
        picked += [(of[turn], len(of)) for of in found if turn < len(of)]
        if len(picked) >= most:
            break
    name = published or task or "rows"
    judged = task != "summary"
    return {
        "title": _TITLES.get(name, name),
        **(
            _outcomes(by_outcome, len(rows), models)
            if judged
            else {"outcomes": [], "others": "", "models": []}
        ),
        "samples": [_sample(row, same, len(rows), models) for row, same in picked[:most]],
    }


def _outcomes(found: Mapping[Outcome, Sequence[Any]], rows: int, models: Shown) -> dict[str, Any]:
    """The commonest outcomes, a column a model."""
    names = _order({name for outcome in found for name, _ in outcome}, models)
    counted = Counter({outcome: len(of) for outcome, of in found.items()}).most_common()
    shown, rest = counted[:_OUTCOMES], counted[_OUTCOMES:]
    left = sum(number for _, number in rest)
    others = f"{len(rest)} more outcomes, of {left:,} rows together." if rest else ""
    return {
        "models": [dict(zip(("label", "color"), _named(name, models), strict=True)) for name in names],
        "outcomes": [
            {
                "rights": [dict(outcome).get(name) for name in names],
                "rows": number,
                "share": f"{100 * number / rows:.1f}",
            }
            for outcome, number in shown
        ],
        "others": others,
    }


def _order(names: set[str], models: Shown) -> list[str]:
    return [*(name for name in models if name in names), *sorted(names - models.keys())]


def _named(name: str, models: Shown) -> tuple[str, int]:
    return models.get(name, (m.label(name), m.color(name)))


def _sample(row: Mapping[str, Any], same: int, rows: int, models: Shown) -> dict[str, Any]:
    given = row["answers"]
    return {
        "prompt": folded(row.get("prompt")),
        "reference": folded(row.get("reference")),
        "summary": row.get("task") == "summary",
        "answers": [
            {
                "label": _named(name, models)[0],
                "color": _named(name, models)[1],
                "text": folded(given[name].get("text")),
                "right": _right(given[name]),
                "score": m.number(given[name].get("score")),
                "why": _clip(given[name].get("why"), 400),
            }
            for name in _order(set(given), models)
        ],
        "same": same,
        "rows": rows,
    }


def _right(answer: Mapping[str, Any]) -> bool:
    """Programs score 0 or 1; summaries are told apart at a ROUGE-L of one half."""
    return (m.number(answer.get("score")) or 0.0) >= 0.5


def folded(text: Any) -> dict[str, str]:
    """A text as its head, the rest that is folded away, and what stands over the fold."""
    whole = _clip(text, _LONGEST).strip("\n")
    end = used = 0
    for line in whole.split("\n"):
        room = _LINES - used
        end += min(len(line), room * _WIDTH) + 1
        used += 1 + len(line) // _WIDTH
        if used >= _LINES:
            break
    rest = whole[end:].lstrip("\n")
    if len(rest) < 3 * _WIDTH and rest.count("\n") < 3:  # no more than the fold itself would take
        return {"head": whole, "rest": "", "more": ""}
    return {"head": whole[:end].rstrip("\n"), "rest": rest, "more": f"{len(rest):,} more characters"}


def _clip(text: Any, longest: int) -> str:
    text = "" if text is None else str(text)
    more = len(text) - longest
    return f"{text[:longest]}\n[{more:,} more characters]" if more > 0 else text
