"""The problems in a file or a data set, as the objects that they are, before anything is made of them."""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill import hub
from mlx_distill.data.rows import no_such_path
from mlx_distill.errors import DataError, MissingExtra, NotFound

LARGEST = 1_000_000_000  # bytes of a file once it is unpacked


class Problem(NamedTuple):
    """One problem as it was published."""

    fields: dict[str, Any]
    origin: str  # "humaneval.jsonl:4", for messages


def read_problems(source: str, where: str) -> list[Problem]:
    """The objects of a JSON Lines file or a JSON list, gzipped or not, or of the test split on the Hub.

    Args:
        where: the recipe key that named it; opens messages about a source that is not there.

    Raises:
        NotFound: no such file or data set.
        DataError: an empty file, or one that is no JSON, with its line.
        MissingExtra: the data set is Parquet, and the package `datasets` is not installed.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # unlike Path's, false for a name that no file system takes; so below
        return _in_file(path, str(path))
    if os.path.exists(path) or not hub.is_name(source) or path.suffix in (".jsonl", ".json", ".gz"):
        if path.is_dir():
            raise DataError(f"{where}: {source} is a folder; name a file in it")
        raise NotFound(f"{where}: {no_such_path(path)}")
    folder = hub.dataset_folder(source, where=where)
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("data/*.jsonl")])
    if len(files) == 1:
        return _in_file(files[0], f"{source}/{files[0].name}")
    try:
        import datasets
    except ImportError:
        raise MissingExtra(
            f"{where}: data set {source} is Parquet, which is read by a package that is missing: "
            "pip install 'mlx-distill[datasets]'; or name a file"
        ) from None
    table = datasets.load_dataset(source, split="test")
    return [Problem(dict(fields), f"{source}/test:{i}") for i, fields in enumerate(table, start=1)]


def _in_file(path: Path, name: str) -> list[Problem]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise DataError(f"{name}: unpacked, more than {LARGEST} bytes; problems take a few million")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name}: no UTF-8; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read ({error})") from None
    if not text.strip():
        raise DataError(f"{name}: empty; problems as one JSON object a line are expected")
    if text.lstrip().startswith("["):
        found = _decoded(text, name)
        objects = [(one, f"{name}, problem {number}") for number, one in enumerate(found, start=1)]
    else:
        lines = [(line, f"{name}:{number}") for number, line in enumerate(text.split("\n"), start=1)]
        objects = [(_decoded(line, origin), origin) for line, origin in lines if line.strip()]
    if not objects:
        raise DataError(f"{name}: an empty list; problems are expected in it")
    for one, origin in objects:
        if not isinstance(one, dict):
            raise DataError(f"{origin}: a JSON object is expected; got {str(one)[:40]!r}")
    return [Problem(one, origin) for one, origin in objects]


def _decoded(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" at line {error.lineno}" if "\n" in text.strip() else ""
        raise DataError(f"{origin}: no JSON: {error.msg}{line}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{origin}: no JSON that can be read") from None
