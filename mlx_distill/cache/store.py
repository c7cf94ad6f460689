"""A cache folder: what it was made of, which rows it holds, and whether it is sound.

    manifest.json      what the targets depend on beside the rows
    tokens.safetensors how tokens are numbered, from the first shard
    00000.safetensors  targets of some rows, with 00000.json beside it; 00001..., in the order they were made

A row is found by its content, so the order of rows, their number, batches and epochs may change, and runs
may share a folder: each adds the rows that are not there yet.
"""

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_distill.cache.shards import Arrays, ShardFile, key_of, numbers_in, read_arrays, to_bytes
from mlx_distill.cache.tokens import TokenCode
from mlx_distill.data.batch import Encoded
from mlx_distill.errors import DataError, Stopped
from mlx_distill.files import make_folder, write_bytes, write_json
from mlx_distill.odd_files import odd_in
from mlx_distill.plain_json import parse_object

FORMAT = 1
OPEN = 64  # shards mapped at once: each takes a file descriptor, of which macOS gives 256
MANIFEST, TOKENS = "manifest.json", "tokens.safetensors"

# What a field of the manifest is called in a message, where that is not its own name.
_NAMES = {
    "format": "another format",
    "teacher": "the weights of another teacher",
    "tokenizer": "another tokenizer",
    "chat_template": "another chat template",
}


def described(
    *,
    vocabulary: int,
    top_k: int | None = None,
    sampled: int | None = None,
    temperature: float = 1.0,
    precision: str = "exact",
    seed: int = 0,
    hidden: Sequence[int] = (),
    layers: int | None = None,
    **made_of: Any,
) -> dict[str, Any]:
    """The manifest of a cache: what is stored, and what it is made of.

    Args:
        vocabulary: real size of the teacher's tokenizer. top_k: is cut to it.
        sampled: tokens drawn from each distribution, in place of `top_k`. seed: of these draws.
        temperature: of the distributions.
        precision: of the log-probabilities, "compact" or "exact".
        hidden: layers whose hidden states are stored. layers: how many the teacher has.
        made_of: plain values: digests of teacher, tokenizer and template, and settings of the data.
    """
    return {
        "format": FORMAT,
        **made_of,
        "vocabulary": vocabulary,
        "top_k": None if top_k is None else min(top_k, vocabulary),
        "sampled": sampled,
        "seed": seed if sampled else None,
        "temperature": temperature,
        "precision": None if sampled else precision,
        "hidden": sorted(hidden),
        "layers": layers if hidden else None,
    }


def refuse_other(folder: Path, wanted: dict[str, Any], place: str = "teacher") -> None:
    """Refuse a folder that holds another cache, or no cache at all; one that does not exist is none.

    Args:
        wanted: fields of the manifest, of which all must be the same.
        place: the teacher's, in the recipe.

    Raises:
        DataError: the first field that differs, both values, and what to do.
    """
    key = f"`{place}.cache`"
    try:
        os.stat(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{key}: {str(folder)[:80]}: {error.strerror}; name another folder") from None
    if found := odd_in(folder):
        raise DataError(f"{key}: {found}, which no cache holds; remove it")
    path = folder / MANIFEST
    if not path.exists():
        if not folder.is_dir() or set(os.listdir(folder)) - {f".{MANIFEST}.part"}:
            raise DataError(f"{key}: {folder} is no cache and not empty; name another folder")
        return
    try:
        found = parse_object(path.read_bytes())
    except (OSError, ValueError):
        raise DataError(f"{key}: {path} cannot be read; remove the folder, or name another") from None
    for field in wanted:
        if found.get(field) != wanted[field]:
            what = _NAMES.get(field, f"another `{field}`")
            raise DataError(
                f"{key}: {folder} was made with {what} ({_shown(found.get(field))}, and this run's is "
                f"{_shown(wanted[field])}); name another folder, or remove that one"
            )


def _shown(value: Any) -> str:
    """A value, of which a digest needs no more than its beginning."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12].strip(chr(34))}..."


class Store:
    """An open cache folder, made if it does not exist.

    Args:
        manifest: what it must be made of.

    Raises:
        DataError: it is made of something else.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], place: str = "teacher"):
        refuse_other(folder, manifest, place)
        self.folder = folder
        if not (folder / MANIFEST).exists():
            make_folder(folder)
            write_json(folder / MANIFEST, manifest)
        # A field that is not there counts as null, which both may be.
        self.manifest = {**parse_object((folder / MANIFEST).read_bytes()), **manifest}
        self.arrays = lru_cache(OPEN)(self._arrays)
        self.code: TokenCode | None = None
        self.code_digest = ""
        self.places: dict[bytes, tuple[int, int]] = {}  # key of a row -> shard, and which of its rows
        self._look()

    def _look(self) -> None:
        """Find what is there; whatever is not whole is not."""
        self.places.clear()
        self.arrays.cache_clear()
        self.code, self.code_digest = None, ""
        path = self.folder / TOKENS
        if path.exists():
            self.code_digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for number in self.numbers():
            if self.damage(number, contents=False) is None:
                try:
                    code = self.code or TokenCode.unpack(read_arrays(path))
                    keys = self.arrays(number)["keys"]
                except (OSError, ValueError, KeyError, zlib.error):
                    continue  # its digest will tell the same, to who asks for it
                self.code = code
                for row, key in enumerate(keys):
                    self.places[key.tobytes()] = (number, row)

    def numbers(self) -> list[int]:
        return numbers_in(self.folder)

    def file(self, number: int) -> ShardFile:
        return ShardFile(self.folder, number)

    def damage(self, number: int, *, contents: bool) -> str | None:
        """What is wrong with a shard, or None."""
        file = self.file(number)
        found = file.damage(contents=contents)
        if found is None and file.manifest().get("tokens") != self.code_digest:
            return f"{TOKENS} is another than it was made with"
        return found

    def drop_damaged(self) -> list[str]:
        """Read all shards, remove those that are damaged, and say of each what was wrong."""
        found = []
        for number in self.numbers():
            damage = self.damage(number, contents=True)
            if damage is not None:
                found.append(f"{self.file(number).path}: {damage}")
                self.file(number).remove()
        if found:
            self._look()
        return found

    def missing(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """Rows that are not there, each once, in order."""
        seen = set(self.places)
        found = []
        for row in rows:
            key = key_of(row)
            if key not in seen:
                seen.add(key)
                found.append(row)
        return found

    def locate(self, rows: Sequence[Encoded]) -> list[tuple[int, int]]:
        """Shard, and place in it, of each row.

        Raises:
            DataError: a row is not there.
        """
        found = [self.places.get(key_of(row)) for row in rows]
        if None in found:
            raise DataError(
                f"{self.folder}: the cache lacks {found.count(None)} of {len(rows)} rows; "
                "go on with --resume, and the teacher reads them"
            )
        return [place for place in found if place is not None]

    def number_tokens(self, code: TokenCode) -> None:
        """Keep the numbering of tokens that all shards share; shards of another cannot be read any more."""
        for number in self.numbers():
            self.file(number).remove()
        write_bytes(self.folder / TOKENS, to_bytes(code.pack()))
        self._look()
        self.code = code

    def add(self, arrays: Arrays, more: dict[str, Any]) -> None:
        """Write a shard under the lowest number that is free."""
        taken = set(self.numbers())
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        told = {"rows": len(arrays["keys"]), "places": int(arrays["starts"][-1])}
        self.file(number).write(arrays, {**told, **more, "tokens": self.code_digest})
        for row, key in enumerate(arrays["keys"]):
            self.places[key.tobytes()] = (number, row)

    def added(self) -> tuple[float, float] | None:
        """KL in nats that few bits add at a place, mean and most; None where nothing is rounded."""
        told = [self.file(number).manifest() for number in self.numbers()]
        if any("kl_mean" not in one for one in told) or not told:
            return None
        mean = sum(one["kl_mean"] * one["places"] for one in told) / sum(one["places"] for one in told)
        return mean, max(one["kl_max"] for one in told)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who adds to the folder; the lock goes with the process.

        Raises:
            Stopped: another run is adding to it.
        """
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Stopped(
                f"{self.folder}: another run is adding to this cache; go on when it is done"
            ) from None
        finally:
            os.close(descriptor)

    def _arrays(self, number: int) -> Arrays:
        return read_arrays(self.file(number).path)
