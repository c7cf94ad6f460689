"""Drawn tokens: what they stand for on average, and that the likeliest ones do not."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import rows_of, tiny_model, tiny_recipe

from mlx_distill.cache import CachedTeacher, capture, write_cache
from mlx_distill.cache.sampled import draw, shares, uniforms
from mlx_distill.cache.shards import key_of
from mlx_distill.data.batch import make_batch
from mlx_distill.errors import RecipeError
from mlx_distill.losses import Targets, Top, forward_kl
from mlx_distill.losses.outcomes import LOWEST_LOG_P, top_of
from mlx_distill.teacher import LiveTeacher

V = 700  # more than one block


def logits_of(places: int, seed: int = 0) -> mx.array:
    return mx.array(2 * np.random.default_rng(seed).standard_normal((places, V)), dtype=mx.float32)


def softmax(logits: mx.array, temperature: float = 1.0) -> np.ndarray:
    p = np.exp(np.array(logits, dtype=np.float64) / temperature)
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_draw_is_where_the_random_number_falls(temperature: float) -> None:
    """Against the inverse of the summed-up distribution, in float64."""
    logits = logits_of(4)
    random = np.random.default_rng(1).random((4, 500))
    found = draw(logits, temperature, random)
    ends = np.cumsum(softmax(logits, temperature), axis=-1)
    expected = np.stack([np.searchsorted(e, r) for e, r in zip(ends, random, strict=True)])
    assert (found == expected).mean() > 0.998  # float32 softmax: a few fall just beside the border
    assert (draw(logits, 3 * temperature, random) == expected).mean() < 0.7


def test_what_cannot_be_is_never_drawn() -> None:
    logits = mx.full((2, V), -float("inf"))
    logits[:, 3] = 0.0
    logits[1, 600] = 1.0
    edges = np.array([[0.0, 0.5, np.nextafter(1, 0)]] * 2)
    assert draw(logits, 1.0, edges).tolist() == [[3, 3, 3], [3, 600, 600]]


def test_shares_count_each_token_once() -> None:
    log_p = shares(np.array([[4, 4, 4, 7], [1, 2, 2, 9], [9, 9, 9, 9]]))
    off = LOWEST_LOG_P
    expected = [[np.log(0.75), off, off, np.log(0.25)], [np.log(0.25), np.log(0.5), off, np.log(0.25)]]
    np.testing.assert_allclose(log_p, [*expected, [0, off, off, off]], rtol=1e-6)


def gradient(student: mx.array, targets: Targets) -> np.ndarray:
    def total(student: mx.array) -> mx.array:
        return forward_kl(student, targets).sum(-1).sum()

    found: Any = mx.grad(total)(student)
    return np.array(found[0], dtype=np.float64)


def test_the_gradient_of_drawn_tokens_is_right_on_average_and_that_of_the_likeliest_is_not() -> None:
    """forward_kl of a student against the whole distribution; 20 tokens stored in each of 400 ways."""
    places, kept, ways = 3, 20, 400
    teacher, student = logits_of(places), logits_of(places, seed=5)[None]
    labels = mx.zeros((1, places), dtype=mx.int32)
    exact = gradient(student, Targets(labels, logits=teacher[None]))
    mean, single = np.zeros_like(exact), []
    for way in range(ways):
        drawn = np.sort(draw(teacher, 1.0, uniforms(way, b"row", places, kept)), axis=-1)
        top = Top(mx.array(drawn[None]), mx.array(shares(drawn)[None]), None)
        found = gradient(student, Targets(labels, top=top))
        mean += found / ways
        single.append(np.square(found - exact).sum())
    error = np.square(mean - exact).sum()
    # Independent draws: the square of the error of their mean is that of one of them over their number.
    assert error < 1.3 * np.mean(single) / ways
    likeliest = top_of(teacher[None], kept)
    without_tail = gradient(student, Targets(labels, top=likeliest._replace(log_tail=None)))
    shares_of = likeliest.log_p - mx.logsumexp(likeliest.log_p, axis=-1, keepdims=True)
    renormalised = gradient(student, Targets(labels, top=Top(likeliest.indices, shares_of, None)))
    for biased in (without_tail, renormalised):  # the same each time, so no number of rows helps
        assert np.square(biased - exact).sum() > 25 * error


ROWS = rows_of([9, 4, 13, 7], vocabulary=V)


@pytest.fixture(scope="module")
def live() -> LiveTeacher:
    return LiveTeacher(tiny_model(V, seed=9), V)


def drawn_of(teacher: CachedTeacher, rows: list[int], of: list[Any] = ROWS) -> dict[int, np.ndarray]:
    """Token ids at each place of rows, by their number."""
    batch = make_batch([of[i] for i in rows])._replace(rows=tuple(rows))
    top = teacher.targets(batch).top
    assert top is not None
    assert top.log_tail is None
    counts = [len(of[i].tokens) - of[i].start for i in rows]
    indices, log_p = np.array(top.indices[0])[: sum(counts)], np.array(top.log_p[0])[: sum(counts)]
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    return dict(zip(rows, np.split(indices, np.cumsum(counts)[:-1]), strict=True))


def test_draws_belong_to_seed_row_and_place(
    live: LiveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the order of rows, nor to what shares their batch or shard."""
    write_cache(tmp_path / "one", live, ROWS, made_of={}, sampled=16, seed=3)
    one = drawn_of(CachedTeacher(tmp_path / "one", ROWS, {}), [0, 1, 2, 3])
    monkeypatch.setattr(capture, "SHARD", 5)
    turned = [ROWS[i] for i in (2, 0, 3, 1)]
    write_cache(tmp_path / "two", live, turned, made_of={}, sampled=16, seed=3)
    two = drawn_of(CachedTeacher(tmp_path / "two", ROWS, {}), [3, 1, 2, 0])
    for row in range(4):
        np.testing.assert_array_equal(one[row], two[row])
    logits = live.logits(make_batch([ROWS[0]]).tokens)[0, 2:11]
    expected = draw(logits, 1.0, uniforms(3, key_of(ROWS[0]), 9, 16))
    np.testing.assert_array_equal(np.sort(one[0]), np.sort(expected))
    assert any((one[0][i] != one[0][i + 1]).any() for i in range(8))
    write_cache(tmp_path / "three", live, ROWS, made_of={}, sampled=16, seed=4)
    assert not np.array_equal(drawn_of(CachedTeacher(tmp_path / "three", ROWS, {}), [0])[0], one[0])


def test_only_losses_that_are_linear_in_the_teachers_probabilities() -> None:
    drawn = {"source": "cache", "sampled": 50}
    tiny_recipe(teacher=drawn)
    tiny_recipe(teacher=drawn, objective={"forward_kl": {"temperature": 2.0}, "hidden_mse": {}})
    for loss in ("jensen_shannon", "reverse_kl", "total_variation"):
        with pytest.raises(
            RecipeError, match=rf"`teacher.sampled` gives the right .* `objective.{loss}` is not"
        ):
            tiny_recipe(teacher=drawn, objective={"forward_kl": {}, loss: {}})
    with pytest.raises(RecipeError, match=r"`teacher.sampled` is for source 'cache'; a live"):
        tiny_recipe(teacher={"source": "auto", "sampled": 50})
    with pytest.raises(RecipeError, match="`sampled` stands in place of `top_k`"):
        tiny_recipe(teacher={"source": "cache", "sampled": 50, "top_k": 5})
