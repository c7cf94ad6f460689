"""Everything that can be known before a weight is read: data, tokenizers, vocabularies, lengths."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.data import sources
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt, has_chat_template
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.hub import is_name, model_folder
from mlx_distill.models import check_architecture, load_tokenizer
from mlx_distill.progress import Progress, silent
from mlx_distill.recipe import Data, Recipe, Source, fingerprint
from mlx_distill.teacher import check_same_vocabulary
from mlx_distill.tokenizer import train_tokenizer


@dataclass
class Prepared:
    """A recipe with its data read, encoded and checked."""

    recipe: Recipe
    fingerprint: str
    tokenizer: Any  # of student and teacher alike
    vocabulary: int  # its real size
    teacher_folder: Path | None
    train: list[Encoded]
    prompts: list[tuple[Row, list[int]]]  # rows for the teacher to answer, and their token ids
    valid: list[Encoded]
    test_rows: list[Row]
    test: list[Encoded]
    dropped: dict[str, int] = field(default_factory=dict)  # rows of each key longer than max_tokens


def prepare(recipe: Recipe, progress: Progress = silent) -> Prepared:
    """Check all of a recipe that needs no weights.

    Raises:
        DistillError: what is wrong, in one line.
    """
    folders = _folders(recipe, lambda name: not is_name(name) or os.path.exists(name))
    if recipe.evaluate.tasks and sources.expand(recipe.data)["test"] is None:
        tasks = ", ".join(recipe.evaluate.tasks)
        raise RecipeError(f"`evaluate.tasks` [{tasks}] measure on `data.test`, which is missing")
    rows = read_rows(recipe.data, progress)
    _check_evaluation(recipe, rows["test"])
    folders |= _folders(recipe, lambda name: True)  # from the Hub, once all that is here was seen to be right
    teacher_folder, student_folder = folders.get("teacher"), folders.get("student")
    if teacher_folder is not None and student_folder is not None:
        _check_tokenizer_files(student_folder, teacher_folder)
    for key, folder in folders.items():
        check_architecture(folder, f"{key}.model")
    tokenizer = None
    if teacher_folder is not None:
        tokenizer = load_tokenizer(teacher_folder)
    if student_folder is not None:
        own = load_tokenizer(student_folder)
        if tokenizer is not None:
            check_same_vocabulary(own, tokenizer)
        # The teacher answers in its own chat template, so the student learns that one, end of turn included.
        if tokenizer is None or (has_chat_template(own) and not has_chat_template(tokenizer)):
            tokenizer = own
    if tokenizer is None:
        assert recipe.student.tokenizer is not None  # the recipe was checked for it
        tokenizer = train_tokenizer((_text_of(row) for row in rows["train"]), recipe.student.tokenizer)

    encoded: dict[str, list[Encoded]] = {}
    kept: dict[str, list[Row]] = {}
    dropped: dict[str, int] = {}
    for key in ("train", "valid", "test"):
        found = [encode(row, tokenizer, count=recipe.data.count) for row in rows[key]]
        fits = [i for i, row in enumerate(found) if len(row.tokens) <= recipe.data.max_tokens]
        _refuse_none(key, rows[key], fits, min((len(row.tokens) for row in found), default=0), recipe)
        encoded[key], kept[key] = [found[i] for i in fits], [rows[key][i] for i in fits]
        dropped[key] = len(found) - len(fits)
    asked = [(row, encode_prompt(row, tokenizer)) for row in rows["prompts"]]
    prompts = [(row, tokens) for row, tokens in asked if len(tokens) < recipe.data.max_tokens]
    _refuse_none("prompts", rows["prompts"], prompts, min((len(t) for _, t in asked), default=0), recipe)
    dropped["prompts"] = len(asked) - len(prompts)

    trained_on = [encoded["train"], [tokens for _, tokens in prompts]]
    return Prepared(
        recipe,
        fingerprint(
            recipe,
            hashlib.sha256(json.dumps(trained_on).encode()).hexdigest(),
            *(f"{key} {_digest(folder)}" for key, folder in sorted(folders.items())),
        ),
        tokenizer,
        max(tokenizer.get_vocab().values()) + 1,
        teacher_folder,
        encoded["train"],
        prompts,
        encoded["valid"],
        kept["test"],
        encoded["test"],
        dropped,
    )


def read_rows(data: Data, progress: Progress = silent) -> dict[str, list[Row]]:
    """Rows of train, prompts, valid and test; empty where the recipe names none."""
    named = sources.expand(data)
    rows: dict[str, list[Row]] = {}
    with progress("reading data", len(named), "sources") as advance:
        # Corpora last: they are generated, which takes seconds, and a wrong path should show at once.
        for key, source in sorted(named.items(), key=lambda one: one[1] is not None and _is_corpus(one[1])):
            rows[key] = [] if source is None else sources.read(source, key)
            advance()
    return rows


def _is_corpus(source: Source) -> bool:
    return source.source in sources.CORPORA


def _folders(recipe: Recipe, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """Folders of the models that the recipe loads, and that are wanted by name; their files are checked."""
    named = {"teacher": recipe.teacher and recipe.teacher.model, "student": recipe.student.model}
    return {key: model_folder(name, f"{key}.model") for key, name in named.items() if name and wanted(name)}


def _check_tokenizer_files(student: Path, teacher: Path) -> None:
    """Compare two tokenizer.json, where both are there: transformers, which loads any, takes a second."""
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json" for folder in (student, teacher)]
    if all(file.is_file() for file in files):
        try:
            ours, theirs = (Tokenizer.from_file(str(file)) for file in files)
        except Exception:  # the loader, which knows more forms, will say what is wrong
            return
        check_same_vocabulary(ours, theirs)


def _digest(folder: Path) -> str:
    """SHA-256 of a model's config and of both ends of its weight files: other weights differ everywhere."""
    whole = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            whole.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            whole.update(file.read())
    return whole.hexdigest()


def _check_evaluation(recipe: Recipe, test: Sequence[Row]) -> None:
    for task in recipe.evaluate.tasks:
        if task in ("code", "summary") and not any(row.task == task for row in test):
            need = "`tests`" if task == "code" else "`references`"
            raise DataError(f"`evaluate.tasks`: {task!r} needs rows with {need} in `data.test`; it has none")


def _refuse_none(key: str, rows: Sequence[Any], fits: Sequence[Any], shortest: int, recipe: Recipe) -> None:
    if rows and not fits:
        raise DataError(
            f"`data.{key}`: every row is longer than `data.max_tokens` {recipe.data.max_tokens} "
            f"(the shortest has {shortest} tokens); raise it"
        )


def _text_of(row: Row) -> str:
    """What a tokenizer should see of a row."""
    if row.messages is not None:
        return "\n".join(str(message.get("content") or "") for message in row.messages)
    return row.text if row.text is not None else f"{row.prompt or ''}{row.completion or ''}"
