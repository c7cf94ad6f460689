"""The tests in `def check(candidate): ...`, as HumanEval has them, each on its own where it can stand so."""

import ast
import copy
import warnings
from collections.abc import Sequence

from mlx_distill.errors import DataError
from mlx_distill.evaluate.asserts import asked
from mlx_distill.evaluate.names import bound_names
from mlx_distill.evaluate.programs import open_function

_LEAVES = (ast.Return, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal)


def split_check(prompt: str, entry: str, test: str, origin: str) -> tuple[tuple[str, ...], str | None]:
    """The tests of a row, and the setup that they stand on.

    An assert that asks for the value of a call of the candidate becomes a test of its own, on the function
    `entry`. What is left of `check` stays one test, with all else in `test` and the functions that the prompt
    defines before `entry` as its setup, so that no program decides what it is compared with. Random
    numbers in it have a seed.

    Raises:
        DataError: `test` is no Python, has no `check(candidate)`, or never calls it.
    """
    tree = _parsed(test, origin)
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or not checks[0].args.args:
        raise DataError(f"{origin}: `test` has no function `check(candidate)`")
    check = checks[0]
    candidate = check.args.args[0].arg
    if not _uses(check.body, {candidate, entry}):
        raise DataError(f"{origin}: the tests never call `{entry}`")
    if entry == check.name:  # in the published form the tests then call themselves, and nothing passes
        return (f"check({entry})",), test
    beside = [node for node in tree.body if node is not check and not _is_metadata(node)]
    before = open_function(prompt)[0]
    bound = bound_names([_parsed(before, origin), *beside, *check.body])
    tests: list[str] = []
    rest: list[ast.stmt] = check.body
    if entry not in bound and not any(isinstance(node, _LEAVES) for node in ast.walk(check)):
        rest = []
        for statement in check.body:
            own = ast.Module([_Renamed(candidate, entry).visit(copy.deepcopy(statement))], [])
            if isinstance(statement, ast.Assert) and asked(own, bound, bound) is not None:
                assert isinstance(own.body[0], ast.Assert)
                own.body[0].msg = None  # it may call the candidate again
                tests.append(ast.unparse(own))
            elif not _says_nothing(statement):
                rest.append(statement)
    if not _uses(rest, {candidate, entry}):
        return tuple(tests), None
    check.body = rest
    setup = [before, *map(ast.unparse, beside), ast.unparse(check)]
    if "random" in test:
        setup.insert(0, "import random\nrandom.seed(0)")
    return (*tests, f"check({entry})"), "\n".join(part.strip("\n") for part in setup if part.strip())


class _Renamed(ast.NodeTransformer):
    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.new, node.ctx) if node.id == self.old else node


def _uses(statements: Sequence[ast.stmt], names: set[str]) -> bool:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return any(isinstance(node, ast.Name) and node.id in names for node in nodes)


def _is_metadata(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name("METADATA")]):
            return True
    return False


def _says_nothing(node: ast.stmt) -> bool:
    """`assert True`, a string, or a name alone on its line."""
    match node:
        case ast.Assert(test=ast.Constant(value)) if value:
            return True
        case ast.Expr(value=ast.Constant() | ast.Name()) | ast.Pass():
            return True
    return False


def _parsed(text: str, origin: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{origin}: `test` is not readable as Python ({error})") from None
