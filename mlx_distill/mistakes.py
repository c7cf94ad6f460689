"""What is wrong in a recipe, said in a recipe's words: pydantic's findings, one line a mistake."""

import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line a mistake: the path, what was expected, what was seen, the nearest known key.

    Args:
        root: the model that was checked, for the keys that it knows.
    """
    lines = []
    for mistake in error.errors():
        keys = [str(key) for key in mistake["loc"]]
        path = ".".join(keys)
        match mistake["type"]:
            case "extra_forbidden":
                section = _section(root, keys[:-1])
                known = section.model_fields if section else ()
                lines.append(f"unknown key `{path}`{nearest(keys[-1], known, keys[:-1])}")
            case "missing":
                lines.append(f"missing key `{path}`")
            case "value_error":  # raised by a check of our own, which may have found several
                for line in mistake["msg"].removeprefix("Value error, ").splitlines():
                    lines.append(line if not path or f"`{path}." in line else f"`{path}`: {line}")
            case _:
                lines.append(f"`{path}`: {wanted(mistake)}; got {shown(mistake.get('input'))}")
    return lines


def wanted(mistake: Any) -> str:
    """What should have stood in the place of one of pydantic's mistakes."""
    match mistake["type"]:
        case "literal_error":
            return f"one of {mistake['ctx']['expected'].replace(chr(39), '').replace(' or ', ', ')}"
        case "model_type" | "dict_type":
            return "a mapping"
        case "string_pattern_mismatch" if mistake["ctx"]["pattern"] == "^[a-z]{2}$":
            return "two letters, as in ISO 639-1, such as en"
        case "string_pattern_mismatch":  # of `name`, the other option that has a pattern
            return "letters, digits and . _ -, the first a letter or digit"
        case "int_type":
            return "a whole number"
        case "bool_type":
            return "true or false"
        case _:
            said = mistake["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            return said.replace("a valid ", "a ")


def shown(value: Any) -> str:
    """A value as YAML has it, cut to what fits in a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(key: str, known: Iterable[str], parents: Sequence[str] = ()) -> str:
    """The known key that was probably meant, or all known keys, as the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean `{'.'.join([*parents, near[0]])}`?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _section(root: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The model that a path of keys leads to."""
    section = root
    for key in keys:
        if key.isdigit():  # a place in a list, whose section was found already
            continue
        field = section.model_fields.get(key)
        annotation = field.annotation if field else None
        candidates = [c for c in (annotation, *get_args(annotation)) if inspect.isclass(c)]
        found = [c for c in candidates if issubclass(c, BaseModel)]
        if not found:
            return None
        section = found[0]
    return section
