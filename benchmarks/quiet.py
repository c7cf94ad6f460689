"""A stage log for benchmarks that train without a run folder."""

from typing import Any

from mlx_distill.counters import Counters
from mlx_distill.interrupt import Interrupts


class Quiet:
    """As much of `StageLog` as `train` asks for; it keeps nothing and says nothing."""

    stage, interrupts = "student", Interrupts()

    def steps(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def restore(self, *_: Any) -> Counters:
        return Counters()

    def metrics(self, counters: Counters, *_: Any) -> None:
        counters.close_window()

    def save(self, *_: Any) -> None: ...

    def say(self, line: str) -> None: ...
