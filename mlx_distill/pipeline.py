"""A run from recipe to report: one function a stage, in the order in which they happen.

Each stage leaves its result in the run folder, whole or not at all; a resumed run takes up the first
one that is missing.
"""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.answers import generate_answers
from mlx_distill.cache.stage import filled_caches, store_targets
from mlx_distill.console import Console
from mlx_distill.data.sources import digest
from mlx_distill.difficulty import score_rows
from mlx_distill.endpoint import check_server
from mlx_distill.errors import DistillError, Stopped
from mlx_distill.evaluate.exits import exits_of
from mlx_distill.evaluate.stage import evaluate_models, export_student
from mlx_distill.interrupt import Interrupts
from mlx_distill.layout import STAGES
from mlx_distill.learning import learn
from mlx_distill.lessons import Lessons, labels, lessons
from mlx_distill.memory import decisions
from mlx_distill.models.first_layers import first_layers
from mlx_distill.options import Term
from mlx_distill.peak import PeakMemory
from mlx_distill.preflight import prepare
from mlx_distill.prune.stage import prune_student
from mlx_distill.quantize.stage import quantize_student
from mlx_distill.recipe import Recipe
from mlx_distill.report import write_report
from mlx_distill.run import Run
from mlx_distill.run_folder import ROOT, check_folder, open_run
from mlx_distill.sandbox_checks import check_prompts, check_tasks
from mlx_distill.verdict import verdict
from mlx_distill.work import Work


def run(
    recipe: Recipe,
    console: Console,
    *,
    upto: str = "report",
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    unsafe: bool = False,
    root: Path = ROOT,
) -> Path:
    """Do every stage up to and including `upto`, and give the run folder.

    Args:
        again: do `upto` once more even if it has finished, and forget what followed it.
        resume: go on in a folder that exists. overwrite: replace it.
        unsafe: run programs that models wrote even where no sandbox can hold them.

    Raises:
        DistillError: what is wrong, or why the run stopped; see `errors.py` for the exit codes.
    """
    interrupts = Interrupts()
    with interrupts.caught(), resumable_if_full(), ExitStack() as stack:
        check_folder(recipe, resume=resume, overwrite=overwrite, root=root)
        finished = set() if overwrite else set(Run(root / recipe.name, console).stages())
        finished -= set(STAGES[STAGES.index(upto) :]) if again else set()
        check_tasks(recipe, upto, finished, unsafe=unsafe)
        if recipe.generate.endpoint is not None and "generate" not in finished:
            check_server(recipe.generate.endpoint)
        prepared = prepare(recipe, console.progress)
        check_prompts(recipe, [asked.row for asked in prepared.prompts], finished, unsafe=unsafe)
        decided = decisions(recipe, prepared.recipe, prepared.memory)
        recipe = prepared.recipe
        opened = open_run(
            recipe, prepared.fingerprint, console, interrupts, resume=resume, overwrite=overwrite, root=root
        )
        if mx.default_device() == mx.cpu:
            mx.set_cache_limit(2 << 30)  # the default of 32 MiB maps and unmaps memory at every step
        if again:
            opened.forget(set(STAGES[STAGES.index(upto) :]))
        stack.enter_context(opened.following.whole(recipe))
        work = Work(opened, recipe, prepared, unsafe)
        console.say(_headline(work))
        for line in decided:
            console.say(line)
        stages: dict[str, Callable[[Work], dict[str, Any]]] = {
            "generate": generate_answers,
            "score": score_rows,
            "cache": store_targets,
            "prune": prune_student,
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
            "quantize": recipe.quantize
            and [
                recipe.quantize.model_dump(),
                digest(prepared.valid_rows if recipe.quantize.method != "rtn" else []),  # they judge
            ],
            "evaluate": [
                recipe.evaluate.model_dump(),
                digest(prepared.test_rows),
                [one.version for one in prepared.published],
                digest(prepared.valid_rows if recipe.evaluate.tune else []),
            ],
        }
        memory = PeakMemory(opened.folder, prepared.memory)

        def measured(name: str) -> dict[str, Any]:
            with memory.of(name):
                return stages[name](work)

        for name in STAGES[: STAGES.index(upto) + 1]:
            opened.stage(name, partial(measured, name), options.get(name))
        if upto == "evaluate":
            _say_verdict(opened)
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


def train_student(work: Work) -> dict[str, Any]:
    """The student learns from the labels, the teacher's answers, and the teacher's probabilities."""
    filled_caches(work)  # again: what was damaged or removed since is read once more
    return _train(work, "student", lessons(work), work.recipe)


def train_baseline(work: Work) -> dict[str, Any]:
    """The same student for the same steps on the user's own labels alone: what a teacher must beat."""
    why = None
    if work.recipe.teacher is None and work.recipe.generate.endpoint is None:
        why = "no teacher: the student itself is trained on labels alone"
    elif not work.recipe.evaluate.baseline:
        why = "`evaluate.baseline` is false"
    elif not work.prepared.train:
        why = "no labels: `data.train` is not given"
    if why:
        return {"why": why}
    given = work.recipe.generate.model_copy(update={"on_policy": None})
    changes = {"objective": {"cross_entropy": Term()}, "teacher": None, "generate": given}
    alone = work.recipe.model_copy(update=changes)
    return _train(work, "baseline", labels(work), alone)


def _train(work: Work, stage: str, learned: Lessons, recipe: Recipe) -> dict[str, Any]:
    for place in recipe.self_taught:
        work.unload(place)  # the student is about to be loaded, and lends its own weights
    student = work.new_student()._replace(tokenizer=work.prepared.tokenizer)
    used = learn(work, stage, student, learned, recipe)
    work.save(stage, student)
    if stage == "student":
        for layer in exits_of(recipe):
            work.save(f"student-exit{layer}", first_layers(student, layer))
    return {
        "train_tokens": used.train_tokens,
        "train_seconds": used.train_seconds,
        "rows": len(learned.encoded),
    }


def report(work: Work) -> dict[str, Any]:
    evaluation = work.run.folder / "evaluation.json"
    if not evaluation.exists():
        return {}
    path = write_report(work.run.folder)
    _say_verdict(work.run)
    work.run.console.say(f"report: {path}")
    return {"path": path.name}


def _say_verdict(run: Run) -> None:
    evaluation = run.folder / "evaluation.json"
    if not evaluation.exists():
        return
    found = json.loads(evaluation.read_text(encoding="utf-8"))
    run.console.say("")
    for sentence in verdict(found["models"], found.get("comparisons", [])):
        run.console.say(sentence)
    run.console.say(f"numbers: {evaluation}")


def _headline(work: Work) -> str:
    prepared = work.prepared
    dropped = sum(prepared.dropped.values())
    note = f", {dropped} too long for data.max_tokens" if dropped else ""
    replayed = sum(len(rows) for rows, _ in prepared.replay.values())
    labelled = f"{len(prepared.train)} labelled rows" + (f" and {replayed} replayed" if replayed else "")
    return (
        f"{work.run.folder}: {labelled}, "
        f"{len(prepared.prompts)} prompts for the teacher, {len(prepared.valid)} valid, "
        f"{len(prepared.test)} test{note}"
    )
