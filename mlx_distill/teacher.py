"""The teacher: makes the targets that losses see. Its weights never change."""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_distill.data.batch import Batch, at_places, counted_places
from mlx_distill.data.vocabularies import Shared
from mlx_distill.errors import ModelError
from mlx_distill.losses import Targets
from mlx_distill.models import Loaded
from mlx_distill.models.divided import together_of
from mlx_distill.models.head import Head
from mlx_distill.models.taps import tapped


class Teaches(Protocol):
    """Whatever gives targets for the counted places of a batch."""

    @property
    def head(self) -> Head | None:
        """What makes logits of the last hidden states in its targets; None where these hold none."""
        ...

    @property
    def shared(self) -> Shared | None:
        """The tokens it shares with the student, if its tokenizer is another; else None."""
        ...

    def targets(self, batch: Batch) -> Targets: ...


class Layers(NamedTuple):
    """Which layers of a model the losses look into, by number; 0 is what the first layer reads."""

    hidden: Collection[int] = ()
    attention: Collection[int] = ()


class LiveTeacher:
    """A teacher that runs on every batch.

    Args:
        loaded: the model; it is frozen here.
        vocabulary: real size of the tokenizer. Rows beyond it are padding of the matrix, differ
            between models of one family, and are cut before any softmax.
        layers: whose hidden states and attention become targets, beside the last.
    """

    shared = None

    def __init__(self, loaded: Loaded, vocabulary: int, layers: Layers | None = None):
        self.model, self.vocabulary, self.layers = loaded.model, vocabulary, layers or Layers()
        self.model.freeze()
        self.model.eval()
        self.head: Head = Head(self.model, vocabulary)
        # Compiled once a shape. Its weights are inputs, not constants baked into each trace.
        self.logits, self._seen = self._logits, self._look
        if together_of(self.model) is not None:  # each of its calls is told to other processes
            return
        self.logits = mx.compile(self._logits, inputs=[self.model.state])
        if not self.layers.attention:  # what attention is made of has parts that are no arrays
            self._seen = mx.compile(self._look, inputs=[self.model.state])

    def _logits(self, tokens: mx.array) -> mx.array:
        """(B, T, V) over the real vocabulary, in the model's own float type."""
        return self.model(tokens)[..., : self.vocabulary]

    def _look(
        self, tokens: mx.array, places: mx.array
    ) -> tuple[mx.array, dict[str, mx.array], dict[str, Any]]:
        """The last hidden state and those of `layers` at the places, and attention over whole rows."""
        with tapped(self.model, hidden=self.layers.hidden, attention=self.layers.attention) as seen:
            last = self.head.hidden(tokens)
        hidden = {str(layer): at_places(states, places) for layer, states in seen.hidden.items()}
        return at_places(last, places), hidden, {str(layer): a for layer, a in seen.attention.items()}

    def targets(self, batch: Batch) -> Targets:
        """Labels, and what the teacher sees of them, in its own float type and without a gradient.

        No logits: they are made chunk by chunk, where the losses read them.
        """
        places = counted_places(batch)
        last, hidden, attention = self._seen(batch.tokens, places)
        return Targets(
            at_places(batch.labels, places),
            last=mx.stop_gradient(last),
            hidden={layer: mx.stop_gradient(states) for layer, states in hidden.items()},
            attention=attention,
        )


class NoTeacher:
    """Labels alone: plain training, and the baseline."""

    head = shared = None

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
            "logits can only be compared over one vocabulary: choose a student of the teacher's family, "
            "or the loss `cross_tokenizer`"
        )
    return max(ours.values()) + 1
