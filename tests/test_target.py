"""From a target to sizes: laws over many random models and targets, and every refusal in one line."""

import random
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import yaml
from tiny import tiny_recipe

from mlx_distill import recipe as recipes
from mlx_distill.errors import RecipeError
from mlx_distill.options import Prune
from mlx_distill.prune.axes import (
    best_layers,
    check_sizes,
    count_of,
    fits,
    opens,
    resized,
    shapes_of,
    sizes_of,
)
from mlx_distill.prune.ladders import ladders_of
from mlx_distill.prune.sizes import Sizes
from mlx_distill.prune.target import rounds_of

WIDTH = ["hidden", "feed_forward", "heads"]
TYPES = ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"]


def prune(**options: Any) -> Prune:
    return Prune.model_validate(options)


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A small model of a type."""
    config = {
        "model_type": kind,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 500,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    if kind == "qwen3_moe":
        config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    if kind == "gemma3_text":
        config |= {"sliding_window_pattern": 3}
    return config | changes


def drawn(kind: str, draw: random.Random) -> dict[str, Any]:
    """A random model of a type, from tiny to large."""
    kv, group = draw.choice([(1, 4), (2, 1), (2, 6), (4, 2), (4, 7), (8, 1), (8, 4)])
    head_dim = draw.choice([8, 16, 32, 64, 128])
    hidden = kv * group * head_dim if kind == "qwen2" else draw.choice([32, 48, 96, 128, 512, 896, 2048])
    changes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": draw.choice([40, 64, 384, 1000, 4864, 11008]),
        "num_hidden_layers": draw.choice([3, 4, 6]),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "vocab_size": draw.choice([64, 512, 32000]),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if kind == "qwen3_moe":
        experts = draw.choice([4, 16, 60])
        changes |= {"num_experts": experts, "num_experts_per_tok": draw.choice([1, 2, 4])}
        changes |= {"moe_intermediate_size": draw.choice([32, 96, 768])}
        if draw.random() < 0.3:  # some layers of another kind
            changes |= {"mlp_only_layers": [0, 2]}
    return config_of(kind, **changes)


def axes_for(config: dict[str, Any], draw: random.Random) -> list[str]:
    axes = ["layers", *WIDTH] + (["experts"] if "num_experts" in config else [])
    chosen = [axis for axis in axes if draw.random() < 0.7] or ["feed_forward"]
    if config["model_type"] == "qwen2" and len({"hidden", "heads"} & set(chosen)) == 1:
        chosen = [axis for axis in axes if axis in {*chosen, "hidden", "heads"}]
    return chosen


@pytest.mark.parametrize("kind", TYPES)
def test_a_target_is_never_exceeded_and_used_up(kind: str) -> None:
    draw, reached, refused = random.Random(kind), 0, []
    for _ in range(25):
        config = drawn(kind, draw)
        axes, whole, own = axes_for(config, draw), count_of(config), sizes_of(config)
        most = int(draw.uniform(0.1, 0.95) * whole)
        options = prune(parameters=most, axes=axes)
        try:
            [sizes] = rounds_of(config, options)
        except RecipeError as error:
            refused.append(str(error))
            continue
        reached += 1
        check_sizes(config, sizes, "sizes")
        assert largest_count(config, sizes) <= most
        assert all(now <= before for now, before in zip(sizes, own, strict=True))
        unnamed = {"layers", "hidden", "feed_forward", "heads", "experts"} - {*axes}
        assert all(getattr(sizes, axis) == getattr(own, axis) for axis in unnamed)
        # No axis could be a single unit larger, whichever layers that has stay.
        for ladder in ladders_of(config, axes, ""):
            axis = next(iter(ladder[0]))
            larger = [rung for rung in ladder if rung[axis] > getattr(sizes, axis)]
            larger = [rung for rung in larger if opens(config, sizes._replace(**rung))]
            assert not larger or largest_count(config, sizes._replace(**larger[0])) > most
        assert rounds_of(config, options) == [sizes]  # always the same
    assert reached > 10
    assert all("the smallest" in line or "do not divide" in line for line in refused)


def largest_count(config: dict[str, Any], sizes: Sizes) -> int:
    """Weights of a model with these sizes, of whichever kind the layers are that stay."""
    dense = config.get("mlp_only_layers", [])
    worth = [float(layer in dense) for layer in range(config["num_hidden_layers"])]
    choices = [best_layers(config, [sign * one for one in worth], sizes.layers) for sign in (-1, 1)]
    return max(count_of(resized(config, sizes, layers)) for layers in choices)


def test_whichever_layers_stay_the_target_holds() -> None:
    """Two layers without experts are far larger here, and importance may keep both."""
    config = config_of("qwen3_moe", mlp_only_layers=[4, 5], intermediate_size=4096)
    most = count_of(config) // 2
    [sizes] = rounds_of(config, prune(parameters=most, axes=["layers"]))
    one_more = sizes._replace(layers=sizes.layers + 1)
    assert largest_count(config, sizes) <= most < largest_count(config, one_more)
    assert count_of(resized(config, one_more, range(one_more.layers))) < most  # the first ones are small


@pytest.mark.parametrize("kind", TYPES)
def test_large_models_use_almost_all_of_a_target(kind: str) -> None:
    config = config_of(
        kind,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        **({"moe_intermediate_size": 1024} if kind == "qwen3_moe" else {}),
    )
    for ratio in (0.9, 0.75, 0.5, 0.33, 0.25):
        [sizes] = rounds_of(config, prune(ratio=ratio))
        assert 0.95 * ratio < count_of(resized(config, sizes)) / count_of(config) <= ratio
        shares = [getattr(sizes, axis) / getattr(sizes_of(config), axis) for axis in WIDTH]
        assert max(shares) - min(shares) < 0.25  # one common share, as far as heads come in groups


@pytest.mark.parametrize("kind", TYPES)
def test_rounds_fall_on_every_axis_in_even_proportions(kind: str) -> None:
    draw, seen, refused = random.Random(kind), 0, []
    for _ in range(15):
        config, count = drawn(kind, draw), draw.choice([2, 3, 4])
        options = {"axes": axes_for(config, draw), "rounds": count, "heal": 5}
        try:
            rounds = rounds_of(config, prune(ratio=draw.uniform(0.2, 0.8), **options))
        except RecipeError as error:
            refused.append(str(error))
            continue
        seen += 1
        assert len(rounds) == count
        steps = [sizes_of(config), *rounds]
        for before, after in pairwise(steps):
            assert before != after
            assert all(now <= was for now, was in zip(after, before, strict=True))
            assert fits(resized(config, before), after)  # what is left can be cut again
        counts = [largest_count(config, sizes) for sizes in steps]
        for number, found in enumerate(counts):
            assert found <= counts[0] * (counts[-1] / counts[0]) ** (number / count) + 1
    assert seen > 4
    assert all("the smallest" in line or "nothing to cut in round" in line for line in refused)


def test_coarse_rungs_leave_little_over() -> None:
    """Two heads as wide as half the model: rather both, and narrower layers, than one and a third unused."""
    config = config_of("qwen2", num_attention_heads=2, num_key_value_heads=2, head_dim=None)
    [sizes] = rounds_of(config, prune(ratio=0.7))
    assert (sizes.hidden, sizes.heads) == (256, 2) and sizes.feed_forward < 512
    half = sizes._replace(hidden=128, heads=1, kv_heads=1, feed_forward=512)
    assert count_of(resized(config, half)) < 0.9 * 0.7 * count_of(config)


def test_even_proportions_on_a_large_model() -> None:
    config = config_of("llama", hidden_size=2048, intermediate_size=8192, head_dim=64)
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    rounds = rounds_of(config, prune(ratio=0.25, rounds=2, heal=5))
    counts = [count_of(resized(config, sizes)) / count_of(config) for sizes in rounds]
    assert counts == pytest.approx([0.5, 0.25], rel=0.02)


@pytest.mark.parametrize(
    ("target", "most"),
    [
        ({"ratio": 0.5}, lambda whole: whole / 2),
        ({"parameters": 1_000_000}, lambda whole: 1_000_000),
        ({"gib": 0.002}, lambda whole: 0.002 * 2**30 / 2),
    ],
)
def test_the_three_targets(target: dict[str, Any], most: Any) -> None:
    config = config_of("llama")
    [sizes] = rounds_of(config, prune(**target), bytes_each=2.0)
    limit = most(count_of(config))
    assert 0.85 * limit < count_of(resized(config, sizes)) <= limit


def test_units_are_those_of_quantization() -> None:
    """Widths stay multiples of 32 where they are; of a larger group, heads too, where that is asked."""
    draw = random.Random(0)
    for _ in range(40):
        config = config_of("llama", head_dim=draw.choice([16, 32]), hidden_size=draw.choice([256, 512]))
        ratio = draw.uniform(0.3, 0.9)
        [sizes] = rounds_of(config, prune(ratio=ratio))
        assert sizes.hidden % 32 == 0 and sizes.feed_forward % 32 == 0
        [sizes] = rounds_of(config, prune(ratio=ratio), group_size=64)
        shapes = shapes_of(resized(config, sizes))
        assert all(shape[-1] % 64 == 0 for shape in shapes.values() if len(shape) > 1)
    # A width that the group does not divide is cut in its own units.
    [sizes] = rounds_of(config_of("llama", intermediate_size=40), prune(ratio=0.5), group_size=64)
    assert sizes.feed_forward % 8 == 0


def test_heads_go_with_their_key_and_value_head_or_in_each_group() -> None:
    """Whichever is finer: 8 groups of 4 lose whole groups, 2 groups of 6 a head each."""
    many, few = (
        config_of("llama", num_attention_heads=heads, num_key_value_heads=kv)
        for heads, kv in ((32, 8), (12, 2))
    )
    for ratio in (0.9, 0.7, 0.5):
        [sizes] = rounds_of(many, prune(ratio=ratio, axes=["heads", "feed_forward"]))
        assert sizes.heads == 4 * sizes.kv_heads
        [sizes] = rounds_of(few, prune(ratio=ratio, axes=["heads", "feed_forward"]))
        assert sizes.kv_heads == 2 and sizes.heads % 2 == 0


def test_tied_axes_are_cut_together() -> None:
    """A head of Qwen 2 has hidden_size / num_attention_heads channels, and keeps them."""
    config = config_of("qwen2", head_dim=None)
    [sizes] = rounds_of(config, prune(ratio=0.5))
    assert sizes.hidden == 32 * sizes.heads < 256
    for axes, other in ((["hidden"], "heads"), (["heads", "feed_forward"], "hidden")):
        with pytest.raises(RecipeError, match=f"cut together with `{other}`; add it"):
            rounds_of(config, prune(ratio=0.5, axes=axes))


def test_sizes_are_taken_as_they_are_given() -> None:
    config = config_of("qwen3_moe")
    given = {"num_hidden_layers": 3, "hidden_size": 200, "intermediate_size": 10, "num_experts": 5}
    own = sizes_of(config)
    assert rounds_of(config, prune(sizes=given)) == [
        own._replace(layers=3, hidden=200, feed_forward=10, experts=5)
    ]
    for heads, kv in ((6, 3), (2, 1), (8, 4)):  # key and value heads go in whole groups
        asked = prune(sizes={"num_attention_heads": heads, "hidden_size": 64})
        assert rounds_of(config, asked) == [own._replace(hidden=64, heads=heads, kv_heads=kv)]
    few = config_of("llama", num_attention_heads=12, num_key_value_heads=2)
    asked = prune(sizes={"num_attention_heads": 8})
    assert rounds_of(few, asked) == [sizes_of(few)._replace(heads=8, kv_heads=2)]


def test_rounds_towards_given_sizes() -> None:
    config = config_of("llama")
    given = {"num_hidden_layers": 2, "hidden_size": 72, "num_attention_heads": 2}
    rounds = rounds_of(config, prune(sizes=given, rounds=3, heal=9))
    assert rounds[-1] == sizes_of(config)._replace(layers=2, hidden=72, heads=2, kv_heads=1)
    steps = [sizes_of(config), *rounds]
    for before, after in pairwise(steps):
        assert before != after and all(now <= was for now, was in zip(after, before, strict=True))
        assert after.feed_forward == 512
    tied = config_of("qwen2", head_dim=None)
    given = {"num_attention_heads": 2, "hidden_size": 64}
    rounds = rounds_of(tied, prune(sizes=given, rounds=2, heal=9))
    assert all(sizes.hidden == 32 * sizes.heads for sizes in rounds)


def test_no_target_cuts_nothing() -> None:
    config = config_of("llama")
    for options in (prune(vocabulary=True), prune(sparsity={}), prune(dense=True)):
        assert rounds_of(config, options) == [sizes_of(config)]
    enough = prune(vocabulary=True, parameters=10**9)  # a smaller vocabulary was all it took
    assert rounds_of(config, enough) == [sizes_of(config)]


MOE = config_of("qwen3_moe")
REFUSED = {
    "too little": (
        "llama",
        {"ratio": 0.001},
        r"ratio` 0.001: at most 3,670 of 3,670,272 weights .* smallest .* has",
    ),
    "embedding": (
        "llama",
        {"parameters": 500},
        r"for its 500 tokens .*; set `vocabulary: true`, or raise it",
    ),
    "hidden": (
        "llama",
        {"ratio": 0.03, "axes": ["layers"], "vocabulary": True},
        r"for its 500 tokens \(layers 1\); add `hidden` to `axes`, or raise it",
    ),
    "another axis": ("llama", {"ratio": 0.2, "axes": ["heads"]}, r"add `layers` to `axes`, add `hidden`"),
    "too much": (
        "llama",
        {"gib": 3.0},
        r"gib` 3: \S+ weights may stay, and the model has 3,670,272; lower it",
    ),
    "no experts": ("llama", {"ratio": 0.5, "axes": ["experts"]}, "the model has no experts; drop `experts`"),
    "experts given": ("llama", {"sizes": {"num_experts": 2}}, r"num_experts` 2: the model has no experts"),
    "active experts": ("qwen3_moe", {"sizes": {"num_experts": 1}}, "keep at least 2"),
    "the same": ("llama", {"sizes": {"hidden_size": 256}}, "are those that the model has; lower one"),
    "larger": ("llama", {"sizes": {"hidden_size": 300}}, "hidden_size 300 is not within 1 to 256"),
    "heads": ("llama", {"sizes": {"num_attention_heads": 3}}, "what divides is 2, 4, 6, 8$"),
    "tied": ("qwen2", {"sizes": {"hidden_size": 128}}, "8 heads need hidden_size 256"),
    "rounds": (
        "llama",
        {"ratio": 0.9, "axes": ["layers"], "rounds": 5, "heal": 1},
        "rounds` 5: there is nothing to cut in round 2; use fewer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_number_and_the_next_move(case: str) -> None:
    kind, options, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as info:
        rounds_of(config_of(kind), prune(**options))
    assert "\n" not in str(info.value) and str(info.value).startswith("`student.prune")


def test_what_the_smallest_has_is_true() -> None:
    """The count that a refusal names can be asked for, and one weight less cannot."""
    config = config_of("gemma3_text")
    with pytest.raises(RecipeError) as info:
        rounds_of(config, prune(ratio=0.001))
    smallest = int(str(info.value).split("allow has ")[1].split()[0].replace(",", "").rstrip(";"))
    [sizes] = rounds_of(config, prune(parameters=smallest))
    shapes = shapes_of(resized(config, sizes)).values()
    assert sum(prod(shape) for shape in shapes) == smallest
    with pytest.raises(RecipeError):
        rounds_of(config, prune(parameters=smallest - 1))


CUT = {"shape": None, "prune": {"ratio": 0.5}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": None, "objective": {"cross_entropy": {}}}, "there is none; name a `teacher`, or"),
        ({"teacher": {"model": "student"}}, "name `student.prune.model`"),
        (
            {
                "student": {"prune": {"ratio": 0.5, "model": "x"}},
                "teacher": {"model": "student"},
                "data": {"prompts": {"source": "pocket", "rows": 2}},
            },
            "`teacher.model` student answers `data.prompts` before `student.prune`",
        ),
        (
            {
                "student": {"prune": {"ratio": 0.5, "model": "x"}},
                "teacher": {"model": "student"},
                "data": {"prompts": {"source": "pocket", "rows": 2}},
                "generate": {
                    "endpoint": {"url": "http://x/v1", "model": "m"},
                    "filters": {"perplexity": 9.0},
                },
            },
            "`teacher.model` student judges the answers of the server before",
        ),
        (
            {"teacher": {"others": [{"model": "student", "source": "cache", "top_k": 4}]}},
            "`teacher.others.0.source` cache: .* use live",
        ),
        ({"train": {"curriculum": {"by": "student_loss"}}}, "curriculum.by` student_loss is measured before"),
        (
            {
                "student": {"prune": {"ratio": 0.5, "rounds": 2, "heal": 3}},
                "teacher": {"others": [{"model": "student"}]},
            },
            "`teacher.others.0.model` student is what the last of 2 `student.prune.rounds` leaves",
        ),
        (
            {"student": {"prune": {"ratio": 0.5, "layers_by": "loss"}}},
            "layers_by` loss chooses layers, and none",
        ),
        (
            {"student": {"prune": {"sizes": {"num_hidden_layers": 2}, "by": "random"}}},
            "by` random chooses channels, heads and experts, and none are cut",
        ),
        ({"student": {"prune": {"vocabulary": True, "by": "random"}}}, "and none are cut"),
    ],
)
def test_contradictions_of_a_recipe(sections: dict[str, Any], message: str) -> None:
    student = {**CUT, **sections.pop("student", {})}
    with pytest.raises(RecipeError, match=message) as info:
        tiny_recipe(student=student, **sections)
    assert "\n" not in str(info.value)


def test_what_is_allowed_with_pruning() -> None:
    """The pruned student as a teacher among others, or alone where something else is cut."""
    own = {"model": "x", "ratio": 0.5, "axes": ["layers"], "layers_by": "loss"}
    tiny_recipe(student={**CUT, "prune": own}, teacher={"model": "student"})
    tiny_recipe(student=CUT, teacher={"others": [{"model": "student"}]})
    tiny_recipe(student={**CUT, "prune": {"sparsity": {}}}, train={"gradient_checkpointing": True})
    tiny_recipe(student={**CUT, "prune": own}, teacher=None, objective={"cross_entropy": {}})


@pytest.mark.parametrize(
    "cut", [{"sizes": {"num_hidden_layers": 1}}, {"vocabulary": True}, {"gib": 0.5, "axes": ["layers"]}]
)
def test_a_resolved_recipe_loads_again(cut: dict[str, Any]) -> None:
    """With every default written out, such as `axes`, which some of these have no use for."""
    recipe = tiny_recipe(student={**CUT, "prune": cut})
    assert recipes.decode(yaml.safe_load(recipes.dump(recipe))) == recipe
