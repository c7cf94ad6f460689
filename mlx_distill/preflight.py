"""Everything that can be known before a weight is read: data, tokenizers, vocabularies, lengths."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_distill.asked import Asked, check_thinking, shown_to
from mlx_distill.cache.contents import refuse_others
from mlx_distill.data import sources
from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt, encode_test
from mlx_distill.errors import DataError, RecipeError
from mlx_distill.evaluate.code import check_tests
from mlx_distill.evaluate.harness import check_harness
from mlx_distill.evaluate.published import Published, published
from mlx_distill.evaluate_checks import OWN, PUBLISHED, WRITTEN
from mlx_distill.filters import check_filters, determining
from mlx_distill.hub import is_name, model_folder
from mlx_distill.layer_checks import check_objective
from mlx_distill.memory import Estimate, Rows, estimate, with_sources
from mlx_distill.models import check_model, check_saveable, load_tokenizer
from mlx_distill.models.headers import config_of
from mlx_distill.options import Data, Generate, Source
from mlx_distill.probes.files import compare_tokenizers
from mlx_distill.probes.widths import check_widths, rows_of
from mlx_distill.progress import Progress, silent
from mlx_distill.prune.plan import Planned, plan_pruning
from mlx_distill.prune.vocabulary import check_type, learned_texts, trimmed
from mlx_distill.quantize.checks import check_loaded_student
from mlx_distill.quantize.learned_checks import check_towards
from mlx_distill.reasoning import Task, as_learned, as_measured, check_marks
from mlx_distill.recipe import Recipe, fingerprint
from mlx_distill.teacher_files import (
    TeacherFiles,
    caches_of,
    check_tokenizer_files,
    digest_of,
    model_folders,
    teachers_of,
)
from mlx_distill.tokenizer import train_tokenizer
from mlx_distill.trackers import check_trackers


@dataclass
class Prepared:
    """A recipe with its data read, encoded and checked."""

    recipe: Recipe
    fingerprint: str
    tokenizer: Any  # of the student, and of every teacher that is not foreign
    vocabulary: int  # its real size
    teachers: dict[str, TeacherFiles]  # by their place in the recipe; the first one answers prompts
    train_rows: list[Row]
    train: list[Encoded]
    prompts: list[Asked]  # rows for the teacher, or a server, to answer
    valid_rows: list[Row]
    valid: list[Encoded]
    test_rows: list[Row]
    test: list[Encoded]
    dropped: dict[str, int] = field(default_factory=dict)  # rows of each key longer than max_tokens
    replay: dict[str, tuple[list[Row], list[Encoded]]] = field(default_factory=dict)  # by "replay.0", ...
    tasks: dict[str, list[Task]] = field(default_factory=dict)  # of each row of "train", "replay.0", ...
    examples: list[Row] = field(default_factory=list)  # that a writer is shown before each prompt
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)  # what a teacher's cache is made of
    planned: Planned | None = None  # the student, if it is to be cut out
    kept_tokens: Any = None  # ids that stay of the vocabulary of what is cut, (V',); None: all
    published: list[Published] = field(default_factory=list)  # problems that are evaluated beside `data.test`
    trust: bool = False  # tokenizers of the models may be Python code
    notes: list[str] = field(default_factory=list)  # what a user should know of the models' files
    memory: Estimate = field(kw_only=True)  # that the run takes
    undecided: Estimate = field(kw_only=True)  # with every teacher live whose source is `auto`
    estimated: Callable[[Recipe], Estimate] = field(kw_only=True)  # of other options, on the same data


def prepare(
    recipe: Recipe,
    progress: Progress = silent,
    *,
    trust: bool = False,
    folder_of: Callable[..., Path] = model_folder,
) -> Prepared:
    """Check all of a recipe that needs no weights.

    Args:
        trust: tokenizers of the models may be Python code.
        folder_of: finds models, as `hub.model_folder` does; weights that are not there are not missed.

    Raises:
        DistillError: what is wrong, in one line.
    """
    check_trackers(recipe)
    folders = model_folders(recipe, lambda name: not is_name(name) or os.path.exists(name), trust=trust)
    needed = {*recipe.teachers} - {*recipe.self_taught}
    needed |= {"student"} if recipe.student.shape is None else set()
    if needed <= folders.keys():  # before the data is read, which may take seconds
        planned = plan_pruning(recipe, folders)
        check_objective(recipe, folders, planned and planned.config)
        check_loaded_student(recipe, folders)
    if set(recipe.evaluate.tasks) & set(OWN) and sources.expand(recipe.data)["test"] is None:
        tasks = ", ".join(task for task in recipe.evaluate.tasks if task in OWN)
        raise RecipeError(f"`evaluate.tasks` [{tasks}] measure on `data.test`, which is missing")
    if recipe.evaluate.tune and sources.expand(recipe.data)["valid"] is None:
        raise RecipeError("`evaluate.tune` chooses a temperature on `data.valid`, which is missing; name it")
    own = recipe.generate.on_policy
    if own is not None and own.schedule == "adaptive" and sources.expand(recipe.data)["valid"] is None:
        raise RecipeError(
            "`generate.on_policy`: schedule adaptive follows the loss on `data.valid`, which is missing; "
            "name it"
        )
    rows = read_rows(recipe.data, progress)
    examples = read_examples(recipe.generate)
    if own is not None and all(row.text is not None for row in [*rows["train"], *rows["prompts"]]):
        raise DataError(
            "`generate.on_policy`: every row of the data is plain `text`, and the student needs questions to "
            "answer; give it rows with a `prompt` or `messages`"
        )
    _check_evaluation(recipe, rows["test"])
    published = read_published(recipe)
    _check_tuning(recipe, rows["valid"])
    check_filters(recipe, rows)
    check_marks(recipe.data, rows)
    # From the Hub too, once all that is here was seen to be right.
    folders |= model_folders(recipe, lambda name: True, trust=trust, folder_of=folder_of)
    student_folder = folders.get("student")
    if student_folder is not None and not recipe.across_tokenizers:
        for key in recipe.teachers.keys() - {*recipe.self_taught}:
            check_tokenizer_files(student_folder, folders[key])
    for folder, key in {folder: key for key, folder in reversed(folders.items())}.items():
        check_model(folder, f"{key}.model")
    planned = plan_pruning(recipe, folders)
    pruned = planned and planned.config
    check_objective(recipe, folders, pruned)
    check_loaded_student(recipe, folders)
    mine = None if student_folder is None else load_tokenizer(student_folder, trust=trust)
    if recipe.student.tokenizer is not None:
        mine = train_tokenizer((_text_of(row) for row in rows["train"]), recipe.student.tokenizer)
    teachers, tokenizer = teachers_of(recipe, folders, mine, trust=trust)
    check_saveable(tokenizer)
    check_towards(recipe, teachers)
    notes = compare_tokenizers(recipe, mine, teachers, tokenizer, rows)
    kept_tokens = None
    if recipe.student.prune is not None and recipe.student.prune.vocabulary:
        for folder in folders.values():
            check_type(config_of(folder))
        texts = learned_texts(recipe, rows, examples, tokenizer, progress)
        tokenizer, kept_tokens = trimmed(tokenizer, texts)
        size = len(kept_tokens)
        teachers = {key: replace(one, tokenizer=tokenizer, vocabulary=size) for key, one in teachers.items()}
        planned = plan_pruning(recipe, folders, size)
        pruned = planned and planned.config
        check_objective(recipe, folders, pruned)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    encoded: dict[str, list[Encoded]] = {}
    kept: dict[str, list[Row]] = {}
    dropped: dict[str, int] = {}
    taught: dict[str, list[Task]] = {}
    replayed = [f"replay.{place}" for place in range(len(recipe.data.replay))]
    reasoning = recipe.data.reasoning
    for key in ("train", "valid", "test", *replayed):
        if key in ("valid", "test"):
            read = as_measured(rows[key], reasoning)
        else:
            learned = [one for row in rows[key] for one in as_learned(row, reasoning)]
            read = [row for row, _ in learned]
            taught[key] = [task for _, task in learned]
        encoder = encode_test if key == "test" else encode
        found = [encoder(row, tokenizer, count=recipe.data.count) for row in read]
        fits = [i for i, row in enumerate(found) if len(row.tokens) <= recipe.data.max_tokens]
        _refuse_none(key, read, fits, min((len(row.tokens) for row in found), default=0), recipe)
        encoded[key], kept[key] = [found[i] for i in fits], [read[i] for i in fits]
        dropped[key] = len(found) - len(fits)
        if key in taught:
            taught[key] = [taught[key][i] for i in fits]
    _check_tuning(recipe, kept["valid"])  # again, without the rows that are too long
    foreign = bool(teachers) and teachers["teacher"].foreign
    writer = teachers["teacher"].tokenizer if foreign else tokenizer
    asked = _asked(recipe, rows["prompts"], examples, tokenizer, writer)
    prompts = [one for one in asked if len(one.tokens) < recipe.data.max_tokens]
    shortest = min((len(one.tokens) for one in asked), default=0)
    _refuse_none("prompts", rows["prompts"], prompts, shortest, recipe)
    dropped["prompts"] = len(asked) - len(prompts)

    learned = [row for key in ("train", *replayed) for row in encoded[key]]
    questions = [len(one.tokens) for one in prompts]
    known = Rows(learned, questions, encoded["valid"], encoded["test"])
    estimated = partial(estimate, folders=folders, vocabulary=vocabulary, planned=planned, rows=known)
    undecided = estimated(recipe)
    recipe = with_sources(recipe, undecided)
    caches = caches_of(recipe, folders, teachers, tokenizer, pruned)
    refuse_others(recipe, caches)

    if kept_tokens is None:
        same = [key for key in folders if key == "student" or not teachers[key].foreign]
        read = (max(row.tokens, default=0) for some in encoded.values() for row in some)
        asked_of = (max(one.tokens, default=0) for one in prompts)
        widths = {f"{key}.model": rows_of(config_of(folders[key])) for key in same}
        notes += check_widths(widths, vocabulary, chain(read, asked_of))
    trained_on: list[Any] = [encoded["train"], [[one.tokens, one.shown] for one in prompts]]
    trained_on += [encoded[key] for key in replayed]
    if kept_tokens is not None:  # ids are numbers among those that stay
        trained_on.append(kept_tokens.tolist())
    if recipe.generate.endpoint is not None:
        trained_on.append(sources.digest([*(one.row for one in prompts), *examples]))
    if own is not None and own.schedule == "adaptive":
        trained_on.append(encoded["valid"])
    return Prepared(
        recipe,
        fingerprint(
            recipe,
            hashlib.sha256(json.dumps(trained_on).encode()).hexdigest(),
            *(f"{key} {digest_of(folder)}" for key, folder in sorted(folders.items())),
            *determining(recipe, rows),
        ),
        tokenizer,
        vocabulary,
        teachers,
        kept["train"],
        encoded["train"],
        prompts,
        kept["valid"],
        encoded["valid"],
        kept["test"],
        encoded["test"],
        dropped,
        {key: (kept[key], encoded[key]) for key in replayed},
        taught,
        examples,
        caches,
        planned,
        kept_tokens,
        published,
        trust,
        notes,
        memory=estimated(recipe),
        undecided=undecided,
        estimated=estimated,
    )


def read_rows(data: Data, progress: Progress = silent) -> dict[str, list[Row]]:
    """Rows of train, prompts, valid, test and replay.0, ...; empty where the recipe names none."""
    named = sources.expand(data)
    rows: dict[str, list[Row]] = {}
    with progress("reading data", len(named), "sources") as advance:
        # Corpora last: they are generated, which takes seconds, and a wrong path should show at once.
        for key, source in sorted(named.items(), key=lambda one: one[1] is not None and _is_corpus(one[1])):
            rows[key] = [] if source is None else sources.read(source, key)
            advance()
    return rows


def read_examples(options: Generate) -> list[Row]:
    """The rows that a writer is shown before each prompt, each with its answer.

    Raises:
        DataError: a row without one.
    """
    rows = [] if options.examples is None else sources.read(options.examples, "examples")
    for row in rows:
        if row.answer() is None:
            raise DataError(f"{row.origin}: no answer; a row of `generate.examples` needs one")
    return rows


def _asked(
    recipe: Recipe, rows: Sequence[Row], examples: Sequence[Row], tokenizer: Any, writer: Any
) -> list[Asked]:
    """The prompts, as the student learns them and as the writer is shown them.

    Args:
        tokenizer: the student's.
        writer: the teacher's. Where a server writes in its place, it only judges: the bare question.
    """
    options, bare = recipe.generate, [encode_prompt(row, tokenizer) for row in rows]
    more = options.system is not None or options.thinking is not None or bool(examples)
    if more and rows and options.endpoint is None:
        check_thinking(writer, rows[0], options)
        shown = [shown_to(writer, row, options, examples) for row in rows]
    else:
        shown = bare if writer is tokenizer else [encode_prompt(row, writer) for row in rows]
    return [Asked(*one) for one in zip(rows, bare, shown, strict=True)]


def _is_corpus(source: Source) -> bool:
    return source.source in sources.CORPORA


def _check_evaluation(recipe: Recipe, test: Sequence[Row]) -> None:
    for task in recipe.evaluate.tasks:
        needed = {"code": "`tests`", "summary": "`references`", "exact": '`references` and `task` "exact"'}
        needed["choice"] = "`choices` and `answer`"
        if task == "fidelity" and all(row.text is None and row.answer() is None for row in test):
            raise DataError(
                "`evaluate.tasks`: fidelity needs rows with an answer in `data.test`; it has none"
            )
        if task in needed and not any(row.task == task for row in test):
            need = needed[task]
            raise DataError(f"`evaluate.tasks`: {task!r} needs rows with {need} in `data.test`; it has none")
    for row in test:
        if row.task == "code" and "code" in recipe.evaluate.tasks:
            check_tests(row)


def read_published(recipe: Recipe) -> list[Published]:
    """The published sets of problems that `evaluate.tasks` asks for."""
    options = recipe.evaluate
    if "harness" in options.tasks:
        check_harness(options.harness)
    return [
        published(task, options.files.get(task), options.limit) for task in PUBLISHED if task in options.tasks
    ]


def _check_tuning(recipe: Recipe, valid: Sequence[Row]) -> None:
    options = recipe.evaluate
    if options.tune and not any(row.task in options.tasks and row.task in WRITTEN for row in valid):
        tasks = ", ".join(options.tasks)
        raise DataError(
            f"`evaluate.tune`: `evaluate.tasks` [{tasks}] can score none of the {len(valid)} rows of "
            "`data.valid`; give it rows with tests or references"
        )


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
