"""Building, saving, loading, quantizing, and what a fresh process makes of a folder."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import SHAPE, tiny_model, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.errors import Fault, ModelError, RecipeError
from mlx_distill.evaluate.fresh import check_equal, fresh_look
from mlx_distill.options import Quantize, Shape
from mlx_distill.quantize import quantized
from mlx_distill.student import add_adapters, widen
from mlx_distill.teacher import check_same_vocabulary

PROBE = [3, 5, 7, 11, 13]


def logits_of(loaded):
    return np.array(loaded.model(mx.array(PROBE)[None])[0].astype(mx.float32))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_built_model_survives_its_folder(model_type, tokenizer, tmp_path):
    built = models.build(Shape(**{**SHAPE, "model_type": model_type}), tokenizer, seed=1)
    models.save(tmp_path / "m", built)
    assert tree_flatten(built.model.parameters())[0][1].size > 0  # mlx-lm's own save would empty it
    loaded = models.load(str(tmp_path / "m"), "student.model")
    assert np.array_equal(logits_of(built), logits_of(loaded))
    text = "def solve(x):\n    return x + 7\n"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.eos_token_ids == {tokenizer.eos_token_id}
    check_same_vocabulary(loaded.tokenizer, tokenizer)


def test_the_seed_makes_the_weights():
    one, same, other = (tiny_model(seed=seed).model for seed in (1, 1, 2))
    weight = "model.layers.0.mlp.up_proj.weight"
    values = [dict(tree_flatten(m.parameters()))[weight] for m in (one, same, other)]
    assert mx.array_equal(values[0], values[1])
    assert not mx.array_equal(values[0], values[2])


def test_rope_theta_of_transformers_5_is_not_lost(tokenizer, tmp_path):
    """Nested in `rope_parameters`, mlx-lm's llama would silently use 10000."""
    built = models.build(Shape(**SHAPE, rope_theta=777.0), tokenizer, seed=1)
    models.save(tmp_path / "m", built)
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert np.array_equal(logits_of(models.load(str(tmp_path / "m"), "x")), logits_of(built))


def test_a_fresh_process_computes_the_same_logits(tokenizer, tmp_path):
    built = models.build(Shape(**SHAPE), tokenizer, seed=1)
    models.save(tmp_path / "m", built)
    look = fresh_look(tmp_path / "m", PROBE)
    assert check_equal(tmp_path / "m", logits_of(built), look.logits) < 1e-5

    # Weights that changed on the way must not pass.
    other = models.build(Shape(**SHAPE), tokenizer, seed=2)
    with pytest.raises(Fault, match="differ by"):
        check_equal(tmp_path / "m", logits_of(other), look.logits)
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(Fault, match=r"mlx_lm\.load cannot open"):
        fresh_look(tmp_path / "m", PROBE)


def test_nan_logits_are_no_match(tmp_path):
    with pytest.raises(Fault, match="differ by"):
        check_equal(tmp_path, np.full((2, 3), np.nan), np.full((2, 3), np.nan))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_model_survives_its_folder(bits, tokenizer, tmp_path):
    built = models.build(Shape(**SHAPE), tokenizer, seed=1)
    before = logits_of(built)
    count = models.parameter_count(built.model)
    small = quantized(built, Quantize(bits=bits, group_size=32))
    models.save(tmp_path / "m", small)
    loaded = models.load(str(tmp_path / "m"), "x")
    assert np.array_equal(logits_of(loaded), logits_of(small))
    assert (
        json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))["quantization"]["bits"]
        == bits
    )
    assert models.parameter_count(loaded.model) == count
    assert (np.abs(logits_of(loaded) - before).max() < 0.05) == (bits == 8)


def test_a_group_size_that_divides_nothing_is_refused(tokenizer):
    built = models.build(Shape(**{**SHAPE, "hidden_size": 48, "intermediate_size": 80}), tokenizer, seed=1)
    with pytest.raises(RecipeError, match="64 does not divide the 48 columns"):
        quantized(built, Quantize(bits=4, group_size=64))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fusing_adapters_keeps_the_function(method, tokenizer, tmp_path):
    built = models.build(Shape(**SHAPE), tokenizer, seed=1)
    plain = logits_of(built)
    options = tiny_recipe(student={"model": "x", "shape": None, "method": method, "rank": 4}).student
    add_adapters(built.model, options, seed=0)
    np.testing.assert_allclose(logits_of(built), plain, atol=1e-5)  # before training: the base itself
    for _, module in built.model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    adapted = logits_of(built)
    assert np.abs(adapted - plain).max() > 1e-2
    fused = models.fused(built)
    np.testing.assert_allclose(logits_of(fused), adapted, atol=1e-4)
    assert not any("lora" in name for name, _ in tree_flatten(fused.model.parameters()))
    models.save(tmp_path / "m", fused)
    assert np.array_equal(logits_of(models.load(str(tmp_path / "m"), "x")), logits_of(fused))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_weights_that_move_are_float32_while_they_do(dtype):
    model = tiny_model().model
    assert widen(model) is None  # float32 already
    model.set_dtype(dtype)
    assert widen(model) == dtype
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.float32}
    # What would happen otherwise: a small step is lost.
    weight = mx.array(0.02, dtype=mx.bfloat16)
    assert float(weight + mx.array(1e-5, dtype=mx.bfloat16)) == float(weight)


def test_quantized_weights_cannot_move(tokenizer):
    small = quantized(models.build(Shape(**SHAPE), tokenizer, seed=1), Quantize(bits=4, group_size=32))
    with pytest.raises(ModelError, match=r"student\.method"):
        widen(small.model)


def test_layers_limits_the_adapters():
    model = tiny_model().model
    options = tiny_recipe(
        student={"model": "x", "shape": None, "method": "lora", "rank": 2, "layers": 1}
    ).student
    add_adapters(model, options, seed=0)
    adapted = {name.split(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert adapted == {"1"}  # the last of two


def test_an_unknown_model_type_is_refused_in_one_line(tokenizer, tmp_path):
    built = models.build(Shape(**SHAPE), tokenizer, seed=1)
    models.save(tmp_path / "m", built)
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "perceptron"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="perceptron") as info:
        models.load(str(tmp_path / "m"), "teacher.model")
    assert "\n" not in str(info.value)


def test_vocabularies_are_compared_by_their_maps(tokenizer):
    class Swapped:
        def get_vocab(self):
            vocabulary = dict(tokenizer.get_vocab())
            one, other = sorted(vocabulary)[5:7]
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
            return vocabulary

    assert len(Swapped().get_vocab()) == len(tokenizer.get_vocab())  # sizes alone would not tell
    with pytest.raises(ModelError, match="in 2 tokens"):
        check_same_vocabulary(Swapped(), tokenizer)
    assert check_same_vocabulary(tokenizer, tokenizer) == len(tokenizer)
