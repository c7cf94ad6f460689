"""What adds nothing can be cut away and nothing changes: one test for each axis, with the usual mistakes.

What goes is zero where it would be written or read, and random everywhere else.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_models import SHOWN, TOKENS, arrays_of, gap, norm_inputs, only, small_model, without, zero

from mlx_distill.errors import RecipeError
from mlx_distill.models import Loaded
from mlx_distill.prune import rescaling
from mlx_distill.prune.axes import everything
from mlx_distill.prune.sizes import Kept
from mlx_distill.prune.surgery import cut
from mlx_distill.prune.types import TYPES

WRITERS = ("o_proj.", "down_proj.")  # what layers add to the hidden states comes out of these


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma3", "glm4", "olmo2"],
)
def test_a_dead_hidden_channel_goes_unnoticed(model_type: str, tied: bool, monkeypatch: pytest.MonkeyPatch):
    """With every optional array present. Norms and the scale of embeddings are the types' own."""
    optional = dict.fromkeys(TYPES[model_type].optional, True)
    loaded = small_model(model_type, tie_word_embeddings=tied, num_hidden_layers=2, **optional)
    dead = [3, 17, 20, 31]
    zero(loaded, ("embed_tokens", *WRITERS), "hidden", dead)
    kept = everything(loaded.config)._replace(hidden=without(32, *dead))
    inputs = norm_inputs(loaded)
    assert gap(cut(loaded, kept, inputs), loaded) < 1e-6

    # The usual mistakes: weights of norms left alone, and embeddings that the model scales by the width.
    assert gap(cut(loaded, kept), loaded) > 1e-3
    if TYPES[model_type].embedding_scale:
        monkeypatch.setattr(rescaling, "_embedding_scale", lambda config: 1.0)
        assert gap(cut(loaded, kept, inputs), loaded) > 1e-4


def test_epsilon_counts_where_hidden_states_are_small():
    loaded = small_model("llama", rms_norm_eps=1e-2)
    zero(loaded, ("embed_tokens", *WRITERS), "hidden", list(range(16)))
    kept = everything(loaded.config)._replace(hidden=np.arange(16, 32))
    small = cut(loaded, kept, norm_inputs(loaded))
    assert small.config["rms_norm_eps"] == 2e-2
    assert gap(small, loaded) < 1e-6
    model: Any = small.model
    model.model.norm.eps = 1e-2
    assert gap(small, loaded) > 1e-3


def test_norms_give_in_the_mean_what_they_gave():
    """Where living channels go too, the mean square of what a norm gives without its weight is 1 again."""
    loaded = small_model("llama")
    kept = everything(loaded.config)._replace(hidden=np.arange(8))
    inputs = norm_inputs(loaded)
    path = "model.norm"
    weight, before = (arrays_of(one)[f"{path}.weight"] for one in (cut(loaded, kept, inputs), loaded))
    eps = loaded.config["rms_norm_eps"]
    expected = np.sqrt((inputs[path][:8].mean() + 4 * eps) / (inputs[path].mean() + eps))
    assert np.allclose(np.array(weight / before[:8]), expected, rtol=1e-6)
    assert abs(expected - 1) > 1e-2


@pytest.mark.parametrize("model_type", SHOWN)
def test_dead_inner_channels_go_unnoticed(model_type: str):
    """Others in each layer, and in each expert."""
    loaded = small_model(model_type)
    whole = everything(loaded.config)
    width = []
    for layer in whole.layers:
        dead = [layer, 10 + 2 * layer, 47]
        zero(loaded, ("down_proj.weight",), "feed_forward", dead, layer)
        width.append(without(48, *dead))
    assert gap(cut(loaded, whole._replace(feed_forward=width)), loaded) < 1e-6

    # The usual mistake: one choice for all layers.
    assert gap(cut(loaded, whole._replace(feed_forward=width[:1] * 4)), loaded) > 1e-3


def test_experts_lose_other_channels_each():
    loaded = small_model("qwen3_moe")
    whole = everything(loaded.config)
    arrays, width = arrays_of(loaded), []
    for layer in whole.layers:
        path = f"model.layers.{layer}.mlp.switch_mlp.down_proj.weight"
        down, alive = np.array(arrays[path]), []
        for expert in range(4):
            dead = [5 * expert + layer, 30 + expert]
            down[expert][:, dead] = 0
            alive.append(without(48, *dead))
        loaded.model.load_weights([(path, mx.array(down))], strict=False)
        width.append(np.stack(alive))
    assert gap(cut(loaded, whole._replace(feed_forward=width)), loaded) < 1e-6
    swapped = [rows[::-1] for rows in width]
    assert gap(cut(loaded, whole._replace(feed_forward=swapped)), loaded) > 1e-3
    # With an expert cut away, the rows are of those that stay.
    fewer = whole._replace(
        feed_forward=[rows[[0, 2, 3]] for rows in width], experts=[np.array([0, 2, 3])] * 4
    )
    both = cut(cut(loaded, whole._replace(experts=[np.array([0, 2, 3])] * 4)), _widths(fewer))
    assert mx.array_equal(cut(loaded, fewer).model(TOKENS), both.model(TOKENS))


def _widths(kept: Kept) -> Kept:
    return kept._replace(experts=[np.arange(3)] * 4)


def dead_heads(loaded: Loaded, layer: int, heads: list[int]) -> None:
    channels = [8 * head + n for head in heads for n in range(8)]
    names = (
        ("o_proj.weight", "q_proj.", "k_proj.")
        if "olmo2" in loaded.config["model_type"]
        else ("o_proj.weight",)
    )
    zero(loaded, names, "heads", channels, layer)


@pytest.mark.parametrize("model_type", [name for name in SHOWN if TYPES[name].reads_head_dim] + ["olmo2"])
def test_dead_heads_go_unnoticed(model_type: str):
    """One query head of each group, another in each layer."""
    loaded = small_model(model_type)
    whole = everything(loaded.config)
    heads = []
    for layer in whole.layers:
        dead = [layer % 2, 2 + layer // 2]
        dead_heads(loaded, layer, dead)
        heads.append(without(4, *dead))
    inputs = norm_inputs(loaded)
    # OLMo 2 divides by the mean square of all heads together, whose epsilon is that of the hidden width.
    bound = 1e-5 if model_type == "olmo2" else 1e-6
    assert gap(cut(loaded, whole._replace(heads=heads), inputs), loaded) < bound

    # The usual mistakes: the output reads the first heads, and all layers lose the same.
    wrong = cut(loaded, whole._replace(heads=heads), inputs)
    path = "model.layers.1.self_attn.o_proj.weight"
    wrong.model.load_weights([(path, arrays_of(loaded)[path][:, :16])], strict=False)
    assert gap(wrong, loaded) > 1e-3
    assert gap(cut(loaded, whole._replace(heads=heads[:1] * 4), inputs), loaded) > 1e-3


@pytest.mark.parametrize("model_type", [name for name in SHOWN if TYPES[name].reads_head_dim])
def test_dead_groups_go_unnoticed(model_type: str):
    """A key and value head with all its query heads: 6 on 3 become 4 on 2."""
    loaded = small_model(model_type, num_attention_heads=6, num_key_value_heads=3)
    whole = everything(loaded.config)
    gone = [0, 1, 2, 1]
    for layer, kv in enumerate(gone):
        dead_heads(loaded, layer, [2 * kv, 2 * kv + 1])
    kept = whole._replace(
        heads=[without(6, 2 * kv, 2 * kv + 1) for kv in gone], kv_heads=[without(3, kv) for kv in gone]
    )
    assert gap(cut(loaded, kept), loaded) < 1e-6

    # The usual mistake: query heads that read another key head than before.
    wrong = cut(loaded, kept)
    arrays = arrays_of(wrong)
    order = mx.array([*range(8), *range(16, 24), *range(8, 16), *range(24, 32)])
    start = "model.layers.0.self_attn."
    swapped = [(start + "o_proj.weight", arrays[start + "o_proj.weight"][:, order])]
    swapped.append((start + "q_proj.weight", arrays[start + "q_proj.weight"][order]))
    wrong.model.load_weights(swapped, strict=False)
    assert gap(wrong, loaded) > 1e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [([1, 2], [0, 1]), ([2, 3], [1])])
@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "granite", "mixtral"])
def test_where_heads_and_width_go_together(model_type: str, heads: list[int], kv_heads: list[int]):
    """Half of the heads, a group or one of each, and half of the width, all dead."""
    optional = dict.fromkeys(TYPES[model_type].optional, True)
    loaded = small_model(model_type, num_hidden_layers=2, **optional)
    zero(loaded, ("embed_tokens", *WRITERS), "hidden", list(range(0, 32, 2)))
    gone = [head for head in range(4) if head not in heads]
    dead_heads(loaded, 0, gone)
    dead_heads(loaded, 1, gone)
    kept = everything(loaded.config)._replace(
        heads=[np.array(heads)] * 2, kv_heads=[np.array(kv_heads)] * 2, hidden=np.arange(1, 32, 2)
    )
    small = cut(loaded, kept, norm_inputs(loaded))
    assert (small.config["num_attention_heads"], small.config["num_key_value_heads"]) == (2, len(kv_heads))
    assert gap(small, loaded) < 1e-6
    others = kept._replace(heads=[np.array([0, 3])] * 2, kv_heads=[np.array([0, 1])] * 2)
    assert gap(cut(loaded, others, norm_inputs(loaded)), loaded) > 1e-3


@pytest.mark.parametrize("renormed", [True, False])
def test_experts_that_nothing_is_routed_to_go_unnoticed(renormed: bool):
    """Their logits are far below all others, through a hidden channel that is the same for every token."""
    loaded = small_model("qwen3_moe", norm_topk_prob=renormed)
    whole = everything(loaded.config)
    zero(loaded, WRITERS, "hidden", [0])
    arrays = arrays_of(loaded)
    changed = [
        ("model.embed_tokens.weight", _set(arrays["model.embed_tokens.weight"], (slice(None), 0), 5.0))
    ]
    gone = [0, 1, 3, 2]
    for layer, expert in enumerate(gone):
        path = f"model.layers.{layer}.mlp.gate.weight"
        changed.append((path, _set(_set(arrays[path], (expert,), 0.0), (expert, 0), -1000.0)))
    loaded.model.load_weights(changed, strict=False)
    kept = whole._replace(experts=[without(4, expert) for expert in gone])
    small = cut(loaded, kept)
    assert small.config["num_experts"] == 3
    assert gap(small, loaded) < 1e-6
    assert gap(cut(loaded, whole._replace(experts=[np.arange(3)] * 4)), loaded) > 1e-3


def _set(array: mx.array, place: Any, value: float) -> mx.array:
    copy = np.array(array)
    copy[place] = value
    return mx.array(copy)


@pytest.mark.parametrize(
    ("model_type", "keys", "gone"),
    [(name, {}, 1) for name in SHOWN if name != "gemma3_text"]
    + [
        ("gemma3_text", {"num_hidden_layers": 5, "sliding_window_pattern": 3}, 4),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4}, 0),
        ("qwen3_moe", {"decoder_sparse_step": 2}, 0),
        ("smollm3", {"no_rope_layer_interval": 2}, 0),
    ],
)
def test_a_dead_layer_goes_unnoticed(model_type: str, keys: dict[str, Any], gone: int):
    """Where layers differ, those behind it must stay of their kind."""
    loaded = small_model(model_type, **keys)
    zero(loaded, WRITERS, "hidden", list(range(32)), gone)
    whole = everything(loaded.config)
    kept = only(whole, [layer for layer in whole.layers if layer != gone])
    assert gap(cut(loaded, kept), loaded) < 1e-6
    if not keys:
        assert gap(cut(loaded, only(whole, [0, 1, 3])), loaded) > 1e-3


def test_the_window_of_gemma_3_stays_with_its_layers():
    """Layers 1 and 3 of four see everything; without layer 0, the first of three would have to."""
    loaded = small_model("gemma3_text")
    zero(loaded, WRITERS, "hidden", list(range(32)), 2)
    with pytest.raises(RecipeError, match=r"layers \[0, 1, 3\] alone are no gemma3_text"):
        cut(loaded, only(everything(loaded.config), [0, 1, 3]))
    zero(loaded, WRITERS, "hidden", list(range(32)), 0)
    small = cut(loaded, only(everything(loaded.config), [1, 3]))
    assert small.config["sliding_window_pattern"] == 1
    assert gap(small, loaded) < 1e-6
