"""Guards of the training loop: steps without finite numbers are not taken, and losses that jump are told.

A step whose loss or gradient is not finite leaves weights, optimizer and moving averages as they were, bit
for bit; the schedule of the learning rate, too, stands where it stood. Only the number of the step goes on,
and with it the batch. A spike changes nothing in the training; it is told with the rows that made it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_distill.counters import Counters
from mlx_distill.crashes import cause_of_error
from mlx_distill.diagnosis import (
    Seen,
    diagnosis,
    not_finite,
    sizes_of_layers,
    some,
    suspects,
    what_is_not_finite,
)
from mlx_distill.errors import Diverged, Stopped
from mlx_distill.options import Train
from mlx_distill.recipe import Recipe
from mlx_distill.resident import KEPT, memory_in_use
from mlx_distill.self_teacher import Average
from mlx_distill.stage_log import StageLog

RECENT = 64  # losses of finished steps that a new one is compared with
ENOUGH = 16  # of them, before the first one is
LEAST = 0.2  # nats a label above the median of a loss that is a spike
TOLD = 20  # skipped steps and spikes of a stage that are told one by one; all are counted
NAMED = 8  # rows that a line names


def is_finite(size: mx.array, parts: Mapping[str, mx.array]) -> mx.array:
    """Whether a gradient of this norm and the sums of all losses are finite: a scalar, not yet computed."""
    return mx.isfinite(mx.stack([size, *(part.astype(mx.float32) for part in parts.values())])).all()


def copied(tree: Any) -> Any:
    """The same arrays in containers of their own, which an update of the others leaves alone."""
    return tree_map(lambda array: array, tree)


def keep_unless(taken: mx.array, before: Any, tree: Any) -> None:
    """Put the arrays of `before` back into the dicts and lists of `tree`, in place, unless `taken`.

    In place, because a compiled function has captured these very containers. `taken` is an input of the
    computation: to ask for it on the host would split the step in two.
    """
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, mx.array):
            tree[key] = mx.where(taken, value, before[key])
        else:
            keep_unless(taken, before[key], value)


class Guard:
    """Looks at each finished step of a stage. What it must remember is in the counters, so in checkpoints.

    Args:
        origins: where each row of the batches stands, such as "train.jsonl:17"; empty: they are numbered.
    """

    def __init__(self, recipe: Recipe, log: StageLog, origins: Sequence[str] = ()):
        self.recipe, self.options, self.log, self.origins = recipe, recipe.train, log, origins
        self.most = recipe.train.skip_nonfinite  # steps in a row that may be skipped
        self._crowded = False  # more memory than `memory_gib` was told of

    def look(self, counters: Counters, seen: Sequence[Seen], sums: Any, size: mx.array, rate: float) -> None:
        """Tell what was unusual about the step that `counters` has just counted.

        Args:
            seen: its micro-batches, computed.
            sums: what they add up to, on all machines.
            size: norm of the gradient.
            rate: the learning rate.

        Raises:
            Diverged: more than `train.skip_nonfinite` steps in a row were not taken.
        """
        self._look_at_memory()
        if not counters.in_a_row:
            self._look_for_spike(counters, seen, sums)
            return
        if counters.skipped <= TOLD:
            bad, what = suspects(seen), what_is_not_finite(seen, not math.isfinite(float(size)))
            self.log.say(
                f"step {counters.step} is skipped: {what}; {self._where(bad)}{_last(counters.skipped)}"
            )
            self.log.event(counters.step, {"skipped": counters.skipped}, self._rows(bad))
        if counters.in_a_row > self.most:
            steps = "a step" if counters.in_a_row == 1 else f"{counters.in_a_row} steps in a row"
            gradients = sizes_of_layers(sums.gradients, sums.weight)
            lines = [
                f"{self.log.stage}: training diverged: {steps}, up to step {counters.step}, had no finite "
                f"numbers and changed nothing (`train.skip_nonfinite` {self.most})",
                f"where: {self._where(suspects(seen))}",
                *diagnosis(self.recipe, seen, gradients, rate, never=counters.skipped == counters.step),
            ]
            raise Diverged("\n".join(lines))

    def check_kept(self, step: int, student: nn.Module, optimizer: Any, averages: Sequence[Average]) -> None:
        """Refuse to keep numbers that are not finite: the last good checkpoint would be lost for them.

        A finite gradient can make such weights: by a learning rate that is far too high.

        Raises:
            Diverged: which are not.
        """
        weights = {"weights": student.trainable_parameters(), "moments of the optimizer": optimizer.state}
        for what, tree in (weights | {"moving averages": [one.weights for one in averages]}).items():
            if bad := not_finite(tree):
                raise Diverged(
                    f"{self.log.stage}: training diverged: {what} are not finite after step {step} "
                    f"({some(bad)}); they are not saved, and the last checkpoint stays; lower "
                    f"`train.learning_rate` (now {self.options.learning_rate:g}) or raise `train.warmup`"
                )

    def _look_for_spike(self, counters: Counters, seen: Sequence[Seen], sums: Any) -> None:
        loss, recent = self._loss(sums), counters.recent
        limit = spike_limit(recent, self.options.spike) if self.options.spike else None
        if limit is not None and loss > limit:
            counters.spikes += 1
            if counters.spikes <= TOLD:
                worst = max(seen, key=self._loss)
                self.log.say(
                    f"step {counters.step}: the loss {loss:.4g} is a spike, above {limit:.4g} (the median of "
                    f"{len(recent)} steps before is {median(recent):.4g}); {self._where([worst])}"
                    f"{_last(counters.spikes)}"
                )
                numbers = {"spike": loss, "spike_limit": limit, "spikes": counters.spikes}
                self.log.event(counters.step, numbers, self._rows([worst]))
        recent.append(loss)
        del recent[:-RECENT]

    def _loss(self, sums: Any) -> float:
        """The objective of a step or a micro-batch, in nats a counted label."""
        terms = self.recipe.objective
        return sum(terms[name].weight * float(x) for name, x in sums.parts.items()) / (
            float(sums.weight) or 1.0
        )

    def _look_at_memory(self) -> None:
        """Tell once of more memory than asked for: MLX keeps to its limit only where it can."""
        limit = self.options.memory_gib
        if limit is None or self._crowded:
            return
        how, gib = memory_in_use()
        if gib > limit:
            self._crowded = True
            self.log.say(
                f"{gib:.3g} GiB ({how}) are in use, more than `train.memory_gib` {limit:g}; lower "
                "`train.batch_tokens` or `train.logits_mib`, or set `train.gradient_checkpointing: true`"
            )

    def _where(self, seen: Sequence[Seen]) -> str:
        """The rows of micro-batches in words, behind the number of their counted tokens."""
        tokens = sum(int(one.batch.counted.sum()) for one in seen)
        rows = self._rows(seen)
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        return f"{tokens} tokens of {', '.join(rows[:NAMED])}{more}"

    def _rows(self, seen: Sequence[Seen]) -> list[str]:
        """Where the rows of micro-batches stand."""
        found: list[str] = []
        for one in seen:
            if one.own:
                found.append(f"{one.batch.tokens.shape[0]} rows that the student wrote")
            else:
                found += [self.origins[i] if self.origins else f"row {i}" for i in one.batch.rows]
        return list(dict.fromkeys(found))


def spike_limit(recent: Sequence[float], spike: float) -> float | None:
    """Above which loss a step is a spike: so many deviations above the median of the losses before it.

    The deviation is 1.4826 times the median distance from the median, which for normal noise is the standard
    deviation, and which neither a spike nor a slow fall moves much; at least 1 % of the median, and all of
    them 0.2 nats a label: where losses hardly differ, or are nearly nothing, any noise would be a spike. None
    while there are too few.
    """
    if len(recent) < ENOUGH:
        return None
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return middle + max(spike * max(deviation, 0.01 * abs(middle)), LEAST)


def limit_memory(options: Train) -> None:
    """Tell MLX how much it may take: it then empties its cache, and waits for work before it begins more.

    A quarter of it may be memory that was freed and is kept for reuse. The wired limit stays as it is
    all through a run: raising it has brought down whole Macs (mlx#3186, mlx#3346).
    """
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(KEPT)  # MLX's own, 32 MiB, maps and unmaps memory at every step
    if options.memory_gib is not None:
        limit = int(options.memory_gib * 2**30)
        mx.set_memory_limit(limit)
        before = mx.set_cache_limit(limit // 4)
        mx.set_cache_limit(min(before, limit // 4))


@contextmanager
def resumable_if_mlx_stops(stage: str) -> Iterator[None]:
    """Turn the end of the memory, or of macOS's patience, into `Stopped`.

    Raises:
        Stopped: in one line, with what to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause = cause_of_error(error)
        if cause is None:
            raise
        raise Stopped(f"{stage}: {cause.what}; {'; '.join(cause.remedies)}; then go on") from error


def _last(count: int) -> str:
    return "" if count < TOLD else "; from here on they are only counted"
