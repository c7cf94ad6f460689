"""The last projection, split off: exact for every kind of head, or not split at all."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from tiny import largest_gap, tiny_model
from tiny_configs import tiny_of

from mlx_distill.models.head import Head

V, CUT = 64, 60
TOKENS = mx.array([[3, 1, 7, 5, 2], [9, 11, 0, 4, 8]])


def gemma() -> Any:
    model: Any = tiny_of("gemma2")
    model.final_logit_softcapping = 3.0  # so low that it bends every logit
    return model


def granite() -> Any:
    model: Any = tiny_of("granite")
    model.logits_scaling = 4.0
    return model


def quantized(tied: bool) -> Any:
    model = tiny_model(V, tie_word_embeddings=tied).model
    nn.quantize(model, group_size=32, bits=4)
    return model


def adapted(tied: bool) -> Any:
    """A head under LoRA, with both matrices in use."""
    model: Any = tiny_model(V, tie_word_embeddings=tied).model
    mx.random.seed(1)
    if tied:
        head = model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=4)
    else:
        head = model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
    head.lora_b = 0.1 * mx.random.normal(head.lora_b.shape)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_of("llama"),
    "qwen3": lambda: tiny_of("qwen3"),
    "llama tied": lambda: tiny_model(V).model,
    "qwen3 tied": lambda: tiny_model(V, model_type="qwen3").model,
    "soft cap": gemma,
    "logit scale": lambda: tiny_of("cohere"),
    "logits divided": granite,
    "hidden scaled": lambda: tiny_of("minicpm"),
    "quantized": lambda: quantized(tied=False),
    "quantized tied": lambda: quantized(tied=True),
    "adapted": lambda: adapted(tied=False),
    "adapted tied": lambda: adapted(tied=True),
}
FOLLOWED = ("soft cap", "logit scale", "logits divided")
MATRICES = ("llama", "qwen3", "llama tied", "qwen3 tied", "hidden scaled")


@pytest.fixture(params=MODELS)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, MODELS[request.param]()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for _, module in model.named_modules()]


def test_the_split_gives_the_models_own_logits(named: tuple[str, Any]) -> None:
    name, model = named
    before, weights = classes(model), dict(tree_flatten(model.parameters()))
    expected = model(TOKENS)
    head = Head(model, V)
    hidden = head.hidden(TOKENS)
    assert not head.whole
    assert hidden.shape == (2, 5, 32)
    assert mx.allclose(head.logits(hidden), expected, rtol=1e-6, atol=1e-6)
    assert head.is_matrix() == (name in MATRICES)
    # With the model's own weights handed in, and position by position: nothing looks at neighbours.
    assert mx.allclose(head.logits(hidden, head.parameters()), expected, rtol=1e-6, atol=1e-6)
    assert mx.allclose(head.logits(hidden[:, 3:4]), expected[:, 3:4], rtol=1e-5, atol=1e-5)
    assert classes(model) == before
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == weights.keys()
    assert all(mx.array_equal(after[key], weights[key]) for key in weights)

    # The usual mistake, the projection without what follows it, must not pass.
    bare = getattr(head._projection, head._method)(hidden)
    assert mx.allclose(bare, expected, rtol=1e-2, atol=1e-2).item() == (name not in FOLLOWED)


def test_rows_that_pad_the_vocabulary_are_cut(named: tuple[str, Any]) -> None:
    _, model = named
    head, expected = Head(model, CUT), model(TOKENS)
    hidden = head.hidden(TOKENS)
    for logits in (head.logits(hidden), head.logits(hidden, head.parameters())):
        assert logits.shape == (2, 5, CUT)
        assert mx.allclose(logits, expected[..., :CUT], rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_model(named: tuple[str, Any]) -> None:
    """By the weights handed in and by those that the model holds: together all of them."""
    _, model = named
    head = Head(model, CUT)

    def loss(logits: mx.array) -> mx.array:
        return mx.sin(logits.astype(mx.float32)).sum(-1).sum()

    expected = nn.value_and_grad(model, lambda: loss(model(TOKENS)[..., :CUT]))(*[])[1]
    split = nn.value_and_grad(model, lambda: loss(head.logits(head.hidden(TOKENS))))(*[])[1]
    assert largest_gap(flat(split), flat(expected)) < 1e-5

    if not head.parameters(trainable=True):  # quantized: nothing to hand in moves
        return

    # Apart: through what the head reads alone, and through the weights that are handed in.
    hidden = head.hidden(TOKENS)
    by_weights = mx.grad(lambda weights: loss(head.logits(hidden, weights)))(head.parameters(trainable=True))
    fixed = tree_map(mx.array, head.parameters())
    by_hidden = nn.value_and_grad(model, lambda: loss(head.logits(head.hidden(TOKENS), fixed)))(*[])[1]
    [path] = [name for name, module in model.named_modules() if module is head._projection]
    both = flat(by_hidden)
    for key, value in flat(by_weights).items():
        both[f"{path}.{key}"] = both[f"{path}.{key}"] + value
    assert largest_gap(both, flat(expected)) < 1e-5
    # One of the two alone must not pass.
    assert largest_gap(flat(by_hidden), flat(expected)) > 1e-2


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


class Odd(nn.Module):
    """A model that does to its logits what only the tokens tell."""

    def __init__(self, width: int):
        super().__init__()
        mx.random.seed(0)
        self.embed, self.lm_head = nn.Embedding(V, 8), nn.Linear(8, V, bias=False)
        self.bias = nn.Embedding(V, width) if width else None

    def __call__(self, tokens: mx.array) -> mx.array:
        logits = self.lm_head(self.embed(tokens))
        return logits if self.bias is None else logits + self.bias(tokens)


@pytest.mark.parametrize("width", [1, V])  # one that fits any projection, and one that needs all logits
def test_what_cannot_be_split_stays_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd(width)
    head = Head(model, CUT)
    assert head.whole
    assert not head.is_matrix()
    assert head.parameters() == head.parameters(trainable=True) == {}
    expected = model(TOKENS)[..., :CUT]
    assert mx.array_equal(head.logits(head.hidden(TOKENS)), expected)
    assert not Head(Odd(0), CUT).whole

    # A split that is not compared with the model would be wrong, or not run.
    monkeypatch.setattr(Head, "_check", lambda self: None)
    unchecked = Head(model, CUT)
    if width == 1:
        assert not mx.allclose(unchecked.logits(unchecked.hidden(TOKENS)), expected, rtol=1e-2, atol=1e-2)
    else:
        with pytest.raises(ValueError):
            unchecked.hidden(TOKENS)


def test_a_model_without_a_projection_of_a_known_name_stays_whole() -> None:
    mx.random.seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    model.layers[0].as_linear = None  # an attribute, which no call uses
    head = Head(model, CUT)
    assert head.whole
    assert mx.array_equal(head.logits(head.hidden(TOKENS)), model(TOKENS)[..., :CUT])


@pytest.mark.parametrize("name", ["llama", "llama tied", "soft cap"])
def test_an_exception_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    head, before = Head(model, V), classes(model)
    hidden, expected = head.hidden(TOKENS), model(TOKENS)
    with pytest.raises(ValueError):
        head.logits(hidden[..., :-1])
    with pytest.raises(ValueError):
        head.logits(hidden, {"weight": mx.zeros((V, 3))})
    layer = type(model.layers[0])
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(layer, "__call__", fail)
        for call in (lambda: head.hidden(TOKENS), lambda: Head(model, V)):
            with pytest.raises(KeyboardInterrupt):
                call()
    assert classes(model) == before
    assert mx.array_equal(model(TOKENS), expected)


def test_a_compiled_step_sees_weights_that_move() -> None:
    """Weights are inputs of a trace, not constants that the split left in it."""
    model = MODELS["soft cap"]()
    head = Head(model, CUT)
    compiled = mx.compile(lambda tokens: head.logits(head.hidden(tokens)), inputs=[model.state])
    first = compiled(TOKENS)
    model.update(tree_map(lambda a: 1.5 * a, model.parameters()))
    assert mx.allclose(compiled(TOKENS), model(TOKENS)[..., :CUT], rtol=1e-5, atol=1e-5)
    assert not mx.allclose(compiled(TOKENS), first, rtol=1e-2, atol=1e-2)


def test_a_hidden_state_is_let_go_when_nobody_holds_it():
    """Python's garbage collector comes late, and does not know how much a step's arrays take."""
    import gc

    model = tiny_model(V).model
    head = Head(model, V)
    mx.eval(model.parameters())
    tokens = mx.zeros((8, 64), dtype=mx.int32)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(4):
            mx.eval(head.hidden(tokens))
        assert mx.get_active_memory() - before < 8 * 64 * 32 * 4
    finally:
        gc.enable()
