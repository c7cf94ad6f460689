"""What of an answer is run: as a model asked writes it, and as one that only goes on with a text does."""

import pytest

from mlx_distill.data.rows import Row
from mlx_distill.evaluate.programs import open_function, program_of

BEFORE = "from typing import List\n\ndef half(x):\n    return x / 2\n\n"
PROMPT = BEFORE + 'def f(x: List[int]):\n    """Double x."""\n'
ROW = Row(prompt=PROMPT)
RIGHT = "    return x * 2\n"


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (RIGHT, RIGHT),
        (RIGHT + "\n\nprint(f(2))\n", RIGHT + "\n\n"),
        (RIGHT + "assert f(1) == 3\n", RIGHT),
        (RIGHT + "if __name__ == '__main__':\n    f()\n", RIGHT),
        (RIGHT + "for x in range(3):\n    f(x)\n", RIGHT),
        (RIGHT + '"""\nWrite another function\n"""\ndef g(', RIGHT),
        (RIGHT + "This doubles x.\n", RIGHT),
        (RIGHT + "\ndef f(x):\n    return 3\n", RIGHT + "\n"),  # the first one counts
        (
            RIGHT + "def g(y):\n    return y\nprint(g(",
            RIGHT + "def g(y):\n    return y\n",
        ),  # it may be needed
        (RIGHT + "def g(y):\n    ret", RIGHT + "def g(y):\n    ret"),  # a name is a program
        (RIGHT + "def g(y):\n    return (", RIGHT),  # cut short by the token limit
        (RIGHT + "LIMIT: int = 3\n# a note\nimport os\n@cache\ndef h(): ...\n", None),
        (RIGHT + "limit == 3\n", RIGHT),
        ("    y = [\n1,\n2]\n    return y\nprint(y)", "    y = [\n1,\n2]\n    return y\n"),
        ("    y = '''\ndef g\n'''\n    return y\n", None),
        ("\n" + RIGHT, None),
    ],
)
def test_a_body_ends_where_the_function_does(answer: str, kept: str | None) -> None:
    assert program_of(ROW, answer) == PROMPT + (answer if kept is None else kept)
    assert program_of(ROW, answer, whole=True) == PROMPT + answer


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ("return x * 2", "    return x * 2"),
        ("   return x * 2\n", "    return x * 2\n"),  # one space lost
        ("\nreturn x * 2", "\n    return x * 2"),
        ("y = 2\n    return y\n", "    y = 2\n    return y\n"),
        ("import math\n    return math.pi\n", "    import math\n    return math.pi\n"),
        ("if x:\n        return 1\n    return 2\nprint(3)", "    if x:\n        return 1\n    return 2\n"),
    ],
)
def test_a_first_line_that_lost_its_indentation(answer: str, body: str) -> None:
    assert program_of(ROW, answer) == PROMPT + body


def test_indentation_is_the_prompts_own() -> None:
    tabs = Row(prompt='def f(x):\n\t"""Double x."""\n')
    assert program_of(tabs, "return x * 2") == tabs.prompt + "\treturn x * 2"  # type: ignore[operator]
    bare = Row(prompt="def f(x):\n")
    assert program_of(bare, "return x * 2") == "def f(x):\n    return x * 2"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f(x):\n    return 1\n\nassert f(1) == 2\n", "def f(x):\n    return 1\n\n"),
        (
            "import math\ndef f(x):\n    return math.pi\ndef g(",
            "import math\ndef f(x):\n    return math.pi\n",
        ),
        ("def f(x):\n    return g(x)\ndef g(x):\n    return x\n", None),
        ("Sure! Here it is:\n\ndef f(x):\n    return 9\nHope this helps.", "def f(x):\n    return 9\n"),
        ("class A: ...\ndef f(x):\n    return A\n", None),
    ],
)
def test_a_function_that_is_written_out(answer: str, program: str | None) -> None:
    """Imports and helpers of the prompt stay in front of it, whether the answer repeats them or not."""
    assert program_of(ROW, answer) == BEFORE + (answer if program is None else program)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("Text.\n```python\ndef f(x):\n    return 3\n```\nMore.", BEFORE + "def f(x):\n    return 3\n"),
        ("```py\nwrong\n```\n```\ntext\n```\n```python3\nx = 1\n```", BEFORE + "x = 1\n"),
        (
            "```python\nfrom __future__ import annotations\ndef f(x): ...\n```",
            "from __future__ import annotations\ndef f(x): ...\n",
        ),
        ("```python\n    return 3\n```", PROMPT + "    return 3\n"),
        ("```\ndef f(x):\n    return 3", BEFORE + "def f(x):\n    return 3"),
        (RIGHT + "```\nThis doubles.\n", PROMPT + RIGHT),  # it closes a block that the prompt opened
        ("def f(x):\n    return 3\n```\nThat is it.", BEFORE + "def f(x):\n    return 3\n"),
        ("    Well:\n```\ndef f(x):\n    return 3\n```", BEFORE + "def f(x):\n    return 3\n"),
    ],
)
def test_a_fenced_block(answer: str, program: str) -> None:
    assert program_of(ROW, answer) == program


def test_prompts_that_end_in_no_function() -> None:
    words = Row(prompt="Write a function that doubles.")
    assert program_of(words, "def f(x):\n    return 2 * x\nassert f(1)") == "def f(x):\n    return 2 * x\n"
    assert program_of(words, "no idea") == "Write a function that doubles.no idea"
    text = Row(prompt='"""\nDouble x.\nassert f(1) == 2\n"""\n')
    assert program_of(text, "def f(x):\n    return 2 * x\n\nprint(f(1))").endswith("return 2 * x\n\n")
    chat = Row(messages=({"role": "user", "content": "Double."},))
    assert program_of(chat, "f = abs") == "f = abs"
    assert program_of(chat, "def f(x):\n    return x\nHope this helps.") == "def f(x):\n    return x\n"


def test_what_stands_before_the_open_function() -> None:
    assert open_function(PROMPT) == (BEFORE, "f")
    assert open_function("@cache\ndef f():\n") == ("", "f")
    assert open_function("import math\n") == ("import math\n", "")
    assert open_function("class A:\n    def f(self):\n") == ("", "A")
    helper = "def half(x):\n    return x / 2\n"
    assert open_function(helper) == (helper, "half")
    assert program_of(Row(prompt=helper), "def f(x):\n    return half(x)\nprint(3)").startswith(
        helper + "def f"
    )
    imports = 'def f(x):\n    import math\n    """Double x."""\n'  # HumanEval/115
    assert open_function(imports) == ("", "f")
    assert open_function("Say hello.") == open_function("") == ("", "")
