"""Self-speculative decoding: the whole model's greedy answer, token for token."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_early_exit import PROMPT, VOCABULARY, greedy, lively

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.template import encode_prompt, end_of_turn_ids
from mlx_distill.models.early_exit import Passage, Stack, answer_early
from mlx_distill.models.speculate import speculate


def speculated(stack, **options):
    usual = {"prompt": PROMPT, "exit": 2, "draft": 3, "stop": set(), "max_tokens": 24}
    return speculate(stack, **{**usual, **options})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2"])
def test_the_answer_is_the_whole_models(model_type):
    model = lively(model_type).model
    stack, expected = Stack(model), greedy(model)
    assert len(set(expected)) > 5
    drafted = accepted = 0
    for exit, draft in ((1, 2), (2, 1), (2, 5), (3, 3)):
        found = speculated(stack, exit=exit, draft=draft)
        assert (found.tokens, found.finished) == (expected, False)
        assert found.calls + found.accepted == 24  # each call adds one token of the model's own
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert 0 < accepted < drafted  # drafts were kept, and drafts were thrown away


def test_rejected_drafts_must_leave_the_caches(monkeypatch):
    model = lively("llama").model
    stack = Stack(model)
    assert speculated(stack).tokens == greedy(model)
    monkeypatch.setattr(Passage, "take_back", lambda self, count: None)
    assert speculated(stack).tokens != greedy(model)


def test_an_exit_that_is_always_right_saves_all_but_one_call_a_round():
    """Layers above the exit that add nothing: each draft is accepted whole."""
    model = lively("qwen3").model
    for layer in model.layers[2:]:
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    for draft in (1, 3, 6):
        found = speculated(Stack(model), draft=draft, max_tokens=23)
        assert found.tokens == greedy(model, max_tokens=23)
        assert found.calls == math.ceil(23 / (draft + 1))
        assert found.drafted == found.accepted == 23 - found.calls


def test_an_exit_that_is_never_right_costs_calls_but_no_token():
    model = lively("llama").model
    stack = Stack(model)
    plain = stack.logits

    def contrary(hidden):
        return -plain(hidden) if stack.drafting else plain(hidden)

    climb = Passage.climb

    def noted(self, piece):
        stack.drafting = piece == 0
        return climb(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "logits", contrary)
        patch.setattr(Passage, "climb", noted)
        found = speculated(stack)
    assert found.tokens == greedy(model)
    assert (found.calls, found.accepted, found.drafted) == (24, 0, 3 * 21 + 2 + 1 + 0)


def test_an_end_of_turn_ends_the_answer_wherever_in_a_round_it_comes():
    model = lively("gemma").model
    stack, expected = Stack(model), greedy(model)
    for token in sorted(set(expected))[::3]:
        length = expected.index(token)
        for draft in (1, 4):
            found = speculated(stack, stop={token, VOCABULARY + 5}, draft=draft)
            assert (found.tokens, found.finished) == (expected[:length], True)
            assert found.calls <= length + 1
            # The answer and its end: one of each call's own, but for an end that was drafted.
            assert found.calls + found.accepted - (length + 1) in (0, 1)


@pytest.mark.parametrize("draft", [1, 4, 50])
def test_no_draft_runs_over_the_last_token(draft):
    model = lively("llama").model
    stack, expected = Stack(model), greedy(model)
    for most in range(10):
        found = speculated(stack, draft=draft, max_tokens=most)
        assert found.tokens == expected[:most]
        assert found.drafted <= max(0, most - 1) * most / 2
        assert found.accepted + found.calls == most


def test_a_stop_that_is_the_last_token_allowed_still_finishes():
    model = lively("llama").model
    expected = greedy(model)
    place = max(expected.index(token) for token in set(expected))
    found = speculated(Stack(model), stop={expected[place]}, max_tokens=place + 1)
    assert (found.tokens, found.finished) == (expected[:place], True)
    cut = speculated(Stack(model), stop={expected[place]}, max_tokens=place)
    assert (cut.tokens, cut.finished) == (expected[:place], False)


def test_prompts_of_one_token_and_of_several_pieces(monkeypatch):
    model = lively("gpt2").model
    monkeypatch.setattr("mlx_distill.models.early_exit._PREFILL", 6)
    long = np.random.default_rng(0).integers(VOCABULARY, size=20).tolist()
    for prompt in ([4], long):
        assert speculated(Stack(model), prompt=prompt).tokens == greedy(model, prompt)


def test_a_quantized_model_answers_as_it_does_alone():
    model = lively("qwen3").model
    plain = greedy(model)
    nn.quantize(model, group_size=32, bits=4)
    expected = greedy(model)
    assert expected != plain and len(set(expected)) > 5
    for draft in (1, 4):
        assert speculated(Stack(model), draft=draft).tokens == expected


def test_half_precision_breaks_ties_as_mlx_lm_does(monkeypatch):
    """Flat distributions in bfloat16: log-probabilities tie where logits do not."""
    answers = []
    for seed in range(4):
        model = lively("llama", seed=seed).model
        model.lm_head.weight = model.lm_head.weight / 6
        model.set_dtype(mx.bfloat16)
        answers.append((Stack(model), greedy(model)))
    for stack, expected in answers:
        assert (
            answer_early(stack, PROMPT, exits=[2], threshold=1.0, stop=set(), max_tokens=24).tokens
            == expected
        )
        assert speculated(stack).tokens == expected

    monkeypatch.setattr("mlx_distill.models.speculate.most_likely", lambda logits: mx.argmax(logits, axis=-1))
    assert any(speculated(stack).tokens != expected for stack, expected in answers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit": 4}, "layer 4 is no exit of 4 layers"),
        ({"exit": 0}, "layer 0"),
        ({"draft": 0}, "draft: 0 tokens"),
        ({"prompt": []}, "prompt: empty"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as info:
        speculated(Stack(lively("llama").model), **options)
    assert "\n" not in str(info.value)


@pytest.mark.slow
@pytest.mark.parametrize("exit", [1, 2, 3])
def test_200_answers_of_the_embedded_teacher_are_its_own(exit):
    """Against our own one-by-one decoding of the whole model, and against mlx-lm's."""
    loaded = models.load("embedded", "teacher.model")
    stack, stop = Stack(loaded.model), end_of_turn_ids(loaded.tokenizer)
    for row in pocket.rows("code", "test", 200):
        prompt = encode_prompt(row, loaded.tokenizer)
        plain = answer_early(stack, prompt, exits=[], threshold=1.0, stop=stop, max_tokens=128)
        found = speculate(stack, prompt, exit=exit, draft=3, stop=stop, max_tokens=128)
        assert (found.tokens, found.finished) == (plain.tokens, plain.finished)
        told = greedy(loaded.model, prompt, len(plain.tokens) + plain.finished)
        assert told[: len(plain.tokens)] == plain.tokens
        assert not plain.finished or told[-1] in stop
