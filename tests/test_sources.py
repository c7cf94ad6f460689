"""A source is found by its name, cut by its options, and refused where either makes no sense."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_distill import hub
from mlx_distill.data.rows import Row
from mlx_distill.data.sources import digest, expand, read
from mlx_distill.errors import DataError, MissingExtra, NotFound
from mlx_distill.options import Data, Source


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", "a", "b", "c", "d")
    write(tmp_path / "valid.jsonl", "v")
    write(tmp_path / "test.jsonl", "t")
    return tmp_path


@pytest.fixture
def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`lab/rows` on the Hub is `folder`; how it gets here is the matter of test_hub."""
    monkeypatch.setattr(hub, "dataset_folder", lambda name, where: {"lab/rows": folder}[name])
    return folder


def texts(key: str = "train", **fields: Any) -> list[str | None]:
    return [row.text for row in read(Source(**fields), key)]


def test_a_file_and_a_folder(folder: Path) -> None:
    assert texts(source=str(folder / "train.jsonl")) == ["a", "b", "c", "d"]
    assert texts("test", source=str(folder / "train.jsonl")) == ["a", "b", "c", "d"]
    keys = ("train", "prompts", "valid", "test")
    assert [texts(key, source=str(folder)) for key in keys] == [list("abcd"), list("abcd"), ["v"], ["t"]]
    assert texts("train", source=str(folder), split="test") == ["t"]


def test_rows_and_start(folder: Path) -> None:
    file = str(folder / "train.jsonl")
    assert texts(source=file, rows=2) == ["a", "b"]
    assert texts(source=file, rows=2, start=1) == ["b", "c"]
    assert texts(source=file, rows=9, start=3) == ["d"]
    with pytest.raises(DataError, match="data.train: `start` is 4; .*train.jsonl has only 4 rows"):
        texts(source=file, start=4)
    with pytest.raises(DataError, match="has only 4 rows"):
        texts(source=file, start=100, rows=3)


def test_a_dataset_of_the_hub(on_the_hub: Path) -> None:
    assert texts("valid", source="lab/rows") == ["v"]
    (on_the_hub / "valid.jsonl").rename(on_the_hub / "validation.jsonl")
    assert texts("valid", source="lab/rows") == ["v"]
    expanded = expand(Data(train=Source(source="lab/rows")))
    assert expanded["valid"] == Source(source="lab/rows", split="validation")


def test_a_dataset_with_its_files_in_data(on_the_hub: Path) -> None:
    for path in list(on_the_hub.glob("*.jsonl")):
        (on_the_hub / "data").mkdir(exist_ok=True)
        path.rename(on_the_hub / "data" / path.name)
    assert texts("test", source="lab/rows") == ["t"]


def test_other_formats_take_the_datasets_package(on_the_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in on_the_hub.glob("*.jsonl"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"lab/rows .* pip install 'mlx-distill\[datasets\]'"):
        texts(source="lab/rows")

    class Table(list[Any]):
        def select(self, indices: range) -> "Table":
            return Table(self[i] for i in indices)

    # Arrow fills a column that a row lacks with null.
    table = Table({"prompt": "p", "completion": f"c{i}", "text": None} for i in range(5))
    fake = SimpleNamespace(
        get_dataset_split_names=lambda name: ["train", "validation"],
        load_dataset=lambda name, split: table,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows = read(Source(source="lab/rows", rows=2, start=1), "valid")
    assert [(row.completion, row.origin) for row in rows] == [
        ("c1", "lab/rows/validation:2"),
        ("c2", "lab/rows/validation:3"),
    ]
    with pytest.raises(DataError, match="lab/rows has no split 'test'; its splits: train, validation"):
        texts("test", source="lab/rows")


def test_corpora_come_by_name() -> None:
    rows = read(Source(source="pocket", rows=3), "train")
    assert [row.task for row in rows] == ["code"] * 3
    assert read(Source(source="pocket", rows=2, start=1), "prompts") == rows[1:]
    summary = read(Source(source="pocket", task="summary", rows=1), "test")
    assert [row.task for row in summary] == ["summary"]
    with pytest.raises(DataError, match="pocket.*name a number"):
        read(Source(source="pocket"), "train")
    with pytest.raises(DataError, match="no split 'tset'"):
        read(Source(source="pocket", rows=1, split="tset"), "train")
    with pytest.raises(DataError, match="stdlib.*'tset'"):  # reading it takes seconds; see test_stdlib
        read(Source(source="stdlib", split="tset"), "train")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"source": "trian.jsonl"},
            NotFound,
            "trian.jsonl: no such file or folder; did you mean train.jsonl",
        ),
        ({"source": "./nothing"}, NotFound, "nothing: no such file or folder"),
        ({"source": "deep/er/still"}, NotFound, "deep: no such file or folder"),
        ({"source": "poket"}, DataError, "no corpus, file or folder 'poket'; did you mean `pocket`"),
        (
            {"source": "alpaca"},
            DataError,
            "'alpaca' is no source: .*corpus .pocket, stdlib.*organisation/name",
        ),
        ({"source": ""}, DataError, "'' is no source"),
        ({"source": "a\0b"}, DataError, "is no source"),
        ({"source": "notes.txt"}, DataError, "notes.txt is no .jsonl file"),
        ({"source": ".", "split": "dev"}, DataError, "has no dev.jsonl; its splits: test, train, valid"),
        ({"source": "train.jsonl", "split": "dev"}, DataError, "`split` 'dev' needs a folder or dataset"),
        ({"source": "train.jsonl", "task": "code"}, DataError, "`task` chooses within a corpus"),
        ({"source": "empty"}, DataError, "empty has no train.jsonl; it holds no .jsonl file"),
    ],
)
def test_a_source_that_is_none(
    fields: dict[str, Any],
    kind: type[Exception],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("a note", encoding="utf-8")
    with pytest.raises(kind, match=message) as caught:
        read(Source(**fields), "train")
    assert "\n" not in str(caught.value)


def test_a_folder_named_like_a_corpus_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pocket" / "train.jsonl", "mine")
    assert texts(source="./pocket") == ["mine"]
    assert texts(source="pocket", rows=1) == [None]


def test_valid_and_test_come_with_a_folder(folder: Path) -> None:
    train = Source(source=str(folder), rows=2)
    mine = Source(source="pocket", rows=5)
    assert expand(Data(train=train)) == {
        "train": train,
        "prompts": None,
        "valid": Source(source=str(folder), split="valid"),
        "test": Source(source=str(folder), split="test"),
    }
    assert expand(Data(train=train, test=mine))["test"] == mine
    (folder / "valid.jsonl").unlink()
    assert expand(Data(train=train))["valid"] is None


def test_nothing_to_default_to(folder: Path) -> None:
    for train in (Source(source="pocket", rows=5), Source(source=str(folder / "train.jsonl"))):
        assert expand(Data(train=train)) == {"train": train, "prompts": None, "valid": None, "test": None}
    prompts = Source(source=str(folder))
    assert expand(Data(prompts=prompts)) == {"train": None, "prompts": prompts, "valid": None, "test": None}
    # A split that is trained on is not held out.
    assert expand(Data(train=Source(source=str(folder), split="test")))["test"] is None


def test_the_digest_is_of_content_and_order() -> None:
    a, b = Row(prompt="a", completion="b"), Row(text="a", tests=("t",))
    assert digest([a, b]) == digest([a, Row(text="a", tests=("t",), origin="elsewhere:3")])
    different = [[a, b], [b, a], [a], [], [Row(prompt="ab"), b], [Row(prompt="a", task="code"), b]]
    assert len({digest(rows) for rows in different}) == len(different)
    assert len(digest([])) == 64


def test_a_folder_made_for_mlx_lm(shared: Path) -> None:
    expanded = expand(Data(train=Source(source=str(shared / "data/wikisql_mlx"))))
    counts = {key: len(read(source, key)) for key, source in expanded.items() if source}
    assert counts == {"train": 1000, "valid": 100, "test": 100}
