"""Experts turned into one feed-forward layer: exact where it can be, and told what it is before any work."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import EXPERTS, rows_of, tiny_model, tiny_tokenizer

from mlx_distill import models
from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.prune.dense import dense_from_experts, planned_dense
from mlx_distill.prune.importance import Statistics, measure

V = 50
TOKENS = mx.array([row.tokens for row in rows_of([9, 9], V)])


def moe(**shape: Any) -> Loaded:
    """An untied model with 4 experts of width 24, 2 for a token; heads that share keys and values."""
    sizes = {"intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return tiny_model(V, **{**EXPERTS, **sizes, **shape})


def with_weights(*layers: list[float]) -> Statistics:
    """Statistics that know mean routing weights alone."""
    return Statistics(1, np.zeros(0), {}, [], [], [np.array(layer, np.float64) for layer in layers])


def expert_of(loaded: Loaded, layer: int, expert: int) -> list[np.ndarray]:
    """Its matrices G, U and D in float64."""
    mlp: Any = loaded.model
    mlp = mlp.layers[layer].mlp.switch_mlp
    return [np.array(mlp[name].weight[expert], np.float64) for name in ("gate_proj", "up_proj", "down_proj")]


def gap(one: Loaded, other: Loaded) -> float:
    """Largest difference of logits, relative to the largest logit."""
    logits = [loaded.model(TOKENS) for loaded in (one, other)]
    return float(mx.abs(logits[0] - logits[1]).max() / mx.abs(logits[0]).max())


def test_a_layer_is_the_weighted_sum_of_its_experts() -> None:
    """Against the definition in float64: `sum_e c_e D_e (silu(G_e x) * U_e x)`."""
    loaded, means = moe(), [[0.5, 0.0, 0.2, 0.3], [0.1, 0.9, 0.7, 0.3]]
    dense: Any = dense_from_experts(loaded, with_weights(*means)).model
    x = np.random.default_rng(0).normal(size=(5, 32))
    for layer in range(2):
        expected = np.zeros((5, 32))
        for expert, mean in enumerate(means[layer]):
            gate, up, down = expert_of(loaded, layer, expert)
            inner = x @ gate.T
            expected += mean * ((inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T)
        found = dense.layers[layer].mlp(mx.array(x.astype(np.float32)))
        assert np.array(found) == pytest.approx(expected, abs=1e-6)


def test_an_expert_that_is_always_chosen_alone_is_kept_exactly() -> None:
    loaded = moe(num_experts_per_tok=1)
    model: Any = loaded.model
    for layer, expert in zip(model.layers, (2, 0), strict=True):
        layer.mlp.gate = Always(expert)
    statistics = measure(loaded, rows_of([9, 9], V), 100)
    assert [weights.argmax() for weights in statistics.routing_weights] == [2, 0]
    assert gap(loaded, dense_from_experts(loaded, statistics)) < 1e-6
    # The mean of the experts, whatever the router says, is another model.
    assert gap(loaded, dense_from_experts(loaded, with_weights([0.25] * 4, [0.25] * 4))) > 1e-2


class Always(nn.Linear):
    """A router that chooses one expert for every token."""

    def __init__(self, expert: int):
        super().__init__(32, 4, bias=False)
        self._logits = mx.where(mx.arange(4) == expert, 50.0, 0.0)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.broadcast_to(self._logits, (*x.shape[:-1], 4))


def test_experts_that_are_alike_are_kept_exactly() -> None:
    """Their weights add up to 1, however the router shares them out. Positions stay as they are, unscaled."""
    loaded = moe()
    loaded.config["rope_scaling"] = {"type": "linear", "factor": 4.0}  # which mlx-lm does not heed here
    model: Any = loaded.model
    for layer in model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = layer.mlp.switch_mlp[name]
            module.weight = mx.repeat(module.weight[:1], 4, axis=0)
    statistics = measure(loaded, rows_of([9, 9], V), 100)
    assert gap(loaded, dense_from_experts(loaded, statistics)) < 1e-5
    halved = [weights / 2 for weights in statistics.routing_weights]
    assert gap(loaded, dense_from_experts(loaded, statistics._replace(routing_weights=halved))) > 1e-2


def test_the_dense_model_is_an_ordinary_one(tmp_path: Any) -> None:
    from mlx_lm import load

    loaded = moe()._replace(tokenizer=tiny_tokenizer())
    loaded.model.eval()
    dense = dense_from_experts(loaded, with_weights([0.25] * 4, [0.25] * 4))
    assert dense.config == planned_dense(loaded.config, "student.prune")
    assert dense.config["model_type"] == "qwen3"
    assert not dense.model.training
    assert dense.config["intermediate_size"] == 4 * 24
    routers = 2 * 4 * 32  # layers, experts, hidden
    assert models.parameter_count(dense.model) == models.parameter_count(loaded.model) - routers
    before, after = (dict(tree_flatten(one.model.parameters())) for one in (loaded, dense))
    copied = [name for name in after if ".mlp." not in name]
    assert len(copied) == len(after) - 2 * 3
    assert all(mx.array_equal(before[name], after[name]) for name in copied)

    models.save(tmp_path, dense)
    reloaded = load(str(tmp_path))[0]
    assert mx.array_equal(reloaded(TOKENS), dense.model(TOKENS))
    assert not {"num_experts", "mlp_only_layers", "moe_intermediate_size"} & dense.config.keys()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_type_of_the_weights_stays(dtype: mx.Dtype) -> None:
    loaded = moe()
    loaded.model.set_dtype(dtype)
    dense = dense_from_experts(loaded, with_weights([0.25] * 4, [0.25] * 4))
    arrays: Any = tree_flatten(dense.model.parameters())
    assert {array.dtype for _, array in arrays} == {dtype}


def test_a_model_without_experts_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"`student\.prune\.dense`: model type llama has no experts"):
        planned_dense(tiny_model(V).config, "student.prune")
    mixed = {**moe().config, "mlp_only_layers": [1]}
    with pytest.raises(ModelError, match=r"`student\.prune\.dense`: layer 1 has no experts"):
        planned_dense(mixed, "student.prune")
    with pytest.raises(ModelError, match="layer 0 has no experts"):
        planned_dense({**moe().config, "decoder_sparse_step": 2}, "student.prune")
