"""A run from recipe to report: one function a stage, in the order in which they happen.

Each stage leaves its result in the run folder, whole or not at all; a resumed run takes up the first
one that is missing.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.answers import generate_answers
from mlx_distill.cache.stage import cache_folder, filled_caches, store_targets
from mlx_distill.console import Console
from mlx_distill.data.sources import digest
from mlx_distill.difficulty import score_rows
from mlx_distill.disk import guessed, needed
from mlx_distill.distributed.copies import give
from mlx_distill.distributed.helping import agree, help_out
from mlx_distill.distributed.joining import joined
from mlx_distill.distributed.links import Message
from mlx_distill.drive import resumable_if_full
from mlx_distill.endpoint import check_server
from mlx_distill.evaluate.exits import exits_of
from mlx_distill.evaluate.stage import evaluate_models, export_student
from mlx_distill.fitting import made_to_fit, short_of_memory
from mlx_distill.guards import limit_memory, resumable_if_mlx_stops
from mlx_distill.interrupt import Interrupts
from mlx_distill.layout import STAGES
from mlx_distill.learning import learn, without_teacher
from mlx_distill.lessons import Lessons, labels, lessons
from mlx_distill.lock import one_writer, refuse_if_taken
from mlx_distill.memory import decisions
from mlx_distill.models.first_layers import first_layers
from mlx_distill.peak import PeakMemory
from mlx_distill.preflight import prepare
from mlx_distill.probes.probe import Probes
from mlx_distill.probes.room import check_room
from mlx_distill.prune.stage import prune_student
from mlx_distill.quantize.stage import quantize_student
from mlx_distill.recipe import Recipe
from mlx_distill.report import write_report
from mlx_distill.run import Run
from mlx_distill.run_folder import ROOT, check_folder, nothing_left_before_a_stage, open_run
from mlx_distill.sandbox_checks import check_prompts, check_tasks
from mlx_distill.verdict import verdict
from mlx_distill.work import PRUNED, Work


def run(
    recipe: Recipe,
    console: Console,
    *,
    upto: str = "report",
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    unsafe: bool = False,
    trust: bool = False,
    fit: bool = False,
    root: Path = ROOT,
) -> Path:
    """Do every stage up to and including `upto`, and give the run folder.

    Args:
        again: do `upto` once more even if it has finished, and forget what followed it.
        resume: go on in a folder that exists. overwrite: replace it.
        unsafe: run programs that models wrote even where no sandbox can hold them.
        trust: let tokenizers of the models be Python code.
        fit: change options until the run fits the machine, as far as the same is learned.

    Raises:
        DistillError: what is wrong, or why the run stopped; see `errors.py` for the exit codes.
    """
    interrupts = Interrupts()
    with interrupts.caught(), resumable_if_full(), ExitStack() as stack:
        ranks = stack.enter_context(joined(interrupts))
        if ranks.rank:
            help_out(ranks, trust=trust)
            return root / recipe.name
        check_folder(recipe, resume=resume, overwrite=overwrite, root=root)
        refuse_if_taken(root / recipe.name)
        finished = set() if overwrite else set(Run(root / recipe.name, console).stages())
        finished -= set(STAGES[STAGES.index(upto) :]) if again else set()
        check_tasks(recipe, upto, finished, unsafe=unsafe)
        if recipe.generate.endpoint is not None and "generate" not in finished:
            check_server(recipe.generate.endpoint)
        prepared = prepare(recipe, console.progress, trust=trust)
        if fit:
            prepared, recipe = made_to_fit(prepared, recipe, console, trust=trust)
        check_prompts(recipe, [asked.row for asked in prepared.prompts], finished, unsafe=unsafe)
        decided = decisions(recipe, prepared.recipe, prepared.undecided)
        decided += short_of_memory(prepared)
        recipe = prepared.recipe
        agree(ranks, prepared)
        full = check_room(root / recipe.name, recipe, needed(recipe, prepared), guessed=guessed(prepared))
        stack.enter_context(one_writer(root / recipe.name))
        opened = open_run(
            recipe, prepared.fingerprint, console, interrupts, resume=resume, overwrite=overwrite, root=root
        )
        stack.enter_context(nothing_left_before_a_stage(opened.folder))
        limit_memory(recipe.train)
        if again:
            opened.forget(set(STAGES[STAGES.index(upto) :]))
        stack.enter_context(opened.following.whole(recipe))
        work = Work(opened, recipe, prepared, unsafe, ranks)
        ranks.at_loss(opened.following.ended)
        console.say(_headline(work))
        if ranks.size > 1:
            console.say(f"{ranks.size} processes share answers, caches and training; this is rank 0 of them")
        for line in [*decided, *prepared.notes, *([full] if full else [])]:
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
            with memory.of(name), resumable_if_mlx_stops(name):
                return stages[name](work)

        wanted = STAGES[: STAGES.index(upto) + 1]
        probes = Probes(work, memory) if "train" in wanted else None
        for name in wanted:
            if probes is not None:
                probes.before(name)
            opened.stage(name, partial(measured, name), options.get(name))
        if upto == "evaluate":
            _say_verdict(opened)
    return opened.folder


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
    return _train(work, "baseline", labels(work), without_teacher(work.recipe))


def _train(work: Work, stage: str, learned: Lessons, recipe: Recipe) -> dict[str, Any]:
    for place in recipe.self_taught:
        work.unload(place)  # the student is about to be loaded, and lends its own weights
    student = work.new_student()._replace(tokenizer=work.prepared.tokenizer)
    give(work.ranks, _read_by_all(work))

    def here(_: Any) -> Message:
        return Message(learn(work, stage, student, learned, recipe, work.ranks))

    mine, *_ = work.ranks.share("learn", [stage] * work.ranks.size, here)
    assert mine is not None
    used = mine.value
    mx.clear_cache()  # what training has freed is not to stand beside what saving takes
    work.save(stage, student)
    if stage == "student":
        for layer in exits_of(recipe):
            work.save(f"student-exit{layer}", first_layers(student, layer))
    return {
        "train_tokens": used.train_tokens,
        "train_seconds": used.train_seconds,
        "rows": len(learned.encoded),
    }


def _read_by_all(work: Work) -> dict[str, Path]:
    """Files that every rank reads while it trains, by their names in a run folder."""
    folder = work.run.folder
    found = [*folder.glob("samples/*.jsonl"), *folder.glob(f"models/{PRUNED}/*")]
    files = {str(path.relative_to(folder)): path for path in found if path.is_file()}
    for place in work.prepared.caches:
        cache = cache_folder(work, place)
        files |= {f"cache/{place}/{path.name}": path for path in cache.glob("[!.]*")}
    return files


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
