"""Hidden states and attention that come out of a model are the right ones, with the right gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tiny import tiny_model
from tiny_configs import tiny_of

from mlx_distill.errors import ModelError
from mlx_distill.models.head import Head
from mlx_distill.models.taps import Attention, Taps, attention_probabilities, attention_scores, tapped
from mlx_distill.options import Student
from mlx_distill.student import add_adapters, checkpoint_layers

TOKENS = mx.array([[1, 2, 3, 4, 5], [7, 3, 9, 1, 2]])
FUSED = mx.fast.scaled_dot_product_attention
LORA = Student(model="embedded", method="lora", rank=2, scale=1.0)


def plain_model() -> Any:
    return tiny_model(num_key_value_heads=1).model


def checkpointed_model() -> Any:
    model = plain_model()
    checkpoint_layers(model)
    return model


def adapted_model() -> Any:
    model = plain_model()
    add_adapters(model, LORA, 0)
    random = np.random.default_rng(0)
    matrices = [
        (name, mx.array(random.normal(size=matrix.shape) / 10, mx.float32))
        for name, matrix in flat(model.trainable_parameters())
    ]
    model.update(tree_unflatten(matrices))  # of a new LoRA one half is zero
    return model


MODELS = {"plain": plain_model, "checkpointed": checkpointed_model, "lora": adapted_model}


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def of_hidden(taps: Taps) -> mx.array:
    """A function of what two layers give that is no sum of squares, so that signs matter."""
    return mx.sin(3 * taps.hidden[1]).mean() + mx.tanh(taps.hidden[2] * taps.hidden[0]).mean()


def of_attention(taps: Taps) -> mx.array:
    weights = mx.sin(3 * mx.arange(25.0)).reshape(5, 5)
    return sum(((attention_probabilities(taps.attention[n]) * weights).mean() for n in (1, 2)), mx.array(0.0))


def loss_of(model: Any, function: Callable[[Taps], mx.array]) -> mx.array:
    with tapped(model, hidden=[0, 1, 2], attention=[1, 2]) as taps:
        model(TOKENS)
    return function(taps)


# --- values


def test_hidden_states_are_what_each_layer_gives() -> None:
    model = plain_model()
    expected = [model.model.embed_tokens(TOKENS)]
    for layer in model.layers:
        expected.append(layer(expected[-1], "causal"))
    with tapped(model, hidden=range(3)) as taps:
        model(TOKENS)
    assert sorted(taps.hidden) == [0, 1, 2]
    for number, states in enumerate(expected):
        assert mx.array_equal(taps.hidden[number], states)
        others = [taps.hidden[n] for n in range(3) if n != number]
        assert not any(mx.allclose(other, states) for other in others)  # a layer too early or too late


def test_the_output_is_the_same_and_the_model_as_it_was() -> None:
    model = plain_model()
    before, classes = model(TOKENS), [type(layer) for layer in model.layers]
    names = [name for name, _ in flat(model.parameters())]
    with tapped(model, hidden=[0, 1, 2], attention=[1, 2]):
        assert mx.fast.scaled_dot_product_attention is not FUSED
        assert [type(layer) for layer in model.layers] != classes
        assert [name for name, _ in flat(model.parameters())] == names
        assert mx.array_equal(model(TOKENS), before)
    assert mx.fast.scaled_dot_product_attention is FUSED
    assert [type(layer) for layer in model.layers] == classes
    assert mx.array_equal(model(TOKENS), before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_is_as_it_was_after_an_error(make: Callable[[], Any]) -> None:
    model = make()
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(KeyError, match="in between"), tapped(model, hidden=[2], attention=[1]):
        raise KeyError("in between")
    with pytest.raises(ModelError), tapped(model, hidden=[2], attention=[1]):
        pass  # no call, nothing seen
    with pytest.raises(ModelError), tapped(model, hidden=[1, 3]):
        raise AssertionError("not reached")
    assert [type(layer) for layer in model.layers] == classes
    assert mx.fast.scaled_dot_product_attention is FUSED


def test_only_what_is_asked_for_is_recorded() -> None:
    model = plain_model()
    with tapped(model, hidden=[2], attention=[1]) as taps:
        model(TOKENS)
        assert list(taps.attention) == [1]  # what is not asked for is not kept even for a moment
    assert (list(taps.hidden), list(taps.attention)) == ([2], [1])
    with tapped(model) as taps:
        model(TOKENS)
    assert taps == Taps()


def test_a_call_that_failed_leaves_no_layer_running() -> None:
    model = plain_model()
    with tapped(model, attention=[1]) as expected:
        model(TOKENS)
    with tapped(model, attention=[1]) as taps:
        with pytest.raises(TypeError):
            model.layers[0]("no array")
        model(TOKENS)
    assert mx.array_equal(taps.attention[1].queries, expected.attention[1].queries)


def test_two_models_of_one_architecture_do_not_mix() -> None:
    student, teacher = tiny_model(seed=0).model, tiny_model(seed=1, num_hidden_layers=3).model
    with tapped(teacher, hidden=[3], attention=[3]) as alone:
        teacher(TOKENS)
    with (
        tapped(student, hidden=[2], attention=[1, 2]) as ours,
        tapped(teacher, hidden=[3], attention=[3]) as theirs,
    ):
        student(TOKENS)
        teacher(TOKENS)
    assert list(theirs.attention) == [3] and list(ours.attention) == [1, 2]
    assert mx.array_equal(theirs.hidden[3], alone.hidden[3])
    assert mx.array_equal(theirs.attention[3].queries, alone.attention[3].queries)
    assert mx.fast.scaled_dot_product_attention is FUSED


def test_taps_and_the_head_share_one_call() -> None:
    model = plain_model()
    head = Head(model, 50)
    with tapped(model, hidden=[2]) as taps:
        last = head.hidden(TOKENS)
    assert mx.array_equal(model.model.norm(taps.hidden[2]), last)


def test_layers_that_give_tuples() -> None:
    """Their first element is the hidden state: gemma4's layers hand keys and values on beside it."""
    model: Any = tiny_of("gemma4_text")
    with tapped(model, hidden=[len(model.layers)]) as taps:
        logits = model(TOKENS)
    found = Head(model, 64).logits(model.model.norm(taps.hidden[len(model.layers)]))
    assert mx.allclose(found, logits, atol=1e-5)


# --- attention


def random_attention(mask: mx.array | None, sinks: mx.array | None = None) -> Attention:
    """Two rows of five places, four heads of queries and two of keys, of a width that is no square."""
    random = np.random.default_rng(0)
    shapes = ((2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 3))
    return Attention(*(mx.array(random.normal(size=shape), mx.float32) for shape in shapes), 0.7, mask, sinks)


SEEN = mx.tril(mx.ones((5, 5))).astype(mx.bool_) & ~mx.tril(mx.ones((5, 5)), -3).astype(mx.bool_)
MASKS = {
    "causal": (None, None),
    "window": (SEEN, None),
    "added": (mx.where(SEEN, mx.arange(5.0) / 3, -mx.inf), None),
    "each head": (mx.broadcast_to(SEEN, (1, 4, 5, 5)), None),
    "sinks": (None, mx.array([0.3, -1.0, 2.0, 0.0])),
}
each_mask = pytest.mark.parametrize(("mask", "sinks"), MASKS.values(), ids=MASKS)


def in_float64(attention: Attention, *, tiled: bool = False) -> np.ndarray:
    """Probabilities by the definition, in NumPy. tiled: the mistake of giving heads of keys in turn."""
    q, k = (np.array(a, np.float64) for a in (attention.queries, attention.keys))
    k = np.tile(k, (1, 2, 1, 1)) if tiled else np.repeat(k, 2, axis=1)
    scores = np.einsum("bhid,bhjd->bhij", q, k) * attention.scale
    mask = np.tril(np.ones((5, 5), bool)) if attention.mask is None else np.array(attention.mask)
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    sinks = attention.sinks
    taken = 0.0 if sinks is None else np.exp(np.array(sinks, np.float64))[:, None, None]
    shares = np.exp(scores)
    return shares / (shares.sum(-1, keepdims=True) + taken)


@each_mask
def test_probabilities_are_the_definition(mask: mx.array | None, sinks: mx.array | None) -> None:
    attention = random_attention(mask, sinks)
    found = np.array(attention_probabilities(attention))
    np.testing.assert_allclose(found, in_float64(attention), rtol=1e-5, atol=1e-7)
    wrong = [
        in_float64(attention, tiled=True),
        in_float64(attention._replace(scale=6**-0.5)),
        in_float64(attention._replace(mask=mx.ones((5, 5), dtype=mx.bool_))),
    ]
    for mistake in wrong:
        assert np.abs(found - mistake).max() > 1e-2


@each_mask
def test_probabilities_times_values_are_the_fused_output(
    mask: mx.array | None, sinks: mx.array | None
) -> None:
    attention = random_attention(mask, sinks)
    options = {"scale": attention.scale, "mask": "causal" if mask is None else mask, "sinks": sinks}
    fused = FUSED(attention.queries, attention.keys, attention.values, **options)
    probabilities, values = attention_probabilities(attention), mx.repeat(attention.values, 2, axis=1)
    assert mx.allclose(probabilities @ values, fused, rtol=1e-5, atol=1e-6)
    sums = probabilities.sum(-1)
    assert mx.allclose(sums, mx.ones_like(sums)).item() == (sinks is None)


def test_probabilities_have_a_finite_gradient_where_nothing_is_seen() -> None:
    """A row of padding sees no place: zeros there, and no nan anywhere."""
    mask = SEEN & (mx.arange(5) != 0)[:, None]

    def loss(queries: mx.array) -> mx.array:
        return attention_probabilities(random_attention(mask)._replace(queries=queries))[..., 1].sum()

    queries = random_attention(mask).queries
    assert mx.isfinite(mx.grad(loss)(queries)).all() and mx.abs(mx.grad(loss)(queries)).max() > 0.01
    found = attention_probabilities(random_attention(mask))
    assert (found[:, :, 0] == 0).all() and mx.allclose(found[:, :, 1:].sum(-1), mx.ones((2, 4, 4)))
    assert mx.isnan(mx.softmax(attention_scores(random_attention(mask)), axis=-1)).any()  # the usual way


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_each_layer_has_its_own_attention(model_type: str) -> None:
    """Causal, windows, windows with sinks, and masks that are added: all that is seen adds up."""
    model: Any = tiny_of(model_type)
    outputs: list[mx.array] = []

    def spy(*args: Any, **options: Any) -> mx.array:
        outputs.append(FUSED(*args, **options))
        return outputs[-1]

    mx.fast.scaled_dot_product_attention = spy
    numbers = range(1, len(model.layers) + 1)
    try:
        with tapped(model, attention=numbers) as taps:
            model(mx.concatenate([TOKENS, TOKENS], axis=1))
        assert mx.fast.scaled_dot_product_attention is spy
    finally:
        mx.fast.scaled_dot_product_attention = FUSED
    assert len(outputs) == len(model.layers)
    for number in numbers:
        attention = taps.attention[number]
        repeats = attention.queries.shape[1] // attention.values.shape[1]
        found = attention_probabilities(attention) @ mx.repeat(attention.values, repeats, axis=1)
        assert mx.allclose(found, outputs[number - 1], rtol=1e-4, atol=1e-5)
        assert not mx.allclose(found, outputs[number - 2], rtol=1e-4, atol=1e-5)


# --- gradients


def slope(model: Any, function: Callable[[Taps], mx.array], direction: Any, step: float = 2e-2) -> float:
    """Central differences along a direction in all that trains, with the error of step**2 taken out."""
    start = model.trainable_parameters()

    def at(length: float) -> float:
        model.update(tree_map(lambda a, d: a + length * d, start, direction))
        value = loss_of(model, function).item()
        model.update(start)
        return value

    wide, narrow = ((at(h) - at(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * narrow - wide) / 3


@pytest.mark.parametrize("function", [of_hidden, of_attention])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradients_are_finite_differences(
    make: Callable[[], Any], function: Callable[[Taps], mx.array]
) -> None:
    model = make()
    found = nn.value_and_grad(model, lambda: loss_of(model, function))()[1]
    # Along the gradient itself the slope is its length, and the differences are far above rounding.
    length = sum((a.square().sum() for _, a in flat(found)), mx.array(0.0)).sqrt().item()
    assert length > 1e-3
    direction = tree_map(lambda a: a / length, found)
    assert slope(model, function, direction) == pytest.approx(length, rel=2e-4)

    # What a tap outside of the graph would give.
    def cut(taps: Taps) -> mx.array:
        taps.hidden = {n: mx.stop_gradient(a) for n, a in taps.hidden.items()}
        taps.attention = {
            n: a._replace(queries=mx.stop_gradient(a.queries)) for n, a in taps.attention.items()
        }
        return function(taps)

    wrong = nn.value_and_grad(model, lambda: loss_of(model, cut))()[1]
    along = sum(((a * b).sum() for (_, a), (_, b) in zip(flat(wrong), flat(direction), strict=True)))
    assert mx.array(along).item() != pytest.approx(length, rel=2e-4)


def gradient_of(model: Any) -> dict[str, mx.array]:
    """Of what is tapped and of the logits, whose gradient comes through recomputed layers."""

    def loss() -> mx.array:
        with tapped(model, hidden=[0, 1, 2], attention=[1, 2]) as taps:
            logits = model(TOKENS)
        return of_hidden(taps) + of_attention(taps) + logits.square().mean()

    return dict(flat(nn.value_and_grad(model, loss)()[1]))


def test_checkpointing_and_compiling_change_no_gradient() -> None:
    expected, model = gradient_of(plain_model()), checkpointed_model()
    compiled = mx.compile(lambda: gradient_of(model), inputs=[model.state], outputs=[model.state])
    for found in (gradient_of(model), compiled()):
        for name, value in expected.items():
            assert mx.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_one_compiled_step_sees_new_weights_and_new_tokens() -> None:
    """What is recorded belongs to the call, not to the trace."""
    model = plain_model()

    def look(tokens: mx.array) -> tuple[mx.array, mx.array]:
        with tapped(model, hidden=[1], attention=[2]) as taps:
            model(tokens)
        return taps.hidden[1], attention_probabilities(taps.attention[2])

    compiled = mx.compile(look, inputs=[model.state])
    for tokens in (TOKENS, TOKENS + 1):
        for found, expected in zip(compiled(tokens), look(tokens), strict=True):
            assert mx.allclose(found, expected, rtol=1e-4, atol=1e-6)
        model.update(tree_map(lambda a: 1.1 * a, model.parameters()))


# --- what cannot be had


def test_a_layer_beyond_the_model_is_refused() -> None:
    model = plain_model()
    with pytest.raises(ModelError, match="llama model has layers 0 to 2; there is no layer 3"):
        tapped(model, hidden=[3]).__enter__()
    with pytest.raises(ModelError, match="llama model has layers 1 to 2; there is no layer 0"):
        tapped(model, attention=[0]).__enter__()
    with pytest.raises(ModelError, match="there is no layer -1"):
        tapped(model, hidden=[-1]).__enter__()


def test_what_a_model_hides_is_named() -> None:
    message = r"model type mamba hides the attention of layer 1 .*fused.*; choose .*models.md"
    with pytest.raises(ModelError, match=message), tapped(mamba := tiny_of("mamba"), attention=[1]):
        mamba(TOKENS)
    message = r"model type gemma3n hides the hidden state of layer 2 .*\(B, T, D\).*; use .*models.md"
    with pytest.raises(ModelError, match=message), tapped(gemma3n := tiny_of("gemma3n"), hidden=[2]):
        gemma3n(TOKENS)
    message = "model type deepseek_v41 hides the attention of layer 2 .it looks at keys chosen for each query"
    with pytest.raises(ModelError, match=message), tapped(chosen := tiny_of("deepseek_v41"), attention=[2]):
        chosen(TOKENS)


def test_a_layer_that_is_not_run_is_named() -> None:
    model = plain_model()

    class Short(type(model.model)):
        def __call__(self, tokens: mx.array, *_: Any, **__: Any) -> mx.array:
            return self.norm(self.layers[0](self.embed_tokens(tokens), "causal"))

    model.model.__class__ = Short
    with tapped(model, hidden=[0, 1], attention=[1]):
        model(TOKENS)
    with pytest.raises(ModelError, match="hides the hidden state of layer 2"), tapped(model, hidden=[1, 2]):
        model(TOKENS)
