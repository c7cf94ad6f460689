"""Asserts that ask for the value of one call of the program's.

The call alone is sent to the program's process. What it should return stays here, and is compared here.
"""

import ast
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_distill.evaluate.names import BUILTINS, bound_names, root_of

# What a test may apply to a value before it compares it. None of them gives a bool, which could be guessed.
_WRAPPERS = (set, frozenset, tuple, list, dict, sorted, len, sum, min, max, abs, round, str, int, float)
_APPLIED = {one.__name__: one for one in _WRAPPERS}
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Near(NamedTuple):
    """How far from the expected number a value may be."""

    absolute: float
    relative: float | None = None  # None: nearer than `absolute`; else as `math.isclose` has both

    def holds(self, value: float, expected: float) -> bool:
        try:
            if self.relative is None:
                return abs(value - expected) < self.absolute
            return math.isclose(value, expected, rel_tol=self.relative, abs_tol=self.absolute)
        except OverflowError:  # an integer beyond all floats
            return False


class Asked(NamedTuple):
    """A call, and the value that it should give."""

    call: str
    expected: Any
    near: Near | None = None  # None: the value must be equal


def asked(tree: ast.Module, bound: frozenset[str], unknown: frozenset[str]) -> Asked | None:
    """The call, expected value and tolerance of a test of these forms; None for all others.

        assert CALL == VALUE            assert VALUE == CALL         assert CALL is None (True, False)
        assert CALL                     assert not CALL
        assert abs(CALL - VALUE) < VALUE                             assert math.isclose(CALL, VALUE, ...)

    A CALL may have converters around it, such as `set(f(1))` or `round(f(1), 2)`. A VALUE is a literal, or
    literals in arithmetic and converters.

    Args:
        bound: names that are the tests' own: a call of one of them is none of the program's.
        unknown: those of them that the program's process does not know.
    """

    def is_call(node: ast.expr, wrapped: bool = True) -> bool:
        return _is_call(node, bound, unknown, wrapped)

    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Assert):
        return None
    match tree.body[0].test:
        case ast.Call() as call if is_call(call, wrapped=False):
            return Asked(f"not not ({ast.unparse(call)})", True)
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call) if is_call(call, wrapped=False):
            return Asked(f"not ({ast.unparse(call)})", True)
        case ast.Compare(
            left=ast.Call() as call, ops=[ast.Is()], comparators=[ast.Constant(True | False | None as value)]
        ) if is_call(call, wrapped=False):
            return Asked(ast.unparse(call), value)
        case ast.Compare(left=one, ops=[ast.Eq()], comparators=[other]):
            for call, literal in ((one, other), (other, one)):
                if is_call(call) and (found := _value_of(literal)) is not None:
                    return Asked(ast.unparse(call), found[0])
        case ast.Compare(
            left=ast.Call(
                func=ast.Name("abs") | ast.Attribute(ast.Name("math"), "fabs"),
                args=[ast.BinOp(left=call, op=ast.Sub(), right=literal)],
                keywords=[],
            ),
            ops=[ast.Lt()],
            comparators=[limit],
        ) if is_call(call) and "abs" not in bound:
            expected, distance = _number(literal), _number(limit)
            if expected is not None and distance is not None:
                return Asked(ast.unparse(call), expected, Near(distance))
        case ast.Call(
            func=ast.Attribute(ast.Name("math"), "isclose"), args=[call, literal], keywords=keywords
        ) if is_call(call):
            expected, near = _number(literal), _isclose(keywords)
            if expected is not None and near is not None:
                return Asked(ast.unparse(call), expected, near)
    return None


def _isclose(keywords: Sequence[ast.keyword]) -> Near | None:
    """The tolerances in a call of `math.isclose`, None for such as cannot be."""
    given: dict[str | None, float | None] = {"rel_tol": 1e-9, "abs_tol": 0.0}
    given |= {one.arg: _number(one.value) for one in keywords}
    relative, absolute = given["rel_tol"], given["abs_tol"]
    if len(given) > 2 or relative is None or absolute is None or min(relative, absolute) < 0:
        return None
    return Near(absolute, relative)


def _is_call(node: ast.expr, bound: frozenset[str], unknown: frozenset[str], wrapped: bool) -> bool:
    """Whether a node is a call of the program's, in converters or not, that the program's process can do."""
    if not isinstance(node, ast.Call):
        return False
    missing = unknown - bound_names([node])  # a lambda's own parameters are there
    if any(isinstance(one, ast.Name) and one.id in missing for one in ast.walk(node)):
        return False
    while wrapped and isinstance(node.func, ast.Name) and node.func.id in _APPLIED:
        if not node.args or not isinstance(node.args[0], ast.Call):
            break  # a function of the program's that has such a name
        node = node.args[0]
    root = root_of(node)
    if not root or root in bound:
        return False
    inner = any(isinstance(one, ast.Call) for part in node.args for one in ast.walk(part))
    return root not in BUILTINS or not inner  # `all(f(x) for ...)` is no call of the program's


def _value_of(node: ast.expr) -> tuple[Any] | None:
    """The plain value that an expression of literals has, in a tuple; None for another expression."""
    try:
        return (_evaluated(node),)
    except (ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        return None


def _evaluated(node: ast.expr) -> Any:
    match node:
        case ast.Constant(None | bool() | int() | float() | complex() | str() as value):
            return value
        case ast.List(elts=parts):
            return [_evaluated(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_evaluated(part) for part in parts)
        case ast.Set(elts=parts):
            return {_evaluated(part) for part in parts}
        case ast.Dict(keys=keys, values=values):
            pairs = [(key, value) for key, value in zip(keys, values, strict=True) if key is not None]
            if len(pairs) == len(keys):  # else one is `**another`
                return {_evaluated(key): _evaluated(value) for key, value in pairs}
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _evaluated(operand)
            return -value if isinstance(sign, ast.USub) else +value
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            pair = _evaluated(left), _evaluated(right)
            if all(isinstance(one, int | float | complex) for one in pair):  # "a" * 10**9 is the referee's
                return _ARITHMETIC[type(sign)](*pair)
        case ast.Call(func=ast.Name(name), args=args, keywords=[]) if name in _APPLIED:
            value = _APPLIED[name](*map(_evaluated, args))
            return set(value) if isinstance(value, frozenset) else value  # as values come back
    raise ValueError(f"{type(node).__name__} is no literal")


def _number(node: ast.expr) -> float | None:
    found = _value_of(node)
    return found[0] if found is not None and type(found[0]) in (int, float) else None
