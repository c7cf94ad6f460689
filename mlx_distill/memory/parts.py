"""What is in memory at once, part by part."""

from typing import NamedTuple


class Parts(NamedTuple):
    """Bytes, or GiB, of each part. What is not there takes 0."""

    teachers: float = 0.0  # weights
    student: float = 0.0  # weights
    optimizer: float = 0.0  # gradients and moments, and what an update holds beside them
    activations: float = 0.0  # of every model's layers; keys and values; what was freed and is kept
    logits: float = 0.0  # of a chunk or a batch, and losses on them
    process: float = 0.0  # beside all arrays

    @property
    def together(self) -> float:
        return sum(self)

    def over(self, unit: float) -> "Parts":
        """The same in another unit."""
        return Parts(*(one / unit for one in self))
