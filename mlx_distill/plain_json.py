"""JSON that others wrote, or that a killed process left: an object, or a ValueError and nothing else."""

import json
import math
from typing import Any


def parse_object(text: bytes | str, *, doubles: bool = True, finite: bool = False) -> dict[str, Any]:
    """The object that a JSON document holds.

    Args:
        doubles: whether a key may stand twice, of which the last counts.
        finite: refuse numbers that no float holds, as files that are written again must.

    Raises:
        ValueError: no UTF-8, no JSON, nested too deeply, half a surrogate pair, no object, a doubled key, or
            such a number; in one line.
    """
    hook = None if doubles else _without_doubles
    numbers = {"parse_constant": _finite, "parse_float": _finite, "parse_int": _whole} if finite else {}
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=hook, **numbers)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:
        check_encodable(value)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected; got {str(value)[:40]!r}")
    return value


def check_encodable(value: Any) -> None:
    """Refuse what JSON can say with `\\u` and no file can hold.

    Raises:
        ValueError: half a surrogate pair.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff alone) is no character") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{doubled!r} stands twice")
    return value
