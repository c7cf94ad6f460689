"""How much memory this process has in use, and keeps."""

import resource
import sys
from pathlib import Path

import mlx.core as mx

GIB = 2**30
KEPT = 2 << 30  # bytes of what was freed that the CPU's allocator keeps in a run; see `guards.limit_memory`


def memory_in_use() -> tuple[str, float]:
    """What is measured, and GiB of it; cheap enough for every step.

    On a GPU the peak of MLX's own counter. On the CPU, where MLX counts buffers that were never touched, the
    resident memory of the process: now ("memory") on Linux, its peak elsewhere.
    """
    if mx.default_device() == mx.gpu:
        return "peak", mx.get_peak_memory() / GIB
    now = resident("VmRSS")
    if now is not None:
        return "memory", now / GIB
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "peak", largest * (1 if sys.platform == "darwin" else 1024) / GIB


def resident(name: str, *, reset_peak: bool = False) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes, where Linux tells; None elsewhere."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
