"""Fidelity against its definition in NumPy float64."""

import math

import mlx.core as mx
import numpy as np
import pytest
from tiny import rows_of, tiny_model

from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.teacher import LiveTeacher

V = 50
ROWS = rows_of([9, 4, 60, 1, 33, 5], seed=5)


def log_probabilities(model, tokens):
    logits = np.array(model(mx.array([tokens]))[0, :-1], dtype=np.float64)[:, :V]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def definition(model, teacher):
    nll, kl, agree = [], [], []
    for row in ROWS:  # one at a time, unpadded
        q, p = log_probabilities(model, row.tokens), log_probabilities(teacher, row.tokens)
        for place in range(row.start - 1, len(row.tokens) - 1):
            nll.append(-q[place, row.tokens[place + 1]])
            kl.append((np.exp(p[place]) * (p[place] - q[place])).sum())
            agree.append(p[place].argmax() == q[place].argmax())
    return np.array(nll), np.array(kl), np.array(agree)


def test_every_value_is_its_definition():
    model, teacher = tiny_model(V, seed=1).model, tiny_model(V + 6, seed=2)
    found = fidelity(model, ROWS, V, teacher=LiveTeacher(teacher, V), text_bytes=321)
    nll, kl, agree = definition(model, teacher.model)
    assert len(nll) == sum(len(row.tokens) - row.start for row in ROWS)
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / 321, rel=1e-5)
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_p95"] == pytest.approx(np.quantile(kl, 0.95), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(agree.mean())
    # A mean of the rows' means would weigh the one-token row as much as the longest.
    ends = np.cumsum([len(row.tokens) - row.start for row in ROWS])
    means = [part.mean() for part in np.split(nll, ends[:-1])]
    assert abs(np.mean(means) - found["nll"]) > 1e-3


def test_a_model_agrees_with_itself():
    loaded = tiny_model(V, seed=1)
    found = fidelity(loaded.model, ROWS, V, teacher=LiveTeacher(loaded, V))
    assert abs(found["kl"]) < 1e-6
    assert found["top1_agreement"] == 1


def test_without_a_teacher_nothing_is_said_about_one():
    assert set(fidelity(tiny_model(V).model, ROWS, V)) == {"nll", "ece"}
