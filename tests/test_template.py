"""Rows become token ids: by hand on a tokenizer of single characters, and on real ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode, encode_prompt
from mlx_distill.errors import DataError

CHATML = (
    "{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = (
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3"},
    {"role": "assistant", "content": "4"},
)


def characters(template: str | None = None, bos: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a character, so that ids can be read: the id of `x` is its place here."""
    alphabet = ["<s>", "</s>", "<end>", *"\n :[]?.abcdefghijklmnopqrstuvwxyz0123456789"]
    places = {letter: index for index, letter in enumerate(alphabet)}
    core = Tokenizer(models.WordLevel(places, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **options)
    tokenizer.chat_template = template
    return tokenizer


def split(row: Row, tokenizer: Any, **options: Any) -> tuple[str, str]:
    """What is not counted, and what is, as text."""
    tokens, start, _ = encode(row, tokenizer, **options)
    return tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])


def test_a_case_by_hand() -> None:
    """`<s>`, then a, b; counted are c and the end of the turn. Ids are places in the alphabet."""
    tokenizer = characters()
    a, b, c = (tokenizer.encode(letter)[-1] for letter in "abc")
    assert encode(Row(prompt="ab", completion="c"), tokenizer) == ([0, a, b, c, 1], 3, 1.0)
    assert encode(Row(prompt="ab", completion="c"), tokenizer, count="all") == ([0, a, b, c, 1], 1, 1.0)
    assert encode(Row(text="ab"), tokenizer) == ([0, a, b, 1], 1, 1.0)
    assert encode_prompt(Row(prompt="ab"), tokenizer) == [0, a, b]
    assert encode(Row(prompt="ab", completion="c"), characters(bos=False)) == ([a, b, c, 1], 2, 1.0)


def test_a_chat_by_hand() -> None:
    """The template's newline behind the last `</s>` is cut: nothing is generated after it."""
    tokenizer = characters(CHATML)
    assert split(Row(prompt="x", completion="y"), tokenizer) == ("u:x</s>\na:", "y</s>")
    assert split(Row(messages=CHAT), tokenizer) == ("u:1</s>\na:2</s>\nu:3</s>\na:", "4</s>")
    tools = ({"type": "function", "function": {"name": "add"}},)
    assert split(Row(messages=CHAT[:2], tools=tools), tokenizer) == ("[add]u:1</s>\na:", "2</s>")
    assert split(Row(prompt="x", completion="y", tools=tools), tokenizer)[0] == "[add]u:x</s>\na:"
    # Plain text is not a chat, whatever the tokenizer could do.
    assert split(Row(text="x"), tokenizer) == ("<s>", "x</s>")


def test_the_prompt_is_what_the_model_is_given() -> None:
    """The law that makes training and generation the same: ids before `start` are `encode_prompt`'s."""
    rows = [Row(prompt="ab", completion="cd"), Row(messages=CHAT), Row(messages=CHAT[:2])]
    for tokenizer in (characters(), characters(CHATML), TokenizerWrapper(characters(CHATML))):
        for row in rows if tokenizer.chat_template else rows[:1]:
            tokens, start, _ = encode(row, tokenizer)
            assert tokens[:start] == encode_prompt(row, tokenizer)
    assert encode_prompt(Row(messages=CHAT[:3]), tokenizer) == encode_prompt(Row(messages=CHAT), tokenizer)


def test_the_end_of_the_turn() -> None:
    row = Row(prompt="x", completion="y")
    without = CHATML.replace("</s>", ".")  # the template writes no end: one is added, behind all of it
    assert split(row, characters(without)) == ("u:x.\na:", "y.\n</s>")
    ends = characters(CHATML.replace("</s>", "<end>"), additional_special_tokens=["<end>"])
    assert split(row, ends) == ("u:x<end>\na:", "y<end>\n</s>")
    # mlx-lm's wrapper knows of further ids at which the model stops, from the model's config.
    assert split(row, TokenizerWrapper(ends, eos_token_ids=[2])) == ("u:x<end>\na:", "y<end>")
    assert split(Row(prompt="x", completion="y</s>"), characters()) == ("<s>x", "y</s>")
    assert split(Row(prompt="x", completion="y</s>z"), characters()) == ("<s>x", "y</s>z</s>")


def test_a_template_that_opens_with_bos_gets_no_second() -> None:
    tokenizer = characters("<s>" + CHATML)
    tokens, _, _ = encode(Row(prompt="x", completion="y"), tokenizer)
    assert tokens.count(0) == 1
    assert tokens[0] == 0
    assert encode_prompt(Row(prompt="<s>x"), characters()) == encode_prompt(Row(prompt="x"), characters())


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (Row(prompt="x"), None, "a row to learn from needs a `completion`"),
        (Row(prompt="x"), CHATML, "the last message must be the assistant's"),
        (Row(messages=CHAT[:3]), CHATML, "the last message must be the assistant's"),
        (Row(messages=CHAT[1:2]), CHATML, "the chat opens with an answer"),
        (Row(messages=CHAT), None, "`messages` need a chat template, and the tokenizer has none"),
        (Row(prompt="x", completion="y", tools=({},)), None, "`tools` need a chat template"),
        (Row(messages=CHAT), "{{ raise_exception('only one turn') }}", "refuses the messages .only one turn"),
        (Row(messages=CHAT), "{{ messages[0].none.none }}", "the chat template refuses the messages"),
        (
            Row(messages=CHAT),
            CHATML.replace("a:{% endif", "a:<think>{% endif"),
            "does not extend its own prompt",
        ),
    ],
)
def test_what_cannot_be_learned_from(row: Row, template: str | None, message: str) -> None:
    row = replace(row, origin="a:7")
    with pytest.raises(DataError, match=f"^a:7: .*{message}"):
        encode(row, characters(template))


def test_a_tokenizer_without_end_of_turn() -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no end-of-turn token"):
        encode(Row(text="x"), tokenizer)


def test_plain_text_has_no_prompt() -> None:
    with pytest.raises(DataError, match="plain `text` has no prompt"):
        encode_prompt(Row(text="x"), characters())


def test_question_and_answer_of_a_row() -> None:
    assert (Row(prompt="x", completion="y").question(), Row(prompt="x", completion="y").answer()) == (
        "x",
        "y",
    )
    assert Row(messages=CHAT).answer() == CHAT[-1]["content"]
    assert Row(messages=CHAT[:3]).answer() is None
    assert Row(messages=CHAT).question() == CHAT[2]["content"]


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    folder = shared / "tokenizers/qwen2.5"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Any:
    folder = shared / "models/stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return AutoTokenizer.from_pretrained(folder)


def test_qwen_token_for_token(qwen: Any) -> None:
    row = Row(
        messages=(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
        )
    )
    tokens, start, _ = encode(row, qwen)
    assert " ".join(qwen.convert_ids_to_tokens(tokens)) == (
        "<|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ "
        "<|im_start|> user Ċ 1 + 1 ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ 2 <|im_end|>"
    )
    assert qwen.convert_ids_to_tokens(tokens[start:]) == ["2", "<|im_end|>"]


def test_the_boundary_is_the_one_of_inference(qwen: Any) -> None:
    """An answer that opens with a newline: encoded as one string it merges with the prompt's last token."""
    row = Row(prompt="x", completion="\ny")
    tokens, start, _ = encode(row, qwen)
    assert tokens[:start] == encode_prompt(row, qwen)
    assert qwen.decode(tokens[start:]) == "\ny<|im_end|>"

    # The usual mistake: the whole chat at once, and the length of the prompt as the start.
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ny"}]
    whole = qwen.apply_chat_template(chat, return_dict=False)
    assert qwen.decode(whole[start:]) == "y<|im_end|>\n"
    assert whole[:start] != tokens[:start]


def test_qwen_tools(qwen: Any) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    row = Row(messages=({"role": "user", "content": "1+1?"}, call), tools=(tool,))
    before, counted = split(row, qwen)
    assert '"description": "Add."' in before
    assert before.endswith("<|im_start|>assistant\n")
    assert counted == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


def test_wrapper_and_tokenizer_agree(qwen: Any, stories: Any) -> None:
    row = Row(prompt="def f(x):\n", completion="    return x\n")
    for tokenizer in (qwen, stories):
        assert encode(row, tokenizer) == encode(row, TokenizerWrapper(tokenizer))


def test_sentencepiece_adds_no_space_to_the_answer(stories: Any) -> None:
    """Its tokenizer opens every string with a space; an answer must not begin with one for that."""
    tokens, start, _ = encode(Row(prompt="Once upon a time", completion=" there"), stories)
    assert stories.convert_ids_to_tokens(tokens) == ["<s>", "▁Once", "▁upon", "▁a", "▁time", "▁there", "</s>"]
    assert tokens[:-1] == stories.encode("Once upon a time there")
    assert start == 5

    # The usual mistake: the answer encoded by itself.
    alone = stories.encode(" there", add_special_tokens=False)
    assert stories.convert_ids_to_tokens(alone) == ["▁", "▁there"]


def test_an_answer_decodes_to_itself(qwen: Any, stories: Any) -> None:
    """decode_answer undoes the encoding of a completion: spaces at its start are code's indentation."""
    for tokenizer in (characters(), qwen, stories, TokenizerWrapper(stories)):
        for answer in ("there", " there", "    return x\n", "\n\nx", "a", "x.", " "):
            tokens, start, _ = encode(Row(prompt="once", completion=answer), tokenizer)
            assert decode_answer(tokens[start:], tokenizer) == answer
            assert decode_answer(tokens[start:-1], tokenizer) == answer
    # The usual mistake: sentencepiece takes the first space for its own.
    tokens, start, _ = encode(Row(prompt="once", completion="    return x"), stories)
    assert stories.decode(tokens[start:], skip_special_tokens=True) == "   return x"
