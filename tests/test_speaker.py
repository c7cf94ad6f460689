"""One answer after the other: the same as `generate` writes, from real tokens, with what was read kept."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import talkers
from mlx_lm.utils import _get_classes
from tiny import SHAPE, Ids
from tiny_configs import tiny_config

from mlx_distill import models
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, end_of_turn_ids
from mlx_distill.errors import DataError, DistillError, ModelError, NotFound, RecipeError
from mlx_distill.generate import generate
from mlx_distill.options import Shape
from mlx_distill.speaker import Said, Speaker, at_least, common
from mlx_distill.speech import Speech, speech

PROMPTS = ["def add(x, 3):", "Größe", "quick zebras\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.make(tmp_path_factory.mktemp("talkers"))


def nothing(piece: str) -> None:
    pass


def ask(speaker: Speaker, text: str, **how: Any) -> Said:
    return speaker.answer(speaker.encode(Row(prompt=text, origin="test")), how.pop("show", nothing), **how)


def chat(*texts: str) -> Row:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Row(messages=messages, origin="test")


@pytest.mark.parametrize("given", [{}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("name", ["plain", "chatty"])
def test_the_answer_is_the_one_that_generate_writes(name: str, given: dict[str, Any], folder: Path) -> None:
    options = Speech(max_tokens=30, **given)
    speaker = Speaker(str(folder / name), options)
    prompts = [speaker.encode(Row(prompt=text)) for text in PROMPTS]
    loaded = speaker.loaded
    expected = generate(
        loaded.model,
        prompts,
        end_of_turn_ids(loaded.tokenizer),
        max_tokens=30,
        batch_size=2,
        sampling=options,
        seed=options.seed,
        vocabulary=speaker.vocabulary,
    )
    for prompt, answer in zip(prompts, expected, strict=True):
        shown: list[str] = []
        said = speaker.answer(prompt, shown.append)
        assert said.tokens == answer.tokens
        assert (said.end == "turn") == answer.finished
        assert said.text == decode_answer(answer.tokens, loaded.tokenizer)
        assert said.prompt_tokens == len(prompt)


def test_a_seed_writes_one_answer(folder: Path) -> None:
    def drawn(seed: int) -> list[int]:
        speaker = Speaker(str(folder / "plain"), Speech(temperature=1.0, max_tokens=20, seed=seed))
        first = ask(speaker, "def").tokens
        mx.random.seed(5)  # the global state, which is nobody's here
        assert ask(speaker, "def").tokens == first
        return first

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_tokens_that_the_tokenizer_lacks_are_never_written(tmp_path: Path) -> None:
    """Rows of the head beyond the tokenizer are padding; here they are the likeliest of all."""
    tokenizer = talkers.tokenizer()
    size = len(tokenizer)
    loaded = models.build(Shape(**SHAPE), Ids(size + 38), 1)._replace(tokenizer=tokenizer)
    weights: Any = loaded.model
    table = weights.model.embed_tokens
    table.weight = mx.concatenate([table.weight[:size], 5 * mx.random.normal((38, 32))])
    models.save(tmp_path / "padded", loaded)
    cases: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}]
    for given in cases:
        speaker = Speaker(str(tmp_path / "padded"), Speech(max_tokens=40, **given))
        assert speaker.vocabulary == size
        assert max(ask(speaker, "def add").tokens) < size
        speaker.vocabulary = size + 38  # the usual mistake
        shown = speaker.answer(speaker.encode(Row(prompt="def add")), nothing)
        assert max(shown.tokens) >= size


def test_min_p_is_its_definition() -> None:
    logits = np.random.default_rng(0).normal(0, 2, size=(3, 50))
    for share in (0.02, 0.3, 1.0):
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = chances >= share * chances.max(-1, keepdims=True)
        kept = np.array(at_least(mx.array(logits.astype(np.float32)), share))
        np.testing.assert_array_equal(kept > -np.inf, expected)
        np.testing.assert_array_equal(kept[expected], logits.astype(np.float32)[expected])
    plain = mx.array(logits.astype(np.float32))
    assert mx.array_equal(at_least(plain, 0.0), plain)


def test_min_p_follows_the_temperature(folder: Path) -> None:
    """What is kept at a high temperature is more than at a low one, as of the chances drawn from."""

    def kept(temperature: float) -> set[int]:
        options = Speech(temperature=temperature, min_p=0.5)
        logprobs = mx.array([[0.0, -1.0, -2.0, -3.0, -9.0]])
        speaker = Speaker(str(folder / "plain"), options)
        speaker.vocabulary = 5
        drawn = set()
        for seed in range(60):
            speaker.options = options.model_copy(update={"seed": seed})
            drawn.add(speaker._sampler([1])(logprobs).item())
        return drawn

    assert kept(1.0) == {0}
    assert kept(2.0) == {0, 1}
    assert kept(4.0) == {0, 1, 2}


def answered(speaker: Speaker, row: Row) -> Said:
    return speaker.answer(speaker.encode(row), nothing)


def test_turns_read_only_what_is_new(folder: Path) -> None:
    """A chat that goes on has the answer that it has when it is read afresh, and reads less."""
    options = Speech(max_tokens=12)
    speaker = Speaker(str(folder / "chatty"), options)
    texts = ["def add(x, 1):"]
    for number in range(4):
        said = answered(speaker, chat(*texts))
        fresh = answered(Speaker(str(folder / "chatty"), options), chat(*texts))
        assert said.tokens == fresh.tokens
        assert fresh.read == fresh.prompt_tokens == said.prompt_tokens
        if number:
            before = speaker.encode(chat(*texts[:-2]))
            assert said.read <= said.prompt_tokens - len(before) + 3  # an answer may join the template's end
        texts += [said.text or "x", f"Größe {number}"]
    # The usual mistake: the cache is taken for one that has read other tokens than it has.
    prompt = speaker.encode(chat("quick zebras", "jump", "def add"))
    cache, read = speaker._kept
    speaker._kept = cache, prompt[:-3] + read[len(prompt) - 3 :]
    wrong = speaker.answer(prompt, nothing)
    assert wrong.read <= 3
    assert wrong.tokens != Speaker(str(folder / "chatty"), options).answer(prompt, nothing).tokens


def test_the_same_prompt_again_reads_its_last_token_alone(folder: Path) -> None:
    speaker = Speaker(str(folder / "plain"), Speech(max_tokens=5))
    first, second = ask(speaker, "def add(x"), ask(speaker, "def add(x")
    assert (first.read, second.read) == (first.prompt_tokens, 1)
    assert first.tokens == second.tokens


@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_what_is_kept_is_what_was_read(most: int, stop_after: int | None, folder: Path) -> None:
    """However an answer ends, the tokens noted are as many as the cache holds."""
    speaker = Speaker(str(folder / "plain"), Speech(max_tokens=most))
    shown: list[str] = []
    stopped = (lambda: len(shown) >= stop_after) if stop_after else (lambda: False)
    ask(speaker, "def add(x", show=shown.append, stopped=stopped)
    cache, read = speaker._kept
    assert {layer.offset for layer in cache} == {len(read)}


def test_a_cache_that_cannot_go_back_is_read_anew(tmp_path: Path) -> None:
    """A window of four tokens forgets what stood before them."""
    tokenizer = talkers.tokenizer()
    config = {**tiny_config("gemma3_text"), "vocab_size": len(tokenizer), "query_pre_attn_scalar": 8}
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    loaded = models.Loaded(model_class(arguments.from_dict(config)), config, tokenizer)
    models.save(tmp_path / "window", loaded)
    speaker, fresh = (Speaker(str(tmp_path / "window"), Speech(max_tokens=6)) for _ in range(2))
    first = ask(speaker, "def add(x")
    other = ask(speaker, "def zebras")  # shares its beginning
    assert other.read == other.prompt_tokens
    assert other.tokens == ask(fresh, "def zebras").tokens
    # What only goes on needs no way back.
    prompt = [*speaker.encode(Row(prompt="def zebras")), *other.tokens]
    assert other.end == "length" and first.tokens
    longer = [*prompt, 5, 6]
    assert speaker.answer(longer, nothing).read == 2


def test_an_answer_ends_at_the_context(folder: Path) -> None:
    speaker = Speaker(str(folder / "plain"), Speech(max_tokens=1000))
    assert speaker.context == 128
    said = ask(speaker, "def add(x, 3):")
    assert said.end == "turn" or said.prompt_tokens + len(said.tokens) == 128
    long = Speaker(str(folder / "plain"), Speech(max_tokens=1000))
    prompt = [5] * 126
    said = long.answer(prompt, nothing)
    assert (said.end, len(said.tokens)) in {("context", 2), ("turn", 1), ("turn", 0)}
    assert ("context is full" in said.told()) == (said.end == "context")


def test_a_prompt_beyond_the_context_is_refused(folder: Path) -> None:
    speaker = Speaker(str(folder / "plain"), Speech())
    length = len(speaker.encode(Row(prompt="zebras")))
    speaker.context = length + 1
    assert ask(speaker, "zebras").prompt_tokens == length
    speaker.context = length
    with pytest.raises(DataError, match=f"{length} tokens, and .* reads fewer than {length}"):
        speaker.encode(Row(prompt="zebras", origin="here"))
    with pytest.raises(DataError, match="here: the tokenizer makes nothing of `prompt`"):
        speaker.encode(Row(prompt="", origin="here"))
    raw = Speaker(str(folder / "plain"), Speech(raw=True))
    with pytest.raises(DataError, match="here: .*plain reads no token in it"):
        raw.encode(Row(prompt="", origin="here"))
    speaker.context = 128
    with pytest.raises(DataError, match=r"here: \d+ tokens, and \S+plain reads fewer than 128; shorten it"):
        speaker.encode(Row(prompt="zebras " * 100, origin="here"))


def test_stopping_while_the_prompt_is_read(folder: Path) -> None:
    speaker = Speaker(str(folder / "plain"), Speech(max_tokens=9))
    expected = ask(speaker, "def add").tokens
    said = ask(speaker, "quick zebras", stopped=lambda: True)
    assert (said.end, said.tokens, said.text) == ("stopped", [], "")
    assert ask(speaker, "def add").tokens == expected


def test_stopping_between_two_tokens(folder: Path) -> None:
    speaker = Speaker(str(folder / "endless"), Speech(max_tokens=50))
    whole = ask(speaker, "def add")
    shown: list[str] = []
    said = ask(speaker, "def add", show=shown.append, stopped=lambda: len(shown) == 4)
    assert said.end == "stopped"
    assert said.tokens == whole.tokens[:4]
    assert said.told().endswith(", stopped")


def test_raw_text_goes_on_without_the_template(folder: Path) -> None:
    raw = Speaker(str(folder / "chatty"), Speech(raw=True))
    chatty, plain = (Speaker(str(folder / name), Speech()) for name in ("chatty", "plain"))
    row = Row(prompt="def add", origin="test")
    assert raw.encode(row) == plain.encode(row)
    assert raw.encode(row) != chatty.encode(row)
    assert raw.encode(Row(text="def add")) == raw.encode(row)
    assert (raw.chats, chatty.chats, plain.chats) == (False, True, False)


def test_the_switch_of_the_template(folder: Path) -> None:
    row = Row(prompt="def add", origin="test")
    off, on, left = (
        Speaker(str(folder / "chatty"), Speech(thinking=v)).encode(row) for v in (False, True, None)
    )
    assert off != on
    assert left in (on, off)


WRONG = {
    "no such model": ("nosuch", {}, NotFound, "MODEL: no model folder, run or Hub repository"),
    "no template for a system": ("plain", {"system": "x"}, RecipeError, "--system: .* has no chat template"),
    "no template for thinking": ("plain", {"thinking": True}, RecipeError, "--thinking: .* has no chat"),
    "no such switch": ("strict", {}, None, ""),
    "system refused": (
        "strict",
        {"system": "x"},
        DataError,
        r"MODEL: the chat template refuses .*\(no system",
    ),
    "unknown type": ("unknown", {}, ModelError, "unknown: .*nosuchtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_model_cannot_do(case: str, folder: Path, tmp_path: Path) -> None:
    name, given, error, message = WRONG[case]
    if name == "unknown":
        (tmp_path / name).mkdir()
        for file in (folder / "plain").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "config.json").write_text('{"model_type": "nosuchtype"}', encoding="utf-8")
        name = str(tmp_path / name)
    else:
        name = str(folder / name) if name != "nosuch" else name
    if error is None:
        assert Speaker(name, Speech(**given)).chats
        return
    with pytest.raises(error, match=message) as caught:
        Speaker(name, Speech(**given))
    assert isinstance(caught.value, DistillError)
    assert len(str(caught.value).splitlines()) == 1


def test_a_template_without_the_switch(folder: Path, tmp_path: Path) -> None:
    loaded = models.load(str(folder / "plain"), "test")
    tokenizer = talkers.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}</s>")
    models.save(tmp_path / "fixed", loaded._replace(tokenizer=tokenizer))
    with pytest.raises(RecipeError, match="--thinking: .* has no `enable_thinking`; leave it out"):
        Speaker(str(tmp_path / "fixed"), Speech(thinking=False))


OPTIONS = {
    "--temperature: greater than or equal to 0; got -1.0": {"temperature": -1.0},
    "--temperature: a finite number; got nan": {"temperature": float("nan")},
    "--top-p: greater than 0; got 0.0": {"top_p": 0.0, "temperature": 1.0},
    "--top-p: less than or equal to 1; got 2.0": {"top_p": 2.0, "temperature": 1.0},
    "--top-k: greater than 0; got 0": {"top_k": 0, "temperature": 1.0},
    "--min-p: greater than or equal to 0; got -0.1": {"min_p": -0.1, "temperature": 1.0},
    "--max-tokens: greater than 0; got 0": {"max_tokens": 0},
    "--seed: greater than or equal to 0; got -1": {"seed": -1},
    "--top-k and --top-p cut what is drawn from; --temperature 0 draws nothing": {"top_k": 5},
    "--min-p cuts what is drawn from; --temperature 0 draws nothing": {"min_p": 0.1},
    "--system is empty; leave it out": {"system": " "},
    "--system is for the chat template, and --raw leaves that out": {"system": "x", "raw": True},
    "--thinking is for the chat template, and --raw leaves that out": {"thinking": False, "raw": True},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_wrong_options_in_the_words_of_the_command_line(message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        speech(**OPTIONS[message])
    assert str(caught.value) == message


def test_numbers_of_an_answer() -> None:
    said = Said("text", [1, 2, 3], "turn", 9, 4, 0.256, 41.2345)
    assert said.told() == "3 tokens, the first after 0.26 s, 41.2 tokens/s"
    assert said._replace(tokens_per_second=None, end="length").told() == (
        "3 tokens, the first after 0.26 s, cut off by --max-tokens"
    )


def test_common() -> None:
    pairs = [("abc", "abd"), ([1, 2], [1, 2, 3]), ("", "a"), ("x", "y")]
    assert [common(one, other) for one, other in pairs] == [2, 2, 0, 0]
