"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_distill import __version__
from mlx_distill.errors import DistillError
from mlx_distill.interrupt import Interrupted, Interrupts

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
Unsafe = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code",
        help="Run programs that models wrote even where no sandbox can hold them.",
    ),
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub name, `embedded`, a run, or RUN/MODEL.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Answer this and end; may be given several times.")
]
System = Annotated[str | None, typer.Option(help="A message that opens the chat.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens with this share of the mass.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens with this share of the likeliest's chance.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn; the same seed writes the same answer.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="The switch of chat templates that have it.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Go on with the text, without the chat template.")]


@app.command("run")
def run_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
) -> None:
    """All of it: answers, training, baseline, evidence, report."""
    _run(recipe, overrides, upto="report", resume=resume, overwrite=overwrite, unsafe=unsafe)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Say what a run would do; loads no weights and writes nothing."""
    from mlx_distill.plan import plan_lines

    for line in plan_lines(_load(recipe, overrides)):
        print(line)


@app.command()
def generate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
) -> None:
    """Only let the teacher answer `data.prompts`."""
    _run(recipe, overrides, upto="generate", resume=resume, overwrite=overwrite, unsafe=unsafe)


@app.command()
def cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
) -> None:
    """Every stage up to the stored targets of teachers with `source: cache`."""
    _run(recipe, overrides, upto="cache", resume=resume, overwrite=overwrite, unsafe=unsafe)


@app.command()
def prune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
) -> None:
    """Every stage up to the student that is cut out of a bigger model."""
    _run(recipe, overrides, upto="prune", resume=resume, overwrite=overwrite, unsafe=unsafe)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    unsafe: Unsafe = False,
) -> None:
    """Every stage up to the trained student."""
    _run(recipe, overrides, upto="train", resume=resume, overwrite=overwrite, unsafe=unsafe)


@app.command()
def quantize(recipe: RecipeFile, overrides: Overrides = None, unsafe: Unsafe = False) -> None:
    """Quantize a run's student again; does first what is missing."""
    _run(recipe, overrides, upto="quantize", resume=True, again=True, unsafe=unsafe)


@app.command()
def evaluate(recipe: RecipeFile, overrides: Overrides = None, unsafe: Unsafe = False) -> None:
    """Measure a run's models again; does first what is missing."""
    _run(recipe, overrides, upto="evaluate", resume=True, again=True, unsafe=unsafe)


@app.command()
def export(recipe: RecipeFile, overrides: Overrides = None, unsafe: Unsafe = False) -> None:
    """Check a run's exported models again; first what is missing."""
    _run(recipe, overrides, upto="export", resume=True, again=True, unsafe=unsafe)


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
    unsafe: Unsafe = False,
) -> None:
    """Several sizes and widths of a student: what each costs, and the smallest that is good enough."""
    _compress(recipes, resume=resume, overwrite=overwrite, unsafe=unsafe)


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
def chat(
    model: ModelName,
    prompt: Prompts = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    thinking: Thinking = None,
    raw: Raw = False,
) -> None:
    """Talk to a model, in turns; without a terminal, answer what stdin says."""
    from mlx_distill.speech import speech

    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    options = speech(max_tokens=max_tokens, system=system, thinking=thinking, raw=raw, **how)
    from mlx_distill.chat import chat

    with _left_quietly():
        chat(model, options, prompt or ())


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL MODEL...", help="As for `chat`; the first is the measure.")
    ],
    prompt: Prompts = None,
    file: Annotated[Path | None, typer.Option(help="Rows of a JSONL file, in place of --prompt.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many rows of the file; all if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSONL file for prompts and answers.")] = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    thinking: Thinking = None,
    raw: Raw = False,
) -> None:
    """Let several models answer the same prompts, and see where they part."""
    from mlx_distill.speech import speech

    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    options = speech(max_tokens=max_tokens, system=system, thinking=thinking, raw=raw, **how)
    from mlx_distill.compare import compare

    with _left_quietly():
        compare(models, options, prompts=prompt or (), file=file, rows=rows, out=out)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Follow a run, from another terminal: stages, progress, losses; at its end the verdict."""
    from mlx_distill.watch import watch as follow

    try:
        follow(run, every=every, once=once)
    except Interrupted as stopped:  # the user has seen enough
        raise typer.Exit(stopped.exit_code) from None
    except BrokenPipeError:  # and so has the program behind a pipe; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


@contextmanager
def _left_quietly() -> Iterator[None]:
    """Ctrl-C is how a chat is left, and `| head` how a pipe is: codes for the shell, no word to the user."""
    try:
        yield
    except Interrupted as stopped:
        raise typer.Exit(stopped.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise typer.Exit(128 + signal.SIGPIPE) from None


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
    unsafe: bool = False,
) -> None:
    from mlx_distill.errors import RecipeError

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    loaded = _load(recipe, overrides)
    from mlx_distill.console import Console
    from mlx_distill.pipeline import run
    from mlx_distill.run_folder import ROOT

    try:
        run(loaded, Console(), upto=upto, again=again, resume=resume, overwrite=overwrite, unsafe=unsafe)
    except DistillError as error:
        if error.exit_code in (75, 130, 143) and (ROOT / loaded.name).exists():
            command = ["run" if upto == "report" else upto, recipe, *(overrides or ())]
            # A stage that is done `again` goes on by itself.
            print(
                f"go on with: {_program()} {shlex.join(command + ([] if again else ['--resume']))}",
                file=sys.stderr,
            )
        raise


def _compress(arguments: list[str], *, resume: bool, overwrite: bool, unsafe: bool) -> None:
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
        compress(recipes, Console(), resume=resume, overwrite=overwrite, unsafe=unsafe)
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
