"""The embedded corpus `stdlib`: the documented functions of the Python that runs it.

Real code on every machine without network. Its rows differ from one version of Python to the next, so
scores compare within one version only. Nothing is imported: the sources are read and parsed.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError

SPLITS = ("train", "valid", "test")
TASKS = ("code", "summary", "both")
LONGEST_BODY = 25  # lines
_SKIPPED = {"antigravity", "idlelib", "lib2to3", "test", "tests", "this", "turtledemo"}
_VALID, _TEST = 5, 5  # of 100 functions


class Function(NamedTuple):
    """A documented function, its source moved to the left margin."""

    name: str  # `module.qualified_name`
    head: str  # decorators and signature
    docstring: str  # its lines, quotes and indentation included
    body: str  # the lines after the docstring
    summary: str  # first line of the docstring


def rows(task: str, split: str, count: int | None, start: int = 0, seed: int = 0) -> list[Row]:
    """Rows `start` to `start + count` of a split, or all from `start` on; fewer where it ends before.

    `code` asks for the body, `summary` for the first line of the docstring; of `both`, even rows are code
    and odd rows summary. The seed gives the order alone: the split of a function follows from its name.
    """
    if task not in TASKS:
        raise DataError(f"stdlib: no task {task!r}; one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise DataError(f"stdlib: no split {split!r}; one of {', '.join(SPLITS)}")
    functions = [function for function in documented_functions() if split_of(function.name) == split]
    functions.sort(key=lambda function: _hash(f"{seed} {function.name} {function.body}"))
    end = len(functions) if count is None else start + count
    made = []
    for index, function in enumerate(functions[start:end], start):
        kind = task if task != "both" else ("code", "summary")[index % 2]
        origin = f"stdlib/{kind}/{split}:{index} {function.name}"
        made.append(_code_row(function, origin) if kind == "code" else _summary_row(function, origin))
    return made


def _code_row(function: Function, origin: str) -> Row:
    prompt = function.head + function.docstring
    return Row(prompt=prompt, completion=function.body, task="code", origin=origin)


def _summary_row(function: Function, origin: str) -> Row:
    prompt = f"{function.head}{function.body}# Summary:"
    references = (function.summary,)
    return Row(prompt, f" {function.summary}", references=references, task="summary", origin=origin)


def split_of(name: str) -> str:
    place = _hash(name) % 100
    return "valid" if place < _VALID else "test" if place < _VALID + _TEST else "train"


def _hash(text: str) -> int:
    # Python's own hash() differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@lru_cache(maxsize=1)
def documented_functions() -> tuple[Function, ...]:
    """Every function with a docstring and a body of 1 to 25 lines, in the order of the files, each once.

    Of functions with equal code (copies in other modules) the first one stays, so that no copy of a
    held-out function is in training.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser's, of invalid escapes in old modules
        for module, path in _sources():
            for function in _functions_of(module, path):
                found.setdefault(function.head + function.body, function)
    if not found:
        folder = sysconfig.get_path("stdlib")
        raise DataError(f"stdlib: no Python sources in {folder}; use a Python that ships them, or `pocket`")
    return tuple(found.values())


def _sources() -> Iterator[tuple[str, Path]]:
    folder = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        paths = [folder / f"{name}.py"] if (folder / f"{name}.py").is_file() else []
        for path in [*paths, *sorted((folder / name).rglob("*.py"))]:
            parts = path.relative_to(folder).with_suffix("").parts
            if not _SKIPPED.intersection(parts):
                yield ".".join(part for part in parts if part != "__init__"), path


def _functions_of(module: str, path: Path) -> Iterator[Function]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # samples of broken code are part of some installations
        return
    lines = source.splitlines(keepends=True)
    for name, node in _nodes(tree, ""):
        function = _cut_out(f"{module}.{name}", node, lines)
        if function:
            yield function


def _nodes(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions of a module and of its classes, but not functions within functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _nodes(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _nodes(node, prefix)


def _cut_out(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or not docstring.strip():
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    quoted, last = node.body[0], node.end_lineno or 0  # ast always knows the end of what it parsed
    begins, ends = quoted.lineno - 1, quoted.end_lineno or 0  # lines of the docstring: begins, ..., ends - 1
    one_line = begins < node.lineno or node.body[1].lineno <= ends  # def, docstring and body share lines
    if one_line or not 1 <= last - ends <= LONGEST_BODY:
        return None
    indent = " " * node.col_offset
    cut = [line.removeprefix(indent) for line in lines[first:last]]
    if not cut[-1].endswith("\n"):
        cut[-1] += "\n"
    parts = slice(0, begins - first), slice(begins - first, ends - first), slice(ends - first, None)
    head, text, body = ("".join(cut[part]) for part in parts)
    if indent and not _same_code(node, head + body):
        return None
    return Function(name, head, text, body, inspect.cleandoc(docstring).splitlines()[0].strip())


def _same_code(node: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> bool:
    """Whether moving to the left margin kept the meaning: it changes strings of several lines."""
    try:
        moved = ast.parse(source).body[0]
    except SyntaxError:
        return False
    assert isinstance(moved, ast.FunctionDef | ast.AsyncFunctionDef)
    return [ast.dump(part) for part in moved.body] == [ast.dump(part) for part in node.body[1:]]
