"""Values that go from the referee to the program and back, with everything in them that can change in place.

Lists, dicts and sets are numbered, and both sides keep the numbers for one call. What the function did to
its arguments, and that it returned one of them, therefore holds for the referee's own objects afterwards.
Messages are flat tables, so that neither depth nor a circle is a difficulty.
"""

import builtins
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

from .plain import is_one_of, named

_SEQUENCES: dict[str, type] = {"list": list, "deque": deque, "set": set, "bytearray": bytearray}
_DICTS: dict[str, type] = {
    "dict": dict,
    "Counter": Counter,
    "OrderedDict": OrderedDict,
    "defaultdict": defaultdict,
}
_NAMES = {kind: name for name, kind in (_SEQUENCES | _DICTS).items()}
_FACTORIES = {"int": int, "float": float, "str": str, "list": list, "set": set, "dict": dict, "bool": bool}


class Shared:
    """The objects of one call, by number. Each side has one; packing and unpacking keep the two alike."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # id -> place in `objects`, which keeps it alive

    def add(self, thing: Any) -> int:
        number = self.numbers.setdefault(id(thing), len(self.objects))
        if number == len(self.objects):
            self.objects.append(thing)
        return number

    def pack(self, value: Any) -> dict[str, Any]:
        """`value`, and all objects of this call as they are now.

        Raises:
            TypeError: it is no plain value, or something in it is not.
            RecursionError: tuples nested too deep.
        """
        packed = self._inline(value)
        table = []
        for thing in self.objects:  # grows while it is read
            table.append([_NAMES[type(thing)], self._content(thing)])
        return {"value": packed, "objects": table}

    def unpack(self, message: dict[str, Any]) -> Any:
        """The value; objects known before are brought to the state that the message gives them.

        The program may have sent anything: any exception may come.
        """
        table = message["objects"]
        for number, (kind, content) in enumerate(table):
            if number == len(self.objects):
                self.add(_made(kind, content))
            elif _NAMES[type(self.objects[number])] != kind:
                raise ValueError(f"object {number} became a {kind}")
        contents = [self._parts(kind, content) for kind, content in table]
        value = self._outline(message["value"])
        for thing, parts in zip(self.objects, contents, strict=True):
            thing.clear()
            _fill(thing, parts)
        return value

    def _content(self, thing: Any) -> Any:
        if isinstance(thing, dict):
            pairs = [[self._inline(key), self._inline(part)] for key, part in thing.items()]
            if not isinstance(thing, defaultdict):
                return pairs
            factory = thing.default_factory
            name = next((name for name, known in _FACTORIES.items() if factory is known), None)
            return {"pairs": pairs, "factory": name}
        if isinstance(thing, deque) and thing.maxlen is not None:
            raise TypeError("returned a deque with `maxlen`, which is no plain value")
        return [self._inline(part) for part in thing]

    def _parts(self, kind: str, content: Any) -> Any:
        pairs = content["pairs"] if kind == "defaultdict" else content
        if kind in _DICTS:
            return [(self._outline(key), self._outline(part)) for key, part in pairs]
        return [self._outline(part) for part in content]

    def _inline(self, value: Any) -> Any:
        kind = type(value)
        if value is None or is_one_of(kind, (bool, int, float, str)):
            return value
        if is_one_of(kind, tuple(_NAMES)):
            return {"object": self.add(value)}
        if kind is tuple:
            return {"tuple": [self._inline(part) for part in value]}
        if kind is frozenset:
            return {"frozenset": [self._inline(part) for part in value]}
        if kind is bytes:
            return {"bytes": value.decode("latin-1")}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind is type and vars(builtins).get(value.__name__) is value:
            return {"type": value.__name__}
        raise TypeError(f"returned {named(kind)}, which is no plain value")

    def _outline(self, content: Any) -> Any:
        if not isinstance(content, dict):
            if content is None or isinstance(content, bool | int | float | str):
                return content
            raise ValueError("a bare list")
        ((tag, inner),) = content.items()
        match tag:
            case "object":
                return self.objects[inner]
            case "tuple":
                return tuple([self._outline(part) for part in inner])
            case "frozenset":
                return frozenset([self._outline(part) for part in inner])
            case "bytes":
                return inner.encode("latin-1")
            case "complex":
                return complex(*inner)
            case "range":
                return range(*inner)
            case "type" if type(vars(builtins)[inner]) is type:
                return vars(builtins)[inner]
        raise ValueError(f"no tag: {tag}")


def _made(kind: str, content: Any) -> Any:
    if kind == "defaultdict":
        return defaultdict(_FACTORIES[content["factory"]] if content["factory"] else None)
    return (_SEQUENCES | _DICTS)[kind]()


def _fill(thing: Any, parts: list[Any]) -> None:
    if isinstance(thing, dict):
        for key, part in parts:
            thing[key] = part
    elif isinstance(thing, set):
        thing.update(frozenset(parts))  # as `{1, 2, 3}` does: functions show the order that this makes
    else:
        thing.extend(parts)
