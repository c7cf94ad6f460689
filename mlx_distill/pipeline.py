"""A run from recipe to report: one function a stage, in the order in which they happen.

Each stage leaves its result in the run folder, whole or not at all; a resumed run takes up the first
one that is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distill import models
from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.data.template import end_of_turn_ids
from mlx_distill.errors import DataError, RunFolderError
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.evaluate.model import Judged, TestSet, measure
from mlx_distill.files import write_folder, write_json
from mlx_distill.generate import generate
from mlx_distill.models import Loaded
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.quantize import quantized
from mlx_distill.recipe import Recipe, Term
from mlx_distill.run import Run, StageLog, open_run
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher, NoTeacher
from mlx_distill.train import train

STAGES = ("generate", "train", "baseline", "quantize", "evaluate", "export", "report")


@dataclass
class Work:
    """What the stages of one run share."""

    run: Run
    recipe: Recipe
    prepared: Prepared
    _teacher: Loaded | None = None

    def teacher(self) -> Loaded:
        """The teacher, loaded when first needed."""
        if self._teacher is None:
            assert self.recipe.teacher is not None  # stages ask only where there is one
            self._teacher = models.load(self.recipe.teacher.model, "teacher.model")
        return self._teacher

    def live_teacher(self) -> LiveTeacher | None:
        return None if self.recipe.teacher is None else LiveTeacher(self.teacher(), self.prepared.vocabulary)

    def new_student(self) -> Loaded:
        return make_student(self.recipe.student, self.prepared.tokenizer, self.recipe.seed)


def run(
    recipe: Recipe,
    console: Console,
    *,
    upto: str = "report",
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    root: Path = Path("runs"),
) -> Path:
    """Do every stage up to and including `upto`, and give the run folder.

    Args:
        again: do `upto` once more even if it has finished, and forget what followed it.
        resume: go on in a folder that exists. overwrite: replace it.

    Raises:
        DistillError: what is wrong, or why the run stopped; see `errors.py` for the exit codes.
    """
    check_folder(recipe, root, resume=resume, overwrite=overwrite)
    prepared = prepare(recipe)
    opened = open_run(recipe, prepared.fingerprint, console, resume=resume, overwrite=overwrite, root=root)
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
    with opened.interrupts.caught():
        for name in STAGES[: STAGES.index(upto) + 1]:
            opened.stage(name, lambda work_on=stages[name]: work_on(work))
    return opened.folder


def check_folder(recipe: Recipe, root: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that is taken or cannot be written, before anything is read."""
    folder = root / recipe.name
    if folder.exists() and not (resume or overwrite):
        raise RunFolderError(
            f"{folder} holds a run already: go on with --resume, replace it with --overwrite, "
            f"or choose another name with name={recipe.name}-2"
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    import os

    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunFolderError(f"{folder}: {parent} cannot be written; check its permissions or run elsewhere")


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
        text = teacher.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        reason = None
        if not answer.finished:
            reason = f"unfinished within {options.max_tokens} tokens"
        elif not text.strip():
            reason = "empty"
        elif len(tokens) + len(answer.tokens) >= work.recipe.data.max_tokens:
            reason = f"longer than data.max_tokens {work.recipe.data.max_tokens}"
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        prompt = row.prompt if row.prompt is not None else str((row.messages or ({},))[-1].get("content"))
        rows.append({"prompt": prompt, "answer": text, "tokens": answer.tokens, "kept": not reason, "reason": reason})
    kept = sum(row["kept"] for row in rows)
    work.run.write_rows("generated", rows)
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    work.run.console.say(f"teacher answers: {kept} of {len(rows)} kept (dropped: {dropped})")
    if not kept:
        raise DataError(f"`generate`: no answer of the teacher was kept ({dropped}); raise `generate.max_tokens`?")
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
    student = work.new_student()
    batches = Batches(rows, recipe.train.batch_tokens, recipe.seed)

    def validate(model: nn.Module) -> dict[str, float]:
        found = fidelity(model, work.prepared.valid, work.prepared.vocabulary, teacher=teacher)
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
    write_folder(work.run.model(stage), lambda folder: models.save(folder, student))
    return {"train_tokens": used.train_tokens, "train_seconds": used.train_seconds, "rows": len(rows)}


def quantize_student(work: Work) -> dict[str, Any]:
    """The saved student in few bits, as `models/student-4bit`."""
    options = work.recipe.quantize
    if options is None:
        return {}
    student = models.load(str(work.run.model("student")), "student")
    small = quantized(student, options)
    name = f"student-{options.bits}bit"
    write_folder(work.run.model(name), lambda folder: models.save(folder, small))
    return {"model": name}


def evaluate_models(work: Work) -> dict[str, Any]:
    """Measure every model of the run on `data.test`, and write `evaluation.json`."""
    if not work.recipe.evaluate.tasks:
        return {}
    prepared, options = work.prepared, work.recipe.evaluate
    counted = [row.tokens[row.start :] for row in prepared.test]
    decoded = [prepared.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in counted]
    test = TestSet(prepared.test_rows, prepared.test, sum(len(text.encode()) for text in decoded))
    live = work.live_teacher()
    stages = work.run.stages()
    metrics: dict[str, Any] = {}
    answers: dict[str, list[Judged]] = {}

    def add(name: str, loaded: Loaded, folder: Path | None, teacher: LiveTeacher | None) -> None:
        metrics[name], answers[name] = measure(
            name,
            loaded,
            test,
            options,
            prepared.vocabulary,
            teacher=teacher,
            folder=folder,
            progress=work.run.progress,
        )
        for key in ("train_tokens", "train_seconds"):
            source = {"student": "train"}.get(name, name)
            if key in stages.get(source, {}):
                metrics[name][key] = stages[source][key]

    if live is not None:
        add("teacher", work.teacher(), prepared.teacher_folder, None)
    add("student_before", models.fused(work.new_student()), None, live)
    saved = ["baseline", "student"] + ([stages["quantize"]["model"]] if work.recipe.quantize else [])
    for name in saved:
        folder = work.run.model(name)
        if name == "baseline" and "why" in stages["baseline"]:
            continue
        add(name, models.load(str(folder), name), folder, live)
    write_json(
        work.run.folder / "evaluation.json", {"schema": 1, "recipe": work.recipe.name, "models": metrics}
    )
    work.run.write_rows("evaluation", _side_by_side(test, answers))
    return {"models": list(metrics)}


def _side_by_side(test: TestSet, answers: dict[str, list[Judged]]) -> list[dict[str, Any]]:
    """What each model wrote for each test row that was scored."""
    rows = []
    for i, row in enumerate(test.rows):
        said = {name: judged[i] for name, judged in answers.items() if judged[i].score is not None}
        if said:
            prompt = row.prompt if row.prompt is not None else str((row.messages or ({},))[0].get("content"))
            rows.append(
                {
                    "task": row.task,
                    "prompt": prompt,
                    "reference": row.completion or "",
                    "answers": {name: judged._asdict() for name, judged in said.items()},
                }
            )
    return rows


def export_student(work: Work) -> dict[str, Any]:
    """Compare each model that others will load with what a fresh process makes of its folder."""
    from mlx_distill.evaluate.fresh import check_equal, fresh_look

    row = (work.prepared.test or work.prepared.train or work.prepared.valid)[:1]
    probe = row[0].tokens if row else work.prepared.prompts[0][1]
    result: dict[str, Any] = {}
    quantize = work.recipe.quantize
    for name in ["student"] + ([f"student-{quantize.bits}bit"] if quantize else []):
        folder = work.run.model(name)
        loaded = models.load(str(folder), name)
        expected = loaded.model(mx.array(probe)[None])[0].astype(mx.float32)
        look = fresh_look(folder, probe, speed=False)
        import numpy as np

        result[name] = {"largest_difference": check_equal(folder, np.array(expected), look.logits)}
        work.run.console.say(f"{folder}: opens in plain mlx_lm.load and computes the same logits")
    return result


def report(work: Work) -> dict[str, Any]:
    from mlx_distill.report import write_report

    if not (work.run.folder / "evaluation.json").exists():
        return {}
    path = write_report(work.run.folder)
    work.run.console.say(f"report: {path}")
    return {"path": path.name}


def _headline(work: Work) -> str:
    prepared = work.prepared
    dropped = sum(prepared.dropped.values())
    note = f", {dropped} too long for data.max_tokens" if dropped else ""
    return (
        f"{work.run.folder}: {len(prepared.train)} labelled rows, {len(prepared.prompts)} prompts for the teacher, "
        f"{len(prepared.valid)} valid, {len(prepared.test)} test{note}"
    )
