"""The training loop: the one place that turns batches into a student.

Offline, live-teacher and plain training differ in the rows, the targets and the parameters that
move; the loop is the same. A step is one finished optimizer update.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_distill.data.batch import Batch, Batches, at_places, counted_places
from mlx_distill.errors import Diverged
from mlx_distill.keys import seed_global
from mlx_distill.losses import Targets
from mlx_distill.objective import objective
from mlx_distill.optimizer import clip, make_optimizer
from mlx_distill.recipe import Recipe
from mlx_distill.run import StageLog
from mlx_distill.student import checkpoint_layers
from mlx_distill.teacher import Teaches


class Trained(NamedTuple):
    """What a training run used up."""

    train_tokens: int  # counted labels seen, repeats included
    train_seconds: float


class Step(NamedTuple):
    """The two halves of a step, compiled apart so that micro-batches can be added up between them."""

    gradients: Callable[[Batch, Targets], tuple[Any, dict[str, mx.array]]]
    update: Callable[[Any, mx.array], mx.array]


def make_step(student: nn.Module, optimizer: Any, recipe: Recipe, vocabulary: int) -> Step:
    """Functions that compute and apply gradients of `recipe.objective`.

    `gradients(batch, targets)` gives sums over counted positions, to be added up; `update(sums,
    count)` divides once, clips, updates student and optimizer in place, and gives the norm.
    """

    def total(tokens: mx.array, places: mx.array, targets: Targets) -> tuple[mx.array, dict[str, mx.array]]:
        logits = at_places(student(tokens)[..., :vocabulary], places)
        return objective(recipe.objective, logits, targets, (places >= 0)[None])

    value_and_gradients = nn.value_and_grad(student, total)

    def gradients_at(tokens: mx.array, places: mx.array, targets: Targets) -> tuple[Any, dict[str, mx.array]]:
        (_, parts), sums = value_and_gradients(tokens, places, targets)
        return sums, parts

    def update(sums: Any, count: mx.array) -> mx.array:
        means = tree_map(lambda g: g / count.astype(g.dtype), sums)
        means, size = clip(means, recipe.train.clip)
        optimizer.update(student, means)
        return size

    if recipe.train.compile:
        # All that changes between calls is an input: weights, adapters, optimizer, and dropout's
        # random state, which a trace would otherwise freeze. `gradients` changes no weight, but
        # differentiating leaves tracers in the student, so its state is an output there too.
        random = [mx.random.state] if recipe.student.dropout else []
        read = [student.state, *random]
        gradients_at = mx.compile(gradients_at, inputs=read, outputs=read)
        changed = [student.state, optimizer.state]
        update = mx.compile(update, inputs=changed, outputs=changed)
    return Step(
        lambda batch, targets: gradients_at(batch.tokens, counted_places(batch), targets),
        update,
    )


def train(
    student: nn.Module,
    teacher: Teaches,
    batches: Batches,
    recipe: Recipe,
    vocabulary: int,
    log: StageLog,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Trained:
    """Train `student` in place for `recipe.train.steps` updates, from the last checkpoint on.

    Args:
        vocabulary: logits beyond it are cut.
        log: metrics, console, checkpoints and interrupts of this stage.
        validate: what to measure every `eval_every` steps.

    Raises:
        Diverged: the gradient is no finite number any more.
        Interrupted: a signal came; a checkpoint was saved.
    """
    options = recipe.train
    student.train()  # hybrid models choose kernels without a gradient in eval mode
    if options.gradient_checkpointing:
        checkpoint_layers(student)
    optimizer = make_optimizer(options)
    optimizer.init(student.trainable_parameters())
    counters = log.restore(student, optimizer)
    step_functions = make_step(student, optimizer, recipe, vocabulary)
    started = time.perf_counter() - counters.seconds

    for step in log.steps(counters.step + 1, options.steps):
        if recipe.student.dropout:
            seed_global(recipe.seed, "dropout", step)
        sums, parts, count = _accumulate(step, teacher, batches, options.micro_batches, step_functions)
        size = step_functions.update(sums, count)
        # The one evaluation of a step: everything before it was only described.
        mx.eval(student.state, optimizer.state, parts, count, size)

        # From here on, `step` names the weights just made.
        if not math.isfinite(float(size)):
            raise Diverged(
                f"{log.stage}: the gradient is not finite at step {step}; lower `train.learning_rate` "
                f"(now {options.learning_rate:g}) or raise `train.warmup`"
            )
        counters.add(step, parts, int(count), time.perf_counter() - started)
        if every(options.log_every, step) or step == options.steps:
            log.metrics(counters, recipe, float(size), float(optimizer.learning_rate))
        if validate is not None and every(options.eval_every, step):
            log.validation(step, validate(student))
            student.train()
        stopping = log.interrupts.number is not None
        if step < options.steps and (stopping or every(options.save_every, step)):
            log.save(student, optimizer, counters)
        log.interrupts.check()
    student.eval()
    return Trained(counters.tokens, counters.seconds)


def _accumulate(
    step: int, teacher: Teaches, batches: Batches, micro_batches: int, functions: Step
) -> tuple[Any, dict[str, mx.array], mx.array]:
    """Gradients, losses and counted labels of one step, each summed over its micro-batches."""
    total: Any = None
    for place in range(micro_batches):
        batch = batches[(step - 1) * micro_batches + place]
        sums, parts = functions.gradients(batch, teacher.targets(batch))
        new = (sums, parts, batch.counted.sum())
        total = new if total is None else tree_map(mx.add, total, new)
        if micro_batches > 1:
            mx.eval(total)  # or the graphs of all micro-batches would be alive at once
    return total


def every(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is due; never, if `interval` is 0."""
    return interval > 0 and step % interval == 0
