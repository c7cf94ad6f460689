"""A model taken apart into layers, and answers that leave it before the last one.

`Stack` runs the layers of an mlx-lm model a few at a time, and refuses a model for which that does not
give the model's own logits, bit for bit. Layers are numbered 1 to L; layer n is the output of the n-th.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.errors import ModelError
from mlx_distill.losses.exits import check_exits
from mlx_distill.models.head import Head
from mlx_distill.models.taps import tapped

_ALL = 1 << 30  # more rows than any vocabulary has: mlx-lm's own decoding cuts none either
_PROBE = [[0, 1, 2], [1], [2, 0]]  # as in decoding: a prompt, one token, several tokens behind others
_PREFILL = 2048  # positions at once, as in mlx-lm, so that prompts are read in the same pieces


class _Parts(NamedTuple):
    backbone: nn.Module  # embedding, layers and norm
    layers: str  # its name of the list of layers
    norm: str  # its name of the final norm
    head: Head


class Stack:
    """A model as embedding, layers, norm and head, for one sequence that need not go all the way up.

    The model must stay as it is: weights may move, but modules must not be replaced.

    Raises:
        ModelError: with the model's type: where a cache cannot take tokens back (sliding windows,
            state-space layers), or calling the layers one after another gives other logits.
    """

    def __init__(self, model: nn.Module):
        from mlx_lm.models.cache import KVCache

        model.eval()
        parts = _parts(model)
        self.model = model
        self.layers: list[nn.Module] = list(parts.backbone[parts.layers])
        self._norm, self._head = parts.backbone[parts.norm], parts.head
        # The model's own code embeds: some scale what they embed, some add positions.
        self._embedding = copy.copy(parts.backbone)
        setattr(self._embedding, parts.layers, [])
        setattr(self._embedding, parts.norm, lambda hidden: hidden)
        caches = self.caches()
        if len(caches) != len(self.layers) or any(type(cache) is not KVCache for cache in caches):
            kinds = " and ".join(sorted({type(cache).__name__ for cache in caches}))
            raise _refusal(model, f"its caches ({kinds}) cannot take tokens back")
        self._mask_as_array = False
        reason = self._difference()
        if reason is not None:
            self._mask_as_array = True  # as layers want it that cap their attention scores themselves
            if self._difference() is not None:
                raise _refusal(model, reason)

    def caches(self) -> list[Any]:
        """Empty key and value caches, one a layer."""
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def embed(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """What the first layer reads, (B, T, D), of tokens (B, T) that follow what `caches` hold."""
        return self._embedding(tokens, cache=caches)

    def run(self, hidden: mx.array, caches: list[Any], below: int, top: int) -> mx.array:
        """Layers below + 1 to top over the output of layer `below` (0: of `embed`), both (B, T, D)."""
        from mlx_lm.models.base import create_attention_mask

        mask = create_attention_mask(hidden, caches[below], return_array=self._mask_as_array)
        for layer, cache in zip(self.layers[below:top], caches[below:top], strict=True):
            hidden = layer(hidden, mask, cache=cache)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (B, T, V) of any layer's output, through the final norm and the head."""
        return self._head.logits(self._norm(hidden))

    def _difference(self) -> str | None:
        """What tells the layers, called one after another, from the model; None if nothing does."""
        theirs, ours = self.caches(), self.caches()
        try:
            for piece in _PROBE:
                tokens = mx.array([piece])
                hidden = self.run(self.embed(tokens, ours), ours, 0, len(self.layers))
                if not mx.array_equal(self.logits(hidden), self.model(tokens, cache=theirs)).item():
                    return "called one by one, its layers give other logits"
        except Exception as error:  # architectures raise whatever their layers raise when called otherwise
            return f"its layers are called in another way ({error})"
        return None


def most_likely(logits: mx.array) -> mx.array:
    """Greedy tokens (...) of logits (..., V), the very ones of mlx-lm.

    It takes the argmax of log-probabilities in the model's own type. In half precision the subtraction
    rounds close logits to ties, of which the lowest id wins, so the argmax of logits is not the same.
    """
    return mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)


class Passage:
    """One sequence on its way up, with what waits at exits until it is needed higher.

    What a layer reads of earlier positions is their state at that very layer, so a position that left at
    an exit must still go through the layers above, before any later position does. It waits at the exit,
    and goes on together with all that wait there: nothing is approximated (LayerSkip, section 4.3, calls
    the kept states its exit query cache).

    Args:
        exits: layers at which positions may wait, from low to high; none for the whole way at once.
    """

    def __init__(self, stack: Stack, exits: Sequence[int]):
        if exits:
            check_exits(exits, len(stack.layers))
        self.stack, self.caches = stack, stack.caches()
        self._pieces = list(pairwise([0, *exits, len(stack.layers)]))
        self._waiting: list[list[mx.array]] = [[] for _ in self._pieces]

    def enter(self, tokens: mx.array) -> mx.array:
        """Take tokens (1, n) up to the first exit; their hidden states there, (1, n, D)."""
        self._waiting[0].append(self.stack.embed(tokens, self.caches))
        return self.climb(0)

    def climb(self, piece: int) -> mx.array:
        """Take all that wait below a piece through it: 0 ends at the first exit, 1 at the next, ...

        Returns:
            (1, n, D) at its upper end, the newest position last.
        """
        waiting = self._waiting[piece]
        hidden = waiting[0] if len(waiting) == 1 else mx.concatenate(waiting, axis=1)
        hidden = self.stack.run(hidden, self.caches, *self._pieces[piece])
        self._waiting[piece] = []
        if piece + 1 < len(self._pieces):
            self._waiting[piece + 1].append(hidden)
        return hidden

    def read(self, tokens: Sequence[int]) -> None:
        """Take tokens all the way up, many at once; what the model says to them is not computed."""
        for start in range(0, len(tokens), _PREFILL):
            self.enter(mx.array([tokens[start : start + _PREFILL]]))
            for piece in range(1, len(self._pieces)):
                self.climb(piece)
            mx.eval([cache.state for cache in self.caches])

    def take_back(self, count: int) -> None:
        """Forget the last positions, all of which have come to the top."""
        from mlx_lm.models.cache import trim_prompt_cache

        trim_prompt_cache(self.caches, count)


class EarlyAnswer(NamedTuple):
    """What a model wrote, and how deep it thought."""

    tokens: list[int]  # without the end-of-turn token
    exits: list[int]  # for each token, the layer that answered; L is the last
    finished: bool  # ended its turn itself, before `max_tokens`


def answer_early(
    stack: Stack,
    prompt: Sequence[int],
    *,
    exits: Sequence[int],
    threshold: float,
    stop: set[int],
    max_tokens: int,
) -> EarlyAnswer:
    """Greedy decoding in which the first exit that is sure of a token answers, else the last layer.

    Confidence is the highest probability at the exit (CALM, Schuster et al. 2022, arXiv 2207.07061,
    section 3.5, softmax response). Unlike CALM, which copies an exit's state to the layers above, the
    layers above are made up for when next a token needs them: what the last layer says is what the whole
    model says after the same tokens, up to the rounding of several positions at once.

    Args:
        prompt: token ids, at least one.
        exits: layers, from low to high; none for the whole model.
        threshold: an exit answers when its confidence is above it. From 1 on none ever does, and the
            answer is the whole model's, computed as mlx-lm computes it; at 0 the first exit always does.
        stop: ids that end a turn.
    """
    if not prompt:
        raise ValueError("prompt: empty; a model needs one token to follow")
    passage = Passage(stack, exits)
    passage.read(prompt[:-1])
    tokens, layers = list[int](), list[int]()
    token = prompt[-1]
    while len(tokens) < max_tokens:
        logits, layer = _answer(passage, token, exits, threshold)
        token = int(most_likely(logits))
        if token in stop:
            return EarlyAnswer(tokens, layers, True)
        tokens.append(token)
        layers.append(layer)
    return EarlyAnswer(tokens, layers, False)


def _answer(passage: Passage, token: int, exits: Sequence[int], threshold: float) -> tuple[mx.array, int]:
    """Logits (V,) behind `token`, and the layer that they come from."""
    stack = passage.stack
    hidden = passage.enter(mx.array([[token]]))
    for piece, layer in enumerate(exits, start=1):
        logits = stack.logits(hidden[:, -1:])[0, 0]
        if _confidence(logits) > threshold:
            return logits, layer
        hidden = passage.climb(piece)
    return stack.logits(hidden[:, -1:])[0, 0], len(stack.layers)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head: logits are `head(norm(hidden))`.

    Raises:
        ModelError: with the model's type, where what the head reads is not a norm of what the last
            layer gives.
    """
    parts = _parts(model)
    return parts.backbone[parts.norm]


def _confidence(logits: mx.array) -> float:
    logits = logits.astype(mx.float32)
    return float(mx.exp(logits.max() - mx.logsumexp(logits)))


def _parts(model: Any) -> _Parts:
    layers, head = list(model.layers), Head(model, _ALL)
    if head.whole:
        raise _refusal(model, "its last projection cannot be told apart")
    with tapped(model, hidden=[len(layers)]) as taps:
        read = head.hidden(mx.array(_PROBE[:1]))
    last = taps.hidden[len(layers)]
    for path, backbone in model.named_modules():
        lists = [key for key, value in backbone.items() if _are(value, layers)]
        for name, norm in backbone.items() if path and lists else ():
            if _leads(norm, last, read):
                return _Parts(backbone, lists[0], name, head)
    raise _refusal(model, "no norm leads from its last layer to its head")


def _are(value: Any, layers: list[nn.Module]) -> bool:
    same = isinstance(value, list) and len(value) == len(layers)
    return same and all(one is other for one, other in zip(value, layers, strict=True))


def _leads(norm: Any, last: mx.array, read: mx.array) -> bool:
    if not isinstance(norm, nn.Module) or "norm" not in type(norm).__name__.lower():
        return False
    try:
        return bool(mx.array_equal(norm(last), read))
    except ValueError:  # a norm of another width
        return False


def _refusal(model: nn.Module, reason: str) -> ModelError:
    name = getattr(model, "model_type", type(model).__name__)
    return ModelError(
        f"early exits do not work for a model of type {name!r}: {' '.join(reason.split())[:200]}"
    )
