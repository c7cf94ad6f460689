"""A model's config.json and the headers of its weight files, which tell all sizes without a weight read."""

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json holds."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


class Stored(NamedTuple):
    """What the files of a model say of its tensors."""

    bytes: int
    numbers: int
    shapes: dict[str, tuple[int, ...]]  # of every tensor, as stored
    each: float = 4.0  # bytes of a number that the model computes with, whatever its matrices are packed in

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of each matrix in the layers; a quantized one counts as what it stands for."""
        found = []
        for name, shape in self.shapes.items():
            if ".layers." in f".{name}" and name.endswith(".weight") and len(shape) == 2:
                scales = self.shapes.get(name.removesuffix("weight") + "scales")
                found.append((shape[0], 64 * scales[1] if scales else shape[1]))  # groups of 64, most often
        return found


def stored_sizes(folder: Path) -> Stored:
    """Bytes, numbers and shapes of a model's tensors, from the headers of its files."""
    total, shapes, dtypes = 0, dict[str, tuple[int, ...]](), Counter[str]()
    for path in sorted(folder.glob("model*.safetensors")):
        total += path.stat().st_size
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        shapes |= {name: tuple(told["shape"]) for name, told in header.items() if name != "__metadata__"}
        dtypes.update(told["dtype"] for name, told in header.items() if name != "__metadata__")
    halves = dtypes["F16"] + dtypes["BF16"]  # norms and scales tell where matrices are packed in integers
    each = 2.0 if halves > dtypes["F32"] else 4.0
    return Stored(total, sum(math.prod(shape) for shape in shapes.values()), shapes, each)
