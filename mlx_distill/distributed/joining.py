"""From the environment that `mlx.launch` or `mpirun` makes to `Ranks`: the one place that reads it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.distributed.links import Door, knock
from mlx_distill.distributed.ranks import ALONE, Ranks
from mlx_distill.distributed.watching import Watch
from mlx_distill.errors import Stopped
from mlx_distill.interrupt import Interrupts

CARD = 4096  # bytes that rank 0 tells all through the group: where it is reached


def launched() -> bool:
    """Whether this process was started as one of several."""
    path = os.environ.get("MLX_HOSTFILE")
    if path is not None and "MLX_RANK" in os.environ:  # `mlx.launch -n 1` names an empty file
        return bool(_text(path).strip())
    return any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))


@contextmanager
def joined(interrupts: Interrupts) -> Iterator[Ranks]:
    """This process among the others, until the block ends; `ALONE` where it was started alone.

    A rank that leaves the block by an error ends all.

    Args:
        interrupts: signals that rank 0 heeds; those of the other ranks are handed on to it.

    Raises:
        Stopped: the others cannot be reached.
    """
    if not launched():
        yield ALONE
        return
    ranks = _join(interrupts)
    assert ranks.watch is not None
    try:
        with ranks.watch.heeding():
            yield ranks
            ranks.finish()
    except BaseException as error:
        ranks.watch.ended_by(error)
        raise


def _join(interrupts: Interrupts) -> Ranks:
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise Stopped(
            f"rank {os.environ.get('MLX_RANK', '?')} cannot join the others ({error}); were all started by "
            "one `mlx.launch`, with a hostfile whose addresses are right?"
        ) from None
    rank, size = group.rank(), group.size()
    if size == 1:
        return Ranks(0, 1, None, [], Watch(0, [], interrupts))
    if rank == 0:
        door = Door(_addresses())
        _tell(door.card, group)
        found = door.let_in(size)
        orders = [found[other, "orders"] for other in range(1, size)]
        watch = Watch(0, [found[other, "watch"] for other in range(1, size)], interrupts)
    else:
        mine = knock(_tell(None, group), rank)
        orders, watch = [mine["orders"]], Watch(rank, [mine["watch"]])
    return Ranks(rank, size, group, orders, watch)


def _tell(card: dict[str, Any] | None, group: mx.distributed.Group) -> dict[str, Any]:
    """Rank 0's card on every rank."""
    text = json.dumps(card).encode() if card is not None else b""
    padded = np.zeros(CARD, dtype=np.uint8)
    padded[: len(text)] = np.frombuffer(text[:CARD], dtype=np.uint8)
    told = bytes(np.array(mx.distributed.all_sum(mx.array(padded), group=group)))
    return json.loads(told.rstrip(b"\0"))


def _addresses() -> list[str]:
    """Where the hostfile says that rank 0 is reached."""
    path, coordinator = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_JACCL_COORDINATOR")
    try:
        first = json.loads(_text(path))[0] if path is not None else []
        found = [str(one) for one in first]
    except (ValueError, LookupError, TypeError):
        found = []
    found += [coordinator] if coordinator else []
    return list(dict.fromkeys(one.rpartition(":")[0] or one for one in found))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
