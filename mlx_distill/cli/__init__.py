"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_distill import __version__
from mlx_distill.cli import runs, shows, streams
from mlx_distill.cli.around import tell
from mlx_distill.drive import resumable_if_full
from mlx_distill.errors import DistillError
from mlx_distill.interrupt import Interrupts

app = typer.Typer(
    name="mlx-distill",
    help="Distil a big language model into a small one, on this machine, in MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = {
    "run": runs.run,
    "plan": runs.plan,
    "generate": runs.generate,
    "cache": runs.cache,
    "prune": runs.prune,
    "train": runs.train,
    "quantize": runs.quantize,
    "evaluate": runs.evaluate,
    "export": runs.export,
    "compress": runs.compress,
    "report": runs.report,
    "chat": shows.chat,
    "compare": shows.compare,
    "watch": shows.watch,
    "recipes": shows.recipes,
    "doctor": shows.doctor,
}  # in the order of --help
for name, command in COMMANDS.items():
    app.command(name)(command)


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


def main() -> None:
    """Run the command line, and exit with the code that belongs to what happened."""
    try:
        with Interrupts().caught(), resumable_if_full(), streams.left_quietly():
            streams.prepare()
            app()
    except DistillError as error:
        for line in str(error).splitlines():
            tell(f"error: {line}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # ours are short
            line = f"the name {str(error.filename)[:40]}... is longer than a file may have; choose another"
        elif isinstance(error, FileNotFoundError) and not _is_here():
            line = "the folder that you are in is there no more; go to another"
        else:
            raise
        tell(f"error: {line}")
        sys.exit(DistillError.exit_code)


def _is_here() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
