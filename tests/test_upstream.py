"""What we rely on in MLX and mlx-lm, and the faults there that we work around.

A test here that fails after an upgrade is good news or a warning; its docstring says what to change.
"""

import importlib.metadata
import inspect
import re
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

ON_LINUX_CPU = sys.platform.startswith("linux") and mx.default_device() == mx.Device(mx.cpu)
only_linux_cpu = pytest.mark.skipif(not ON_LINUX_CPU, reason="a property of the Linux CPU backend")


def tiny(model_type: str = "llama", **changes):
    """A two-layer model of mlx-lm's with random weights, and its configuration."""
    from mlx_lm.utils import _get_classes

    config = {
        "model_type": model_type,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **changes,
    }
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    return model, config


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- mlx: sums, scalars, sampling ---------------------------------------------------------------


@only_linux_cpu
def test_a_whole_array_sum_in_float32_is_wrong():
    """Why we sum the last axis first, everywhere. Once this fails, that is a habit and no need."""
    ones = mx.ones((2**12, 2**13))
    assert ones.sum().item() == 2**24  # half of them are lost
    assert ones.sum(-1).sum().item() == 2**25


@only_linux_cpu
def test_softmax_of_bfloat16_loses_its_norm():
    """Why every softmax of ours takes float32."""
    logits = mx.zeros((70_000,), dtype=mx.bfloat16)
    assert mx.softmax(logits).astype(mx.float32).sum().item() > 2
    assert mx.softmax(logits.astype(mx.float32)).sum().item() == pytest.approx(1, abs=1e-3)


def test_a_numpy_scalar_on_the_left_leaves_autodiff():
    """numpy takes the product over and returns its own array: no gradient. Weights are Python floats."""
    x = mx.ones((3,))
    assert isinstance(np.float32(2) * x, np.ndarray)
    assert isinstance(x * np.float32(2), mx.array)
    with pytest.raises(ValueError, match="scalar array"):
        mx.grad(lambda x: (np.float32(2) * x).sum())(x)
    assert mx.grad(lambda x: (2.0 * x).sum())(x).tolist() == [2.0, 2.0, 2.0]


def test_a_key_gives_the_same_numbers_whatever_was_drawn_before():
    """Every draw of ours comes from a key made of (seed, purpose, step)."""
    first = mx.random.normal((4,), key=mx.random.key(7))
    mx.random.seed(1)
    mx.eval(mx.random.normal((100,)))
    assert mx.array_equal(mx.random.normal((4,), key=mx.random.key(7)), first)


def test_a_python_number_is_baked_into_a_compiled_function():
    """Why learning rates and temperatures enter a compiled step as arrays."""
    setting = {"scale": 2.0}
    compiled = mx.compile(lambda x: x * setting["scale"])
    assert compiled(mx.array(1.0)).item() == 2.0
    setting["scale"] = 3.0
    assert compiled(mx.array(1.0)).item() == 2.0  # still


def test_learning_rate_schedules_advance_inside_a_compiled_step():
    """Our schedule is one of mlx.optimizers', read from the optimizer's own step counter."""
    import mlx.optimizers as optim

    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.SGD(optim.linear_schedule(1.0, 0.0, 2))
    state = [model.state, optimizer.state]

    def update(gradient):
        optimizer.update(model, {"weight": gradient})

    step = mx.compile(update, inputs=state, outputs=state)
    start, seen = model.weight.item(), []
    for _ in range(3):
        step(mx.ones((1, 1)))
        seen.append(start - model.weight.item())
        start = model.weight.item()
    assert seen == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


# --- mlx-lm: training ---------------------------------------------------------------------------


def test_default_loss_counts_one_pad_token_a_row():
    """Why `make_batch` and the objective are ours: its mask is `step <= length`, off by one."""
    from mlx_lm.tuner.trainer import default_loss

    class Uniform(nn.Module):
        def __call__(self, tokens):
            return mx.zeros((*tokens.shape, 50))

    rows = mx.array([[5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 0, 0]])  # three and four tokens, then padding
    prompts_and_lengths = mx.array([[0, 3], [0, 4]])
    _, counted = default_loss(Uniform(), rows, prompts_and_lengths)
    right = (3 - 1) + (4 - 1)  # every token but the first of its row
    assert counted.item() == right + 2


def test_grad_checkpoint_patches_the_class():
    """Why gradient checkpointing is ours: theirs would slow down a teacher of the student's class too."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    class Layer(nn.Module):
        def __call__(self, x):
            return x

    student, teacher = Layer(), Layer()
    before = type(teacher).__call__
    grad_checkpoint(student)
    assert type(teacher).__call__ is not before


def test_lora_layers_take_a_scale_and_no_alpha():
    """`student.rank` and `student.scale` go on as they are; without `keys` all linear layers are meant."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    assert parameters_of(linear_to_lora_layers) == ["model", "num_layers", "config", "use_dora"]
    model, _ = tiny()
    with pytest.raises(KeyError, match="scale"):
        linear_to_lora_layers(model, 2, {"rank": 4, "alpha": 8.0, "dropout": 0.0})

    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    trained = {path.rsplit(".", 1)[-1] for path, _ in tree_flatten(model.trainable_parameters())}
    assert trained == {"lora_a", "lora_b"}
    layers = {path.split(".")[2] for path, _ in tree_flatten(model.trainable_parameters())}
    assert layers == {"0", "1"}


# --- mlx-lm: models on disk -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "top_level", "used"),
    [
        ("llama", None, 10_000),
        ("qwen2", None, 1_000_000),
        ("llama", 500_000.0, 500_000),
        ("qwen3", None, 500_000),
    ],
)
def test_where_rope_theta_is_read_from(model_type, top_level, used):
    """transformers 5 nests it in `rope_parameters`, which llama and qwen2 ignore: we write it on top."""
    nested = {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}
    extra = {} if top_level is None else {"rope_theta": top_level}
    model, _ = tiny(model_type, **nested, **extra)
    assert model.model.layers[0].self_attn.rope.base == used


def test_save_empties_the_model_unless_told_otherwise():
    """Why every call of `save` says `donate_model=False`: the student is evaluated after it is saved."""
    from mlx_lm.utils import save, save_model

    assert inspect.signature(save).parameters["donate_model"].default is True
    assert inspect.signature(save_model).parameters["donate_model"].default is False


def test_a_saved_model_keeps_its_weights_in_memory_and_on_disk(tmp_path):
    """`save_model` and `save_config` are what export calls."""
    from mlx_lm.utils import load_model, save_config, save_model

    model, config = tiny()
    tokens = mx.array([[1, 2, 3]])
    before = model(tokens)
    save_model(tmp_path, model, donate_model=False)
    save_config(dict(config), config_path=tmp_path / "config.json")
    loaded, _ = load_model(tmp_path)
    assert mx.array_equal(model(tokens), before)
    assert mx.array_equal(loaded(tokens), before)
    assert not loaded.training  # so a loaded student needs `.train()`


def test_quantize_model_changes_the_model_in_place_and_the_configuration_in_a_copy():
    """test_quantize compares what we make with what it makes; we call `nn.quantize`, which it calls too."""
    from mlx_lm.utils import quantize_model

    model, config = tiny(hidden_size=64, intermediate_size=64, head_dim=32)
    same, quantized = quantize_model(model, config, 32, 4)
    assert same is model
    assert quantized["quantization"] == quantized["quantization_config"]
    assert {"group_size": 32, "bits": 4}.items() <= quantized["quantization"].items()
    assert "quantization" not in config


# --- mlx-lm: models in parts ----------------------------------------------------------------------


def test_models_divide_themselves():
    """What `teacher.parallel` calls (models/divided.py)."""
    from mlx_lm.models import llama, qwen2
    from mlx_lm.models.pipeline import PipelineMixin

    for function in (llama.Model.shard, PipelineMixin.pipeline):
        assert "group" in inspect.signature(function).parameters
    assert issubclass(qwen2.Qwen2Model, PipelineMixin) and not issubclass(llama.LlamaModel, PipelineMixin)


def test_a_batch_generator_names_its_stream():
    """Where a divided teacher waits for the step that was begun ahead (generate.py)."""
    from mlx_lm.generate import BatchGenerator

    assert isinstance(BatchGenerator.stream, property)


# --- quantization -------------------------------------------------------------------------------


def affine_grid(group: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """What MLX makes of a group of weights: the values, by its definition in float64, and the step."""
    last = 2**bits - 1
    low, high = group.min(-1, keepdims=True), group.max(-1, keepdims=True)
    step = np.maximum((high - low) / last, 1e-7)
    below = np.abs(low) > np.abs(high)
    edge, step = np.where(below, low, high), np.where(below, step, -step)
    steps = np.rint(edge / step)
    step = np.where(steps == 0, step, edge / np.where(steps == 0, 1, steps))
    bias = np.where(steps == 0, 0, edge)
    return step * np.clip(np.rint((group - bias) / step), 0, last) + bias, np.abs(step)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_affine_grid_has_zero_and_the_larger_end_on_it(bits, size):
    """Not min and max, as MLX's documentation says: one end may lie up to a step beyond the grid.

    So a weight that is zero, such as a pruned one, stays zero, to a ten-thousandth of a step: q s + b is
    computed in float32, and need not be 0 there.
    """
    random = np.random.default_rng(0)
    around_zero, positive = random.normal(size=(64, 256)), random.normal(size=(64, 256)) * 0.1 + 1
    for weights in (around_zero, positive, -positive):
        weights = weights.astype(np.float32)
        weights[:, ::7] = 0
        stored = mx.quantize(mx.array(weights), size, bits)
        values = np.array(mx.dequantize(*stored, size, bits)).reshape(-1, size)
        group = weights.reshape(-1, size)
        expected, step = affine_grid(group.astype(np.float64), bits)
        equal = np.abs(values - expected) < 1e-3 * step
        assert equal.mean() > 0.9999  # of weights halfway between two values either may be taken
        assert (np.abs(values - expected) < 1.001 * step).all()
        assert (np.abs(values - group) < 1.001 * step).all()
        assert (np.abs(values) / step)[group == 0].max() < 1e-4


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])


@pytest.mark.parametrize(
    ("mode", "size", "values", "scale_of"),
    [
        ("mxfp4", 32, E2M1, lambda scales: 2.0 ** (scales - 127.0)),
        ("mxfp8", 32, E4M3, lambda scales: 2.0 ** (scales - 127.0)),
        ("nvfp4", 16, E2M1, lambda scales: np.append(E4M3, np.nan)[scales]),
    ],
)
def test_floating_point_grids_are_those_of_their_formats(mode, size, values, scale_of):
    """Each weight becomes the nearest value times its group's scale; there are no biases."""
    weights = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    stored, scales, *_ = mx.quantize(mx.array(weights), mode=mode)
    found = mx.dequantize(stored, scales, mode=mode).astype(mx.float32)
    grid = scale_of(np.array(scales).reshape(-1, 1, 1)) * np.concatenate([-values, values])
    group = weights.reshape(-1, size, 1)
    nearest = np.abs(grid - group).min(-1)
    lost = np.abs(np.array(found).reshape(-1, size) - weights.reshape(-1, size))
    assert np.allclose(lost, nearest, atol=1e-6)


def test_an_embedding_in_floating_point_modes_gives_bfloat16():
    """So a model in these modes computes in bfloat16 from there on, whatever its norms are stored in."""
    tokens, table = mx.array([1, 2]), nn.Embedding(8, 64)
    assert table.to_quantized(mode="mxfp4")(tokens).dtype == mx.bfloat16
    assert table.to_quantized(bits=4)(tokens).dtype == mx.float32


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
MOE |= {"mlp_only_layers": [], "norm_topk_prob": True, "rope_theta": 1e4, "head_dim": 32}


def test_quantize_model_fails_where_groups_of_64_do_not_divide_a_router():
    """Why a router may have groups of 32 with us."""
    from mlx_lm.utils import quantize_model

    model, config = tiny("qwen3_moe", hidden_size=96, **MOE)
    with pytest.raises(ValueError, match="divisible by the quantization group size 64"):
        quantize_model(model, config, 32, 4)


def test_gptq_rounds_routers_as_all_else():
    """Why `layerwise` hides from it what has a grid of its own."""
    from mlx_lm.quant.gptq import gptq_quantize

    assert parameters_of(gptq_quantize) == [
        "model",
        "data",
        "bits",
        "group_size",
        "fallback_bits",
        "fallback_group_size",
        "batch_size",
    ]
    model, _ = tiny("qwen3_moe", hidden_size=64, **MOE)
    path, _ = "model.layers.0.mlp.gate", gptq_quantize(model, mx.ones((1, 4), mx.int32), 4, 32, 4, 32)
    assert dict(model.named_modules())[path].bits == 4 and model.quant_predicate(path, None)["bits"] == 8


def test_gptq_has_2_4_and_8_bits():
    """Why other widths are refused with it, see options.Quantize."""
    from mlx_lm.quant.gptq import quantize

    for bits in (3, 5, 6):
        with pytest.raises(AssertionError, match="Unsupported bits"):
            quantize(mx.zeros((1, 32)), bits, mx.ones((1, 1)), mx.zeros((1, 1)))


def test_awq_knows_these_types():
    """`quantize.checks` has the list, to refuse others without importing mlx-lm."""
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    from mlx_distill.quantize.checks import AWQ_TYPES

    assert tuple(sorted(AWQ_MODEL_CONFIGS)) == AWQ_TYPES
    given = {"group_size", "bits", "embed_group_size", "embed_bits"}
    assert parameters_of(awq_quantize)[:3] == ["model", "inputs", "awq_config"]
    assert given <= set(parameters_of(awq_quantize))
    # It names the matrices of a DeepSeek-V2-Lite, which has no low-rank queries.
    assert "q_proj" in AWQ_MODEL_CONFIGS["deepseek_v2"].scale_configs[0].layers


# --- mlx-lm: generation ---------------------------------------------------------------------------


def test_batch_generator_has_the_shape_that_generate_relies_on():
    from mlx_lm.generate import BatchGenerator, GenerationBatch

    needed = {"max_tokens", "stop_tokens", "sampler", "completion_batch_size", "prefill_batch_size"}
    assert needed <= set(parameters_of(BatchGenerator.__init__))
    assert parameters_of(BatchGenerator.insert)[:3] == ["self", "prompts", "max_tokens"]
    assert "samplers" in parameters_of(BatchGenerator.insert)
    fields = set(inspect.get_annotations(GenerationBatch.Response))
    assert {"uid", "token", "logprobs", "finish_reason"} <= fields


def test_batched_greedy_answers_equal_those_one_by_one():
    """The teacher answers thousands of prompts in batches; neighbours must not change an answer."""
    from mlx_lm.generate import BatchGenerator

    model, _ = tiny()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]

    def answers(batch):
        generator = BatchGenerator(model, max_tokens=6)
        found = {uid: [] for uid in generator.insert(batch)}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        generator.close()
        return list(found.values())

    together = answers(prompts)
    assert [len(answer) for answer in together] == [6, 6, 6]
    assert together == [answers([prompt])[0] for prompt in prompts]


def test_batch_generator_sets_the_wired_limit_where_metal_has_one(monkeypatch):
    """Why we do not build one on a Mac without taking the limit back: panics were reported with it raised."""
    import mlx_lm.utils

    calls = []
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 2**30})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(limit) or 0)
    mlx_lm.utils.maybe_set_recommended_wired_limit()
    assert calls == [2**30]
    from mlx_lm.generate import BatchGenerator

    model, _ = tiny()
    BatchGenerator(model).close()
    assert calls == [2**30, 2**30, 0]  # raised by the constructor, put back by close


def test_make_sampler_cuts_the_nucleus_before_it_applies_the_temperature():
    """Others temper first. At temperature 10 the tokens left out at temperature 1 never come back."""
    from mlx_lm.sample_utils import make_sampler

    logprobs = mx.log(mx.array([[0.6, 0.3, 0.1]]))
    sampler = make_sampler(temp=10.0, top_p=0.8)
    mx.random.seed(0)
    seen = {sampler(logprobs).item() for _ in range(100)}
    assert seen == {0, 1}
    tempered = mx.softmax(logprobs / 10, axis=-1)
    assert tempered[0, :2].sum().item() < 0.8  # tempered first, the third token would be in the nucleus


def test_make_sampler_draws_from_two_tokens_of_the_toy_lock():
    """The wrong order in numbers: at temperature 1.6 and top-p .8 seven tokens are to be drawn from.

    tests/test_sampling.py has them. Once this fails, `sampling.cut` may become theirs.
    """
    from mlx_lm.sample_utils import make_sampler

    tail = 0.75 ** np.arange(12)
    lock = np.array([0.750, 0.055, 0.050, 0.037, *(tail / tail.sum() * 0.108)])
    mx.random.seed(0)
    drawn = make_sampler(temp=1.6, top_p=0.8)(mx.log(mx.array(np.tile(lock, (20_000, 1)), mx.float32)))
    share = np.bincount(np.array(drawn), minlength=16) / 20_000
    assert np.flatnonzero(share).tolist() == [0, 1]
    assert share[0] == pytest.approx(0.837, abs=0.012)


def test_batch_generator_asks_a_cache_for_no_more_than_ours_has():
    """`sampling.Draws` is one more cache of a row; what mlx-lm calls on it stands in its class.

    Where this fails, the caches of mlx-lm have a new method that ours needs too.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache

    asked = set()

    class Spy:
        def __init__(self, cache):
            self.cache = cache

        def __getattr__(self, name):
            asked.add(name)
            return getattr(self.cache, name)

        @staticmethod
        def merge(rows):
            asked.add("merge")
            return Spy(rows[0].cache.merge([row.cache for row in rows]))

        def extend(self, other):
            asked.add("extend")
            self.cache.extend(other.cache)

        def __deepcopy__(self, memo):
            import copy

            return Spy(copy.deepcopy(self.cache, memo))

    model, _ = tiny()
    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=4)
    generator.close()

    def insert(prompts):
        caches = [[Spy(cache) for cache in make_prompt_cache(model)] for _ in prompts]
        return generator.insert(prompts, caches=caches, max_tokens=[sys.maxsize] * len(prompts))

    first = insert([[1, 2, 3], [4, 5, 6, 7], [8]])
    for _ in range(3):
        generator.next_generated()
    insert([[9, 9]])
    for _ in range(3):
        assert len(generator.next_generated()) in (3, 4)
    generator.remove(first[:2])
    assert len(generator.next_generated()) == 2
    read_by_the_model = {"offset", "make_mask", "update_and_fetch", "bits"}
    assert asked - read_by_the_model == {"merge", "prepare", "finalize", "state", "filter", "extend"}


# --- the endpoint: httpx2 and mlx-lm's server ---------------------------------------------------


def test_httpx2_comes_with_huggingface_hub():
    """Why asking a server costs no further dependency. With another client there, take that one here too."""
    requires = importlib.metadata.requires("huggingface-hub") or []
    assert any(re.match(r"httpx2\b", line) and "extra" not in line for line in requires)


def test_the_server_of_mlx_lm_answers_requests_with_a_seed_one_by_one():
    """docs/endpoint.md says so; once this fails, take the sentence out."""
    from mlx_lm.server import ResponseGenerator

    assert "args.seed is None" in inspect.getsource(ResponseGenerator._is_batchable)


def test_a_cache_grows_by_the_step_of_its_instance():
    """`row_cache` sets it: of 256 places most would be empty for short answers, and copied all the same."""
    from mlx_lm.models.cache import BatchKVCache, KVCache

    model, _ = tiny()
    layers = [KVCache.merge([KVCache(), KVCache()]) for _ in model.layers]
    for layer in layers:
        assert type(layer) is BatchKVCache
        assert layer.step == 256
        layer.step = 8
    model(mx.zeros((2, 5), dtype=mx.int32), cache=layers)
    assert layers[0].keys.shape[2] == 8


# --- lm-evaluation-harness: mlx-lm's adapter -----------------------------------------------------


@pytest.fixture
def adapter():
    """mlx-lm's adapter around a random model, whose tokens are bytes and none of which opens a text."""
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    from mlx_lm.evaluate import MLXLM

    class Bytes:
        chat_template, has_thinking = None, False

        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

    adapter = MLXLM.__new__(MLXLM)
    adapter._model, _ = tiny(vocab_size=256)
    setattr(adapter, "tokenizer", Bytes())  # noqa: B010
    adapter.use_chat_template = False
    adapter._max_tokens, adapter._batch_size, adapter._sampler = None, 4, None
    return adapter


def test_mlx_lms_adapter_gives_an_empty_context_no_chance(adapter):
    """Why evaluate/harness_model.py is ours, with the next two: once all three fail, take mlx-lm's."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("", "a"), 0), Instance("loglikelihood", {}, ("b", "a"), 1)]
    empty, other = adapter.loglikelihood(asked)
    assert empty == (-float("inf"), False) and np.isfinite(other[0])


def test_mlx_lms_adapter_leaves_the_first_token_of_a_text_out(adapter):
    from lm_eval.api.instance import Instance

    rolled = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0)])[0]
    logits = adapter._model(mx.array([list(b"abc")]))[0].astype(mx.float32)
    log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert rolled == pytest.approx(log_p[0, ord("b")] + log_p[1, ord("c")], abs=1e-4)


def test_mlx_lms_adapter_draws_greedily_whatever_a_task_asks():
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
    from mlx_lm.evaluate import MLXLM

    source = inspect.getsource(MLXLM.generate_until)
    assert "max_gen_toks" in source and not re.search(r"opt(\.get\(|\[)['\"](temperature|do_sample)", source)


# --- transformers: templates and tokenizers of others ---------------------------------------------


def test_chat_templates_are_rendered_in_an_immutable_sandbox():
    """What keeps a template of a model from reading or writing anything; we rely on it and add nothing."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template("{{ messages }}")
    assert isinstance(compiled.environment, ImmutableSandboxedEnvironment)
    assert set(compiled.environment.globals) == {
        *ImmutableSandboxedEnvironment().globals,
        *("raise_exception", "strftime_now", "dict", "namespace"),
    }


def test_a_sandboxed_template_may_still_take_long():
    """What the sandbox does not bound, docs/safety.md says. `range` alone ends at 100,000."""
    from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

    assert MAX_RANGE == 100_000
    assert len(ImmutableSandboxedEnvironment().from_string("{{ 'x' * 10000000 }}").render()) == 10**7


def test_mlx_lm_runs_no_code_of_a_model_unless_told():
    """`models.load` calls these with their defaults, and tokenizers with `trust_remote_code` False."""
    from mlx_lm.utils import load, load_model

    for function in (load, load_model):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
