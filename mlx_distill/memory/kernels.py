"""What MLX holds beside the arrays that a formula names: few constants, for the CPU and for a GPU.

Those of the CPU are fitted to the resident memory of processes of their own (docs/memory.md). There the
allocator keeps what was freed, up to `KEPT` bytes, in case an array of the same size comes again; that too is
memory that the process has and nobody else. MLX's counter, by which a GPU is measured, knows of living arrays
alone: the constants of `GPU` are fitted to that counter on the CPU and then follow from what Metal fuses.
They were not measured there.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_distill.resident import KEPT


class Kernels(NamedTuple):
    """Multiples of what they name, but for `base` and `keeps`."""

    base: float  # bytes of the process beside its arrays
    keeps: float  # bytes that the allocator keeps of what was freed, at most; 0: it keeps nothing
    update: float  # of the weights that move: what an update holds beside weights, gradients and moments
    update_apart: float  # the same where gradients of micro-batches are summed up before it begins
    largest: float  # of the largest array that moves: what guards of an update hold beside all of it
    kept: float  # of what a layer's formula says is kept for the backward pass
    passing: float  # of the same: what the layer at work holds beside it, forward and backward
    reading: tuple[float, float, float]  # of attention, feed-forward and width of a model that only reads
    logits: float  # of the arrays of (places, vocabulary) that losses hold, as `work.py` counts them
    scoring: tuple[
        float, float
    ]  # arrays of (tokens, vocabulary) and (places, vocabulary): how likely labels are
    measuring: float  # arrays of (tokens, vocabulary) of a model that is measured
    comparing: float  # and of one that is compared with its teacher
    storing: float  # arrays of (places, vocabulary) of one whose likeliest tokens are stored
    left_over: float  # one more of these, of each model, where the vocabulary is no whole number of blocks
    drawing: float  # arrays of (rows, vocabulary) while answers are written
    written: float  # copies of the keys and values of these answers


CPU = Kernels(
    base=15 * 2**20,
    keeps=KEPT,
    update=3.3,
    update_apart=2.4,
    largest=2.3,
    kept=0.92,
    passing=1.7,
    reading=(1.0, 1.9, 20.0),
    logits=1.0,
    scoring=(1.2, 3.1),
    measuring=2.2,
    comparing=9.5,
    storing=3.0,
    left_over=1.0,
    drawing=6.0,
    written=1.5,
)

# Metal trains with the same attention as the CPU, in parts (MLX's scaled_dot_product_attention.cpp,
# `use_fallback`: faster), so the student's is counted; a model that only reads has it in one kernel.
GPU = CPU._replace(
    base=0,
    keeps=0,
    update=0.9,
    update_apart=1.0,
    largest=1.3,
    passing=1.0,
    reading=(0.0, 1.9, 20.0),
    logits=0.85,
    comparing=9.0,
    drawing=4.0,
)


def kernels() -> Kernels:
    """Those of the device on which MLX computes."""
    return GPU if mx.default_device() == mx.gpu else CPU
