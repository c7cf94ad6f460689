"""The surprise of each row against its definition, in NumPy float64."""

from typing import Any

import mlx.core as mx
import numpy as np
from tiny import rows_of, tiny_model

from mlx_distill import score
from mlx_distill.data.batch import Encoded
from mlx_distill.score import nll_of_rows

V = 50


def by_definition(model: Any, row: Encoded) -> float:
    """The row alone, without padding; the mean over its counted tokens."""
    logits = np.array(model(mx.array([row.tokens[:-1]])), dtype=np.float64)[0, :, :V]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(np.mean([-log_p[t - 1, row.tokens[t]] for t in range(row.start, len(row.tokens))]))


def test_the_mean_of_each_row_is_the_definition() -> None:
    """Rows of many lengths, out of order, one that counts all of its tokens and one that counts its last."""
    rows = rows_of([30, 2, 11, 60, 1, 30])
    rows += [rows[0]._replace(start=1), rows[3]._replace(start=len(rows[3].tokens) - 1)]
    model = tiny_model(V).model
    expected = [by_definition(model, row) for row in rows]
    found = nll_of_rows(model, rows, V)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The usual mistakes, prompts counted too or the rows in order of length, must not pass.
    prompts = [by_definition(model, row._replace(start=1)) for row in rows]
    assert not np.allclose(prompts, expected, rtol=1e-3)
    assert not np.allclose(sorted(expected), expected, rtol=1e-3)


def test_logits_beyond_the_vocabulary_are_cut() -> None:
    rows, model = rows_of([9, 4]), tiny_model(V + 14).model
    np.testing.assert_allclose(nll_of_rows(model, rows, V), [by_definition(model, row) for row in rows], 1e-5)
    assert nll_of_rows(model, rows, V + 14).min() > nll_of_rows(model, rows, V).min()


def test_the_weight_of_a_row_is_not_its_difficulty() -> None:
    rows, model = rows_of([9, 4]), tiny_model(V).model
    heavy = [row._replace(weight=5.0) for row in rows]
    assert nll_of_rows(model, heavy, V).tolist() == nll_of_rows(model, rows, V).tolist()


def test_how_many_rows_share_a_batch_changes_no_more_than_rounding(monkeypatch: Any) -> None:
    rows, model = rows_of([30, 2, 11, 60, 1, 30]), tiny_model(V).model
    together = nll_of_rows(model, rows, V)
    monkeypatch.setattr(score, "NUMBERS", 1)
    np.testing.assert_allclose(nll_of_rows(model, rows, V), together, rtol=1e-5)
    assert nll_of_rows(model, rows, V).tolist() == nll_of_rows(model, rows, V).tolist()


def test_the_model_is_in_eval_mode() -> None:
    model = tiny_model(V).model
    model.train()
    nll_of_rows(model, rows_of([3]), V)
    assert not model.training
