"""Every line of a JSONL file becomes a row, or is refused with its file, its number and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.rows import Row, parse_row, read_jsonl
from mlx_distill.errors import DataError, NotFound

GOOD = '{"prompt": "What?", "completion": "That."}'
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_three_forms_may_stand_in_one_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        GOOD,
        json.dumps({"messages": CHAT, "tools": [TOOL]}),
        '{"text": "plain"}',
        '{"prompt": "to be answered"}',
    )
    assert read_jsonl(path) == [
        Row(prompt="What?", completion="That.", origin=f"{path}:1"),
        Row(messages=tuple(CHAT), tools=(TOOL,), origin=f"{path}:2"),
        Row(text="plain", origin=f"{path}:3"),
        Row(prompt="to be answered", origin=f"{path}:4"),
    ]


def test_what_judges_an_answer() -> None:
    def row(**fields: Any) -> Row:
        return parse_row({"prompt": "p", **fields}, "here")

    assert row(tests="assert f() == 1").tests == ("assert f() == 1",)
    assert row(tests="assert f() == 1").task == "code"
    assert row(references=["a", "b"]).references == ("a", "b")
    assert row(references="a").task == "summary"
    assert row(tests=[], references=None, completion=None) == Row(prompt="p", origin="here")
    assert row(tests=["assert f() == 1"], task="summary").task == "summary"
    assert row(id=3, tags=[1]) == row()


def test_the_right_one_of_several_choices() -> None:
    def row(**fields: Any) -> Row:
        return parse_row({"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1, **fields}, "here")

    assert (row().task, row().choices, row().right) == ("choice", (" 3", " 4"), 1)
    assert row().answer() == " 4"  # which fidelity reads
    assert row(answer=0).right == 0
    assert row(completion=" four").completion == " four"
    assert row(tests="assert f() == 1").task == "code"
    assert row(tests="assert f() == 1").right is None
    assert row(references="4").task == "choice"
    assert row(choices=None, answer="D").right is None  # a key of other data sets
    chat = parse_row({"messages": CHAT, "choices": ["hello", "bye"], "answer": 0}, "here")
    assert (chat.task, chat.right, chat.answer()) == ("choice", 0, "hello")


def test_marks_of_other_systems_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n  \n" + GOOD.encode())
    assert [row.origin for row in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


def test_characters_arrive_as_they_were_meant(tmp_path: Path) -> None:
    """Line ends of Unicode (U+2028, U+0085) are text, not ends of a line of JSONL."""
    text = "é 😀 \u2028 \u0085 tab\t"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii) for ascii in (True, False)]
    path = write(tmp_path / "a.jsonl", *lines)
    assert [row.text for row in read_jsonl(path)] == [text, text]


def test_at_most_stops_reading_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, GOOD, "broken")
    assert len(read_jsonl(path, at_most=2)) == 2
    with pytest.raises(DataError, match="a.jsonl:3: no JSON"):
        read_jsonl(path, at_most=3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a" "completion": "b"}', "no JSON: Expecting ',' delimiter at column 16"),
        ("prompt: a", "no JSON: Expecting value at column 1"),
        ('{"text": "cut off', "no JSON: Unterminated string"),
        ('{"text": "a"} {"text": "b"}', "no JSON: Extra data at column 15"),
        ('["a", "b"]', 'an object such as {"prompt": ...} is expected; got ["a", "b"]'),
        ("3", "an object such as"),
        ("null", "an object such as"),
        ('{"document": "a", "summary": "b"}', "its keys: `document`, `summary`"),
        ("{}", "its keys: none"),
        ('{"promt": "a", "completion": "b"}', "unknown key `promt`; did you mean `prompt`?"),
        ('{"question": "a", "completion": "b"}', "`completion` without a `prompt`"),
        ('{"mesages": []}', "unknown key `mesages`; did you mean `messages`?"),
        ('{"text": null}', "its keys: none"),
        ('{"prompt": "a", "text": "b"}', "two forms in one row: `prompt` and `text`; keep one"),
        ('{"text": "a", "completion": "b"}', "`completion` belongs to a `prompt`"),
        ('{"text": "a", "tools": []}', "`tools` needs `messages` or a `prompt`"),
        ('{"prompt": 3, "completion": "b"}', "`prompt` is a string; got 3"),
        ('{"prompt": "a", "completion": ["b"]}', '`completion` is a string; got ["b"]'),
        ('{"prompt": "a", "completion": ""}', "`completion` is empty"),
        ('{"text": " \\n"}', "`text` is empty"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"messages": "hi"}', '`messages` is a list of objects; got "hi"'),
        ('{"messages": [{"content": "hi"}]}', 'messages[0]: `role` is a string such as "user"; got null'),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0]: `content` is a string; got 3"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "messages[0]: `content` is a string",
        ),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "messages[0]: `content` is empty"),
        ('{"prompt": "a", "tools": ["f"]}', "`tools` is a list of objects"),
        ('{"prompt": "a", "tests": 3}', "`tests` is a string or a list of strings; got 3"),
        ('{"prompt": "a", "tests": [""]}', "`tests` holds an empty string"),
        ('{"prompt": "a", "choices": "b", "answer": 0}', "needs two `choices` or more; got 1"),
        ('{"prompt": "a", "task": "choice"}', "needs two `choices` or more; got 0"),
        ('{"prompt": "a", "choices": ["b", " "], "answer": 0}', "`choices` holds an empty string"),
        ('{"prompt": "a", "choices": ["b", 2], "answer": 0}', "`choices` is a string or a list of strings"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "of 2 `choices`, from 0; got null"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "of 2 `choices`, from 0; got 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', "of 2 `choices`, from 0; got -1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "of 2 `choices`, from 0; got true"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "c"}', 'of 2 `choices`, from 0; got "c"'),
        ('{"prompt": "a", "references": [null]}', "`references` is a string or a list of strings"),
        ('{"prompt": "a", "task": "poem"}', '`task` is one of code, summary, exact, choice; got "poem"'),
        ('{"text": "a", "score": NaN}', "NaN is no JSON value"),
        ('{"text": "a", "score": -Infinity}', "-Infinity is no JSON value"),
        ('{"text": "a", "text": "b"}', "the key `text` stands twice"),
        ('{"text": "a\\ud83d"}', "half a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "JSON nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "integer"),
    ],
)
def test_a_bad_line(line: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_a_call_of_a_tool_needs_no_words() -> None:
    calls = [{"function": {"name": "add", "arguments": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    assert parse_row({"messages": [CHAT[0], call]}, "here").messages == (CHAT[0], call)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="latin.jsonl:2: byte 14 is no UTF-8"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty.jsonl: empty"):
        read_jsonl(path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(NotFound, match="trian.jsonl: no such file or folder; did you mean .*/train.jsonl"):
        read_jsonl(tmp_path / "trian.jsonl")
    with pytest.raises(NotFound, match="nowhere: no such file or folder; nothing of that name is in"):
        read_jsonl(tmp_path / "nowhere" / "deep" / "train.jsonl")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)
