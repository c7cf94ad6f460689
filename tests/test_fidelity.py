"""Fidelity against its definition in NumPy float64, token by token and over all of them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from tiny import rows_of, tiny_model

from mlx_distill.evaluate.fidelity import calibration_error, fidelity, perplexity
from mlx_distill.teacher import LiveTeacher

V = 50
ROWS = rows_of([9, 4, 60, 1, 33, 5], seed=5)


def log_probabilities(model, tokens):
    logits = np.array(model(mx.array([tokens]))[0, :-1], dtype=np.float64)[:, :V]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def definition(model, teacher):
    """For each row, one at a time and unpadded: nll, kl, and the likeliest ids of both, (T,) each."""
    found = []
    for row in ROWS:
        q, p = log_probabilities(model, row.tokens), log_probabilities(teacher, row.tokens)
        places = range(row.start - 1, len(row.tokens) - 1)
        nll = [-q[place, row.tokens[place + 1]] for place in places]
        kl = [(np.exp(p[place]) * (p[place] - q[place])).sum() for place in places]
        ids = [(q[place].argmax(), p[place].argmax()) for place in places]
        found.append((np.array(nll), np.array(kl), *np.array(ids).T))
    return found


def test_every_value_is_its_definition():
    model, teacher = tiny_model(V, seed=1).model, tiny_model(V + 6, seed=2)
    found, _ = fidelity(model, ROWS, V, teacher=LiveTeacher(teacher, V), text_bytes=321)
    nll, kl, mine, theirs = map(np.concatenate, zip(*definition(model, teacher.model), strict=True))
    assert len(nll) == sum(len(row.tokens) - row.start for row in ROWS)
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / 321, rel=1e-5)
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_p95"] == pytest.approx(np.quantile(kl, 0.95), rel=1e-4)
    assert found["kl_median"] == pytest.approx(np.median(kl), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx((mine == theirs).mean())
    # A mean of the rows' means would weigh the one-token row as much as the longest.
    ends = np.cumsum([len(row.tokens) - row.start for row in ROWS])
    means = [part.mean() for part in np.split(nll, ends[:-1])]
    assert abs(np.mean(means) - found["nll"]) > 1e-3
    # Nor is the perplexity a mean of perplexities, nor the median the mean.
    assert np.exp(nll).mean() > found["perplexity"] * 1.01
    assert abs(found["kl_median"] - found["kl"]) > 1e-3


def test_each_row_has_its_own_tokens_in_the_order_given():
    """Batches hold rows by length, and pad them; what is handed back shows nothing of either."""
    model, teacher = tiny_model(V, seed=1).model, tiny_model(V, seed=2)
    _, rows = fidelity(model, ROWS, V, teacher=LiveTeacher(teacher, V))
    expected = definition(model, teacher.model)
    for row, found, (nll, kl, mine, theirs) in zip(ROWS, rows, expected, strict=True):
        assert found.kl is not None and found.theirs is not None
        assert len(found.nll) == len(row.tokens) - row.start
        assert found.nll == pytest.approx(nll, rel=1e-4, abs=1e-5)
        assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert (found.mine == mine).all() and (found.theirs == theirs).all()
        assert [array.dtype.name for array in found if array is not None] == [
            "float32",
            "float32",
            "int32",
            "int32",
        ]
    # The order of the batches, the usual mistake, is another one here.
    lengths = [len(found.nll) for found in rows]
    assert lengths != sorted(lengths)


def test_a_model_agrees_with_itself():
    loaded = tiny_model(V, seed=1)
    found, rows = fidelity(loaded.model, ROWS, V, teacher=LiveTeacher(loaded, V))
    assert abs(found["kl"]) < 1e-6
    assert found["top1_agreement"] == 1
    assert all((row.mine == row.theirs).all() for row in rows)


def test_without_a_teacher_nothing_is_said_about_one():
    found, rows = fidelity(tiny_model(V).model, ROWS, V)
    assert set(found) == {"nll", "perplexity", "ece"}
    assert all(row.kl is None and row.theirs is None and len(row.mine) for row in rows)


def test_the_calibration_error_of_a_case_by_hand():
    """Bins 0.8 to 0.87 and 0.4 to 0.47: (|1.7 - 1| + |0.9 - 2|) / 4."""
    confidence = np.array([0.85, 0.85, 0.45, 0.45], dtype=np.float32)
    right = np.array([True, False, True, True])
    assert calibration_error(confidence, right) == pytest.approx((0.7 + 1.1) / 4)
    # The usual mistake, one bin for all, lets the two gaps cancel.
    assert abs(confidence.mean() - right.mean()) < 0.2


def test_a_perplexity_beyond_all_numbers_is_one_that_json_can_hold():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert math.isfinite(perplexity(1e9))
