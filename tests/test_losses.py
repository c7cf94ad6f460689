"""Losses against their definition in NumPy float64, and their gradients against finite differences."""

import math

import mlx.core as mx
import numpy as np
import pytest
from pydantic import PositiveFloat

from mlx_distill.losses import LOSSES, Targets, cross_entropy, forward_kl, options_of

B, T, V = 2, 3, 7


@pytest.fixture
def logits():
    random = np.random.default_rng(0)
    return 3 * random.normal(size=(B, T, V)), 3 * random.normal(size=(B, T, V))


@pytest.fixture
def labels():
    return np.random.default_rng(1).integers(V, size=(B, T))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_forward_kl(student, teacher, labels, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1)


def numpy_cross_entropy(student, teacher, labels):
    return -np.log(np.take_along_axis(softmax(student), labels[..., None], -1))[..., 0]


CASES = [
    (cross_entropy, numpy_cross_entropy, {}),
    (forward_kl, numpy_forward_kl, {}),
    (forward_kl, numpy_forward_kl, {"temperature": 2.5}),
]


def loss_of(loss, student, teacher, labels, **options):
    targets = Targets(mx.array(labels), mx.array(teacher, dtype=mx.float32))
    return loss(mx.array(student, dtype=mx.float32), targets, **options)


@pytest.mark.parametrize(("loss", "definition", "options"), CASES)
def test_value_is_its_definition(loss, definition, options, logits, labels):
    found = loss_of(loss, *logits, labels, **options)
    assert found.shape == (B, T)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), definition(*logits, labels, **options), rtol=1e-5)


@pytest.mark.parametrize(("loss", "definition", "options"), CASES)
def test_gradient_is_the_slope_of_the_definition(loss, definition, options, logits, labels):
    student, teacher = logits
    targets = Targets(mx.array(labels), mx.array(teacher, dtype=mx.float32))
    gradient = mx.grad(lambda s: loss(s, targets, **options).sum())(mx.array(student, dtype=mx.float32))
    slope, h = np.zeros_like(student), 1e-5
    for index in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[index] += h
        down[index] -= h
        rise = definition(up, teacher, labels, **options) - definition(down, teacher, labels, **options)
        slope[index] = rise.sum() / (2 * h)
    assert np.abs(slope).max() > 0.1  # a zero gradient would agree with nothing
    np.testing.assert_allclose(np.array(gradient), slope, atol=2e-6)


def test_forward_kl_is_zero_at_equality_and_has_no_slope_there(logits, labels):
    student, _ = logits
    assert np.abs(np.array(loss_of(forward_kl, student, student, labels))).max() < 1e-6
    targets = Targets(mx.array(labels), mx.array(student, dtype=mx.float32))
    slope = mx.grad(lambda s: forward_kl(s, targets).sum())(mx.array(student, dtype=mx.float32))
    assert np.abs(np.array(slope)).max() < 1e-6


def test_forward_kl_is_not_the_reverse(logits, labels):
    student, teacher = logits
    found = np.array(loss_of(forward_kl, student, teacher, labels))
    swapped = numpy_forward_kl(teacher, student, labels)
    assert np.abs(found - swapped).max() > 0.1


def test_missing_temperature_squared_would_show(logits, labels):
    found = np.array(loss_of(forward_kl, *logits, labels, temperature=2.5))
    np.testing.assert_allclose(found / numpy_forward_kl(*logits, labels, 2.5), 1, rtol=1e-5)
    assert np.abs(found / (numpy_forward_kl(*logits, labels, 2.5) / 2.5**2) - 1).min() > 5


def test_no_gradient_reaches_the_teacher(logits, labels):
    student, teacher = (mx.array(x, dtype=mx.float32) for x in logits)
    slope = mx.grad(lambda t: forward_kl(student, Targets(mx.array(labels), t)).sum())(teacher)
    assert float(mx.abs(slope).max()) == 0


def test_adding_a_constant_to_logits_changes_nothing(logits, labels):
    student, teacher = logits
    for loss, _, options in CASES:
        plain = np.array(loss_of(loss, student, teacher, labels, **options))
        moved = np.array(loss_of(loss, student + 5, teacher - 3, labels, **options))
        np.testing.assert_allclose(moved, plain, atol=2e-5)


def test_losses_of_half_precision_logits_are_summed_in_float32():
    """70,000 equal bfloat16 logits: a sum kept in bfloat16 would stop at 256."""
    size = 70_000
    student = mx.zeros((1, 1, size), dtype=mx.bfloat16)
    found = cross_entropy(student, Targets(mx.array([[3]])))
    assert float(found.item()) == pytest.approx(math.log(size), rel=1e-5)
    kl = forward_kl(student, Targets(mx.array([[3]]), mx.zeros((1, 1, size), dtype=mx.bfloat16)))
    assert abs(float(kl.item())) < 1e-5


def test_options_are_read_off_the_signature():
    assert options_of("forward_kl") == {"temperature": PositiveFloat}
    assert options_of("cross_entropy") == {}
    assert set(LOSSES) == {"cross_entropy", "forward_kl"}


def test_a_loss_without_its_teacher_says_so():
    with pytest.raises(ValueError, match="teacher's logits"):
        forward_kl(mx.zeros((1, 1, 3)), Targets(mx.array([[0]])))
