"""Models with experts: built from a shape, trained, pruned, reloaded."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import EXPERTS, SHAPE, largest_gap, rows_of, tiny_model, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.data.batch import make_batch
from mlx_distill.models import Loaded
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import KeptSizes, Prune, Shape
from mlx_distill.prune.axes import count_of, sizes_of
from mlx_distill.prune.choose import choose
from mlx_distill.prune.importance import measure
from mlx_distill.prune.surgery import cut
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step

V = 50
EXPERT = "model.layers.0.mlp.switch_mlp.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


def moe(seed: int = 0, **shape: Any) -> Loaded:
    return tiny_model(V, seed, **{**EXPERTS, **shape})


class AllExperts(nn.Module):
    """The definition: every expert computes every token, and those not chosen get the weight 0."""

    def __init__(self, block: Any):
        super().__init__()
        self.gate, self.switch_mlp, self.top_k = block.gate, block.switch_mlp, block.top_k

    def __call__(self, x: mx.array) -> mx.array:
        shares = mx.softmax(self.gate(x), axis=-1)
        least = mx.stop_gradient(mx.sort(shares, axis=-1)[..., -self.top_k, None])
        chosen = mx.where(shares >= least, shares, 0.0)
        weights = chosen / chosen.sum(-1, keepdims=True)
        gate, up, down = (self.switch_mlp[f"{name}_proj"].weight for name in ("gate", "up", "down"))
        each = [(nn.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in zip(gate, up, down, strict=True)]
        return sum((weights[..., e, None] * one for e, one in enumerate(each)), mx.zeros_like(x))


def gradients_of(model: nn.Module, lengths: list[int], **train: Any) -> dict[str, mx.array]:
    recipe = tiny_recipe(train=train)
    teacher, batch = LiveTeacher(tiny_model(V, seed=9), V), make_batch(rows_of(lengths, V))
    step = make_step(make_objective(model, [teacher], recipe, V), make_optimizer(recipe.train), recipe)
    sums, _ = step.gradients(batch, [teacher.targets(batch)], {})
    mx.eval(sums)
    return dict(tree_flatten(sums))  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [[4], [25, 20, 18, 22]], ids=["as they come", "sorted by expert"])
def test_gradients_are_those_of_the_definition(lengths: list[int]) -> None:
    """mlx-lm gathers the matrices of the chosen experts, and from 64 choices on sorts tokens by them."""
    found = gradients_of(moe().model, lengths)
    model: Any = moe().model
    for layer in model.layers:
        layer.mlp = AllExperts(layer.mlp)
    expected = gradients_of(model, lengths)
    for name, gradient in found.items():
        assert largest_gap({name: gradient}, {name: expected[name]}) < 1e-4, name
        assert mx.isfinite(gradient).all()
    assert float(mx.abs(found[ROUTER]).max()) > 0  # the weights of its choice carry a gradient
    # A router whose choice alone counted would have another one.
    for layer in model.layers:
        layer.mlp.top_k = 1
    assert largest_gap(found, gradients_of(model, lengths)) > 1e-2


def trained(compiled: bool) -> dict[str, mx.array]:
    """Weights after four steps."""
    recipe, model = tiny_recipe(train={"compile": compiled}), moe().model
    teacher, optimizer = LiveTeacher(tiny_model(V, seed=9), V), make_optimizer(recipe.train)
    optimizer.init(model.trainable_parameters())
    step = make_step(make_objective(model, [teacher], recipe, V), optimizer, recipe)
    batch = make_batch(rows_of([25, 20, 18, 22], V))
    for _ in range(4):
        sums, parts = step.gradients(batch, [teacher.targets(batch)], {})
        step.update(sums, batch.weights.sum(), parts)
        mx.eval(model.state, optimizer.state)
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def test_compiled_and_plain_steps_give_the_same_numbers() -> None:
    plain, compiled = trained(False), trained(True)
    assert largest_gap(plain, compiled) < 1e-4
    before = dict(tree_flatten(moe().model.parameters()))
    moved = tree_map(lambda one, other: mx.abs(one - other).max(axis=(1, 2)), before[EXPERT], plain[EXPERT])
    assert (np.array(moved) > 1e-3).all()  # each of the experts learned


def test_a_built_model_survives_its_folder(tmp_path: Any) -> None:
    from mlx_lm import load

    tokenizer = tiny_tokenizer()
    built = models.build(Shape(**{**SHAPE, **EXPERTS}), tokenizer, seed=1)
    models.save(tmp_path, built)
    model = load(str(tmp_path))[0]
    tokens = mx.array([[3, 5, 7, 11]])
    assert mx.array_equal(model(tokens), built.model(tokens))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    told = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16}
    told |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    told |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 128}
    assert told.items() <= config.items()
    weights = dict(tree_flatten(model.parameters()))
    assert weights[EXPERT].shape == (4, 64, 32)
    assert weights[ROUTER].shape == (4, 32)
    # Each expert starts as a matrix of its own, as wide as a Linear of these sizes.
    assert np.array(weights[EXPERT].std(axis=(1, 2))) == pytest.approx(1 / np.sqrt(3 * 32), rel=0.1)
    assert not mx.array_equal(weights[EXPERT][0], weights[EXPERT][1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_experts_per_tok": None}, "model_type qwen3_moe needs `num_experts_per_tok`"),
        ({"num_experts": None}, "model_type qwen3_moe needs `num_experts`"),
        ({"num_experts_per_tok": 5}, "`num_experts_per_tok` 5 are more than there are: `num_experts` 4"),
        ({"model_type": "qwen3"}, "`num_experts` is for model_type qwen3_moe; qwen3 has no experts"),
        (
            {"model_type": "llama", "num_experts": None},
            "`num_experts_per_tok` is for model_type qwen3_moe; llama has no experts",
        ),
    ],
)
def test_experts_that_do_not_add_up_are_refused(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**{**SHAPE, **EXPERTS, **shape})


def test_all_experts_may_be_chosen() -> None:
    model = moe(num_experts_per_tok=4).model
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def shunning(experts: list[int]) -> Loaded:
    """A model that never routes a token to one expert of each layer.

    Channel 0 of the hidden states is 3 for every token, as no layer writes to it, and the router takes
    much off for it.
    """
    loaded = models.build(Shape(**{**SHAPE, **EXPERTS}), tiny_tokenizer(), seed=1)
    model: Any = loaded.model
    first = mx.arange(32) == 0
    embedding = model.model.embed_tokens
    embedding.weight = mx.where(first, 3.0, embedding.weight)
    for layer, expert in zip(model.layers, experts, strict=True):
        for module in (layer.self_attn.o_proj, layer.mlp.switch_mlp.down_proj):
            module.weight = mx.where(first[:, None], 0.0, module.weight)
        gate, shunned = layer.mlp.gate, mx.arange(4) == expert
        gate.weight = mx.where(shunned[:, None], mx.where(first, -100.0, 0.0), gate.weight)
    return loaded


def test_cutting_an_expert_that_is_never_chosen_changes_nothing(tmp_path: Any) -> None:
    from mlx_lm import generate, load

    loaded, rows = shunning([1, 3]), rows_of([9, 4, 13], V)
    statistics = measure(loaded, rows, 1000)
    assert [routed.argmin() for routed in statistics.routed] == [1, 3]
    sizes = sizes_of(loaded.config)._replace(experts=3)
    kept = choose(loaded, sizes, Prune(sizes=KeptSizes(num_experts=3)), statistics, seed=0)
    assert [experts.tolist() for experts in kept.experts] == [[0, 2, 3], [0, 1, 2]]
    small = cut(loaded, kept, statistics.inputs)
    assert small.config["num_experts"] == 3
    assert models.parameter_count(small.model) == count_of(small.config)

    def logits(one: Loaded) -> mx.array:
        return mx.concatenate([one.model(mx.array([row.tokens])) for row in rows], axis=1)

    before = logits(loaded)
    assert float(mx.abs(logits(small) - before).max() / mx.abs(before).max()) < 1e-6
    others = kept._replace(experts=[np.array([1, 2, 3]), np.array([0, 1, 3])])
    assert float(mx.abs(logits(cut(loaded, others)) - before).max() / mx.abs(before).max()) > 1e-2

    models.save(tmp_path, small)
    model, tokenizer = load(str(tmp_path))[:2]
    assert mx.array_equal(logits(Loaded(model, {}, None)), logits(small))
    assert generate(model, tokenizer, "def solve(x):", max_tokens=4) is not None


def test_an_expert_stays_for_what_it_gives_and_not_for_how_often_it_is_asked() -> None:
    loaded, rows = tiny_model(V, **EXPERTS), rows_of([9, 4, 13], V)
    model: Any = loaded.model
    often = int(measure(loaded, rows, 1000).routed[1].argmax())
    down = model.layers[1].mlp.switch_mlp.down_proj
    down.weight = mx.where((mx.arange(4) == often)[:, None, None], 1e-3 * down.weight, down.weight)
    statistics = measure(loaded, rows, 1000)
    assert statistics.routed[1].argmax() == often
    sizes = sizes_of(loaded.config)._replace(experts=3)
    kept = choose(loaded, sizes, Prune(sizes=KeptSizes(num_experts=3)), statistics, seed=0)
    assert often not in kept.experts[1]
