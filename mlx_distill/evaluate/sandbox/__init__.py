"""Runs programs that a model wrote, each where it can neither cheat nor harm nor hang.

    worker.py ── a server (child/server.py), started once ── a monitor, one a problem ── the program
                                                                                     └── its referee

Expected values never are in the program's process: plain values come back from it and are compared by the
caller (`Program`), or by a referee in a process of its own (`Refereed`). Neither an early exit, nor a printed
"passed", nor an object equal to everything makes a wrong program right. What each backend holds back:
docs/sandbox.md.
"""

from mlx_distill.evaluate.sandbox.backends import PROTECTING, backend, require
from mlx_distill.evaluate.sandbox.programs import Failed, Outcome, Program, Refereed, Runnable, Within
from mlx_distill.evaluate.sandbox.running import run

__all__ = [
    "PROTECTING", "Failed", "Outcome", "Program", "Refereed", "Runnable", "Within",
    "backend", "require", "run",
]  # fmt: skip
