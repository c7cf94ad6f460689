"""Several models and the same prompts: answers, where they part, the file for other tools, and bad input."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import talkers
from test_chat import Terminal, terminal  # noqa: F401 - a fixture
from workshop import command, contents

from mlx_distill import compare as compare_module
from mlx_distill import models
from mlx_distill.chat import Screen
from mlx_distill.compare import compare
from mlx_distill.data.rows import Row
from mlx_distill.speaker import Speaker
from mlx_distill.speech import Speech


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talkers, a twin of `plain` and a brother with its tokens, and files of rows."""
    root = talkers.make(tmp_path_factory.mktemp("talkers"))
    models.save(root / "twin", models.load(str(root / "plain"), "test"))
    talkers.save(root / "brother", seed=9)
    rows = [
        {"prompt": "def add(x, 3):", "completion": " return x + 3"},
        {"prompt": "zebras", "references": ["jump", "run"]},
        {"prompt": "quick"},
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "long.jsonl").write_text(json.dumps({"prompt": "zebras " * 100}) + "\n", encoding="utf-8")
    (root / "text.jsonl").write_text(json.dumps({"text": "def"}) + "\n", encoding="utf-8")
    (root / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "def"}]}) + "\n", encoding="utf-8"
    )
    return root


def run(names: list[Path], tmp_path: Path, **how: Any) -> tuple[str, list[dict[str, Any]]]:
    out = io.StringIO()
    file = tmp_path / "out.jsonl"
    options = how.pop("options", Speech(max_tokens=8))
    compare([*map(str, names)], options, out=file, screen=Screen(out, io.StringIO()), **how)
    return out.getvalue(), [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    for answer in line["answers"].values():
        assert answer.pop("time_to_first_token_ms") > 0
        answer.pop("tokens_per_second")
    return line


def test_answers_and_where_they_part(folder: Path, tmp_path: Path) -> None:
    names = [folder / name for name in ("plain", "twin", "brother")]
    shown, lines = run(names, tmp_path, file=folder / "rows.jsonl", rows=2)
    assert [(line["prompt"], line["reference"]) for line in lines] == [
        ("def add(x, 3):", " return x + 3"),
        ("zebras", "jump"),
    ]
    for line in lines:
        assert list(line["answers"]) == [*map(str, names)]
        first, twin, brother = line["answers"].values()
        assert first["difference"] is None
        assert twin["text"] == first["text"]
        assert twin["difference"] == {"told": "the same answer", "token": None, "character": None}
        assert brother["text"] != first["text"]
        assert brother["difference"]["told"].startswith("differs from token ")
        alone = Speaker(str(names[2]), Speech(max_tokens=8))
        said = alone.answer(alone.encode(Row(prompt=line["prompt"])), lambda _: None)
        assert (brother["text"], brother["tokens"], brother["end"]) == (said.text, len(said.tokens), said.end)
    assert shown.startswith("prompt 1 of 2: def add(x, 3):\nreference:  return x + 3\n\n== ")
    assert shown.count("== ") == 6
    assert shown.count("; the same answer\n") == 2


def test_models_that_do_not_fit_together_take_turns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is shown and written, and no two of them are in memory at once."""
    names = [folder / name for name in ("plain", "brother", "chatty")]
    asked: dict[str, Any] = {
        "prompts": ["def add", "zebras"],
        "options": Speech(max_tokens=8, temperature=0.7),
    }
    shown, lines = run(names, tmp_path, **asked)
    awake: list[str] = []
    most = 0
    wake, forget = Speaker.wake, Speaker.forget_weights

    def woken(self: Speaker) -> None:
        nonlocal most
        wake(self)
        awake.append(self.name)
        most = max(most, len(awake))

    def forgotten(self: Speaker) -> None:
        forget(self)
        awake.remove(self.name)

    monkeypatch.setattr(Speaker, "wake", woken)
    monkeypatch.setattr(Speaker, "forget_weights", forgotten)
    run(names, tmp_path, **asked)
    assert most == 3
    awake.clear()
    most = 0
    monkeypatch.setattr(compare_module, "machine_gib", lambda: 0.0)
    shown_by_turns, lines_by_turns = run(names, tmp_path, **asked)
    assert (most, awake) == (1, [])
    assert [*map(timeless, lines)] == [*map(timeless, lines_by_turns)]
    assert told(shown) == told(shown_by_turns)
    assert len(told(shown)) == 2 * (1 + 3 * 2)


def told(shown: str) -> list[str]:
    """Lines around the answers, which hold bytes that are no text, without the times."""
    around = [line for line in shown.splitlines() if line.startswith(("prompt ", "== ", "-- "))]
    return [re.sub(r"after \S+ s|\S+ tokens/s", "", line) for line in around]


def test_the_size_of_a_model_is_known_before_its_weights_are_read(folder: Path) -> None:
    speaker = Speaker(str(folder / "plain"), Speech())
    stored = (folder / "plain" / "model.safetensors").stat().st_size
    size = compare_module._bytes_of(speaker)
    assert stored * 0.9 < size < stored
    speaker.answer(speaker.encode(Row(prompt="def")), lambda _: None)
    before = mx.get_active_memory()
    speaker.forget_weights()
    assert before - mx.get_active_memory() >= size  # and what it kept of the prompt


def test_a_chat_and_its_system_message(folder: Path, tmp_path: Path) -> None:
    names = [folder / "chatty", folder / "strict"]
    _, lines = run(names, tmp_path, file=folder / "chat.jsonl")
    assert lines[0]["prompt"] == "def"
    _, raw = run(names, tmp_path, file=folder / "text.jsonl", options=Speech(raw=True, max_tokens=8))
    assert raw[0]["prompt"] == "def"
    assert raw[0]["answers"] != lines[0]["answers"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--prompt", "def add", "--max-tokens", "5", "--out", str(tmp_path / "out.jsonl")]
    ended = command(folder, capsys, "compare", "plain", "twin", *ask)
    assert ended.code == 0
    assert ended.out.startswith("prompt: def add\n\n== plain\n")
    assert "; the same answer\n" in ended.out
    assert "".join(ended.err).replace("\n", "") == f"answers: {tmp_path / 'out.jsonl'}"
    [line] = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["answers"]["twin"]["difference"]["told"] == "the same answer"


def test_columns_at_a_terminal(folder: Path, terminal: Callable[..., Terminal]) -> None:  # noqa: F811
    shown = terminal(folder, "compare", "plain", "twin", "--prompt", "def", "--max-tokens", "5", columns=90)
    assert shown.child.wait(timeout=60) == 0
    shown.until("the same answer")


ASK = ["--prompt", "def"]
WRONG = {
    "one model": (["plain", *ASK], "compare takes two models or more; got 'plain' alone"),
    "twice": (["plain", "twin", "plain", *ASK], "'plain' is named twice"),
    "unknown": (["plain", "twn", *ASK], "'twn'; did you mean `twin`?"),
    "no prompt": (["plain", "twin"], "ask with --prompt, once or more, or with the rows of a --file"),
    "both": (["plain", "twin", *ASK, "--file", "rows.jsonl"], "one of the two"),
    "empty": (["plain", "twin", "--prompt", ""], "--prompt: empty"),
    "no file": (
        ["plain", "twin", "--file", "row.jsonl"],
        "no such file .*did you mean rows.jsonl?",
    ),
    "no rows": (["plain", "twin", "--file", "rows.jsonl", "--rows", "0"], "--rows is how many of the rows"),
    "rows of nothing": (["plain", "twin", *ASK, "--rows", "2"], "--rows is how many of the rows of --file"),
    "out is a folder": (["plain", "twin", *ASK, "--out", "plain"], "--out: plain is a folder"),
    "out is nowhere": (["plain", "twin", *ASK, "--out", "nosuch/a"], "nosuch: no such file or folder"),
    "out is the file": (
        ["plain", "twin", "--file", "rows.jsonl", "--out", "./rows.jsonl"],
        "--out: rows.jsonl is the file that the prompts come from",
    ),
    "too long for one": (
        ["chatty", "plain", "--file", "long.jsonl"],
        "long.jsonl:1: .* tokens, and plain reads fewer than 128; shorten it",
    ),
    "plain text": (["plain", "twin", "--file", "text.jsonl"], "text.jsonl:1: plain `text` has no prompt"),
    "chats": (["chatty", "plain", "--file", "chat.jsonl"], "chat.jsonl:1: `messages` need a chat template"),
    "no template": (["chatty", "plain", *ASK, "--system", "x"], "--system: plain has no chat template"),
    "options": (["plain", "twin", *ASK, "--top-k", "3"], "--top-k and --top-p cut what is drawn from"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = WRONG[case]
    monkeypatch.setattr(Speaker, "wake", lambda _: pytest.fail("weights were read"))
    before = contents(folder)
    ended = command(folder, capsys, "compare", *arguments)
    assert (ended.code, ended.out, len(ended.err)) == (2, "", 1)
    for part in message.split(".*"):
        assert part in ended.err[0]
    assert contents(folder) == before
