"""Losses of early exits: the logits that a layer before the last gives through the model's own norm and head.

Layers are numbered 1 to L; layer n is the output of the n-th block, and an *exit* is a layer before the
last. LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710) trains its exits on labels,
`exit_cross_entropy`. `exit_kl` is our variant of it: what the last layer answers teaches the exits, as
in "Be Your Own Teacher" (Zhang et al. 2019, arXiv 1905.08094), but densely, and through the shared head.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import mlx.core as mx
from pydantic import PositiveFloat

from mlx_distill.losses.targets import log_softmax

Curriculum = Literal["none", "rotational", "gradual"]


def exit_kl(exit_logits: mx.array, final_logits: mx.array, *, temperature: PositiveFloat = 1.0) -> mx.array:
    """KL(final || exit): the exit must cover all that the model's last layer does.

    Args:
        exit_logits: (B, T, V), any float type; the sum runs in float32.
        final_logits: (B, T, V) of the same model's last layer; no gradient flows into them, or the
            last layer would be drawn towards its exits.
        temperature: softens both sides. The result is scaled by temperature**2, which keeps the
            size of the gradient (Hinton et al. 2015, section 2).

    Returns:
        (B, T) float32 nats, >= 0 up to rounding, and zero where the two distributions are equal.
    """
    log_p = log_softmax(mx.stop_gradient(final_logits).astype(mx.float32) / temperature)
    log_q = log_softmax(exit_logits.astype(mx.float32) / temperature)
    return temperature**2 * (mx.exp(log_p) * (log_p - log_q)).sum(-1)


def exit_cross_entropy(exit_logits: mx.array, labels: mx.array) -> mx.array:
    """-log q(label) at an exit: LayerSkip's loss (section 4.1.2 of its paper).

    Args:
        exit_logits: (B, T, V), any float type; the sum runs in float32.
        labels: (B, T) integers.

    Returns:
        (B, T) float32 nats, >= 0.
    """
    exit_logits = exit_logits.astype(mx.float32)
    places = mx.stop_gradient(labels)[..., None]  # under mx.checkpoint indices would be differentiated
    chosen = mx.take_along_axis(exit_logits, places, axis=-1).squeeze(-1)
    return mx.logsumexp(exit_logits, axis=-1) - chosen


def check_exits(exits: Sequence[int], layers: int) -> None:
    """Refuse exits that a model of so many layers does not have.

    Raises:
        ValueError: no exit, one at or beyond the last layer, or not strictly from low to high.
    """
    if not exits:
        raise ValueError("exits: none given; name layers from 1 on")
    for layer in exits:
        if not 1 <= layer < layers:
            raise ValueError(f"exits: layer {layer} is no exit of {layers} layers; give 1 to {layers - 1}")
    if any(lower >= upper for lower, upper in pairwise(exits)):
        raise ValueError(f"exits: {list(exits)} must go from low to high, each layer once")


def exit_weights(
    exits: Sequence[int], layers: int, scale: float, enabled: Sequence[bool] | None = None
) -> list[float]:
    """LayerSkip's weights of the exits, and of the last layer behind them; together they are 1.

    The paper (section 4.1.2) counts layers from 0: e(l) = scale * (0 + 1 + ... + l) for l < L - 1, and
    e(L - 1) = L - 1 + scale * (0 + 1 + ... + L - 2) for the last, divided by the sum over the layers in
    use. Its layer l is layer n = l + 1 here, so that e = scale * n * (n - 1) / 2.

    Args:
        exits: layers, as `check_exits` wants them.
        layers: of the model, L.
        scale: how much exits count against the last layer; 0 turns them off. LayerSkip takes 0.1 to 1.
        enabled: one for each exit; an exit that is off weighs 0 and the rest still add up to 1.

    Returns:
        One weight for each exit, then that of the last layer.

    Raises:
        ValueError: as `check_exits`; a negative scale; or an exit at layer 1, whose weight is always 0.
    """
    check_exits(exits, layers)
    if scale < 0:
        raise ValueError(f"scale: {scale} is negative; 0 turns exits off")
    if exits[0] == 1:
        raise ValueError(
            "exits: layer 1 would learn nothing, LayerSkip gives it weight 0; begin with layer 2"
        )
    chosen = [True] * len(exits) if enabled is None else enabled
    raw = [scale * n * (n - 1) / 2 if on else 0.0 for n, on in zip(exits, chosen, strict=True)]
    raw.append(layers - 1 + scale * (layers - 1) * (layers - 2) / 2)
    return [weight / sum(raw) for weight in raw]


def exit_enabled(curriculum: Curriculum, exits: Sequence[int], step: int, steps: int) -> list[bool]:
    """Which exits learn in this step (LayerSkip, section 4.1.2).

    - `none`: all, always.
    - `rotational`: one a step, in turn from the lowest, so that a step costs one more head, not many.
    - `gradual`: the last layer alone at first, then one exit more after every steps / (2 (E + 1)) of
      E exits, from the highest down; all of them well before half of the steps are done.

    Args:
        step: counted from 1.
        steps: of the whole training.
    """
    if curriculum == "rotational":
        return [(step - 1) % len(exits) == index for index in range(len(exits))]
    if curriculum == "gradual":
        begun = [2 * (step - 1) * (len(exits) + 1) >= steps * turn for turn in range(1, len(exits) + 1)]
        return begun[::-1]  # the first turn is the highest exit's
    return [True] * len(exits)
