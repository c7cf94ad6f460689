"""Runs many programs at once, and keeps their order."""

import contextlib
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mlx_distill.evaluate.sandbox import backends
from mlx_distill.evaluate.sandbox.programs import Outcome, Runnable
from mlx_distill.evaluate.sandbox.worker import Worker
from mlx_distill.progress import Progress, silent

MOST_WORKERS = 8  # each may hold two gibibytes


def run(
    programs: Sequence[Runnable],
    *,
    seconds: float,
    workers: int | None = None,
    unsafe: bool = False,
    progress: Progress = silent,
) -> list[Outcome]:
    """What each program's calls return, or how its tests went, in the order given.

    Args:
        seconds: wall time of one program with all of its calls or tests.
        workers: programs that run at once; None: one a core, at most `MOST_WORKERS`.
        unsafe: run them even where nothing holds them.

    Raises:
        SandboxError: nothing on this machine holds programs, and not `unsafe`.
        Fault: this machine runs no child process at all.
    """
    kind = backends.require(unsafe)
    if workers is None:
        workers = min(backends.cores(), MOST_WORKERS)
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, progress("programs", len(programs), "programs") as advance:
        for _ in range(min(workers, len(programs))):
            idle.put(stack.enter_context(Worker(kind)))

        def one(program: Runnable) -> Outcome:
            worker = idle.get()
            try:
                return worker.run(program, seconds)
            finally:
                idle.put(worker)

        outcomes = []
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            try:
                for outcome in pool.map(one, programs):
                    outcomes.append(outcome)
                    advance(1)
            except BaseException:  # Ctrl-C: do not run the rest first
                pool.shutdown(cancel_futures=True)
                raise
    return outcomes
