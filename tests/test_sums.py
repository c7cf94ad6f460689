"""Sums over a vocabulary: right at any size, for any layout, with the gradients that MLX would derive."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.losses.sums import BLOCK, log_softmax, logsumexp, sum_last

SIZES = [1, 7, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK - 3]
PLAIN = {
    sum_last: lambda x: x.sum(-1),
    logsumexp: lambda x: mx.logsumexp(x, axis=-1),
    log_softmax: lambda x: x - mx.logsumexp(x, axis=-1, keepdims=True),
}
each = pytest.mark.parametrize("function", PLAIN, ids=["sum_last", "logsumexp", "log_softmax"])


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@each
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_mlx(function, size):
    x, pull = normal(2, 3, size), normal(3, 2, 3, size)[0]
    pull = pull if function is log_softmax else pull[..., 0]
    for wrap in (lambda f: f, mx.compile, mx.checkpoint):
        found, wanted = wrap(function)(x), PLAIN[function](x)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-4, atol=1e-4)
        slope = mx.grad(lambda a, wrap=wrap: (pull * wrap(function)(a)).sum())(x)
        plain = mx.grad(lambda a: (pull * PLAIN[function](a)).sum())(x)
        np.testing.assert_allclose(np.array(slope), np.array(plain), atol=1e-4)
        assert float(mx.abs(slope).max()) > 1e-3 or size == 1


@each
def test_any_layout_of_memory(function):
    """A slice of a wider vocabulary, a turned and a broadcast array: not as a block of memory lies there."""
    wide = normal(3, 2, 3 * BLOCK + 9)
    for x in (
        wide[..., : 2 * BLOCK + 5],
        wide[:, 1:, 4:],
        wide[::-1].swapaxes(0, 1),
        mx.contiguous(wide.swapaxes(0, 2)).swapaxes(0, 2),
        mx.broadcast_to(wide[:1], wide.shape),
    ):
        wanted = np.array(PLAIN[function](mx.array(np.array(x))))
        np.testing.assert_allclose(np.array(function(x)), wanted, rtol=1e-4, atol=1e-4)


def test_a_large_vocabulary_is_summed_right():
    """151,936 tokens against float64; one accumulator for the whole row would lose digits."""
    x = 3 * normal(4, 151_936)
    exact = np.array(x, dtype=np.float64)
    np.testing.assert_allclose(np.array(sum_last(mx.exp(x))), np.exp(exact).sum(-1), rtol=2e-6)
    wanted = np.log(np.exp(exact).sum(-1))
    assert np.abs(np.array(logsumexp(x)) - wanted).max() < 3e-6
    assert np.abs(np.array(log_softmax(x)) - (exact - wanted[:, None])).max() < 6e-6

    one_by_one = np.cumsum(np.exp(exact).astype(np.float32), -1, dtype=np.float32)[:, -1]
    assert np.abs(one_by_one / np.exp(exact).sum(-1) - 1).min() > 1e-5


@each
def test_logits_of_minus_infinity_leave_no_nan(function):
    x = mx.where(mx.arange(2 * BLOCK + 7) % 3 == 0, -mx.inf, normal(1, 2 * BLOCK + 7))
    if function is sum_last:
        x = mx.exp(x)
    pull = normal(1, 2 * BLOCK + 7) if function is log_softmax else mx.ones((1,))
    assert np.isfinite(np.array(function(x))).all()
    slope = mx.grad(lambda a: (pull * function(a)).sum())(x)
    assert np.isfinite(np.array(slope)).all()


def test_inside_a_gradient_that_is_formed_in_a_forward_pass():
    """A custom function may take the gradient of a loss that is built on these."""
    x = normal(2, 2 * BLOCK + 3)
    inner = mx.value_and_grad(lambda a: sum_last(log_softmax(a) ** 2).sum())

    @mx.custom_function
    def total(a):
        return inner(a)

    total.vjp(lambda a, cotangents, outputs: cotangents[0] * outputs[1])
    value, gradient = inner(x)
    for found in (mx.grad(lambda a: total(a)[0]), mx.compile(mx.grad(lambda a: total(a)[0]))):
        np.testing.assert_allclose(np.array(found(x)), np.array(gradient), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(float(total(x)[0]), float(value), rtol=1e-6)
