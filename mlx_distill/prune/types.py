"""The model types that can be pruned: which axis each dimension of each parameter runs along.

A table, and the only place that knows the types of mlx-lm. The axes of a parameter stand as text, one a
dimension with commas between: `heads, hidden` is a matrix with one row for each channel of each query head.
`a+b` are two axes one behind the other in one dimension.

    hidden        the residual stream
    feed_forward  inner channels of a layer, or of each of its experts
    heads         channels of the query heads, head_dim for each
    kv_heads      channels of the key and value heads, head_dim for each
    head_dim      channels of one head; never cut
    experts       routed experts
    vocabulary    tokens
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Rows = Mapping[str, str]  # parameter -> axes

NONE: Mapping[str, Any] = MappingProxyType({})

OUTSIDE = {"model.embed_tokens.weight": "vocabulary, hidden", "model.norm.weight": "hidden"}
HEAD = {"lm_head.weight": "vocabulary, hidden"}
NORMS = {"input_layernorm.weight": "hidden", "post_attention_layernorm.weight": "hidden"}
ATTENTION = {
    "self_attn.q_proj.weight": "heads, hidden",
    "self_attn.k_proj.weight": "kv_heads, hidden",
    "self_attn.v_proj.weight": "kv_heads, hidden",
    "self_attn.o_proj.weight": "hidden, heads",
}
INPUT_BIAS = {
    "self_attn.q_proj.bias": "heads",
    "self_attn.k_proj.bias": "kv_heads",
    "self_attn.v_proj.bias": "kv_heads",
}
ATTENTION_BIAS = {**INPUT_BIAS, "self_attn.o_proj.bias": "hidden"}
HEAD_NORMS = {"self_attn.q_norm.weight": "head_dim", "self_attn.k_norm.weight": "head_dim"}
FEED_FORWARD = {
    "mlp.gate_proj.weight": "feed_forward, hidden",
    "mlp.up_proj.weight": "feed_forward, hidden",
    "mlp.down_proj.weight": "hidden, feed_forward",
}
FEED_FORWARD_BIAS = {
    "mlp.gate_proj.bias": "feed_forward",
    "mlp.up_proj.bias": "feed_forward",
    "mlp.down_proj.bias": "hidden",
}
GATE_AND_UP = {
    "mlp.gate_up_proj.weight": "feed_forward+feed_forward, hidden",
    "mlp.down_proj.weight": "hidden, feed_forward",
}
EXPERTS = {
    "mlp.gate.weight": "experts, hidden",
    "mlp.switch_mlp.gate_proj.weight": "experts, feed_forward, hidden",
    "mlp.switch_mlp.up_proj.weight": "experts, feed_forward, hidden",
    "mlp.switch_mlp.down_proj.weight": "experts, hidden, feed_forward",
}


class ModelType(NamedTuple):
    """How mlx-lm lays out the models of one type, and what its `config.json` says of them."""

    layer: Rows  # in every layer
    dense: Rows = FEED_FORWARD  # in layers without experts
    sparse: Rows = NONE  # in layers with experts
    optional: Mapping[str, Rows] = NONE  # in every layer where this config key is true
    outside: Rows = OUTSIDE
    keys: Mapping[str, str] = NONE  # field of `Sizes` -> config key, where it is not the usual one
    defaults: Mapping[str, Any] = NONE  # of config keys, where mlx-lm has them
    reads_head_dim: bool = True  # else it is hidden_size / num_attention_heads, whatever the config says
    heads_divide: bool = False  # transformers opens a folder only if the heads divide hidden_size
    tied: bool | None = None  # whether the embedding is the head too; None: as `tie_word_embeddings` says
    tied_by_weights: bool = False  # tied if no head is stored, whatever the config says
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    embedding_scale: Literal["exact", "bfloat16"] | None = None  # embeddings times sqrt(hidden), so rounded
    global_every: str = ""  # config key P: every P-th layer attends to all, the others to a window
    rope_every: str = ""  # config key P: every P-th layer has no rotary positions
    inside: str = ""  # config key that holds the text model's config, with its parameters in language_model
    outermost: frozenset[str] = frozenset()  # keys that are read at the top in spite of `inside`


LLAMA = ModelType(
    layer={**NORMS, **ATTENTION},
    optional={"attention_bias": ATTENTION_BIAS, "mlp_bias": FEED_FORWARD_BIAS},
    defaults={"tie_word_embeddings": True},
)
QWEN2 = ModelType(
    layer={**NORMS, **ATTENTION, **INPUT_BIAS}, defaults={"tie_word_embeddings": True}, reads_head_dim=False
)
QWEN3 = ModelType(layer={**NORMS, **ATTENTION, **HEAD_NORMS})
QWEN3_MOE = QWEN3._replace(sparse=EXPERTS, keys={"feed_forward": "moe_intermediate_size"})
MIXTRAL = ModelType(
    layer={**NORMS, **ATTENTION},
    sparse={f"block_sparse_moe.{name.removeprefix('mlp.')}": axes for name, axes in EXPERTS.items()},
    keys={"experts": "num_local_experts"},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    reads_head_dim=False,
)
PHI3 = ModelType(
    layer={
        **NORMS,
        "self_attn.qkv_proj.weight": "heads+kv_heads+kv_heads, hidden",
        "self_attn.o_proj.weight": "hidden, heads",
    },
    dense=GATE_AND_UP,
    defaults={"tie_word_embeddings": False},
    reads_head_dim=False,
)
GLM4 = ModelType(
    layer={
        **NORMS,
        **ATTENTION,
        "post_self_attn_layernorm.weight": "hidden",
        "post_mlp_layernorm.weight": "hidden",
    },
    dense=GATE_AND_UP,
    optional={"attention_bias": INPUT_BIAS},
    tied=False,
)
GEMMA = ModelType(layer={**NORMS, **ATTENTION}, tied=True, norm_offset=1.0, embedding_scale="exact")
GEMMA2 = GEMMA._replace(
    heads_divide=True,
    layer={
        **GEMMA.layer,
        "pre_feedforward_layernorm.weight": "hidden",
        "post_feedforward_layernorm.weight": "hidden",
    },
)
GEMMA3 = GEMMA2._replace(
    layer={**GEMMA2.layer, **HEAD_NORMS},
    tied=None,
    tied_by_weights=True,
    embedding_scale="bfloat16",
    global_every="sliding_window_pattern",
    defaults={
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262144,
        "num_key_value_heads": 1,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
)
OLMO2 = LLAMA._replace(
    layer={
        **ATTENTION,
        "self_attn.q_norm.weight": "heads",
        "self_attn.k_norm.weight": "kv_heads",
        "post_attention_layernorm.weight": "hidden",
        "post_feedforward_layernorm.weight": "hidden",
    }
)
TYPES: dict[str, ModelType] = {
    "ernie4_5": ModelType(layer=LLAMA.layer, optional={"use_bias": {**ATTENTION_BIAS, **FEED_FORWARD_BIAS}}),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3._replace(
        inside="text_config",
        outermost=frozenset({"vocab_size"}),
        defaults={
            **GEMMA3.defaults,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gemma3_text": GEMMA3,
    "glm4": GLM4,
    "granite": LLAMA._replace(reads_head_dim=False),
    "llama": LLAMA._replace(heads_divide=True),
    "ministral3": LLAMA._replace(optional={}),
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "seed_oss": LLAMA._replace(
        optional={
            "attention_bias": INPUT_BIAS,
            "attention_out_bias": {"self_attn.o_proj.bias": "hidden"},
            "mlp_bias": FEED_FORWARD_BIAS,
        }
    ),
    "smollm3": LLAMA._replace(
        rope_every="no_rope_layer_interval", defaults={**LLAMA.defaults, "no_rope_layer_interval": 4}
    ),
}
