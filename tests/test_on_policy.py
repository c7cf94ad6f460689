"""On-policy rows: who writes them and when, what counts on them, and that a resumed run cannot tell."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train import SilentLog
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill.console import Console
from mlx_distill.counters import Counters
from mlx_distill.data.batch import Batches, Encoded, make_batch
from mlx_distill.generate import Answer
from mlx_distill.interrupt import Interrupted
from mlx_distill.length_alarm import RECENT
from mlx_distill.objective import label_schedule
from mlx_distill.on_policy import OwnRows
from mlx_distill.optimizer import make_optimizer
from mlx_distill.options import OnPolicy
from mlx_distill.recipe import Recipe
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.student import add_adapters
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step, train

V, END = 50, 1
ROWS = rows_of([9, 4, 13, 7, 30, 2])
LONG = [Encoded([*range(2, 30), 3, 4], 28)]  # a question of another length


def own_rows(rows: Sequence[Encoded] = ROWS, steps: int = 100, **options: Any) -> OwnRows:
    return OwnRows(
        OnPolicy(**{"max_tokens": 12, **options}),
        [row.tokens[: row.start] for row in rows],
        steps=steps,
        batch_tokens=256,
        seed=0,
        ends={END},
        vocabulary=V,
    )


def learn(
    how: Recipe, log: Any = None, model: Any = None, validate: Any = None, **changes: Any
) -> tuple[dict[str, mx.array], OwnRows]:
    """Train a tiny student from the last checkpoint on; its weights, and what wrote its rows."""
    model = model or tiny_model(V)
    assert how.generate.on_policy is not None
    own = own_rows(steps=how.train.steps, **how.generate.on_policy.model_dump())
    batches = Batches(ROWS, how.train.batch_tokens, how.seed)
    teacher = LiveTeacher(tiny_model(V, seed=9), V)
    train(model.model, [teacher], batches, how, V, log or SilentLog(), validate, own, **changes)
    return dict(tree_flatten(model.model.parameters())), own


def mixed(train_options: dict[str, Any] | None = None, **on_policy: Any) -> Recipe:
    return tiny_recipe(
        objective={"reverse_kl": {}, "cross_entropy": {"weight": 0.5}},
        generate={"on_policy": {"share": 0.5, "max_tokens": 12, **on_policy}},
        train={"steps": 6, **(train_options or {})},
    )


def test_share_is_how_often_the_student_writes() -> None:
    """By a count over many micro-batches, without writing: what is not drawn is a row of the data."""
    own, student = own_rows(share=0.3), tiny_model(V).model
    own._write = lambda index, student: (ROWS, [Answer([3], True, END)])  # type: ignore[method-assign]
    drawn = [own.micro_batch(index, 1, student) is not None for index in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)
    assert drawn == [own.micro_batch(index, 1, student) is not None for index in range(2000)]
    always, never = own_rows(share=1.0), own_rows(schedule="adaptive")
    always._write = own._write  # type: ignore[method-assign]
    assert all(always.micro_batch(index, 1, student) for index in range(50))
    assert not any(never.micro_batch(index, 1, student) for index in range(50))


def test_rows_are_what_the_student_says_now() -> None:
    """At temperature 0 each label is the student's likeliest token; other weights write other rows."""
    own, student = own_rows(temperature=0.0), tiny_model(V).model
    written = own.micro_batch(0, 1, student)
    assert written is not None
    said = mx.argmax(student(written.batch.tokens), axis=-1)
    counted = np.array(written.batch.counted)
    assert (np.array(said) == np.array(written.batch.labels))[counted].all()
    assert student.training
    again = own_rows(temperature=0.0).micro_batch(0, 1, student)
    other = own_rows(temperature=0.0).micro_batch(0, 1, tiny_model(V, seed=5).model)
    assert again is not None and other is not None
    assert again.answers == written.answers != other.answers


def test_answers_are_drawn_at_the_temperature_asked_for() -> None:
    """First tokens of many answers to one question against the student's distribution, cut to V."""
    student = tiny_model(V + 30).model  # its matrix is padded: ids from V on are no tokens
    question = [5, 6, 7]
    own = own_rows([Encoded([*question, 8], 3)], max_tokens=1)
    firsts = []
    for index in range(40):
        written = own.micro_batch(index, 1, student)
        assert written is not None
        firsts += [answer.tokens[0] if answer.tokens else END for answer in written.answers]
    share = np.bincount(firsts, minlength=V) / len(firsts)
    logits = np.array(student(mx.array([question]))[0, -1], dtype=np.float64)[:V]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert len(share) == V
    assert np.abs(share - expected).max() < 4 * np.sqrt(expected.max() / len(firsts))
    assert len(set(firsts)) > 20


def test_unfinished_and_empty_answers_stay_as_they_are() -> None:
    """An end is counted where the student wrote one, and nowhere else."""
    answers = [Answer([4, 5, 6], False), Answer([], True, END), Answer([7], True, END)]
    own = own_rows()
    own._size = lambda width: 3  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_distill.on_policy.generate", lambda *_, **__: answers)
        written = own.micro_batch(0, 1, tiny_model(V).model)
    assert written is not None
    labels, counted = np.array(written.batch.labels), np.array(written.batch.counted)
    assert [labels[i][counted[i]].tolist() for i in range(3)] == [[4, 5, 6], [END], [7, END]]
    assert written.counts == {"own": 1, "answers": 3, "tokens": 4, "unfinished": 1}


def test_batches_are_few_shapes_within_batch_tokens() -> None:
    questions = [Encoded(list(range(2, 3 + length)), 1 + length) for length in range(3, 40)]
    own, student = own_rows(questions, max_tokens=100, buffer=500), tiny_model(V).model
    random = np.random.default_rng(0)

    def written(*_: Any, **how: Any) -> list[Answer]:
        lengths = random.integers(1, 100, size=how["batch_size"]).tolist()
        return [Answer([3] * length, False) for length in lengths]

    shapes = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_distill.on_policy.generate", written)
        for index in range(200):
            step = own.micro_batch(index, 1 + index // 2, student)
            assert step is not None
            shapes.add(step.batch.tokens.shape)
    assert all(rows * width <= 256 for rows, width in shapes)
    assert len(shapes) <= 20
    assert {width % own.pad_to for _, width in shapes} == {0}


def test_questions_come_at_one_rate_whatever_their_length() -> None:
    rows = [*rows_of([4, 5, 6, 7]), *LONG]
    own, asked, student = own_rows(rows), [], tiny_model(V).model

    def written(_: Any, prompts: Sequence[Sequence[int]], *__: Any, **___: Any) -> list[Answer]:
        asked.extend(len(prompt) for prompt in prompts)
        return [Answer([3], True, END)] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_distill.on_policy.generate", written)
        batches = [own.micro_batch(index, 1, student) for index in range(400)]
    long = sum(length == 28 for length in asked)
    each = {3: own._size(16), 28: own._size(48)}
    assert len(batches) == 400
    # A fifth of the micro-batches asks the one long question, the others the four short ones.
    assert long / each[28] == pytest.approx(80, abs=25)


def test_a_buffer_is_drawn_from_more_and_more() -> None:
    """The chance of fresh rows falls from `share` to none; until there is a batch, all are fresh."""
    own, student = own_rows(buffer=64, share=1.0), tiny_model(V).model
    fresh = ROWS[0]
    own._write = lambda *_: ([fresh] * 16, [Answer([3], True, END)] * 16)  # type: ignore[method-assign]
    assert own.micro_batch(0, 100, student).answers  # type: ignore[union-attr]
    counts = []
    for step in (1, 51, 100):
        drawn = [own.micro_batch(index, step, student) for index in range(1, 401)]
        counts.append(np.mean([bool(one.answers) for one in drawn if one is not None]))
    assert counts == pytest.approx([1.0, 0.5, 0.01], abs=0.08)
    assert len(own.buffer) == 64


def test_a_buffer_keeps_the_newest_rows() -> None:
    own = own_rows(buffer=3)
    own._write = lambda index, _: ([Encoded([2, index], 1)], [])  # type: ignore[method-assign]
    for index in range(5):
        own.micro_batch(index, 1, tiny_model(V).model)
    assert [row.tokens[1] for row in own.buffer] == [2, 3, 4]


def test_the_adaptive_share_follows_the_validation_loss() -> None:
    """By hand: it rises where the loss is 0.1 above that of its last rise, at first that before training."""
    own = own_rows(schedule="adaptive", share=0.25)
    assert own.needs_loss
    losses = [2.0, 1.5, 2.05, 2.1, 2.15, 2.2, 2.31, 2.3, 9.0]
    shares, rose = [], []
    for loss in losses:
        rose.append(own.validated(loss))
        shares.append(own.share)
    assert shares == pytest.approx([0, 0, 0, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25])
    assert rose == [False, False, False, True, False, True, True, False, False]
    constant = own_rows(share=0.5)
    assert not constant.needs_loss and not constant.validated(9.0) and constant.share == 0.5


def test_a_validation_loss_that_is_not_finite_is_worse_and_not_kept() -> None:
    """A checkpoint keeps the state as JSON, which has no such number."""
    own = own_rows(schedule="adaptive", share=0.25)
    assert not own.validated(math.nan) and own.needs_loss
    assert [own.validated(loss) for loss in (2.0, math.inf, math.nan)] == [False, True, True]
    assert own.loss == 2.0
    json.dumps(own.state(), allow_nan=False)


def test_losses_on_labels_do_not_act_on_own_rows() -> None:
    """On rows that the student wrote, the gradient is that of the divergence alone."""
    batch, teacher = make_batch(ROWS), LiveTeacher(tiny_model(V, seed=9), V)

    def gradients(objective: dict[str, Any], own: bool | None) -> tuple[dict[str, mx.array], Any]:
        how, model = tiny_recipe(objective=objective, train={"compile": False}), tiny_model(V).model
        made = make_objective(model, [teacher], how, V)
        schedule: dict[str, mx.array] = {"exit_cross_entropy": mx.array([0.25])} if made.exits else {}
        if own is not None:
            schedule = label_schedule(how.objective, schedule, own=own)
        step = make_step(made, make_optimizer(how.train), how)
        sums, parts = step.gradients(batch, [teacher.targets(batch)], schedule)
        return dict(tree_flatten(sums)), parts

    divergence: dict[str, Any] = {"reverse_kl": {}}
    both = {**divergence, "cross_entropy": {"weight": 0.5}, "exit_cross_entropy": {"exits": [1]}}
    plain, _ = gradients(divergence, None)
    found, parts = gradients(both, True)
    assert largest_gap(found, plain) < 1e-5
    assert float(parts["cross_entropy"]) == float(parts["exit_cross_entropy"]) == 0
    # On rows of the data they count as ever; and that is what own rows would get without the schedule.
    of_data, expected = gradients(both, False)[0], gradients(both, None)[0]
    assert largest_gap(of_data, expected) < 1e-6
    assert largest_gap(expected, plain) > 0.1


def test_the_schedule_of_labels_has_one_shape_for_all_rows() -> None:
    """Other keys or shapes would trace a compiled step anew."""
    terms = tiny_recipe(objective={"forward_kl": {}, "cross_entropy": {}}).objective
    own, data = (label_schedule(terms, {}, own=one) for one in (True, False))
    assert own.keys() == data.keys() == {"cross_entropy"}
    assert (own["cross_entropy"].shape, float(own["cross_entropy"]), float(data["cross_entropy"])) == (
        (),
        0,
        1,
    )


def test_each_micro_batch_has_its_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own rows, then rows of the data: cross entropy counts on the second alone, and there in full."""
    how = mixed({"steps": 1, "micro_batches": 2, "compile": False})
    monkeypatch.setattr(OwnRows, "micro_batch", turns(OwnRows.micro_batch))

    class Log(SilentLog):
        def metrics(self, counters: Counters, recipe: Recipe, *_: Any) -> None:
            self.shown = counters.means(recipe), counters.own_means(), counters.window_labels

    log, model = Log(), tiny_model(V).model
    batch = Batches(ROWS, 256, 0)[1]
    nats = -mx.take_along_axis(model(batch.tokens), batch.labels[..., None], -1)[..., 0]
    nats = (
        mx.where(batch.counted, nats + mx.logsumexp(model(batch.tokens), -1), 0).sum() / batch.counted.sum()
    )
    expected = float(nats)
    learn(how, log)
    (loss, losses), own, labels = log.shown
    assert losses["cross_entropy"] == pytest.approx(expected, abs=1e-4)
    assert labels == int(batch.counted.sum())
    assert own["own_share"] == 0.5
    # The loss that is followed is per label of both: cross entropy has less than its half of it.
    assert loss < losses["reverse_kl"] + 0.5 * losses["cross_entropy"]


def turns(plain: Any) -> Any:
    """Own rows at even micro-batches, rows of the data at odd ones."""

    def micro_batch(self: OwnRows, index: int, step: int, student: Any) -> Any:
        self.share = 1.0 if index % 2 == 0 else 0.0
        return plain(self, index, step, student)

    return micro_batch


def test_compiled_and_plain_runs_end_alike() -> None:
    ends = [
        learn(mixed({"compile": compiled, "micro_batches": 2}, temperature=0.0))[0]
        for compiled in (True, False)
    ]
    assert largest_gap(*ends) < 1e-3


class Means(SilentLog):
    """A stage log that keeps the means of each line of metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def metrics(self, counters: Counters, recipe: Recipe, *_: Any) -> None:
        self.seen.append(counters.means(recipe)[1])
        counters.close_window()


def test_it_learns_what_it_gets_wrong_itself() -> None:
    """Its own rows alone, judged by reverse KL: the divergence on fresh own rows falls."""
    how = tiny_recipe(
        objective={"reverse_kl": {}},
        generate={"on_policy": {"max_tokens": 12}},
        train={"steps": 24, "log_every": 4, "compile": False},
    )

    log = Means()
    learn(how, log)
    assert log.seen[-1]["reverse_kl"] < 0.4 * log.seen[0]["reverse_kl"]


def test_policy_gradient_goes_down_the_reverse_kl() -> None:
    how = tiny_recipe(
        objective={"policy_gradient": {}},
        generate={"on_policy": {"max_tokens": 12}},
        train={"steps": 32, "log_every": 4, "compile": False},
    )

    log = Means()
    learn(how, log)
    nats = [line["policy_gradient"] for line in log.seen]
    assert np.mean(nats[-3:]) < 0.7 * np.mean(nats[:3])


def open_log(folder: Path) -> StageLog:
    folder.mkdir(exist_ok=True)
    return StageLog(Run(folder, Console(io.StringIO())), "student")


class Clocked(StageLog):
    """A stage log of a run that a signal stops at a step, and whose validation loss rises by 0.2 a step."""

    def __init__(self, folder: Path, stop: int):
        folder.mkdir(exist_ok=True)
        super().__init__(Run(folder, Console(io.StringIO())), "student")
        self.now, self.stop = 0, stop

    def steps(self, first: int, last: int) -> Iterator[int]:
        for self.now in super().steps(first, last):
            if self.now == self.stop:
                self.interrupts.number = 2
            yield self.now

    def worse(self, _: Any) -> dict[str, float]:
        return {"nll": 1 + 0.2 * self.now}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_a_resumed_run_ends_with_the_same_bits(
    method: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle: weights, buffer and share are those of the undisturbed run."""
    how = mixed({"steps": 12, "save_every": 3, "eval_every": 1}, share=0.8, buffer=40, schedule=schedule)
    if method == "lora":
        student = {"method": "lora", "rank": 4, "dropout": 0.1, "model": "x", "shape": None}
        how = Recipe.model_validate({**how.model_dump(), "student": student, "objective": {"reverse_kl": {}}})

    def fresh() -> Any:
        model = tiny_model(V)
        if method == "lora":
            add_adapters(model.model, how.student, seed=0)
        return model

    def go(folder: str, stop: int = 0) -> tuple[dict[str, mx.array], dict[str, Any]]:
        log = Clocked(tmp_path / folder, stop)
        if stop:
            with pytest.raises(Interrupted):
                learn(how, log, fresh(), log.worse)
            return {}, {}
        weights, own = learn(how, log, fresh(), log.worse)
        return weights, own.state()

    whole, state = go("whole")
    go("stopped", stop=7)
    resumed, again = go("stopped")
    assert all(mx.array_equal(whole[name], resumed[name]) for name in whole)
    assert state == again and len(state["buffer"]) == 40
    assert state["share"] == 0.8
    # A run that forgets its buffer ends elsewhere.
    go("forgetful", stop=7)
    restore = OwnRows.restore
    monkeypatch.setattr(OwnRows, "restore", lambda self, kept: restore(self, {**kept, "buffer": []}))
    assert not all(mx.array_equal(whole[name], other) for name, other in go("forgetful")[0].items())


def test_state_is_plain_and_comes_back_whole() -> None:
    own = own_rows(buffer=9, schedule="adaptive")
    own.validated(1.0)
    own.validated(1.3)
    own._write = lambda *_: (ROWS, [Answer([3, 4], False)] * RECENT)  # type: ignore[method-assign]
    own.share = 1.0
    own.micro_batch(0, 1, tiny_model(V).model)
    own.share = 0.4
    assert own.alarm.news()
    other = own_rows(buffer=9, schedule="adaptive")
    other.restore(json.loads(json.dumps(own.state())))
    assert other.state() == own.state() and other.buffer == own.buffer
    assert other.share == own.share and not other.needs_loss
    assert other.alarm.news() is None  # it has been said


def test_lengths_are_in_the_metrics_and_the_alarm_on_the_console(tmp_path: Path) -> None:
    how = tiny_recipe(
        objective={"reverse_kl": {}},
        generate={"on_policy": {"max_tokens": 12}},
        train={"steps": 6, "log_every": 3},
    )
    lines, log = io.StringIO(), open_log(tmp_path / "run")
    log.run.console = Console(lines)
    learn(how, log)
    metrics = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in metrics] == [3, 6]
    for line in metrics:
        assert line["own_share"] == 1 and 1 < line["own_length"] <= 12 and 0.5 < line["own_unfinished"] <= 1
    said = lines.getvalue()
    assert said.count("own answers do not end within") == 1
    assert "own_length" in said and "cross_entropy" not in said


def test_hidden_states_and_attention_of_own_rows_are_compared_too() -> None:
    how = tiny_recipe(
        objective={"forward_kl": {}, "hidden_cosine": {}, "attention_relations": {}},
        generate={"on_policy": {"max_tokens": 8}},
        train={"steps": 20, "log_every": 5, "compile": False},
    )
    from mlx_distill.matching import teacher_layers

    log, model = Means(), tiny_model(V)
    teacher = LiveTeacher(tiny_model(V, seed=9), V, teacher_layers(how.objective, 2, 2))
    own = own_rows(steps=20, max_tokens=8)
    train(model.model, [teacher], [], how, V, log, own=own)  # type: ignore[arg-type]
    assert log.seen[-1].keys() == how.objective.keys()
    assert 0 < log.seen[-1]["hidden_cosine"] < 0.7 * log.seen[0]["hidden_cosine"]
