"""Shapes, counts and configs of cut models, against the models that mlx-lm builds from them."""

import dataclasses
import importlib
from typing import Any

import pytest
from mlx_lm.utils import MODEL_REMAPPING
from small_models import arrays_of, small_config, small_model

from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.models import parameter_count
from mlx_distill.prune.axes import (
    best_layers,
    check_sizes,
    check_supported,
    count_of,
    fits,
    possible_layers,
    resized,
    shapes_of,
    sizes_of,
)
from mlx_distill.prune.layers import check_layers
from mlx_distill.prune.reading import read, sparse_layers, written
from mlx_distill.prune.sizes import Sizes
from mlx_distill.prune.types import TYPES


def built_shapes(loaded: Any) -> dict[str, tuple[int, ...]]:
    return {path: array.shape for path, array in arrays_of(loaded).items()}


def smaller(config: dict[str, Any], **sizes: int) -> dict[str, Any]:
    return resized(config, sizes_of(config)._replace(**sizes))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_the_shapes_that_mlx_lm_builds(model_type: str, tied: bool):
    """With every optional array present; without, see the cuts in test_surgery.py."""
    options = dict.fromkeys(TYPES[model_type].optional, True)
    loaded = small_model(model_type, tie_word_embeddings=tied, **options)
    assert shapes_of(loaded.config) == built_shapes(loaded)
    assert count_of(loaded.config) == parameter_count(loaded.model)
    assert sizes_of(loaded.config) == Sizes(4, 32, 48, 4, 2, 4 if TYPES[model_type].sparse else 0, 64)


@pytest.mark.parametrize("model_type", TYPES)
def test_missing_keys_read_as_in_mlx_lm(model_type: str):
    name = MODEL_REMAPPING.get(model_type, model_type)
    modules = ["gemma3_text", "gemma3"] if model_type == "gemma3" else [name]
    defaults: dict[str, Any] = {}
    for module in modules:
        for field in dataclasses.fields(importlib.import_module(f"mlx_lm.models.{module}").ModelArgs):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
    if model_type == "gemma3":  # filled in behind the class, from `text_config`
        defaults |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    known = TYPES[model_type].defaults
    read_keys = {"tie_word_embeddings", "sliding_window_pattern", "no_rope_layer_interval", *known}
    if TYPES[model_type].tied_by_weights:
        known = {key: value for key, value in known.items() if key != "tie_word_embeddings"}
        read_keys -= {"tie_word_embeddings"}
    if TYPES[model_type].tied is not None:
        read_keys -= {"tie_word_embeddings"}
    assert {key: defaults[key] for key in read_keys if key in defaults} == dict(known)
    own = [
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
    ]
    assert all(defaults.get(key) in (None, known.get(key)) for key in own)


def test_a_large_gemma_3_reads_its_sizes_from_two_places():
    """The config of google/gemma-3-4b-it, whose other sizes are defaults of mlx-lm."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text}
    assert sizes_of(config) == Sizes(34, 2560, 10240, 8, 4, 0, 262208)
    assert shapes_of(config)["language_model.model.layers.0.self_attn.q_proj.weight"] == (2048, 2560)
    small = smaller(config, hidden=1280, vocabulary=1000, heads=4, kv_heads=2)
    assert (small["vocab_size"], small["text_config"]["hidden_size"]) == (1000, 1280)
    assert "hidden_size" not in small and "vocab_size" not in small["text_config"]
    assert sizes_of(small) == Sizes(34, 1280, 10240, 4, 2, 0, 1000)
    assert small["text_config"]["num_attention_heads"] == 4  # where it is read
    assert text["hidden_size"] == 2560  # what was given is left alone


def test_a_vocabulary_beside_the_one_that_is_read_changes_with_it():
    config = {**small_config("gemma3"), "vocab_size": 64}
    config["text_config"]["vocab_size"] = 60
    assert sizes_of(config).vocabulary == 64
    small = smaller(config, vocabulary=32)
    assert (small["vocab_size"], small["text_config"]["vocab_size"]) == (32, 32)


def test_a_size_of_heads_that_mlx_lm_does_not_read_counts_for_nothing():
    assert shapes_of(small_config("qwen2", head_dim=16)) == shapes_of(small_config("qwen2"))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_same_sizes_leave_the_config_alone(model_type: str):
    config = small_config(model_type, head_dim=8)
    assert resized(config, sizes_of(config)) == config


@pytest.mark.parametrize("model_type", TYPES)
def test_only_keys_that_change_are_written(model_type: str):
    config = small_config(model_type, head_dim=8) | {"architectures": ["X"], "eos_token_id": [2, 3]}
    small = smaller(config, feed_forward=16)
    assert (
        written(small, {"moe_intermediate_size" if "moe" in model_type else "intermediate_size": 48})
        == config
    )
    assert sizes_of(small) == sizes_of(config)._replace(feed_forward=16)


def test_the_size_of_a_head_is_written_out_where_it_is_read():
    config = small_config("llama")
    del config["head_dim"]  # 32 / 4
    assert "head_dim" not in smaller(config, hidden=16, heads=2)  # it still is
    small = smaller(config, hidden=24)
    assert small["head_dim"] == 8
    assert shapes_of(small)["model.layers.0.self_attn.q_proj.weight"] == (32, 24)


def test_one_key_head_for_each_query_head_is_written_out_where_it_changes():
    config = small_config("llama", num_key_value_heads=None)
    assert sizes_of(config).kv_heads == 4
    assert sizes_of(smaller(config, heads=3, kv_heads=3)).kv_heads == 3
    assert smaller(config, heads=3, kv_heads=3)["num_key_value_heads"] is None
    assert smaller(config, heads=2, kv_heads=2)["num_key_value_heads"] is None


def test_epsilon_grows_with_the_width_that_goes():
    config = small_config("llama")
    assert smaller(config, hidden=8)["rms_norm_eps"] == pytest.approx(4 * config["rms_norm_eps"])


def test_lists_with_an_entry_a_layer_are_cut_along():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = small_config("llama", layer_types=kinds, max_window_layers=2)
    small = resized(config, sizes_of(config)._replace(layers=2), [1, 3])
    assert small["layer_types"] == ["sliding_attention", "full_attention"]
    assert small["max_window_layers"] == 1
    assert not possible_layers(config, [1, 2])  # mlx-lm needs one that sees everything
    assert best_layers(config, [1.0, 3.0, 4.0, 2.0], 2) == [2, 3]
    assert best_layers(config, [1.0, 3.0, 4.0, 2.0], 1) == [3]


def test_layers_without_rotary_positions_stay_so():
    config = small_config("smollm3", num_hidden_layers=8)  # every fourth
    small = resized(config, sizes_of(config)._replace(layers=3), [2, 3, 5])
    assert small["no_rope_layers"] == [1, 0, 1]


def test_gemma_3_keeps_layers_in_a_pattern():
    config = small_config("gemma3_text", num_hidden_layers=8, sliding_window_pattern=3)
    # Places 2 and 5 attend to all.
    for layers, pattern in {
        (0, 1, 2): 3,
        (0, 2, 3, 5, 6): 2,
        (2, 5): 1,
        (3, 4, 5, 6): 3,
        (0, 1, 3, 5, 7): 4,
    }.items():
        small = resized(config, sizes_of(config)._replace(layers=len(layers)), layers)
        assert small["sliding_window_pattern"] == pattern
    for layers in [(0, 1), (0, 2, 5), (2, 3, 5), (2, 3), (0, 1, 2, 5)]:
        assert not possible_layers(config, layers)
    with pytest.raises(
        RecipeError, match=r"`prune`: layers \[0, 1\] alone are no gemma3_text.*; keep \[0, 2\]"
    ):
        check_layers(config, [0, 1], "prune")
    assert resized(config, sizes_of(config)._replace(layers=2))["sliding_window_pattern"] == 2


def test_the_best_layers_of_gemma_3_are_the_best_of_all_that_may_stay():
    from itertools import combinations

    config = small_config("gemma3_text", num_hidden_layers=8, sliding_window_pattern=3)
    worth = [0.3, 1.2, 0.1, 2.0, 0.7, 0.2, 0.5, 1.1]
    for count in range(1, 9):
        allowed = [list(c) for c in combinations(range(8), count) if possible_layers(config, c)]
        best = max(allowed, key=lambda layers: sum(worth[i] for i in layers))
        assert best_layers(config, worth, count) == best
    assert best_layers(config, [0.0] * 8, 4) == [0, 1, 2, 3]  # the pattern stays where it can
    assert best_layers(small_config("llama"), [0.0, 1.0, 1.0, 1.0], 2) == [1, 2]  # of equals the first


def test_layers_with_experts_stay_so():
    config = small_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    sparse = [False, True, False, False, False, True]
    assert sparse_layers(TYPES["qwen3_moe"], read(config)) == sparse
    for layers in ([0, 1, 2, 3, 4, 5], [1, 3, 5], [0, 1], [0, 2, 3], [5], [0, 1, 4, 5]):
        small = resized(config, sizes_of(config)._replace(layers=len(layers)), layers)
        assert sparse_layers(TYPES["qwen3_moe"], read(small)) == [sparse[i] for i in layers]
    unchanged = resized(config, sizes_of(config)._replace(layers=4), [0, 1, 4, 5])
    assert (unchanged["decoder_sparse_step"], unchanged["mlp_only_layers"]) == (2, [])


def test_layers_beside_those_with_experts_keep_their_width():
    config = small_config("qwen3_moe", mlp_only_layers=[0], intermediate_size=40)
    small = smaller(config, feed_forward=16)
    assert (small["intermediate_size"], small["moe_intermediate_size"]) == (40, 16)
    dense = small_config("qwen3_moe", mlp_only_layers=[0, 1, 2, 3], intermediate_size=40)
    assert sizes_of(dense)[2:6] == (40, 4, 2, 0)
    assert resized(dense, sizes_of(dense)) == dense
    assert smaller(dense, feed_forward=16)["intermediate_size"] == 16


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("llama", {"layers": 0}, "num_hidden_layers 0 is not within 1 to 4"),
        ("llama", {"hidden": 33}, "hidden_size 33 is not within 1 to 32"),
        ("llama", {"feed_forward": 49}, "intermediate_size 49 is not within 1 to 48"),
        ("llama", {"vocabulary": 65}, "vocab_size 65 is not within 1 to 64"),
        ("llama", {"experts": 2}, "2 num_experts, and this llama has no experts"),
        ("llama", {"heads": 3}, "3 num_attention_heads and 2 num_key_value_heads.*nearest are 2 and 2"),
        (
            "llama",
            {"heads": 3, "kv_heads": 1},
            "keeps equally many of its 2 query heads; nearest are 2 and 1",
        ),
        ("llama", {"kv_heads": 3, "heads": 3}, "num_key_value_heads 3 is not within 1 to 2"),
        ("qwen2", {"hidden": 16}, r"a qwen2 a head has .* keep its 8: 4 heads need hidden_size 32, got 16"),
        ("qwen2", {"heads": 2}, "2 heads need hidden_size 16, got 32"),
        ("qwen3_moe", {"experts": 1}, "1 num_experts, but each token goes to 2 .*keep at least 2"),
        ("mixtral", {"experts": 1}, "1 num_local_experts, but each token goes to 2"),
        ("qwen3_moe", {"feed_forward": 64}, "moe_intermediate_size 64 is not within"),
    ],
)
def test_sizes_that_a_type_cannot_have_are_refused(model_type: str, sizes: dict[str, int], message: str):
    config = small_config(model_type)
    wanted = sizes_of(config)._replace(**sizes)
    with pytest.raises(RecipeError, match=f"^`student.prune`: .*{message}"):
        check_sizes(config, wanted, "student.prune")
    assert not fits(config, wanted)


def test_heads_that_fit():
    """Of 8 query heads on 4: whole groups, or equally many of each."""
    config = small_config("llama", num_attention_heads=8, num_key_value_heads=4)
    sizes = sizes_of(config)
    fitting = {
        (h, k) for h in range(1, 9) for k in range(1, 9) if fits(config, sizes._replace(heads=h, kv_heads=k))
    }
    assert fitting == {(1, 1), (2, 1), (2, 2), (4, 2), (3, 3), (6, 3), (4, 4), (8, 4)}
    assert fits(
        small_config("qwen2"), sizes_of(small_config("qwen2"))._replace(hidden=16, heads=2, kv_heads=1)
    )


def test_models_that_cannot_be_pruned_are_refused():
    with pytest.raises(
        ModelError, match="`student.prune.model`: model type mamba cannot be pruned; use one of ern"
    ):
        check_supported({"model_type": "mamba"}, "student.prune.model")
    with pytest.raises(ModelError, match="`m`: the model is quantized.*prune the unquantized model"):
        check_supported(small_config("llama", quantization={"bits": 4}), "m")
    with pytest.raises(ModelError, match="is quantized"):
        check_supported(small_config("gemma3", quantization_config={"bits": 4}), "m")
    config = small_config("llama", quantization=None)
    check_supported(config, "m")
    del config["intermediate_size"]
    with pytest.raises(ModelError, match="config.json of this llama lacks 'intermediate_size'"):
        check_supported(config, "m")
    with pytest.raises(ModelError, match="cannot be pruned"):
        sizes_of({"model_type": "mamba"})
    for model_type in TYPES:
        check_supported(small_config(model_type), "m")


def test_layers_out_of_order_are_refused():
    config = small_config("llama")
    for layers in ([], [1, 0], [1, 1], [4], [-1, 0]):
        with pytest.raises(RecipeError, match="`l`: layers that stay must rise within 0 to 3"):
            check_layers(config, layers, "l")
