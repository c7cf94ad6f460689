"""Where a training run stands: what its steps add up to, between two lines of metrics and over all of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_distill.losses.menu import MENU
from mlx_distill.recipe import Recipe


@dataclass
class Counters:
    """Plain values; a checkpoint keeps them."""

    step: int = 0
    tokens: int = 0  # counted labels so far
    seconds: float = 0.0  # spent in the loop, over all resumptions
    window_tokens: int = 0  # counted labels since the last line of metrics
    window_seconds: float = 0.0
    window_weight: float = 0.0  # of these labels; their number where no row has a weight of its own
    window_losses: dict[str, float] = field(default_factory=dict)  # weighted sums in nats over these labels
    window_labels: float = 0.0  # weight of the labels that losses on labels count
    window_own: dict[str, int] = field(default_factory=dict)  # what an on-policy student wrote
    own: dict[str, Any] = field(default_factory=dict)  # state of `OwnRows`, when a checkpoint was made
    skipped: int = 0  # steps that were not taken, as their loss or gradient was not finite
    in_a_row: int = 0  # of them, the newest
    spikes: int = 0  # steps whose loss jumped
    recent: list[float] = field(default_factory=list)  # losses of the newest steps, by which one is a spike

    def add(
        self,
        step: int,
        losses: dict[str, mx.array],
        weight: float,
        tokens: int,
        seconds: float,
        labels: float | None = None,
    ) -> None:
        """Add up a step.

        Args:
            seconds: since the first step.
            labels: weight of the labels in rows of the data; None: all of `weight`.
        """
        self._pass(step, seconds)
        self.in_a_row = 0
        self.tokens += tokens
        self.window_tokens += tokens
        self.window_weight += weight
        self.window_labels += weight if labels is None else labels
        for name, nats in losses.items():
            self.window_losses[name] = self.window_losses.get(name, 0.0) + float(nats)

    def skip(self, step: int, seconds: float) -> None:
        """Count a step from which nothing was learned."""
        self._pass(step, seconds)
        self.skipped += 1
        self.in_a_row += 1

    def _pass(self, step: int, seconds: float) -> None:
        self.window_seconds += seconds - self.seconds
        self.step, self.seconds = step, seconds

    def add_own(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.window_own[name] = self.window_own.get(name, 0) + count

    def means(self, recipe: Recipe) -> tuple[float, dict[str, float]]:
        """The objective and each of its losses, in nats a label that it counts; none without such a label."""
        weights = {
            name: self.window_labels if MENU[name].on_labels else self.window_weight
            for name in self.window_losses
        }
        losses = {name: nats / weights[name] for name, nats in self.window_losses.items() if weights[name]}
        whole = sum(recipe.objective[name].weight * nats for name, nats in self.window_losses.items())
        return whole / (self.window_weight or 1.0), losses

    def own_means(self) -> dict[str, float]:
        """Share of the micro-batches that the student wrote; length and unfinished share of new answers."""
        counts = self.window_own
        means = {"own_share": counts.get("own", 0) / counts["micro_batches"]} if counts else {}
        if counts.get("answers"):
            means["own_length"] = counts["tokens"] / counts["answers"]
            means["own_unfinished"] = counts["unfinished"] / counts["answers"]
        return means

    def close_window(self) -> None:
        self.window_tokens, self.window_seconds, self.window_weight, self.window_losses = 0, 0.0, 0.0, {}
        self.window_labels, self.window_own = 0.0, {}
