"""What is stored of a place, and how: from arrays of a teacher's outcomes to a shard's bytes, and back.

A shard holds, for its R rows and their P counted labels:

    keys (R, 16), starts (R + 1)     which rows, and where the places of each begin
    high (P, H), low, low_starts     the tokens of each place (`tokens`), sorted by frequency
    values (P, .), reach, tail (P)   their log-probabilities and the tail's, compact (`values`)
    log_p (P, k), log_tail (P)       the same in float32, if exact
    hidden.L (P, D), scale.L (P)     hidden states of layer L in float16, and what they were divided by
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_distill.cache import sampled, values
from mlx_distill.cache.bits import SLACK
from mlx_distill.cache.shards import Arrays, key_of
from mlx_distill.cache.tokens import TokenCode, pack_rows, unpack_rows
from mlx_distill.data.batch import Encoded


def starts_of(rows: Sequence[Encoded]) -> np.ndarray:
    """Where the counted labels of each row begin; the last entry is their number."""
    return np.cumsum([0] + [len(row.tokens) - row.start for row in rows]).astype(np.int32)


def pack(
    raw: Arrays, rows: Sequence[Encoded], code: TokenCode, precision: str | None
) -> tuple[Arrays, dict[str, Any]]:
    """A shard's arrays, and what its manifest says of them.

    Args:
        raw: `indices` (P, k) int32; `log_p` (P, k) and `log_tail` (P,) float32 where they are kept;
            `hidden.L` (P, D) float32.
        precision: None where draws are stored, which have no values.

    Returns:
        the arrays, and with compact values the mean and the largest KL in nats that they add at a place.
    """
    order = code.sort(raw["indices"])
    high, places, widths = code.encode(np.take_along_axis(raw["indices"], order, axis=-1))
    starts = starts_of(rows)
    low, low_starts = pack_rows(places, widths, starts)
    packed: Arrays = {
        "keys": np.frombuffer(b"".join(key_of(row) for row in rows), dtype=np.uint8).reshape(len(rows), -1),
        "starts": starts,
        "low_starts": low_starts.astype(np.int32),
        "high": high,
        "low": low,
    }
    told: dict[str, Any] = {}
    if precision is not None:
        exact = np.take_along_axis(raw["log_p"], order, axis=-1), raw.get("log_tail")
        if precision == "exact":
            packed["log_p"] = exact[0]
            packed |= {"log_tail": exact[1]} if exact[1] is not None else {}
        else:
            compact = values.encode(*exact)
            added = values.kl(exact, values.decode(compact, exact[0].shape[-1]))
            told = {"kl_mean": float(added.mean()), "kl_max": float(added.max())}
            packed |= compact
    for name in [name for name in raw if name.startswith("hidden.")]:
        scale = np.maximum(np.abs(raw[name]).max(-1), np.float32(1e-30))
        packed[name] = (raw[name] / scale[:, None]).astype(np.float16)
        packed[name.replace("hidden", "scale")] = scale
    return packed, told


def unpack(found: Sequence[tuple[Arrays, int]], code: TokenCode, manifest: dict[str, Any]) -> Arrays:
    """The outcomes at the places of some rows, one row after another.

    Args:
        found: of each row, the arrays of its shard, and which of the shard's rows it is.

    Returns:
        `indices` (N, k) int32, `log_p` (N, k) float32, `log_tail` (N,) float32 where there is one, and
        `hidden.L` (N, D) float16 with `scale.L` (N,).
    """
    kept = manifest["top_k"] or manifest["sampled"]
    spans = [(int(arrays["starts"][row]), int(arrays["starts"][row + 1])) for arrays, row in found]

    def gathered(name: str) -> np.ndarray:
        pairs = zip(found, spans, strict=True)
        return np.concatenate([arrays[name][begin:end] for (arrays, _), (begin, end) in pairs])

    runs = code.decode_runs(gathered("high"), kept)
    bounds = [arrays["low_starts"][row : row + 2].astype(np.int64) for arrays, row in found]
    low = [arrays["low"][first:last] for (arrays, _), (first, last) in zip(found, bounds, strict=True)]
    row_bytes = np.cumsum([0, *(len(part) for part in low[:-1])])
    counts = np.array([end - begin for begin, end in spans])
    packed = np.concatenate([*low, np.zeros(SLACK + 1, dtype=np.uint8)])
    places = unpack_rows(packed, code.widths[runs], counts, row_bytes)
    outcomes: Arrays = {"indices": code.decode(runs, places)}
    first = found[0][0]
    if manifest["sampled"]:
        outcomes["log_p"] = sampled.shares(outcomes["indices"])
    elif manifest["precision"] == "exact":
        outcomes |= {name: gathered(name) for name in ("log_p", "log_tail") if name in first}
    else:
        compact = {name: gathered(name) for name in ("values", "reach", "tail") if name in first}
        log_p, log_tail = values.decode(compact, kept)
        outcomes |= {"log_p": log_p} | ({"log_tail": log_tail} if log_tail is not None else {})
    for layer in manifest["hidden"]:
        for name in (f"hidden.{layer}", f"scale.{layer}"):
            outcomes[name] = gathered(name)
    return outcomes
