"""The training loop: the one place that turns batches into a student.

Offline, live-teacher and plain training differ in the rows, the targets and the parameters that
move; the loop is the same. A step is one finished optimizer update.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_distill.cache.reader import CachedTeacher
from mlx_distill.data.batch import Batch, counted_places, place_weights
from mlx_distill.errors import Diverged
from mlx_distill.keys import seed_global
from mlx_distill.losses import Targets
from mlx_distill.losses.menu import MENU
from mlx_distill.matching import Compared, Matching, strip
from mlx_distill.objective import Objective, Schedule, Voice, exit_schedule, exit_terms, label_schedule
from mlx_distill.on_policy import OwnRows
from mlx_distill.optimizer import clip, make_optimizer
from mlx_distill.prune.sparse import masked
from mlx_distill.recipe import Recipe
from mlx_distill.run import Counters, StageLog
from mlx_distill.self_teacher import Average
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import LiveTeacher, NoTeacher, Teaches

# Float32 arrays over the vocabulary that a chunk of forward_kl holds at once, for each distribution: logits,
# probabilities, and gradients of both. From benchmarks/losses_bench.py; others hold more.
COPIES = 4.5


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
    update: Callable[[Any, mx.array], mx.array]


def make_step(
    objective: Objective, optimizer: Any, recipe: Recipe, masks: Mapping[str, mx.array] | None = None
) -> Step:
    """Functions that compute and apply gradients of `objective` by the weights of its student.

    `gradients(batch, targets, schedule)` gives sums over counted positions, to be added up;
    `update(sums, weight)` divides once, clips, updates student and optimizer in place, and gives the norm.

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

    def update(sums: Any, weight: mx.array) -> mx.array:
        means = tree_map(lambda g: g / weight.astype(g.dtype), masked(sums, masks or {}))
        means, size = clip(means, recipe.train.clip)
        optimizer.update(student, means)
        return size

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


def chunk_of(logits_mib: int, vocabulary: int, *, logits: int) -> int:
    """Places at a time: as many as `train.logits_mib` holds, 16 at least.

    A power of two, and from 128 on a multiple of 128, as the number of counted places is: an odd last chunk
    could not take over the memory of the others.

    Args:
        logits: how many distributions over the vocabulary a place has at once: the student's, one of each
            exit, and one of each live teacher.
    """
    places = int(logits_mib * 2**20 / (vocabulary * 4 * COPIES * logits))
    return places // 128 * 128 if places >= 128 else max(16, 2 ** (max(1, places).bit_length() - 1))


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

    Raises:
        Diverged: the gradient is no finite number any more.
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
    step_functions = make_step(objective, optimizer, recipe, masks)
    layers = len(student.layers) if objective.exits else 0
    if own is not None and counters.own:
        own.restore(counters.own)
    elif own is not None and own.needs_loss and validate is not None:
        own.validated(validate(student)["nll"])
        student.train()
    started = time.perf_counter() - counters.seconds

    for step in log.steps(counters.step + 1, options.steps):
        if recipe.student.dropout:
            seed_global(recipe.seed, "dropout", step)
        schedule = exit_schedule(recipe.objective, layers, step, options.steps)
        sums = _accumulate(step, student, teachers, batches, recipe, step_functions, schedule, own, counters)
        size = step_functions.update(sums.gradients, sums.weight)
        for average in averages:
            average.follow(student)
        # The one evaluation of a step: everything before it was only described, but own answers.
        mx.eval(student.state, optimizer.state, [one.weights for one in averages], sums[1:], size)

        # From here on, `step` names the weights just made.
        if not math.isfinite(float(size)):
            raise Diverged(
                f"{log.stage}: the gradient is not finite at step {step}; lower `train.learning_rate` "
                f"(now {options.learning_rate:g}) or raise `train.warmup`"
            )
        counters.add(
            step,
            sums.parts,
            float(sums.weight),
            int(sums.counted),
            time.perf_counter() - started,
            float(sums.labels),
        )
        if own is not None and (warning := own.alarm.news()):
            log.say(warning)
        if every(options.log_every, step) or step == options.steps:
            log.metrics(counters, recipe, float(size), float(optimizer.learning_rate))
        if validate is not None and every(options.eval_every, step):
            measured = validate(student)
            log.validation(step, measured)
            if own is not None and own.validated(measured["nll"]):
                log.say(f"validation has become worse: {own.share:.0%} own rows from here on")
            student.train()
        stopping = log.interrupts.number is not None
        if step < options.steps and (stopping or every(options.save_every, step)):
            counters.own = {} if own is None else own.state()
            log.save(student, optimizer, counters, *averages)
        log.interrupts.check()
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
) -> Sums:
    """The micro-batches of a step. What the student wrote for them is counted at once."""
    total: Any = None
    count = recipe.train.micro_batches
    for index in range((step - 1) * count, step * count):
        written = None if own is None else own.micro_batch(index, step, student)
        batch = batches[index] if written is None else written.batch
        weights = schedule
        if own is not None:
            weights = label_schedule(recipe.objective, schedule, own=written is not None)
            counters.add_own({"micro_batches": 1} | ({} if written is None else written.counts))
        targets = [teacher.targets(batch) for teacher in teachers or [NoTeacher()]]
        gradients, parts = functions.gradients(batch, targets, weights)
        weight = batch.weights.sum(-1).sum()
        labels = weight if written is None else mx.zeros_like(weight)
        new = Sums(gradients, parts, weight, labels, batch.counted.sum())
        total = new if total is None else tree_map(mx.add, total, new)
        if count > 1:
            mx.eval(total)  # or the graphs of all micro-batches would be alive at once
    return total


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is due; never, if `interval` is 0."""
    return interval > 0 and step % interval == 0
