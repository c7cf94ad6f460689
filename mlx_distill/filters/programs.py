"""Answers that are no Python. Nothing of them is run."""

import ast
import warnings
from collections.abc import Sequence

from mlx_distill.evaluate.programs import program_of
from mlx_distill.filters.material import Material
from mlx_distill.written import Written


def parses(written: Sequence[Written], on: bool, material: Material) -> list[str | None]:
    """Answers whose program Python's own parser refuses, or that hold no statement.

    The program is found as `evaluate` finds it: the last Python block of the answer, else the prompt with
    the answer behind it.
    """
    return [why_no_python(program_of(one.row, material.answer(one), whole=True)) for one in written]


def why_no_python(source: str) -> str | None:
    """What keeps a text from being a program; None where nothing does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and the like, in somebody else's program
            statements = ast.parse(source).body
    except SyntaxError as error:
        line = "" if error.lineno is None else f" (line {error.lineno})"
        return f"{type(error).__name__}: {error.msg}{line}"
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, half characters, deep nesting
        return f"{type(error).__name__}: {str(error) or 'nested too deeply'}"
    return None if statements else "no statement in it"
