"""Where rows come from: an embedded corpus, a JSONL file, a folder of splits, or a dataset on the Hub.

A name is looked at in that order: `pocket` and `stdlib` are the corpora (a folder of that name is written
`./pocket`), what ends in `.jsonl` or exists is a path, and `organisation/name` is a dataset on the Hub.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_distill import hub
from mlx_distill.data.rows import Row, no_such_path, parse_row, read_jsonl
from mlx_distill.errors import DataError, MissingExtra
from mlx_distill.options import Data, Source

CORPORA = ("pocket", "stdlib")
SPLITS = {"train": "train", "prompts": "train", "valid": "valid", "test": "test"}  # by key of `data`
_ALIASES = {"valid": ("valid", "validation", "dev")}  # what folders and datasets call it, best first


def read(source: Source, key: str) -> list[Row]:
    """The rows of one key of `data`: "train", "prompts", "valid" or "test", which names the split.

    Any other key, such as "replay.0", reads the split `train`.

    Fewer than `source.rows` come back where there are fewer.

    Raises:
        NotFound: no such file, folder or dataset.
        DataError: a bad row with file and line, an option that has no meaning here, nothing in it, or
            `start` behind the last row.
        MissingExtra: a Hub dataset in a format for which the `datasets` package is needed.
    """
    split = source.split or SPLITS.get(key, "train")
    stop = None if source.rows is None else source.start + source.rows
    if source.source in CORPORA:
        rows = _corpus(source, split)
        if not rows:
            raise DataError(f"{_place(key)}: `start` is {source.start}, but {source.source} ends before it")
        return rows
    if source.task is not None:
        raise DataError(
            f"{_place(key)}: `task` chooses within a corpus ({', '.join(CORPORA)}); "
            f'the rows of {source.source} name theirs with the key "task"'
        )
    path = _local(source.source)
    if path is not None and path.is_dir():
        rows = read_jsonl(_split_file(path, split, key), stop)
    elif path is not None:
        rows = _file(path, source, key, stop)
    else:
        folder = _hub_folder(source.source, _place(key))
        if folder is not None:
            rows = read_jsonl(_split_file(folder, split, key), stop)
        else:
            rows = _from_datasets(source.source, split, stop)
    if source.start >= len(rows):
        raise DataError(
            f"{_place(key)}: `start` is {source.start}; {source.source} has only {len(rows)} rows"
        )
    return rows[source.start :]


def _place(key: str) -> str:
    """The option that names a source, for messages."""
    return "generate.examples" if key == "examples" else f"data.{key}"


def expand(data: Data) -> dict[str, Source | None]:
    """The sources of a recipe by key, those of `replay` as "replay.0" and so on.

    `valid` and `test` are taken from a `train` that is a folder or a dataset.

    Raises: as `read`, where the folder or dataset itself cannot be had.
    """
    sources: dict[str, Source | None] = {key: getattr(data, key) for key in SPLITS}
    sources |= {f"replay.{place}": source for place, source in enumerate(data.replay)}
    if data.train is None or data.train.source in CORPORA or (data.valid and data.test):
        return sources
    there = _splits(data.train.source)
    for key in ("valid", "test"):
        found = [name for name in _ALIASES.get(key, (key,)) if name in there]
        if sources[key] is None and found and found[0] != (data.train.split or "train"):
            sources[key] = Source(source=data.train.source, split=found[0])
    return sources


def digest(rows: Iterable[Row]) -> str:
    """SHA-256 over what the rows hold, in order, in hexadecimal. Where they were read is left out."""
    whole = hashlib.sha256()
    for row in rows:
        fields = [row.prompt, row.completion, row.messages, row.tools, row.text]
        fields += [row.tests, row.references, row.task]
        newer = [row.setup, row.loose, row.choices, row.right]
        fields += newer if any(newer) else []  # rows without keep the digest that they had
        whole.update(json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n")
    return whole.hexdigest()


def _corpus(source: Source, split: str) -> list[Row]:
    if source.source == "pocket":
        from mlx_distill.data import pocket

        return pocket.rows(source.task or "code", split, source.rows, source.start, source.seed)
    from mlx_distill.data import stdlib

    return stdlib.rows(source.task or "code", split, source.rows, source.start, source.seed)


def _local(name: str) -> Path | None:
    """The path that a name is, or None where it can only be a dataset on the Hub.

    Raises:
        NotFound: a path with nothing there.
        DataError: no path, and no name of a dataset either.
    """
    expanded = os.path.expanduser(name)
    path = Path(expanded)
    if os.path.exists(expanded):  # unlike Path's, false for a string that can be no path
        return path
    if path.suffix in (".jsonl", ".json") or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise no_such_path(path)
    if hub.is_name(name):
        return None
    near = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.6)
    if near:
        raise DataError(f"data: no corpus, file or folder {name!r}; did you mean `{near[0]}`?")
    if name.count("/") > 1:
        raise no_such_path(path)
    raise DataError(
        f"data: {name!r} is no source: name a corpus ({', '.join(CORPORA)}), a .jsonl file, "
        "a folder with train.jsonl, or a Hub dataset as organisation/name"
    )


def _file(path: Path, source: Source, key: str, stop: int | None) -> list[Row]:
    if path.suffix != ".jsonl":
        raise DataError(
            f"{_place(key)}: {path} is no .jsonl file; write one JSON object a line, named *.jsonl"
        )
    if source.split is not None:
        raise DataError(
            f"{_place(key)}: `split` {source.split!r} needs a folder or dataset; {path} is a file"
        )
    return read_jsonl(path, stop)


def _split_file(folder: Path, split: str, key: str) -> Path:
    for name in _ALIASES.get(split, (split,)):
        if (folder / f"{name}.jsonl").is_file():
            return folder / f"{name}.jsonl"
    there = sorted(_jsonl_names(folder))
    holds = f"its splits: {', '.join(there)}; name one with `split`" if there else "it holds no .jsonl file"
    raise DataError(f"{_place(key)}: {folder} has no {split}.jsonl; {holds}")


def _jsonl_names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.jsonl")}


def _splits(name: str) -> set[str]:
    """The splits of a folder or a dataset; none for a file."""
    path = _local(name)
    if path is not None:
        return _jsonl_names(path) if path.is_dir() else set()
    folder = _hub_folder(name, "data.train")
    return _jsonl_names(folder) if folder is not None else set(_datasets(name).get_dataset_split_names(name))


def _hub_folder(name: str, where: str) -> Path | None:
    """The folder with a dataset's .jsonl files, which may be `data/`; None where it has none."""
    snapshot = hub.dataset_folder(name, where=where)
    return next((folder for folder in (snapshot, snapshot / "data") if any(folder.glob("*.jsonl"))), None)


def _from_datasets(name: str, split: str, stop: int | None) -> list[Row]:
    """Rows of a dataset that is not JSONL (Parquet, most of them), read by the `datasets` package."""
    datasets = _datasets(name)
    there = datasets.get_dataset_split_names(name)
    found = next((one for one in _ALIASES.get(split, (split,)) if one in there), None)
    if found is None:
        raise DataError(f"dataset {name} has no split {split!r}; its splits: {', '.join(sorted(there))}")
    table = datasets.load_dataset(name, split=found)
    table = table.select(range(min(len(table), len(table) if stop is None else stop)))
    return [parse_row(fields, f"{name}/{found}:{number}") for number, fields in enumerate(table, start=1)]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra(
            f"dataset {name} has no .jsonl file; other formats are read by a package that is missing: "
            "pip install 'mlx-distill[datasets]'"
        ) from None
    return datasets
