"""What stays of a model is what counts: dead units go first, important ones last, and all can be cut."""

from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from small_models import TOKENS, arrays_of, small_model, zero
from tiny import rows_of, tiny_model

from mlx_distill.errors import RecipeError
from mlx_distill.models import Loaded
from mlx_distill.options import Prune
from mlx_distill.prune.axes import everything, possible_layers, sizes_of
from mlx_distill.prune.choose import choose
from mlx_distill.prune.importance import Statistics, measure
from mlx_distill.prune.kept import kept_sizes
from mlx_distill.prune.scores import Scores
from mlx_distill.prune.sizes import Kept
from mlx_distill.prune.surgery import cut
from mlx_distill.prune.types import TYPES

By = Literal["activation", "magnitude", "random"]
ROWS = rows_of([30] * 4)
DENSE = ["llama", "gemma3_text", "phi3", "qwen3"]


def options(**given: Any) -> Prune:
    return Prune(ratio=0.5, **given)


def measured(loaded: Loaded) -> Statistics:
    return measure(loaded, ROWS, 10**9)


def chosen(loaded: Loaded, seed: int = 0, changes: Any = None, how: Any = None, **sizes: int) -> Kept:
    """What stays with these sizes, and the others as they are."""
    cut_to = sizes_of(loaded.config)._replace(**sizes)
    return choose(loaded, cut_to, options(**(how or {})), measured(loaded), seed=seed, changes=changes)


def scaled(loaded: Loaded, path: str, places: Any, factor: float) -> None:
    array = np.array(arrays_of(loaded)[path])
    array[..., places] *= factor
    loaded.model.load_weights([(path, mx.array(array))], strict=False)


def same(one: Kept, other: Kept) -> bool:
    return all(
        np.array_equal(a, b)
        for mine, others in zip(one, other, strict=True)
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (mine, others)), strict=True)
    )


# --- dead units go, important ones stay


@pytest.mark.parametrize("model_type", DENSE)
def test_dead_inner_channels_go_first(model_type: str) -> None:
    """Dead, because the next matrix does not listen to them or because nothing makes them."""
    loaded = small_model(model_type)
    whole = sizes_of(loaded.config).feed_forward
    zero(loaded, ("down_proj",), "feed_forward", [3, 7], layer=0)
    if model_type != "phi3":  # there rows of two matrices stand in one
        zero(loaded, ("up_proj",), "feed_forward", [0, 5], layer=1)
    kept = chosen(loaded, feed_forward=whole - 2)
    gone = [sorted(set(range(whole)) - set(places.tolist())) for places in kept.feed_forward]
    assert gone[0] == [3, 7]
    assert gone[1] == [0, 5] or model_type == "phi3"
    assert gone[2] != gone[3]  # each layer has its own


@pytest.mark.parametrize("model_type", DENSE)
def test_dead_heads_go_first(model_type: str) -> None:
    """One of the two query heads of each key and value head stays."""
    loaded = small_model(model_type)
    sizes = sizes_of(loaded.config)
    assert (sizes.heads, sizes.kv_heads) == (4, 2)
    head_dim = len(arrays_of(loaded)["model.layers.0.self_attn.o_proj.weight"][0]) // 4
    for layer, dead in enumerate(([0, 3], [1, 2], [0, 2], [1, 3])):
        places = [head * head_dim + n for head in dead for n in range(head_dim)]
        zero(loaded, ("o_proj",), "heads", places, layer=layer)
    hidden = {"hidden": 2 * head_dim} if model_type == "phi3" else {}  # where a head is a share of it
    kept = chosen(loaded, **{"heads": 2, "kv_heads": 2, **hidden})
    assert [places.tolist() for places in kept.heads] == [[1, 2], [0, 3], [1, 3], [0, 2]]
    assert all(places.tolist() == [0, 1] for places in kept.kv_heads)


def test_dead_groups_go_first() -> None:
    loaded = small_model("mistral")
    for layer, dead in enumerate((0, 1, 1, 0)):
        zero(loaded, ("v_proj",), "kv_heads", list(range(8 * dead, 8 * dead + 8)), layer=layer)
    kept = chosen(loaded, heads=2, kv_heads=1)
    assert [places.tolist() for places in kept.kv_heads] == [[1], [0], [0], [1]]
    assert [places.tolist() for places in kept.heads] == [[2, 3], [0, 1], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    "names",
    [
        ("embed_tokens", "o_proj", "down_proj"),
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"),
    ],
)
def test_dead_hidden_channels_go_first(names: tuple[str, ...]) -> None:
    """That nothing writes to, or that nothing reads."""
    loaded = small_model("mistral")
    zero(loaded, names, "hidden", [0, 9, 31])
    whole = sizes_of(loaded.config).hidden
    assert sorted(set(range(whole)) - set(chosen(loaded, hidden=whole - 3).hidden.tolist())) == [0, 9, 31]


def test_what_is_cut_first_changes_nothing_when_it_is_dead() -> None:
    loaded = small_model("mistral")
    zero(loaded, ("down_proj",), "feed_forward", [1, 4, 40])
    zero(loaded, ("embed_tokens", "o_proj", "down_proj"), "hidden", [2, 8])
    zero(loaded, ("o_proj",), "heads", [*range(8), *range(24, 32)])
    whole, statistics = sizes_of(loaded.config), measured(loaded)
    sizes = whole._replace(feed_forward=whole.feed_forward - 3, hidden=whole.hidden - 2, heads=2)
    before = loaded.model(TOKENS)

    def error(by: By) -> float:
        kept = choose(loaded, sizes, options(by=by), statistics, seed=0)
        return float(mx.abs(cut(loaded, kept, statistics.inputs).model(TOKENS) - before).max())

    assert error("activation") < 1e-5 < 1e-3 < error("random")


def test_important_units_stay_to_the_last() -> None:
    loaded = small_model("mistral")
    scaled(loaded, "model.layers.2.mlp.down_proj.weight", 17, 30.0)
    scaled(loaded, "model.layers.3.self_attn.o_proj.weight", slice(16, 24), 30.0)  # head 2
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        scaled(loaded, f"model.layers.1.{name}.weight", 11, 1000.0)
    kept = chosen(loaded, feed_forward=1, heads=1, kv_heads=1, hidden=1)
    assert kept.feed_forward[2].tolist() == [17]
    assert kept.heads[3].tolist() == [2] and kept.kv_heads[3].tolist() == [1]
    assert kept.hidden.tolist() == [11]


# --- experts


def test_experts_that_do_nothing_go_first_and_each_has_its_own_channels() -> None:
    loaded = small_model("qwen3_moe")
    arrays = arrays_of(loaded)
    path = "model.layers.1.mlp.switch_mlp.down_proj.weight"
    down = np.array(arrays[path])
    down[2] = 0
    for expert, dead in ((0, 5), (1, 6), (3, 7)):
        down[expert][:, dead] = 0
    loaded.model.load_weights([(path, mx.array(down))], strict=False)
    whole = sizes_of(loaded.config)
    kept = chosen(loaded, experts=3, feed_forward=whole.feed_forward - 1)
    assert kept.experts[1].tolist() == [0, 1, 3]
    gone = [set(range(whole.feed_forward)) - set(places) for places in kept.feed_forward[1].tolist()]
    assert gone == [{5}, {6}, {7}]
    assert kept_sizes(loaded.config, kept) == whole._replace(experts=3, feed_forward=whole.feed_forward - 1)


def test_experts_that_no_token_goes_to_go_first() -> None:
    """Rows w, 2w, -w, -2w and 0 of a router: two are always positive, and nobody chooses the last."""
    loaded = small_model("qwen3_moe", num_experts=5)
    arrays, changed = arrays_of(loaded), []
    for layer in range(4):
        path = f"model.layers.{layer}.mlp.gate.weight"
        row = np.array(arrays[path])[0]
        changed.append((path, mx.array(np.stack([0 * row, row, 2 * row, -row, -2 * row]))))
    loaded.model.load_weights(changed, strict=False)
    statistics = measured(loaded)
    assert all(routed[0] == 0 for routed in statistics.routed)
    assert all(places.tolist() == [1, 2, 3, 4] for places in chosen(loaded, experts=4).experts)


def test_of_experts_that_give_as_much_the_one_with_more_tokens_stays() -> None:
    loaded = small_model("qwen3_moe")
    statistics = measured(loaded)._replace(
        expert_norms=[np.array([0.5, 0.2, 0.2, 0.2])] * 4, routed=[np.array([0.1, 0.7, 0.4, 0.8])] * 4
    )
    for count, stay in ((1, [0]), (2, [0, 3]), (3, [0, 1, 3])):
        scores = Scores(loaded, "activation", statistics, 0).experts(0)
        assert sorted(np.argsort(-scores)[:count].tolist()) == stay


def test_layers_without_experts_keep_their_width() -> None:
    loaded = small_model("qwen3_moe", mlp_only_layers=[1], intermediate_size=40)
    whole = sizes_of(loaded.config)
    for by in ("activation", "magnitude", "random"):
        kept = chosen(loaded, experts=2, feed_forward=8, how={"by": by})
        assert kept.feed_forward[1].tolist() == list(range(40)) and kept.experts[1].size == 0
        assert kept.feed_forward[0].shape == (2, 8)
        assert kept_sizes(loaded.config, kept) == whole._replace(experts=2, feed_forward=8)


# --- scores are what they are said to be


def squares(array: mx.array) -> np.ndarray:
    return np.array(array).astype(np.float64) ** 2


def test_experts_read_hidden_channels_as_often_as_tokens_go_to_them() -> None:
    loaded = small_model("qwen3_moe", num_hidden_layers=1)
    arrays, statistics = arrays_of(loaded), measured(loaded)
    expected = np.zeros(32)
    for module in statistics.inputs:
        if module.endswith(("norm", "o_proj", "down_proj")):
            continue
        weight, read = squares(arrays[f"{module}.weight"]), statistics.inputs[module]
        share = read * weight.sum(-2)
        if "switch_mlp" in module:
            share = statistics.routed[0] @ share
        expected += share / share.sum()
    assert np.allclose(Scores(loaded, "activation", statistics, 0).hidden(), expected, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_by_activation_are_shares_of_what_the_next_matrix_makes(tied: bool) -> None:
    loaded = small_model("llama", tie_word_embeddings=tied)
    arrays, statistics = arrays_of(loaded), measured(loaded)
    scores = Scores(loaded, "activation", statistics, 0)

    def share(module: str) -> np.ndarray:
        return statistics.inputs[module] * squares(arrays[f"{module}.weight"]).sum(0)

    for layer in range(4):
        path = f"model.layers.{layer}"
        assert np.allclose(scores.feed_forward(layer), share(f"{path}.mlp.down_proj"), rtol=1e-5)
        heads = share(f"{path}.self_attn.o_proj").reshape(4, 8).sum(1)
        assert np.allclose(scores.heads(layer), heads, rtol=1e-5)
        assert not scores.heads(layer, "kv_heads").any()
    readers = [f"model.layers.{n}.self_attn.{name}_proj" for n in range(4) for name in "qkv"]
    readers += [f"model.layers.{n}.mlp.{name}_proj" for n in range(4) for name in ("gate", "up")]
    readers.append("model.embed_tokens" if tied else "lm_head")
    expected = sum(share(module) / share(module).sum() for module in readers)
    assert np.allclose(scores.hidden(), expected, rtol=1e-5)


def test_scores_by_magnitude_are_squares_of_all_weights_of_a_unit() -> None:
    loaded = small_model("mistral")
    arrays = arrays_of(loaded)
    scores = Scores(loaded, "magnitude", measured(loaded), 0)
    part = {
        name: squares(arrays[f"model.layers.1.mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")
    }
    expected = part["gate"].sum(1) + part["up"].sum(1) + part["down"].sum(0)
    assert np.allclose(scores.feed_forward(1), expected, rtol=1e-5)
    part = {name: squares(arrays[f"model.layers.1.self_attn.{name}_proj.weight"]) for name in "qkvo"}
    heads = (part["q"].sum(1) + part["o"].sum(0)).reshape(4, 8).sum(1)
    assert np.allclose(scores.heads(1), heads, rtol=1e-5)
    groups = (part["k"].sum(1) + part["v"].sum(1)).reshape(2, 8).sum(1)
    assert np.allclose(scores.heads(1, "kv_heads"), groups, rtol=1e-5)
    reading = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
    hidden = sum(
        squares(array).sum(0 if any(name in path for name in reading) else 1)
        for path, array in arrays.items()
        if array.ndim == 2
    )
    assert np.allclose(scores.hidden(), hidden, rtol=1e-5)


def test_rows_of_several_matrices_that_stand_in_one_are_told_apart() -> None:
    loaded = small_model("phi3")
    arrays, scores = arrays_of(loaded), Scores(loaded, "magnitude", measured(loaded), 0)
    joint = squares(arrays["model.layers.0.mlp.gate_up_proj.weight"]).sum(1).reshape(2, -1).sum(0)
    down = squares(arrays["model.layers.0.mlp.down_proj.weight"]).sum(0)
    assert np.allclose(scores.feed_forward(0), joint + down, rtol=1e-5)
    joint = squares(arrays["model.layers.0.self_attn.qkv_proj.weight"]).sum(1).reshape(8, 8).sum(1)
    out = squares(arrays["model.layers.0.self_attn.o_proj.weight"]).sum(0).reshape(4, 8).sum(1)
    assert np.allclose(scores.heads(0), joint[:4] + out, rtol=1e-5)
    assert np.allclose(scores.heads(0, "kv_heads"), joint[4:6] + joint[6:], rtol=1e-5)


def test_experts_by_magnitude_are_squares_of_their_own_weights() -> None:
    loaded = small_model("qwen3_moe")
    scores, expected = Scores(loaded, "magnitude", measured(loaded), 0), np.zeros(4)
    for path, array in arrays_of(loaded).items():
        if "layers.2.mlp" in path:
            expected += squares(array).reshape(4, -1).sum(1)
    assert np.allclose(scores.experts(2), expected, rtol=1e-5)
    assert scores.feed_forward(2).shape == (4, sizes_of(loaded.config).feed_forward)


# --- heads that share keys and values


def heads_by(
    scores: list[float], heads: int, kv_heads: int, own: list[float] | None = None
) -> tuple[Any, Any]:
    """Of six query heads in three groups, those that stay when they count so much."""
    loaded = small_model("mistral", num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1)
    path = "model.layers.0.self_attn.o_proj.weight"
    weight = np.ones(arrays_of(loaded)[path].shape) * np.sqrt(np.repeat(scores, 8))
    loaded.model.load_weights([(path, mx.array(weight, dtype=mx.float32))], strict=False)
    statistics = measured(loaded)
    statistics = statistics._replace(inputs={**statistics.inputs, path.removesuffix(".weight"): np.ones(48)})
    sizes = sizes_of(loaded.config)._replace(heads=heads, kv_heads=kv_heads)
    kept = choose(loaded, sizes, options(), statistics, seed=0)
    assert kept_sizes(loaded.config, kept) == sizes
    return kept.heads[0].tolist(), kept.kv_heads[0].tolist()


def test_whole_groups_stay_while_their_size_does() -> None:
    assert heads_by([1, 5, 4, 4, 9, 0], heads=4, kv_heads=2) == ([2, 3, 4, 5], [1, 2])
    assert heads_by([1, 5, 4, 4, 7, 0], heads=2, kv_heads=1) == ([2, 3], [1])


def test_all_groups_stay_with_their_best_heads_while_their_number_does() -> None:
    assert heads_by([1, 5, 4, 3, 0, 9], heads=3, kv_heads=3) == ([1, 2, 5], [0, 1, 2])


def test_groups_count_by_the_heads_that_would_stay_in_them() -> None:
    """The second has most in all, but its best head is the least of the best."""
    assert heads_by([1, 5, 4, 4, 0, 9], heads=2, kv_heads=2) == ([1, 5], [0, 2])
    assert heads_by([5, 5, 5, 5, 5, 5], heads=2, kv_heads=2) == ([0, 2], [0, 1])  # of equals the first


@pytest.mark.parametrize("group", [0, 1])
def test_groups_of_large_keys_and_values_stay_by_magnitude(group: int) -> None:
    loaded = small_model("mistral")
    path = "model.layers.1.self_attn.v_proj.weight"
    values = np.array(arrays_of(loaded)[path])
    values[8 * group : 8 * group + 8] *= 30
    loaded.model.load_weights([(path, mx.array(values))], strict=False)
    kept = chosen(loaded, how={"by": "magnitude"}, heads=2, kv_heads=1)
    assert kept.kv_heads[1].tolist() == [group]
    assert kept.heads[1].tolist() == [2 * group, 2 * group + 1]


# --- layers


def worth(
    layers: int, count: int, layers_by: str, seed: int = 0, changes: Any = None, **known: Any
) -> list[int]:
    loaded = tiny_model(num_hidden_layers=layers)
    statistics = Statistics(1, known.get("influence", np.zeros(layers)), {}, [], [], [])
    sizes = sizes_of(loaded.config)._replace(layers=count)
    kept = choose(loaded, sizes, options(layers_by=layers_by), statistics, seed=seed, changes=changes)
    assert len(kept.heads) == len(kept.feed_forward) == len(kept.experts) == count
    return kept.layers


def test_every_other_layer_is_that_of_distilbert() -> None:
    assert worth(12, 6, "every_other") == [0, 2, 4, 7, 9, 11]
    assert worth(4, 2, "every_other") == [0, 3]
    assert worth(4, 3, "every_other") == [0, 2, 3]
    assert worth(4, 1, "every_other") == [0]
    for count in range(2, 12):
        kept = worth(11, count, "every_other")
        gaps = np.diff(kept)
        assert kept[0] == 0 and kept[-1] == 10 and len(kept) == count
        assert gaps.max() - gaps.min() <= 1


def test_layers_that_turn_least_go_first_even_the_first_or_last() -> None:
    influence = np.array([0.1, 0.5, 0.3, 0.4, 0.2])
    assert worth(5, 4, "influence", influence=influence) == [1, 2, 3, 4]
    assert worth(5, 2, "influence", influence=influence) == [1, 3]


def test_layers_whose_loss_is_least_go_first() -> None:
    changes = np.array([3.0, -0.1, 0.2, 0.1])
    assert worth(4, 2, "loss", changes=changes) == [0, 2]
    with pytest.raises(ValueError, match="need `changes`"):
        worth(4, 2, "loss")


def test_layers_that_stay_keep_what_was_chosen_in_them() -> None:
    loaded = small_model("mistral")
    zero(loaded, ("down_proj",), "feed_forward", [3], layer=2)
    changes = np.array([0.0, 1.0, 2.0, 0.0])
    kept = chosen(loaded, changes=changes, how={"layers_by": "loss"}, layers=2, feed_forward=47)
    assert kept.layers == [1, 2]
    assert 3 not in kept.feed_forward[1] and 3 in kept.feed_forward[0]


@pytest.mark.parametrize("layers_by", ["influence", "every_other", "random"])
def test_layers_stay_in_a_pattern_that_the_type_can_say(layers_by: str) -> None:
    loaded = small_model("gemma3_text", num_hidden_layers=6, sliding_window_pattern=3)
    for count in range(1, 6):
        kept = chosen(loaded, how={"layers_by": layers_by}, layers=count).layers
        assert len(kept) == count and possible_layers(loaded.config, kept)


# --- chance, and every type


def test_chance_repeats_by_its_seed_and_differs_by_layer_and_seed() -> None:
    loaded = small_model("qwen3_moe")
    sizes = {"hidden": 16, "feed_forward": 24, "heads": 2, "kv_heads": 2, "experts": 3, "layers": 3}
    how = {"by": "random", "layers_by": "random"}
    one, again = (chosen(loaded, seed=0, how=how, **sizes) for _ in range(2))
    assert same(one, again)
    others = [chosen(loaded, seed=seed, how=how, **sizes) for seed in range(1, 6)]
    assert not any(same(one, other) for other in others)
    assert len({tuple(kept.layers) for kept in [one, *others]}) > 1
    assert len({tuple(places.ravel().tolist()) for places in one.feed_forward}) == 3
    assert len({tuple(row) for row in one.feed_forward[0].tolist()}) == 3


@pytest.mark.parametrize("by", ["activation", "magnitude", "random"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_choice_can_be_cut(model_type: str, by: By) -> None:
    loaded = small_model(model_type)
    whole, statistics = sizes_of(loaded.config), measured(loaded)
    sizes = whole._replace(hidden=16, feed_forward=whole.feed_forward // 2, heads=2, kv_heads=1, layers=3)
    if whole.experts:
        sizes = sizes._replace(experts=3)
    kept = choose(loaded, sizes, options(by=by), statistics, seed=0)
    assert kept_sizes(loaded.config, kept) == sizes
    arrays = [kept.hidden, *kept.feed_forward, *kept.heads, *kept.kv_heads, *kept.experts, kept.vocabulary]
    assert all(places.dtype == np.int64 for places in arrays)
    assert mx.isfinite(cut(loaded, kept, statistics.inputs).model(TOKENS)).all()
    assert same(choose(loaded, whole, options(by=by), statistics, seed=0), everything(loaded.config))


def test_sizes_that_the_type_cannot_have_are_refused() -> None:
    loaded = small_model("mistral")
    with pytest.raises(RecipeError, match="num_attention_heads"):
        chosen(loaded, heads=3, kv_heads=2)
