"""A student as its own teacher: nothing is copied that need not be, and averages are averages."""

import gc
import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import rows_of, tiny_model, tiny_recipe

from mlx_distill import checkpoint
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches
from mlx_distill.interrupt import Interrupted
from mlx_distill.models import Loaded
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.self_teacher import Average, twin, without_adapters
from mlx_distill.stage_log import StageLog
from mlx_distill.student import add_adapters
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import train

V = 50
TOKENS = mx.array([[3, 7, 9, 4, 30, 2, 11]])
LOADED = {"model": "x", "shape": None}
LORA = {**LOADED, "method": "lora", "rank": 4, "dropout": 0.1}
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # divisible by the groups of quantization


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def bits(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flat(model.parameters()).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def adapted(
    method: str, quantized: bool = False, seed: int = 0
) -> tuple[Loaded, mx.array, dict[str, mx.array]]:
    """A model with adapters that do something; its logits without them, and its arrays before."""
    loaded = tiny_model(V, seed, **WIDE)
    if quantized:
        nn.quantize(loaded.model, group_size=32, bits=4)
    mx.eval(loaded.model.parameters())
    plain, arrays = loaded.model(TOKENS), flat(loaded.model.parameters())
    mx.eval(plain)
    how = tiny_recipe(student={"method": method, "rank": 4, **LOADED}).student
    add_adapters(loaded.model, how, seed)
    moved = [
        (name, mx.random.normal(value.shape, key=mx.random.key(i)) * 0.1)
        for i, (name, value) in enumerate(flat(loaded.model.trainable_parameters()).items())
        if name.endswith("lora_b")
    ]
    loaded.model.load_weights(moved, strict=False)
    mx.eval(loaded.model.parameters())
    return loaded, plain, arrays


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_model_under_adapters_is_the_untouched_one(method: str, quantized: bool) -> None:
    """The same logits to the last bit, and the very same arrays under their old names."""
    loaded, plain, arrays = adapted(method, quantized)
    base = without_adapters(loaded.model)
    assert mx.array_equal(base(TOKENS), plain)
    assert not mx.array_equal(loaded.model(TOKENS), plain)
    found = flat(base.parameters())
    assert found.keys() == arrays.keys()
    assert all(found[name] is arrays[name] for name in arrays)
    # What mlx-lm itself takes off again is the same model.
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_model_like(quantized).modules()]


def tiny_model_like(quantized: bool) -> nn.Module:
    model = tiny_model(V, **WIDE).model
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
    return model


def test_it_takes_no_memory() -> None:
    loaded, *_ = adapted("lora")
    size = sum(value.nbytes for value in flat(loaded.model.parameters()).values())
    before = mx.get_active_memory()
    base = without_adapters(loaded.model)
    mx.eval(base.parameters())
    assert mx.get_active_memory() - before < 0.01 * size
    # A second copy, the usual way to have such a teacher, takes as much again.
    copied = {name: value + 0 for name, value in flat(base.parameters()).items()}
    mx.eval(copied)
    assert mx.get_active_memory() - before > 0.9 * size


def test_it_shares_and_stays_while_the_student_trains() -> None:
    """A compiled step hands back every array of the student; those that did not move are not doubled."""
    loaded, plain, _ = adapted("lora")
    teacher = LiveTeacher(loaded._replace(model=without_adapters(loaded.model)), V)
    mx.eval(loaded.model.parameters())
    before, size = bits(loaded.model), sum(v.nbytes for v in flat(teacher.model.parameters()).values())
    gc.collect()
    start = mx.get_active_memory()
    train_on(loaded, teacher, tiny_recipe(student=LORA, teacher={"model": "student"}))
    gc.collect()
    assert mx.get_active_memory() - start < 0.1 * size
    assert mx.array_equal(teacher.model(TOKENS), plain)
    moved = {name for name, value in bits(loaded.model).items() if not np.array_equal(value, before[name])}
    assert moved == flat(loaded.model.trainable_parameters()).keys()


def test_a_twin_goes_its_own_way() -> None:
    one = tiny_model(V).model
    other = twin(one)
    before = bits(one)
    assert all(
        a is b
        for a, b in zip(flat(one.parameters()).values(), flat(other.parameters()).values(), strict=True)
    )
    other.update({"model": {"embed_tokens": {"weight": mx.zeros((V, 32))}}})
    other.freeze()
    other.eval()
    assert same(bits(one), before)
    assert one.training and one.trainable_parameters() != {}
    assert flat(one.trainable_parameters()).keys() == before.keys()


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mixtral", "mamba"])
def test_twins_of_other_architectures_compute_the_same(name: str) -> None:
    from mlx_lm.utils import _get_classes
    from tiny_configs import tiny_config

    config = tiny_config(name)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    tokens = TOKENS % config["vocab_size"]
    assert mx.array_equal(twin(model)(tokens), model(tokens))


class Quiet:
    """A stage log that keeps nothing."""

    stage = "student"

    def __init__(self) -> None:
        from mlx_distill.interrupt import Interrupts

        self.interrupts = Interrupts()

    def steps(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def restore(self, *_: Any) -> Any:
        from mlx_distill.counters import Counters

        return Counters()

    def metrics(self, counters: Any, *_: Any) -> None:
        counters.close_window()


def train_on(
    loaded: Loaded, teacher: LiveTeacher, how: Recipe, *averages: Average, log: Any = None
) -> LiveTeacher:
    batches = Batches(rows_of([9, 4, 13, 7, 30, 2]), how.train.batch_tokens, how.seed)
    train(loaded.model, [teacher], batches, how, V, log or Quiet(), averages=averages)
    return teacher


def test_the_average_is_one_of_all_the_students_before() -> None:
    """w_t = d w_(t-1) + (1 - d) s_t, in NumPy float64, over the weights that the student had."""
    decay, loaded = 0.9, tiny_model(V)
    average = Average(loaded.model, decay)
    expected = {name: np.array(value, dtype=np.float64) for name, value in average.weights.items()}
    for step in range(5):
        moved = {
            name: value + mx.random.normal(value.shape, key=mx.random.key(step))
            for name, value in flat(loaded.model.parameters()).items()
        }
        loaded.model.load_weights(list(moved.items()))
        average.follow(loaded.model)
        mx.eval(average.weights)
        expected = {
            n: decay * w + (1 - decay) * np.array(moved[n], dtype=np.float64) for n, w in expected.items()
        }
    for name, value in average.weights.items():
        np.testing.assert_allclose(np.array(value), expected[name], atol=1e-5)
    # An average that keeps what it should take (the roles of d and 1 - d) is far away.
    assert max(np.abs(np.array(moved[n]) - expected[n]).max() for n in expected) > 1


def test_the_loop_averages_the_weights_that_each_step_makes() -> None:
    """One step of training, by hand: the average holds d of the start and 1 - d of the end."""
    loaded = tiny_model(V)
    how = tiny_recipe(teacher={"model": "student", "ema": 0.75}, student=LOADED, train={"steps": 1})
    average, before = Average(loaded.model, 0.75), bits(loaded.model)
    train_on(loaded, LiveTeacher(loaded._replace(model=average.model), V), how, average)
    after = bits(loaded.model)
    assert not same(after, before)
    for name, value in average.weights.items():
        np.testing.assert_allclose(np.array(value), 0.75 * before[name] + 0.25 * after[name], atol=1e-6)


def test_of_adapters_only_the_adapters_are_averaged() -> None:
    loaded, *_ = adapted("lora")
    average = Average(loaded.model, 0.9)
    assert average.weights.keys() == flat(loaded.model.trainable_parameters()).keys()
    assert all("lora_" in name for name in average.weights)
    assert mx.array_equal(average.model(TOKENS), loaded.model(TOKENS))
    ours, theirs = flat(loaded.model.parameters()), flat(average.model.parameters())
    assert all(ours[name] is theirs[name] for name in ours)


def test_a_compiled_teacher_sees_its_average_move() -> None:
    """Compiled once; weights baked into the trace would leave the teacher where it was."""
    loaded = tiny_model(V)
    average = Average(loaded.model, 0.5)
    teacher = LiveTeacher(loaded._replace(model=average.model), V)
    first = np.array(teacher.logits(TOKENS))
    loaded.model.load_weights([(name, -value) for name, value in flat(loaded.model.parameters()).items()])
    average.follow(loaded.model)  # all weights are 0 now
    assert np.abs(first).max() > 0.1
    assert np.abs(np.array(teacher.logits(TOKENS))).max() < 1e-6


def open_log(folder: Path) -> StageLog:
    folder.mkdir(exist_ok=True)
    return StageLog(Run(folder, Console(io.StringIO())), "student")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_goes_on_with_its_average(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = tiny_recipe(
        teacher={"model": "student", "ema": 0.5},
        train={"steps": 6, "save_every": 2},
        objective={"forward_kl": {"temperature": 2.0}, "cross_entropy": {"weight": 0.5}},
        student=LORA if method == "lora" else LOADED,
    )

    def go(folder: str, stop: bool = False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        loaded = tiny_model(V)
        if method == "lora":
            add_adapters(loaded.model, how.student, seed=0)
        average = Average(loaded.model, 0.5)
        teacher = LiveTeacher(loaded._replace(model=average.model), V)
        log = open_log(tmp_path / folder)
        if stop:
            log.interrupts.number = 2
            with pytest.raises(Interrupted):
                train_on(loaded, teacher, how, average, log=log)
        else:
            train_on(loaded, teacher, how, average, log=log)
        return bits(loaded.model), {name: np.array(value) for name, value in average.weights.items()}

    whole = go("whole")
    go("stopped", stop=True)
    resumed = go("stopped")
    assert same(whole[0], resumed[0]) and same(whole[1], resumed[1])

    # A run whose teacher starts anew from the student's weights ends elsewhere.
    go("forgetful", stop=True)
    load = checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda folder, student, optimizer, *_: load(folder, student, optimizer)
    )
    assert not same(whole[0], go("forgetful")[0])


def test_averages_are_part_of_what_a_checkpoint_answers_for(tmp_path: Path) -> None:
    from mlx_distill.optimizer import make_optimizer

    model = tiny_model(V).model
    optimizer = make_optimizer(tiny_recipe().train)
    optimizer.init(model.trainable_parameters())
    folder = tmp_path / "step-000002"
    checkpoint.save(folder, model, optimizer, {"step": 2}, Average(model, 0.5))
    assert checkpoint.damage(folder) is None
    (folder / "average-0.safetensors").write_bytes(b"other")
    assert checkpoint.damage(folder) is not None
