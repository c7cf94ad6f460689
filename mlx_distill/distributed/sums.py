"""Trees of arrays over `mx.distributed`: added up, handed out from rank 0, and compared.

Every collective is evaluated by itself, on arrays that are there already. Ranks that evaluated one inside
a bigger graph might come to two of them in another order, and wait for each other for ever.
"""

import hashlib
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

BUFFER = 2**26  # bytes that are sent at once: few calls, and a copy that is small beside the gradients


def total(tree: Any, group: mx.distributed.Group) -> Any:
    """The tree with each array added up over all ranks; the same bits on every rank.

    Numbers, as weights and counts, travel in float32: integers are exact up to 2**24.
    """
    leaves: Any = tree_flatten(tree)
    mx.eval([array for _, array in leaves])
    sent = [(name, array if array.ndim else array.astype(mx.float32)) for name, array in leaves]
    added = dict(_together(sent, group))
    in_order = iter([added[name].astype(array.dtype) for name, array in leaves])
    return tree_map(lambda _: next(in_order), tree)


def from_first(arrays: dict[str, mx.array], group: mx.distributed.Group) -> dict[str, mx.array]:
    """Rank 0's arrays, bit for bit, on every rank. The others give some of the same shapes.

    Bytes are added to zeros: as numbers, -0.0 would become 0.0.
    """
    first = group.rank() == 0
    named = list(arrays.items())
    raw = [(name, _bits(a) if first else mx.zeros_like(_bits(a))) for name, a in named]
    mx.eval([array for _, array in raw])
    got = dict(_together(raw, group))
    return {name: got[name].view(array.dtype).reshape(array.shape) for name, array in named}


def digest(arrays: dict[str, mx.array]) -> str:
    """A fingerprint of arrays, computed where they are: any one number that differs makes it another."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        bits = _bits(arrays[name]).astype(mx.uint32)
        place = 2 * mx.arange(bits.size, dtype=mx.uint32) + 1  # odd: no bit of a product is lost
        found.update(f"{name} {arrays[name].shape} {(bits * place).sum().item()} ".encode())
    return found.hexdigest()


def gap(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference of two arrays of a name, relative to the largest number of the other."""
    worst = 0.0
    for name, array in one.items():
        theirs = other[name].astype(mx.float32)
        scale = mx.maximum(mx.abs(theirs).max(), 1e-30)
        worst = max(worst, float(mx.abs(array.astype(mx.float32) - theirs).max() / scale))
    return worst


def _bits(array: mx.array) -> mx.array:
    kinds: dict[int, Any] = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    flat = array.reshape(-1)
    return flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(kinds[array.dtype.size])


def _together(named: list[tuple[str, mx.array]], group: mx.distributed.Group) -> list[tuple[str, mx.array]]:
    """Arrays added up over all ranks, those of a type in one buffer after another."""
    found = []
    for dtype in dict.fromkeys(array.dtype for _, array in named):
        buffer: list[tuple[str, mx.array]] = []
        size = 0
        for name, array in [*((n, a) for n, a in named if a.dtype == dtype), (None, None)]:
            if buffer and (array is None or size + array.nbytes > BUFFER):
                found += _added(buffer, group)
                buffer, size = [], 0
            if array is not None:
                buffer.append((name, array))
                size += array.nbytes
    return found


def _added(named: list[tuple[str, mx.array]], group: mx.distributed.Group) -> list[tuple[str, mx.array]]:
    one = mx.concatenate([array.reshape(-1) for _, array in named])
    mx.eval(one)
    added = mx.distributed.all_sum(one, group=group)
    mx.eval(added)
    found, at = [], 0
    for name, array in named:
        found.append((name, added[at : at + array.size].reshape(array.shape)))
        at += array.size
    return found
