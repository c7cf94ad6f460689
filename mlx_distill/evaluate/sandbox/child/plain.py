"""Plain values as JSON and back, with a tag where JSON would lose the type.

Types are compared exactly: a subclass could bring its own `==`. The dicts of `collections` are read as
the dict they are equal to.
"""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

_DICTS = (dict, defaultdict, Counter, OrderedDict)


def encode(value: Any) -> Any:
    """`value` as something that `json` writes.

    Raises:
        TypeError: it is no plain value, or something in it is not.
        RecursionError: it is nested too deep, or holds itself.
    """
    kind = type(value)
    if value is None or is_one_of(kind, (bool, int, float, str)):
        return value
    if kind is list:
        return [encode(part) for part in value]
    if kind is tuple:
        return {"tuple": [encode(part) for part in value]}
    if is_one_of(kind, (set, frozenset)):
        return {"set": [encode(part) for part in value]}
    if is_one_of(kind, _DICTS):
        return {"dict": [[encode(key), encode(part)] for key, part in dict.items(value)]}
    if kind is bytes:
        return {"bytes": value.decode("latin-1")}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    raise TypeError(f"returned {named(kind)}, which is no plain value")


def decode(content: Any) -> Any:
    """The value that `encode` made JSON of. The program may have sent anything: any exception may come."""
    if isinstance(content, list):
        return [decode(part) for part in content]
    if not isinstance(content, dict):
        return content
    ((tag, inner),) = content.items()
    match tag:
        case "tuple":
            return tuple(decode(part) for part in inner)
        case "set":
            return set(spread([decode(part) for part in inner]))
        case "dict":
            keys = spread([decode(key) for key, _ in inner])
            return dict(zip(keys, [decode(part) for _, part in inner], strict=True))
        case "bytes":
            return inner.encode("latin-1")
        case "complex":
            return complex(*inner)
        case "range":
            return range(*inner)
    raise ValueError(f"no tag: {tag}")


def spread(keys: list[Any]) -> list[Any]:
    """`keys`, if a set of them is made in a moment.

    Raises:
        ValueError: they were chosen to have one hash, for which Python needs time by the square.
    """
    if len(keys) > 1000 and len({hash(key) for key in keys}) < len(keys) // 2:
        raise ValueError("keys that share their hashes")
    return keys


def is_one_of(kind: type, kinds: tuple[type, ...]) -> bool:
    return any(kind is one for one in kinds)  # `in` would ask a metaclass of the program's own


def named(kind: type) -> str:
    """ "a Tree": the name as `type` itself has it, whatever a metaclass would say."""
    return f"a {type.__dict__['__name__'].__get__(kind)}"
