"""How much memory this process has in use."""

import resource
import sys

import mlx.core as mx

from mlx_distill.peak import GIB, resident


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
