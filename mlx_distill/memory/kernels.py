"""What MLX holds beside the arrays that a formula names: few constants, for the CPU and for a GPU.

Those of the CPU are fitted to the resident memory of processes of their own (docs/memory.md). There the
allocator keeps what was freed, up to `KEPT` bytes, in case an array of the same size comes again; that too is
memory that the process has and nobody else. MLX's counter, by which a GPU is measured, knows of living arrays
alone: the constants of `GPU` are fitted to that counter on the CPU and then follow from what Metal fuses.
They were not measured there.
"""

from typing import NamedTuple

import mlx.core as mx

KEPT = 2 << 30  # bytes that the CPU's allocator keeps of what was freed; see `pipeline.run`

Layer = tuple[float, float, float]  # multiples of a layer's attention of all heads, feed-forward, and width


class Kernels(NamedTuple):
    """Multiples of what they name, but for `base`."""

    base: float  # bytes of the process beside its arrays
    update: float  # of the weights that move: what an update holds beside weights, gradients and moments
    update_apart: float  # the same where gradients of micro-batches are summed up before it begins
    largest: float  # of the largest array that moves: what guards of an update hold beside all of it
    kept: float  # of what a layer's formula says is kept for the backward pass
    norms: int  # of a layer's width: what its two norms keep, and the sums before them
    passing: Layer  # of the layer at work, forward and backward
    teaching: Layer  # of a live teacher's, beside them
    reading: Layer  # of a model that only reads
    loss: float  # arrays of (places, vocabulary), of a loss on the student's logits alone
    divergence: float  # and of each of the two of a loss that a live teacher's logits stand beside
    measuring: float  # such arrays of a model that is measured
    comparing: float  # and of one that is compared with its teacher
    storing: float  # and of one whose likeliest tokens are stored
    drawing: float  # arrays of (rows, vocabulary) while answers are written
    written: float  # copies of the keys and values of these answers
    freed: float  # of what work of another size took and the allocator keeps; 0: it keeps nothing


CPU = Kernels(
    base=40 * 2**20,
    update=3.8,
    update_apart=2.2,
    largest=2.8,
    kept=0.874,
    norms=6,
    passing=(4.1, 5.9, 10.2),
    teaching=(4.6, 4.0, 0.0),
    reading=(0.3, 2.9, 22.7),
    loss=5.0,
    divergence=6.2,
    measuring=3.3,
    comparing=14.4,
    storing=3.7,
    drawing=6.0,
    written=1.5,
    freed=0.95,
)

# Metal trains with the same attention as the CPU, in parts (MLX's scaled_dot_product_attention.cpp,
# `use_fallback`: faster), so the student's is counted; a teacher only reads, and its attention is one kernel.
# A norm is one kernel in both directions, and keeps what it reads and what it gives.
GPU = CPU._replace(
    base=0,
    update=0.9,
    update_apart=1.0,
    largest=1.3,
    norms=4,
    passing=(2.6, 2.2, 6.3),
    teaching=(0.0, 0.9, 5.7),
    reading=(0.0, 2.6, 15.2),
    loss=3.3,
    divergence=3.4,
    measuring=3.3,
    comparing=11.0,
    drawing=4.0,
    written=1.5,
    freed=0.0,
)


def kernels() -> Kernels:
    """Those of the device on which MLX computes."""
    return GPU if mx.default_device() == mx.gpu else CPU
