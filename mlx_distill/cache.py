"""What a teacher said, stored: it runs once over all rows, is unloaded, and the student trains from this.

For each counted label the likeliest tokens, their log-probabilities over the whole vocabulary, and the
log of the mass of all others, in the order of the rows. A cache appears whole or not at all, names what
it was made of, and is read where it is needed, not loaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.data.batch import PLACES_TO, Batch, Encoded, at_places, counted_places, in_order, make_batch
from mlx_distill.errors import Fault
from mlx_distill.files import write_folder, write_json
from mlx_distill.losses import Targets, Top
from mlx_distill.losses.outcomes import top_of
from mlx_distill.progress import Progress, silent
from mlx_distill.teacher import LiveTeacher

PLACES = 2**24  # numbers of logits made at once: 64 MiB in float32


def write_cache(
    folder: Path,
    teacher: LiveTeacher,
    rows: Sequence[Encoded],
    *,
    top_k: int,
    temperature: float,
    made_of: dict[str, Any],
    title: str = "cache",
    progress: Progress = silent,
) -> None:
    """Let the teacher read every row, and keep its likeliest tokens at each counted label.

    Args:
        temperature: of the distributions that are kept.
        made_of: plain values that `CachedTeacher` compares: teacher, rows, and what else they depend on.
    """
    kept = min(top_k, teacher.vocabulary)
    starts = _starts(rows)

    def fill(temporary: Path) -> None:
        indices = _array(temporary / "indices.npy", np.int32, (int(starts[-1]), kept))
        log_p = _array(temporary / "log_p.npy", np.float32, (int(starts[-1]), kept))
        log_tail = _array(temporary / "log_tail.npy", np.float32, (int(starts[-1]),))
        with progress(title, len(rows), "rows") as advance:
            for batch_rows in in_order(rows, max(PLACES // teacher.vocabulary, 64)):
                batch = make_batch([rows[i] for i in batch_rows])
                places = counted_places(batch)
                logits = at_places(teacher.logits(batch.tokens), places)
                top = top_of(logits, kept, temperature)
                at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch_rows])
                indices[at] = np.array(top.indices[0])[: len(at)]
                log_p[at] = np.array(top.log_p[0])[: len(at)]
                log_tail[at] = -np.inf if top.log_tail is None else np.array(top.log_tail[0])[: len(at)]
                advance(len(batch_rows))
        for array in (indices, log_p, log_tail):
            array.flush()
        write_json(temporary / "manifest.json", made_of)

    write_folder(folder, fill)


class CachedTeacher:
    """A teacher's targets, read from a cache of the same rows.

    Args:
        rows: those that the cache was written of, in the same order.
        made_of: as it was written; another means that the cache belongs to something else.
        tail: keep the mass of all tokens that are not stored as one more outcome.

    Raises:
        Fault: the cache was made of something else; the field that differs is named.
    """

    head = shared = None

    def __init__(self, folder: Path, rows: Sequence[Encoded], made_of: dict[str, Any], *, tail: bool = True):
        found = json.loads((folder / "manifest.json").read_text())
        for key in [*made_of, *found]:
            if found.get(key) != made_of.get(key):
                raise Fault(
                    f"{folder}: made of another {key} ({found.get(key)}, not {made_of.get(key)}); remove it"
                )
        self.tail, self.starts = tail, _starts(rows)
        self.indices, self.log_p, self.log_tail = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indices", "log_p", "log_tail")
        )

    def targets(self, batch: Batch) -> Targets:
        """Labels and the stored outcomes at the counted places of a batch of `Batches`."""
        at = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in batch.rows])
        at = np.pad(at, (0, -len(at) % PLACES_TO), mode="edge")  # as `counted_places` fills up
        whole = self.indices.shape[-1]
        tail: Any = self.log_tail[at]
        has_tail = self.tail and not np.isneginf(tail).all()
        indices, log_p = (mx.array(array[at].reshape(1, -1, whole)) for array in (self.indices, self.log_p))
        top = Top(indices, log_p, mx.array(tail[None]) if has_tail else None)
        return Targets(at_places(batch.labels, counted_places(batch)), top=top)


def _starts(rows: Sequence[Encoded]) -> np.ndarray:
    """Where the counted labels of each row begin in the arrays; the last entry is their number."""
    return np.concatenate([[0], np.cumsum([len(row.tokens) - row.start for row in rows])])


def _array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
