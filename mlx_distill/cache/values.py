"""How likely: k log-probabilities and the tail's, in 6 bits each, or in float32.

Only ratios are stored, because the k + 1 outcomes add up to one: how far each lies below the likeliest of
the k. What a token costs of KL is its probability times the square of its error, so steps are fine near the
likeliest and grow by a factor e every `SCALE` nats below it; the last step lies at the least likely of the
set, or `LOWEST` nats below: nothing that was kept becomes impossible. The tail has 16 bits, and is exact to
2**-11 nats.
"""

import numpy as np

BITS = 6
SCALE = 8.0  # nats
SPANS = 8  # steps of a nat in which a set's reach is told
LOWEST = 255 / SPANS  # nats; what is less likely counts as this
TAIL, TAIL_BELOW = 1024, 40.0  # steps of a nat; nats below the likeliest of the k, at most
LEVELS = 2**BITS - 1


def _bent(nats: np.ndarray) -> np.ndarray:
    """Where nats below the likeliest lie on the scale of equal steps."""
    return 1 - np.exp(-nats / SCALE)


def _table() -> np.ndarray:
    """(256, 2**BITS) float32: nats below the likeliest, of each step of each reach."""
    reach = _bent(np.arange(256) / SPANS)[:, None]
    return (-SCALE * np.log1p(-np.arange(LEVELS + 1) / LEVELS * reach)).astype(np.float32)


TABLE = _table()


def encode(log_p: np.ndarray, log_tail: np.ndarray | None) -> dict[str, np.ndarray]:
    """Log-probabilities (N, k), and of the tail (N,), in few bits.

    Returns:
        `values` (N, ceil(k * BITS / 8)) and `reach` (N,) uint8; `tail` (N,) uint16 where there is one.
    """
    log_p = log_p.astype(np.float64)
    likeliest = log_p.max(-1, keepdims=True)
    below = np.minimum(likeliest - log_p, LOWEST)
    reach = np.ceil(below.max(-1) * SPANS).astype(np.uint8)
    whole = np.maximum(_bent(reach / SPANS), 1e-9)[:, None]  # a reach of 0: all are equally likely
    steps = np.rint(_bent(below) / whole * LEVELS).astype(np.uint8)
    bits = np.unpackbits(steps[..., None], axis=-1, count=BITS, bitorder="little")
    packed = {
        "values": np.packbits(bits.reshape(len(steps), -1), axis=-1, bitorder="little"),
        "reach": reach,
    }
    if log_tail is not None:
        nats = np.maximum(log_tail.astype(np.float64) - likeliest[:, 0], -TAIL_BELOW) + TAIL_BELOW
        packed["tail"] = np.minimum(np.rint(nats * TAIL), 2**16 - 1).astype(np.uint16)
    return packed


def decode(packed: dict[str, np.ndarray], kept: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Log-probabilities (N, k) and of the tail (N,), float32, which add up to one in float32.

    Args:
        packed: as from `encode`. kept: k.
    """
    bits = np.unpackbits(packed["values"], axis=-1, count=kept * BITS, bitorder="little")
    steps = np.packbits(bits.reshape(-1, kept, BITS), axis=-1, bitorder="little")[..., 0]
    log_p = -TABLE[packed["reach"][:, None], steps]
    whole = np.exp(log_p).sum(-1)
    if "tail" not in packed:
        return log_p - np.log(whole)[:, None], None
    tail = packed["tail"].astype(np.float32) / TAIL - np.float32(TAIL_BELOW)
    # Against the larger of the two: a tail of many likely tokens may be far above the likeliest kept.
    largest = np.maximum(tail, 0)
    norm = largest + np.log(whole * np.exp(-largest) + np.exp(tail - largest))
    return log_p - norm[:, None], tail - norm


def kl(
    exact: tuple[np.ndarray, np.ndarray | None], stored: tuple[np.ndarray, np.ndarray | None]
) -> np.ndarray:
    """KL(exact || stored) over the k + 1 outcomes, (N,) float64 nats; both sides made to add up to one."""
    one, other = (_outcomes(*side) for side in (exact, stored))
    return np.maximum((np.exp(one) * (one - other)).sum(-1), 0)


def _outcomes(log_p: np.ndarray, log_tail: np.ndarray | None) -> np.ndarray:
    whole = log_p if log_tail is None else np.concatenate([log_p, log_tail[:, None]], axis=-1)
    whole = np.maximum(whole.astype(np.float64), -1e5)
    return whole - np.log(np.exp(whole).sum(-1, keepdims=True))
