"""A run from recipe to report: one function a stage, in the order in which they happen.

Each stage leaves its result in the run folder, whole or not at all; a resumed run takes up the first
one that is missing.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import models
from mlx_distill.answers import generate_answers, training_rows
from mlx_distill.cache import CachedTeacher, write_cache
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.sources import digest
from mlx_distill.data.template import encode
from mlx_distill.errors import DistillError, Stopped
from mlx_distill.evaluate.exits import exits_of
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.stage import evaluate_models, export_student
from mlx_distill.interrupt import Interrupts
from mlx_distill.matching import teacher_layers
from mlx_distill.models import Loaded
from mlx_distill.models.first_layers import first_layers
from mlx_distill.preflight import prepare
from mlx_distill.quantize import quantized
from mlx_distill.recipe import Recipe, Term
from mlx_distill.report import write_report
from mlx_distill.run import StageLog
from mlx_distill.run_folder import ROOT, check_folder, open_run
from mlx_distill.spans import ForeignTeacher
from mlx_distill.student import widen
from mlx_distill.teacher import LiveTeacher, Teaches
from mlx_distill.train import train
from mlx_distill.verdict import verdict
from mlx_distill.work import Work

STAGES = ("generate", "cache", "train", "baseline", "quantize", "evaluate", "export", "report")


def run(
    recipe: Recipe,
    console: Console,
    *,
    upto: str = "report",
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    root: Path = ROOT,
) -> Path:
    """Do every stage up to and including `upto`, and give the run folder.

    Args:
        again: do `upto` once more even if it has finished, and forget what followed it.
        resume: go on in a folder that exists. overwrite: replace it.

    Raises:
        DistillError: what is wrong, or why the run stopped; see `errors.py` for the exit codes.
    """
    interrupts = Interrupts()
    with interrupts.caught(), resumable_if_full():
        check_folder(recipe, resume=resume, overwrite=overwrite, root=root)
        prepared = prepare(recipe, console.progress)
        opened = open_run(
            recipe, prepared.fingerprint, console, interrupts, resume=resume, overwrite=overwrite, root=root
        )
        if mx.default_device() == mx.cpu:
            mx.set_cache_limit(2 << 30)  # the default of 32 MiB maps and unmaps memory at every step
        if again:
            opened.forget(set(STAGES[STAGES.index(upto) :]))
        work = Work(opened, recipe, prepared)
        console.say(_headline(work))
        stages: dict[str, Callable[[Work], dict[str, Any]]] = {
            "generate": generate_answers,
            "cache": store_targets,
            "train": train_student,
            "baseline": train_baseline,
            "quantize": quantize_student,
            "evaluate": evaluate_models,
            "export": export_student,
            "report": report,
        }
        # What a stage depends on beside the fingerprint: where it is another now, the stage is done again.
        options = {
            "baseline": recipe.evaluate.baseline,
            "quantize": recipe.quantize and recipe.quantize.model_dump(),
            "evaluate": [recipe.evaluate.model_dump(), digest(prepared.test_rows)],
        }
        for name in STAGES[: STAGES.index(upto) + 1]:
            opened.stage(name, lambda work_on=stages[name]: work_on(work), options.get(name))
    return opened.folder


@contextmanager
def resumable_if_full() -> Iterator[None]:
    """Turn a full drive into `Stopped`: with more room the run goes on where it was."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DistillError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Stopped(
            f"the drive is full ({error.filename or 'run folder'}); make room, then go on"
        ) from error


def store_targets(work: Work) -> dict[str, Any]:
    """Each teacher with `source: cache` reads every row once; its targets are stored, and it is unloaded."""
    stored = {}
    for place, options in work.recipe.teachers.items():
        if options.source != "cache":
            continue
        _, rows = training_rows(work)
        assert options.top_k is not None  # the recipe was checked for it
        live = work.live_teacher(place)
        assert live is not None
        write_cache(
            _cache_folder(work, place),
            live,
            rows,
            top_k=options.top_k,
            temperature=work.recipe.temperature,
            made_of=_made_of(work, rows),
            title=f"{place}: cache",
            progress=work.run.progress,
        )
        del live
        work.unload(place)
        stored[place] = sum(len(row.tokens) - row.start for row in rows)
    return stored


def _cache_folder(work: Work, place: str) -> Path:
    return work.run.folder / "cache" / place


def _made_of(work: Work, rows: list[Encoded]) -> dict[str, Any]:
    """What a cache depends on; the fingerprint covers the teacher, its options and the data."""
    read = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return {"fingerprint": work.prepared.fingerprint, "rows": read}


def train_student(work: Work) -> dict[str, Any]:
    """The student learns from the labels, the teacher's answers, and the teacher's probabilities."""
    return _train(work, "student", *training_rows(work), work.recipe)


def train_baseline(work: Work) -> dict[str, Any]:
    """The same student for the same steps on the user's own labels alone: what a teacher must beat."""
    why = None
    if work.recipe.teacher is None:
        why = "no teacher: the student itself is trained on labels alone"
    elif not work.recipe.evaluate.baseline:
        why = "`evaluate.baseline` is false"
    elif not work.prepared.train:
        why = "no labels: `data.train` is not given"
    if why:
        return {"why": why}
    alone = work.recipe.model_copy(update={"objective": {"cross_entropy": Term()}, "teacher": None})
    return _train(work, "baseline", work.prepared.train_rows, work.prepared.train, alone)


def _train(work: Work, stage: str, read: list[Row], rows: list[Encoded], recipe: Recipe) -> dict[str, Any]:
    student = work.new_student()._replace(tokenizer=work.prepared.tokenizer)
    dtype = widen(student.model) if recipe.student.method == "full" else None
    batches = Batches(rows, recipe.train.batch_tokens, recipe.seed)
    teachers = [_teaches(work, place, student, read, rows) for place in recipe.teachers]
    # A cached teacher was unloaded to make room, and is not loaded again while the student trains.
    watching = work.prepared.valid and recipe.teacher and recipe.teacher.source == "live"
    compared = work.comparable_teacher() if watching else None

    def validate(model: nn.Module) -> dict[str, float]:
        return fidelity(
            model,
            work.prepared.valid,
            work.prepared.vocabulary,
            teacher=compared,
            title=f"{stage}: validation",
            progress=work.run.progress,
        )

    with work.run.interrupts.deferred():
        used = train(
            student.model,
            teachers,
            batches,
            recipe,
            work.prepared.vocabulary,
            StageLog(work.run, stage),
            validate if work.prepared.valid else None,
        )
    models.fused(student)
    if dtype is not None:
        student.model.set_dtype(dtype)
    work.save(stage, student)
    if stage == "student":
        for layer in exits_of(recipe):
            work.save(f"student-exit{layer}", first_layers(student, layer))
    return {"train_tokens": used.train_tokens, "train_seconds": used.train_seconds, "rows": len(rows)}


def _teaches(work: Work, place: str, student: Loaded, read: list[Row], rows: list[Encoded]) -> Teaches:
    """A teacher of the student, on these rows."""
    options, files = work.recipe.teachers[place], work.prepared.teachers[place]
    if options.source == "cache":
        return CachedTeacher(_cache_folder(work, place), rows, _made_of(work, rows), tail=options.tail)
    loaded = work.teacher(place)
    if files.foreign:
        theirs = [encode(row, files.tokenizer, count=work.recipe.data.count) for row in read]
        tokenizer, size = work.prepared.tokenizer, work.prepared.vocabulary
        return ForeignTeacher(loaded, files.vocabulary, rows, theirs, tokenizer, size)
    terms = work.recipe.objective
    depths: list[Any] = [student.model.layers, loaded.model.layers]
    layers = teacher_layers(terms, *map(len, depths))
    return LiveTeacher(loaded, files.vocabulary, layers)


def quantize_student(work: Work) -> dict[str, Any]:
    """The saved student in few bits, as `models/student-4bit`."""
    options = work.recipe.quantize
    if options is None:
        return {}
    student = models.load(str(work.run.model("student")), "student")
    small = quantized(student, options)
    name = f"student-{options.bits}bit"
    work.save(name, small)
    return {"model": name}


def report(work: Work) -> dict[str, Any]:
    evaluation = work.run.folder / "evaluation.json"
    if not evaluation.exists():
        return {}
    path = write_report(work.run.folder)
    work.run.console.say("")
    for sentence in verdict(json.loads(evaluation.read_text(encoding="utf-8"))["models"]):
        work.run.console.say(sentence)
    work.run.console.say(f"report: {path}")
    return {"path": path.name}


def _headline(work: Work) -> str:
    prepared = work.prepared
    dropped = sum(prepared.dropped.values())
    note = f", {dropped} too long for data.max_tokens" if dropped else ""
    return (
        f"{work.run.folder}: {len(prepared.train)} labelled rows, "
        f"{len(prepared.prompts)} prompts for the teacher, {len(prepared.valid)} valid, "
        f"{len(prepared.test)} test{note}"
    )
