"""Where teacher and student disagree most: answers whose tokens are tinted by KL."""

import bisect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_distill import metrics as m
from mlx_distill.report_samples import folded

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0)  # nats; the page has a tint for each, `k1` to `k5` of style.css
_LARGEST = 3  # tokens that are also said in words
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def disagreements(rows: Sequence[Mapping[str, Any]], models: m.Models) -> dict[str, Any] | None:
    """The rows of samples/disagreements.jsonl by model, the largest mean KL first; None without any.

    A row that is not as `evaluate/disagreement.py` writes it is left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tokens = row.get("tokens")
        if m.number(row.get("kl")) is not None and isinstance(tokens, list) and all(map(_is_token, tokens)):
            groups.setdefault(str(row.get("model")), []).append(row)
    if not groups:
        return None
    names = [name for name in m.ordered(models) if name in groups]
    names += [name for name in groups if name not in names]
    names.sort(key=lambda name: name != "student")
    made = [
        {
            "title": m.label(name, models),
            "rows": [
                _answer(row, "the student" if name == "student" else m.label(name, models), m.color(name))
                for row in sorted(groups[name], key=lambda row: -row["kl"])
            ],
        }
        for name in names
    ]
    bounds = [f"{bound:g}" for bound in LEVELS]
    ends = [f"under {bounds[0]}", *(f"{a}–{b}" for a, b in pairwise(bounds))]
    return {"groups": made, "legend": list(enumerate([*ends, f"{bounds[-1]} and more"]))}


def _is_token(token: Any) -> bool:
    return (
        isinstance(token, list)
        and len(token) == 4
        and isinstance(token[0], str)
        and (token[1] is None or m.number(token[1]) is not None)
    )


def _answer(row: Mapping[str, Any], label: str, color: int) -> dict[str, Any]:
    tokens = row["tokens"]
    ranked = sorted((token for token in tokens if token[1] is not None), key=lambda token: -token[1])
    return {
        "label": label,
        "color": color,
        "kl": m.METRICS["kl"].write(row["kl"]),
        "prompt": folded(row.get("prompt")),
        "runs": _runs(tokens, label),
        "largest": [
            {
                "kl": f"{kl:.2f} nats",
                "text": visible(text),
                "mine": visible(mine),
                "teacher": visible(teacher),
                "same": mine == teacher,
            }
            for text, kl, mine, teacher in ranked[:_LARGEST]
            if kl >= LEVELS[0]
        ],
    }


def _runs(tokens: Sequence[Sequence[Any]], label: str) -> list[dict[str, Any]]:
    """The answer in pieces: tokens that are tinted or underlined, and the text between them as one."""
    runs: list[dict[str, Any]] = []
    for text, kl, mine, teacher in tokens:
        level = 0 if kl is None else bisect.bisect_right(LEVELS, kl)
        other = mine != teacher
        if not level and not other:
            if not runs or runs[-1]["level"] is not None:
                runs.append({"level": None, "text": ""})
            runs[-1]["text"] += text
            continue
        shown = "" if kl is None else f"KL {kl:.2f} nats · "
        tip = f"{shown}teacher {visible(teacher)} · {label} {visible(mine)} · right {visible(text)}"
        runs.append({"level": level, "other": other, "tip": tip, "pieces": _pieces(text)})
    return runs


def _pieces(text: str) -> list[tuple[str, str]]:
    """(text, sign behind it): a sign in front of white space that has no width, and for no text at all."""
    if not text:
        return [("", "∎")]
    pieces, plain = list[tuple[str, str]](), ""
    for character in text:
        if character in _SIGNS:
            pieces.append((plain, _SIGNS[character]))
            plain = ""
        plain += character
    return [*pieces, (plain, "")]


def visible(text: Any) -> str:
    """A token as it can be told from others in a sentence: white space as signs, nothing as a word."""
    text = "" if text is None else str(text)
    for character, sign in _SIGNS.items():
        text = text.replace(character, sign)
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if not text:
        return "(the end)"
    if left == len(text):
        return "␣" * left
    return "␣" * left + text.strip(" ") + "␣" * right
