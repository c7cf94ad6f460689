"""A run from recipe to report: one function a stage, in the order in which they happen.

Each stage leaves its result in the run folder, whole or not at all; a resumed run takes up the first
one that is missing.
"""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import models
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.data.sources import digest
from mlx_distill.data.template import decode_answer, end_of_turn_ids
from mlx_distill.errors import DataError, DistillError, Stopped
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.stage import evaluate_models, export_student
from mlx_distill.generate import generate
from mlx_distill.interrupt import Interrupts
from mlx_distill.preflight import prepare
from mlx_distill.quantize import quantized
from mlx_distill.recipe import Recipe, Term
from mlx_distill.report import write_report
from mlx_distill.run import StageLog
from mlx_distill.run_folder import ROOT, check_folder, open_run
from mlx_distill.student import widen
from mlx_distill.teacher import LiveTeacher, NoTeacher
from mlx_distill.train import train
from mlx_distill.verdict import verdict
from mlx_distill.work import Work

STAGES = ("generate", "train", "baseline", "quantize", "evaluate", "export", "report")


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


def generate_answers(work: Work) -> dict[str, Any]:
    """The teacher answers `data.prompts`; answers it does not finish, or leaves empty, are dropped."""
    asked = work.prepared.prompts
    if not asked:
        return {}
    options, teacher = work.recipe.generate, work.teacher()
    ends = end_of_turn_ids(teacher.tokenizer)
    answers = generate(
        teacher.model,
        [tokens for _, tokens in asked],
        ends,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        title="teacher answers",
        progress=work.run.progress,
    )
    rows, reasons = [], {}
    for (row, tokens), answer in zip(asked, answers, strict=True):
        text = decode_answer(answer.tokens, teacher.tokenizer)
        reason = None
        if not answer.finished:
            reason = f"unfinished within {options.max_tokens} tokens"
        elif not text.strip():
            reason = "empty"
        elif len(tokens) + len(answer.tokens) >= work.recipe.data.max_tokens:
            reason = f"longer than data.max_tokens {work.recipe.data.max_tokens}"
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        rows.append(
            {
                "prompt": row.question(),
                "answer": text,
                "tokens": answer.tokens,
                "kept": not reason,
                "reason": reason,
            }
        )
    kept = sum(row["kept"] for row in rows)
    work.run.write_rows("generated", rows)
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    work.run.console.say(f"teacher answers: {kept} of {len(rows)} kept (dropped: {dropped})")
    if not kept:
        raise DataError(
            f"`generate`: no answer of the teacher was kept ({dropped}); raise `generate.max_tokens`?"
        )
    return {"written": len(rows), "kept": kept, "dropped": reasons}


def train_student(work: Work) -> dict[str, Any]:
    """The student learns from the labels, the teacher's answers, and the teacher's probabilities."""
    teacher = work.live_teacher()
    return _train(work, "student", [*work.prepared.train, *_answered(work)], teacher, work.recipe)


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
    alone = work.recipe.model_copy(update={"objective": {"cross_entropy": Term()}})
    return _train(work, "baseline", work.prepared.train, None, alone)


def _answered(work: Work) -> list[Encoded]:
    """Prompts with the very tokens that the teacher wrote."""
    if not work.prepared.prompts:
        return []
    end = work.prepared.tokenizer.eos_token_id
    start_of_all = work.recipe.data.count == "all"
    return [
        Encoded([*tokens, *row["tokens"], end], 1 if start_of_all else max(1, len(tokens)))
        for (_, tokens), row in zip(work.prepared.prompts, work.run.read_rows("generated"), strict=True)
        if row["kept"]
    ]


def _train(
    work: Work, stage: str, rows: list[Encoded], teacher: LiveTeacher | None, recipe: Recipe
) -> dict[str, Any]:
    student = work.new_student()._replace(tokenizer=work.prepared.tokenizer)
    dtype = widen(student.model) if recipe.student.method == "full" else None
    batches = Batches(rows, recipe.train.batch_tokens, recipe.seed)

    def validate(model: nn.Module) -> dict[str, float]:
        found = fidelity(
            model,
            work.prepared.valid,
            work.prepared.vocabulary,
            teacher=teacher,
            title=f"{stage}: validation",
            progress=work.run.progress,
        )
        return {name: found[name] for name in ("nll", "kl") if name in found}

    with work.run.interrupts.deferred():
        used = train(
            student.model,
            teacher if teacher is not None else NoTeacher(),
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
    return {"train_tokens": used.train_tokens, "train_seconds": used.train_seconds, "rows": len(rows)}


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
