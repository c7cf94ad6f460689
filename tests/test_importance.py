"""What is measured of a model is what it does: as NumPy says, whatever the batches, in the memory of one."""

from collections import defaultdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import rows_of, tiny_model
from tiny_configs import tiny_config, tiny_of

from mlx_distill.data.batch import Encoded, make_batch
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.prune import importance
from mlx_distill.prune.importance import Statistics, loss_changes, measure
from mlx_distill.prune.recorders import Tally, recording

ALL = 10**9  # more tokens than there are
ROWS = rows_of([20, 9, 20, 30, 9, 1, 9])
WITH_EXPERTS = [
    "afmoe",
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt_oss",
    "jamba",
    "llama4",
    "mixtral",
    "olmoe",
    "phixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
]


def of(model_type: str) -> Loaded:
    return Loaded(tiny_of(model_type), tiny_config(model_type), None)


def llama() -> Loaded:
    """Grouped queries, and norms whose weights are not one."""
    loaded = tiny_model(num_attention_heads=4, num_key_value_heads=2)
    random = np.random.default_rng(0)

    def moved(array: mx.array) -> mx.array:
        return array + mx.array(0.3 * random.normal(size=array.shape), dtype=mx.float32)

    loaded.model.update(tree_map(moved, loaded.model.parameters()))
    return loaded


# --- a model in NumPy


class InNumpy:
    """Llama and Qwen3-MoE in float64, one row at a time, keeping all that matrices and norms read."""

    def __init__(self, loaded: Loaded):
        self.config = loaded.config
        flat: Any = tree_flatten(loaded.model.parameters())
        self.weights = {name: np.array(array).astype(np.float64) for name, array in flat}
        self.read = defaultdict[str, list[np.ndarray]](list)  # of vectors
        self.cosines = defaultdict[int, list[float]](list)
        self.routing = defaultdict[int, list[np.ndarray]](list)  # (T, E) weights
        self.norms = defaultdict[int, list[np.ndarray]](list)  # (T, E) of the outputs of all experts
        self.chosen_reads = defaultdict[tuple[str, int], list[np.ndarray]](list)

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        self.read[path].append(x.reshape(-1, x.shape[-1]))
        return x @ self.weights[f"{path}.weight"].T

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        self.read[path].append(x.reshape(-1, x.shape[-1]))
        size = np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / size * self.weights[f"{path}.weight"]

    def heads(self, path: str, x: np.ndarray, count: int, norm: str) -> np.ndarray:
        split = self.linear(path, x).reshape(len(x), count, -1)
        if f"{norm}.weight" in self.weights:
            split = self.norm(norm, split)
        return split

    def rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self.config["rope_theta"] ** -(np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., :half] * sin + x[..., half:] * cos], -1
        )

    def attention(self, path: str, x: np.ndarray) -> np.ndarray:
        count, kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q = self.rotate(self.heads(f"{path}.q_proj", x, count, f"{path}.q_norm"))
        k = self.rotate(self.heads(f"{path}.k_proj", x, kv, f"{path}.k_norm")).repeat(count // kv, 1)
        v = self.linear(f"{path}.v_proj", x).reshape(len(x), kv, -1).repeat(count // kv, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        return self.linear(f"{path}.o_proj", np.einsum("hij,jhd->ihd", scores, v).reshape(len(x), -1))

    def feed_forward(self, path: str, x: np.ndarray) -> np.ndarray:
        gate, up = self.linear(f"{path}.gate_proj", x), self.linear(f"{path}.up_proj", x)
        return self.linear(f"{path}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def experts(self, path: str, number: int, x: np.ndarray) -> np.ndarray:
        shares = softmax(self.linear(f"{path}.gate", x))
        order = np.argsort(-shares, -1)[:, : self.config["num_experts_per_tok"]]
        weights = np.zeros_like(shares)
        np.put_along_axis(weights, order, np.take_along_axis(shares, order, -1), -1)
        if self.config["norm_topk_prob"]:
            weights /= weights.sum(-1, keepdims=True)
        given = np.zeros((*shares.shape, x.shape[-1]))
        for e in range(shares.shape[1]):
            mine = (weights[:, e] > 0).nonzero()[0]
            gate, up, down = (
                self.weights[f"{path}.switch_mlp.{n}_proj.weight"][e] for n in ("gate", "up", "down")
            )
            inner = x @ gate.T / (1 + np.exp(-x @ gate.T)) * (x @ up.T)
            given[:, e] = inner @ down.T
            for name, read in (("gate", x), ("up", x), ("down", inner)):
                self.chosen_reads[f"{path}.switch_mlp.{name}_proj", e].append(read[mine])
        self.routing[number].append(weights)
        self.norms[number].append(np.sqrt((given**2).sum(-1)))
        return (weights[..., None] * given).sum(1)

    def __call__(self, tokens: list[int]) -> np.ndarray:
        x = self.weights["model.embed_tokens.weight"][tokens]
        for number in range(self.config["num_hidden_layers"]):
            path, before = f"model.layers.{number}", x
            x = x + self.attention(f"{path}.self_attn", self.norm(f"{path}.input_layernorm", x))
            read = self.norm(f"{path}.post_attention_layernorm", x)
            if f"{path}.mlp.gate.weight" in self.weights:
                x = x + self.experts(f"{path}.mlp", number, read)
            else:
                x = x + self.feed_forward(f"{path}.mlp", read)
            lengths = np.sqrt((before**2).sum(-1) * (x**2).sum(-1))
            self.cosines[number] += list((before * x).sum(-1) / lengths)
        tied = "lm_head.weight" not in self.weights
        return self.linear("model.embed_tokens" if tied else "lm_head", self.norm("model.norm", x))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def in_numpy(loaded: Loaded, rows: list[Encoded]) -> Statistics:
    model = InNumpy(loaded)
    for row in rows:
        model(row.tokens[:-1])
    inputs = {path: (np.concatenate(read) ** 2).mean(0) for path, read in model.read.items()}
    for path in {path for path, _ in model.chosen_reads}:
        reads = [
            np.concatenate(model.chosen_reads[path, e]) for e in range(loaded.config.get("num_experts", 0))
        ]
        inputs[path] = np.stack([(read**2).sum(0) / max(1, len(read)) for read in reads])
    layers = range(loaded.config["num_hidden_layers"])
    routing = [np.concatenate(model.routing.get(n, [np.zeros((1, 0))])) for n in layers]
    norms = [np.concatenate(model.norms.get(n, [np.zeros((1, 0))])) for n in layers]
    return Statistics(
        sum(len(row.tokens) - 1 for row in rows),
        np.array([1 - np.mean(model.cosines[n]) for n in layers]),
        inputs,
        [(weights > 0).mean(0) for weights in routing],
        [(weights * norm).mean(0) for weights, norm in zip(routing, norms, strict=True)],
        [weights.mean(0) for weights in routing],
    )


def gap(one: Statistics, other: Statistics) -> float:
    """The largest difference of two statistics, relative to the largest number beside it."""
    assert one.inputs.keys() == other.inputs.keys() and one.tokens == other.tokens
    pairs = [(one.inputs[path], other.inputs[path]) for path in one.inputs]
    pairs.append((one.influence, other.influence))
    for name in ("routed", "expert_norms", "routing_weights"):
        pairs += zip(getattr(one, name), getattr(other, name), strict=True)
    assert all(a.dtype == b.dtype == np.float64 and a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs if b.size)


@pytest.mark.parametrize("make", [llama, lambda: of("qwen3_moe")], ids=["llama", "qwen3_moe"])
def test_statistics_are_those_of_the_model_in_numpy(make: Any) -> None:
    loaded = make()
    assert gap(measure(loaded, ROWS, ALL), in_numpy(loaded, ROWS)) < 1e-5


def test_many_tokens_are_sorted_by_expert_and_few_are_not() -> None:
    """From 64 on, mlx-lm hands tokens to its experts in another order and another shape."""
    loaded, long = of("qwen3_moe"), rows_of([40] * 3)
    for rows in ([long[0]], long):
        assert gap(measure(loaded, rows, ALL), in_numpy(loaded, rows)) < 1e-5


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_every_token_counts_for_as_many_experts_as_it_has(model_type: str) -> None:
    statistics = measure(of(model_type), ROWS, ALL)
    sums = {round(routed.sum(), 9) for routed in statistics.routed if routed.size}
    assert len(sums) == 1 and sums <= {1, 2}
    for routed, *others in zip(
        statistics.routed, statistics.routing_weights, statistics.expert_norms, strict=True
    ):
        for other in others:
            assert np.array_equal(routed > 0, other > 0)


ROUTERS = {  # of a model with experts: the module that scores them, and the weights it then has by its paper
    "mixtral": ("block_sparse_moe.gate", lambda logits, kept: softmax(np.where(kept, logits, -np.inf))),
    "gpt_oss": ("mlp.router", lambda logits, kept: softmax(np.where(kept, logits, -np.inf))),
    "qwen2_moe": (
        "mlp.gate",
        lambda logits, kept: softmax(logits) * kept,
    ),  # and experts that all tokens share
    "llama4_text": ("feed_forward.router", lambda logits, kept: kept),  # weighs what an expert reads instead
}


@pytest.mark.parametrize("model_type", ROUTERS)
def test_routing_weights_are_found_whatever_the_router(model_type: str) -> None:
    """The block of experts is asked, by what it gives for unit vectors, and not its router."""
    path, weigh = ROUTERS[model_type]
    model: Any = tiny_of("llama4" if model_type == "llama4_text" else model_type)
    layer = model.layers[-1]
    inside = dict(layer.named_modules())
    block, router = inside[path.partition(".")[0]], inside[path]
    x = mx.array(np.random.default_rng(0).normal(size=(2, 5, 32)), dtype=mx.float32)
    with recording(model) as tally:
        block(x)
        tally.settle()
    logits = np.array(router(x)).astype(np.float64)
    count = 1 if model_type == "llama4_text" else 2
    kept = logits >= np.sort(logits, -1)[..., -count, None]
    (found,) = (value for (name, _), value in tally.sums.items() if name == "weights")
    assert np.allclose(found, weigh(logits, kept).sum((0, 1)), rtol=1e-5)
    read = [value for (name, at), value in tally.sums.items() if name == "vectors" and at.endswith(path)]
    assert read == [10]  # what the router reads to be asked is not counted


# --- laws


@pytest.mark.parametrize("make", [llama, lambda: of("qwen3_moe")], ids=["llama", "qwen3_moe"])
def test_batches_change_nothing_and_padding_would(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make()
    whole = measure(loaded, ROWS, ALL)
    for size in (1, 20, 60):
        monkeypatch.setattr(importance, "BATCH_TOKENS", size)
        assert gap(measure(loaded, ROWS, ALL), whole) < 1e-5

    # The usual mistake: rows of different length in one batch, and a mean over all its places.
    def padded(rows: list[Encoded]) -> Any:
        yield np.array(make_batch(rows).tokens).tolist()

    monkeypatch.setattr(importance, "_batches", padded)
    assert gap(measure(loaded, ROWS, ALL), whole) > 1e-2


def test_rows_are_read_whole_until_there_are_enough_tokens() -> None:
    loaded, rows = tiny_model(), rows_of([7] * 10)  # of 9 tokens that are read
    for asked, read in ((1, 9), (9, 9), (10, 18), (ALL, 90)):
        assert measure(loaded, rows, asked).tokens == read
    one, again, other = (measure(loaded, rows, 10, seed=seed) for seed in (0, 0, 1))
    assert gap(one, again) == 0
    assert gap(one, other) > 1e-3  # other rows


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_models_in_half_precision_are_measured_in_single(dtype: mx.Dtype) -> None:
    loaded = llama()
    loaded.model.set_dtype(dtype)
    exact = llama()
    exact.model.update(
        tree_map(lambda array: array.astype(dtype).astype(mx.float32), exact.model.parameters())
    )
    assert gap(measure(loaded, ROWS, ALL), measure(exact, ROWS, ALL)) < 0.05


def test_what_is_large_in_half_precision_does_not_overflow() -> None:
    """The square of 300 is infinite in float16, and the squares of the residual stream are such."""
    loaded = llama()
    weight = loaded.model.model.embed_tokens.weight  # type: ignore[union-attr]
    loaded.model.model.embed_tokens.weight = 300 * mx.sign(weight)  # type: ignore[union-attr]
    loaded.model.set_dtype(mx.float16)
    statistics = measure(loaded, ROWS, ALL)
    assert np.allclose(statistics.inputs["model.layers.0.input_layernorm"], 300**2)
    assert np.isfinite(statistics.influence).all() and np.isfinite(statistics.inputs["model.norm"]).all()


def test_quantized_models_are_measured_by_the_same_paths() -> None:
    def fits(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    for make in (llama, lambda: of("qwen3_moe")):
        quantized, plain = make(), make()
        nn.quantize(quantized.model, group_size=32, bits=8, class_predicate=fits)
        modules = dict(plain.model.named_modules())
        for path, module in quantized.model.named_modules():
            if "scales" in module:
                rounded = [module[name] for name in ("weight", "scales", "biases")]
                modules[path].weight = mx.dequantize(*rounded, group_size=32, bits=8)
        assert gap(measure(quantized, ROWS, ALL), measure(plain, ROWS, ALL)) < 1e-4


def test_memory_is_that_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, rows = tiny_model(hidden_size=64, intermediate_size=512), rows_of([126] * 24)

    def peak(rows: list[Encoded]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        measure(loaded, rows, ALL)
        return mx.get_peak_memory() - before

    monkeypatch.setattr(importance, "BATCH_TOKENS", 256)
    peak(rows[:2])
    assert peak(rows) < 1.2 * peak(rows[:2])

    # The usual mistake: all is lazy, and nothing is computed before the end.
    def late(tally: Tally) -> None:
        if tally.batch["vectors", "model.norm"].item() == 24 * 128:
            settle(tally)

    settle = Tally.settle
    monkeypatch.setattr(Tally, "settle", late)
    assert peak(rows) > 3 * peak(rows[:2])


# --- layers


def without_a_layer(loaded: Loaded, number: int) -> Any:
    model: Any = loaded.model
    model.model.layers = [layer for n, layer in enumerate(model.layers) if n != number]
    return model


def test_loss_changes_are_those_of_a_model_without_the_layer() -> None:
    found = loss_changes(llama(), ROWS, ALL, 50)
    whole = fidelity(llama().model, ROWS, 50)[0]["nll"]
    for number in range(2):
        assert found[number] == pytest.approx(
            fidelity(without_a_layer(llama(), number), ROWS, 50)[0]["nll"] - whole, abs=1e-6
        )
    assert found.dtype == np.float64 and np.abs(found).min() > 1e-3


def test_a_layer_that_does_nothing_has_no_influence_and_no_loss() -> None:
    loaded = llama()
    layer: Any = loaded.model.layers[1]  # type: ignore[index]
    for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
        matrix.weight = mx.zeros_like(matrix.weight)
    influence, changes = measure(loaded, ROWS, ALL).influence, loss_changes(loaded, ROWS, ALL, 50)
    assert abs(influence[1]) < 1e-6 < influence[0]
    assert abs(changes[1]) < 1e-6 < abs(changes[0])


def test_a_layer_that_the_model_does_not_call_as_one_has_no_influence_to_tell() -> None:
    statistics = measure(of("iquestloopcoder"), ROWS, ALL)
    assert np.isnan(statistics.influence).all() and len(statistics.inputs) > 30


def test_layers_that_give_more_than_one_array_can_be_skipped() -> None:
    """Some types hand on what a layer attends to, beside its hidden state."""
    found = loss_changes(of("gemma4_text"), ROWS, ALL, 60)
    assert len(found) == 4 and np.isfinite(found).all() and (np.abs(found) > 1e-6).any()


# --- what is left behind


def state(model: Any) -> list[Any]:
    flat: Any = tree_flatten(model.parameters())
    modules = [(path, type(module), module.training) for path, module in model.named_modules()]
    return [*modules, *((path, id(array)) for path, array in flat)]


def test_a_module_in_two_places_is_left_as_it_was() -> None:
    loaded: Any = llama()
    loaded.model.layers[1].mlp.up_proj = loaded.model.layers[0].mlp.up_proj
    before = state(loaded.model)
    inputs = measure(loaded, ROWS, ALL).inputs
    assert state(loaded.model) == before
    one, other = (inputs[f"model.layers.{number}.mlp.up_proj"] for number in range(2))
    assert np.array_equal(one, other)


class Broken(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [llama, lambda: of("qwen3_moe")], ids=["llama", "qwen3_moe"])
def test_the_model_is_left_as_it_was_whatever_happened(make: Any, training: bool) -> None:
    loaded = make()
    loaded.model.train(training)
    before = state(loaded.model)
    measure(loaded, ROWS, ALL)
    loss_changes(loaded, ROWS, ALL, 50)
    assert state(loaded.model) == before

    def breaking(*args: Any) -> Any:
        raise Broken

    mlp = loaded.model.layers[1].mlp
    mlp_class = type(mlp)
    mlp.__class__ = type("Breaking", (mlp_class,), {"__call__": breaking})
    before = state(loaded.model)
    for attempt in (lambda: measure(loaded, ROWS, ALL), lambda: loss_changes(loaded, ROWS, ALL, 50)):
        with pytest.raises(Broken):
            attempt()
        assert state(loaded.model) == before
