"""What is shown of several answers, in columns and below each other, and where they are said to part."""

import io
import re

import pytest
import talkers
from rich.console import Console

from mlx_distill.chat import Screen
from mlx_distill.data.rows import Row
from mlx_distill.differences import Difference, difference
from mlx_distill.side_by_side import Columns, Stacked, view
from mlx_distill.speaker import Said


def said(text: str, tokens: list[int] | None = None) -> Said:
    return Said(text, tokens or [ord(letter) for letter in text], "turn", 3, 3, 0.5, 10.0)


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(map(chr, tokens))

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [chr(token) for token in tokens]


DIFFERENCES = {
    ("abc", "abc", True): Difference("the same answer", None, None),
    ("abc", "abd", True): Difference("differs from token 3 on: 'd' for 'c'", 2, 2),
    ("abc", "ab", True): Difference("the same 2 tokens, where the first goes on", 2, 2),
    ("ab", "abc", True): Difference("the same 2 tokens, then goes on", 2, 2),
    ("", "a", True): Difference("the same 0 tokens, then goes on", 0, 0),
    ("a\x1b", "a\x07", True): Difference("differs from token 2 on: '\\x07' for '\\x1b'", 1, 1),
    ("abc", "abc", False): Difference("the same text", None, None),
    ("abc", "xbc", False): Difference("another text from character 1 on", None, 0),
    ("ab", "abc", False): Difference("another text from character 3 on", None, 2),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_where_answers_part(case: tuple[str, str, bool]) -> None:
    first, other, same_tokens = case
    assert difference(said(first), said(other), Letters(), same_tokens) == DIFFERENCES[case]


def test_one_text_in_other_tokens() -> None:
    """Two spellings of a text differ as tokens, and not as texts."""
    tokenizer = talkers.tokenizer()
    tokens = tokenizer.encode("def", add_special_tokens=False)
    apart = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "def"]
    found = difference(said("def", tokens), said("def", apart), tokenizer, True)
    assert (found.token, found.character) == (0, None)


ROW = Row(prompt="What is\x1b[2J it?", completion="[bold]This")
FIRST, OTHER = said("same\n    [red]tail\x1b[2J"), said("same\n    other\x07 tail")


def fill(shown: Columns | Stacked) -> None:
    with shown.prompt(0, ROW):
        for piece in ("same\n", "    [red]", "tail\x1b[2J"):
            shown.piece(0, piece)
        shown.answered(0, FIRST, None)
        shown.piece(1, OTHER.text)
        shown.answered(1, OTHER, difference(FIRST, OTHER, Letters(), False))


def test_below_each_other() -> None:
    out = io.StringIO()
    fill(Stacked(Screen(out, io.StringIO()), ["one", "two"], 2))
    assert out.getvalue() == (
        "prompt 1 of 2: What is[2J it?\nreference: [bold]This\n"
        "\n== one\nsame\n    [red]tail[2J\n-- 17 tokens, the first after 0.50 s, 10.0 tokens/s\n"
        "\n== two\nsame\n    other tail\n-- 20 tokens, the first after 0.50 s, 10.0 tokens/s; "
        "another text from character 10 on\n\n"
    ).replace("17", str(len(FIRST.tokens))).replace("20", str(len(OTHER.tokens)))


def test_in_columns() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90, height=30, _environ={"TERM": "xterm"})
    fill(Columns(console, ["one", "two"], 1))
    shown = out.getvalue()
    assert "\x1b[2J" not in shown and "\x07" not in shown
    final = shown[shown.rindex("one") :]
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", final).splitlines()
    assert plain[2].split() == ["same", "same"]
    assert plain[3].split() == ["[red]tail[2J", "other", "tail"]
    assert plain[3].startswith("      [red]")  # the indent of the text stays
    assert "character 10 on" in plain[-2]
    assert all(len(line) <= 90 for line in plain)
    marked = re.findall(r"\x1b\[33m(.*?)\x1b\[0m", final)
    assert [text.strip() for text in marked] == ["other tail"]  # from where it parts


def test_while_it_is_written_the_end_of_a_long_answer_is_shown() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=20)
    columns = Columns(console, ["one", "two"], 1)
    with columns.prompt(0, ROW):
        columns.piece(0, "".join(f"line {i}\n" for i in range(100)) + "the end")
    with console.capture() as captured:
        console.print(columns._ends())
    lines = [line for line in captured.get().splitlines() if "line" in line]
    assert "line 99" in lines[-1]
    assert len(captured.get().splitlines()) <= 20
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "line 0 " in file.getvalue()  # all of it, when it is complete


def test_which_view(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    def chosen(out: io.StringIO, columns: int, term: str = "xterm", models: int = 2) -> type:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        return type(view(Screen(out, io.StringIO()), ["m"] * models, 1))

    assert chosen(Tty(), 100) is Columns
    assert chosen(Tty(), 100, models=3) is Stacked
    assert chosen(Tty(), 60) is Stacked
    assert chosen(Tty(), 100, term="dumb") is Stacked
    assert chosen(io.StringIO(), 100) is Stacked
