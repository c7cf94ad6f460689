"""Weights set to zero: the right ones, exactly as many, and zero for good while the student is healed."""

import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import rows_of, tiny_model, tiny_recipe

from mlx_distill import optimizer
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, make_batch
from mlx_distill.errors import Fault, RecipeError
from mlx_distill.interrupt import Interrupted
from mlx_distill.metrics import COST
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.options import MODES, Sparsity
from mlx_distill.prune.importance import Statistics, measure
from mlx_distill.prune.sparse import (
    check_pattern,
    is_pruned,
    masked,
    masks_of,
    smallest,
    sparsify,
    sparsity_of,
)
from mlx_distill.run import Run
from mlx_distill.self_teacher import Average
from mlx_distill.stage_log import StageLog
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
ROWS = rows_of([9, 4, 13, 7])
SPARSITIES = [
    Sparsity.model_validate({"share": share, "pattern": pattern, "by": by})
    for by in ("magnitude", "wanda")
    for share, pattern in ((0.5, "unstructured"), (0.3, "unstructured"), (0.5, "2:4"))
]


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in tree_flatten(model.parameters())}


def read(loaded: Loaded) -> Statistics:
    return measure(loaded, ROWS, 1000)


def definition(weight: np.ndarray, squares: np.ndarray, options: Sparsity) -> np.ndarray:
    """Which weights (..., out, in) stay, row by row in float64; `squares` (..., 1, in)."""
    scores = np.abs(weight.astype(np.float64))
    if options.by == "wanda":
        scores = scores * np.sqrt(squares)
    if options.pattern == "2:4":
        rows, count = scores.reshape(-1, 4), 2
    elif options.by == "wanda":
        rows, count = scores.reshape(-1, scores.shape[-1]), round(options.share * scores.shape[-1])
    else:
        rows, count = scores.reshape(1, -1), round(options.share * scores.size)
    stays = np.ones(rows.shape, bool)
    for row, order in enumerate(np.argsort(rows, axis=-1, kind="stable")):
        stays[row, order[:count]] = False
    return stays.reshape(weight.shape)


@pytest.mark.parametrize("options", SPARSITIES, ids=lambda one: f"{one.by}-{one.pattern}-{one.share}")
@pytest.mark.parametrize("shape", [{}, EXPERTS], ids=["dense", "experts"])
def test_what_goes_is_what_the_definition_says(shape: dict[str, Any], options: Sparsity) -> None:
    loaded = tiny_model(V, **shape)
    before, statistics = weights_of(loaded.model), read(loaded)
    assert sparsify(loaded, options, statistics) is loaded
    changed = 0
    for path, weight in weights_of(loaded.model).items():
        if not is_pruned(path, weight.shape):
            assert np.array_equal(weight, before[path]), path
            continue
        stays = definition(before[path], statistics.inputs[path[:-7]][..., None, :], options)
        np.testing.assert_array_equal(weight, np.where(stays, before[path], 0))
        changed += 1
    assert changed == 14


def test_embeddings_norms_heads_and_routers_are_left_alone() -> None:
    loaded = tiny_model(V, tie_word_embeddings=False, **EXPERTS)
    pruned = {path for path, value in weights_of(loaded.model).items() if is_pruned(path, value.shape)}
    names = {path.split(".", 3)[-1] for path in pruned}
    assert names == {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.switch_mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    # The usual mistake, to take every matrix.
    every = {path for path, value in weights_of(loaded.model).items() if value.ndim > 1}
    assert every - pruned == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    }


def test_counts_are_exact_where_weights_are_equal() -> None:
    scores = mx.array([[1.0, 1.0, 0.0, 1.0, 1.0], [2.0, 1.0, 3.0, 1.0, 1.0]])
    for count in range(6):
        assert np.array(smallest(scores, count)).sum(-1).tolist() == [count, count]
    assert np.array(smallest(scores, 3)).tolist() == [
        [True, True, True, False, False],
        [False, True, False, True, True],
    ]
    # The usual mistake, a threshold, takes all of equal ones.
    threshold = mx.sort(scores, -1)[:, 2:3]
    assert np.array(scores <= threshold).sum(-1).tolist() == [5, 3]


def test_wanda_sees_what_a_weight_multiplies() -> None:
    """A large weight on an input that is always nearly zero goes first; by magnitude it stays."""
    loaded = tiny_model(V)
    path, statistics = "model.layers.0.mlp.down_proj", read(loaded)
    quiet = statistics.inputs | {path: np.r_[np.full(32, 1e-12), np.ones(32)]}
    statistics = statistics._replace(inputs=quiet)
    sparsify(loaded, Sparsity(by="wanda"), statistics)
    weight = weights_of(loaded.model)[f"{path}.weight"]
    assert not weight[:, :32].any() and weight[:, 32:].all()
    other = tiny_model(V)
    sparsify(other, Sparsity(by="magnitude"), None)
    assert weights_of(other.model)[f"{path}.weight"][:, :32].any()


def test_an_expert_that_read_nothing_is_compared_by_magnitude() -> None:
    loaded = tiny_model(V, **EXPERTS)
    path, statistics = "model.layers.0.mlp.switch_mlp.up_proj", read(loaded)
    squares = statistics.inputs[path].copy()
    squares[2] = 0
    before = weights_of(loaded.model)[f"{path}.weight"]
    sparsify(loaded, Sparsity(), statistics._replace(inputs=statistics.inputs | {path: squares}))
    after = weights_of(loaded.model)[f"{path}.weight"]
    stays = definition(before[2], np.ones((1, before.shape[-1])), Sparsity())
    np.testing.assert_array_equal(after[2], np.where(stays, before[2], 0))


def test_statistics_of_another_model_are_a_fault() -> None:
    loaded, other = tiny_model(V), tiny_model(V, intermediate_size=80)
    for wrong in (read(other), None):
        with pytest.raises(Fault, match=r"self_attn.q_proj|down_proj.*measure this model first"):
            sparsify(loaded, Sparsity(), wrong)


@pytest.mark.parametrize("options", SPARSITIES, ids=lambda one: f"{one.by}-{one.pattern}-{one.share}")
def test_the_share_that_is_zero(options: Sparsity) -> None:
    """Of each matrix as asked, of the whole model what this leaves of it."""
    loaded = tiny_model(V)
    sparsify(loaded, options, read(loaded))
    masks = masks_of(loaded.model)
    zeros = sum(int((~np.array(mask)).sum()) for mask in masks.values())
    assert len(masks) == 14
    for path, mask in masks.items():
        per = mask.shape[-1] if options.by == "wanda" else mask.size
        assert int((~np.array(mask)).sum()) == round(options.share * per) * (mask.size // per), path
        if options.pattern == "2:4":
            assert (np.array(mask).reshape(-1, 4).sum(-1) == 2).all()
    assert sparsity_of(loaded.model) == zeros / parameter_count(loaded.model)
    assert masks_of(tiny_model(V).model) == {}


def test_zeros_are_counted_exactly() -> None:
    """Whole numbers: in float32 the last of 2**24 + 1 would be lost."""
    model = nn.Linear(4096, 4097, bias=False)
    model.weight = mx.zeros(model.weight.shape)
    model.weight[0, 0] = 1.0
    assert sparsity_of(model) == (4096 * 4097 - 1) / (4096 * 4097)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_quantized_model_has_the_zeros_that_it_stands_for(shape: dict[str, Any], mode: str) -> None:
    loaded = tiny_model(V, **{"hidden_size": 64, **shape, "intermediate_size": 64})
    sparsify(loaded, Sparsity(by="magnitude"), None)
    bits, group_size = MODES.get(mode, (4, 32))
    nn.quantize(loaded.model, group_size, bits, mode=mode)
    zeros = total = 0
    for path, module in loaded.model.named_modules():
        arrays = {key: value for key, value in module.items() if isinstance(value, mx.array)}
        if "scales" in arrays:
            parts: Any = [arrays[key] for key in ("weight", "scales", "biases") if key in arrays]
            grid: Any = {"group_size": module.group_size, "bits": module.bits, "mode": mode}
            arrays = {path: mx.dequantize(*parts, **grid)}
        zeros += sum(int((np.array(value.astype(mx.float32)) == 0).sum()) for value in arrays.values())
        total += sum(value.size for value in arrays.values())
    assert total == parameter_count(loaded.model)
    assert sparsity_of(loaded.model) == zeros / total
    assert zeros / total > 0.3  # every grid of MLX holds zero


def test_widths_that_fours_do_not_divide_are_refused_with_their_layer() -> None:
    config = tiny_model(V, intermediate_size=66).config
    options = Sparsity(pattern="2:4")
    with pytest.raises(RecipeError, match=r"2:4 .* model.layers.0.mlp.down_proj has 66; cut to a multiple"):
        check_pattern(config, options, "student.prune.sparsity")
    check_pattern(config, Sparsity(), "student.prune.sparsity")
    check_pattern(tiny_model(V).config, options, "student.prune.sparsity")


# Healing


def sparse_model() -> Loaded:
    return sparsify(tiny_model(V), Sparsity(by="magnitude"), None)


def zeros_of(model: nn.Module, masks: dict[str, mx.array]) -> int:
    """How many of the weights that are to be zero are."""
    weights = weights_of(model)
    return sum(int((weights[path][~np.array(mask)] == 0).sum()) for path, mask in masks.items())


def healed(
    loaded: Loaded,
    masks: dict[str, mx.array] | None,
    folder: Path,
    averages: tuple[Average, ...] = (),
    **options: Any,
) -> None:
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    given = {"steps": 6, "save_every": 2, "weight_decay": 0.5, **options}
    recipe, interrupted = tiny_recipe(train=given), folder.name == "stopped"
    folder.mkdir(exist_ok=True)
    log = StageLog(Run(folder, Console(io.StringIO())), "student")
    if interrupted and not list(folder.glob("checkpoints/*")):
        log.interrupts.number = 2  # as SIGINT sets it while step 1 runs
    batches = Batches(ROWS, recipe.train.batch_tokens, recipe.seed)
    train(loaded.model, [teacher], batches, recipe, V, log, averages=averages, masks=masks)


@pytest.mark.parametrize(
    "options",
    [{"compile": True}, {"compile": False}, {"micro_batches": 3}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_zeros_stay_zero_and_all_else_moves(options: dict[str, Any], tmp_path: Path) -> None:
    loaded = sparse_model()
    masks, before = masks_of(loaded.model), weights_of(loaded.model)
    count = zeros_of(loaded.model, masks)
    healed(loaded, masks, tmp_path / "whole", **options)
    assert zeros_of(loaded.model, masks) == count
    for path, weight in weights_of(loaded.model).items():
        moved = weight != before[path]
        assert np.array_equal(moved, np.array(masks[path])) if path in masks else moved.mean() > 0.9, path
    assert {k: v.tolist() for k, v in masks_of(loaded.model).items()} == {
        k: v.tolist() for k, v in masks.items()
    }

    # The usual mistake, a sparse model trained like any other.
    forgotten = sparse_model()
    healed(forgotten, None, tmp_path / "forgotten", **options)
    assert zeros_of(forgotten.model, masks) < 0.1 * count


def test_zeros_stay_zero_when_a_run_is_resumed(tmp_path: Path) -> None:
    """The masks are those of the student before training, which a resumed run makes again."""
    whole = sparse_model()
    masks = masks_of(whole.model)
    healed(whole, masks, tmp_path / "whole")
    with pytest.raises(Interrupted):
        healed(sparse_model(), masks, tmp_path / "stopped")
    resumed = sparse_model()
    healed(resumed, masks_of(resumed.model), tmp_path / "stopped")
    one, other = weights_of(whole.model), weights_of(resumed.model)
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert zeros_of(resumed.model, masks) == zeros_of(sparse_model().model, masks)


def test_a_moving_average_keeps_the_zeros_too(tmp_path: Path) -> None:
    loaded = sparse_model()
    masks, average = masks_of(loaded.model), Average(loaded.model, 0.7)
    healed(loaded, masks, tmp_path / "whole", (average,))
    assert zeros_of(average.model, masks) == zeros_of(loaded.model, masks)


def test_the_norm_that_clips_is_that_of_the_weights_that_move() -> None:
    """Masked after clipping, the gradient would be scaled down for what never moves."""
    loaded = sparse_model()
    masks, recipe = masks_of(loaded.model), tiny_recipe(train={"compile": False, "clip": 1e-3})
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    moves = optimizer.make_optimizer(recipe.train)
    moves.init(loaded.model.trainable_parameters())
    step = make_step(make_objective(loaded.model, [teacher], recipe, V), moves, recipe, masks)
    batch = make_batch(ROWS)
    sums, parts = step.gradients(batch, [teacher.targets(batch)], {})
    gradients = {path: np.array(value, np.float64) for path, value in tree_flatten(sums)}
    size, _ = step.update(sums, mx.array(7.0), parts)
    moving = {path: g * np.array(masks[path]) if path in masks else g for path, g in gradients.items()}
    assert float(size) == pytest.approx(np.sqrt(sum((g**2).sum() for g in moving.values())) / 7, rel=1e-4)
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values())) / 7
    assert float(size) < 0.99 * whole


def test_a_gradient_that_is_masked_is_zero_even_where_it_was_none() -> None:
    tree = {"a": {"weight": mx.array([[mx.nan, 1.0], [mx.inf, -2.0]])}, "b": mx.ones(3)}
    found = masked(tree, {"a.weight": mx.array([[False, True], [False, True]])})
    assert found["a"]["weight"].tolist() == [[0.0, 1.0], [0.0, -2.0]]
    assert found["b"].tolist() == [1.0, 1.0, 1.0]
    same = masked(tree_map(mx.ones_like, tree), {})
    assert same["a"]["weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_report_has_a_column_for_it() -> None:
    [metric] = [metric for metric in COST if metric.name == "sparsity"]
    assert metric.text({"sparsity": 0.4637}) == "46.4 %"
