"""Losses of early exits against NumPy float64; LayerSkip's weights and curricula by hand."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.losses.exits import check_exits, exit_cross_entropy, exit_enabled, exit_kl, exit_weights

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


def numpy_exit_kl(early, final, temperature=1.0):
    p, q = softmax(final / temperature), softmax(early / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1)


def numpy_cross_entropy(early, labels):
    return -np.log(np.take_along_axis(softmax(early), labels[..., None], -1))[..., 0]


def slopes(definition, early):
    """Finite differences of the sum of `definition` over `early`."""
    slope, h = np.zeros_like(early), 1e-5
    for index in np.ndindex(early.shape):
        up, down = early.copy(), early.copy()
        up[index] += h
        down[index] -= h
        slope[index] = (definition(up) - definition(down)).sum() / (2 * h)
    return slope


def single(x):
    return mx.array(x, dtype=mx.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_exit_kl_is_its_definition(logits, temperature):
    early, final = logits
    found = exit_kl(single(early), single(final), temperature=temperature)
    assert found.shape == (B, T) and found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), numpy_exit_kl(early, final, temperature), rtol=1e-5)
    # The usual mistakes: the other direction, and a temperature that shrinks the gradient.
    swapped = numpy_exit_kl(final, early, temperature)
    assert not np.allclose(np.array(found), swapped, rtol=1e-2)
    if temperature != 1:
        unscaled = numpy_exit_kl(early, final, temperature) / temperature**2
        assert not np.allclose(np.array(found), unscaled, rtol=1e-2)


def test_exit_cross_entropy_is_its_definition(logits, labels):
    early, _ = logits
    found = exit_cross_entropy(single(early), mx.array(labels))
    assert found.shape == (B, T) and found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), numpy_cross_entropy(early, labels), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_slope_of_exit_kl(logits, temperature):
    early, final = logits
    gradient = mx.grad(lambda x: exit_kl(x, single(final), temperature=temperature).sum())(single(early))
    expected = slopes(lambda x: numpy_exit_kl(x, final, temperature), early)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(np.array(gradient), expected, atol=5e-6)
    assert not np.allclose(np.array(gradient), slopes(lambda x: numpy_exit_kl(final, x), early), atol=1e-2)


def test_the_slope_of_exit_cross_entropy(logits, labels):
    early, _ = logits
    gradient = mx.grad(lambda x: exit_cross_entropy(x, mx.array(labels)).sum())(single(early))
    expected = slopes(lambda x: numpy_cross_entropy(x, labels), early)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(np.array(gradient), expected, atol=2e-6)


def test_the_last_layer_is_not_drawn_to_its_exits(logits):
    early, final = (single(x) for x in logits)
    assert not mx.grad(lambda x: exit_kl(early, x).sum())(final).any().item()

    # One hidden state below both, as in a model: what reaches it comes through the exit alone.
    def leaking(early, final):
        log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (final, early))
        return (mx.exp(log_p) * (log_p - log_q)).sum(-1)

    np.testing.assert_allclose(np.array(leaking(early, final)), np.array(exit_kl(early, final)), rtol=1e-6)
    through_exit = mx.grad(lambda x: exit_kl(x, final).sum())(early)
    for loss, right in ((exit_kl, True), (leaking, False)):
        both = mx.grad(lambda x, loss=loss: loss(early + x, final + 2 * x).sum())(mx.zeros_like(early))
        assert np.allclose(np.array(both), np.array(through_exit), atol=1e-5) is right


def test_an_exit_that_says_what_the_last_layer_says_costs_nothing(logits):
    early = single(logits[0])
    assert np.abs(np.array(exit_kl(early, early, temperature=2.0))).max() < 1e-6
    slope = mx.grad(lambda x: exit_kl(x, early).sum())(early)
    assert np.abs(np.array(slope)).max() < 1e-6


def test_half_precision_is_summed_in_float32():
    zeros = mx.zeros((1, 1, 70_000), dtype=mx.bfloat16)
    assert exit_cross_entropy(zeros, mx.array([[3]])).item() == pytest.approx(np.log(70_000), rel=1e-5)
    assert abs(exit_kl(zeros, zeros, temperature=3.0).item()) < 1e-4


def test_both_losses_run_checkpointed_and_compiled(logits, labels):
    early, final = (single(x) for x in logits)
    places = mx.array(labels)

    def loss(early, final, places):
        return (exit_kl(early, final) + exit_cross_entropy(early, places)).sum(-1).sum()

    plain = mx.grad(loss)(early, final, places)
    other = mx.compile(mx.grad(mx.checkpoint(loss)))(early, final, places)
    np.testing.assert_allclose(np.array(other), np.array(plain), atol=1e-6)


def test_weights_by_hand():
    """8 layers, exits 2, 4 and 6, scale 0.5; the paper's layers 1, 3, 5 and 7, counted from 0."""
    raw = [0.5 * (0 + 1), 0.5 * (0 + 1 + 2 + 3), 0.5 * (0 + 1 + 2 + 3 + 4 + 5)]
    raw.append(7 + 0.5 * (0 + 1 + 2 + 3 + 4 + 5 + 6))
    found = exit_weights([2, 4, 6], 8, 0.5)
    assert found == pytest.approx([x / sum(raw) for x in raw], rel=1e-12)
    assert sum(found) == pytest.approx(1)
    # Counting the layers from 1 in the paper's formula would not pass.
    shifted = [0.5 * 3, 0.5 * 10, 0.5 * 21, 8 + 0.5 * 28]
    assert found != pytest.approx([x / sum(shifted) for x in shifted], rel=1e-2)


def test_weights_of_exits_in_use_add_up_to_one():
    found = exit_weights([2, 4, 6], 8, 0.5, [False, True, False])
    assert found == pytest.approx([0, 3 / 20.5, 0, 17.5 / 20.5])
    assert exit_weights([2, 4, 6], 8, 0.0) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("exits", "layers", "scale", "message"),
    [
        ([1, 2], 4, 1.0, "layer 1 would learn nothing"),
        ([2, 4], 4, 1.0, "layer 4 is no exit of 4 layers; give 1 to 3"),
        ([2, 9], 4, 1.0, "layer 9"),
        ([3, 2], 4, 1.0, "low to high"),
        ([2, 2], 4, 1.0, "each layer once"),
        ([0, 2], 4, 1.0, "layer 0"),
        ([], 4, 1.0, "none given"),
        ([2], 4, -1.0, "negative"),
    ],
)
def test_wrong_exits_are_refused_in_one_line(exits, layers, scale, message):
    with pytest.raises(ValueError, match=message) as info:
        exit_weights(exits, layers, scale)
    assert "\n" not in str(info.value)


def test_an_exit_at_the_first_layer_exists():
    check_exits([1, 3], 4)  # to decode from; only LayerSkip's weights make nothing of it


def table(curriculum, exits, steps):
    rows = [exit_enabled(curriculum, exits, step, steps) for step in range(1, steps + 1)]
    return ["".join("x" if on else "." for on in row) for row in rows]


def test_curricula_by_hand():
    assert table("none", [2, 4], 3) == ["xx", "xx", "xx"]
    assert table("rotational", [2, 4, 6], 5) == ["x..", ".x.", "..x", "x..", ".x."]
    # Two exits of 12 steps: one more after every 12 / (2 * 3) = 2 finished steps, the highest first.
    assert table("gradual", [2, 4], 12) == ["..", "..", ".x", ".x", *["xx"] * 8]
    assert table("gradual", [2], 8) == [".", ".", *["x"] * 6]


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_gradual_never_turns_an_exit_off_and_has_all_in_half_the_steps(steps):
    rows = [exit_enabled("gradual", [2, 3, 5, 7], step, steps) for step in range(1, steps + 1)]
    assert all(not was or on for one, other in pairwise(rows) for was, on in zip(one, other, strict=True))
    assert all(row == sorted(row) for row in rows)  # from the highest down
    if steps > 1:
        assert all(rows[steps // 2])


def test_weights_of_a_step_are_an_input_of_a_compiled_step(logits):
    """Baked in at the first trace, the first step's weights would stay for good."""
    early, final = (single(x) for x in logits)

    @mx.compile
    def step(weights):
        return (weights[:2] * mx.stack([exit_kl(early, final).sum(), exit_kl(final, early).sum()])).sum()

    each = np.array([numpy_exit_kl(*logits).sum(), numpy_exit_kl(*logits[::-1]).sum()])
    for number in range(1, 5):
        weights = exit_weights([2, 4], 6, 1.0, exit_enabled("rotational", [2, 4], number, 4))
        assert step(mx.array(weights)).item() == pytest.approx((np.array(weights[:2]) * each).sum(), rel=1e-5)
