"""What tokens are drawn from, against its definition in NumPy, and the random numbers of each row."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import tiny_model

from mlx_distill.keys import key_word
from mlx_distill.options import Sampling
from mlx_distill.sampling import Draws, Sampler, distribution, gumbel_noise

RANDOM = np.random.default_rng(0)
OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.999},
]


def definition(logits: np.ndarray, options: Sampling) -> np.ndarray:
    """Probabilities of one row in float64: temper, keep the first k, keep the fewest that hold p."""
    if options.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    tempered = np.exp((logits - logits.max()) / options.temperature)
    order = np.argsort(-tempered, kind="stable")[: options.top_k]
    p = tempered[order] / tempered[order].sum()
    fewest = next(n for n in range(1, len(p) + 1) if n == len(p) or p[:n].sum() >= options.top_p)
    found = np.zeros(len(logits))
    found[order[:fewest]] = p[:fewest] / p[:fewest].sum()
    return found


def found(logits: np.ndarray, options: Sampling) -> np.ndarray:
    return np.exp(np.array(distribution(mx.array(logits.astype(np.float32)), options), dtype=np.float64))


@pytest.mark.parametrize("given", [{}, *OPTIONS])
def test_distribution_is_its_definition(given: dict[str, Any]) -> None:
    options = Sampling(**given)
    logits = RANDOM.normal(0, 3, size=(4, 6, 40))
    expected = np.apply_along_axis(definition, -1, logits, options)
    values = found(logits, options)
    assert values.shape == logits.shape
    np.testing.assert_array_equal(values > 0, expected > 0)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_equal_logits_keep_the_first() -> None:
    """As many as asked for, not one more, in whatever order a sort leaves equal values."""
    logits = np.array([[1.0, 2, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    assert (found(logits, Sampling(temperature=1.0, top_k=3)) > 0).tolist() == [
        [False, True, True, True, False, False],
        [True, True, True, False, False, False],
    ]
    half = found(logits, Sampling(temperature=1.0, top_p=0.5))
    assert np.flatnonzero(half[1]).tolist() == [0, 1, 2]
    assert np.flatnonzero(found(logits, Sampling())[0]).tolist() == [1]
    # bfloat16 makes many of them.
    coarse = mx.array(RANDOM.normal(0, 1, size=(20, 300)).astype(np.float32)).astype(mx.bfloat16)
    kept = distribution(coarse, Sampling(temperature=1.0, top_k=50)) > -mx.inf
    assert kept.sum(axis=-1).tolist() == [50] * 20


def test_tokens_without_a_chance_get_none() -> None:
    logits = np.array([[0.0, -np.inf, 1.0, -np.inf]])
    for given in OPTIONS:
        values = found(logits, Sampling(**given))
        assert np.isfinite(values).all()
        assert values[0, [1, 3]].tolist() == [0, 0]
        assert values.sum() == pytest.approx(1)


def toy(head: list[float], ratio: float) -> np.ndarray:
    """Log-probabilities over 16 tokens: a head, and twelve more whose mass falls by `ratio` (papers 1.5)."""
    tail = ratio ** np.arange(12)
    return np.log(np.array([*head, *(tail / tail.sum() * (1 - sum(head)))]))[None]


def test_the_order_is_temperature_then_the_cut() -> None:
    """The toy's lock at temperature 1.6 and top-p .8: 7 tokens. The usual mistake, to cut first, leaves 2."""
    lock = toy([0.750, 0.055, 0.050, 0.037], 0.75)
    right = found(lock, Sampling(temperature=1.6, top_p=0.8))
    assert (right > 0).sum() == 7
    cut_first = found(lock, Sampling(temperature=1.0, top_p=0.8)) ** (1 / 1.6)
    wrong = cut_first / cut_first.sum()
    assert (wrong > 0).sum() == 2
    assert np.abs(wrong - right).sum() / 2 == pytest.approx(0.356, abs=1e-3)


def test_noise_of_a_row_is_that_of_its_key() -> None:
    """Whatever stands around it; and each key has its own."""
    words = RANDOM.integers(0, 2**32, size=(5, 2), dtype=np.uint32)
    together = np.array(gumbel_noise(mx.array(words), 30))
    alone = [np.array(mx.random.gumbel((30,), key=mx.array(word))) for word in words]
    np.testing.assert_array_equal(together, np.stack(alone))
    assert len(np.unique(together)) == together.size
    key = key_word(3, "answer x")
    assert mx.array_equal(mx.random.key(key), mx.array([key >> 32, key & 0xFFFFFFFF], dtype=mx.uint32))


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    options, logits = Sampling(temperature=1.3, top_k=6), mx.array(RANDOM.normal(0, 1.5, size=(1, 20)))
    log_p = distribution(logits, options)
    keys = Draws(np.arange(20_000, dtype=np.uint64)).advance(1)
    drawn = mx.argmax(log_p + gumbel_noise(keys, 20), axis=-1)
    p = np.exp(np.array(log_p[0], dtype=np.float64))
    share = np.bincount(np.array(drawn), minlength=20) / 20_000
    assert (np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / 20_000) + 1e-12).all()


def numbers(draws: Draws, tokens: int) -> list[int]:
    """The keys of one step, as numbers."""
    return [int(high) << 32 | int(low) for high, low in np.array(draws.advance(tokens)).tolist()]


def test_a_row_keeps_its_numbers_as_others_come_and_go() -> None:
    rows = Draws.merge([Draws(np.array([key], dtype=np.uint64)) for key in (100, 200, 2**32 - 1)])
    rows.prepare(lengths=[3, 1, 2], right_padding=[0, 2, 1])  # prompts of 4, 2 and 3 tokens, all but the last
    rows.advance(3)
    rows.finalize()
    assert numbers(rows, 1) == [103, 201, 2**32 + 1]  # the last token of each prompt
    rows.filter([2, 0])
    assert numbers(rows, 1) == [2**32 + 2, 104]
    rows.extend(Draws(np.array([7], dtype=np.uint64)))
    assert numbers(rows, 1) == [2**32 + 3, 105, 7]


def test_tokens_beyond_the_vocabulary_are_never_written() -> None:
    model = tiny_model(50).model
    tokens = mx.array([[1, 2, 3]])
    for options in (Sampling(), Sampling(temperature=1.0)):
        sampler = Sampler(model, options, 20)
        assert sampler(tokens, sampler.cache(5, 3)).shape == (1, 3, 20)


def test_the_memory_of_a_row_grows_in_small_pieces() -> None:
    """Alone and in a batch, where mlx-lm takes 256 places at once; what comes out is the same."""
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_distill.row_cache import STEP, row_cache

    model: Any = tiny_model(50).model
    tokens = mx.array([[1, 2, 3, 4]])
    alone, rows = row_cache(model), [row_cache(model) for _ in range(2)]
    together = [layer.merge([row[i] for row in rows]) for i, layer in enumerate(alone)]
    plain = make_prompt_cache(model)
    for _ in range(20):
        expected = model(tokens, cache=plain)
        assert mx.array_equal(model(tokens, cache=alone), expected)
        assert mx.allclose(model(mx.concatenate([tokens] * 2), cache=together)[:1], expected, atol=1e-5)
    for cache in (alone, together):
        assert cache[0].keys.shape[2] == 2 * STEP
