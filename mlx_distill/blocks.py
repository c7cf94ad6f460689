"""Blocks of written answers: files that are whole or not there, so that a killed run loses one at most.

`samples/written/00000.jsonl` and so on hold one answer a line and close with a digest of the lines before,
by which a damaged block is noticed and written again. A block is a function of the recipe alone: which
answers stand in it does not depend on when a run was stopped.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_distill.asked import Asked
from mlx_distill.files import make_folder, write_text
from mlx_distill.written import Written

Question = tuple[int, int]  # index into `Prepared.prompts`, and which of the answers to it


def split(prompts: int, samples: int, size: int) -> list[list[Question]]:
    """Every question in blocks of `size`, the answers to a prompt next to each other."""
    every = [(prompt, sample) for prompt in range(prompts) for sample in range(samples)]
    return [every[at : at + size] for at in range(0, len(every), size)]


def line_of(one: Written) -> dict[str, Any]:
    """An answer as plain values, as `samples/` has it."""
    line: dict[str, Any] = {"row": one.prompt, "sample": one.sample, "answer": one.text}
    line |= {"tokens": one.tokens, "end": one.end, "finished": one.finished}
    given = {"mean_nll": one.mean_nll, "refused": one.refused}
    return line | {key: value for key, value in given.items() if value is not None}


def write_block(path: Path, written: Sequence[Written]) -> None:
    lines = "".join(_dumped(line_of(one)) for one in written)
    make_folder(path.parent)
    write_text(path, lines + _closing(lines))
    _begun(path).unlink(missing_ok=True)


def read_block(path: Path, questions: Sequence[Question], asked: Sequence[Asked]) -> list[Written] | None:
    """The answers to these questions; None where the block is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        closing = text.rindex("\n", 0, -1) + 1
        if text[closing:] != _closing(text[:closing]):
            return None
        written = _parsed(text[:closing], asked)
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return written if [(one.prompt, one.sample) for one in written] == list(questions) else None


class Begun:
    """Answers of a block that is not whole yet, one appended at a time: a server's, which cost money or time.

    A context manager; `write_block` removes the file once the block stands in its place.
    """

    def __init__(self, block: Path, asked: Sequence[Asked]):
        self.path = _begun(block)
        self.answers: dict[Question, Written] = {}
        if not self.path.exists():
            return
        for line in self.path.read_bytes().split(b"\n"):
            try:
                [one] = _parsed(line.decode(), asked)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                continue  # the line that a kill cut off
            self.answers[one.prompt, one.sample] = one

    def __enter__(self) -> "Begun":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(_dumped(line_of(one)) for one in self.answers.values()))
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, one: Written) -> None:
        self._file.write(_dumped(line_of(one)))
        self._file.flush()


def _begun(block: Path) -> Path:
    return block.with_name(f".{block.name}.begun")


def _parsed(lines: str, asked: Sequence[Asked]) -> list[Written]:
    # Not `splitlines`, which also splits at U+2028 and others that a string in JSON may hold.
    return [_written(json.loads(line), asked) for line in lines.split("\n") if line]


def _written(line: dict[str, Any], asked: Sequence[Asked]) -> Written:
    return Written(
        line["row"],
        line["sample"],
        asked[line["row"]].row,
        line["answer"],
        line["tokens"],
        line["finished"],
        line.get("mean_nll"),
        line["end"],
        line.get("refused"),
    )


def _dumped(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _closing(lines: str) -> str:
    return _dumped({"sha256": hashlib.sha256(lines.encode()).hexdigest()})
