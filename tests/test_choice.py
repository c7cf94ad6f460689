"""Multiple choice against its definition, one choice at a time in NumPy float64; and the usual mistakes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import SHAPE

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt
from mlx_distill.errors import DataError
from mlx_distill.evaluate import choice
from mlx_distill.evaluate.choice import choose, encode_choice, log_likelihoods
from mlx_distill.models import Loaded
from mlx_distill.models.head import Head
from mlx_distill.options import Shape

# As Qwen3 does: an empty block of thoughts before an answer, and in the prompt if asked not to think.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ROWS = [
    Row(prompt="def solve(x):", choices=(" return x", " return x + 1\n    # and more", "x"), right=1),
    Row(prompt="2 + 2 = ", choices=("3", "4", "5", "6"), right=1),
    Row(prompt="Any? " * 12, choices=("é", "日本語", "no"), right=0),
    Row(prompt="a", choices=("yes", "no"), right=1),
    Row(prompt="2 + 2 is ", choices=("3", "4"), right=0),
]


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    tokenizer = models.load("embedded", "tests").tokenizer
    return models.build(Shape(**{**SHAPE, "max_position_embeddings": 256}), tokenizer, 0)


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    return models.load_tokenizer(shared / "tokenizers" / "qwen2.5", {"model_type": "none"})


def definition(loaded: Loaded, row: Row) -> list[float]:
    """The log-probability of each choice, read alone and unpadded."""
    found, tokenizer = [], loaded.tokenizer
    for text in row.choices:
        prompt, answer = encode_prompt(row, tokenizer), tokenizer.encode(text, add_special_tokens=False)
        logits = np.array(loaded.model(mx.array([prompt + answer]))[0], dtype=np.float64)[:, : len(tokenizer)]
        log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found.append(float(sum(log_q[place, token] for place, token in zip(places, answer, strict=True))))
    return found


def test_batched_values_are_those_of_each_choice_alone(tiny: Loaded) -> None:
    encoded = [encode_choice(row, text, tiny.tokenizer) for row in ROWS for text in row.choices]
    found = log_likelihoods(tiny.model, encoded, len(tiny.tokenizer))
    expected = [value for row in ROWS for value in definition(tiny, row)]
    assert found == pytest.approx(expected, abs=1e-5)
    alone = [log_likelihoods(tiny.model, [one], len(tiny.tokenizer))[0] for one in encoded]
    assert found == pytest.approx(alone, abs=1e-5)
    # The usual mistakes: padding counted, the prompt counted.
    padded = [replaced(one, 30) for one in encoded]
    assert log_likelihoods(tiny.model, padded, len(tiny.tokenizer)) != pytest.approx(expected, abs=1)
    whole = [one._replace(start=1) for one in encoded]
    assert log_likelihoods(tiny.model, whole, len(tiny.tokenizer)) != pytest.approx(expected, abs=1)


def replaced(one: Encoded, width: int) -> Encoded:
    return one._replace(tokens=one.tokens + [0] * width)


def test_the_order_of_the_rows_leaves_each_value_alone(tiny: Loaded) -> None:
    encoded = [encode_choice(row, text, tiny.tokenizer) for row in ROWS for text in row.choices]
    order = np.random.default_rng(0).permutation(len(encoded))
    found = log_likelihoods(tiny.model, encoded, len(tiny.tokenizer))
    shuffled = log_likelihoods(tiny.model, [encoded[i] for i in order], len(tiny.tokenizer))
    assert shuffled == pytest.approx(found[order], abs=1e-5)


def test_what_is_taken_and_why_it_is_wrong(tiny: Loaded) -> None:
    metrics, verdicts = choose(tiny, ROWS, len(tiny.tokenizer))
    values = [definition(tiny, row) for row in ROWS]
    for row, (score, why, text), found in zip(ROWS, verdicts, values, strict=True):
        assert row.right is not None
        taken = int(np.argmax(found))
        assert text == row.choices[taken] and score == (taken == row.right)
        behind = found[taken] - found[row.right]
        expected = f"right is {row.choices[row.right]!r}, {behind:.2f} nats less likely"
        assert why == (None if score else expected)
    right = [int(np.argmax(found)) == row.right for row, found in zip(ROWS, values, strict=True)]
    by_bytes = [
        int(np.argmax([value / len(text.encode()) for value, text in zip(found, row.choices, strict=True)]))
        == row.right
        for row, found in zip(ROWS, values, strict=True)
    ]
    share = np.mean(right)
    assert metrics == {
        "accuracy": pytest.approx(share),
        "accuracy_stderr": pytest.approx(np.sqrt(share * (1 - share) / 4)),
        "accuracy_normalised": pytest.approx(np.mean(by_bytes)),
        "choices": 5,
    }


@pytest.mark.parametrize(
    ("values", "accuracy", "normalised"),
    [
        ([-4.0, -2.0], 1, 1),
        ([-1.0, -1.1], 0, 1),
        ([-2.0, -2.0], 0, 1),  # the first of equals
        ([-1.0, -7.0], 0, 0),  # as likely a byte: the first
        ([-1.0, -6.0], 0, 1),  # bytes, not the four characters of it
        ([np.nan, np.nan], 0, 0),
        ([np.nan, -1.0], 0, 0),
        ([-1.0, np.nan], 0, 0),  # NumPy's argmax is where the first NaN is
    ],
)
def test_the_first_of_the_likeliest_is_taken(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch, values: list[float], accuracy: int, normalised: int
) -> None:
    row = Row(prompt="p", choices=("a", "日本x"), right=1)
    assert len("日本x".encode()) == 7
    monkeypatch.setattr(choice, "log_likelihoods", lambda *_, **__: np.array(values))
    metrics, [(score, why, text)] = choose(tiny, [row], len(tiny.tokenizer))
    assert (metrics["accuracy"], metrics["accuracy_normalised"], score) == (accuracy, normalised, accuracy)
    assert (why is None) == bool(accuracy) and text in row.choices


def test_long_choices_are_in_no_batch_larger_than_allowed(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are made of counted tokens alone, 7 at a time; where a head cannot be split, of few rows."""
    encoded = [encode_choice(row, text, tiny.tokenizer) for row in ROWS for text in row.choices]
    vocabulary = len(tiny.tokenizer)
    expected, made, read = log_likelihoods(tiny.model, encoded, vocabulary), [], []

    class Watched(Head):
        def logits(self, hidden: mx.array, parameters: Any = None) -> mx.array:
            made.append(hidden.shape[:2])
            return super().logits(hidden, parameters)

        def hidden(self, tokens: mx.array) -> mx.array:
            read.append(tokens.shape)
            return super().hidden(tokens)

    class Whole(Watched):
        def __init__(self, *given: Any):
            super().__init__(*given)
            self._projection, self.whole = None, True
            read.clear()

    monkeypatch.setattr(choice, "LOGITS", 7 * vocabulary + 1)
    monkeypatch.setattr(choice, "Head", Watched)
    assert log_likelihoods(tiny.model, encoded, vocabulary) == pytest.approx(expected, abs=1e-5)
    assert max(places for _, places in made) == 7
    counted = sum(len(one.tokens) - one.start for one in encoded)
    checked = 4  # places of Head's own check
    assert sum(rows * places for rows, places in made) <= counted + checked
    assert len(read) < 6

    monkeypatch.setattr(choice, "LOGITS", 64 * vocabulary)
    monkeypatch.setattr(choice, "Head", Whole)
    assert log_likelihoods(tiny.model, encoded, vocabulary) == pytest.approx(expected, abs=1e-5)
    assert max(rows for rows, _ in read) == 4 and max(rows * width for rows, width in read) == 64


def test_letters_are_read_once_for_all(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one token each need one pass, not one a choice."""
    row = ROWS[1]
    encoded = [encode_choice(row, text, tiny.tokenizer) for text in row.choices]
    assert len({tuple(one.tokens[:-1]) for one in encoded}) == 1
    expected, read = definition(tiny, row), []

    class Watched(Head):
        def hidden(self, tokens: mx.array) -> mx.array:
            read.append(tokens.shape[0])
            return super().hidden(tokens)

    monkeypatch.setattr(choice, "Head", Watched)
    assert log_likelihoods(tiny.model, encoded, len(tiny.tokenizer)) == pytest.approx(expected, abs=1e-5)
    assert read[-1] == 1


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("The capital of France is P", ("aris", "rague")),  # a word that goes on
        ("Answer: ", ("Paris", " Rome")),  # a space that belongs to the next word
        ("x = [1,\n", ("\n2]", "2]")),
        ("é = e\u0301? ", ("\u0301", "no")),  # an accent that joins the letter before
    ],
)
def test_every_choice_stands_behind_the_same_prompt(qwen: Any, prompt: str, choices: tuple[str, ...]) -> None:
    """Also where prompt and choice would merge into other tokens, tokenised together."""
    tokenizer = Plain(qwen)
    row = Row(prompt=prompt, choices=choices, right=0)
    before = encode_prompt(row, tokenizer)
    for text in choices:
        tokens, start, _ = encode_choice(row, text, tokenizer)
        assert tokens[:start] == before
        assert tokens[start:] == tokenizer.encode(text, add_special_tokens=False)
        answer = encode(replace(row, completion=text), tokenizer)
        assert answer.tokens == [*tokens, tokenizer.eos_token_id]  # what it learns from, and goes on with
    together = [tokenizer.encode(prompt + text, add_special_tokens=False) for text in choices]
    assert any(whole[: len(before)] != before for whole in together)  # the usual mistake shows here


class Plain:
    """A tokenizer without its chat template."""

    chat_template, has_chat_template = None, False

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_in_a_chat_a_choice_is_the_assistants_answer(qwen: Any) -> None:
    question = {"role": "user", "content": "2 + 2?"}
    asked = Row(messages=(question,), choices=("4", "It is 5."), right=0)
    told = replace(asked, messages=(question, {"role": "assistant", "content": "It is 4."}))
    prompt = replace(asked, messages=None, prompt="2 + 2?", completion="4")
    for row in (asked, told, prompt):
        for text in row.choices:
            tokens, start, _ = encode_choice(row, text, qwen)
            assert qwen.decode(tokens[:start]).endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")
            assert qwen.decode(tokens[start:]) == text


def test_what_a_template_writes_before_an_answer_is_no_part_of_a_choice() -> None:
    tokenizer = models.load("embedded", "tests").tokenizer._tokenizer
    tokenizer.chat_template, tokenizer.has_chat_template = THINKING, True
    row = Row(prompt="2 + 2?", choices=("4", " five"), right=0)
    for text in row.choices:
        tokens, start, _ = encode_choice(row, text, tokenizer)
        assert tokenizer.decode(tokens[start:]) == text.strip()
        assert tokenizer.decode(tokens[:start]).endswith("<assistant><think>\n\n</think>\n\n")
        # Counted as it is for training, the block would weigh less on the longer choice, a byte.
        assert encode(replace(row, completion=text), tokenizer).start < start


def test_a_good_model_knows_the_answer() -> None:
    """The embedded teacher finds the program that does what the question says among others' programs."""
    teacher = models.load("embedded", "tests")
    made = pocket.rows("code", "test", 12)
    programs = [row.completion or "" for row in made]
    rows = [
        replace(row, choices=tuple(programs[i - 2 : i + 2] if i > 1 else programs[:4]), right=min(i, 2))
        for i, row in enumerate(made[:10])
    ]
    assert all(row.choices[row.right or 0] == row.completion for row in rows)
    metrics, _ = choose(teacher, rows, len(teacher.tokenizer))
    assert metrics["accuracy"] == 1


def test_rows_that_cannot_be_judged_are_refused(tiny: Loaded) -> None:
    vocabulary = len(tiny.tokenizer)
    with pytest.raises(DataError, match="^choice: no rows with `choices`"):
        choose(tiny, [], vocabulary)
    with pytest.raises(DataError, match="^x:1: no `choices` with an `answer`"):
        choose(tiny, [Row(prompt="a", origin="x:1")], vocabulary)
    with pytest.raises(DataError, match="^x:2: no `choices` with an `answer`"):
        choose(tiny, [Row(prompt="a", choices=("b", "c"), right=2, origin="x:2")], vocabulary)
    with pytest.raises(DataError, match="^x:3: plain `text` has no prompt"):
        choose(tiny, [Row(text="a", choices=("b", "c"), right=1, origin="x:3")], vocabulary)
