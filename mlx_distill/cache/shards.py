"""A part of a cache: a file of arrays, and beside it what the file must be.

`00000.safetensors` is an ordinary safetensors file, mapped into memory; `00000.json` holds its size and
SHA-256 and makes it count. Either is complete or absent, and the second is written last.
"""

import hashlib
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.data.batch import Encoded
from mlx_distill.files import write_bytes, write_json
from mlx_distill.plain_json import parse_object

KEY = 16  # bytes of a row's key
Arrays = dict[str, np.ndarray]

_TYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


def key_of(row: Encoded) -> bytes:
    """What names a row by its content: its tokens, and which of them are counted."""
    numbers = np.array([row.start, *row.tokens], dtype="<i4")
    return hashlib.sha256(numbers.tobytes()).digest()[:KEY]


def to_bytes(arrays: Arrays) -> bytes:
    """The content of a safetensors file."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_bytes(content: bytes) -> Arrays:
    """The arrays that `to_bytes` wrote."""
    from safetensors.numpy import load

    return load(content)


def read_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file, mapped into memory and read where they are used.

    Raises:
        OSError, ValueError: it cannot be read, or is none that `to_bytes` made.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(mapped) < 8:
        raise ValueError(f"{path}: no header")
    [length] = struct.unpack("<Q", mapped[:8])
    header = parse_object(mapped[8 : 8 + min(length, len(mapped))])
    arrays = {}
    try:
        for name, told in header.items():
            if name != "__metadata__":
                kind, count = np.dtype(_TYPES[told["dtype"]]), int(np.prod(told["shape"], dtype=np.int64))
                begin = 8 + length + told["data_offsets"][0]
                arrays[name] = np.frombuffer(mapped, kind, count, begin).reshape(told["shape"])
    except (KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: a damaged header ({type(error).__name__}: {error})") from None
    return arrays


class ShardFile:
    """One shard of a folder, by its number."""

    def __init__(self, folder: Path, number: int):
        self.path = folder / f"{number:05d}.safetensors"
        self.manifest_path = folder / f"{number:05d}.json"

    def write(self, arrays: Arrays, more: dict[str, Any]) -> None:
        """Make the shard appear whole. `more` is kept in its manifest."""
        content = to_bytes(arrays)
        write_bytes(self.path, content)
        whole = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_json(self.manifest_path, {**whole, **more})

    def remove(self) -> None:
        self.manifest_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def manifest(self) -> dict[str, Any]:
        """What the file must be; {} where that cannot be read."""
        try:
            found = parse_object(self.manifest_path.read_bytes())
        except (OSError, ValueError):
            return {}
        numbers = [found.get(key, 0) for key in ("bytes", "places", "kl_mean", "kl_max")]
        return found if all(type(number) in (int, float) for number in numbers) else {}

    def damage(self, *, contents: bool) -> str | None:
        """What is wrong with the file, or None.

        Args:
            contents: read all of it, not its size alone.
        """
        told = self.manifest()
        if not {"bytes", "sha256", "places"} <= told.keys():
            return f"{self.manifest_path.name} beside it cannot be read"
        if not self.path.exists():
            return "it is missing"
        size = self.path.stat().st_size
        if size != told["bytes"]:
            return f"it has {size} bytes in place of {told['bytes']}"
        if contents:
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                    return "its SHA-256 is another"
        return None


def numbers_in(folder: Path) -> list[int]:
    """Of the shards that were finished."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdigit())
