"""A model with experts turned into a dense one: the experts of a layer become one feed-forward layer.

An expert is a feed-forward layer `f_e(x) = D_e (silu(G_e x) * U_e x)`, and a layer of experts gives
`sum_e w_e(x) f_e(x)`, with routing weights that are 0 for the experts that the router does not choose.
Feed-forward layers whose outputs are added are one, as wide as all of them. What it cannot have is a router,
so each weight becomes its mean `c_e = E[w_e]` over the tokens of the data, multiplied into `D_e`:

    y(x) = sum_e c_e f_e(x) = [c_1 D_1 ... c_E D_E] (silu([G_1; ...; G_E] x) * [U_1; ...; U_E] x)

That is exact where weights do not depend on the token, as for an expert that is always chosen alone, and
for experts that are alike. Elsewhere it keeps the mean of the output as far as weights and outputs vary
independently; what depended on the router's choice is lost, and is for training to bring back. Every token
then goes through all of the width.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.errors import ModelError
from mlx_distill.models import Loaded
from mlx_distill.prune.importance import Statistics
from mlx_distill.prune.reading import read, sparse_layers, type_of
from mlx_distill.prune.surgery import built

DENSE = {"qwen3_moe": ("qwen3", "Qwen3ForCausalLM")}  # the same but for the experts, in mlx-lm
LEFT_OUT = (  # of config.json: what is about experts, and scaled positions, which mlx-lm's qwen3_moe has not
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "rope_parameters",
    "rope_scaling",
)


def planned_dense(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of the dense model, from that of the model with the experts that stay.

    Args:
        where: the recipe key that asks for it, for messages.

    Raises:
        ModelError: no experts, of another type, or not in every layer.
    """
    kind, place = config["model_type"], f"`{where}.dense`"
    if kind not in DENSE:
        known = ", ".join(DENSE)
        raise ModelError(f"{place}: model type {kind} has no experts that become one layer; {known} has")
    without = [i for i, sparse in enumerate(sparse_layers(type_of(config), read(config))) if not sparse]
    if without:
        raise ModelError(
            f"{place}: layer {without[0]} has no experts, and the layers of a {DENSE[kind][0]} are all "
            "of one width; leave `dense` out"
        )
    small = {key: value for key, value in config.items() if key not in LEFT_OUT}
    model_type, architecture = DENSE[kind]
    width = config["num_experts"] * config["moe_intermediate_size"]
    return small | {"model_type": model_type, "architectures": [architecture], "intermediate_size": width}


def dense_from_experts(loaded: Loaded, statistics: Statistics, where: str = "student.prune") -> Loaded:
    """A dense model of the experts of another; attention, norms and embeddings are the same arrays.

    Args:
        loaded: a model with experts, unquantized.
        statistics: of this very model.

    Raises:
        ModelError: as `planned_dense`.
    """
    config = planned_dense(loaded.config, where)
    arrays = dict(tree_flatten(loaded.model.parameters()))
    for layer, weights in enumerate(statistics.routing_weights):
        mlp = f"model.layers.{layer}.mlp"
        del arrays[f"{mlp}.gate.weight"]
        gate, up, down = (
            arrays.pop(f"{mlp}.switch_mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")
        )
        scaled = (mx.array(weights.astype(np.float32))[:, None, None] * down).astype(down.dtype)
        arrays |= {
            f"{mlp}.gate_proj.weight": gate.flatten(0, 1),  # (E, F, D) to (E F, D)
            f"{mlp}.up_proj.weight": up.flatten(0, 1),
            f"{mlp}.down_proj.weight": scaled.swapaxes(0, 1).flatten(1, 2),  # (E, D, F) to (D, E F)
        }
    model = built(config, arrays, loaded.model.training)
    mx.eval(model.parameters())
    return Loaded(model, config, loaded.tokenizer)
