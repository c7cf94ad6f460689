"""Batched generation against the plainest way to write it, greedy and sampled."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import tiny_model

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.template import encode_prompt, end_of_turn_ids
from mlx_distill.generate import Answer, generate, keys_of
from mlx_distill.keys import key_word
from mlx_distill.options import Sampling
from mlx_distill.sampling import distribution

V = 50
WARM = Sampling(temperature=1.2, top_k=30, top_p=0.95)


def one_by_one(
    model: Any,
    prompt: list[int],
    stop: set[int],
    max_tokens: int,
    options: Sampling | None = None,
    word: int = 0,
) -> Answer:
    """The definition: the whole sequence through the model for every token, and noise for each place."""
    tokens, written = list(prompt), []
    while len(written) < max_tokens:
        log_p = distribution(model(mx.array([tokens]))[0, -1], options or Sampling())
        noise = (
            mx.zeros(V) if options is None else mx.random.gumbel((V,), key=mx.random.key(word + len(written)))
        )
        token = int(np.argmax(np.array(log_p, dtype=np.float64) + np.array(noise, dtype=np.float64)))
        if token in stop:
            return Answer(written, True, token)
        tokens.append(token)
        written.append(token)
    return Answer(written, False)


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, V, size=random.integers(1, 20)).tolist() for _ in range(count)]


def test_batched_answers_are_the_definition_in_the_order_asked() -> None:
    model, prompts = tiny_model(V, seed=3).model, prompts_of(23)
    endless = [one_by_one(model, prompt, set(), 12) for prompt in prompts]
    stop = {endless[0].tokens[4], endless[1].tokens[0]}
    expected = [one_by_one(model, prompt, stop, 12) for prompt in prompts]
    assert {answer.finished for answer in expected} == {True, False}  # both ways to end occur
    assert {answer.end for answer in expected} == {*stop, None}
    for batch_size in (1, 4, 32):
        assert generate(model, prompts, stop, max_tokens=12, batch_size=batch_size) == expected


def test_sampled_answers_are_the_definition() -> None:
    """Rows of all lengths, ending at all times, and each drawn with its own key at its own places."""
    model, prompts = tiny_model(V, seed=3).model, prompts_of(20)
    stop = {4, 5, 6}
    keys = [f"row {i}" for i in range(20)]
    expected = [
        one_by_one(model, prompt, stop, 9, WARM, key_word(7, f"answer {key}"))
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert {answer.finished for answer in expected} == {True, False}
    how: dict[str, Any] = {"max_tokens": 9, "sampling": WARM, "keys": keys, "seed": 7}
    for batch_size in (1, 7, 32):
        assert generate(model, prompts, stop, batch_size=batch_size, **how) == expected
    # Another seed, or the numbers of the neighbour, write something else.
    assert generate(model, prompts, stop, batch_size=7, **{**how, "seed": 8}) != expected
    assert generate(model, prompts, stop, batch_size=7, **{**how, "keys": keys[1:] + keys[:1]}) != expected


def shuffled(count: int) -> list[int]:
    return np.random.default_rng(1).permutation(count).tolist()


def same_whatever_the_batch(
    model: nn.Module, prompts: Sequence[list[int]], stop: set[int], length: int
) -> None:
    how: dict[str, Any] = {"max_tokens": length, "sampling": Sampling(temperature=1.0)}
    expected = generate(model, prompts, stop, batch_size=32, **how)
    assert len({tuple(answer.tokens) for answer in expected}) > len(prompts) / 2
    for batch_size in (1, 7):
        assert generate(model, prompts, stop, batch_size=batch_size, **how) == expected
    order, keys = shuffled(len(prompts)), keys_of(prompts)
    found = generate(
        model, [prompts[i] for i in order], stop, batch_size=32, keys=[keys[i] for i in order], **how
    )
    assert found == [expected[i] for i in order]


def test_samples_are_the_same_whatever_the_batch_and_the_order() -> None:
    prompts = prompts_of(12) * 2  # equal prompts are answered twice, each time anew
    same_whatever_the_batch(tiny_model(V, seed=3).model, prompts, {4}, 6)
    first, again = generate(
        tiny_model(V, seed=3).model,
        [[5, 6]] * 2,
        set(),
        max_tokens=20,
        batch_size=2,
        sampling=Sampling(temperature=1.0),
    )
    assert first != again


@pytest.mark.slow
def test_samples_of_a_learned_model_are_the_same_whatever_the_batch() -> None:
    """Hundreds of answers of the embedded teacher; see docs/generation.md for how rare a difference is."""
    loaded = models.load("embedded", "teacher.model")
    rows = pocket.rows("both", "train", 300)
    prompts = [encode_prompt(row, loaded.tokenizer) for row in rows]
    same_whatever_the_batch(loaded.model, prompts, end_of_turn_ids(loaded.tokenizer), 200)


def test_a_key_is_what_the_prompt_says_and_its_number_among_equal_ones() -> None:
    keys = keys_of([[1, 2], [12], [1, 2], [1], [1, 2]])
    assert len(set(keys)) == 5
    assert keys_of([[12], [1, 2], [1, 2], [1, 2]]) == [keys[1], keys[0], keys[2], keys[4]]


def test_nothing_beyond_the_vocabulary_is_written() -> None:
    model, prompts = tiny_model(V, seed=3).model, prompts_of(9)
    for sampling in (None, Sampling(temperature=3.0)):
        how: dict[str, Any] = {"max_tokens": 20, "batch_size": 4, "sampling": sampling}
        tokens = [answer.tokens for answer in generate(model, prompts, set(), vocabulary=10, **how)]
        assert max(map(max, tokens)) < 10
        assert max(max(answer.tokens) for answer in generate(model, prompts, set(), **how)) >= 10


def test_no_prompts_no_answers() -> None:
    assert generate(tiny_model(V).model, [], {1}, max_tokens=5, batch_size=4) == []


def test_progress_counts_every_row() -> None:
    from contextlib import contextmanager

    seen: list[Any] = []

    @contextmanager
    def progress(title: str, total: int, unit: str) -> Any:
        seen.append((title, total, unit))
        yield lambda amount=1, **columns: seen.append(
            (amount, columns["tokens_per_second"] > 0, columns.get("unfinished", 0))
        )

    model = tiny_model(V).model
    generate(model, prompts_of(5), {1}, max_tokens=3, batch_size=2, title="t", progress=progress)
    assert seen == [("t", 5, "rows")] + [(1, True, number) for number in range(1, 6)]
