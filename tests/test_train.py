"""Laws of the training step and the loop, each with the usual mistake shown failing."""

import io

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill import checkpoint
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, make_batch
from mlx_distill.errors import Diverged
from mlx_distill.interrupt import Interrupted
from mlx_distill.optimizer import clip, learning_rate, make_optimizer, norm
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.student import add_adapters, checkpoint_layers
from mlx_distill.teacher import LiveTeacher, NoTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50


def sums_of(model, batches, recipe=None, teacher=None):
    """Gradient sums over batches, and the number of counted labels."""
    recipe = recipe or tiny_recipe()
    teacher = teacher or LiveTeacher(tiny_model(V, seed=9), V)
    optimizer = make_optimizer(recipe.train)
    step = make_step(make_objective(model, [teacher], recipe, V), optimizer, recipe)
    total, count = None, 0
    for batch in batches:
        sums, _ = step.gradients(batch, [teacher.targets(batch)], {})
        total = sums if total is None else tree_map(mx.add, total, sums)
        count += int(batch.counted.sum())
    return dict(tree_flatten(total)), count


def means_of(model, batches, **kwargs):
    sums, count = sums_of(model, batches, **kwargs)
    return {name: value / count for name, value in sums.items()}


def test_micro_batches_leave_the_gradient_alone():
    """8 rows at once = 4 times 2 rows, with rows of very different length."""
    rows = rows_of([25, 20, 18, 22, 1, 1, 1, 1])
    model = tiny_model(V).model
    whole = means_of(model, [make_batch(rows)])
    parts = [make_batch(rows[i : i + 2]) for i in range(0, 8, 2)]
    assert largest_gap(means_of(model, parts), whole) < 1e-5

    # The usual mistake, the mean of the means, must not pass.
    each = [means_of(model, [part]) for part in parts]
    wrong = {name: sum(part[name] for part in each) / len(each) for name in whole}
    assert largest_gap(wrong, whole) > 1e-2


def test_padding_leaves_the_gradient_alone():
    rows = rows_of([9, 4, 13])
    model = tiny_model(V).model
    narrow, wide = make_batch(rows, pad_to=16), make_batch(rows, pad_to=64)
    plain = means_of(model, [narrow])
    assert largest_gap(means_of(model, [wide]), plain) < 1e-5

    # The usual mistake, one padding label a row, must not pass.
    after = mx.concatenate([mx.zeros((3, 1), mx.bool_), wide.counted[:, :-1]], axis=1)
    wrong = wide._replace(counted=wide.counted | after)
    assert largest_gap(means_of(model, [wrong]), plain) > 1e-3


def test_row_order_leaves_the_gradient_alone():
    rows = rows_of([9, 4, 13, 7])
    model = tiny_model(V).model
    one, other = means_of(model, [make_batch(rows)]), means_of(model, [make_batch(rows[::-1])])
    assert largest_gap(one, other) < 1e-5


def test_compiled_and_plain_steps_give_the_same_numbers():
    rows = rows_of([9, 4, 13, 7])
    results = []
    for compiled in (True, False):
        model, recipe = tiny_model(V), tiny_recipe(train={"compile": compiled})
        train_on(model, rows, recipe)
        results.append(dict(tree_flatten(model.model.parameters())))
    assert largest_gap(*results) < 1e-4


def test_padded_rows_of_the_vocabulary_are_cut_before_the_softmax():
    """A student whose matrix has rows beyond the tokenizer's size learns the same."""
    rows = [make_batch(rows_of([9, 4, 13]))]
    plain, padded = tiny_model(V).model, tiny_model(V + 14).model
    name = "model.embed_tokens.weight"
    weights = dict(tree_flatten(plain.parameters()))
    weights[name] = mx.concatenate([weights[name], 5 * mx.ones((14, 32))])
    padded.load_weights(list(weights.items()))
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    expected, _ = sums_of(plain, rows, teacher=teacher)
    found, _ = sums_of(padded, rows, teacher=teacher)
    assert largest_gap({name: found[name][:V]}, {name: expected[name]}) < 1e-5
    assert float(mx.abs(found[name][V:]).max()) == 0


def open_log(folder, stage="student"):
    folder.mkdir(exist_ok=True)
    return StageLog(Run(folder, Console(io.StringIO())), stage)


def train_on(model, rows, recipe, log=None):
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    batches = Batches(rows, recipe.train.batch_tokens, recipe.seed)
    return train(model.model, [teacher], batches, recipe, V, log or SilentLog())


class SilentLog:
    """A stage log that keeps nothing."""

    stage = "student"

    def __init__(self):
        from mlx_distill.interrupt import Interrupts

        self.interrupts = Interrupts()

    def steps(self, first, last):
        return range(first, last + 1)

    def restore(self, student, optimizer):
        from mlx_distill.counters import Counters

        return Counters()

    def metrics(self, counters, recipe, norm, rate):
        counters.close_window()

    def save(self, student, optimizer, counters):
        pass

    def say(self, line):
        pass

    def event(self, step, values, rows):
        pass


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_ends_with_the_same_bits(method, tmp_path, monkeypatch):
    rows = rows_of([9, 4, 13, 7, 30, 2])
    student = (
        {"method": method, "rank": 4, "dropout": 0.1, "model": "x", "shape": None} if method == "lora" else {}
    )
    recipe = tiny_recipe(student=student, train={"steps": 6, "save_every": 2})

    def fresh():
        model = tiny_model(V)
        if method == "lora":
            add_adapters(model.model, recipe.student, seed=0)
        return model

    whole = fresh()
    train_on(whole, rows, recipe, open_log(tmp_path / "whole"))

    stopped = fresh()
    log = open_log(tmp_path / "stopped")
    log.interrupts.number = 2  # as SIGINT sets it while step 1 runs
    with pytest.raises(Interrupted) as info:
        train_on(stopped, rows, recipe, log)
    assert info.value.exit_code == 130
    resumed = fresh()
    train_on(resumed, rows, recipe, open_log(tmp_path / "stopped"))

    one, other = (dict(tree_flatten(m.model.parameters())) for m in (whole, resumed))
    assert all(mx.array_equal(one[name], other[name]) for name in one)

    # A run that forgets its optimizer ends elsewhere.
    load = checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda folder, student, _: load(folder, student, make_optimizer(recipe.train))
    )
    forgetful, log = fresh(), open_log(tmp_path / "forgetful")
    log.interrupts.number = 2
    with pytest.raises(Interrupted):
        train_on(forgetful, rows, recipe, log)
    train_on(forgetful, rows, recipe, open_log(tmp_path / "forgetful"))
    assert largest_gap(dict(tree_flatten(forgetful.model.parameters())), one) > 1e-4


def test_only_adapters_move_and_a_compiled_step_sees_them(tmp_path):
    recipe = tiny_recipe(student={"method": "lora", "rank": 4, "model": "x", "shape": None})
    model = tiny_model(V)
    add_adapters(model.model, recipe.student, seed=0)
    before = {name: mx.array(value) for name, value in tree_flatten(model.model.parameters())}
    train_on(model, rows_of([9, 4, 13]), recipe)
    moved = {
        name
        for name, value in tree_flatten(model.model.parameters())
        if not mx.array_equal(value, before[name])
    }
    assert moved == {name for name, _ in tree_flatten(model.model.trainable_parameters())}
    assert any(name.endswith("lora_b") for name in moved)


def test_gradient_checkpointing_changes_no_number_and_no_class():
    plain, saving, teacher = tiny_model(V), tiny_model(V), LiveTeacher(tiny_model(V, seed=9), V)
    layer_class = type(plain.model.layers[0])
    call = layer_class.__call__
    checkpoint_layers(saving.model)
    rows = [make_batch(rows_of([9, 4, 13]))]
    assert (
        largest_gap(
            means_of(saving.model, rows, teacher=teacher), means_of(plain.model, rows, teacher=teacher)
        )
        < 1e-5
    )
    assert layer_class.__call__ is call  # mlx-lm's own way replaces it, for the teacher too
    assert type(plain.model.layers[0]) is layer_class
    assert isinstance(saving.model.layers[0], layer_class)
    assert saving.model.layers[0].__class__ is not layer_class


def test_gradient_checkpointing_keeps_one_layer_at_a_time():
    """What MLX's counter says of a step through 16 layers."""

    def peak(checkpoint) -> int:
        student, recipe = tiny_model(V, num_hidden_layers=16).model, tiny_recipe(train={"compile": False})
        checkpoint(student)
        objective = make_objective(student, [], tiny_recipe(objective={"cross_entropy": {}}), V)
        optimizer = make_optimizer(recipe.train)
        optimizer.init(student.trainable_parameters())
        functions, batch = make_step(objective, optimizer, recipe), make_batch(rows_of([120] * 32))
        mx.eval(student.state, optimizer.state, batch[:4])
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradients, parts = functions.gradients(batch, [NoTeacher().targets(batch)], {})
        functions.update(gradients, batch.weights.sum(), parts)
        mx.eval(student.state, optimizer.state)
        return mx.get_peak_memory() - before

    def as_mlx_does(student) -> None:
        for layer in student.layers:
            plain = type(layer)

            def call(self, *args, plain=plain, **kwargs):
                def run(parameters, *args, **kwargs):
                    self.update(parameters)
                    return plain.__call__(self, *args, **kwargs)

                return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)

            layer.__class__ = type("Early", (plain,), {"__call__": call})

    whole = peak(lambda student: None)
    assert peak(checkpoint_layers) < 0.4 * whole
    assert peak(as_mlx_does) > 0.6 * whole  # the usual way


def test_divergence_stops_the_run_with_what_to_change():
    recipe = tiny_recipe(train={"learning_rate": 1e30, "steps": 20, "clip": 0.0})
    with pytest.raises(Diverged, match=r"train\.learning_rate"):
        train_on(tiny_model(V), rows_of([9, 4, 13]), recipe)


def test_the_loss_falls():
    rows = rows_of([9, 4, 13, 7])
    model, teacher = tiny_model(V), LiveTeacher(tiny_model(V, seed=9), V)
    from mlx_distill.evaluate.fidelity import fidelity

    before = fidelity(model.model, rows, V, teacher=teacher)[0]
    train_on(model, rows, tiny_recipe(train={"steps": 60}, objective={"forward_kl": {}}))
    after = fidelity(model.model, rows, V, teacher=teacher)[0]
    assert after["kl"] < 0.2 * before["kl"]


def test_the_teacher_never_moves():
    loaded = tiny_model(V, seed=9)
    before = {name: np.array(value) for name, value in tree_flatten(loaded.model.parameters())}
    teacher = LiveTeacher(loaded, V)
    recipe = tiny_recipe()
    train(tiny_model(V).model, [teacher], Batches(rows_of([9, 4]), 128, 0), recipe, V, SilentLog())
    after = dict(tree_flatten(loaded.model.parameters()))
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    assert not tree_flatten(loaded.model.trainable_parameters())


def test_schedule_rises_to_the_peak_and_ends_where_it_should():
    options = tiny_recipe(
        train={"steps": 100, "warmup": 9, "learning_rate": 1.0, "final_learning_rate": 0.1}
    ).train
    rate = learning_rate(options)
    rates = [float(rate(mx.array(step))) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)  # the first update is not wasted on a rate of zero
    assert rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_clipping_scales_the_whole_tree():
    tree = {"a": mx.full((30, 4), 2.0), "b": mx.full((5,), -1.0)}
    size = (30 * 4 * 4 + 5) ** 0.5
    clipped, before = clip(tree, 1.0)
    assert float(before) == pytest.approx(size, rel=1e-6)
    assert float(norm(clipped)) == pytest.approx(1.0, rel=1e-5)
    untouched, _ = clip(tree, 0)
    assert mx.array_equal(untouched["a"], tree["a"])


def test_weight_decay_acts_on_matrices_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    options = tiny_recipe(train={"weight_decay": 0.5, "learning_rate": 0.1, "warmup": 0}).train
    optimizer = make_optimizer(options)
    optimizer.init(model.trainable_parameters())
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    optimizer.update(model, tree_map(mx.zeros_like, model.trainable_parameters()))
    for name, value in tree_flatten(model.parameters()):
        shrunk = before[name] * (1 - 0.1 * 0.5) if value.ndim > 1 else before[name]
        np.testing.assert_allclose(np.array(value), shrunk, rtol=1e-6)
