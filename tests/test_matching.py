"""Layers against layers: which pairs, through which projections, and what is left of these afterwards."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train import SilentLog, open_log
from tiny import SHAPE, largest_gap, rows_of, tiny_model, tiny_recipe, tiny_tokenizer

from mlx_distill import models
from mlx_distill.checkpoint import MANIFEST, write_manifest
from mlx_distill.data.batch import Batches, counted_places, make_batch, place_weights
from mlx_distill.interrupt import Interrupted
from mlx_distill.losses.features import hidden_mse
from mlx_distill.matching import HUNG_ON, Compared, Matching, pairs_of, strip, teacher_layers
from mlx_distill.models.taps import tapped
from mlx_distill.options import Shape
from mlx_distill.recipe import Recipe
from mlx_distill.student import add_adapters
from mlx_distill.teacher import Layers, LiveTeacher
from mlx_distill.train import make_objective, train

V = 50
ROWS = rows_of([9, 4, 13, 7, 30, 2])
MSE = {"forward_kl": {}, "hidden_mse": {"layers": "uniform", "weight": 0.5}}


def recipe_of(objective: dict[str, Any], **sections: Any) -> Recipe:
    return tiny_recipe(objective=objective, **sections)


def wide_teacher(seed: int = 9, layers: Layers | None = None) -> LiveTeacher:
    return LiveTeacher(tiny_model(V, seed=seed, hidden_size=48, num_hidden_layers=4), V, layers)


def teacher_of(recipe: Recipe) -> LiveTeacher:
    return wide_teacher(layers=teacher_layers(recipe.objective, 2, 4))


def test_pairs_by_loss_and_what_a_teacher_has_to_show() -> None:
    terms = recipe_of(
        {
            "forward_kl": {},
            "hidden_mse": {"layers": "uniform"},
            "hidden_cosine": {"layers": [[1, 3]]},
            "attention_transfer": {"layers": "every_other"},
        }
    ).objective
    assert pairs_of(terms, 2, 4) == {
        "hidden_mse": [(0, 0), (1, 2), (2, 4)],
        "hidden_cosine": [(1, 3)],
        "attention_transfer": [(1, 2), (2, 4)],  # no embeddings, which have no attention
    }
    assert teacher_layers(terms, 2, 4) == Layers({0, 2, 3, 4}, {2, 4})
    assert teacher_layers(recipe_of({"forward_kl": {}}).objective, 2, 4) == Layers(set(), set())
    with pytest.raises(ValueError, match="layers every_other: the student has 2 layers and the teacher 9"):
        pairs_of(terms, 2, 9)


def matching_of(objective: dict[str, Any], *teachers: Any, seed: int = 0) -> tuple[Any, Matching]:
    student = tiny_model(V).model
    compared = [Compared(i, 1 / len(teachers), teacher) for i, teacher in enumerate(teachers)]
    return student, Matching(recipe_of(objective).objective, student, compared, seed)


def hung(student: Any) -> dict[str, mx.array]:
    arrays: Any = tree_flatten(student.parameters())
    return {name: array for name, array in arrays if name.startswith(f"{HUNG_ON}.")}


def test_projections_hang_where_widths_differ_and_nowhere_else() -> None:
    plain, wide = tiny_model(V, seed=9).model, wide_teacher().model
    student, _ = matching_of({"forward_kl": {}, "hidden_mse": {}}, plain)
    assert HUNG_ON not in student
    objective = {"hidden_mse": {"layers": [[0, 0], [2, 2]]}, "hidden_cosine": {}, "attention_transfer": {}}
    student, matching = matching_of({"forward_kl": {}, **objective}, plain, wide)
    shapes = {name: array.shape for name, array in hung(student).items()}
    assert shapes == {  # of the second teacher alone; attention needs none
        f"{HUNG_ON}.hidden_mse 1.pairs.0.weight": (48, 32),
        f"{HUNG_ON}.hidden_mse 1.pairs.1.weight": (48, 32),
        f"{HUNG_ON}.hidden_cosine 1.pairs.0.weight": (48, 32),
    }
    assert hung(student).keys() <= dict(tree_flatten(student.trainable_parameters())).keys()
    assert matching.student_layers == Layers({0, 2}, {2})

    again, _ = matching_of({"forward_kl": {}, **objective}, plain, wide)
    other, _ = matching_of({"forward_kl": {}, **objective}, plain, wide, seed=1)
    assert all(mx.array_equal(array, hung(student)[name]) for name, array in hung(again).items())
    assert largest_gap(hung(other), hung(student)) > 0.1

    before = student(mx.array([[1, 2]]))
    strip(student)
    assert HUNG_ON not in student
    assert hung(student) == {}
    strip(student)  # twice, as after a student that had none
    assert mx.array_equal(student(mx.array([[1, 2]])), before)
    assert (
        dict(tree_flatten(student.parameters())).keys()
        == dict(tree_flatten(tiny_model(V).model.parameters())).keys()
    )


def test_values_are_means_over_pairs_and_shares_of_teachers() -> None:
    """Two teachers of unlike depth and width, in NumPy."""
    terms = {"forward_kl": {}, "hidden_mse": {"layers": "uniform"}}
    recipe = recipe_of(terms, teacher={"weight": 3.0, "others": [{"model": "x"}]})
    student = tiny_model(V).model
    shallow = LiveTeacher(tiny_model(V, seed=8), V, teacher_layers(recipe.objective, 2, 2))
    teachers = [teacher_of(recipe), shallow]
    matching = make_objective(student, teachers, recipe, V).matching
    assert matching is not None
    batch = make_batch(ROWS[:3])
    places = counted_places(batch)
    with tapped(student, hidden=[0, 1, 2]) as seen:
        student(batch.tokens)
    found = matching.values(seen, places, [teacher.targets(batch) for teacher in teachers])
    assert found.keys() == {"hidden_mse"}

    expected = np.zeros(batch.tokens.shape)
    for teacher, share, layers in ((teachers[0], 0.75, (0, 2, 4)), (shallow, 0.25, (0, 1, 2))):
        with tapped(teacher.model, hidden=layers) as theirs:
            teacher.model(batch.tokens)
        for i, layer in enumerate(layers):
            one = np.array(seen.hidden[i], dtype=np.float64)
            if share == 0.75:
                one = one @ np.array(hung(student)[f"{HUNG_ON}.hidden_mse 0.pairs.{i}.weight"]).T
            expected += share / 3 * ((one - np.array(theirs.hidden[layer])) ** 2).mean(-1)
    counted = np.array(batch.counted)
    values = np.array(found["hidden_mse"])[0]
    np.testing.assert_allclose(values[: counted.sum()], expected[counted], rtol=1e-5)


def fresh(recipe: Recipe) -> Any:
    student = tiny_model(V)
    if recipe.student.method == "lora":
        add_adapters(student.model, recipe.student, seed=0)
    return student


def train_on(student: Any, recipe: Recipe, log: Any = None) -> None:
    batches = Batches(ROWS, recipe.train.batch_tokens, recipe.seed)
    log = log or SilentLog()
    train(student.model, [teacher_of(recipe)], batches, recipe, V, log)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_projections_train_and_survive_a_stop_with_the_same_bits(method: str, tmp_path: Path) -> None:
    student = {"method": "lora", "rank": 4, "model": "x", "shape": None} if method == "lora" else {}
    recipe = recipe_of(MSE, student=student, train={"steps": 4, "save_every": 2})
    whole = fresh(recipe)
    train_on(whole, recipe, open_log(tmp_path / "whole"))
    assert HUNG_ON not in whole.model

    log = open_log(tmp_path / "stopped")
    log.interrupts.number = 2  # as SIGINT sets it while step 1 runs
    with pytest.raises(Interrupted):
        train_on(fresh(recipe), recipe, log)
    [saved] = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    weights: Any = mx.load(str(saved / "weights.safetensors"))
    kept = {name: weights[name] for name in weights if name.startswith(HUNG_ON)}
    first = fresh(recipe)
    make_objective(first.model, [teacher_of(recipe)], recipe, V)
    assert len(kept) == 3
    assert 1e-4 < largest_gap(kept, hung(first.model)) < 1  # one step from where they began

    resumed = fresh(recipe)
    train_on(resumed, recipe, open_log(tmp_path / "stopped"))
    one, other = (dict(tree_flatten(loaded.model.parameters())) for loaded in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]) for name in one)

    # A resumed run that draws its projections anew ends elsewhere.
    mx.save_safetensors(str(saved / "weights.safetensors"), {**weights, **hung(first.model)})
    write_manifest(saved, json.loads((saved / MANIFEST).read_text(encoding="utf-8"))["counters"])
    forgetful = fresh(recipe)
    for folder in set(saved.parent.iterdir()) - {saved}:
        folder.rename(tmp_path / folder.name)
    train_on(forgetful, recipe, open_log(tmp_path / "stopped"))
    assert largest_gap(dict(tree_flatten(forgetful.model.parameters())), one) > 1e-5


def test_the_student_comes_nearer_to_the_teacher() -> None:
    """Its own layers move, not only the projections in front of the loss."""
    recipe = recipe_of(
        {"cross_entropy": {"weight": 1e-3}, "hidden_mse": {}}, train={"steps": 60, "log_every": 1}
    )
    distances: list[float] = []

    class Log(SilentLog):
        def metrics(self, counters: Any, recipe: Recipe, norm: float, rate: float) -> None:
            distances.append(counters.window_losses["hidden_mse"] / counters.window_tokens)
            counters.close_window()

    student = tiny_model(V)
    before = dict(tree_flatten(student.model.parameters()))
    train_on(student, recipe, Log())
    assert distances[-1] < 0.3 * distances[0]
    after = dict(tree_flatten(student.model.parameters()))
    name = "model.layers.1.mlp.down_proj.weight"
    assert largest_gap({name: after[name]}, {name: before[name]}) > 1e-2


def test_a_trained_student_is_saved_as_an_ordinary_model(tmp_path: Path) -> None:
    import mlx_lm

    tokenizer = tiny_tokenizer()
    student = models.build(Shape(**SHAPE), tokenizer, 0)
    size = len(tokenizer)
    recipe = recipe_of(MSE, train={"steps": 2})
    shown = teacher_layers(recipe.objective, 2, 4)
    teacher = LiveTeacher(tiny_model(size, seed=9, hidden_size=48, num_hidden_layers=4), size, shown)
    log: Any = SilentLog()
    train(student.model, [teacher], Batches(ROWS, 256, 0), recipe, size, log)
    models.save(tmp_path / "student", student)
    weights: Any = mx.load(str(tmp_path / "student" / "model.safetensors"))
    assert not [name for name in weights if HUNG_ON in name]
    loaded, *_ = mlx_lm.load(str(tmp_path / "student"))
    tokens = mx.array([[3, 1, 4]])
    assert mx.array_equal(loaded(tokens), student.model(tokens))

    # With its projections it would be no model that mlx_lm opens.
    make_objective(student.model, [teacher], recipe, size)
    models.save(tmp_path / "hung", student)
    with pytest.raises(ValueError, match="projections"):
        mlx_lm.load(str(tmp_path / "hung"))


def test_a_teacher_that_is_not_compared_costs_no_share() -> None:
    """Shares are of the teachers that show layers: alone, one has all of it whatever its weight."""
    recipe = recipe_of({"forward_kl": {}, "hidden_mse": {}}, teacher={"weight": 5.0})
    student, batch = tiny_model(V).model, make_batch(ROWS[:2])
    teacher = teacher_of(recipe)
    objective = make_objective(student, [teacher], recipe, V)
    _, parts = objective.sums(
        batch.tokens,
        counted_places(batch),
        place_weights(batch, counted_places(batch)),
        [teacher.targets(batch)],
        {},
    )
    with tapped(student, hidden=[2]) as ours:
        student(batch.tokens)
    with tapped(teacher.model, hidden=[4]) as theirs:
        teacher.model(batch.tokens)
    projected = student[HUNG_ON]["hidden_mse 0"].pairs[0](ours.hidden[2])
    expected = mx.where(batch.counted, hidden_mse(projected, theirs.hidden[4]), 0).sum()
    assert float(parts["hidden_mse"]) == pytest.approx(float(expected), rel=1e-5)
