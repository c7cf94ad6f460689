"""Models taken apart: exits that answer as they should, and first layers that stand alone."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import SHAPE, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.errors import ModelError
from mlx_distill.models.early_exit import Passage, Stack, answer_early, final_norm
from mlx_distill.models.first_layers import first_layers
from mlx_distill.models.taps import tapped
from mlx_distill.options import Quantize, Shape
from mlx_distill.quantize import quantized
from mlx_distill.student import add_adapters

LAYERS, VOCABULARY, PROMPT = 4, 60, [5, 9, 3, 7]
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": LAYERS, "n_positions": 128, "n_ctx": 128, "vocab_size": 60}
MORE = {
    "gpt2": {**GPT2, "layer_norm_epsilon": 1e-5, "num_key_value_heads": 2},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
}
TYPES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2"]


def lively(model_type, seed=0, **config):
    """A random model that does not say one token for ever; its exits agree with it now and then."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(seed)
    config = {**CONFIG, "model_type": model_type, **MORE.get(model_type, {}), **config}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.update(tree_map(lambda p: 6 * p if p.ndim > 1 else p, model.parameters()))
    mx.eval(model.parameters())
    return models.Loaded(model, config, None)


def greedy(model, prompt=PROMPT, max_tokens=24):
    """What mlx-lm writes, one token at a time."""
    from mlx_lm.generate import generate_step

    if max_tokens == 0:
        return []
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens)]


def early(stack, **options):
    return answer_early(
        stack, **{"prompt": PROMPT, "exits": [1, 2, 3], "stop": set(), "max_tokens": 24, **options}
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_where_no_exit_is_sure_enough_the_whole_model_answers(model_type):
    loaded = lively(model_type)
    expected = greedy(loaded.model)
    assert len(set(expected)) > 5
    found = early(Stack(loaded.model), threshold=1.0)
    assert (found.tokens, found.exits, found.finished) == (expected, [LAYERS] * 24, False)


@pytest.mark.parametrize("options", [{"threshold": 2.0}, {"threshold": 0.0, "exits": []}])
def test_without_an_exit_to_leave_at_the_whole_model_answers(options):
    loaded = lively("llama")
    assert early(Stack(loaded.model), **options).tokens == greedy(loaded.model)


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_at_threshold_zero_the_first_exit_answers_as_its_layers_do_alone(model_type):
    loaded = lively(model_type)
    found = early(Stack(loaded.model), threshold=0.0, exits=[2, 3])
    assert found.exits == [2] * 24
    assert found.tokens == greedy(first_layers(loaded, 2).model)
    assert found.tokens != greedy(loaded.model)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gpt2"])
def test_each_token_comes_from_the_first_exit_that_is_sure(model_type):
    """Against whole forward passes without a cache: what left early must not change what comes later."""
    loaded = lively(model_type)
    found = early(stack := Stack(loaded.model), threshold=0.6, exits=[1, 3])
    assert set(found.exits) == {1, 3, LAYERS}
    right = check_against_whole_passes(loaded, stack, found)
    assert right == len(found.tokens) == 24


def check_against_whole_passes(loaded, stack, found):
    right = 0
    for count, (token, layer) in enumerate(zip(found.tokens, found.exits, strict=True)):
        with tapped(loaded.model, hidden=[1, 3, LAYERS]) as taps:
            loaded.model(mx.array([PROMPT + found.tokens[:count]]))
        logits = {n: stack.logits(taps.hidden[n])[0, -1] for n in (1, 3, LAYERS)}
        sure = {n: float(mx.softmax(logits[n]).max()) for n in (1, 3)}
        first = next((n for n in (1, 3) if sure[n] > 0.6), LAYERS)
        right += layer == first and token == int(mx.argmax(logits[first]))
    return right


def test_layers_above_an_exit_need_what_left_there(monkeypatch):
    """What a position left at an exit is made up for; forgotten, or passed on as it is, it would show."""
    loaded = lively("llama")

    def forgotten(self, piece):
        del self._waiting[piece][:-1]
        return climb(self, piece)

    climb = Passage.climb
    monkeypatch.setattr(Passage, "climb", forgotten)
    found = early(stack := Stack(loaded.model), threshold=0.6, exits=[1, 3])
    assert check_against_whole_passes(loaded, stack, found) < len(found.tokens)


def test_positions_may_wait_at_any_exit_for_any_time():
    loaded = lively("qwen3")
    tokens = mx.array([np.random.default_rng(0).integers(VOCABULARY, size=24).tolist()])
    expected = np.array(loaded.model(tokens))
    passage = Passage(stack := Stack(loaded.model), [1, 3])
    found, waited = [], 0
    for place in range(24):
        passage.enter(tokens[:, place : place + 1])
        waited += 1
        if place % 3 == 0:
            passage.climb(1)
        if place % 6 == 0:
            hidden = passage.climb(2)
            assert hidden.shape[1] == waited
            found.append(stack.logits(hidden))
            waited = 0
    found = np.array(mx.concatenate(found, axis=1))
    assert found.shape[1] == 19
    np.testing.assert_allclose(found, expected[:, :19], atol=1e-4 * np.abs(expected).max())


def test_an_end_of_turn_ends_the_answer():
    loaded = lively("llama")
    expected = greedy(loaded.model)
    stack = Stack(loaded.model)
    for token in sorted(set(expected))[::4]:
        found = early(stack, threshold=1.0, stop={token})
        length = expected.index(token)
        assert (found.tokens, found.exits) == (expected[:length], [LAYERS] * length)
        assert found.finished
    assert early(stack, threshold=1.0, max_tokens=3).tokens == expected[:3]
    assert early(stack, threshold=1.0, max_tokens=0) == ([], [], False)


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    loaded = lively("gpt2")  # whose positions are counted from the cache
    prompt = np.random.default_rng(0).integers(VOCABULARY, size=20).tolist()
    monkeypatch.setattr("mlx_distill.models.early_exit._PREFILL", 6)
    assert early(Stack(loaded.model), prompt=prompt, threshold=1.0).tokens == greedy(loaded.model, prompt)


@pytest.mark.parametrize("exits", [[0], [4], [3, 1], [2, 2]])
def test_exits_beyond_the_model_are_refused(exits):
    with pytest.raises(ValueError, match="exits: "):
        early(Stack(lively("llama").model), threshold=0.5, exits=exits)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt: empty"):
        early(Stack(lively("llama").model), threshold=0.5, prompt=[])


def test_a_model_that_forgets_is_refused_by_name():
    model = lively("gemma3_text").model
    with pytest.raises(ModelError, match=r"'gemma3_text': its caches \(KVCache and RotatingKVCache\)"):
        Stack(model)
    assert final_norm(model) is model.model.norm  # which is all that training its exits takes


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_layers_that_are_not_called_one_after_another_are_refused_by_name(factor):
    from mlx_lm.models.llama import LlamaModel

    class Scaled(LlamaModel):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            hidden = self.embed_tokens(inputs)
            for layer, one in zip(self.layers, cache or [None] * LAYERS, strict=False):
                hidden = layer(hidden, "causal" if inputs.shape[1] > 1 else None, one) * factor
            return self.norm(hidden)

    loaded = lively("llama")
    loaded.model.model.__class__ = Scaled
    if factor == 1:
        assert early(Stack(loaded.model), threshold=1.0).tokens == greedy(loaded.model)
    else:  # undetected, every exit would answer for another model
        with pytest.raises(ModelError, match="'llama': called one by one, its layers give other logits"):
            Stack(loaded.model)


@pytest.mark.parametrize(("model_type", "name"), [("llama", "norm"), ("gemma", "norm"), ("gpt2", "ln_f")])
def test_the_final_norm_is_found_whatever_it_is_called(model_type, name):
    model = lively(model_type).model
    assert final_norm(model) is model.model[name]


def test_a_model_without_a_final_norm_is_refused_by_name():
    model = lively("nanochat").model  # whose norm is a function
    with pytest.raises(ModelError, match="'nanochat': no norm leads"):
        final_norm(model)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_first_layers_give_the_logits_of_their_exit(model_type, layers):
    loaded = lively(model_type)
    small = first_layers(loaded, layers)
    tokens = mx.array([np.random.default_rng(0).integers(VOCABULARY, size=24).tolist()])
    with tapped(loaded.model, hidden=[layers]) as taps:
        whole = loaded.model(tokens)
    expected = Stack(loaded.model).logits(taps.hidden[layers])
    assert mx.array_equal(small.model(tokens), expected)
    assert bool(mx.array_equal(small.model(tokens), whole)) is (layers == LAYERS)
    assert len(small.model.layers) == layers
    assert layers in (small.config.get("num_hidden_layers"), small.config.get("n_layer"))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_first_layers_survive_their_folder(model_type, bits, tmp_path):
    from mlx_lm import load

    shape = Shape(**{**SHAPE, "model_type": model_type, "num_hidden_layers": LAYERS})
    loaded = models.build(shape, tiny_tokenizer(), seed=1)
    loaded.config["layer_types"] = ["full_attention"] * LAYERS
    if bits:
        loaded = quantized(loaded, Quantize(bits=bits, group_size=32))
    small = first_layers(loaded, 2)
    models.save(tmp_path / "m", small)
    again, tokenizer, config = load(str(tmp_path / "m"), return_config=True)
    tokens = mx.array([[3, 5, 7, 11]])
    assert mx.array_equal(again(tokens), small.model(tokens))
    assert config["num_hidden_layers"] == 2 and config["layer_types"] == ["full_attention"] * 2
    assert loaded.config["num_hidden_layers"] == LAYERS and len(loaded.config["layer_types"]) == LAYERS
    assert tokenizer.vocab_size == loaded.tokenizer.vocab_size


def test_first_layers_share_arrays_and_nothing_else():
    loaded = lively("llama")
    small = first_layers(loaded, 2)
    arrays = dict(tree_flatten(loaded.model.parameters()))
    assert all(arrays[name] is value for name, value in tree_flatten(small.model.parameters()))
    before = np.array(loaded.model(mx.array([PROMPT])))
    small.model.freeze()
    small.model.update(tree_map(mx.zeros_like, small.model.parameters()))
    assert not small.model.trainable_parameters()["model"]["layers"][0]["mlp"]["up_proj"]
    assert len(tree_flatten(loaded.model.trainable_parameters())) == len(arrays)
    assert np.array_equal(np.array(loaded.model(mx.array([PROMPT]))), before)


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ModelError, match=f"first layers: {layers} of 4; give 1 to 4"):
        first_layers(lively("llama"), layers)


def test_adapters_must_be_merged_before_layers_are_cut():
    shape = Shape(**{**SHAPE, "num_hidden_layers": LAYERS})
    loaded = models.build(shape, tiny_tokenizer(), seed=1)
    options = tiny_recipe(student={"model": "x", "shape": None, "method": "lora", "rank": 2}).student
    add_adapters(loaded.model, options, seed=0)
    for _, module in loaded.model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    with pytest.raises(ModelError, match="merge the adapters first"):
        first_layers(loaded, 2)
    assert early(Stack(loaded.model), threshold=1.0).tokens == greedy(loaded.model)  # which needs no merging
    assert len(first_layers(models.fused(loaded), 2).model.layers) == 2


def test_a_config_that_does_not_count_its_layers_is_refused():
    loaded = lively("llama")
    config = {**loaded.config, "num_hidden_layers": LAYERS + 1}
    with pytest.raises(ModelError, match="'llama' does not set how many layers"):
        first_layers(loaded._replace(config=config), 2)
