"""A teacher that was asked before: its targets, read from a cache where a batch needs them."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distill.cache.records import unpack
from mlx_distill.cache.shards import Arrays
from mlx_distill.cache.store import MANIFEST, Store
from mlx_distill.data.batch import PLACES_TO, Batch, Encoded, at_places, counted_places
from mlx_distill.errors import DataError
from mlx_distill.losses import Targets, Top


class Outline(NamedTuple):
    """What is known of a model that is not there: its layers, and the width of those that are stored."""

    layers: range
    widths: dict[int, int]  # of the hidden states behind a layer


class CachedTeacher:
    """A teacher's targets, read from a cache folder.

    A shard is read as a whole when its first row is needed, to compare its SHA-256, and mapped into memory
    from then on. What is announced by `expect` is unpacked in another thread meanwhile.

    Args:
        rows: those that batches are made of; each is looked up by its content.
        made_of: fields of the manifest, which must be the same.
        tail: keep the mass of all tokens that are not stored as one more outcome.

    Raises:
        DataError: the cache was made of something else, or lacks a row.
    """

    head = shared = None

    def __init__(self, folder: Path, rows: Sequence[Encoded], made_of: dict[str, Any], *, tail: bool = True):
        if not (folder / MANIFEST).exists():
            raise DataError(f"{folder}: no such cache; go on with --resume, and the teacher fills it")
        self.store = Store(folder, made_of)
        self.tail, self.rows = tail, rows
        self._found = self.store.locate(rows)
        self._sound: set[int] = set()  # shards whose content was compared
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._expected: dict[tuple[int, ...], Future[Arrays]] = {}

    @property
    def model(self) -> Outline:
        """As much of the teacher's model as its stored hidden states tell."""
        manifest = self.store.manifest
        first = self.store.arrays(self._found[0][0])
        widths = {layer: first[f"hidden.{layer}"].shape[-1] for layer in manifest["hidden"]}
        return Outline(range(manifest["layers"] or 0), widths)

    def expect(self, batch: Batch) -> None:
        """Begin to read what `targets` will be asked for soon."""
        self._expected[batch.rows] = self._thread.submit(self._read, batch.rows)

    def targets(self, batch: Batch) -> Targets:
        """Labels and the stored outcomes at the counted places of a batch of `rows`."""
        expected = self._expected.pop(batch.rows, None)
        found = self._read(batch.rows) if expected is None else expected.result()
        arrays: dict[str, Any] = {name: mx.array(array)[None] for name, array in found.items()}
        top = Top(arrays["indices"], arrays["log_p"], arrays.get("log_tail") if self.tail else None)
        hidden = {
            str(layer): arrays[f"hidden.{layer}"].astype(mx.float32) * arrays[f"scale.{layer}"][..., None]
            for layer in self.store.manifest["hidden"]
        }
        return Targets(at_places(batch.labels, counted_places(batch)), top=top, hidden=hidden or None)

    def _read(self, rows: Sequence[int]) -> Arrays:
        """The outcomes at the places of these rows, as many as `counted_places` fills up to."""
        places = [self._found[row] for row in rows]
        shards = {number: self._arrays(number) for number in sorted({number for number, _ in places})}
        assert self.store.code is not None  # there is a shard, so there is a numbering
        rows_of = [(shards[number], row) for number, row in places]
        found = unpack(rows_of, self.store.code, self.store.manifest)
        fill = -len(found["indices"]) % PLACES_TO
        return {
            name: np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1), mode="edge")
            for name, array in found.items()
        }

    def _arrays(self, number: int) -> Arrays:
        """A shard's arrays, once its content was found to be what was written."""
        if number not in self._sound:
            damage = self.store.damage(number, contents=True)
            if damage is not None:
                raise DataError(
                    f"{self.store.file(number).path}: damaged ({damage}); go on with --resume, and the "
                    "teacher reads its rows again"
                )
            self._sound.add(number)
        return self.store.arrays(number)
