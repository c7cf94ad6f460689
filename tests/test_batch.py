"""Shifting, padding, masking and ordering."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from tiny import rows_of

from mlx_distill.data.batch import (
    PLACES_TO,
    Batches,
    Encoded,
    at_places,
    counted_places,
    in_order,
    make_batch,
)


def test_a_hand_made_case():
    """Prompt 5 6, completion 7 8 and the end-of-turn token 1; and a shorter row beside it."""
    batch = make_batch([Encoded([5, 6, 7, 8, 1], 2), Encoded([5, 9, 1], 1)], pad_to=6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 1, 0], [5, 9, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 1, 0, 0], [9, 1, 0, 0, 0, 0]]
    assert batch.counted.tolist() == [
        [False, True, True, True, False, False],  # 7, 8 and the end of the turn; no padding
        [True, True, False, False, False, False],
    ]
    assert batch.tokens.dtype == batch.labels.dtype == mx.int32


def test_mlx_lm_counts_one_padding_token_a_row_and_we_do_not():
    """mlx-lm's `default_loss` masks with `steps <= lengths`; one label too many a row."""
    row = Encoded([5, 6, 7, 8], 2)  # completion: 7 8
    counted = make_batch([row], pad_to=8).counted
    assert int(counted.sum()) == 2
    steps = np.arange(1, 9)  # as mlx-lm has them for a row padded to this width
    theirs = (steps >= row.start) & (steps <= len(row.tokens))
    assert int(theirs.sum()) == 3


def test_places_are_those_of_the_counted_labels():
    batch = make_batch([Encoded([5, 6, 7, 8, 1], 2), Encoded([5, 9, 1], 1)], pad_to=6)
    places = counted_places(batch)
    assert places.tolist() == [1, 2, 3, 6, 7] + [-1] * (PLACES_TO - 5)
    assert at_places(batch.labels, places)[0, :5].tolist() == [7, 8, 1, 9, 1]
    deep = mx.arange(2 * 6 * 4).reshape(2, 6, 4)
    assert at_places(deep, places).shape == (1, PLACES_TO, 4)
    assert mx.array_equal(at_places(deep, places)[0, 3], deep[1, 0])


def test_padding_is_known_by_place_and_not_by_id():
    """Token 0 inside a completion counts; a mask made of `labels != 0` would lose it."""
    batch = make_batch([Encoded([5, 0, 0, 7, 0], 1)], pad_to=8)
    assert int(batch.counted.sum()) == 4
    assert int(((batch.labels != 0) & batch.counted).sum()) == 1


def test_widths_are_multiples_and_no_longer_than_needed():
    for length, width in ((2, 16), (17, 16), (18, 32), (65, 64)):
        assert make_batch([Encoded(list(range(length)), 1)]).tokens.shape == (1, width)


def test_each_row_comes_once_an_epoch_but_for_the_last_batch():
    rows = rows_of([5] * 300 + [40] * 200 + [70] * 111)
    batches = Batches(rows, batch_tokens=256, seed=0)
    assert batches.passes == 1
    seen = Counter(i for _, batch in batches._plan(0) for i in batch)
    assert set(seen) == set(range(len(rows)))
    drawn_again = sum(seen.values()) - len(rows)
    assert 0 <= drawn_again < 256 // 80


def test_few_rows_come_equally_often_and_fill_their_steps():
    """100 labels must not train on fewer tokens a step than 5,000, or the baseline is treated unfairly."""
    lengths = np.random.default_rng(0).integers(20, 75, size=3000).tolist()
    few, many = Batches(rows_of(lengths[:100]), 2048, seed=0), Batches(rows_of(lengths), 2048, seed=0)
    seen = Counter(i for _, batch in few._plan(0) for i in batch)
    assert len(seen) == 100
    assert max(seen.values()) - min(seen.values()) <= 2

    def tokens_a_step(batches, plan):
        return sum(len(batches.rows[i].tokens) for _, batch in plan for i in batch) / len(plan)

    whole = tokens_a_step(many, many._plan(0))
    assert tokens_a_step(few, few._plan(0)) > 0.95 * whole
    few.passes = 1  # leftovers of every width padded to the widest
    assert tokens_a_step(few, few._plan(0)) < 0.93 * whole


def test_every_step_is_of_full_size():
    rows = rows_of([5] * 30 + [40] * 20 + [70] * 11)
    batches = Batches(rows, batch_tokens=256, seed=0)
    for i in range(2 * batches.per_epoch):
        height, width = batches[i].tokens.shape
        assert height == 256 // width
    shapes = {batches[i].tokens.shape for i in range(6 * batches.per_epoch)}
    assert len(shapes) == 3  # one a width, so one trace a width


def test_rows_of_like_length_share_a_batch():
    rows = rows_of(np.random.default_rng(0).integers(5, 120, size=400).tolist())

    def waste(plan):
        padded = sum(len(batch) * max(len(rows[i].tokens) for i in batch) for batch in plan)
        return 1 - sum(len(rows[i].tokens) for batch in plan for i in batch) / padded

    bucketed = [batch for _, batch in Batches(rows, batch_tokens=1024, seed=0)._plan(0)]
    order = np.random.default_rng(0).permutation(400).tolist()
    unsorted = [order[i : i + 16] for i in range(0, 400, 16)]  # what a no-op length sort gives
    assert waste(bucketed) < 0.2
    assert waste(unsorted) > 0.35


def test_batch_i_is_a_function_of_seed_and_i_alone():
    rows = rows_of([5, 9, 30, 41] * 10)
    one, other = Batches(rows, 128, seed=3), Batches(rows, 128, seed=3)
    later = other[2 * other.per_epoch + 1]  # asked for out of turn, as a resumed run does
    for i in range(2 * one.per_epoch + 1):
        one[i]
    assert mx.array_equal(one[2 * one.per_epoch + 1].tokens, later.tokens)
    assert Batches(rows, 128, seed=4)._plan(0) != one._plan(0)
    assert one._plan(0) != one._plan(1)


def test_evaluation_takes_every_row_once_within_the_budget():
    rows = rows_of([5, 90, 30, 41, 7] * 9)
    plan = in_order(rows, 256)
    assert sorted(i for batch in plan for i in batch) == list(range(len(rows)))
    assert all(make_batch([rows[i] for i in b]).tokens.size <= 256 for b in plan if len(b) > 1)


def test_a_row_wider_than_the_budget_still_gets_a_batch():
    rows = rows_of([200])
    assert Batches(rows, 64, seed=0)[0].tokens.shape == (1, 208)
    with pytest.raises(ValueError, match="no rows"):
        Batches([], 64, seed=0)
