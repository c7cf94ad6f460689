"""A fault at every system call of a checkpoint write: what does the next process find?

    python benchmarks/checkpoint_faults.py

Linux only, through strace. A process saves a first checkpoint, marks the place, saves a second one and
removes the oldest, as the training loop does. One run is recorded; then, for each system call between the
marks, a run in which that call ends the process (SIGKILL, as when the power goes) or fails (ENOSPC: the drive
is full; EIO: it is broken). Afterwards another process reads what is there. Right is the first or the second
checkpoint, whole, and the second where the writer ended without a word; where the drive failed it says so and
exits with 75. Wrong is anything else: none that is whole, or one whose weights and counters are not of the
same step.

Nothing here pulls the plug: that data which was flushed is on the drive is the system's word.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("signal=KILL", "error=ENOSPC", "error=EIO")
# Calls that make or change what is on the drive; a failure of the others never comes from it.
WRITING = (
    *("open", "openat", "creat", "close", "write", "writev", "pwrite64", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat"),
    *("mkdir", "mkdirat", "rmdir"),
)

WRITER = """
import os, sys
from pathlib import Path
import mlx_distill
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
from mlx_distill import checkpoint
from mlx_distill.drive import resumable_if_full
from mlx_distill.errors import Stopped

SAVE
folder = Path(sys.argv[1])
student = nn.Linear(8, 8)
optimizer = optim.AdamW(1e-3)
optimizer.init(student.trainable_parameters())

def at(step):
    student.weight = mx.full((8, 8), float(step))
    student.bias = mx.full((8,), float(step))
    mx.eval(student.parameters(), optimizer.state)
    save(folder / f"step-{step:06d}", {"step": step})

def mark(name):
    try:
        os.stat(name)
    except OSError:
        pass

at(1)
mark("/mark-begin")
try:
    with resumable_if_full():
        at(2)
except Stopped as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
mark("/mark-end")
"""
ATOMIC = """
def save(folder, counters):
    checkpoint.save(folder, student, optimizer, counters)
    checkpoint.keep_newest(folder, "", 1)
"""
IN_PLACE = """
def save(folder, counters):  # the usual mistake: into the place where it is looked for
    from mlx.utils import tree_flatten
    folder = folder.with_name("step-000001")
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(student.trainable_parameters()))
    mx.save_safetensors(str(folder / "weights.safetensors"), weights)
    mx.save_safetensors(str(folder / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    checkpoint.write_manifest(folder, counters)
"""


class Call(NamedTuple):
    """A system call of the recorded run: its name, and the how manieth of that name it was in the process."""

    name: str
    number: int


class Found(NamedTuple):
    """What a fault left behind."""

    call: Call
    fault: str
    code: int  # with which the process ended; negative: the signal that ended it
    state: str  # "first", "second", or why neither

    @property
    def wrong(self) -> str | None:
        """What must not be; None where all is as it should be."""
        if self.state not in ("first", "second"):
            return self.state
        if self.fault == "signal=KILL":
            return None
        if self.code == 0:
            return (
                None
                if self.state == "second"
                else "it said that all is well, and the checkpoint is not there"
            )
        return None if self.code == 75 else f"it ended with {self.code}, not 75"


def calls(save: str = ATOMIC) -> list[Call]:
    """The system calls of a checkpoint write, in order, in the thread that writes."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        _write(Path(scratch) / "checkpoints", save, ["-o", str(log), "-e", "trace=all"])
        return between_marks(log.read_text(encoding="utf-8"))


def between_marks(log: str) -> list[Call]:
    """The calls between the two marks of a log of `strace -f`, numbered over all of their thread."""
    counts: Counter[tuple[str, str]] = Counter()
    found: list[Call] = []
    writer = None
    for line in log.splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match is None:
            continue  # the second half of a call that another thread's interrupted, or a signal
        thread, name = match.groups()
        counts[thread, name] += 1
        if "/mark-begin" in line:
            writer, found = thread, []
        elif "/mark-end" in line:
            return found
        elif thread == writer and name != "futex":  # waits of threads: their number differs from run to run
            found.append(Call(name, counts[thread, name]))
    raise ValueError("the log has no two marks")


def try_faults(faults: Sequence[str] = FAULTS, save: str = ATOMIC, every: int = 1) -> list[Found]:
    """What each fault at each system call leaves; of faults that only the drive causes, at calls that write.

    Args:
        every: only each `every`-th of them.
    """
    recorded = calls(save)
    wanted = [
        (fault, call)
        for fault in faults
        for call in recorded
        if fault == "signal=KILL" or call.name in WRITING
    ]
    return [_after(call, fault, save) for fault, call in wanted[::every]]


def unreadable_states() -> tuple[int, int]:
    """Faults that were tried, and how many left a state that is not right."""
    found = try_faults()
    return len(found), sum(one.wrong is not None for one in found)


def _after(call: Call, fault: str, save: str) -> Found:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        inject = f"inject={call.name}:{fault}:when={call.number}"
        code = _write(folder, save, ["-o", "/dev/null", "-e", f"trace={call.name}", "-e", inject])
        return Found(call, fault, code, state(folder))


def _write(folder: Path, save: str, how: list[str]) -> int:
    """The exit code of a process that saves twice."""
    command = ["strace", "-f", *how, sys.executable, "-c", WRITER.replace("SAVE", save), str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the same calls in every process
    return subprocess.run(command, capture_output=True, check=False, env=environment).returncode


def state(folder: Path) -> str:
    """Which one the newest checkpoint is, if it is whole and of one step; else what is wrong with it."""
    import mlx_distill  # noqa: F401 - before mlx

    # isort: split
    import mlx.core as mx

    from mlx_distill import checkpoint

    found = checkpoint.newest(folder, "")
    if found is None:
        return f"no checkpoint; {sorted(path.name for path in folder.iterdir())}"
    step = json.loads((found / checkpoint.MANIFEST).read_text(encoding="utf-8"))["counters"]["step"]
    weights: Any = mx.load(str(found / "weights.safetensors"))
    values = {float(value) for array in weights.values() for value in array.flatten().tolist()}
    if values != {float(step)}:
        return f"{found.name}: counters of step {step}, weights of {sorted(values)}"
    return {1: "first", 2: "second"}[step]


def available() -> str | None:
    """Why this cannot be tried here; None if it can."""
    if sys.platform != "linux":
        return "faults are injected by strace, which is Linux's"
    if shutil.which("strace") is None:
        return "no strace here"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "strace may not trace here"


def main() -> None:
    """Say what every fault left, and what the usual mistake would have."""
    why = available()
    if why is not None:
        raise SystemExit(why)
    for name, save in (("this package's writer", ATOMIC), ("a writer in place", IN_PLACE)):
        found = try_faults(save=save)
        wrong = [one for one in found if one.wrong is not None]
        print(f"{name}: {len(found)} faults, {len(wrong)} wrong states")
        for one in wrong if save == ATOMIC else ():
            print(f"  {one.fault} at {one.call.name} {one.call.number}: {one.wrong}")


if __name__ == "__main__":
    main()
