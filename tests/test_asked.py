"""What a writer is shown, read as text, and what the student learns behind all the same."""

from pathlib import Path
from typing import Any

import pytest
import workshop
from test_template import characters
from tiny import tiny_recipe

from mlx_distill.asked import answered, check_thinking, shown_to
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.options import Generate
from mlx_distill.preflight import prepare

TEMPLATE = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking | default(false) %}b{% endif %}{% endif %}"
)
EXAMPLES = [
    Row(prompt="1", completion="2"),
    Row(messages=({"role": "user", "content": "3"}, {"role": "assistant", "content": "4"})),
]
TOOL: Any = {"type": "function", "function": {"name": "t"}}


def shown(
    row: Row, template: str | None = TEMPLATE, examples: list[Row] | None = None, **options: Any
) -> str:
    tokenizer = characters(template)
    return str(tokenizer.decode(shown_to(tokenizer, row, Generate(**options), examples or [])))


def test_a_chat_opens_with_the_system_message_and_the_examples() -> None:
    row = Row(prompt="x", tools=(TOOL,))
    assert shown(row) == "[t]u:x</s>\na:"
    assert shown(row, system="z") == "[t]s:z</s>\nu:x</s>\na:"
    assert shown(row, examples=EXAMPLES, system="z") == (
        "[t]s:z</s>\nu:1</s>\na:2</s>\nu:3</s>\na:4</s>\nu:x</s>\na:"
    )
    assert shown(row, thinking=True) == "[t]u:x</s>\na:b"
    assert shown(row, thinking=False) == "[t]u:x</s>\na:"


def test_a_system_message_of_the_row_stays() -> None:
    turns = [{"role": "system", "content": "y"}, {"role": "user", "content": "x"}]
    for more in ([], [{"role": "assistant", "content": "the answer is left out"}]):
        row = Row(messages=(*turns, *more))
        assert shown(row, system="z") == "s:z\n\ny</s>\nu:x</s>\na:"
        assert shown(row, examples=EXAMPLES[:1]) == "s:y</s>\nu:1</s>\na:2</s>\nu:x</s>\na:"


def test_without_a_template_examples_stand_before_the_text_and_end_their_turns() -> None:
    row = Row(prompt="x")
    assert shown(row, None) == "<s>x"
    assert shown(row, None, EXAMPLES[:1] * 2) == "<s>12</s>12</s>x"
    without = characters(bos=False)
    assert without.decode(shown_to(without, row, Generate(), EXAMPLES[:1])) == "12</s>x"
    with pytest.raises(DataError, match="need a chat template"):
        shown(row, None, EXAMPLES)


@pytest.mark.parametrize("options", [{"system": "z"}, {"thinking": False}])
def test_what_needs_a_template_is_refused_without_one(options: dict[str, Any]) -> None:
    [key] = options
    with pytest.raises(RecipeError, match=f"`generate.{key}` needs a chat template, and the teacher's"):
        shown(Row(prompt="x"), None, **options)


def test_a_switch_that_the_template_lacks_is_refused() -> None:
    row = Row(prompt="x")
    check_thinking(characters(TEMPLATE), row, Generate(thinking=True))
    check_thinking(characters("{{ messages[0].content }}"), row, Generate())
    with pytest.raises(RecipeError, match="`generate.thinking`: .* has no `enable_thinking`; leave it out"):
        check_thinking(characters("{{ messages[0].content }}"), row, Generate(thinking=False))


def test_an_answer_takes_the_place_of_the_row_s_own() -> None:
    assert answered(Row(prompt="x", completion="y"), "z") == Row(prompt="x", completion="z")
    chat = Row(messages=({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))
    assert answered(chat, "z").messages == (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "z"},
    )
    asked = Row(messages=({"role": "user", "content": "x"},))
    assert answered(asked, "y") == chat


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workshop.make(tmp_path))
    return tmp_path


def prepared(*, data: dict[str, Any] | None = None, **generate: Any) -> Any:
    rows = {"train": {"source": "good.jsonl"}, "prompts": "good.jsonl", "max_tokens": 64}
    return prepare(tiny_recipe(teacher={"model": "teacher"}, data=rows | (data or {}), generate=generate))


def test_the_student_learns_behind_the_bare_question(folder: Path) -> None:
    plain, warm = prepared(), prepared(examples={"source": "good.jsonl", "rows": 2})
    assert plain.fingerprint != warm.fingerprint
    for one, other in zip(plain.prompts, warm.prompts, strict=True):
        assert one.tokens == other.tokens == one.shown
        assert other.shown[-len(one.tokens) :] == one.tokens
        assert len(other.shown) == len(one.tokens) + sum(len(row.tokens) for row in plain.train[:2])
    # What the examples say decides what is written, so another file is another run.
    text = (folder / "good.jsonl").read_text(encoding="utf-8")
    (folder / "more.jsonl").write_text(text, encoding="utf-8")
    before = prepared(examples={"source": "more.jsonl", "rows": 2}).fingerprint
    (folder / "more.jsonl").write_text(text.replace("return", "yield"), encoding="utf-8")
    assert prepared(examples={"source": "more.jsonl", "rows": 2}).fingerprint != before


def test_examples_need_answers(folder: Path) -> None:
    (folder / "bare.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bare.jsonl:1: no answer; a row of `generate.examples` needs one"):
        prepared(examples="bare.jsonl")
    with pytest.raises(DataError, match=r"^generate.examples: `start` is 12; good.jsonl has only 12 rows"):
        prepared(examples={"source": "good.jsonl", "start": 12})


def test_a_writer_with_other_tokens_is_shown_its_own(folder: Path) -> None:
    rows = {"train": {"source": "good.jsonl"}, "prompts": "good.jsonl", "max_tokens": 64}
    found = prepare(
        tiny_recipe(
            student={"shape": None, "model": "student"},
            teacher={"model": "stranger"},
            data=rows,
            objective={"cross_tokenizer": {}},
        )
    )
    theirs = found.teachers["teacher"].tokenizer
    for row, tokens, shown in found.prompts:
        assert tokens != shown
        assert found.tokenizer.decode(tokens) == theirs.decode(shown) == row.prompt
