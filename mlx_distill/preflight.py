"""Everything that can be known before a weight is read: data, tokenizers, vocabularies, lengths."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.data import sources
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.hub import model_folder
from mlx_distill.models import load_tokenizer
from mlx_distill.recipe import Data, Recipe, fingerprint
from mlx_distill.safetensors_check import check_weights
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


def prepare(recipe: Recipe) -> Prepared:
    """Check all of a recipe that needs no weights.

    Raises:
        DistillError: what is wrong, in one line.
    """
    rows = read_rows(recipe.data)
    _check_evaluation(recipe, rows["test"])
    teacher_folder, tokenizer = None, None
    if recipe.teacher is not None:
        teacher_folder = model_folder(recipe.teacher.model, "teacher.model")
        check_weights(teacher_folder)
        tokenizer = load_tokenizer(teacher_folder)
    if recipe.student.model is not None:
        folder = model_folder(recipe.student.model, "student.model")
        check_weights(folder)
        own = load_tokenizer(folder)
        if tokenizer is not None:
            check_same_vocabulary(own, tokenizer)
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

    trained_on = [encoded["train"], encoded["valid"], [tokens for _, tokens in prompts]]
    return Prepared(
        recipe,
        fingerprint(recipe, hashlib.sha256(json.dumps(trained_on).encode()).hexdigest()),
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


def read_rows(data: Data) -> dict[str, list[Row]]:
    """Rows of train, prompts, valid and test; empty where the recipe names none."""
    return {
        key: [] if source is None else sources.read(source, key) for key, source in sources.expand(data).items()
    }


def _check_evaluation(recipe: Recipe, test: Sequence[Row]) -> None:
    quality = [task for task in recipe.evaluate.tasks if task != "speed"]
    if recipe.evaluate.tasks and not test:
        raise RecipeError(f"`evaluate.tasks` {recipe.evaluate.tasks} measure on `data.test`, which is missing")
    for task in quality:
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
