"""Layers whose few bits learn: gradients, grids, and what moves."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill.counters import Counters
from mlx_distill.data.batch import Batches, make_batch
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import Quantize
from mlx_distill.prune.sparse import masks_of, sparsity_of
from mlx_distill.quantize import fake, learned
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.rounding import quantized
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50
METHODS = pytest.mark.parametrize("method", ["dwq", "qad"])
FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def level(method: str = "qad", **options: Any) -> Level:
    return levels(Quantize.model_validate({"method": method, "bits": 3, "group_size": 32, **options}))[0]


def learning(at: Level, *, bits: dict[str, int] | None = None, seed: int = 0) -> Loaded:
    """A tiny model in learning, what it learns moved away from rounding to the nearest."""
    loaded = learned.in_learning(tiny_model(V), at, bits)
    random = np.random.default_rng(seed)
    for _, module in loaded.model.named_modules():
        for name in {"low", "high", "moves", "lora_b"} & set(module):
            module[name] = mx.array(0.3 * random.standard_normal(module[name].shape), dtype=mx.float32)
    return loaded


def trained(
    at: Level, steps: int = 10, *, compiled: bool = False, masks: Any = None, student: Any = None, **more: Any
) -> Loaded:
    """A tiny model after some steps towards itself before rounding."""
    loaded = learned.in_learning(student or tiny_model(V), at, **more)
    teacher = LiveTeacher(tiny_model(V), V)
    plain = tiny_recipe(train={"compile": compiled, "beta2": 0.99, "learning_rate": 1e-2})
    how = learned.recipe_of(
        plain, at.options.model_copy(update={"steps": steps}), "student", "tests/no/such/folder"
    )
    log: Any = SimpleNamespace(
        stage="student-3bit",
        interrupts=SimpleNamespace(number=None, check=lambda: None),
        steps=lambda first, last: range(first, last + 1),
        restore=lambda *_: Counters(),
        metrics=lambda counters, *_: counters.close_window(),
    )
    train(loaded.model, [teacher], Batches(rows_of([20] * 32), 256, 0), how, V, log, masks=masks)
    return loaded


def dequantized(model: nn.Module) -> dict[str, mx.array]:
    """The weights that every quantized layer stands for."""
    return {
        path: mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=mx.float32,
        )
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


def computed(model: nn.Module, values: fake.Values) -> dict[str, mx.array]:
    """The weights that every learning layer computes with."""
    return {
        path: values(module, None).astype(mx.float32)
        for path, module in model.named_modules()
        if hasattr(module, "stored")
    }


# Gradients


class Tied(nn.Module):
    """An embedding that is looked up and read out of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(6, 64)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layer.as_linear(mx.tanh(self.layer(tokens)))


class Routed(nn.Module):
    """Experts, chosen by hand."""

    def __init__(self) -> None:
        super().__init__()
        from mlx_lm.models.switch_layers import SwitchLinear

        self.layer = SwitchLinear(64, 5, 3)

    def __call__(self, x: mx.array) -> mx.array:
        chosen = mx.array([[0, 2], [2, 1], [0, 1], [1, 2]])
        return self.layer(x[:, None, None], chosen)


def small(kind: str) -> tuple[nn.Module, mx.array]:
    """A module with one layer of 64 inputs, and what it reads."""
    mx.random.seed(3)
    x = mx.random.normal((4, 64))
    if kind == "experts":
        return Routed(), x
    if kind == "embedding":
        return Tied(), mx.array([[0, 3, 5], [1, 1, 2]])
    module = nn.Sequential(nn.Linear(64, 5, bias=kind == "bias"))
    return module, x


def only_grid(model: nn.Module, bits: int = 3) -> dict[str, dict[str, Any]]:
    [path] = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    return {path: {"bits": bits, "group_size": 32, "mode": "affine"}}


KINDS = pytest.mark.parametrize("kind", ["linear", "bias", "embedding", "experts"])


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_scales_and_biases_by_finite_differences(kind: str, compiled: bool) -> None:
    """Of the ends of each grid, which scales and biases are linear in."""
    model, x = small(kind)
    fake.learn_scales(model, only_grid(model))
    loss = nn.value_and_grad(model, lambda x: mx.square(model(x) - 0.5).sum())
    if compiled:
        loss = mx.compile(loss, inputs=[model.state], outputs=[model.state])
    start = dict(tree_flatten(model.trainable_parameters()))
    assert {name.rpartition(".")[2] for name in start} == {"low", "high"}
    _, tree = loss(x)
    gradients = dict(tree_flatten(tree))
    random = np.random.default_rng(0)
    for name, array in start.items():
        for _ in range(4):
            direction = mx.array(random.standard_normal(array.shape), dtype=mx.float32)
            ends = []
            for step in (0.02, -0.02):
                model.load_weights([(name, array + step * direction)], strict=False)
                ends.append(float(loss(x)[0]))
            model.load_weights([(name, array)], strict=False)
            expected = (ends[0] - ends[1]) / 0.04
            found = float((gradients[name] * direction).sum())
            assert found == pytest.approx(expected, rel=2e-2, abs=2e-2 * abs(expected) + 1e-3)
            assert abs(expected) > 1e-2


def test_gradient_of_a_scale_is_that_of_its_codes() -> None:
    """In NumPy: a scale multiplies the codes of its group, a bias is added to each."""
    random = np.random.default_rng(1)
    weight, slope = random.standard_normal((2, 3, 64))
    codes, scales, biases = mx.quantize(mx.array(weight, dtype=mx.float32), 32, 3)
    plain = np.array(mx.dequantize(codes, mx.ones_like(scales), mx.zeros_like(biases), 32, 3))
    outer = mx.array(slope, dtype=mx.float32)

    def loss(scales: mx.array, biases: mx.array) -> mx.array:
        return (mx.dequantize(codes, scales, biases, 32, 3) * outer).sum()

    by_scale, by_bias = mx.grad(loss, (0, 1))(scales, biases)
    groups = slope.reshape(3, 2, 32)
    np.testing.assert_allclose(np.array(by_scale), (groups * plain.reshape(3, 2, 32)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(np.array(by_bias), groups.sum(-1), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_ends_of_a_grid_are_its_first_and_last_code(bits: int) -> None:
    """In NumPy: the values lie evenly from the bias, moved by `low` steps, to the last, moved by `high`."""
    model, _ = small("linear")
    fake.learn_scales(model, only_grid(model, bits))
    layer: Any = model.layers[0]  # type: ignore[attr-defined]
    layer.low, layer.high = layer.low + 0.25, layer.high - 1.5
    scales, biases = (np.array(array, dtype=np.float64)[..., None] for array in (layer.scales, layer.biases))
    codes = np.array(mx.dequantize(layer.weight, mx.ones((5, 2)), mx.zeros((5, 2)), 32, bits))
    last = 2**bits - 1
    first, final = biases + 0.25 * scales, biases + (last - 1.5) * scales
    expected = first + (final - first) * codes.reshape(5, 2, 32) / last
    np.testing.assert_allclose(
        np.array(fake.of_codes(layer)).reshape(5, 2, 32), expected, rtol=1e-4, atol=1e-6
    )


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_the_straight_through_gradient_is_that_at_the_rounded_weights(kind: str, compiled: bool) -> None:
    plain, x = small(kind)
    [(path, grid)] = only_grid(plain).items()
    layer = dict(plain.named_modules())[path]
    original = layer.weight
    layer.weight = mx.dequantize(*mx.quantize(original, **grid), **grid)
    plain.unfreeze()
    _, expected = nn.value_and_grad(plain, lambda x: mx.square(plain(x) - 0.5).sum())(x)
    model, _ = small(kind)
    fake.learn_weights(model, {path: grid})
    loss = nn.value_and_grad(model, lambda x: mx.square(model(x) - 0.5).sum())
    if compiled:
        loss = mx.compile(loss, inputs=[model.state], outputs=[model.state])
    _, found = loss(x)
    unit = dict(model.named_modules())[path].unit
    by_weight = dict(tree_flatten(expected))[f"{path}.weight"]
    by_move = dict(tree_flatten(found))[f"{path}.moves"] / unit
    assert float(mx.abs(by_weight).max()) > 0.1
    assert largest_gap({"": by_move}, {"": by_weight}) < 1e-5

    # The usual mistake: through MLX's own rounding only the two ends of a group get any.
    def straight(weight: mx.array) -> mx.array:
        return mx.square(mx.dequantize(*mx.quantize(weight, **grid), **grid)).sum()

    assert float((mx.grad(straight)(original) != 0).astype(mx.float32).mean()) < 0.1
    assert float((by_weight != 0).astype(mx.float32).mean()) > 0.6


# Grids


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["affine 2", "affine 3", "affine 4", "affine 5", "affine 8", *FIXED])
def test_what_learns_is_exactly_what_is_saved(mode: str, dtype: str) -> None:
    """Also behind moves, and with the type that scales will have."""
    name, _, bits = mode.partition(" ")
    shape = (
        {"bits": int(bits), "group_size": 32}
        if bits
        else dict(zip(("bits", "group_size"), FIXED[name], strict=True))
    )
    for method in ["qad"] + ["dwq"] * bool(bits):
        at = level(method, mode=name, dtype=dtype, **shape)
        one = learning(at)
        saved = learned.finished(tiny_model(V), at, None, fake.learned(one.model))
        inside = computed(one.model, fake.of_codes if method == "dwq" else fake.nearest)
        outside = dequantized(saved.model)
        assert inside.keys() == outside.keys() and len(inside) == 15
        for path, weight in inside.items():
            assert mx.array_equal(weight, outside[path]), (method, path)
        plain = dequantized(quantized(tiny_model(V), at.grid, None, dtype).model)
        assert any(not mx.array_equal(plain[path], outside[path]) for path in plain)


def test_a_symmetric_grid_would_be_another() -> None:
    """The usual mistake: fake quantization between -absmax and absmax is none of MLX's."""
    at = level(bits=4)
    one = learned.in_learning(tiny_model(V), at)
    [path] = [path for path in computed(one.model, fake.nearest) if path.endswith("layers.0.mlp.up_proj")]
    weight = dict(tiny_model(V).model.named_modules())[path].weight
    scale = mx.abs(weight).max(-1, keepdims=True) / 7
    symmetric = scale * mx.clip(mx.round(weight / scale), -8, 7)
    found = computed(one.model, fake.nearest)[path]
    assert float(mx.abs(found - symmetric).max()) > 1e-3
    assert mx.array_equal(
        found, dequantized(quantized(tiny_model(V), at.grid).model)[path].astype(mx.float32)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dwq"},
        {"method": "dwq", "mixed": [2, 8]},
        {"method": "qad"},
        {"method": "qad", "mixed": [2, 8]},
        {"method": "qad", "rank": 2},
    ],
)
def test_the_saved_model_computes_what_the_learning_one_does(options: dict[str, Any]) -> None:
    at = level(**options)
    bits = {"model.layers.0.self_attn.q_proj": 8, "model.embed_tokens": 2} if "mixed" in options else None
    one = learning(at, bits=bits)
    saved = learned.finished(tiny_model(V), at, bits, fake.learned(one.model))
    if bits:
        assert saved.config["quantization"]["model.embed_tokens"]["bits"] == 2
    tokens = make_batch(rows_of([12, 9])).tokens
    expected = one.model(tokens)
    assert float(mx.abs(saved.model(tokens) - expected).max()) < 1e-4 * float(mx.abs(expected).max())
    whole = tiny_model(V).model(tokens)
    assert float(mx.abs(whole - expected).max()) > 1e-2 * float(mx.abs(expected).max())


@METHODS
def test_before_learning_it_is_the_rounded_model(method: str) -> None:
    at = level(method)
    one = learned.in_learning(tiny_model(V), at)
    rounded = dequantized(quantized(tiny_model(V), at.grid).model)
    found = computed(one.model, fake.of_codes if method == "dwq" else fake.nearest)
    assert all(mx.array_equal(found[path], weight) for path, weight in rounded.items())


# What moves


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"method": "dwq"}, {"low", "high"}),
        ({"method": "qad"}, {"moves"}),
        ({"method": "qad", "rank": 2}, {"lora_a", "lora_b"}),
    ],
)
def test_only_what_learns_moves_and_it_is_in_float32(options: dict[str, Any], names: set[str]) -> None:
    student = tiny_model(V)
    student.model.set_dtype(mx.bfloat16)
    at = level(**options)
    one = learned.in_learning(student, at)
    moving = dict(tree_flatten(one.model.trainable_parameters()))
    assert {name.rpartition(".")[2] for name in moving} == names
    assert {array.dtype for array in moving.values()} == {mx.float32}
    before = dict(tree_flatten(one.model.parameters()))
    done = dict(tree_flatten(trained(at, 3, student=student_in_halves()).model.parameters()))
    for name, array in before.items():
        assert mx.array_equal(array, done[name]) == (name not in moving), name
        assert done[name].dtype == array.dtype


def student_in_halves() -> Loaded:
    student = tiny_model(V)
    student.model.set_dtype(mx.bfloat16)
    return student


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_an_update_moves_a_weight_by_that_share_of_a_step(bits: int, rank: int | None) -> None:
    """A gradient of one sign everywhere, as AdamW makes it: of the size of the learning rate."""
    model, _ = small("linear")
    fake.learn_weights(model, only_grid(model, bits), rank=rank)
    layer: Any = model.layers[0]  # type: ignore[attr-defined]
    _, step, _ = mx.quantize(layer.weight, 32, bits)
    assert float(layer.unit) == pytest.approx(float(mx.abs(step).mean()), rel=0.4)  # some values lie beyond
    before = fake.moved(layer)
    name = "moves" if rank is None else "lora_b"
    layer[name] = layer[name] + 0.01
    by = mx.sqrt(mx.square(fake.moved(layer) - before).mean()) / layer.unit
    assert 0.2 * 0.01 < float(by) < 3 * 0.01


def test_gradient_checkpointing_leaves_the_gradient_alone() -> None:
    found = []
    for checkpointed in (False, True):
        one = learning(level("dwq"))
        if checkpointed:
            checkpoint_layers(one.model)
        found.append(_sums(one))
    assert largest_gap(found[1], found[0]) < 1e-5


@METHODS
def test_compiled_and_plain_steps_give_the_same_numbers(method: str) -> None:
    """And in chunks of the last projection, which is the embedding here."""
    plain = _sums(learning(level(method)))
    for options in ({"compile": True}, {"logits_mib": 1}):
        assert largest_gap(_sums(learning(level(method)), **options), plain) < 1e-5
    assert all(float(mx.abs(array).max()) > 0 for array in plain.values())


def _sums(student: Loaded, **options: Any) -> dict[str, mx.array]:
    how = tiny_recipe(objective={"forward_kl": {}}, train={"compile": False, **options})
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    batch = make_batch(rows_of([40] * 8))
    objective = make_objective(student.model, [teacher], how, V)
    if "logits_mib" in options:
        objective.chunk = 16
    step = make_step(objective, make_optimizer(how.train), how)
    return dict(tree_flatten(step.gradients(batch, [teacher.targets(batch)], {})[0]))


@pytest.mark.parametrize("options", [{"method": "dwq"}, {"method": "qad"}, {"method": "qad", "rank": 4}])
def test_the_divergence_falls(options: dict[str, Any]) -> None:
    at, teacher, rows = level(**options), LiveTeacher(tiny_model(V), V), rows_of([20] * 16, seed=5)
    before = fidelity(learned.in_learning(tiny_model(V), at).model, rows, V, teacher=teacher)[0]["kl"]
    one = trained(at, 60)
    assert fidelity(one.model, rows, V, teacher=teacher)[0]["kl"] < 0.8 * before
    saved = learned.finished(tiny_model(V), at, None, fake.learned(one.model))
    assert fidelity(saved.model, rows, V, teacher=teacher)[0]["kl"] < 0.8 * before


def test_zeros_of_a_sparse_student_stay() -> None:
    def sparse() -> Loaded:
        student = tiny_model(V)
        layer: Any = student.model.layers[0].mlp.up_proj  # type: ignore[attr-defined]
        layer.weight = mx.where(mx.abs(layer.weight) < 0.05, 0, layer.weight)
        return student

    at = level(bits=4)
    masks = {path.replace(".weight", ".moves"): mask for path, mask in masks_of(sparse().model).items()}
    share = sparsity_of(sparse().model)
    kept = fake.learned(trained(at, student=sparse(), masks=masks).model)
    saved = learned.finished(sparse(), at, None, kept)
    assert sparsity_of(saved.model) >= share > 0.01
    lost = fake.learned(trained(at, student=sparse()).model)  # without masks they learn too
    zero = sparse().model.layers[0].mlp.up_proj.weight == 0  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.up_proj.weight"
    assert bool(mx.where(zero, kept[name], 0).any()) is False
    assert bool(mx.where(zero, lost[name], 0).any()) is True
