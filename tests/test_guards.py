"""Steps without finite numbers are as if they had not been; spikes and the end of memory are told."""

import contextlib
import io
import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import workshop
from mlx.utils import tree_flatten, tree_map
from tiny import rows_of, tiny_model, tiny_recipe
from workshop import command

from mlx_distill import guards, pipeline
from mlx_distill import train as training
from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.crashes import cause_of
from mlx_distill.data.batch import Batches, make_batch
from mlx_distill.diagnosis import Seen, not_finite, sizes_of_layers
from mlx_distill.errors import Diverged, RecipeError, Stopped
from mlx_distill.guards import ENOUGH, TOLD, Guard, limit_memory, resumable_if_mlx_stops, spike_limit
from mlx_distill.interrupt import Interrupted
from mlx_distill.optimizer import make_optimizer
from mlx_distill.recipe import determining, fingerprint
from mlx_distill.resident import KEPT
from mlx_distill.run import Run
from mlx_distill.self_teacher import Average
from mlx_distill.stage_log import StageLog
from mlx_distill.teacher import LiveTeacher, NoTeacher
from mlx_distill.train import make_objective, make_step, train

V = 50
ROWS = rows_of([9, 4, 13, 7, 30, 2])


class Some:
    """Batches of which some have infinite losses, and others are left out."""

    def __init__(self, batches, bad=(), left_out=()):
        self.batches, self.bad = batches, set(bad)
        self.kept = [i for i in range(100) if i not in set(left_out)]

    def __getitem__(self, index):
        batch = self.batches[self.kept[index]]
        if self.kept[index] in self.bad:
            return batch._replace(weights=mx.where(batch.counted, mx.array(math.inf), mx.array(0.0)))
        return batch


class Shorter(StageLog):
    """A stage log that ends some steps before the last one, which the schedule knows."""

    def __init__(self, run, missing):
        super().__init__(run, "student")
        self.missing = missing

    def steps(self, first, last):
        return super().steps(first, last - self.missing)


def open_log(folder, missing=0):
    folder.mkdir(exist_ok=True)
    return Shorter(Run(folder, Console(io.StringIO())), missing)


def said(log):
    return log.run.console._stream.getvalue()


def events(log):
    """Lines of metrics.jsonl; any NaN, which is no JSON, fails the test."""
    path = log.run.folder / "metrics.jsonl"

    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


class Ran:
    """A training run with all that it leaves in memory; `forgiven` is what it may end by."""

    def __init__(self, recipe, batches, log, monkeypatch, averaged=False, masked=False, forgiven=()):
        self.model = tiny_model(V)
        self.averages = [Average(self.model.model, 0.9)] if averaged else []
        teacher = tiny_model(V, seed=9)
        if averaged:
            teacher = self.model._replace(model=self.averages[0].model)
        masks = {}
        if masked:
            name = "model.layers.0.mlp.up_proj.weight"
            weights = dict(tree_flatten(self.model.model.parameters()))
            masks = {name: mx.arange(weights[name].size).reshape(weights[name].shape) % 3 > 0}
            self.model.model.load_weights([(name, mx.where(masks[name], weights[name], 0))], strict=False)
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(
                training, "make_optimizer", lambda options: made.append(make_optimizer(options)) or made[0]
            )
            with contextlib.suppress(*forgiven):
                train(
                    self.model.model,
                    [LiveTeacher(teacher, V)],
                    batches,
                    recipe,
                    V,
                    log,
                    averages=self.averages,
                    masks=masks,
                    origins=[f"rows.jsonl:{i + 1}" for i in range(len(ROWS))],
                )
        self.optimizer = made[0]

    def arrays(self):
        tree = {
            "weights": self.model.model.parameters(),
            "optimizer": self.optimizer.state,
            "averages": [one.weights for one in self.averages],
        }
        return dict(tree_flatten(tree))


def same(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("compiled", "micro_batches", "averaged", "masked"),
    [(True, 1, False, False), (False, 1, False, True), (True, 2, True, True), (False, 2, True, False)],
)
def test_a_skipped_step_is_as_if_it_had_not_been(
    compiled, micro_batches, averaged, masked, tmp_path, monkeypatch
):
    """Weights, moments, schedule and moving averages: bit for bit those of a run without its batches."""
    options = {"compile": compiled, "micro_batches": micro_batches, "steps": 6, "warmup": 3}
    options["skip_nonfinite"] = 9
    recipe = tiny_recipe(train=options | {"batch_tokens": 64})
    batches = Batches(ROWS, 64, recipe.seed)
    # Of step 3, which skips with all of its micro-batches, only the last one is bad.
    of_step = range(2 * micro_batches, 3 * micro_batches)
    kind = {"averaged": averaged, "masked": masked, "forgiven": [Diverged]}

    def ran(name, some, missing=0):
        return Ran(recipe, some, open_log(tmp_path / name, missing), monkeypatch, **kind).arrays()

    skipped = ran("skipped", Some(batches, bad=of_step[-1:]))
    without = ran("without", Some(batches, left_out=of_step), missing=1)
    assert same(skipped, without)
    assert not not_finite(skipped)

    # The usual mistake: whether the gradient is finite is asked once the optimizer has taken it.
    with monkeypatch.context() as patch:
        patch.setattr(training, "keep_unless", lambda *_: None)
        wrong = ran("wrong", Some(batches, bad=of_step[-1:]))
    assert not_finite({name: array for name, array in wrong.items() if name.endswith(".m")})
    if micro_batches == 1 and compiled:
        # Another: a gradient of zeros in its place, by which the moments and the weights decay.
        with monkeypatch.context() as patch:
            patch.setattr(training, "keep_unless", lambda *_: None)
            clip = training.clip

            def zeroed(tree, largest):
                clipped, size = clip(tree, largest)
                fine = mx.isfinite(size)
                return tree_map(lambda g: mx.where(fine, g, 0), clipped), size

            patch.setattr(training, "clip", zeroed)
            wrong = ran("zeroed", Some(batches, bad=of_step[-1:]))
        assert not not_finite(wrong) and not same(wrong, without)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("gradient", "loss", "taken"),
    [
        (1.0, 1.0, True),
        (math.nan, 1.0, False),
        (math.inf, 1.0, False),
        (-math.inf, math.nan, False),
        (1e30, 1.0, False),  # finite, but its square is not: its norm would scale all others to zero
        (1.0, math.nan, False),
        (1.0, math.inf, False),
    ],
)
def test_gradient_and_losses_must_be_finite(compiled, gradient, loss, taken):
    recipe = tiny_recipe(train={"compile": compiled}, objective={"cross_entropy": {}})
    student = tiny_model(V).model
    optimizer = make_optimizer(recipe.train)
    optimizer.init(student.trainable_parameters())
    step = make_step(make_objective(student, [], recipe, V), optimizer, recipe)
    sums = tree_map(mx.ones_like, student.trainable_parameters())
    step.update(sums, mx.array(3.0), {"cross_entropy": mx.array(1.0)})  # so that there are moments
    before = {name: mx.array(x) for name, x in tree_flatten([student.parameters(), optimizer.state])}
    sums["model"]["layers"][1]["mlp"]["up_proj"]["weight"][3, 4] = gradient
    _, found = step.update(sums, mx.array(3.0), {"cross_entropy": mx.array(loss)})
    after = dict(tree_flatten([student.parameters(), optimizer.state]))
    assert bool(found) is taken
    assert same(before, after) is not taken


def test_it_is_told_with_the_rows_and_counted(tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"steps": 5, "log_every": 1, "batch_tokens": 64})
    batches = Batches(ROWS, 64, recipe.seed)
    log = open_log(tmp_path / "run")
    Ran(recipe, Some(batches, bad=[2]), log, monkeypatch)
    rows = [f"rows.jsonl:{i + 1}" for i in dict.fromkeys(batches[2].rows)]
    tokens = int(batches[2].counted.sum())
    line = (
        f"student: step 3 is skipped: cross_entropy, forward_kl and the gradient are not finite; "
        f"{tokens} tokens of {', '.join(rows)}"
    )
    assert line in said(log).splitlines()
    assert {"step": 3, "stage": "student", "skipped": 1, "rows": rows} in events(log)
    steps = {line["step"]: line for line in events(log) if "tokens" in line}
    assert "skipped" not in steps[2]
    # Nothing was learned at step 3, so there is no loss to tell, and no token to count.
    assert "loss" not in steps[3] and "gradient_norm" not in steps[3]
    assert steps[3]["tokens"] == steps[2]["tokens"]
    assert steps[5]["skipped"] == 1 and steps[5]["loss"] > 0


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_in_a_row_end_the_run_with_a_diagnosis(most, tmp_path, monkeypatch):
    options = {"steps": 9, "skip_nonfinite": most, "save_every": 1, "batch_tokens": 64}
    recipe = tiny_recipe(train=options)
    log = open_log(tmp_path / "run")
    batches = Some(Batches(ROWS, 64, recipe.seed), bad=range(3, 100))
    with pytest.raises(Diverged) as caught:
        Ran(recipe, batches, log, monkeypatch)
    assert caught.value.exit_code == 70
    lines = str(caught.value).splitlines()
    steps = "a step" if most == 0 else "3 steps in a row"
    assert lines[0] == (
        f"student: training diverged: {steps}, up to step {4 + most}, had no finite numbers and changed "
        f"nothing (`train.skip_nonfinite` {most})"
    )
    assert lines[1].startswith("where: ") and "rows.jsonl:" in lines[1]
    assert "cross_entropy, forward_kl and the gradient are not finite" in lines[2]
    assert "gradients of " in lines[2] and "layers.0" in lines[2] and "learning rate was" in lines[2]
    assert "`train.learning_rate` (now 0.01)" in lines[3]
    # What was good stays, and nothing was saved behind it.
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    weights = mx.load(str(tmp_path / "run" / "checkpoints" / "step-000003" / "weights.safetensors"))
    assert not not_finite(weights)


def test_steps_that_are_not_in_a_row_do_not_end_it(tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"steps": 8, "skip_nonfinite": 1, "batch_tokens": 64})
    batches = Some(Batches(ROWS, 64, recipe.seed), bad=[0, 2, 4, 6])
    log = open_log(tmp_path / "run")
    ran = Ran(recipe, batches, log, monkeypatch)
    assert not not_finite(ran.arrays())
    assert said(log).count("is skipped") == 4


def test_it_says_when_it_cannot_be_the_learning_rate(tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"steps": 8, "skip_nonfinite": 1, "batch_tokens": 64})
    batches = Some(Batches(ROWS, 64, recipe.seed), bad=range(9))
    with pytest.raises(Diverged, match="no step was taken before, so it is not the learning rate"):
        Ran(recipe, batches, open_log(tmp_path / "run"), monkeypatch)


def test_it_says_when_only_the_teacher_is_not_finite(tmp_path, monkeypatch):
    class Broken(LiveTeacher):
        def targets(self, batch):
            found = super().targets(batch)
            return found._replace(hidden={name: x * math.nan for name, x in (found.hidden or {}).items()})

    recipe = tiny_recipe(train={"skip_nonfinite": 0}, objective={"hidden_mse": {}, "cross_entropy": {}})
    student, teacher = tiny_model(V).model, tiny_model(V, seed=9)
    from mlx_distill.matching import teacher_layers

    broken = Broken(teacher, V, teacher_layers(recipe.objective, 2, 2))
    with pytest.raises(Diverged) as caught:
        train(student, [broken], Batches(ROWS, 64, 0), recipe, V, open_log(tmp_path / "run"))
    assert "hidden_mse and the gradient are not finite" in str(caught.value)
    assert "only what the teacher is asked for is not finite" in str(caught.value)


def test_weights_that_overflow_are_not_saved(tmp_path, monkeypatch):
    """The gradient is finite, and the step that it makes is not."""
    options = {"steps": 4, "learning_rate": 1e38, "weight_decay": 10.0, "save_every": 1}
    recipe = tiny_recipe(train=options)
    with pytest.raises(Diverged, match="weights are not finite after step 1.*they are not saved"):
        Ran(recipe, Batches(ROWS, 256, 0), open_log(tmp_path / "run"), monkeypatch)
    assert not list((tmp_path / "run").glob("checkpoints/*"))

    # Nor is the student that a run ends with.
    with pytest.raises(Diverged, match="weights are not finite after step 1"):
        Ran(
            tiny_recipe(train=options | {"steps": 1, "save_every": 0}),
            Batches(ROWS, 256, 0),
            open_log(tmp_path / "other"),
            monkeypatch,
        )


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_run_that_skips_is_resumed_to_the_same_bits(stop_at, tmp_path, monkeypatch):
    """Stopped right behind a skipped step, or between two of them."""
    options = {"steps": 8, "skip_nonfinite": 2, "batch_tokens": 64, "log_every": 1, "spike": 0.5}
    recipe = tiny_recipe(train=options)
    batches = Some(Batches(ROWS, 64, recipe.seed), bad=[2, 3, 5])
    whole = open_log(tmp_path / "whole")
    undisturbed = Ran(recipe, batches, whole, monkeypatch).arrays()

    class Stopping(Shorter):
        def metrics(self, counters, recipe, gradient_norm, learning_rate):
            super().metrics(counters, recipe, gradient_norm, learning_rate)
            if counters.step == stop_at:
                self.interrupts.number = 2

    (tmp_path / "stopped").mkdir()
    stopping = Stopping(Run(tmp_path / "stopped", Console(io.StringIO())), 0)
    with pytest.raises(Interrupted):
        Ran(recipe, batches, stopping, monkeypatch)
    resumed = open_log(tmp_path / "stopped")
    assert same(Ran(recipe, batches, resumed, monkeypatch).arrays(), undisturbed)

    def comparable(log):
        times = ("seconds", "tokens_per_second")
        return [{k: x for k, x in line.items() if k not in times} for line in events(log)]

    assert comparable(resumed) == comparable(whole)

    # The count of steps in a row goes on as well: one that forgets it would skip for ever.
    strict = tiny_recipe(train=options | {"skip_nonfinite": 1, "steps": 4})
    again = Counters(step=3, skipped=1, in_a_row=1)
    again.skip(4, 1.0)
    guard = Guard(strict, resumed)
    seen = [_seen([9.0])]
    with pytest.raises(Diverged):
        guard.look(again, seen, SUMS, mx.array(math.nan), 0.1)


SUMS = SimpleNamespace(gradients={"layers": [{"weight": mx.array([math.nan])}]}, weight=mx.array(1.0))


def _seen(losses, rows=ROWS[:2]):
    parts = {"cross_entropy": mx.array(sum(losses))}
    batch = make_batch(rows)._replace(rows=tuple(range(len(rows))))
    return Seen(batch, False, parts, mx.array(float(len(losses))))


def test_skipping_does_not_determine_the_student():
    plain = tiny_recipe()
    for options in ({"skip_nonfinite": 0}, {"spike": 0.0}, {"memory_gib": 3.0}):
        assert fingerprint(tiny_recipe(train=options)) == fingerprint(plain)
        assert determining(tiny_recipe(train=options)) == determining(plain)
    assert fingerprint(tiny_recipe(train={"clip": 2.0})) != fingerprint(plain)


@pytest.mark.parametrize("options", [{"skip_nonfinite": -1}, {"spike": -0.5}, {"memory_gib": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(RecipeError, match=f"train.{next(iter(options))}"):
        tiny_recipe(train=options)


def test_the_limit_of_a_spike_by_hand():
    recent = [1.0, 2.0, 3.0, 4.0] * 4 + [2.5]
    # Median 2.5; distances 1.5 and 0.5, eight of each and one 0: their median is 0.5.
    assert spike_limit(recent, 10.0) == pytest.approx(2.5 + 10 * 1.4826 * 0.5)
    assert spike_limit(recent[: ENOUGH - 1], 10.0) is None
    # Losses that do not differ: at least 1 % of the median; and of a loss of nearly nothing 0.2 nats.
    assert spike_limit([4.0] * 20, 10.0) == pytest.approx(4.4)
    assert spike_limit([0.01, 0.02] * 10, 10.0) == pytest.approx(0.215)
    # A spike among them moves it hardly; a mean and a standard deviation would hide the next one.
    after = [*recent, 1000.0]
    limit = spike_limit(after, 10.0)
    assert limit is not None and limit < 18 < fmean(after) < stdev(after)


def told_by(losses: list[Any], spike: float = 6.0) -> tuple[Any, Counters]:
    """What the guard says of steps with these losses, and the lines of metrics."""

    class Log:
        stage = "student"

        def __init__(self):
            self.lines, self.kept = [], []

        def say(self, line):
            self.lines.append(line)

        def event(self, step, values, rows):
            self.kept.append({"step": step, **values, "rows": rows})

    log: Any = Log()
    counters = Counters()
    recipe = tiny_recipe(objective={"cross_entropy": {}}, train={"spike": spike})
    guard = Guard(recipe, log, [f"a.jsonl:{i}" for i in range(9)])
    for step, each in enumerate(losses, 1):
        each = each if isinstance(each, list) else [each]
        counters.step = step
        seen = [_seen([loss], ROWS[i : i + 1])._replace() for i, loss in enumerate(each)]
        seen = [one._replace(batch=one.batch._replace(rows=(i,))) for i, one in enumerate(seen)]
        parts = {"cross_entropy": mx.array(sum(each))}
        sums = SimpleNamespace(parts=parts, weight=mx.array(float(len(each))))
        guard.look(counters, seen, sums, mx.array(1.0), 0.1)
    return log, counters


def noisy(count, middle=2.0, seed=0):
    draw = random.Random(seed)
    return [draw.gauss(middle, 0.1) for _ in range(count)]


def test_a_spike_is_told_with_the_micro_batch_that_made_it():
    log, counters = told_by([*noisy(30), [2.0, 2.1, 13.0], *noisy(30)])
    assert counters.spikes == 1 and len(log.lines) == 1
    assert log.lines[0].startswith("step 31: the loss 5.7 is a spike, above ")
    assert log.lines[0].endswith("13 tokens of a.jsonl:2")
    (kept,) = log.kept
    assert kept["step"] == 31 and kept["rows"] == ["a.jsonl:2"] and kept["spikes"] == 1
    assert kept["spike"] == pytest.approx(5.7, rel=1e-5) and kept["spike"] > kept["spike_limit"]


def test_noise_falling_losses_and_the_first_steps_are_none():
    assert told_by(noisy(300))[1].spikes == 0
    falling = [8 * math.exp(-i / 20) + loss for i, loss in enumerate(noisy(200))]
    assert told_by(falling)[1].spikes == 0
    assert told_by([9.0, 1.0, 50.0, 2.0, 100.0])[1].spikes == 0
    # Turned off there is none either; and these would be some.
    assert told_by([*noisy(30), 99.0], spike=0)[1].spikes == 0
    assert told_by([*noisy(30), 99.0])[1].spikes == 1
    # A plain multiple of the mean takes the start of a fall for its measure, or misses this one.
    assert told_by([*noisy(30), 3.5])[1].spikes == 1


def test_they_are_told_a_bounded_number_of_times():
    log, counters = told_by([*noisy(64), *[one for i in range(30) for one in (50.0, *noisy(3, seed=i))]])
    assert counters.spikes == 30
    assert len(log.lines) == len(log.kept) == TOLD
    assert log.lines[-1].endswith("; from here on they are only counted")


def test_spikes_change_nothing_in_the_training(tmp_path, monkeypatch):
    found = []
    batches = Batches(ROWS, 64, 0)

    class Mislabelled(Some):
        def __getitem__(self, index):
            batch = self.batches[index]
            return batch if index != 36 else batch._replace(labels=(batch.labels + 17) % V)

    for spike in (0.0, 3.0):
        options = {"steps": 40, "spike": spike, "batch_tokens": 64}
        recipe = tiny_recipe(train=options, objective={"cross_entropy": {}})
        log = open_log(tmp_path / str(spike))
        found.append(Ran(recipe, Mislabelled(batches), log, monkeypatch).arrays())
    assert same(*found)
    (line,) = [line for line in said(log).splitlines() if "is a spike" in line]
    assert line.startswith("student: step 37: the loss ")
    assert line.endswith(", ".join(f"rows.jsonl:{i + 1}" for i in dict.fromkeys(batches[36].rows)))


def test_gradients_of_layers_by_hand():
    tree = {
        "model": {
            "layers": [
                {"a": mx.array([3.0, 0.0]), "b": {"c": mx.array([[8.0]])}},
                {"a": mx.array([1.0, 1.0])},
            ],
            "embed_tokens": {"weight": mx.array([[5.0]])},
        }
    }
    found = sizes_of_layers(tree, mx.array(2.0))
    assert found.keys() == {"layers.0", "layers.1", "embed_tokens"}
    assert found["layers.0"] == pytest.approx(math.hypot(3, 8) / 2)
    assert found["embed_tokens"] == pytest.approx(2.5)


def test_the_limits_of_mlx_are_set_where_asked_and_the_wired_one_never(monkeypatch, repository):
    calls = []
    for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda size, name=name: calls.append((name, size)) or 100 << 20)
    limit_memory(tiny_recipe().train)
    always = [("set_cache_limit", KEPT)] if mx.default_device() == mx.cpu else []
    assert calls == always
    limit_memory(tiny_recipe(train={"memory_gib": 2.0}).train)
    assert calls[2 * len(always)] == ("set_memory_limit", 2 << 30)
    assert calls[-1] == ("set_cache_limit", 100 << 20)  # what it was before is less than a quarter
    assert not any("wired" in name for name, _ in calls)
    sources = [path.read_text(encoding="utf-8") for path in (repository / "mlx_distill").rglob("*.py")]
    assert not any("set_wired_limit(" in text for text in sources)


def test_more_memory_than_asked_for_is_told_once(tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"memory_gib": 1e-4})
    log = open_log(tmp_path / "run")
    Ran(recipe, Batches(ROWS, 256, 0), log, monkeypatch)
    lines = [line for line in said(log).splitlines() if "train.memory_gib" in line]
    assert len(lines) == 1 and "more than `train.memory_gib` 0.0001; lower `train.batch_tokens`" in lines[0]


# As they stand in mlx 0.32 and in what users reported; of the last one the supervisor reads the stderr.
MEMORY = [
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 4294967296 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "std::bad_alloc",
]
BUFFER = (
    "[metal::malloc] Attempting to allocate 134668044288 bytes which is greater than the maximum allowed "
    "buffer size of 86586540032 bytes."
)
WATCHDOG = [
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
    "(00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
]


@pytest.mark.parametrize("message", [*MEMORY, BUFFER, *WATCHDOG])
def test_what_mlx_says_becomes_75_with_what_to_change(message):
    with pytest.raises(Stopped) as caught, resumable_if_mlx_stops("train"):
        raise RuntimeError(message)
    assert caught.value.exit_code == 75
    assert "\n" not in str(caught.value)
    wanted = ["train.batch_tokens", "train.logits_mib"]
    wanted += ["caffeinate -s", "SSH"] if message in WATCHDOG else ["gradient_checkpointing", "source: cache"]
    assert all(word in str(caught.value) for word in wanted)
    cause = cause_of(message)
    assert cause is not None and cause.helps_again is (message != BUFFER)


@pytest.mark.parametrize("error", [RuntimeError("[matmul] shapes differ"), ValueError("out of memory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, resumable_if_mlx_stops("train"):
        raise error
    assert caught.value is error
    mine = Stopped("the machine behind the endpoint says: out of memory")
    with pytest.raises(Stopped) as stopped, resumable_if_mlx_stops("train"):
        raise mine
    assert stopped.value is mine


def test_out_of_memory_in_a_stage_is_one_line_and_75(tmp_path: Path, capsys, monkeypatch):
    def greedy(work):
        raise RuntimeError(MEMORY[1])

    folder = workshop.make(tmp_path)
    monkeypatch.setattr(pipeline, "train_student", greedy)
    ended = command(folder, capsys, "train", "recipe.yaml")
    assert ended.code == 75
    go_on, error = ended.err
    assert go_on.startswith("go on with: ") and go_on.endswith("--resume")
    assert error.startswith("error: train: out of memory; lower `train.batch_tokens` or `train.logits_mib`")


def test_no_teacher_and_guards_go_together(tmp_path):
    """A batch without a counted token has no mean: the step is skipped, and the run goes on."""
    recipe = tiny_recipe(objective={"cross_entropy": {}}, train={"steps": 3, "batch_tokens": 64})

    class Empty(Some):
        def __getitem__(self, index):
            batch = self.batches[index]
            return batch if index != 1 else batch._replace(weights=mx.zeros_like(batch.weights))

    log = open_log(tmp_path / "run")
    train(tiny_model(V).model, [NoTeacher()], Empty(Batches(ROWS, 64, 0)), recipe, V, log)
    assert "student: step 2 is skipped: the gradient is not finite" in said(log)
    assert guards.NAMED >= 1
