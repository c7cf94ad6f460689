"""Sums over logits, chunk by chunk: the values and gradients of the whole computation."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from test_head import MODELS, V
from tiny import largest_gap, tiny_model

from mlx_distill.losses import Targets
from mlx_distill.losses.chunks import Arrays, chunked_sum
from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.labels import cross_entropy
from mlx_distill.models.head import Head

CUT, N, D = 60, 53, 32
MASK = mx.array(np.arange(N) % 5 != 0)[None]


def half(name: str) -> Any:
    model = MODELS[name]()
    model.set_dtype(mx.bfloat16)
    return model


CASES: dict[str, Callable[[], Any]] = {
    **MODELS,
    "bfloat16": lambda: half("llama"),
    "bfloat16 tied": lambda: half("llama tied"),
    "frozen": lambda: MODELS["llama"]().freeze(),
}


def drawn(name: str, seed: int = 0, width: int = D) -> mx.array:
    random = np.random.default_rng([seed, *name.encode()])
    return mx.array(random.normal(size=(1, N, width)).astype(np.float32))


FIXED = {
    "labels": mx.array(np.random.default_rng(1).integers(0, CUT, size=(1, N))),
    "teacher": 2 * drawn("teacher", width=CUT),
    "counted": MASK,
}


def loss(logits: Arrays, fixed: Arrays, beside: Arrays) -> tuple[mx.array, Arrays]:
    """Two losses of two hidden states, and an array that stands beside them."""
    targets = Targets(fixed["labels"], fixed["teacher"])

    def total(values: mx.array) -> mx.array:
        return mx.where(fixed["counted"], values, 0).sum(-1).sum()

    parts = {"forward_kl": total(forward_kl(logits["last"], targets, temperature=2.0))}
    if "exit" in logits:
        parts["exit"] = total(cross_entropy(logits["exit"], targets))
    if "rest" in beside:
        both = mx.logsumexp(logits["last"].astype(mx.float32), axis=-1) * mx.tanh(beside["rest"])
        parts["both"] = total(both)
    return sum((0.5 * part for part in parts.values()), mx.array(0.0)), parts


def setting(head: Head, *, more: bool) -> tuple[Arrays, Arrays]:
    """What the head reads, in its own type, and what stands beside."""
    dtype = head.logits(head.hidden(mx.array([[1]]))).dtype
    names = ("last", "exit") if more else ("last",)
    return {name: drawn(name).astype(dtype) for name in names}, {
        "rest": drawn("rest")[..., 0]
    } if more else {}


def results(
    model: nn.Module, head: Head, hidden: Arrays, beside: Arrays, chunk: int | None, *, compiled: bool = False
) -> tuple[mx.array, Arrays, Arrays]:
    """The sum, its parts, and the gradients by everything; the whole computation without a chunk."""

    def total(weights: Any, hidden: Arrays, beside: Arrays) -> tuple[mx.array, Arrays]:
        model.update(weights)
        if chunk is None:
            logits = {name: head.logits(states) for name, states in hidden.items()}
            return loss(logits, FIXED, beside)
        return chunked_sum(loss, head, hidden, FIXED, chunk, beside)

    run: Any = mx.value_and_grad(total, argnums=(0, 1, 2))
    (value, parts), gradients = (mx.compile(run) if compiled else run)(
        model.trainable_parameters(), hidden, beside
    )
    trees = zip(("weights", "hidden", "beside"), gradients, strict=True)
    flat: Any = [(f"{kind}.{key}", array) for kind, tree in trees for key, array in tree_flatten(tree)]
    return value, parts, dict(flat)


def check(found: Any, expected: Any, tolerance: float) -> None:
    assert np.isclose(float(found[0]), float(expected[0]), rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, part in expected[1].items():
        assert np.isclose(float(found[1][name]), float(part), rtol=1e-5)
    for name, gradient in expected[2].items():
        assert found[2][name].dtype == gradient.dtype
        scale = float(mx.abs(gradient).max())  # 0 of what lies below the head
        assert float(mx.abs(found[2][name] - gradient).max()) <= tolerance * scale, name


@pytest.mark.parametrize("more", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", CASES)
def test_chunks_add_up_to_the_whole(name: str, more: bool) -> None:
    """Values and gradients by the weights, by what the head reads, and by what stands beside."""
    model = CASES[name]()
    head = Head(model, CUT)
    hidden, beside = setting(head, more=more)
    expected = results(model, head, hidden, beside, None)
    tolerance = 2e-2 if name.startswith("bfloat16") else 2e-5
    moving = dict(tree_flatten(head.parameters(trainable=True)))
    assert (len(moving) > 0) == (name not in ("frozen", "quantized", "quantized tied"))
    for chunk in (1, 7, 16, N, 10 * N):
        check(results(model, head, hidden, beside, chunk), expected, tolerance)
    check(results(model, head, hidden, beside, 16, compiled=True), expected, tolerance)


def test_a_chunk_left_out_shows() -> None:
    """The same assertion with the last, shorter chunk forgotten."""
    model = CASES["llama"]()
    head = Head(model, CUT)
    hidden, beside = setting(head, more=False)
    expected = results(model, head, hidden, beside, None)
    short = {name: states[:, : N // 16 * 16] for name, states in hidden.items()}
    with pytest.raises(AssertionError):
        check(results(model, head, short, beside, 16), expected, 2e-5)


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    """Against float64 the error of many small chunks is that of one rounding, not of a hundred."""
    model = CASES["bfloat16"]()
    head = Head(model, CUT)
    hidden, _ = setting(head, more=False)
    exact = CASES["llama"]()
    exact.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    wide = {name: states.astype(mx.float32) for name, states in hidden.items()}
    expected = results(exact, Head(exact, CUT), wide, {}, None)[2]["weights.lm_head.weight"]
    scale = float(mx.abs(expected).max())

    def error(found: mx.array) -> float:
        return float(mx.abs(found.astype(mx.float32) - expected).mean()) / scale

    found = results(model, head, hidden, {}, 1)[2]["weights.lm_head.weight"]
    # The usual mistake: each chunk's gradient rounded to the sum's type as it is added.
    wrong = mx.zeros_like(found)
    for place in range(N):
        cut = {name: array[:, place : place + 1] for name, array in FIXED.items()}

        def one(weights: Any, cut: Arrays = cut, place: int = place) -> mx.array:
            return loss({"last": head.logits(hidden["last"][:, place : place + 1], weights)}, cut, {})[0]

        wrong = wrong + mx.grad(one)(head.parameters())["weight"]
    assert error(found) < 0.5 * error(wrong)


def test_padding_of_the_matrix_gets_no_gradient() -> None:
    model = CASES["llama"]()
    head = Head(model, CUT)
    assert head.is_matrix()
    gradient = results(model, head, *setting(head, more=False), 16)[2]["weights.lm_head.weight"]
    assert gradient.shape == (V, D)
    assert not mx.any(gradient[CUT:])
    assert mx.all(mx.any(gradient[:CUT] != 0, axis=-1))


@pytest.mark.parametrize("name", ["llama", "llama tied", "soft cap", "bfloat16", "adapted", "frozen"])
def test_a_multiplied_sum_is_right_or_not_a_number(name: str) -> None:
    """Where gradients are added up in place nothing can scale them, and that shows; elsewhere it is done."""
    model = CASES[name]()
    head = Head(model, CUT)
    hidden, _ = setting(head, more=False)

    def by_hidden(sum_of: Callable[[mx.array], mx.array], chunk: int | None) -> mx.array:
        def total(states: mx.array) -> mx.array:
            if chunk is None:
                return sum_of(loss({"last": head.logits(states)}, FIXED, {})[0])
            return sum_of(chunked_sum(loss, head, {"last": states}, FIXED, chunk)[0])

        return mx.grad(total)(hidden["last"])

    in_place = name in ("llama", "llama tied")
    for sum_of in (lambda x: 3 * x, lambda x: mx.square(x), lambda x: x / 7):
        found, expected = by_hidden(sum_of, 16), by_hidden(sum_of, None)
        if in_place:
            assert mx.all(mx.isnan(found))
        else:
            tolerance = 2e-2 if name == "bfloat16" else 2e-5
            assert largest_gap({"": found}, {"": expected}) < tolerance
    plus = by_hidden(lambda x: 5.0 + x, 16)
    assert largest_gap({"": plus}, {"": by_hidden(lambda x: x, None)}) < (
        2e-2 if name == "bfloat16" else 2e-5
    )


def test_parts_carry_no_gradient_and_fixed_arrays_get_none() -> None:
    model = CASES["llama"]()
    head = Head(model, CUT)
    hidden, _ = setting(head, more=False)

    def by_part(states: mx.array) -> mx.array:
        return chunked_sum(loss, head, {"last": states}, FIXED, 16)[1]["forward_kl"]

    def by_fixed(teacher: mx.array, chunk: int | None) -> mx.array:
        fixed = {**FIXED, "teacher": teacher}
        if chunk is None:
            return nn.losses.kl_div_loss(head.logits(hidden["last"]), teacher, reduction="sum")
        return chunked_sum(loss, head, hidden, fixed, chunk)[0]

    assert not mx.any(mx.grad(by_part)(hidden["last"]))
    assert not mx.any(mx.grad(by_fixed)(FIXED["teacher"], 16))
    assert mx.any(mx.grad(by_fixed)(FIXED["teacher"], None))  # a loss that lets it through


def test_a_head_that_cannot_be_split_hands_its_logits_through() -> None:
    from test_head import Odd

    model = Odd(1)
    head = Head(model, CUT)
    assert head.whole
    states = head.hidden(mx.array(np.random.default_rng(0).integers(0, V, size=(1, N))))
    assert states.shape == (1, N, CUT)
    expected = mx.value_and_grad(lambda x: loss({"last": x}, FIXED, {})[0])(states)
    found = mx.value_and_grad(lambda x: chunked_sum(loss, head, {"last": x}, FIXED, 16)[0])(states)
    assert np.isclose(float(found[0]), float(expected[0]), rtol=1e-5)
    assert largest_gap({"": found[1]}, {"": expected[1]}) < 2e-5


def test_a_trace_is_of_its_own_weights() -> None:
    """Two models through one function: nothing of the first is left in the second."""
    for seed in (0, 1):
        model = tiny_model(V, seed=seed, tie_word_embeddings=False).model
        head = Head(model, CUT)
        hidden, _ = setting(head, more=False)
        expected = results(model, head, hidden, {}, None)
        check(results(model, head, hidden, {}, 16, compiled=True), expected, 2e-5)
