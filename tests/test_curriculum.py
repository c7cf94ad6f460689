"""Paces: how often a row comes at each part of a run, by how difficult it is."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tiny import rows_of

from mlx_distill.data.batch import Batches, width_of
from mlx_distill.data.curriculum import competence, paced, ranks
from mlx_distill.data.drawn import DrawnBatches
from mlx_distill.data.mixture import shares
from mlx_distill.options import Curriculum

N, TOTAL = 600, 500
LENGTHS = np.random.default_rng(0).integers(5, 75, size=N).tolist()
ROWS = rows_of(LENGTHS)
DIFFICULTY = np.random.default_rng(1).normal(size=N)
COSTS = np.array([width_of(len(row.tokens)) for row in ROWS])


def made(
    *, difficulty: np.ndarray = DIFFICULTY, sources: list[str] | None = None, seed: int = 0, **options: Any
) -> DrawnBatches:
    sources = sources or ["all"] * N
    weights: dict[str, float | None] = dict.fromkeys(set(sources), 1.0)
    given = Curriculum(by="length", **options)
    rates = paced(given, difficulty, shares(sources, weights), sources, COSTS, seed)
    return DrawnBatches(ROWS, 1024, seed, total=TOTAL, rates=rates, sources=sources)


def drawn(batches: Any, first: int = 0, last: int = TOTAL) -> np.ndarray:
    """How often each row came in some batches, (rows,)."""
    return np.bincount([i for at in range(first, last) for i in batches[at].rows], minlength=N)


def places(difficulty: np.ndarray = DIFFICULTY) -> np.ndarray:
    return np.argsort(np.argsort(difficulty))


def test_ranks_are_places_and_equal_difficulties_are_drawn_lots_for() -> None:
    assert ranks(np.array([3.0, 1.0, 2.0]), 0).tolist() == [2, 0, 1]
    assert ranks(np.array([3.0, 1.0, 2.0]), 0, reverse=True).tolist() == [0, 2, 1]
    equal = ranks(np.repeat([1.0, 0.0], 50), 0)
    assert set(equal[50:]) == set(range(50))
    assert equal[50:].tolist() != sorted(equal[50:])  # and not as they stand in the file
    assert equal.tolist() != ranks(np.repeat([1.0, 0.0], 50), 1).tolist()


def test_competence_is_that_of_the_paper() -> None:
    """Platanios et al. 2019: sqrt(t (1 - c0^2) / T + c0^2), at most 1."""
    for start, until, steps in ((0.1, 0.5, 1000), (0.01, 1.0, 50), (1.0, 0.2, 10)):
        for step in range(0, steps, 7):
            t, whole = step, until * steps
            paper = min(1, (t * (1 - start**2) / whole + start**2) ** 0.5)
            assert competence(step / steps, start, until) == pytest.approx(paper)
    assert competence(0, 0.1, 0.5) == pytest.approx(0.1)
    assert competence(0.5, 0.1, 0.5) == 1
    # New rows at a falling rate: half of what is to come is there after less than half of the time.
    assert competence(0.25, 0.1, 0.5) > 0.55


@pytest.mark.parametrize("reverse", [False, True])
def test_competence_draws_evenly_from_the_easiest(reverse: bool) -> None:
    batches = made(pace="competence", start=0.2, until=0.6, reverse=reverse)
    place = N - 1 - places() if reverse else places()
    for at in range(0, 300, 10):
        allowed = competence(at / TOTAL, 0.2, 0.6) * N
        assert max(place[i] for i in batches[at].rows) < allowed
    early = drawn(batches, 0, 10)
    assert early[place >= 0.35 * N].sum() == 0
    late = drawn(batches, 320, TOTAL)
    assert late.min() > 0
    assert late.max() - late.min() <= 3  # all rows, each equally often
    easy = drawn(batches, 0, 60)[place < 0.2 * N]  # all of them were there from the first step on
    assert easy.max() - easy.min() <= 3


@pytest.mark.parametrize("reverse", [False, True])
def test_competence_is_of_steps_and_not_of_rows(reverse: bool) -> None:
    """By length: short rows fill few batches, and long ones many."""
    batches = made(
        pace="competence",
        start=0.2,
        until=0.8,
        difficulty=np.array(LENGTHS, dtype=np.float64),
        reverse=reverse,
    )
    lengths = np.sort(-np.array(LENGTHS) if reverse else LENGTHS)
    for at in range(0, 360, 20):
        seen = max(
            -LENGTHS[i] if reverse else LENGTHS[i] for j in range(at, at + 20) for i in batches[j].rows
        )
        earlier, now = (int(competence(t / TOTAL, 0.2, 0.8) * N) for t in (max(0, at - 40), at + 20))
        assert lengths[earlier - 1] - 2 <= seen <= lengths[now]


def test_sorted_takes_each_row_equally_often_and_in_order() -> None:
    batches = made(pace="sorted")
    counts = drawn(batches)
    assert np.percentile(counts, 5) >= counts.mean() - 2
    assert counts.max() <= counts.mean() + 3
    means = [np.mean([places()[i] for i in batches[at].rows]) / N for at in range(TOTAL)]
    for part in range(10):
        here = np.mean(means[part * 50 : part * 50 + 50])
        assert here == pytest.approx((part + 0.5) / 10, abs=0.03)
    turned = made(pace="sorted", reverse=True)
    assert np.mean([places()[i] for i in turned[3].rows]) > 0.9 * N


def test_sorted_by_length_goes_from_narrow_to_wide_and_loses_no_row() -> None:
    lengths = np.array(LENGTHS, dtype=np.float64)
    batches = made(pace="sorted", difficulty=lengths)
    widths = [batches[at].tokens.shape[1] for at in range(TOTAL)]
    assert widths[0] == min(widths)
    assert widths[-1] == max(widths)
    assert sum(later < one for one, later in pairwise(widths)) <= 6
    counts = drawn(batches)
    assert counts.min() > 0
    assert counts.max() < counts.mean() + 1
    # What is missing of a width never filled its last batch.
    assert (counts.mean() - 1 - counts).clip(0).sum() < sum(batches.size(width) for width in set(widths))


def test_weighted_draws_in_proportion_to_the_place() -> None:
    batches = made(pace="weighted")
    for first, last in ((0, TOTAL), (0, 100), (400, TOTAL)):  # the same throughout
        counts = drawn(batches, first, last)
        expected = 2 * (places() + 1) / (N + 1) * counts.mean()
        assert np.abs(counts - expected).max() <= 3
    counts = drawn(batches)
    assert counts[places() == N - 1] == pytest.approx(2 * counts.mean(), abs=2)
    turned = drawn(made(pace="weighted", reverse=True))
    assert turned[places() < N / 4].mean() > 3 * turned[places() >= 3 * N / 4].mean()


def test_padding_is_that_of_rows_in_random_order() -> None:
    plain = Batches(ROWS, 1024, 0)

    def padding(batches: Any) -> float:
        sizes = [(batch.rows, batch.tokens.size) for batch in (batches[at] for at in range(0, TOTAL, 3))]
        return 1 - sum(len(ROWS[i].tokens) - 1 for rows, _ in sizes for i in rows) / sum(n for _, n in sizes)

    for pace in ("sorted", "competence", "weighted"):
        assert padding(made(pace=pace)) < padding(plain) + 0.03
    # The usual mistake, neighbours in difficulty in one batch, whatever their length:
    order = np.argsort(DIFFICULTY)
    lengths = np.array([len(row.tokens) - 1 for row in ROWS])[order[: N // 16 * 16]].reshape(-1, 16)
    assert 1 - lengths.sum() / (lengths.max(-1) * 16).sum() > padding(plain) + 0.2


def test_sources_with_weights_keep_their_shares_and_have_lines_of_their_own() -> None:
    """One source is more difficult than the other throughout; both begin at once."""
    sources = ["train"] * 400 + ["replay.0"] * 200
    difficulty = np.arange(N, dtype=np.float64)
    batches = made(pace="sorted", sources=sources, difficulty=difficulty)
    of_train = np.array(sources) == "train"
    for first, last in ((0, 50), (200, 300), (430, TOTAL)):
        counts = drawn(batches, first, last)
        assert counts[of_train].sum() / counts.sum() == pytest.approx(0.5, abs=0.05)
    first = drawn(batches, 0, 50)
    assert first[:80].sum() > 0.45 * first.sum()
    assert first[400:440].sum() > 0.45 * first.sum()
    joined = drawn(made(pace="sorted", difficulty=difficulty), 0, 50)
    assert joined[400:].sum() == 0


def test_batch_i_is_a_function_of_seed_and_i_alone() -> None:
    one, other = made(pace="competence"), made(pace="competence")
    assert [one[i].rows for i in range(50)][37] == other[37].rows
    assert made(pace="competence", seed=1)[37].rows != other[37].rows
