"""Checks a foreign model folder before MLX reads it. Only headers are read, so it takes milliseconds.

MLX believes the header of a safetensors file: it takes tensors that share bytes, tensors that are named
twice, and a truncated file until the missing bytes are asked for. Here each is refused with the file
and the reason.
"""

import os
import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.odd_files import odd
from mlx_distill.plain_json import parse_object

INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".npz"}
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library draws the line here too
_LARGEST_SIZE = 2**31 - 1  # of an axis in MLX
_SIZES = {  # in a config.json, and the least that each may be
    "hidden_size": 1,
    "intermediate_size": 0,
    "moe_intermediate_size": 0,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "vocab_size": 1,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
}


def read_config(folder: Path, *, trust: bool = False) -> dict[str, Any]:
    """The model's `config.json`, of which at least `model_type` is there.

    Args:
        trust: its tokenizer may be Python code. A model never may.

    Raises:
        NotFound: no such folder, or no `config.json` in it.
        ModelError: no JSON object, no `model_type`, a size that is none, or a model that runs Python code.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such folder")
    if not path.exists():
        raise NotFound(f"{folder}: no config.json; a model folder holds config.json and model*.safetensors")
    config = read_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f'{path}: no `model_type`; it names the architecture, such as "llama"')
    if config.get("model_file") is not None:
        raise ModelError(f"{path}: `model_file` asks to run Python code of the model; that is never done")
    if config.get("auto_map") and not _known_to_mlx_lm(model_type):
        raise ModelError(f"{path}: `auto_map`: {model_type!r} runs Python code; mlx-lm has none for it")
    _check_sizes(path, config)
    tokenizer = folder / "tokenizer_config.json"
    maps = read_object(tokenizer).get("auto_map") if tokenizer.exists() else None
    is_code = "AutoTokenizer" in maps if isinstance(maps, dict) else bool(maps)  # once a list of classes
    if is_code and not trust:
        raise ModelError(
            f"{tokenizer}: `auto_map`: the tokenizer is Python code of the model, which is not run; if you "
            "trust who wrote it, say --trust-remote-code"
        )
    return config


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that no model has, before anything counts with them."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ModelError(f"{path}: `text_config` is an object; got {str(text)[:40]!r}")
    for place, tree in (("", config), ("text_config.", text or {})):
        for key, least in _SIZES.items():
            value = tree.get(key)
            each = value if isinstance(value, list) else [value]  # some models have one a layer
            right = (type(one) is int and least <= one <= _LARGEST_SIZE for one in each)
            if value is not None and not all(right):
                raise ModelError(
                    f"{path}: `{place}{key}` is a whole number from {least} to {_LARGEST_SIZE}; "
                    f"got {str(value)[:40]!r}"
                )


def check_model_folder(folder: Path, *, trust: bool = False) -> None:
    """Refuse a folder that is no model, or none that can be opened safely; only headers are read.

    Args:
        trust: its tokenizer may be Python code.

    Raises:
        NotFound, ModelError: as `read_config` and `check_weights`.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if what := odd(path):
            raise ModelError(f"{path}: {what}, and no file; fetch the model again")
    config = read_config(folder, trust=trust)
    tensors = check_weights(folder)
    layers = config.get("num_hidden_layers", (config.get("text_config") or {}).get("num_hidden_layers"))
    if type(layers) is int and layers > len(tensors):  # to build them all might take for ever
        raise ModelError(
            f"{folder / 'config.json'}: `num_hidden_layers` {layers}, and the weight files hold "
            f"{len(tensors)} tensors"
        )


def check_weights(folder: Path) -> dict[str, str]:
    """Refuse a folder whose `model*.safetensors` MLX would read wrongly, or only in part.

    Returns:
        the file of each tensor.

    Raises:
        ModelError: no such file, a truncated or contradictory one, or an index that names what is not there.
    """
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / INDEX
    if not files:
        others = sorted({path.suffix for path in folder.glob("*.*")} & _OTHER_FORMATS)
        found = f", only {', '.join(others)} files; convert them with mlx-lm" if others else ""
        raise ModelError(f"{folder}: no model*.safetensors{found}")
    tensors = {path.name: check_file(path) for path in files}
    if index.exists():
        _check_index(index, tensors)
    places = dict[str, str]()
    for file, names in tensors.items():
        for name in sorted(names & places.keys())[:1]:
            raise ModelError(f"{folder}: {name} stands in {places[name]} and in {file}; keep one of the two")
        places |= dict.fromkeys(names, file)
    return places


def check_file(path: Path) -> set[str]:
    """Check one safetensors file; the names of its tensors.

    Raises:
        ModelError: as `check_weights`.
    """
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
            header = _parse(file.read(length), path, doubles=False)
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
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index}: no `weight_map` from tensors to files")
    for file in sorted(set(places.values())):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise ModelError(f"{index}: names {file!r}, which is outside of the folder")
        # Unlike Path's, os.path's is false for a name that no file system takes.
        if not os.path.isfile(index.parent / file):
            raise ModelError(f"{index}: names {file[:80]}, which is missing; fetch the model again")
    for tensor, file in places.items():
        if file in tensors and tensor not in tensors[file]:
            raise ModelError(f"{index}: {tensor} is not in {file}, as it says; fetch the model again")


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a model holds.

    Raises:
        ModelError: it cannot be read, or holds no object.
    """
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def _parse(text: bytes, path: Path, *, doubles: bool = True) -> dict[str, Any]:
    try:
        return parse_object(text, doubles=doubles)
    except ValueError as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None


def _known_to_mlx_lm(model_type: str) -> bool:
    """Whether mlx-lm brings the architecture."""
    spec = find_spec("mlx_lm")
    places = list(spec.submodule_search_locations or ()) if spec else []

    def there(name: str) -> bool:
        is_word = re.fullmatch(r"[\w-]{1,99}", name) is not None
        return is_word and any((Path(place) / "models" / f"{name}.py").is_file() for place in places)

    if there(model_type) or not places:
        return there(model_type)
    from mlx_lm.utils import MODEL_REMAPPING  # a second, for the few types that it runs as another

    return there(MODEL_REMAPPING.get(model_type, ""))
