"""Checks a foreign model folder before MLX reads it. Only headers are read, so it takes milliseconds.

MLX believes the header of a safetensors file: it takes tensors that share bytes, tensors that are named
twice, and a truncated file until the missing bytes are asked for. Here each is refused with the file
and the reason.
"""

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError, NotFound

INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".npz"}
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library draws the line here too


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`, of which at least `model_type` is there.

    Raises:
        NotFound: no such folder, or no `config.json` in it.
        ModelError: no JSON object, no `model_type`, or a model that runs Python code of its own.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such folder")
    if not path.exists():
        raise NotFound(f"{folder}: no config.json; a model folder holds config.json and model*.safetensors")
    config = _read_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f'{path}: no `model_type`; it names the architecture, such as "llama"')
    if config.get("model_file") is not None:
        raise ModelError(f"{path}: `model_file` asks to run Python code of the model; that is never done")
    if config.get("auto_map") and not _known_to_mlx_lm(model_type):
        raise ModelError(f"{path}: `auto_map`: {model_type!r} runs Python code; mlx-lm has none for it")
    tokenizer = folder / "tokenizer_config.json"
    maps = _read_object(tokenizer).get("auto_map") if tokenizer.exists() else None
    if isinstance(maps, dict) and "AutoTokenizer" in maps:
        raise ModelError(f"{tokenizer}: `auto_map`: the tokenizer is Python code; that is never run")
    return config


def check_weights(folder: Path) -> None:
    """Refuse a folder whose `model*.safetensors` MLX would read wrongly, or only in part.

    Raises:
        ModelError: no such file, a truncated or contradictory one, or an index that names what is not there.
    """
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / INDEX
    if not files:
        others = sorted({path.suffix for path in folder.glob("*.*")} & _OTHER_FORMATS)
        found = f", only {', '.join(others)} files; convert them with mlx-lm" if others else ""
        raise ModelError(f"{folder}: no model*.safetensors{found}")
    tensors = {path.name: _check_file(path) for path in files}
    if index.exists():
        _check_index(index, tensors)


def _check_file(path: Path) -> set[str]:
    """Check one file; the names of its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ModelError(
                    f"{path}: truncated, or no safetensors file: "
                    f"a header of {length} bytes in a file of {size}; fetch it again"
                )
            header = _parse_object(file.read(length), path, _without_doubles)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    names = {name for name in header if name != "__metadata__"}
    ends = [header[name]["data_offsets"][1] for name in names if _has_offsets(header[name])]
    if 8 + length + max(ends, default=0) > size:
        whole = 8 + length + max(ends)
        raise ModelError(f"{path}: truncated: {size} bytes, but its tensors take {whole}; fetch it again")
    try:
        # Shapes against offsets, overlaps, gaps, unknown types: the library that wrote the format knows.
        with safe_open(path, framework="numpy"):
            return names
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
        raise ModelError(f"{path}: not a sound safetensors file ({reason}); fetch it again") from None


def _has_offsets(tensor: Any) -> bool:
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(one) is int for one in offsets)


def _check_index(index: Path, tensors: dict[str, set[str]]) -> None:
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index}: no `weight_map` from tensors to files")
    for file in sorted(set(places.values())):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise ModelError(f"{index}: names {file!r}, which is outside of the folder")
        if not (index.parent / file).is_file():
            raise ModelError(f"{index}: names {file}, which is missing; fetch the model again")
    for tensor, file in places.items():
        if file in tensors and tensor not in tensors[file]:
            raise ModelError(f"{index}: {tensor} is not in {file}, as it says; fetch the model again")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return _parse_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def _parse_object(text: bytes, path: Path, hook: Any = None) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected; got {str(value)[:40]!r}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{doubled!r} stands twice")
    return value


def _known_to_mlx_lm(model_type: str) -> bool:
    """Whether mlx-lm brings the architecture. Importing it to ask would take a second."""
    spec = find_spec("mlx_lm")
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / "models" / f"{model_type}.py").is_file() for place in places or ())
