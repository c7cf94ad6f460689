"""The teacher reads rows, and what it said of them goes into a cache, shard by shard.

Which rows make a shard, and which of them a batch, follows from the rows alone, and a shard that is
finished is never touched again. So a capture that was killed goes on with the first row that is missing and
leaves the same bytes as one that was not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.cache import sampled
from mlx_distill.cache.records import pack, starts_of
from mlx_distill.cache.shards import Arrays, from_bytes, key_of, to_bytes
from mlx_distill.cache.store import Store, described
from mlx_distill.cache.tokens import TokenCode
from mlx_distill.data.batch import Encoded, in_order, make_batch
from mlx_distill.distributed import ALONE, Ranks
from mlx_distill.distributed.links import Message
from mlx_distill.losses.outcomes import top_of
from mlx_distill.progress import Advance, Progress, silent
from mlx_distill.teacher import LiveTeacher

SHARD = 2**14  # counted labels of a shard, and those of the rest of its last row
TOKENS = 2**12  # that the teacher reads at once, padding included
NUMBERS = 2**24  # of logits made at once: 64 MiB in float32


def write_cache(
    folder: Path,
    teacher: LiveTeacher,
    rows: Sequence[Encoded],
    *,
    made_of: dict[str, Any],
    title: str = "cache",
    progress: Progress = silent,
    **kept: Any,
) -> None:
    """Let the teacher read the rows that are missing in a folder, which is made if it does not exist.

    Args:
        made_of: plain values that `CachedTeacher` compares: digests of the teacher and its tokenizer.
        kept: what is stored, as the arguments of `described`.
    """
    store = Store(folder, described(vocabulary=teacher.vocabulary, **kept, **made_of))
    store.drop_damaged()
    fill(store, teacher, rows, title=title, progress=progress)


def fill(
    store: Store,
    teacher: LiveTeacher,
    rows: Sequence[Encoded],
    *,
    title: str = "cache",
    progress: Progress = silent,
    ranks: Ranks = ALONE,
    place: str = "teacher",
) -> int:
    """Add the rows that a cache lacks.

    Args:
        teacher: shows the hidden states that the manifest names.
        ranks: read a shard each at a time; which rows make a shard does not depend on how many they are.
        place: the teacher's, in the recipe.

    Returns:
        how many rows the teacher read.

    Raises:
        Stopped: another run is adding to the folder.
    """
    with store.locked():
        missing = store.missing(rows)
        with progress(title, len(missing), "rows") as advance:
            waiting = _shards(missing)
            if waiting and store.code is None:  # the first shard numbers the tokens for all
                first = waiting.pop(0)
                arrays = _read(teacher, first, store.manifest, advance)
                code = TokenCode.of(arrays["indices"], teacher.vocabulary)
                store.number_tokens(code)
                store.add(*pack(arrays, first, code, store.manifest["precision"]))
            while waiting:
                turn, waiting = waiting[: ranks.size], waiting[ranks.size :]
                for packed, told in _read_by_all(teacher, turn, store, ranks, place, advance):
                    store.add(packed, told)
    return len(missing)


def _read_by_all(
    teacher: LiveTeacher, turn: list[list[Encoded]], store: Store, ranks: Ranks, place: str, advance: Advance
) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """A shard of each rank, in order, packed."""
    code, manifest = store.code, store.manifest
    assert code is not None  # of the first shard

    def here(_: Any) -> Message:
        return Message(pack(_read(teacher, turn[0], manifest, advance), turn[0], code, manifest["precision"]))

    orders = [{"place": place, "rows": [row[:2] for row in rows], "manifest": manifest} for rows in turn]
    parts = [*orders, *[None] * (ranks.size - len(turn))]
    mine, *others = ranks.share("capture", parts, here, to_bytes(code.pack()) if ranks.size > 1 else b"")
    assert mine is not None
    yield mine.value
    for rows, reply in zip(turn[1:], others, strict=False):
        assert reply is not None
        advance(len(rows))
        yield from_bytes(reply.data), reply.value


def capture_part(
    teacher: LiveTeacher, rows: Sequence[Sequence[Any]], manifest: dict[str, Any], code: bytes
) -> Message:
    """A shard that another rank reads: what its manifest says, and its arrays.

    Args:
        rows: tokens and start of each. code: the arrays of a `TokenCode`.
    """
    encoded = [Encoded(tokens, start) for tokens, start in rows]
    arrays = _read(teacher, encoded, manifest, lambda amount=1, **columns: None)
    numbered = TokenCode.unpack(from_bytes(code))
    packed, told = pack(arrays, encoded, numbered, manifest["precision"])
    return Message(told, to_bytes(packed))


def _shards(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """Rows in order, cut where `SHARD` counted labels are reached."""
    shards: list[list[Encoded]] = []
    places = SHARD
    for row in rows:
        if places >= SHARD:
            shards.append([])
            places = 0
        shards[-1].append(row)
        places += len(row.tokens) - row.start
    return shards


def _read(
    teacher: LiveTeacher, rows: Sequence[Encoded], manifest: dict[str, Any], advance: Advance
) -> Arrays:
    """What the teacher says at each counted label of the rows, as it is before it is packed.

    Returns:
        `indices` (P, k) int32; `log_p` (P, k) and `log_tail` (P,) float32 where they are kept; `hidden.L`
        (P, D) float32 of each layer that is.
    """
    starts = starts_of(rows)
    pieces: list[tuple[np.ndarray, Arrays]] = []
    chunk = max(1, NUMBERS // teacher.vocabulary)
    for batch_rows in in_order(rows, TOKENS):
        targets = teacher.targets(make_batch([rows[i] for i in batch_rows]))
        assert targets.last is not None  # of a live teacher
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch_rows])
        random = None
        if manifest["sampled"]:
            each = [
                sampled.uniforms(
                    manifest["seed"], key_of(rows[i]), int(starts[i + 1] - starts[i]), manifest["sampled"]
                )
                for i in batch_rows
            ]
            random = np.concatenate(each)
        for begin in range(0, len(at), chunk):
            end = min(begin + chunk, len(at))
            logits = teacher.head.logits(targets.last[:, begin:end])
            if random is not None:
                found = {"indices": sampled.draw(logits[0], manifest["temperature"], random[begin:end])}
            else:
                found = _likeliest(logits, manifest["top_k"], manifest["temperature"])
            for layer in manifest["hidden"]:
                assert targets.hidden is not None  # its layers are the manifest's
                states = targets.hidden[str(layer)][0, begin:end]
                found[f"hidden.{layer}"] = np.array(states.astype(mx.float32))
            pieces.append((at[begin:end], found))
        advance(len(batch_rows))
    arrays: Arrays = {}
    for name, first in pieces[0][1].items():
        arrays[name] = np.empty((starts[-1], *first.shape[1:]), dtype=first.dtype)
        for at, found in pieces:
            arrays[name][at] = found[name]
    return arrays


def _likeliest(logits: mx.array, top_k: int, temperature: float) -> Arrays:
    top = top_of(logits, top_k, temperature)
    mx.eval(top)
    found = {"indices": np.array(top.indices[0]), "log_p": np.array(top.log_p[0])}
    if top.log_tail is not None:
        found["log_tail"] = np.array(top.log_tail[0])
    return found
