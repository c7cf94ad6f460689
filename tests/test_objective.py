"""The objective in chunks of counted places, against all logits at once and plain sums over a mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import largest_gap, rows_of, tiny_model, tiny_recipe

from mlx_distill.cache import CachedTeacher, write_cache
from mlx_distill.data.batch import Batch, counted_places, make_batch, place_weights
from mlx_distill.losses import LOSSES, Targets, Top
from mlx_distill.losses.exits import exit_cross_entropy, exit_kl
from mlx_distill.losses.features import attention_transfer, hidden_cosine, hidden_mse
from mlx_distill.matching import HUNG_ON, teacher_layers
from mlx_distill.models.taps import tapped
from mlx_distill.objective import Objective, Schedule, exit_schedule, mixture
from mlx_distill.optimizer import make_optimizer
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import LiveTeacher, NoTeacher
from mlx_distill.train import chunk_of, make_objective, make_step

V = 50
LOSS: dict[str, Any] = dict(LOSSES)
ROWS = rows_of([25, 4, 13, 1])
BATCH = make_batch(ROWS)
TOLERANCE = 2e-5
Result = tuple[float, dict[str, mx.array]]


class Lesson:
    """A student, its teachers, and the objective of a recipe over them."""

    def __init__(
        self,
        objective: dict[str, Any],
        *,
        teachers: list[dict[str, Any]] | None = None,
        others: Callable[[Any], Any] | None = None,
        **shape: Any,
    ):
        named = [{"model": "x", **one} for one in teachers or [{}]]
        first, *more = named
        self.recipe = tiny_recipe(objective=objective, teacher={**first, "others": more})
        self.student: Any = tiny_model(V, num_hidden_layers=3).model
        loaded: list[Any] = [tiny_model(V, seed=9 + i, **shape) for i in range(len(named))]
        self.models = [one.model for one in loaded]
        terms = self.recipe.objective
        self.teachers: list[Any] = [
            LiveTeacher(one, V, teacher_layers(terms, 3, len(one.model.layers))) for one in loaded
        ]
        if others is not None:
            self.teachers[-1] = others(self.teachers[-1])
        self.objective: Objective = make_objective(self.student, self.teachers, self.recipe, V)
        self.objective.chunk = 16
        self.schedule: Schedule = exit_schedule(terms, 3, 1, 4)

    def found(self, batch: Batch = BATCH, **changed: Any) -> Result:
        targets = [teacher.targets(batch) for teacher in self.teachers or [NoTeacher()]]
        places = changed.get("places", counted_places(batch))
        weights = changed.get("weights", place_weights(batch, places))
        run: Any = nn.value_and_grad(self.student, self.objective.sums)
        (total, self.parts), gradients = run(batch.tokens, places, weights, targets, self.schedule)
        return float(total), dict(tree_flatten(gradients))

    def expected(self, naive: Callable[[mx.array, Batch], mx.array], batch: Batch = BATCH) -> Result:
        """`naive` maps the student's logits (B, T, V) to a sum."""
        run: Any = nn.value_and_grad(self.student, lambda: naive(self.student(batch.tokens)[..., :V], batch))
        total, gradients = run()
        return float(total), dict(tree_flatten(gradients))


def same(found: Result, expected: Result) -> bool:
    return bool(
        np.isclose(found[0], expected[0], rtol=1e-5) and largest_gap(found[1], expected[1]) < TOLERANCE
    )


def counted(values: mx.array, batch: Batch) -> mx.array:
    return mx.where(batch.counted, values, 0).sum()


def dense(model: nn.Module, batch: Batch) -> mx.array:
    return mx.stop_gradient(model(batch.tokens)[..., :V])


def top(logits: mx.array, k: int, temperature: float, tail: bool) -> Top:
    log_p = logits / temperature - mx.logsumexp(logits / temperature, axis=-1, keepdims=True)
    indices = mx.argsort(-log_p, axis=-1)[..., :k]
    kept = mx.take_along_axis(log_p, indices, axis=-1)
    return Top(indices, kept, mx.log(1 - mx.exp(kept).sum(-1)) if tail else None)


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_every_token_loss(name: str, temperature: float | None) -> None:
    options = {} if temperature is None or name == "cross_entropy" else {"temperature": temperature}
    lesson = Lesson({name: {"weight": 0.7, **options}})
    teacher = lesson.models[0]

    def naive(logits: mx.array, batch: Batch) -> mx.array:
        targets = Targets(batch.labels, dense(teacher, batch))
        return 0.7 * counted(LOSS[name](logits, targets, **options), batch)

    found = lesson.found()
    assert same(found, lesson.expected(naive))
    assert lesson.parts.keys() == {name}
    assert float(lesson.parts[name]) == pytest.approx(found[0] / 0.7, rel=1e-5)

    # The usual mistake, padding and prompts counted as well, must not pass.
    everything = BATCH._replace(counted=mx.ones_like(BATCH.counted))
    assert not same(found, lesson.expected(lambda logits, _: naive(logits, everything)))


@pytest.mark.parametrize(
    ("name", "tail"), [("forward_kl", True), ("forward_kl", False), ("reverse_kl", True)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_tokens_of_a_live_teacher(name: str, tail: bool, temperature: float) -> None:
    options = {"temperature": temperature}
    lesson = Lesson({name: options}, teachers=[{"top_k": 7, "tail": tail}])
    teacher = lesson.models[0]

    def naive(tail: bool, logits: mx.array, batch: Batch) -> mx.array:
        targets = Targets(batch.labels, top=top(dense(teacher, batch), 7, temperature, tail))
        return counted(LOSS[name](logits, targets, **options), batch)

    found = lesson.found()
    assert same(found, lesson.expected(lambda *both: naive(tail, *both)))
    assert not same(found, lesson.expected(lambda *both: naive(not tail, *both)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_two_teachers_are_mixed_by_probability(temperature: float) -> None:
    """Mixed, then compared; the mean of two losses, or of logits, is another thing."""
    options = {"temperature": temperature}
    lesson = Lesson({"reverse_kl": options}, teachers=[{"weight": 3.0}, {}])
    shares = (0.75, 0.25)

    def softmax(model: nn.Module, batch: Batch) -> np.ndarray:
        powers = np.exp(np.array(dense(model, batch), dtype=np.float64) / temperature)
        return powers / powers.sum(-1, keepdims=True)

    def naive(logits: mx.array, batch: Batch) -> mx.array:
        mixed = sum(share * softmax(model, batch) for share, model in zip(shares, lesson.models, strict=True))
        targets = Targets(batch.labels, mx.array((temperature * np.log(mixed)).astype(np.float32)))
        return counted(LOSS["reverse_kl"](logits, targets, **options), batch)

    def mean_of_losses(logits: mx.array, batch: Batch) -> mx.array:
        both = zip(shares, lesson.models, strict=True)
        targets = [(share, Targets(batch.labels, dense(model, batch))) for share, model in both]
        values = [share * LOSS["reverse_kl"](logits, one, **options) for share, one in targets]
        return counted(values[0] + values[1], batch)

    found = lesson.found()
    assert same(found, lesson.expected(naive))
    assert not same(found, lesson.expected(mean_of_losses))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_a_mixture_is_the_mean_of_probabilities(temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=5, size=(3, 1, 4, V))
    shares = [0.2, 0.5, 0.1]  # of teachers of which others give no logits: they need not add up to one
    mixed = mixture(
        [(share, mx.array(one.astype(np.float32))) for share, one in zip(shares, logits, strict=True)],
        temperature,
    )
    powers = np.exp(logits / temperature)
    each = powers / powers.sum(-1, keepdims=True)
    expected = np.tensordot(np.array(shares) / sum(shares), each, axes=1)
    found = np.array(mx.softmax(mixed / temperature, axis=-1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    means = np.exp(np.tensordot(np.array(shares) / sum(shares), logits / temperature, axes=1))
    assert not np.allclose(means / means.sum(-1, keepdims=True), expected, rtol=1e-2)


def test_losses_are_mixed_where_one_teacher_is_a_cache(tmp_path: Path) -> None:
    def cached(live: LiveTeacher) -> CachedTeacher:
        made_of = {"rows": "these"}
        write_cache(tmp_path / "cache", live, ROWS, top_k=7, temperature=1.0, made_of=made_of)
        return CachedTeacher(tmp_path / "cache", ROWS, made_of)

    lesson = Lesson(
        {"forward_kl": {}, "cross_entropy": {"weight": 0.5}},
        teachers=[{"weight": 3.0}, {"source": "cache", "top_k": 7}],
        others=cached,
    )
    batch = BATCH._replace(rows=tuple(range(len(ROWS))))

    def naive(share: float, logits: mx.array, batch: Batch) -> mx.array:
        live, other = (dense(model, batch) for model in lesson.models)
        one = LOSS["forward_kl"](logits, Targets(batch.labels, live))
        two = LOSS["forward_kl"](logits, Targets(batch.labels, top=top(other, 7, 1.0, True)))
        labels = LOSS["cross_entropy"](logits, Targets(batch.labels))
        return counted((1 - share) * one + share * two + 0.5 * labels, batch)

    found = lesson.found(batch)
    assert same(found, lesson.expected(lambda *both: naive(0.25, *both), batch))
    assert not same(found, lesson.expected(lambda *both: naive(0.5, *both), batch))


@pytest.mark.parametrize("curriculum", ["none", "rotational", "gradual"])
def test_exits_answer_with_their_weight_of_the_step(curriculum: str) -> None:
    options = {"exits": [2], "scale": 0.5, "curriculum": curriculum}
    lesson = Lesson(
        {"cross_entropy": {}, "exit_kl": {**options, "temperature": 2.0}, "exit_cross_entropy": options}
    )
    model = lesson.student
    for step in (1, 4):
        lesson.schedule = exit_schedule(lesson.recipe.objective, 3, step, 4)
        # LayerSkip: 0.5 * (0 + 1) for layer 2, over 2 + 0.5 * (0 + 1) of the last.
        weight = 0.0 if curriculum == "gradual" and step == 1 else 0.5 / 2.5

        def naive(logits: mx.array, batch: Batch, weight: float = weight) -> mx.array:
            with tapped(model, hidden=[2]) as seen:
                model(batch.tokens)
            exit_logits = model.model.embed_tokens.as_linear(model.model.norm(seen.hidden[2]))[..., :V]
            exits = exit_kl(exit_logits, logits, temperature=2.0) + exit_cross_entropy(
                exit_logits, batch.labels
            )
            last = LOSS["cross_entropy"](logits, Targets(batch.labels))
            return counted(last + weight * exits, batch)

        found = lesson.found()
        assert same(found, lesson.expected(naive))
        assert not same(found, lesson.expected(lambda *both: naive(*both, weight=0.5)))


FEATURES: dict[str, Any] = {
    "forward_kl": {"temperature": 2.0},
    "hidden_mse": {"weight": 0.3, "layers": [[0, 0], [2, 3], [3, 4]], "balanced": True},
    "hidden_cosine": {"weight": 0.2},
    "attention_transfer": {"weight": 0.4, "layers": [[1, 2], [3, 4]]},
}
WIDE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def features(lesson: Lesson, logits: mx.array, batch: Batch, *, balanced: bool = True) -> mx.array:
    """`FEATURES`, a mean over pairs, at every position of the batch."""
    student, teacher = lesson.student, lesson.models[0]
    with tapped(student, hidden=[0, 2, 3], attention=[1, 3]) as ours:
        student(batch.tokens)
    with tapped(teacher, hidden=[0, 3, 4], attention=[2, 4]) as theirs:
        teacher(batch.tokens)
    targets = Targets(batch.labels, dense(teacher, batch))
    on_logits = counted(LOSS["forward_kl"](logits, targets, temperature=2.0), batch)
    matrices = student[HUNG_ON]["hidden_mse 0"].pairs
    pairs = zip([(0, 0), (2, 3), (3, 4)], matrices, strict=True)
    each = [hidden_mse(m(ours.hidden[i]), theirs.hidden[j]) for (i, j), m in pairs]
    [last] = student[HUNG_ON]["hidden_cosine 0"].pairs
    cosine = hidden_cosine(last(ours.hidden[3]), theirs.hidden[4])
    both = [attention_transfer(ours.attention[i], theirs.attention[j]) for i, j in ((1, 2), (3, 4))]
    hidden = counted((each[0] + each[1] + each[2]) / 3, batch)
    weight = 0.3 * (mx.stop_gradient(on_logits / hidden) if balanced else 1.0)
    return on_logits + weight * hidden + counted(0.2 * cosine + 0.4 * (both[0] + both[1]) / 2, batch)


def test_layers_are_compared_through_projections() -> None:
    lesson = Lesson(FEATURES, **WIDE)
    found = lesson.found()
    assert same(found, lesson.expected(lambda *both: features(lesson, *both)))
    assert not same(found, lesson.expected(lambda *both: features(lesson, *both, balanced=False)))
    names = {name for name, gradient in found[1].items() if name.startswith(HUNG_ON) and mx.any(gradient)}
    assert len(names) == 4  # three pairs of one loss and one of the other: all projections learn
    by_part = {name: float(value) for name, value in lesson.parts.items()}
    assert by_part.keys() == FEATURES.keys()
    # Balanced: 0.3 times as much as the loss on logits.
    assert found[0] == pytest.approx(
        1.3 * by_part["forward_kl"] + 0.2 * by_part["hidden_cosine"] + 0.4 * by_part["attention_transfer"],
        rel=1e-5,
    )


MIXED = {**FEATURES, "cross_entropy": {"weight": 0.1}, "exit_kl": {"exits": [2]}}
PLAIN = {**MIXED, "hidden_mse": {**FEATURES["hidden_mse"], "balanced": False}}


def test_padding_and_prompts_leave_a_mixed_objective_alone() -> None:
    lesson = Lesson(MIXED, **WIDE)
    expected = lesson.found()
    assert same(lesson.found(make_batch(ROWS, pad_to=64)), expected)
    prompts = BATCH._replace(labels=mx.where(BATCH.counted, BATCH.labels, 7))
    assert same(lesson.found(prompts), expected)
    assert same(lesson.found(make_batch(ROWS[::-1])), expected)
    # Places that fill up, taken for places: the same assertion must not pass.
    assert not same(lesson.found(weights=mx.ones((1, counted_places(BATCH).size))), expected)


def added(results: list[Result]) -> Result:
    values, trees = zip(*results, strict=True)
    return sum(values), tree_map(lambda *arrays: sum(arrays[1:], arrays[0]), *trees)


PARTS = [make_batch(ROWS[:2]), make_batch(ROWS[2:])]


def test_micro_batches_of_a_mixed_objective_add_up() -> None:
    lesson = Lesson(PLAIN, **WIDE)
    whole = lesson.found()
    assert same(added([lesson.found(part) for part in PARTS]), whole)


def test_a_balanced_loss_weighs_each_micro_batch_by_its_own_losses() -> None:
    """The only thing that does not add up is the weight: each micro-batch has one of its own."""
    lesson, plain = Lesson(MIXED, **WIDE), Lesson(PLAIN, **WIDE)
    alone = Lesson({name: term for name, term in PLAIN.items() if name == "hidden_mse"}, **WIDE)
    for one in (plain, alone):  # the same projections, though other losses draw others
        one.student.update({HUNG_ON: {"hidden_mse 0": lesson.student[HUNG_ON]["hidden_mse 0"].parameters()}})
        if "hidden_cosine 0" in one.student[HUNG_ON]:
            one.student.update(lesson.student.parameters())

    def weighed(batch: Batch) -> Result:
        """plain + (weight - 1) * hidden_mse, with the weight from the sums of this batch."""
        total, gradients = plain.found(batch)
        parts = {name: float(value) for name, value in plain.parts.items()}
        on_logits = parts["forward_kl"] + 0.1 * parts["cross_entropy"] + parts["exit_kl"]
        more = on_logits / parts["hidden_mse"] - 1
        value, slopes = alone.found(batch)
        return total + more * value, {
            name: gradient + more * slopes[name] if name in slopes else gradient
            for name, gradient in gradients.items()
        }

    for batch in (BATCH, *PARTS):
        assert same(lesson.found(batch), weighed(batch))
    whole, apart = lesson.found(), added([lesson.found(part) for part in PARTS])
    assert apart[0] == pytest.approx(added([weighed(part) for part in PARTS])[0], rel=1e-5)
    assert largest_gap(apart[1], whole[1]) > 1e-3


@pytest.mark.parametrize("saving", [False, True])
def test_compiling_and_checkpointing_change_no_number(saving: bool) -> None:
    lesson = Lesson(MIXED, **WIDE)
    expected = lesson.found()[1]
    if saving:
        checkpoint_layers(lesson.student)
        assert largest_gap(lesson.found()[1], expected) < TOLERANCE
    optimizer = make_optimizer(lesson.recipe.train)
    optimizer.init(lesson.student.trainable_parameters())
    step = make_step(lesson.objective, optimizer, lesson.recipe)
    targets = [lesson.teachers[0].targets(BATCH)]
    for _ in range(2):  # the second time from the trace
        sums, _ = step.gradients(BATCH, targets, lesson.schedule)
        assert largest_gap(dict(tree_flatten(sums)), expected) < TOLERANCE


def test_memory_for_logits_sets_the_chunk() -> None:
    assert chunk_of(256, 150_000, logits=1) == 64
    assert chunk_of(256, 150_000, logits=2) == 32
    assert chunk_of(256, 150_000, logits=64) == 16  # at least
    assert chunk_of(1, 10**9, logits=1) == 16
    assert chunk_of(256, 1000, logits=1) == 14848  # whole chunks of the counted places' 128
    lesson = Lesson({"forward_kl": {}, "exit_kl": {"exits": [2]}})
    # The student's, the exit's and the teacher's.
    expected = chunk_of(lesson.recipe.train.logits_mib, V, logits=3)
    again = make_objective(lesson.student, lesson.teachers, lesson.recipe, V)
    assert again.chunk == expected
