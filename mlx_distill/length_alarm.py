"""A word of warning when the answers that a student learns from run away."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mlx_distill.generate import Answer

RECENT = 64  # answers that are looked at


class LengthAlarm:
    """Watches the newest answers, and speaks once of each thing that goes wrong.

    Args:
        max_tokens: of an answer.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.recent: deque[tuple[int, bool]] = deque(maxlen=RECENT)  # length, finished
        self.first: float | None = None  # mean length of the first `RECENT`
        self.said: list[str] = []

    def add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.recent.append((len(answer.tokens), answer.finished))
            if self.first is None and len(self.recent) == RECENT:
                self.first = self._mean()

    def news(self) -> str | None:
        """A line, where more than half of the newest answers do not end, or they have more than doubled."""
        if self.first is None:
            return None
        unfinished = sum(not finished for _, finished in self.recent) / RECENT
        if unfinished > 0.5 and "unfinished" not in self.said:
            self.said.append("unfinished")
            return (
                f"{unfinished:.0%} of its last {RECENT} own answers do not end within "
                f"`generate.on_policy.max_tokens` {self.max_tokens}; raise it, or start from a student that "
                "has learned to end its answers"
            )
        if self._mean() > 2 * self.first and "longer" not in self.said:
            self.said.append("longer")
            return (
                f"its own answers have grown from {self.first:.0f} to {self._mean():.0f} tokens; lower "
                "`generate.on_policy.share` or `train.learning_rate` if they say no more than before"
            )
        return None

    def _mean(self) -> float:
        return fmean(length for length, _ in self.recent)

    def state(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "first": self.first, "said": list(self.said)}

    def restore(self, state: dict[str, Any]) -> None:
        self.recent.clear()
        self.recent.extend((length, finished) for length, finished in state["recent"])
        self.first, self.said = state["first"], list(state["said"])
