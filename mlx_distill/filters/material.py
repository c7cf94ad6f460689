"""What filters look at beside the answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mlx_distill.data.rows import Row
from mlx_distill.options import Reasoning
from mlx_distill.progress import Progress, silent
from mlx_distill.reasoning import split
from mlx_distill.written import Written


class Material(NamedTuple):
    """What filters look at beside the answers."""

    held_out: Sequence[Row] = ()  # of `data.valid` and `data.test`
    nll: Callable[[Sequence[Written]], np.ndarray] | None = None  # mean nats a token under the teacher
    reasoning: Reasoning | None = None  # the marks around worked steps
    seconds: float = 5.0  # that the tests of one answer may take
    unsafe: bool = False  # run programs even where no sandbox can hold them
    progress: Progress = silent

    def split(self, one: Written) -> tuple[str, str]:
        """The worked steps of an answer, "" where there are none, and what it says behind them."""
        if self.reasoning is None:
            return "", one.text
        steps, answer = split(one.text, self.reasoning)
        return steps or "", answer

    def answer(self, one: Written) -> str:
        """What an answer says once its worked steps are over."""
        return self.split(one)[1]
