"""The corpus `stdlib`: real functions, cut out of their files without a change of meaning."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

from mlx_distill.data import stdlib
from mlx_distill.data.stdlib import documented_functions, rows
from mlx_distill.errors import DataError


def test_there_are_thousands_each_with_docstring_and_short_body():
    functions = documented_functions()
    assert len(functions) > 3000
    assert len({function.head + function.body for function in functions}) == len(functions)
    for function in functions:
        assert 1 <= len(function.body.splitlines()) <= stdlib.LONGEST_BODY, function.name
        assert function.summary == function.summary.strip() and function.summary, function.name
        assert not re.search(r"(^|\.)(tests?|idlelib|lib2to3|turtledemo)\.", function.name)


def test_prompt_and_completion_are_the_function_as_its_module_has_it():
    """Against `inspect.getsource` of imported modules, which knows nothing of our cutting."""
    seen = 0
    for row in rows("code", "train", None):
        place, _, name = row.origin.split(" ")[1].partition(".")
        if place in ("ast", "difflib", "glob", "inspect", "shutil", "statistics", "tempfile", "textwrap"):
            module = importlib.import_module(place)
            function = getattr(module, name, None)
            twice = inspect.getsource(module).count(f"def {name}(") > 1  # one for each platform
            if inspect.isfunction(function) and function.__module__ == place and not twice:
                assert row.prompt + row.completion == textwrap.dedent(inspect.getsource(function))
                seen += 1
    assert seen > 20


def test_moving_to_the_margin_keeps_the_meaning():
    """A method's string of several lines would change when its lines move; such a function is left out."""
    method = 'class A:\n    def f(self):\n        """Say."""\n        return """a\n        b"""\n'
    plain = 'class A:\n    def f(self):\n        """Say."""\n        return "a"\n'
    assert cut_out(plain) == ("def f(self):\n", '    """Say."""\n', '    return "a"\n', "Say.")
    assert cut_out(method) is None


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): 'Say.'; return x\n",
        "def f(x):\n    'Say.'; return x\n",
        "def f(x):\n    return x\n",
        "def f(x):\n    'Say.'\n",
        "def f(x):\n    '   '\n    return x\n",
        "def f(x):\n    'Say.'\n" + "    x += 1\n" * 26,
    ],
)
def test_what_cannot_be_cut_is_left_out(source):
    assert cut_out(source) is None


def test_decorators_comments_and_a_missing_last_newline():
    source = "@cache\ndef f(\n    x,\n):\n    '''Say.\n\n    More.\n    '''\n    # why\n    return x"
    head, docstring, body, summary = cut_out(source)
    assert head == "@cache\ndef f(\n    x,\n):\n"
    assert docstring == "    '''Say.\n\n    More.\n    '''\n"
    assert body == "    # why\n    return x\n" and summary == "Say."


def cut_out(source):
    ((name, node),) = stdlib._nodes(ast.parse(source), "")
    function = stdlib._cut_out(name, node, source.splitlines(keepends=True))
    return function and tuple(function)[1:]


def test_rows_of_both_tasks():
    code, summary, both = (rows(task, "valid", 20) for task in ("code", "summary", "both"))
    assert both == [(code, summary)[i % 2][i] for i in range(20)]
    for one, other in zip(code, summary, strict=True):
        ast.parse(one.prompt + one.completion)
        ast.parse(other.prompt)
        assert one.completion in other.prompt and other.prompt.endswith("\n# Summary:")
        assert other.references == (other.completion.removeprefix(" "),)
        assert ast.get_docstring(ast.parse(one.prompt + one.completion).body[0]).startswith(other.references)
        assert ast.get_docstring(ast.parse(other.prompt).body[0]) is None
        assert (one.task, other.task) == ("code", "summary") and not one.tests


def test_splits_share_no_function_and_the_seed_moves_none():
    sizes = {}
    for split in stdlib.SPLITS:
        for seed in (0, 1):
            some = rows("code", split, None, seed=seed)
            sizes[split, seed] = {row.prompt + row.completion for row in some}
        assert sizes[split, 0] == sizes[split, 1]
    train, valid, test = (sizes[split, 0] for split in stdlib.SPLITS)
    assert not train & valid and not train & test and not valid & test
    assert 0.03 < len(valid) / len(documented_functions()) < 0.07


def test_a_row_depends_on_its_place_alone():
    whole = rows("both", "test", None)
    assert rows("both", "test", 10) == whole[:10]
    assert rows("both", "test", 10, start=5) == whole[5:15]
    assert rows("both", "test", None, start=len(whole) - 3) == whole[-3:]
    assert rows("code", "test", 10, seed=1) != rows("code", "test", 10)


def test_what_cannot_be_had_is_refused(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="no task 'chat'; one of code, summary, both"):
        rows("chat", "train", 3)
    with pytest.raises(DataError, match="no split 'composition'; one of train, valid, test"):
        rows("code", "composition", 3)
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no Python sources in .*; use a Python that ships them, or `pocket`"):
        documented_functions.__wrapped__()
