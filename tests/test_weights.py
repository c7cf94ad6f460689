"""Weights of rows: what they do to a loss, its gradient and the division, each with the usual mistake."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill.counters import Counters
from mlx_distill.data.alignment import Span, pack
from mlx_distill.data.batch import (
    PLACES_TO,
    Batch,
    Batches,
    Encoded,
    counted_places,
    make_batch,
    place_weights,
)
from mlx_distill.interrupt import Interrupts
from mlx_distill.matching import teacher_layers
from mlx_distill.optimizer import make_optimizer
from mlx_distill.recipe import Recipe
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50
ROWS = rows_of([9, 4, 13, 7])
OBJECTIVES: list[dict[str, Any]] = [
    {"forward_kl": {}, "cross_entropy": {"weight": 0.5}},
    {"reverse_kl": {}, "hidden_mse": {"layers": "uniform"}, "attention_relations": {}},
    {"cross_entropy": {}, "exit_cross_entropy": {"exits": [1]}, "hidden_cosine": {"balanced": True}},
]
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=" ".join)


def weighed(*weights: float, rows: list[Encoded] = ROWS) -> list[Encoded]:
    return [row._replace(weight=weight) for row, weight in zip(rows, weights, strict=True)]


def means(rows: list[Encoded], objective: dict[str, Any], by: str = "weights") -> dict[str, mx.array]:
    """The gradient of a step: sums over the rows, divided by their weights, or else by their count."""
    recipe, model = tiny_recipe(objective=objective, train={"compile": False}), tiny_model(V).model
    layers = teacher_layers(recipe.objective, 2, 2)
    teacher = LiveTeacher(tiny_model(V, seed=9), V, layers)
    built = make_objective(model, [teacher], recipe, V)
    step = make_step(built, make_optimizer(recipe.train), recipe)
    batch = make_batch(rows)
    schedule = {"exit_cross_entropy": mx.array([1.0])} if built.exits else {}
    sums: Any
    sums, _ = step.gradients(batch, [teacher.targets(batch)], schedule)
    whole = float({"weights": batch.weights, "count": batch.counted}[by].sum())
    flat: Any = tree_flatten(sums)
    return {name: value / whole for name, value in flat}


def test_weights_stand_where_labels_are_counted() -> None:
    batch = make_batch([Encoded([5, 6, 7, 8, 1], 2, 0.5), Encoded([5, 9, 1], 1)], pad_to=6)
    assert batch.weights.tolist() == [[0, 0.5, 0.5, 0.5, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.weights.dtype == mx.float32
    places = counted_places(batch)
    assert place_weights(batch, places).tolist() == [[0.5] * 3 + [1] * 2 + [0] * (PLACES_TO - 5)]


@each
def test_a_weight_is_a_number_of_copies(objective: dict[str, Any]) -> None:
    copies = [row for row, times in zip(ROWS, (3, 1, 2, 1), strict=True) for _ in range(times)]
    expected = means(copies, objective)
    assert largest_gap(means(weighed(3, 1, 2, 1), objective), expected) < 2e-5
    assert largest_gap(means(ROWS, objective), expected) > 1e-2
    # The usual mistake, dividing by the number of labels, must not pass.
    assert largest_gap(means(weighed(3, 1, 2, 1), objective, by="count"), expected) > 1e-1


@each
def test_equal_weights_leave_the_gradient_alone(objective: dict[str, Any]) -> None:
    plain = means(ROWS, objective)
    for weight in (0.25, 2.0, 3.7):
        same = weighed(*[weight] * 4)
        assert largest_gap(means(same, objective), plain) < 1e-5
        assert largest_gap(means(same, objective, by="count"), plain) > 0.5 * abs(weight - 1)


def test_the_definition() -> None:
    """Cross entropy in NumPy float64, one row of weight 2 beside one of 1; and its gradient numerically."""
    rows = weighed(2, 1, rows=ROWS[:2])
    model: Any = tiny_model(V).model
    batch = make_batch(rows)

    def loss() -> float:
        total = 0.0
        logits = np.array(model(batch.tokens), dtype=np.float64)[..., :V]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, row in enumerate(rows):
            for t in range(row.start, len(row.tokens)):
                total -= row.weight * log_p[place, t - 1, row.tokens[t]]
        return total / sum(row.weight * (len(row.tokens) - row.start) for row in rows)

    recipe = tiny_recipe(objective={"cross_entropy": {}})
    objective = make_objective(model, [LiveTeacher(tiny_model(V, seed=9), V)], recipe, V)
    places = counted_places(batch)
    targets = [objective_targets(batch)]
    run: Any = nn.value_and_grad(model, objective.sums)
    (total, _), gradients = run(batch.tokens, places, place_weights(batch, places), targets, {})
    whole = float(batch.weights.sum())
    assert float(total) / whole == pytest.approx(loss(), rel=1e-5)

    gradient = dict(tree_flatten(gradients))["model.norm.weight"] / whole
    direction = mx.random.normal(gradient.shape, key=mx.random.key(3))
    before, step = model.model.norm.weight, 1e-2
    around = []
    for sign in (1, -1):
        model.model.norm.weight = before + sign * step * direction
        around.append(loss())
    model.model.norm.weight = before
    slope = (around[0] - around[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3)


def objective_targets(batch: Batch) -> Any:
    return LiveTeacher(tiny_model(V, seed=9), V).targets(batch)


def test_spans_of_another_tokenizer_have_the_weight_of_their_row() -> None:
    ours = [Encoded([3, 4, 5, 6], 1, 2.5), Encoded([3, 7, 8], 1, 0.5)]
    spans = [[Span(1, 3, 1, 2), Span(3, 4, 2, 3)], [Span(1, 3, 1, 3)]]
    theirs = [Encoded([3, 4, 5], 1), Encoded([3, 7, 8], 1)]
    packed = pack(spans, ours, theirs, 16, 16, places_to=4)
    assert packed.weight.tolist() == [2.5, 2.5, 0.5, 0]
    assert packed.weight.dtype == np.float32


class Log:
    """A stage log that keeps the gradient norms and losses it is told."""

    stage, interrupts = "student", Interrupts()

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []

    def steps(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def restore(self, student: Any, optimizer: Any) -> Counters:
        return Counters()

    def metrics(self, counters: Counters, recipe: Recipe, norm: float, rate: float) -> None:
        self.told.append((norm, sum(counters.window_losses.values()) / counters.window_weight))
        counters.close_window()


def trained(rows: list[Encoded]) -> tuple[dict[str, mx.array], list[tuple[float, float]], int]:
    recipe = tiny_recipe(train={"log_every": 1, "micro_batches": 2}, objective={"cross_entropy": {}})
    model, log = tiny_model(V).model, Log()
    given: Any = log
    used = train(model, [LiveTeacher(tiny_model(V, seed=9), V)], Batches(rows, 64, 0), recipe, V, given)
    return dict(tree_flatten(model.parameters())), log.told, used.train_tokens


def test_training_divides_by_the_weights() -> None:
    """All weights 4: the same students, norms and losses, and as many counted tokens, bit for bit nearly."""
    plain, told, tokens = trained(ROWS)
    same, told_same, tokens_same = trained(weighed(4, 4, 4, 4))
    other, told_other, _ = trained(weighed(4, 1, 1, 1))
    assert tokens == tokens_same
    np.testing.assert_allclose(told_same, told, rtol=1e-5)  # a division by the count has norms 4 times that
    assert largest_gap(same, plain) < 1e-4
    assert largest_gap(other, plain) > 1e-3
    assert not np.allclose(told_other, told, rtol=1e-3)


def test_micro_batches_of_unequal_weights_add_up() -> None:
    rows = weighed(5, 1, 0.5, 2)
    objective: dict[str, Any] = OBJECTIVES[0]
    whole = means(rows, objective)
    parts, weights = [means(rows[i : i + 1], objective) for i in range(4)], []
    for row in rows:
        weights.append(row.weight * (len(row.tokens) - row.start))
    summed = [tree_map(lambda g, w=w: g * w, part) for part, w in zip(parts, weights, strict=True)]
    added: Any = {name: sum(part[name] for part in summed) / sum(weights) for name in whole}
    assert largest_gap(added, whole) < 1e-5
    wrong: Any = {name: sum(part[name] for part in parts) / 4 for name in whole}  # the mean of the means
    assert largest_gap(wrong, whole) > 1e-2
