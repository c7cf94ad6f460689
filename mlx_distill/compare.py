"""`mlx-distill compare`: several models answer the same prompts, and it is said where they part."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_distill.chat import Screen, checked
from mlx_distill.console import Console
from mlx_distill.data.rows import Row, no_such_path, read_jsonl
from mlx_distill.differences import Difference, difference
from mlx_distill.errors import RecipeError
from mlx_distill.files import write_text
from mlx_distill.memory import GIB, machine_gib
from mlx_distill.model_names import find_model
from mlx_distill.odd_files import odd
from mlx_distill.side_by_side import view
from mlx_distill.speaker import Said, Speaker
from mlx_distill.speech import Speech

SHARE = 0.9  # of the memory that models may take; the rest is for what they keep of their prompts


def compare(
    names: Sequence[str],
    options: Speech,
    *,
    prompts: Sequence[str] = (),
    file: Path | None = None,
    rows: int | None = None,
    out: Path | None = None,
    screen: Screen | None = None,
) -> None:
    """Let every model answer every prompt, and show it.

    Answers are shown as they come where all models fit in memory; else one model after the other answers
    everything, and then it is shown.

    Args:
        prompts: texts. file: JSONL rows in their place, the first `rows` of them.
        out: a JSONL file for prompts and answers, written whole at the end.

    Raises:
        DistillError: what is wrong in the input, before a weight is read.
    """
    _check(names, prompts, file, rows, out)
    for name in names:
        find_model(name)  # all of them, before the first tokenizer is loaded
    asked = [Row(prompt=checked(text, "--prompt"), origin="--prompt") for text in prompts]
    if file is not None:
        asked = read_jsonl(file, rows)
    speakers = [Speaker(name, options) for name in names]
    encoded = [[speaker.encode(row, options.system) for row in asked] for speaker in speakers]
    screen = screen or Screen()
    done = None
    if sum(map(_bytes_of, speakers)) <= SHARE * machine_gib() * GIB:
        screen.wake(*speakers)
    else:
        done = [_all_answers(*one, screen) for one in zip(speakers, encoded, strict=True)]
    vocabularies = [speaker.loaded.tokenizer.get_vocab() for speaker in speakers]
    shown, lines = view(screen, names, len(asked)), list[dict[str, Any]]()
    for place, row in enumerate(asked):
        answers: dict[str, tuple[Said, Difference | None]] = {}
        with shown.prompt(place, row):
            for number, speaker in enumerate(speakers):

                def show(text: str, number: int = number) -> None:
                    shown.piece(number, text)

                if done is None:
                    said = speaker.answer(encoded[number][place], show)
                else:
                    said = done[number][place]
                    show(said.text)
                parted = None
                if number:
                    first, tokenizer = answers[names[0]][0], speakers[0].loaded.tokenizer
                    parted = difference(first, said, tokenizer, vocabularies[number] == vocabularies[0])
                answers[speaker.name] = said, parted
                shown.answered(number, said, parted)
        lines.append(_line(row, answers))
    if out is not None:
        write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        screen.note(f"answers: {out}")


def _all_answers(speaker: Speaker, prompts: list[list[int]], screen: Screen) -> list[Said]:
    """The answers of a model that is alone in memory; it is gone when they are there."""
    screen.wake(speaker)
    with Console(sys.stderr).progress(f"{speaker.name}: answers", len(prompts), "prompts") as advance:
        answers = []
        for prompt in prompts:
            answers.append(speaker.answer(prompt, lambda _: None))
            advance()
    speaker.forget_weights()
    return answers


def _line(row: Row, answers: dict[str, tuple[Said, Difference | None]]) -> dict[str, Any]:
    """What the file says of one prompt."""
    return {
        "prompt": row.question(),
        "reference": row.answer() or next(iter(row.references), None),
        "answers": {
            name: {
                "text": said.text,
                "end": said.end,
                "tokens": len(said.tokens),
                "time_to_first_token_ms": 1e3 * said.first_seconds,
                "tokens_per_second": said.tokens_per_second,
                "difference": None if parted is None else parted._asdict(),
            }
            for name, (said, parted) in answers.items()
        },
    }


def _check(
    names: Sequence[str], prompts: Sequence[str], file: Path | None, rows: int | None, out: Path | None
) -> None:
    """Refuse what the command line gets wrong.

    Raises:
        RecipeError, NotFound: in one line.
    """
    if len(names) < 2:
        raise RecipeError(f"compare takes two models or more; got {names[0]!r} alone")
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise RecipeError(f"{doubled!r} is named twice; its answers would be the same")
    if (file is None) == (not prompts):
        raise RecipeError("ask with --prompt, once or more, or with the rows of a --file; one of the two")
    if rows is not None and (file is None or rows < 1):
        raise RecipeError("--rows is how many of the rows of --file are asked, 1 or more")
    if out is None:
        return
    if what := odd(out):  # which writing would replace
        raise RecipeError(f"--out: {out} is {what}; name a file")
    if out.is_dir():
        raise RecipeError(f"--out: {out} is a folder; name a file in it")
    if not out.absolute().parent.is_dir():
        raise no_such_path(out.parent)
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise RecipeError(f"--out: {out.parent} cannot be written; check its permissions")
    if file is not None and out.resolve() == file.resolve():
        raise RecipeError(f"--out: {out} is the file that the prompts come from; name another")


def _bytes_of(speaker: Speaker) -> int:
    """Of a model's weights, which need not be read for that."""
    arrays: Any = tree_flatten(speaker.loaded.model.parameters())
    return sum(array.nbytes for _, array in arrays)
