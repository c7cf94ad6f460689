"""The toy of simple self-distillation: the paper's digits, and that our sampler truncates in its order."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.ssd_toy import (
    BASE,
    TOP_P,
    TRAIN_TEMPERATURE,
    TRAIN_TOP_P,
    best,
    distilled,
    success,
    temper_first,
    truncate_first,
)
from mlx_distill.options import Sampling
from mlx_distill.sampling import distribution

STUDENT = distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P)


def ours(p: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """What the package draws from."""
    logits = mx.log(mx.array(p.astype(np.float32)))
    options = Sampling(temperature=temperature, top_p=top_p)
    return np.array(mx.exp(distribution(logits, options)), dtype=np.float64)


def theirs(p: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """What mlx-lm's sampler draws from."""
    from mlx_lm.sample_utils import apply_top_p

    log_p = apply_top_p(mx.log(mx.array(p.astype(np.float32)))[None], top_p)[0]
    return np.array(mx.softmax(log_p / temperature, axis=-1), dtype=np.float64)


def digits(share: float) -> str:
    return f"{100 * share:.2f}"


def test_the_paper_s_best_temperatures() -> None:
    """Base 8.33 % at 0.639, student 13.77 % at 2.094 (paper: 8.32 at .639, 13.77 at 2.091)."""
    base, student = best(BASE), best(STUDENT)
    assert (digits(base.success), base.temperature) == ("8.33", 0.639)
    assert (digits(student.success), student.temperature) == ("13.77", 2.094)
    at_one = [digits(success(model, 1.0, TOP_P)) for model in (BASE, STUDENT)]
    assert at_one == ["6.45", "10.62"]
    assert [digits(success(model, 2.09, TOP_P)) for model in (BASE, STUDENT)] == ["0.39", "13.77"]


def test_entropies_and_supports_are_those_of_the_paper() -> None:
    entropy = [float(-(p * np.log2(p)).sum()) for p in (BASE.lock, BASE.fork)]
    assert np.round(entropy, 2).tolist() == [1.61, 2.81]
    assert [int((p > 0).sum()) for p in STUDENT] == [4, 5, 2]


@pytest.mark.parametrize(
    ("top_p", "gain"), [(0.65, 3.96), (0.7, 3.08), (0.75, 4.18), (0.8, 5.44), (0.85, 2.03), (0.9, 1.35)]
)
def test_gain_over_the_best_base_at_each_top_p(top_p: float, gain: float) -> None:
    found = 100 * (best(STUDENT, top_p).success - best(BASE, top_p).success)
    assert round(found, 2) == gain


def test_without_truncation_nothing_is_gained_at_any_temperature() -> None:
    """Temperature 1 is a fixed point. Another one only moves the best temperature: the two multiply."""
    base = best(BASE)
    assert best(distilled(1.0, 1.0)) == base  # to the last bit
    for temperature in (0.5, 0.9, 1.5):
        found = best(distilled(temperature, 1.0))
        assert found.success == pytest.approx(base.success, rel=1e-3)
        assert found.temperature == pytest.approx(base.temperature / temperature, abs=1e-3)
    assert best(distilled(1.0, TRAIN_TOP_P)).success > 1.2 * base.success  # it is the truncation that pays


def test_our_sampler_tempers_first() -> None:
    """The student built by `sampling.distribution` is the paper's; by mlx-lm's order it gains 2 points."""
    student = distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P, ours)
    for mine, exact in zip(student, STUDENT, strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-6)
    assert digits(success(BASE, 0.639, TOP_P, ours)) == "8.33"
    assert digits(success(student, 2.094, TOP_P, ours)) == "13.77"

    wrong = distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P, theirs)
    for mine, exact in zip(wrong, distilled(TRAIN_TEMPERATURE, TRAIN_TOP_P, truncate_first), strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-6)
    assert (
        digits(best(wrong).success) == digits(best(distilled(0.9, 0.85, truncate_first)).success) == "10.45"
    )
    assert np.abs(wrong.lock - STUDENT.lock).max() > 0.03


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_orders_agree_where_they_must(temperature: float, top_p: float) -> None:
    """At temperature 1, and without truncation; elsewhere they part."""
    same = all(
        np.allclose(temper_first(p, temperature, top_p), truncate_first(p, temperature, top_p), atol=1e-12)
        for p in BASE
    )
    assert same == (temperature == 1.0 or top_p == 1.0)
