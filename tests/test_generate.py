"""Batched greedy generation against the plainest way to write it."""

import mlx.core as mx
import numpy as np
from tiny import tiny_model

from mlx_distill.generate import Answer, generate

V = 50


def one_by_one(model, prompt, stop, max_tokens):
    """The definition: the whole sequence through the model for every token."""
    tokens, written = list(prompt), []
    while len(written) < max_tokens:
        token = int(mx.argmax(model(mx.array([tokens]))[0, -1]))
        if token in stop:
            return Answer(written, True)
        tokens.append(token)
        written.append(token)
    return Answer(written, False)


def prompts_of(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(2, V, size=random.integers(1, 20)).tolist() for _ in range(count)]


def test_batched_answers_are_the_definition_in_the_order_asked():
    model, prompts = tiny_model(V, seed=3).model, prompts_of(23)
    endless = [one_by_one(model, prompt, set(), 12) for prompt in prompts]
    stop = {endless[0].tokens[4], endless[1].tokens[0]}
    expected = [one_by_one(model, prompt, stop, 12) for prompt in prompts]
    assert {answer.finished for answer in expected} == {True, False}  # both ways to end occur
    for batch_size in (1, 4, 32):
        assert generate(model, prompts, stop, max_tokens=12, batch_size=batch_size) == expected


def test_no_prompts_no_answers():
    assert generate(tiny_model(V).model, [], {1}, max_tokens=5, batch_size=4) == []


def test_progress_counts_every_row():
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def progress(title, total, unit):
        seen.append((title, total, unit))
        yield lambda amount=1, **columns: seen.append((amount, columns["tokens_per_second"] > 0))

    model = tiny_model(V).model
    generate(model, prompts_of(5), {1}, max_tokens=3, batch_size=2, title="t", progress=progress)
    assert seen == [("t", 5, "rows")] + [(1, True)] * 5
