"""The program in an answer: a fenced block, a whole function, or what goes on with the prompt's function.

A model that was only pretrained does not stop behind a function: it prints, tests, explains. That is cut.
Published scores end an answer before a line that begins with def, class, #, if or print (Chen et al. 2021,
arXiv 2107.03374, section 2.1); definitions stay here, for a function may need one that stands behind it.
"""

import ast
import functools
import re
import warnings
from collections.abc import Iterator

from mlx_distill.data.rows import Row

FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_DEFINITION = re.compile(r"(?:async def|def|class)\s+(\w+)")
_OPENS = re.compile(r"(?:async def|def|class|from|import)\s|@")  # how a program begins
_STAYS = re.compile(rf"{_OPENS.pattern}|#|\w+\s*(?::[^=\n]*)?=(?!=)")  # may be needed by what stands before


def program_of(row: Row, answer: str, *, whole: bool = False) -> str:
    """The program in an answer.

    The last fenced Python block, with what the prompt has before its function: imports, helpers. Without a
    block, a function that the answer writes out; else the prompt and the answer joined. Both end before
    the first line that is not indented and is neither a definition nor an assignment, or defines what is
    there already. A body whose first line lost its indentation gets it back.

    Args:
        whole: cut nothing off an answer without a block: to judge all of it, as rows to learn from need.
    """
    prompt = row.prompt or ""
    blocks = [(language.lower(), code) for language, code in FENCED.findall(answer)]
    python = [code for language, code in blocks if language in ("python", "python3", "py")]
    unnamed = [code for language, code in blocks if not language]
    before, name = open_function(prompt)
    if blocks and not whole and (head := _before_fence(answer)):
        # The prompt opened a block, which the answer closes.
        found = _continued(prompt, before, name, head) if name else _written_out(before, head)
        if found is not None:
            return found
    if python or unnamed:
        block = (python or unnamed)[-1]
        if name and block[:1].isspace() and _compiles(prompt + block):
            return prompt + block
        return block if not _compiles(before + block) and _compiles(block) else before + block
    if whole:
        return prompt + answer
    found = _continued(prompt, before, name, answer) if name else _written_out(before, answer)
    return prompt + answer if found is None else found


def _before_fence(answer: str) -> str:
    """What an answer has before its first fence, if it begins as a program does."""
    head = answer[: next(FENCED.finditer(answer)).start()]
    first = next((line for line in _lines(head) if line.strip()), "")
    return head if first[:1].isspace() or _OPENS.match(first) else ""


@functools.lru_cache(maxsize=1024)
def open_function(prompt: str) -> tuple[str, str]:
    """What a prompt has before the function that it ends in, and the name of that function.

    All of it where that function has statements of its own: an answer may be another one. Of Python that
    ends in none, all of it and ""; of a prompt that is no Python, "" and "".
    """
    whole = [_parsed(prompt + more) for more in ("", _indentation(prompt) + "pass")]
    tree = next((tree for tree in whole if tree is not None), None)
    if tree is None or not tree.body:
        return "", ""
    last = tree.body[-1]
    if not isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return prompt, ""
    if tree is whole[0] and any(_does_something(node) for node in last.body):
        return prompt, last.name
    first = min([last.lineno, *(decorator.lineno for decorator in last.decorator_list)])
    return "".join(_lines(prompt)[: first - 1]), last.name


def _does_something(node: ast.stmt) -> bool:
    """Whether a statement is more than an import, a docstring or `...`."""
    says = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not says and not isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def _continued(prompt: str, before: str, name: str, answer: str) -> str | None:
    """The program in an answer that stands behind an open function of that name."""
    first = next((line for line in _lines(answer) if line.strip()), "")
    if _OPENS.match(first) and (program := _written_out(before, answer)) is not None:
        return program
    rest = answer.lstrip()
    blank = answer[: len(answer) - len(rest)]
    indented = blank[: blank.rfind("\n") + 1] + _indentation(prompt) + rest if prompt.endswith("\n") else ""
    for body in (answer, indented):
        if kept := _kept(prompt, body, {name}):
            return prompt + kept
    return _written_out(before, answer)


def _written_out(before: str, answer: str) -> str | None:
    """A function that an answer writes out, perhaps behind words, as far as it is a program; None without."""
    start = next((at for at in _ends(answer) if _OPENS.match(answer, at)), 0)
    for text in (answer, answer[start:]):
        kept = _kept(before, text, set())
        if any(_DEFINITION.match(kept, at) for at in _ends(kept)):
            return before + kept
    return None


def _kept(before: str, text: str, defined: set[str]) -> str:
    """The longest part of a text, from its top, that is a program behind `before` and belongs to it.

    Args:
        defined: names of functions that are there; the text may define further ones, each once. While there
            is none, every line belongs to it.
    """
    kept, defined = "", set(defined)
    for end in _ends(text):
        if text[:end].strip() and _compiles(before + text[:end]):
            kept = text[:end]
            definition = _DEFINITION.match(text, end)
            if definition is not None and definition[1] in defined:
                break
            if defined and not _STAYS.match(text, end):
                break
        if (definition := _DEFINITION.match(text, end)) is not None:
            defined.add(definition[1])
    return kept


def _ends(text: str) -> Iterator[int]:
    """Where a line begins that is not indented, each a place where a function may end; the end last."""
    at = 0
    for line in _lines(text):
        if line.strip() and not line[0].isspace():
            yield at
        at += len(line)
    yield at


def _indentation(prompt: str) -> str:
    """The white space that the next line of an open function begins with."""
    last = next((line for line in reversed(_lines(prompt)) if line.strip()), "")
    own = last[: len(last) - len(last.lstrip())]
    return own + "    " if last.rstrip().endswith(":") else own


def _lines(text: str) -> list[str]:
    """Lines with their ends, as Python counts them: `splitlines` also ends one at a form feed."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like
            compile(text, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _parsed(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
