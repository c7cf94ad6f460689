"""The teacher: makes the targets that losses see. Its weights never change."""

from typing import Any, Protocol

import mlx.core as mx

from mlx_distill.data.batch import Batch, at_places, counted_places
from mlx_distill.errors import ModelError
from mlx_distill.losses import Targets
from mlx_distill.models import Loaded


class Teaches(Protocol):
    """Whatever gives targets for the counted places of a batch."""

    def targets(self, batch: Batch) -> Targets: ...


class LiveTeacher:
    """A teacher that runs on every batch.

    Args:
        loaded: the model; it is frozen here.
        vocabulary: real size of the tokenizer. Rows beyond it are padding of the matrix, differ
            between models of one family, and are cut before any softmax.
    """

    def __init__(self, loaded: Loaded, vocabulary: int):
        self.model, self.vocabulary = loaded.model, vocabulary
        self.model.freeze()
        self.model.eval()
        # Compiled once a shape. Its weights are inputs, not constants baked into each trace.
        self.logits = mx.compile(self._logits, inputs=[self.model.state])
        self._logits_at = mx.compile(
            lambda tokens, places: at_places(self._logits(tokens), places), inputs=[self.model.state]
        )

    def _logits(self, tokens: mx.array) -> mx.array:
        """(B, T, V) over the real vocabulary, in the model's own float type."""
        return self.model(tokens)[..., : self.vocabulary]

    def targets(self, batch: Batch) -> Targets:
        """Labels and the teacher's logits, in its own float type and without a gradient."""
        places = counted_places(batch)
        logits = mx.stop_gradient(self._logits_at(batch.tokens, places))
        return Targets(at_places(batch.labels, places), logits)


class NoTeacher:
    """Labels alone: plain training, and the baseline."""

    def targets(self, batch: Batch) -> Targets:
        return Targets(at_places(batch.labels, counted_places(batch)))


def check_same_vocabulary(student: Any, teacher: Any) -> int:
    """Compare the id-to-token maps of two tokenizers, not their sizes.

    Returns:
        the real size of the shared vocabulary: largest id + 1.

    Raises:
        ModelError: a token has another id, or exists on one side only.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        token = different[0]
        raise ModelError(
            f"the student's tokenizer differs from the teacher's in {len(different)} tokens, such as "
            f"{token!r} "
            f"(id {ours.get(token)} in the student, {theirs.get(token)} in the teacher); "
            "logits can only be compared over one vocabulary: choose a student of the teacher's family"
        )
    return max(ours.values()) + 1
