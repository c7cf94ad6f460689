"""Commands that work in run folders: the stages of a recipe, its plan, and reports."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.cli.around import (
    check_temporary,
    going_on,
    load,
    load_several,
    refuse_if_launched,
    supervised,
    told,
)
from mlx_distill.cli.words import (
    Caffeinate,
    Fit,
    Overrides,
    Overwrite,
    RecipeFile,
    RecipesAndOverrides,
    Resume,
    Supervise,
    Trust,
    Unsafe,
)
from mlx_distill.errors import RecipeError


def trains(stage: str, what: str) -> Callable[..., None]:
    """A command that works up to a stage, training included: it may take a night.

    Args:
        what: its line of `--help`; so below.
    """

    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        unsafe: Unsafe = False,
        trust: Trust = False,
        fit: Fit = False,
        supervise: Supervise = False,
        caffeinate: Caffeinate = False,
    ) -> None:
        supervised([recipe, *(overrides or ())], supervise=supervise, caffeinate=caffeinate)
        _work(
            recipe, overrides, stage, resume=resume, overwrite=overwrite, unsafe=unsafe, trust=trust, fit=fit
        )

    command.__doc__ = what
    return command


def prepares(stage: str, what: str) -> Callable[..., None]:
    """A command that works up to a stage before training."""

    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        unsafe: Unsafe = False,
        trust: Trust = False,
    ) -> None:
        _work(recipe, overrides, stage, resume=resume, overwrite=overwrite, unsafe=unsafe, trust=trust)

    command.__doc__ = what
    return command


def repeats(stage: str, what: str) -> Callable[..., None]:
    """A command that does a stage once more, in a run that may be finished."""

    def command(
        recipe: RecipeFile, overrides: Overrides = None, unsafe: Unsafe = False, trust: Trust = False
    ) -> None:
        _work(recipe, overrides, stage, again=True, resume=True, unsafe=unsafe, trust=trust)

    command.__doc__ = what
    return command


run = trains("report", "All of it: answers, training, baseline, evidence, report.")
generate = prepares("generate", "Only let the teacher answer `data.prompts`.")
cache = prepares("cache", "Every stage up to the stored targets of a cached teacher.")
prune = prepares("prune", "Every stage up to the student that is cut out of a bigger model.")
train = trains("train", "Every stage up to the trained student.")
quantize = repeats("quantize", "Quantize a run's student again; does first what is missing.")
evaluate = repeats("evaluate", "Measure a run's models again; does first what is missing.")
export = repeats("export", "Check a run's exported models again; first what is missing.")


def plan(recipe: RecipeFile, overrides: Overrides = None, trust: Trust = False) -> None:
    """Say what a run would do; loads no weights and writes nothing."""
    from mlx_distill.plan import plan_lines

    for line in plan_lines(load(recipe, overrides), trust=told(trust)):
        print(line)


def compress(
    recipes: RecipesAndOverrides,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
    trust: Trust = False,
    supervise: Supervise = False,
    caffeinate: Caffeinate = False,
) -> None:
    """Sizes of a student, and the smallest that is good enough."""
    supervised(recipes, supervise=supervise, caffeinate=caffeinate, several=True)
    _not_both(resume, overwrite)
    check_temporary()
    loaded = load_several(recipes)
    if not loaded:
        raise RecipeError("name a recipe to compress; all that is given are overrides")
    told(trust)
    refuse_if_launched("compress")
    from mlx_distill.compress import compress
    from mlx_distill.console import Console

    with going_on():
        compress(loaded, Console(), resume=resume, overwrite=overwrite, unsafe=unsafe, trust=trust)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders, or names of some in runs/.")
    ],
    out: Annotated[Path, typer.Option(help="Where a comparison of several runs goes.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write a run's report anew, or compare several runs."""
    from mlx_distill.report import write_comparison, write_report

    folders = [_folder_of(run) for run in runs]
    print(write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, out))


def _folder_of(run: Path) -> Path:
    from mlx_distill.data.rows import no_such_path
    from mlx_distill.layout import ROOT

    # Unlike Path's, os.path's is false for a name that no file system takes.
    found = next((folder for folder in (run, ROOT / run) if os.path.isdir(folder)), None)
    if found is None:
        raise no_such_path(run)
    return found


def _work(
    recipe: str,
    overrides: list[str] | None,
    stage: str,
    *,
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    unsafe: bool = False,
    trust: bool = False,
    fit: bool = False,
) -> None:
    _not_both(resume, overwrite)
    check_temporary()
    loaded = load(recipe, overrides)
    told(trust)
    from mlx_distill.console import Console
    from mlx_distill.pipeline import run
    from mlx_distill.run_folder import ROOT

    with going_on(ROOT / loaded.name, again=again):
        run(
            loaded,
            Console(),
            upto=stage,
            again=again,
            resume=resume,
            overwrite=overwrite,
            unsafe=unsafe,
            trust=trust,
            fit=fit,
        )


def _not_both(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
