"""The training loop: the one place that turns batches into a student.

Offline, live-teacher and plain training differ in the rows, the targets and the parameters that
move; the loop is the same. A step is one finished optimizer update.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_distill.cache.reader import CachedTeacher
from mlx_distill.chunk_size import chunk_of
from mlx_distill.counters import Counters
from mlx_distill.data.batch import Batch, counted_places, place_weights
from mlx_distill.diagnosis import Seen
from mlx_distill.distributed import ALONE, Ranks
from mlx_distill.distributed.dealing import Deal, adds_nothing
from mlx_distill.guards import Guard, copied, is_finite, keep_unless
from mlx_distill.keys import seed_global
from mlx_distill.losses import Targets
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import Compared, Matching, strip
from mlx_distill.objective import Objective, Schedule, Voice, exit_schedule, exit_terms, label_schedule
from mlx_distill.on_policy import OwnRows
from mlx_distill.optimizer import clip, make_optimizer
from mlx_distill.prune.sparse import masked
from mlx_distill.recipe import Recipe
from mlx_distill.self_teacher import Average
from mlx_distill.stage_log import StageLog
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import LiveTeacher, NoTeacher, Teaches


class Trained(NamedTuple):
    """What a training run used up."""

    train_tokens: int  # counted labels seen, repeats included
    train_seconds: float


class HasBatches(Protocol):
    """Batches by number."""

    def __getitem__(self, index: int, /) -> Batch: ...


class Step(NamedTuple):
    """The two halves of a step, compiled apart so that micro-batches can be added up between them."""

    gradients: Callable[[Batch, Sequence[Targets], Schedule], tuple[Any, dict[str, mx.array]]]
    update: Callable[[Any, mx.array, dict[str, mx.array]], tuple[mx.array, mx.array]]


def make_step(
    objective: Objective, optimizer: Any, recipe: Recipe, masks: Mapping[str, mx.array] | None = None
) -> Step:
    """Functions that compute and apply gradients of `objective` by the weights of its student.

    `gradients(batch, targets, schedule)` gives sums over counted positions, to be added up;
    `update(sums, weight, parts)` divides once, clips, updates student and optimizer in place, and gives the
    norm, and whether it and the sums of the losses are finite: if not, it has changed nothing.

    Args:
        masks: True where a weight moves, by parameter. A zero elsewhere stays one: without a gradient AdamW
            leaves it where it is, and its decay shrinks nothing.
    """
    student = objective.student
    value_and_gradients = nn.value_and_grad(student, objective.sums)

    def gradients_at(
        tokens: mx.array,
        places: mx.array,
        weights: mx.array,
        targets: Sequence[Targets],
        schedule: Schedule,
    ) -> tuple[Any, dict[str, mx.array]]:
        (_, parts), sums = value_and_gradients(tokens, places, weights, targets, schedule)
        return sums, parts

    def update(sums: Any, weight: mx.array, parts: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        means = tree_map(lambda g: g / weight.astype(g.dtype), masked(sums, masks or {}))
        means, size = clip(means, recipe.train.clip)
        taken = is_finite(size, parts)
        weights, state = student.trainable_parameters(), copied(optimizer.state)
        optimizer.update(student, means)
        moved = student.trainable_parameters()
        keep_unless(taken, weights, moved)
        student.update(moved)
        keep_unless(taken, state, optimizer.state)
        return size, taken

    if recipe.train.compile:
        # All that changes between calls is an input: weights, adapters, optimizer, and dropout's
        # random state, which a trace would otherwise freeze. `gradients` changes no weight, but
        # differentiating leaves tracers in the student, so its state is an output there too.
        random = [mx.random.state] if recipe.student.dropout else []
        both = [student.state, *random]
        # A teacher's head may move with the student, or share its arrays.
        heads = [voice.head.state for voice in objective.voices if voice.head is not None]
        gradients_at = mx.compile(gradients_at, inputs=[*both, *heads], outputs=both)
        changed = [student.state, optimizer.state]
        update = mx.compile(update, inputs=changed, outputs=changed)

    def gradients(
        batch: Batch, targets: Sequence[Targets], schedule: Schedule
    ) -> tuple[Any, dict[str, mx.array]]:
        places = counted_places(batch)
        return gradients_at(batch.tokens, places, place_weights(batch, places), list(targets), schedule)

    return Step(gradients, update)


def train(
    student: Any,
    teachers: Sequence[Teaches],
    batches: HasBatches,
    recipe: Recipe,
    vocabulary: int,
    log: StageLog,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    own: OwnRows | None = None,
    averages: Sequence[Average] = (),
    masks: Mapping[str, mx.array] | None = None,
    origins: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Trained:
    """Train `student` in place for `recipe.train.steps` updates, from the last checkpoint on.

    Args:
        teachers: one for each of `recipe.teachers`, in that order.
        vocabulary: logits beyond it are cut.
        log: metrics, console, checkpoints and interrupts of this stage.
        validate: what to measure every `eval_every` steps.
        own: rows that the student writes itself, in place of some of the batches; None: it writes none.
        averages: of the student's weights, which follow it step by step.
        masks: where weights move, by parameter; all others of these parameters stay zero.
        origins: where each row of the batches stands, for messages; empty: they are numbered.
        ranks: this process among those that share the training; its `batches` are those dealt to it.

    Raises:
        Diverged: loss or gradient are not finite for more steps in a row than `skip_nonfinite`.
        Interrupted: a signal came; a checkpoint was saved.
    """
    options = recipe.train
    student.train()  # hybrid models choose kernels without a gradient in eval mode
    if options.gradient_checkpointing:
        checkpoint_layers(student)
    objective = make_objective(student, teachers, recipe, vocabulary)
    optimizer = make_optimizer(options)
    optimizer.init(student.trainable_parameters())
    counters = log.restore(student, optimizer, *averages)
    counters = Counters(**ranks.same_start(student, optimizer, averages, asdict(counters)))
    step_functions = make_step(objective, optimizer, recipe, masks)
    guard = Guard(recipe, log, origins)
    layers = len(student.layers) if objective.exits else 0
    deal = ranks.deal(recipe)
    if own is not None and counters.own:
        own.restore(counters.own)
    elif own is not None and own.needs_loss and validate is not None:
        own.validated(ranks.from_first(lambda: validate(student))["nll"])
        student.train()
    started = time.perf_counter() - counters.seconds

    for step in log.steps(counters.step + 1, options.steps):
        if recipe.student.dropout:
            seed_global(recipe.seed, f"dropout {ranks.rank}" if ranks.rank else "dropout", step)
        schedule = exit_schedule(recipe.objective, layers, step, options.steps)
        sums, seen = _accumulate(
            step, student, teachers, batches, recipe, step_functions, schedule, own, counters, deal
        )
        sums = ranks.total(sums)
        size, taken = step_functions.update(sums.gradients, sums.weight, sums.parts)
        for average in averages:
            average.follow(student, taken)
        # The one evaluation of a step: everything before it was only described, but own answers.
        moving = [one.weights for one in averages]
        mx.eval(student.state, optimizer.state, moving, sums[1:], size, taken, [one[2:] for one in seen])

        # From here on, `step` names the weights just made.
        if taken:
            counters.add(
                step,
                sums.parts,
                float(sums.weight),
                int(sums.counted),
                time.perf_counter() - started,
                float(sums.labels),
            )
        else:
            counters.skip(step, time.perf_counter() - started)
        guard.look(counters, seen, sums, size, float(optimizer.learning_rate))
        if own is not None and (warning := own.alarm.news()):
            log.say(warning)
        if every(options.log_every, step) or step == options.steps:
            log.metrics(counters, recipe, float(size), float(optimizer.learning_rate))
        if validate is not None and every(options.eval_every, step):
            measured = ranks.from_first(lambda: validate(student))
            log.validation(step, measured)
            if own is not None and own.validated(measured["nll"]):
                log.say(f"validation has become worse: {own.share:.0%} own rows from here on")
            student.train()
        if drift := ranks.keep_equal(step, options, student, optimizer, averages):
            log.say(drift)
        due = taken and every(options.save_every, step) and step < options.steps
        if (due or log.interrupts.number is not None) and ranks.rank == 0:
            counters.own = {} if own is None else own.state()
            guard.check_kept(step, student, optimizer, averages)
            log.save(student, optimizer, counters, *averages)
        log.interrupts.check()
    guard.check_kept(options.steps, student, optimizer, averages)
    student.eval()
    strip(student)
    return Trained(counters.tokens, counters.seconds)


def make_objective(
    student: nn.Module, teachers: Sequence[Teaches], recipe: Recipe, vocabulary: int
) -> Objective:
    """The objective of `recipe`, as its student and teachers allow it."""
    options = list(recipe.teachers.values()) if teachers else []
    whole = sum(one.weight for one in options)
    voices = [
        Voice(one.weight / whole, teacher.head, teacher.shared, one.top_k, one.tail)
        for teacher, one in zip(teachers, options, strict=True)
    ]
    terms = recipe.objective
    shown = [(i, t) for i, t in enumerate(teachers) if isinstance(t, LiveTeacher | CachedTeacher)]
    matching = None
    if any(MENU[name].family in ("hidden", "attention") for name in terms):
        shares = sum(voices[i].share for i, _ in shown)
        compared = [Compared(i, voices[i].share / shares, teacher.model) for i, teacher in shown]
        matching = Matching(terms, student, compared, recipe.seed)
    exits = {layer for term in exit_terms(terms).values() for layer in term.options["exits"]}
    return Objective(
        terms,
        student,
        vocabulary,
        voices,
        chunk=chunk_of(
            recipe.train.logits_mib,
            vocabulary,
            logits=1 + len(exits) + sum(voice.head is not None for voice in voices),
        ),
        temperature=recipe.temperature,
        matching=matching,
    )


class Sums(NamedTuple):
    """What the micro-batches of a step add up to."""

    gradients: Any
    parts: dict[str, mx.array]  # of each loss, in its unit
    weight: mx.array  # of the counted labels
    labels: mx.array  # of those in rows of the data, which losses on labels count
    counted: mx.array  # how many there are


def _accumulate(
    step: int,
    student: nn.Module,
    teachers: Sequence[Teaches],
    batches: HasBatches,
    recipe: Recipe,
    functions: Step,
    schedule: Schedule,
    own: OwnRows | None,
    counters: Counters,
    deal: Deal,
) -> tuple[Sums, list[Seen]]:
    """The micro-batches of a step, added up and one by one. What the student wrote is counted at once."""
    total: Any = None
    seen: list[Seen] = []
    count = recipe.train.micro_batches
    wrote = {}
    if own is not None:
        for index in range((step - 1) * count, step * count):
            written = wrote[index] = own.micro_batch(index, step, student)
            counters.add_own({"micro_batches": 1} | ({} if written is None else written.counts))
    for piece in deal.pieces(step):
        written = wrote.get(piece.micro_batch)
        batch = batches[piece.number] if written is None else piece.of(written.batch)
        weights = schedule
        if own is not None:
            weights = label_schedule(recipe.objective, schedule, own=written is not None)
        targets = [teacher.targets(batch) for teacher in teachers or [NoTeacher()]]
        gradients, parts = functions.gradients(batch, targets, weights)
        weight = batch.weights.sum(-1).sum()
        labels = weight if written is None else mx.zeros_like(weight)
        new = Sums(gradients, parts, weight, labels, batch.counted.sum())
        if deal.size > 1 and adds_nothing(batch):
            new = tree_map(mx.zeros_like, new)
        seen.append(Seen(batch, written is not None, new.parts, weight))
        total = new if total is None else tree_map(mx.add, total, new)
        if deal.each > 1:
            mx.eval(total)  # or the graphs of all micro-batches would be alive at once
    return total, seen


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is due; never, if `interval` is 0."""
    return interval > 0 and step % interval == 0
