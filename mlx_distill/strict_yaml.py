"""YAML as people mean it: `1e-4` is a number, `no` is a word, and a key stands once.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is false, `012` is ten and a doubled key
silently loses its first value. The loader here follows YAML 1.2's core schema instead.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from mlx_distill.errors import RecipeError

LARGEST = 200_000  # characters of a recipe, and values in it, aliases written out


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, and without doubled keys."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _starts = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_str(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if "\0" in text:
        raise RecipeError(f"line {node.start_mark.line + 1}: a NUL character; no option takes one")
    return text


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *defaults` may bring keys that stand here too; those here win
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise RecipeError(f"line {line}: the key {key!r} is no word; put it in quotes")
        if key in seen:
            raise RecipeError(f"line {line}: the key `{key}` stands twice (first in line {seen[key]})")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


# The core schema alone: no dates, sets or binary data, which no option is made of.
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "float", "seq")))
}
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, where: str | Path) -> dict[str, Any]:
    """The mapping that `text` holds.

    Raises:
        RecipeError: malformed YAML, a doubled key or no mapping, with file and line.
    """
    tree = _parse(text, str(where))
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: a recipe is a mapping such as `name: mine`; got {str(tree)[:60]!r}")
    return tree


def parse_value(text: str, where: str) -> Any:
    """One value of a command line's `key=value`, read as YAML."""
    return _parse(text, where)


def _parse(text: str, where: str) -> Any:
    if len(text) > LARGEST:
        raise RecipeError(f"{where}: {len(text)} characters; a recipe has {LARGEST} at most")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > LARGEST:
                raise RecipeError(f"its aliases make more than {LARGEST} values of it; write it out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not readable as YAML (nested too deeply)") from None
    except (ValueError, KeyError) as error:  # `!!int x`, `!!bool x`, a number of 5,000 digits
        raise RecipeError(
            f"{where}: not readable as YAML (no value of its type: {_first_line(error)})"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise RecipeError(f"{where}: {place}not readable as YAML ({problem})") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for where every alias is written out; each node is counted once."""
    if id(node) not in known:
        known[id(node)] = 0  # within itself: the constructor refuses that
        parts = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
