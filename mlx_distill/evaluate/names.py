"""The names that tests use: their own, and those of the program."""

import ast
import builtins
import re
import sys
from collections.abc import Callable, Iterator, Sequence

BUILTINS = frozenset(dir(builtins))
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, set, dict)
_OF_PLAIN = frozenset(name for kind in _PLAIN for name in dir(kind))  # attributes that plain values have
_CLASS = re.compile(r"[A-Z][A-Z0-9]*[a-z][A-Za-z0-9]*")  # named as classes are: Node, LRUCache
_PLAIN_CLASSES = ("Counter", "OrderedDict")
_DATES = ("date", "datetime", "time", "timedelta")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def bound_names(trees: Sequence[ast.AST]) -> frozenset[str]:
    """The names that statements bind anywhere: by assignment, definition, import, as a parameter."""
    names: set[str] = set()
    for node in _walk(trees):
        match node:
            case ast.Name(name, ast.Store() | ast.Del()):
                names.add(name)
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name) | ast.arg(name):
                names.add(name)
            case ast.Import(aliases) | ast.ImportFrom(names=aliases):
                names |= {(one.asname or one.name).split(".")[0] for one in aliases}
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(str(name)):
                names.add(name)
    return frozenset(names)


def unbound_names(trees: Sequence[ast.Module], bound: frozenset[str]) -> tuple[str, ...]:
    """The names that statements read and nothing binds, builtins left out: the program's, in order."""
    return tuple(name for name in read_names(trees) if name not in bound | BUILTINS)


def read_names(trees: Sequence[ast.AST]) -> list[str]:
    """The names that statements read, in order, each once."""
    names = [node for node in _walk(trees) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return list(dict.fromkeys(node.id for node in names))


def unimported(trees: Sequence[ast.Module], names: Sequence[str]) -> str | None:
    """`math.isclose` where nothing imports `math`: it would be the program's, whatever that is."""
    for node in _walk(trees):
        match node:
            case ast.Attribute(ast.Name(name)) if name in names and name in sys.stdlib_module_names:
                return ast.unparse(node)
    return None


def _walk(trees: Sequence[ast.AST]) -> Iterator[ast.AST]:
    for tree in trees:
        yield from ast.walk(tree)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def why_no_referee(trees: Sequence[ast.Module], names: Sequence[str], bound: frozenset[str]) -> str | None:
    """Why tests cannot be executed in another process than the program's, None if they can.

    They cannot where they use an object of the program's or look into what it defines, and where they pass
    it what is no plain value: a function, or an object of a class. Which calls make objects is told by their
    names: `Node(1)`, `datetime.date(2024, 1, 1)`.
    """
    functions = {node.name for node in _walk(trees) if isinstance(node, _FUNCTIONS)}
    callables = {*functions, *(BUILTINS - bound), *names}
    theirs = _assigned(trees, lambda value: root_of(value) in names)
    objects = _assigned(trees, _makes_object)
    for node in _walk(trees):
        said = f"`{_short(ast.unparse(node))}`" if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Compare | ast.BinOp | ast.Subscript | ast.For):
            parts = (part.id for part in ast.iter_child_nodes(node) if isinstance(part, ast.Name))
            if (looked_up := next((part for part in parts if part in names), None)) is not None:
                return f"`{looked_up}` is looked up in what the program defines"
        elif isinstance(node, ast.Attribute) and node.attr not in _OF_PLAIN:
            root = root_of(node)
            if root in theirs or (root in names and not isinstance(node.value, ast.Name)):
                return f"{said} is of an object of the program's"
            if root in names:
                return f"{said} is looked up in what the program defines"
        elif isinstance(node, ast.Call) and root_of(node) in {*names, *theirs}:
            if _makes_object(node):
                return f"{said} is an object of the program's"
            for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
                said, name = f"`{_short(ast.unparse(value))}`", getattr(value, "id", None)
                if isinstance(value, ast.Lambda) or name in callables:
                    return f"{said} is a function, which cannot be sent"
                if _makes_object(value) or name in objects:
                    return f"{said} is an object, which cannot be sent"
    return None


def _makes_object(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in _DATES or (name not in _PLAIN_CLASSES and _CLASS.fullmatch(name) is not None)


def _assigned(trees: Sequence[ast.Module], fits: Callable[[ast.expr], bool]) -> set[str]:
    """Variables that are given a value that fits, or something of another such variable."""
    found: set[str] = set()
    assigned = [node for node in _walk(trees) if isinstance(node, ast.Assign | ast.NamedExpr)]
    for _ in assigned:  # each round may find one more that stands on another
        for node in assigned:
            if fits(node.value) or root_of(node.value) in found:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def root_of(node: ast.AST) -> str:
    """`a` of `a.b(c).d[0]`; "" of what begins with no name."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
