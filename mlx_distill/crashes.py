"""What MLX says when it ends a computation or the whole process, and what helps.

Some of these messages reach Python as a RuntimeError. On Metal most do not: an error of a finished command
buffer ends the process by SIGABRT (mlx#3224, mlx#3267), and only another process can read what it said.
"""

import re
import signal
from typing import NamedTuple

from mlx_distill.errors import DistillError


class Cause(NamedTuple):
    """Why MLX stopped, in words: `what` happened, and `remedies` to choose from."""

    what: str
    remedies: tuple[str, ...]
    helps_again: bool = True  # whether a new try may get further with nothing changed


LOWER = "lower `train.batch_tokens` or `train.logits_mib`"

_WATCHDOG = Cause(
    "macOS ended the work on the GPU, because it held up the display (mlx#3267)",
    (
        "let the display sleep and keep the Mac awake: --caffeinate, or `caffeinate -s` beside the run",
        "or start the run over SSH, with nobody logged in at the display",
        f"or {LOWER}, so that each piece of work is shorter",
        "some report that AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment helps",
    ),
)
_MEMORY = Cause(
    "out of memory",
    (
        f"{LOWER}, set `train.gradient_checkpointing: true`, take a teacher with `source: cache`, "
        "or close other programs",
    ),
)
_BUFFER = _MEMORY._replace(what="out of memory: one array is larger than the GPU takes", helps_again=False)

# The first that is found counts: what is said behind it is often a consequence.
_MESSAGES = (
    (r"CallbackErrorImpactingInteractivity|CallbackErrorTimeout|Caused GPU Timeout", _WATCHDOG),
    (r"Attempting to allocate \d+ bytes which is greater", _BUFFER),
    (
        r"CallbackErrorOutOfMemory|Insufficient Memory|[Oo]ut of memory|std::bad_alloc|"
        r"\[[\w:]*malloc\] (Unable to allocate|Resource limit)",
        _MEMORY,
    ),
)


def cause_of(text: str) -> Cause | None:
    """What a message of MLX, or all that a process wrote to stderr, says of its end; None: nothing known."""
    found = [(match.start(), cause) for form, cause in _MESSAGES if (match := re.search(form, text))]
    return min(found, key=lambda one: one[0])[1] if found else None


def cause_of_error(error: BaseException) -> Cause | None:
    """The same of an exception; ours, and those of other kinds than MLX raises, have none."""
    if isinstance(error, DistillError) or not isinstance(error, RuntimeError | MemoryError):
        return None
    return _MEMORY if isinstance(error, MemoryError) else cause_of(str(error))


def told(code: int) -> str:
    """How a process ended, from its return code as `subprocess` has it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
