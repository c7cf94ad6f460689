"""A tiny model of every model type in mlx-lm, for what has to hold for all of them.

The fields of a type's `ModelArgs` are filled by name from `VALUES`; what a type names or needs otherwise
stands in `OWN`. Fields that neither knows keep their defaults.
"""

import dataclasses
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

LAYERS, WIDTH, VOCABULARY = 4, 32, 64
HALVES = ["full_attention", "sliding_attention"] * 2
MAMBA = ["mamba", "attention"] * 2
SIZES = {
    LAYERS: "num_hidden_layers num_layers n_layer n_layers num_transformer_layers "
    "num_attention_heads num_heads n_head n_heads num_query_heads swa_num_attention_heads "
    "mamba_n_heads mamba_num_heads linear_num_value_heads index_n_heads num_swa_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts "
    "kv_lora_rank q_lora_rank time_step_rank laurel_rank a_low_rank_dim v_low_rank_dim gate_low_rank_dim "
    "decay_low_rank_dim mamba_d_conv conv_kernel short_conv_kernel_size linear_conv_kernel_dim "
    "sliding_window sliding_window_size attention_window_size window_size qk_rope_head_dim",
    2: "num_key_value_heads num_kv_heads n_kv_heads n_shared_head swa_num_key_value_heads "
    "num_swa_key_value_heads num_attention_groups linear_num_key_heads num_global_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_top_k top_k_experts moe_topk moe_k "
    "mamba_n_groups n_groups mamba_expand layer_group_size conv_L_cache conv_window conv1d_width",
    8: "head_dim qk_nope_head_dim v_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_head mamba_head_dim mamba_d_state state_size ssm_state_size "
    "index_head_dim kv_channels hidden_size_per_layer_input global_head_dim",
    WIDTH: "hidden_size n_embd model_dim d_model hidden_dim mamba_d_ssm block_dim mamba_chunk_size",
    48: "intermediate_size moe_intermediate_size n_inner ff_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size ffn_hidden_size dense_intermediate_size moe_shared_expert_intermediate_size "
    "shared_expert_intermediate_size block_ff_dim intermediate_size_mlp share_expert_dim",
    VOCABULARY: "vocab_size num_vocab vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx block_size model_max_length index_topk",
    1: "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts n_group topk_group "
    "first_k_dense_replace group_norm_size num_dense_layers moe_layer_freq num_expert_group "
    "decoder_sparse_step routed_scaling_factor num_kv_shared_layers num_kv_reuse_layers "
    "logits_scaling attention_multiplier embedding_multiplier residual_multiplier output_multiplier",
}
VALUES: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "post_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "swa_rope_theta": 10000.0,
    "rotary_emb_base": 10000,
    "rope_local_base_freq": 10000.0,
    "rotary_pct": 0.5,
    "rotary_dim": 4,
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "conv_bias": False,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "use_qk_norm": True,
    "qk_norm": True,
    "post_norm": True,
    "query_pre_attn_scalar": 8.0,
    "mlp_only_layers": [],
    "sliding_window_pattern": 2,
    "full_attention_interval": 2,
    "rope_scaling": None,
    "time_step_limit": (0.001, 10.0),
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
BY_KIND = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in set(HALVES)}
WRAPPED = {  # types that hold a model of another type under `text_config`
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "kimi_k3": "kimi_k3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "llama",
    "muse_spark": "muse_spark",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
TEXT = {"gemma3n": "TextConfig", "qwen3_5": "TextModelArgs"}  # the text classes not called `TextArgs`
KDA = {
    "num_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
}
YARN = {"type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "ngram_vocab_size_ratio": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [0, 2]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {"factor": 1.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3n": {
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text": {"rope_parameters": BY_KIND, "use_double_wide_mlp": False},
    "granitemoehybrid": {"layer_types": MAMBA},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {"linear_attn_config": KDA, "hidden_act": "situ"},
    "kimi_linear": {"linear_attn_config": KDA},
    "laguna": {"rope_parameters": BY_KIND},
    "lfm2": {
        "block_multiple_of": 4,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", "full_attention"] * 2},
    "lille-130m": {"n_embd": 96},  # below, its feed-forward width rounds to zero
    "llama4": {"attention_chunk_size": 8, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [0, 1, 0, 1]},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mellum": {"rope_parameters": BY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * 2,
        "moe_layer_freq": [0, 1] * 2,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.0, 1.0],
        },
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
    },
    "minimax_m3_vl": {"moe_layer_freq": [0, 1] * 2},
    "ministral3": {"rope_parameters": {**VALUES["rope_parameters"], **YARN}},
    "mistral4": {"rope_parameters": {**VALUES["rope_parameters"], **YARN}},
    "muse_spark": {
        "layer_rope_theta": [10000.0] * LAYERS,
        "final_logit_softcapping": 20.0,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
        "mlp_layer_types": ["sparse"] * LAYERS,
    },
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * LAYERS
    },
    "nemotron_h": {"layer_types": ["mamba", "attention", "moe", "mlp"], "moe_intermediate_size": 48},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_dim_divisor": 8,
        "ffn_multipliers": [1.0] * 4,
    },
    "phi3small": {
        "vocab_size": 100_352,  # it writes to logits at ids above 100,000
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
    },
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": BY_KIND, "hidden_act": "gelu"},
    "stablelm": {"use_qkv_bias": True},
}


@cache
def model_types() -> list[str]:
    """Every module of mlx-lm that defines a model, whether or not it can be imported here."""
    import mlx_lm.models

    found = []
    for path in Path(mlx_lm.models.__path__[0]).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "\nclass ModelArgs" in source and "\nclass Model(" in source:
            found.append(path.stem)
    return sorted(found)


def tiny_config(model_type: str) -> dict[str, Any]:
    """A config of this type, as of config.json."""
    own = OWN.get(model_type, {})
    config = {**_filled(_module(model_type).ModelArgs), **own, "model_type": model_type}
    if model_type in WRAPPED:
        inner = WRAPPED[model_type]
        text = getattr(_module(inner), TEXT.get(inner, "TextArgs" if inner == model_type else "ModelArgs"))
        config["text_config"] = {**_filled(text), **OWN.get(inner, {}), "model_type": inner}
    return config


def _module(model_type: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{model_type}")


def _filled(arguments: type) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(arguments)}
    filled = {name: value for name, value in VALUES.items() if name in fields}
    kinds = fields.get("layer_types")
    if kinds is not None and kinds.default is dataclasses.MISSING:  # else a type has its own usual ones
        filled["layer_types"] = HALVES
    return filled


def tiny_of(model_type: str, seed: int = 0) -> nn.Module:
    """A model of this type, with no weight at zero or one, where mistakes would not show."""
    module = _module(model_type)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(tiny_config(model_type)))

    def moved(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return (array + 0.1 * mx.random.normal(array.shape)).astype(mx.float32)

    model.update(tree_map(moved, model.parameters()))
    mx.eval(model.parameters())
    return model
