"""Commands that show something, or talk: models, runs, recipes, this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_distill.cli import streams
from mlx_distill.cli.around import told
from mlx_distill.cli.words import (
    MaxTokens,
    MinP,
    ModelName,
    Prompts,
    Raw,
    Seed,
    System,
    Temperature,
    Thinking,
    TopK,
    TopP,
    Trust,
)
from mlx_distill.interrupt import Interrupted

if TYPE_CHECKING:
    from mlx_distill.speech import Speech


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
    trust_remote_code: Trust = False,
) -> None:
    """Talk to a model, in turns; or answer what stdin says."""
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    asked = {"system": system, "max_tokens": max_tokens, "thinking": thinking, "raw": raw}
    options = _speech(trust_remote_code, **asked, **drawn)
    from mlx_distill.chat import chat

    with _left_quietly():
        chat(model, options, prompt or ())


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="As for `chat`; the first is the measure.")
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
    trust_remote_code: Trust = False,
) -> None:
    """Let models answer the same prompts, and see where they part."""
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    asked = {"system": system, "max_tokens": max_tokens, "thinking": thinking, "raw": raw}
    options = _speech(trust_remote_code, **asked, **drawn)
    from mlx_distill.compare import compare

    with _left_quietly():
        compare(models, options, prompts=prompt or (), file=file, rows=rows, out=out)


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Follow a run: stages, progress, losses; at its end the verdict."""
    from mlx_distill.watch import watch as follow

    with _left_quietly():
        try:
            follow(run, every=every, once=once)
        except BrokenPipeError:  # the program behind the pipe has seen enough, which may be days later
            streams.leave()


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A bundled recipe to copy into this folder.")
    ] = None,
) -> None:
    """List the bundled recipes, or copy one."""
    from mlx_distill.bundled import copy_recipe, list_recipes

    if name is not None:
        print(copy_recipe(name, Path.cwd()))
        return
    for found, what in list_recipes():
        print(f"{found:40} {what}")


def doctor() -> None:
    """Say what this machine offers, and what to install."""
    from mlx_distill.doctor import report as look

    for what, value, advice in look():
        print(f"{what:20} {value}" + (f"\n{'':20} -> {advice}" if advice else ""))


def _speech(trust_remote_code: bool, **options: Any) -> "Speech":
    from mlx_distill.speech import speech

    return speech(trust_remote_code=told(trust_remote_code), **options)


@contextmanager
def _left_quietly() -> Iterator[None]:
    """Ctrl-C is how these are left: its code for the shell, and no word to the user."""
    try:
        yield
    except Interrupted as stopped:
        raise typer.Exit(stopped.exit_code) from None
