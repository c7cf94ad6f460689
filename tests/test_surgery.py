"""Cut models: equal to the whole one where nothing or only dead units go, and ordinary models after it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from small_models import SHOWN, TOKENS, arrays_of, norm_inputs, only, small_model
from tiny import tiny_tokenizer

from mlx_distill import models
from mlx_distill.errors import Fault, ModelError, RecipeError
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.options import Grid, Student
from mlx_distill.prune.axes import best_layers, count_of, everything, resized, shapes_of, sizes_of
from mlx_distill.prune.kept import kept_sizes
from mlx_distill.prune.sizes import Kept, Sizes
from mlx_distill.prune.surgery import cut
from mlx_distill.prune.types import TYPES
from mlx_distill.quantize import quantized
from mlx_distill.student import add_adapters


def half(config: dict[str, Any]) -> Kept:
    """Every axis cut, with other places in each layer, as far as the type allows."""
    whole, sizes = everything(config), sizes_of(config)
    layers = best_layers(config, [0.0, 1.0, 0.5, 2.0], 2)
    random = np.random.default_rng(0)

    def some(places: np.ndarray, count: int) -> np.ndarray:
        return np.sort(random.permutation(places)[:count])

    heads = [some(np.arange(2), 1) for _ in layers]  # one of two groups, and one of its two query heads
    share = 2 if TYPES[config["model_type"]].reads_head_dim else 1
    width = [some(whole.feed_forward[layer], 20) for layer in layers]
    experts = [some(whole.experts[layer], 3) for layer in layers]
    if sizes.experts:
        width = [np.stack([some(whole.feed_forward[layer], 20) for _ in range(3)]) for layer in layers]
    return Kept(
        layers=layers,
        hidden=some(whole.hidden, 16 if share == 2 else 8),
        feed_forward=width,
        heads=[2 * kv + some(np.arange(2), 1) for kv in heads],
        kv_heads=heads,
        experts=experts,
        vocabulary=some(whole.vocabulary, 40),
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_cutting_nothing_changes_nothing(model_type: str):
    loaded = small_model(model_type)
    same = cut(loaded, everything(loaded.config), norm_inputs(loaded))
    assert mx.array_equal(same.model(TOKENS), loaded.model(TOKENS))
    assert same.config == loaded.config
    assert same.model is not loaded.model
    arrays = arrays_of(loaded)
    assert all(array is arrays[path] for path, array in arrays_of(same).items())  # and copies nothing


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_cut_model_has_the_weights_that_were_promised(model_type: str, tied: bool):
    loaded = small_model(model_type, tie_word_embeddings=tied)
    kept = half(loaded.config)
    promised = count_of(resized(loaded.config, kept_sizes(loaded.config, kept), kept.layers))
    small = cut(loaded, kept)
    assert parameter_count(small.model) == promised < parameter_count(loaded.model) / 2
    assert {path: array.shape for path, array in arrays_of(small).items()} == shapes_of(small.config)
    assert bool(mx.isfinite(small.model(TOKENS % 40)).all())


@pytest.mark.parametrize("model_type", SHOWN)
def test_a_cut_model_generates(model_type: str):
    """With its cache as without."""
    loaded = small_model(model_type)
    model: Any = cut(loaded, half(loaded.config)).model
    prompt = [1, 2, 3, 4, 5, 6, 7]  # longer than the window of those that have one
    written = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=6)]
    for n, token in enumerate(written):
        logits = model(mx.array([prompt + written[:n]]))[0, -1]
        assert float(logits[token]) == pytest.approx(float(logits.max()), abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("model_type", SHOWN)
def test_plain_mlx_lm_loads_what_was_saved(model_type: str, tokenizer: Any, tmp_path: Path):
    loaded = small_model(model_type, tokenizer=tokenizer, tie_word_embeddings=True)
    small = cut(loaded, half(loaded.config), norm_inputs(loaded))
    models.save(tmp_path / "cut", small)
    model = mlx_lm.load(str(tmp_path / "cut"))[0]
    assert mx.array_equal(model(TOKENS % 40), small.model(TOKENS % 40))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", SHOWN)
def test_a_smaller_vocabulary_has_the_logits_it_had(model_type: str, tied: bool):
    loaded = small_model(model_type, tie_word_embeddings=tied)
    tokens = np.arange(1, 64, 2)
    small = cut(loaded, everything(loaded.config)._replace(vocabulary=tokens))
    assert small.config["vocab_size"] == 32
    logits = small.model(mx.array([[0, 5, 3, 9]]))
    expected = loaded.model(mx.array([[1, 11, 7, 19]]))[..., mx.array(tokens)]
    assert float(mx.abs(logits - expected).max()) < 1e-5
    assert float(mx.abs(logits - loaded.model(mx.array([[0, 5, 3, 9]]))[..., mx.array(tokens)]).max()) > 1e-3


def test_weights_keep_their_type_and_the_big_model_can_go():
    loaded = small_model("llama", hidden_size=256, intermediate_size=512, vocab_size=512)
    loaded.model.set_dtype(mx.bfloat16)
    kept = everything(loaded.config)._replace(hidden=np.arange(0, 256, 4))
    mx.eval(loaded.model.parameters())
    inputs = norm_inputs(loaded)
    gc.collect()
    before, whole = mx.get_active_memory(), sum(array.nbytes for array in arrays_of(loaded).values())
    small = cut(loaded, kept, inputs)
    assert {array.dtype for array in arrays_of(small).values()} == {mx.bfloat16}
    rest = sum(array.nbytes for array in arrays_of(small).values())
    del loaded
    gc.collect()
    assert mx.get_active_memory() < before - whole + rest + whole // 10
    assert rest < whole / 3


def test_a_tied_gemma_3_says_so():
    """mlx-lm goes by the stored weights there, whatever the config says."""
    loaded = small_model("gemma3_text", tie_word_embeddings=True)
    del loaded.config["tie_word_embeddings"]  # as in the configs of Gemma
    assert cut(loaded, everything(loaded.config)).config == loaded.config
    untied = small_model("gemma3_text")
    del untied.config["tie_word_embeddings"]
    small = cut(untied, everything(untied.config))
    assert small.config["tie_word_embeddings"] is False
    assert mx.array_equal(small.model(TOKENS), untied.model(TOKENS))


def test_building_a_gemma_3_leaves_its_config_alone():
    """mlx-lm writes into the `text_config` that it is given."""
    loaded = small_model("gemma3")
    del loaded.config["text_config"]["vocab_size"]
    assert "vocab_size" not in cut(loaded, everything(loaded.config)).config["text_config"]


def test_training_mode_stays():
    loaded = small_model("llama")
    for training in (True, False):
        loaded.model.train(training)
        assert cut(loaded, everything(loaded.config)).model.training is training


def wide(loaded: Loaded, **changes: Any) -> Kept:
    return everything(loaded.config)._replace(**changes)


@pytest.mark.parametrize(
    ("axis", "places", "message"),
    [
        ("hidden", np.array([1, 0]), r"hidden: places that stay must rise within 0 to 31; got \[1 0\]"),
        ("hidden", np.array([0, 32]), "hidden: places that stay must rise within 0 to 31"),
        ("hidden", np.array([[0, 1]]), "hidden: places that stay must rise within 0 to 31"),
        ("vocabulary", np.array([3, 3]), "vocabulary: places"),
        ("layers", [1, 0, 2, 3], "layers: places that stay must rise within 0 to 3"),
        ("layers", [0, 1], "feed_forward kept in 4 layers, and 2 layers stay"),
        ("feed_forward", [np.array([-1, 2])] * 4, "feed_forward of layer 0: places"),
        (
            "feed_forward",
            [np.arange(20)] * 3 + [np.arange(19)],
            r"feed_forward: as many .* \[20, 20, 20, 19\]",
        ),
        ("heads", [np.array([0, 1])] * 4, r"heads of layer 0: each of the .* \[0 1\] needs equally many"),
        ("heads", [np.array([0, 1, 2])] * 4, r"of its 2 query heads; got \[0 1 2\]"),
        ("kv_heads", [np.array([1])] * 4, r"heads of layer 0: each of the .* \[1\] needs"),
    ],
)
def test_choices_that_contradict_themselves_are_refused(axis: str, places: Any, message: str):
    loaded = small_model("llama")
    with pytest.raises(Fault, match=message):
        cut(loaded, wide(loaded, **{axis: places}))


def test_choices_of_experts_that_contradict_themselves_are_refused():
    loaded = small_model("qwen3_moe", mlp_only_layers=[0], intermediate_size=40)
    whole = everything(loaded.config)
    assert [len(places) for places in whole.experts] == [0, 4, 4, 4]
    narrow = [np.arange(20), *whole.feed_forward[1:]]
    with pytest.raises(Fault, match="feed_forward of layer 0: a layer beside those with experts stays whole"):
        cut(loaded, whole._replace(feed_forward=narrow))
    rows = [whole.feed_forward[0], *[np.arange(48)[None].repeat(3, 0)] * 3]
    with pytest.raises(Fault, match="feed_forward of layer 1: 3 rows for 4 experts"):
        cut(loaded, whole._replace(feed_forward=rows))
    with pytest.raises(RecipeError, match="1 num_experts, but each token goes to 2"):
        cut(loaded, whole._replace(experts=[np.arange(0)] + [np.arange(1)] * 3))
    fewer = cut(loaded, whole._replace(experts=[np.arange(0)] + [np.arange(2)] * 3))
    assert sizes_of(fewer.config).experts == 2
    only_dense = cut(loaded, only(whole, [0]))
    assert sizes_of(only_dense.config) == Sizes(1, 32, 40, 4, 2, 0, 64)


def test_models_that_cannot_be_cut_are_refused(tokenizer: Any):
    loaded = small_model("llama", hidden_size=64)
    kept = everything(loaded.config)
    add_adapters(loaded.model, Student.model_validate({"model": "m", "method": "lora"}), 0)
    with pytest.raises(ModelError, match=r"layers.3.* has LoRA or DoRA matrices.*merge them first"):
        cut(loaded, kept)
    packed = quantized(
        small_model("llama", hidden_size=64, intermediate_size=64), Grid(bits=4, group_size=32)
    )
    with pytest.raises(ModelError, match="quantized, .*cannot be cut; prune the unquantized model"):
        cut(packed, kept)
    for key in ("quantization", "quantization_config"):
        packed.config.pop(key, None)
    with pytest.raises(ModelError, match=r"lm_head is quantized, and packed weights cannot be cut"):
        cut(packed, kept)
    with pytest.raises(ModelError, match="`model`: model type mamba cannot be pruned"):
        cut(small_model("llama")._replace(config={"model_type": "mamba"}), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model.model.layers[1], "extra", mx.zeros(3)),
            r"layers.1.extra: \(3,\) in the model, nothing",
        ),
        (
            lambda model: model.model.layers[2].mlp.pop("up_proj"),
            r"layers.2.mlp.up_proj.weight: nothing in the model",
        ),
        (
            lambda model: setattr(model.model.norm, "weight", mx.zeros(31)),
            r"norm.weight: \(31,\) in the model, \(32,\)",
        ),
    ],
)
def test_arrays_that_the_table_does_not_know_are_refused(change: Callable[[Any], Any], message: str):
    loaded = small_model("llama")
    change(loaded.model)
    with pytest.raises(ModelError, match=f"{message}.*not laid out as those that can be pruned"):
        cut(loaded, everything(loaded.config))


def test_statistics_of_another_model_are_refused():
    loaded = small_model("llama")
    with pytest.raises(Fault, match="no statistics of what model.norm reads"):
        cut(loaded, everything(loaded.config)._replace(hidden=np.arange(8)), {})
