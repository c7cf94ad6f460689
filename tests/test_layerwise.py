"""AWQ and GPTQ through mlx-lm: every layer on its grid, nothing left behind, better than rounding alone."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from test_quantize import MOE, arrays_of, logits_of, of_type
from tiny import tiny_tokenizer

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.errors import Fault
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize
from mlx_distill.quantize import layerwise
from mlx_distill.quantize.layerwise import awq_quantized, gptq_quantized, packed
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.rounding import bits_per_weight, layer_grids, leaves, plain_layers, quantized

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
GEMMA = {**SIZES, "num_hidden_layers": 6, "sliding_window_pattern": 6}
DEEPSEEK = {
    **SIZES,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "gready",
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_theta": 1e4,
    "rope_scaling": {"factor": 1.0, "type": "yarn"},
    "attention_bias": False,
}
TYPES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": {**SIZES, "rope_theta": 1e4},
    "qwen3": {**SIZES, "rope_theta": 1e4},
    "gemma3_text": GEMMA,
    "deepseek_v2": DEEPSEEK,
    "phi3": {**SIZES, "rope_theta": 1e4},
    "qwen3_moe": {**SIZES, **MOE},
}
CASES = [("awq", name) for name in list(TYPES)[:6]] + [("gptq", name) for name in TYPES]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def level_of(method: str, bits: int = 4, **options: Any) -> Level:
    return levels(Quantize.model_validate({"method": method, "bits": bits, "group_size": 32, **options}))[0]


def made(method: str, loaded: Loaded, tokens: mx.array, **options: Any) -> Loaded:
    by_layer = {"awq": awq_quantized, "gptq": gptq_quantized}[method]
    return by_layer(loaded, level_of(method, **options), tokens)


def calibration(size: int) -> mx.array:
    """Few tokens in many rows, so that the layers read something with a direction."""
    random = np.random.default_rng(0)
    return mx.array(
        random.choice(size, p=np.arange(size) / np.arange(size).sum(), size=(8, 24)).astype(np.int32)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_every_layer_is_on_the_grid_and_plain_mlx_lm_opens_it(
    method: str,
    model_type: str,
    tied: bool,
    tokenizer: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fresh() -> Loaded:
        return of_type(model_type, tokenizer, **TYPES[model_type], tie_word_embeddings=tied)

    loaded = fresh()
    level = level_of(method)
    wanted = layer_grids(loaded.model, level.grid)
    small = made(method, loaded, calibration(len(tokenizer)))
    assert capfd.readouterr() == ("", "")
    stored = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in leaves(small.model)
        if hasattr(module, "bits")
    }
    assert stored == wanted and len(wanted) > 7
    plain = quantized(fresh(), level.grid)
    assert small.config == plain.config
    # Same names, shapes and types, so the same size: nothing measured on the way is left on the modules.
    shapes = [
        {path: (value.shape, value.dtype) for path, value in arrays_of(one.model).items()}
        for one in (small, plain)
    ]
    assert shapes[0] == shapes[1]
    assert bits_per_weight(small.model) == bits_per_weight(plain.model)
    models.save(tmp_path, small)
    again: Any = mlx_lm.load(str(tmp_path))[0]
    assert np.array_equal(logits_of(again), logits_of(small.model))
    assert not np.array_equal(logits_of(small.model), logits_of(plain.model))


@pytest.mark.parametrize(("method", "bits"), [("awq", 2), ("awq", 3), ("gptq", 2), ("gptq", 4)])
def test_layers_lose_less_than_by_rounding_alone(method: str, bits: int, tokenizer: Any) -> None:
    """What the last layers give is nearer to that of the unquantized model, on what they were measured on."""
    tokens = calibration(len(tokenizer))

    def hidden(loaded: Loaded) -> mx.array:
        return loaded.model["model"](tokens)

    def fresh() -> Loaded:
        """With inputs of very different size, as real layers have them."""
        loaded = of_type("llama", tokenizer, **SIZES, tie_word_embeddings=False)
        scale = mx.exp(mx.random.normal((64,), key=mx.random.key(3)))
        for layer in loaded.model["model"].layers:
            layer.input_layernorm.weight = layer.post_attention_layernorm.weight = scale
        return loaded

    right = hidden(fresh())
    lost = {
        name: float(((hidden(one) - right) ** 2).mean(-1).mean())
        for name, one in (
            ("rtn", quantized(fresh(), level_of(method, bits).grid)),
            (method, made(method, fresh(), tokens, bits=bits)),
        )
    }
    assert lost[method] < 0.9 * lost["rtn"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", None), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_types_are_those_of_plain_rounding(
    method: str, stored: str, dtype: str | None, tokenizer: Any
) -> None:
    tokens = calibration(len(tokenizer))[:2, :6]
    both = []
    for by in (method, "rtn"):
        loaded = of_type("qwen2", tokenizer, **TYPES["qwen2"])
        loaded.model.set_dtype(getattr(mx, stored))
        level = level_of(by, dtype=dtype)
        small = made(method, loaded, tokens, dtype=dtype) if by == method else None
        small = small or quantized(loaded, level.grid, None, dtype)
        both.append({path: value.dtype for path, value in arrays_of(small.model).items()})
    assert both[0] == both[1]


def test_gptq_sums_beyond_float16(tokenizer: Any) -> None:
    """Inputs of 100 squared and summed over 192 tokens are 2 million: mlx-lm alone gives no number there."""
    from mlx_lm.quant.gptq import gptq_quantize

    tokens = calibration(len(tokenizer))

    def fresh() -> Loaded:
        loaded = of_type("llama", tokenizer, **SIZES)
        loaded.model["model"].norm.weight = mx.full((64,), 1.0)
        for layer in loaded.model["model"].layers:
            layer.post_attention_layernorm.weight = mx.full((64,), 100.0)
        loaded.model.set_dtype(mx.float16)
        return loaded

    small = made("gptq", fresh(), tokens)
    assert np.isfinite(logits_of(small.model)).all()
    theirs = gptq_quantize(fresh().model, tokens, 4, 32, 4, 32)[0]
    assert not np.isfinite(logits_of(theirs)).all()


def test_a_layer_left_as_it_was_is_a_fault(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_lm.quant.gptq.gptq_quantize", lambda model, *rest: (model, {}))
    loaded = of_type("llama", tokenizer, **SIZES)
    with pytest.raises(Fault, match=r"embed_tokens was to be stored as .*'bits': 4.*, and is as .*None"):
        made("gptq", loaded, calibration(len(tokenizer)))


def test_what_is_measured_is_not_saved(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.quant import gptq

    right = gptq.gptq_quantize

    def leaving(model: Any, *rest: Any) -> Any:
        found = right(model, *rest)
        model.model.norm.input_feat = mx.zeros((1,))
        return found

    monkeypatch.setattr(gptq, "gptq_quantize", leaving)
    loaded = of_type("llama", tokenizer, **SIZES)
    with pytest.raises(Fault, match=r"mlx-lm left input_feat on model\.norm"):
        made("gptq", loaded, calibration(len(tokenizer)))


def test_calibration_rows_are_packed_without_padding() -> None:
    rows = [Encoded(list(range(10, 10 + n)), 1) for n in (3, 5, 4)]
    found = np.array(packed(rows))
    assert found.dtype == np.int32
    assert found.tolist() == [[10, 11, 12, 10, 11], [12, 13, 14, 10, 11]]  # 12 and 13 are left over


def test_long_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "LONGEST", 4)
    assert np.array(packed([Encoded(list(range(11)), 1)])).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_plain_layers_are_all_that_have_the_recipe_s_grid(tokenizer: Any) -> None:
    loaded = of_type("qwen3_moe", tokenizer, **TYPES["qwen3_moe"])
    plain = plain_layers(loaded.model)
    assert not any(path.endswith("mlp.gate") for path in plain)
    assert any(path.endswith("switch_mlp.up_proj") for path in plain)
