"""Sources in wanted shares, and the batches that rows make whose rates are their own."""

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import rows_of

from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.data.drawn import PARTS, DrawnBatches, steady
from mlx_distill.data.mixture import learned_from, shares
from mlx_distill.options import Data

SIZES = {"train": 200, "prompts": 900, "replay.0": 37}
LENGTHS = np.random.default_rng(0).integers(5, 75, size=sum(SIZES.values())).tolist()
SOURCES = [source for source, size in SIZES.items() for _ in range(size)]
WEIGHTS = {"train": 0.5, "prompts": None, "replay.0": 0.2}


def mixed(
    weights: dict[str, float | None], *, total: int = 400, seed: int = 0, sources: list[str] = SOURCES
) -> DrawnBatches:
    share = shares(sources, weights)
    rows = rows_of(LENGTHS if sources is SOURCES else LENGTHS[::-1])
    return DrawnBatches(rows, 1024, seed, total=total, rates=steady(share), sources=sources)


def drawn(batches: Any, first: int = 0, last: int | None = None) -> np.ndarray:
    """How often each row came in some batches, (rows,)."""
    indices = [i for at in range(first, last or len(batches)) for i in batches._plan[at][1]]
    return np.bincount(indices, minlength=len(batches.rows))


def share_of(counts: np.ndarray, source: str) -> float:
    return counts[np.array(SOURCES) == source].sum() / counts.sum()


def test_shares_are_the_weights_and_the_rest_by_size() -> None:
    sources = ["train"] * 3 + ["prompts"] * 5 + ["replay.0"] * 2
    found = shares(sources, {"train": None, "prompts": None, "replay.0": 0.2})
    np.testing.assert_allclose(found, [0.1] * 8 + [0.1] * 2)
    found = shares(sources, {"train": 0.3, "prompts": None, "replay.0": 0.2})
    np.testing.assert_allclose(found, [0.1] * 3 + [0.1] * 5 + [0.1] * 2)
    np.testing.assert_allclose(shares(sources, dict.fromkeys(set(sources))), [0.1] * 10)
    # Where every source has a weight, ratios count: as in the baseline, which has no answers.
    found = shares(sources, {"train": 6.0, "prompts": 10.0, "replay.0": 4.0})
    np.testing.assert_allclose(found, [0.1] * 10)
    found = shares(["train", "replay.0"], {"train": 0.3, "prompts": None, "replay.0": 0.1})
    np.testing.assert_allclose(found, [0.75, 0.25])
    found = shares(["train", "replay.0"], {"train": None, "prompts": 0.5, "replay.0": 0.1})
    np.testing.assert_allclose(found, [0.9, 0.1])


def test_the_sources_to_learn_from() -> None:
    data = Data.model_validate({"train": "a.jsonl", "valid": "b.jsonl", "replay": ["c.jsonl", "d.jsonl"]})
    assert {key: source.source for key, source in learned_from(data).items()} == {
        "train": "a.jsonl",
        "replay.0": "c.jsonl",
        "replay.1": "d.jsonl",
    }


def test_sources_come_in_their_shares_throughout() -> None:
    batches = mixed(WEIGHTS)
    for first, last in ((0, 400), (0, 40), (200, 260), (370, 400)):
        counts = drawn(batches, first, last)
        off = 30 / counts.sum()  # rows that wait for their batch to be full
        assert share_of(counts, "train") == pytest.approx(0.5, abs=off)
        assert share_of(counts, "prompts") == pytest.approx(0.3, abs=off)
        assert share_of(counts, "replay.0") == pytest.approx(0.2, abs=off)
    # The usual mistake, joining the sources, must not pass.
    joined = drawn(Batches_plan(Batches(batches.rows, 1024, 0), 400))
    assert share_of(joined, "replay.0") < 0.05


class Batches_plan:
    """The first batches of `Batches`, as `drawn` counts them."""

    def __init__(self, batches: Batches, total: int):
        self.rows = batches.rows
        epochs = -(-total // batches.per_epoch)
        self._plan = [batch for epoch in range(epochs) for batch in batches._plan(epoch)][:total]

    def __len__(self) -> int:
        return len(self._plan)


def test_rows_of_a_source_come_equally_often_at_any_time() -> None:
    """Drawing at random with these shares has some rows five times as often as others."""
    batches = mixed(WEIGHTS)
    for last in (100, 250, 400):
        counts = drawn(batches, 0, last)
        for source in SIZES:
            of_source = counts[np.array(SOURCES) == source]
            assert of_source.max() - of_source.min() <= 4  # rounded, and some wait for their batch to be full
    chances = np.random.default_rng(0).multinomial(drawn(batches).sum(), shares(SOURCES, WEIGHTS))
    of_source = chances[np.array(SOURCES) == "replay.0"]
    assert of_source.max() - of_source.min() > 10


def test_no_row_comes_again_before_all_of_its_source_came() -> None:
    batches = mixed({"train": None, "prompts": None, "replay.0": 0.02}, total=30)
    counts = drawn(batches)
    for source in ("train", "prompts"):
        assert set(counts[np.array(SOURCES) == source]) <= {0, 1}


def test_each_time_rows_come_in_another_order() -> None:
    """Or the same rows would be read together, and after each other, in every epoch."""
    batches = mixed(WEIGHTS, total=200)
    came: dict[int, list[int]] = {}
    for at, (_, indices) in enumerate(batches._plan):
        for i in indices.tolist():
            came.setdefault(i, []).append(at)
    first, second = np.array([came[i][:2] for i in range(SIZES["train"])]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.25


def test_every_batch_is_of_full_size_and_like_length() -> None:
    batches = mixed(WEIGHTS)
    shapes = Counter(batches[i].tokens.shape for i in range(len(batches)))
    assert all(height == 1024 // width for height, width in shapes)
    assert len(shapes) == 5  # one a width

    def padding(plan: list[tuple[int, Any]]) -> float:
        length = sum(len(batches.rows[i].tokens) - 1 for _, batch in plan for i in batch)
        return 1 - length / sum(width * len(batch) for width, batch in plan)

    plain = Batches_plan(Batches(batches.rows, 1024, 0), 400)
    assert padding(batches._plan) < padding(plain._plan) + 0.02


def test_widths_of_few_rows_join_wider_ones() -> None:
    rows = rows_of([5] * 300 + [40] * 3 + [70] * 100 + [200] * 2)
    share = np.full(len(rows), 1 / len(rows))
    batches = DrawnBatches(rows, 512, 0, total=200, rates=steady(share), sources=["all"] * len(rows))
    assert {width for width, _ in batches._plan} == {16, 208}
    assert drawn(batches).max() - drawn(batches).min() <= 2
    one = DrawnBatches(rows, 512, 0, total=4, rates=steady(share), sources=["all"] * len(rows))
    assert {width for width, _ in one._plan} == {208}


def test_batch_i_is_a_function_of_rows_seed_and_i_alone() -> None:
    one, other = mixed(WEIGHTS), mixed(WEIGHTS)
    for i in range(100):
        one[i]
    later = other[100]  # asked for out of turn, as a resumed run does
    assert mx.array_equal(one[100].tokens, later.tokens)
    assert one[100].rows == later.rows
    assert [one.rows[i].tokens[0] for i in later.rows] == later.tokens[:, 0].tolist()
    assert mixed(WEIGHTS, seed=1)[100].rows != later.rows
    with pytest.raises(IndexError):
        one[400]


def test_the_order_of_sources_leaves_shares_and_counts_alone() -> None:
    """The rows of each source stand elsewhere; how often they come does not change by more than rounding."""
    turned = SOURCES[::-1]
    there = drawn(mixed(WEIGHTS, sources=turned))
    counts = drawn(mixed(WEIGHTS))
    for source in SIZES:
        one, other = counts[np.array(SOURCES) == source], there[np.array(turned) == source]
        assert one.mean() == pytest.approx(other.mean(), rel=0.01)


def test_a_short_run_and_a_small_one_have_batches() -> None:
    rows = [Encoded([2, 3, 4], 1)]
    small = DrawnBatches(rows, 64, 0, total=3, rates=steady(np.ones(1)), sources=["train"])
    assert [small[i].rows for i in range(3)] == [(0, 0, 0, 0)] * 3
    assert len(mixed(WEIGHTS, total=1)) == 1
    assert len(mixed(WEIGHTS, total=PARTS + 1)) == PARTS + 1
    with pytest.raises(ValueError, match="no rows"):
        DrawnBatches([], 64, 0, total=3, rates=steady(np.ones(0)), sources=[])
