"""Several sizes of one student: a run for each ratio, a model for each width, and which of them to take.

Each run is an ordinary one, in a folder of its own. What a teacher writes or stores for the first run of a
recipe serves the others, which differ from it in the size of the student alone.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.compress_checks import score_of, unmeasured
from mlx_distill.console import Console
from mlx_distill.data.sources import digest
from mlx_distill.errors import DataError, RecipeError, RunFolderError
from mlx_distill.frontier import Measured, frontier
from mlx_distill.lock import one_writer, refuse_if_taken
from mlx_distill.options import Compress, Quantize, Teacher
from mlx_distill.pipeline import run
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import Recipe
from mlx_distill.recipe_checks import contradictions
from mlx_distill.report_frontier import console_lines, write_frontier
from mlx_distill.run import Run
from mlx_distill.run_folder import ROOT, check_folder, check_same, open_run
from mlx_distill.run_record import read_run
from mlx_distill.sandbox_checks import check_tasks

FILES = {"frontier.json", "frontier.html"}


@dataclass
class Planned:
    """A run that was checked and is to be made."""

    recipe: Recipe
    fingerprint: str
    source: int  # which of the given recipes it was made of
    asks: str  # digest of what the answers to `data.prompts` depend on, beside the weights of the teacher
    caches: dict[str, dict[str, Any]]  # what the cache of each teacher must be made of
    tested: str  # digest of the test rows


def compress(
    recipes: Sequence[Recipe],
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    unsafe: bool = False,
    trust: bool = False,
    root: Path = ROOT,
) -> Path:
    """Make every run that the recipes ask for, and compare all their models in `root/NAME-frontier`.

    Args:
        recipes: those without a `compress` section are run as they are.
        resume: go on with runs that exist; finished ones are not repeated. overwrite: replace them.
        unsafe: run programs that models wrote even where no sandbox can hold them.
        trust: let tokenizers of the models be Python code.

    Returns:
        the page, `frontier.html`; `frontier.json` is beside it.

    Raises:
        DistillError: what is wrong with any of the recipes, before the first run starts.
    """
    options, score = _asked(recipes)
    folder = root / f"{_first(recipes).name}-frontier"
    planned = _check(
        recipes,
        score,
        folder,
        console,
        resume=resume,
        overwrite=overwrite,
        unsafe=unsafe,
        trust=trust,
        root=root,
    )
    for one in planned:  # all of them now, so that a killed `--overwrite` goes on with `--resume`
        with one_writer(root / one.recipe.name):
            open_run(one.recipe, one.fingerprint, console, resume=resume, overwrite=overwrite, root=root)
    for number, one in enumerate(planned):
        first = next(other for other in planned if other.source == one.source)
        console.say(f"run {number + 1} of {len(planned)}: {one.recipe.name}")
        recipe = one.recipe if first is one else _lent(first, one, root)
        run(recipe, console, resume=True, unsafe=unsafe, trust=trust, root=root)
        gc.collect()  # compiled functions hold models in circles
        mx.clear_cache()
    records = [read_run(root / one.recipe.name) for one in planned]
    measured = [
        Measured(record.name, record.models, _ratio(one.recipe), _teacher(one.recipe))
        for record, one in zip(records, planned, strict=True)
    ]
    found = frontier(measured, score, options.line)
    folder.mkdir(parents=True, exist_ok=True)
    page = write_frontier(folder, found, records, folder.name)
    console.say("")
    for line in console_lines(found):
        console.say(line)
    console.say(f"frontier: {page}")
    return page


def derived(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes of the runs that a `compress` section asks for; without one, the recipe itself.

    Raises:
        RecipeError: what one of them says is contradictory.
    """
    options = recipe.compress
    if options is None:
        yield recipe
        return
    changes: dict[str, Any] = {"compress": None}
    if options.bits:
        quantize = recipe.quantize or Quantize()
        changes["quantize"] = quantize.model_copy(update={"bits": options.bits})
    for ratio in options.ratios or [None]:
        if ratio is not None:
            assert recipe.student.prune is not None  # the recipe holds it beside `ratios`
            prune = recipe.student.prune.model_copy(update={"ratio": ratio})
            changes["student"] = recipe.student.model_copy(update={"prune": prune})
            changes["name"] = f"{recipe.name}-r{max(f'{ratio:.2f}', f'{ratio:g}', key=len)}"
        made = recipe.model_copy(update=changes)
        if mistakes := contradictions(made):
            raise RecipeError("\n".join(f"{made.name}: {mistake}" for mistake in mistakes))
        yield made


def _first(recipes: Sequence[Recipe]) -> Recipe:
    """The first recipe with a `compress` section, which names the comparison."""
    found = next((recipe for recipe in recipes if recipe.compress is not None), None)
    if found is None:
        names = ", ".join(recipe.name for recipe in recipes)
        raise RecipeError(
            f"no `compress` section in {names}; add one, such as compress: {{bits: [8, 4]}}, or use "
            "`mlx-distill run`"
        )
    return found


def _asked(recipes: Sequence[Recipe]) -> tuple[Compress, str]:
    """The section that counts, and the score by which all models are compared."""
    first = _first(recipes)
    assert first.compress is not None
    score = score_of(first, first.compress.score)
    assert score is not None  # the recipe's own checks
    for recipe in recipes:
        options = recipe.compress
        if options is not None and (score_of(recipe, options.score), options.line) != (
            score,
            first.compress.line,
        ):
            raise RecipeError(
                f"`compress`: {first.name} and {recipe.name} differ in `score` or `line`, and all models are "
                "compared by one; make them the same"
            )
        if lacking := unmeasured(recipe, score):
            raise RecipeError(f"{recipe.name}: the score {score}, by which all are compared, {lacking}")
    return first.compress, score


def _check(
    recipes: Sequence[Recipe],
    score: str,
    folder: Path,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    unsafe: bool,
    trust: bool,
    root: Path,
) -> list[Planned]:
    """Every run, after all that can be wrong with any of them was looked for."""
    made = [(source, one) for source, recipe in enumerate(recipes) for one in derived(recipe)]
    names = [one.name for _, one in made] + [folder.name]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two runs would have the name {name}; give the recipes other names")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - FILES):
        raise RunFolderError(f"{folder} holds other files; choose another name with name=...")
    for _, one in made:
        check_folder(one, resume=resume, overwrite=overwrite, root=root)
        refuse_if_taken(root / one.name)
        finished = [] if overwrite else Run(root / one.name, console).stages()
        check_tasks(one, "report", finished, unsafe=unsafe)
    planned = []
    for source, one in made:
        prepared = prepare(one, console.progress, trust=trust)
        if not overwrite:
            check_same(root / one.name, one, prepared.fingerprint)
        if (
            score == "top1_agreement"
            and "teacher" in prepared.teachers
            and prepared.teachers["teacher"].foreign
        ):
            raise RecipeError(
                f"{one.name}: the teacher's tokens are others than the student's, so there is no "
                "top1_agreement; set `compress.score` to a score of answers, such as pass@1"
            )
        planned.append(
            Planned(
                one,
                prepared.fingerprint,
                source,
                _asks(prepared),
                prepared.caches,
                digest(prepared.test_rows),
            )
        )
    for one in planned[1:]:
        if one.tested != planned[0].tested:
            raise DataError(
                f"`data.test` of {planned[0].recipe.name} and {one.recipe.name} are other rows, so their "
                "scores cannot be compared; give both the same"
            )
    return planned


def _lent(first: Planned, other: Planned, root: Path) -> Recipe:
    """The recipe of a run that takes over what the teachers made for the first one of its recipe.

    Answers are copied where all that they depend on is the same; a cache is shared where it is made of the
    same. Whatever the run has of its own already stays.
    """
    if first.asks == other.asks and "teacher" not in other.recipe.self_taught:
        theirs = root / first.recipe.name / "samples" / "written"
        for block in sorted(theirs.glob("*.jsonl")):
            mine = root / other.recipe.name / "samples" / "written" / block.name
            if not mine.exists():
                mine.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(block, mine)  # half a copy is noticed by its digest, and written anew
    same = {place for place, made_of in other.caches.items() if first.caches.get(place) == made_of}

    def sharing(teacher: Teacher, place: str) -> Teacher:
        others = [sharing(one, f"teacher.others.{i}") for i, one in enumerate(teacher.others)]
        here = root / first.recipe.name / "cache" / place
        shared = place in same and teacher.cache is None
        return teacher.model_copy(update={"others": others} | ({"cache": str(here)} if shared else {}))

    teacher = other.recipe.teacher
    return other.recipe.model_copy(update={"teacher": teacher and sharing(teacher, "teacher")})


def _asks(prepared: Prepared) -> str:
    """Digest of what the answers to `data.prompts` depend on, beside the weights of the teacher."""
    recipe = prepared.recipe
    teacher = recipe.teacher and [
        recipe.teacher.model,
        recipe.teacher.quantize and recipe.teacher.quantize.model_dump(),
    ]
    sizes = [files.vocabulary for files in prepared.teachers.values()]
    shown = [[asked.tokens, asked.shown] for asked in prepared.prompts]
    made_of = [recipe.seed, recipe.generate.model_dump(mode="json"), teacher, sizes, shown]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _ratio(recipe: Recipe) -> float | None:
    return recipe.student.prune.ratio if recipe.student.prune is not None else None


def _teacher(recipe: Recipe) -> str | None:
    """Which teacher a recipe has: its name, and its grid if it is rounded."""
    if recipe.teacher is None:
        return None
    grid = recipe.teacher.quantize
    return recipe.teacher.model + (f", {grid.mode} {grid.bits} {grid.group_size}" if grid else "")
