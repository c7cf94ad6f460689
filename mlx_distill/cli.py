"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_distill import __version__
from mlx_distill.errors import DistillError
from mlx_distill.interrupt import Interrupts

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe

app = typer.Typer(
    name="mlx-distill",
    help="Distil a big language model into a small one, on this machine, in MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a bundled one.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=50.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")]


@app.command("run")
def run_command(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """All of it: answers, training, baseline, evidence, report."""
    _run(recipe, overrides, upto="report", resume=resume, overwrite=overwrite)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Say what a run would do; loads no weights and writes nothing."""
    from mlx_distill.plan import plan_lines

    for line in plan_lines(_load(recipe, overrides)):
        print(line)


@app.command()
def generate(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Only let the teacher answer `data.prompts`."""
    _run(recipe, overrides, upto="generate", resume=resume, overwrite=overwrite)


@app.command()
def cache(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Every stage up to the stored targets of teachers with `source: cache`."""
    _run(recipe, overrides, upto="cache", resume=resume, overwrite=overwrite)


@app.command()
def prune(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Every stage up to the student that is cut out of a bigger model."""
    _run(recipe, overrides, upto="prune", resume=resume, overwrite=overwrite)


@app.command()
def train(
    recipe: RecipeFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Every stage up to the trained student."""
    _run(recipe, overrides, upto="train", resume=resume, overwrite=overwrite)


@app.command()
def quantize(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Quantize a run's student again; does first what is missing."""
    _run(recipe, overrides, upto="quantize", resume=True, again=True)


@app.command()
def evaluate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Measure a run's models again; does first what is missing."""
    _run(recipe, overrides, upto="evaluate", resume=True, again=True)


@app.command()
def export(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a run's exported models again; first what is missing."""
    _run(recipe, overrides, upto="export", resume=True, again=True)


@app.command()
def compress(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipe files, or names of bundled ones; then overrides, for all of them.",
        ),
    ],
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Several sizes and widths of a student: what each costs, and the smallest that is good enough."""
    _compress(recipes, resume=resume, overwrite=overwrite)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/quickstart.")
    ],
    out: Annotated[Path, typer.Option(help="Where a comparison of several runs goes.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write a run's report anew, or compare several runs."""
    from mlx_distill.report import write_comparison, write_report

    print(write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, out))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A bundled recipe to copy into this folder.")] = None,
) -> None:
    """List the bundled recipes, or copy one."""
    from mlx_distill.bundled import copy_recipe, list_recipes

    if name is not None:
        print(copy_recipe(name, Path.cwd()))
        return
    for found, what in list_recipes():
        print(f"{found:40} {what}")


@app.command()
def doctor() -> None:
    """Say what this machine offers, and what to install."""
    from mlx_distill.doctor import report as look

    for what, value, advice in look():
        print(f"{what:20} {value}" + (f"\n{'':20} -> {advice}" if advice else ""))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mlx-distill {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil a big language model into a small one, on this machine, in MLX."""


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from mlx_distill.bundled import find_recipe
    from mlx_distill.recipe import load

    return load(find_recipe(recipe), overrides or ())


def _run(
    recipe: str,
    overrides: list[str] | None,
    *,
    upto: str,
    again: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    from mlx_distill.errors import RecipeError

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    loaded = _load(recipe, overrides)
    from mlx_distill.console import Console
    from mlx_distill.pipeline import run
    from mlx_distill.run_folder import ROOT

    try:
        run(loaded, Console(), upto=upto, again=again, resume=resume, overwrite=overwrite)
    except DistillError as error:
        if error.exit_code in (75, 130, 143) and (ROOT / loaded.name).exists():
            command = ["run" if upto == "report" else upto, recipe, *(overrides or ())]
            # A stage that is done `again` goes on by itself.
            print(
                f"go on with: {_program()} {shlex.join(command + ([] if again else ['--resume']))}",
                file=sys.stderr,
            )
        raise


def _compress(arguments: list[str], *, resume: bool, overwrite: bool) -> None:
    from mlx_distill.errors import RecipeError

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    overrides = [word for word in arguments if "=" in word]
    recipes = [_load(word, overrides) for word in arguments if "=" not in word]
    if not recipes:
        raise RecipeError("name a recipe to compress; all that is given are overrides")
    from mlx_distill.compress import compress
    from mlx_distill.console import Console

    try:
        compress(recipes, Console(), resume=resume, overwrite=overwrite)
    except DistillError as error:
        if error.exit_code in (75, 130, 143):
            command = [_program(), "compress", shlex.join(arguments), "--resume"]
            print(f"go on with: {' '.join(command)}", file=sys.stderr)
        raise


def _program() -> str:
    """How this program was started, for commands to copy."""
    if Path(sys.argv[0]).name == "mlx-distill":
        return "mlx-distill"
    return shlex.join([sys.executable, "-m", "mlx_distill"])


def main() -> None:
    """Run the command line, and exit with the code that belongs to what happened."""
    try:
        with Interrupts().caught():
            app()
    except DistillError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
