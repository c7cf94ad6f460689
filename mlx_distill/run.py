"""The run folder: what a run leaves behind, and what it shows while it works."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill.console import Console
from mlx_distill.errors import RunFolderError
from mlx_distill.files import make_folder, write_json, write_text
from mlx_distill.following import Following
from mlx_distill.interrupt import Interrupts
from mlx_distill.plain_json import parse_object

AGAIN = "remove it and go on with --resume: what is whole is not done again"


class Run:
    """An open run folder; `run_folder.open_run` makes one."""

    def __init__(self, folder: Path, console: Console, interrupts: Interrupts | None = None):
        self.folder, self.console = folder, console
        self.following = Following(folder, console)
        self.progress = self.following.progress
        self.interrupts = interrupts or Interrupts()

    def stage(self, name: str, work: Callable[[], dict[str, Any]], options: Any = None) -> dict[str, Any]:
        """The result of a stage: from the folder if it has finished before, else by doing it.

        Args:
            options: plain values on which the result depends, beside the fingerprint of the run. Finished
                with others, the stage and those after it are forgotten.
        """
        finished = self.stages()
        if name in finished and finished[name].get("options") == options:
            return finished[name]
        if name in finished:
            order = list(finished)
            self.forget(set(order[order.index(name) :]))
        self.interrupts.check()  # of a signal that came while the stage before was saved
        with self.following.stage(name):
            try:
                result = work() if options is None else {**work(), "options": options}
                write_json(self.folder / "stages.json", {**self.stages(), name: result})
            except PermissionError as error:
                if error.filename is None or not Path(error.filename).is_relative_to(self.folder):
                    raise
                why = f"{error.filename}: cannot be written ({error.strerror})"
                raise RunFolderError(f"{why}; check its permissions, and go on with --resume") from None
        return result

    def stages(self) -> dict[str, Any]:
        """Finished stages and their results, in the order in which they finished.

        Raises:
            RunFolderError: the file was damaged.
        """
        path = self.folder / "stages.json"
        try:
            found = parse_object(path.read_bytes(), finite=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path}: damaged ({error}); {AGAIN}") from None
        for name, result in found.items():
            if not _is_result(result):
                raise RunFolderError(f"{path}: damaged (`{name[:40]}` is no result of a stage); {AGAIN}")
        return found

    def forget(self, names: set[str]) -> None:
        """Let stages be done again."""
        kept = {name: result for name, result in self.stages().items() if name not in names}
        write_json(self.folder / "stages.json", kept)
        self.following.forget(names)

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write `samples/NAME.jsonl`, one object a line, and its SHA-256 beside it."""
        make_folder(self.folder / "samples")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.folder / "samples" / f"{name}.jsonl"
        write_text(path, lines)
        write_text(path.with_name(f"{path.name}.sha256"), f"{_sha256(lines.encode())}  {path.name}\n")

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of `samples/NAME.jsonl`.

        Raises:
            RunFolderError: the file is gone, or was damaged.
        """
        path = self.folder / "samples" / f"{name}.jsonl"
        told = path.with_name(f"{path.name}.sha256")
        try:
            content = path.read_bytes()
            if told.exists() and told.read_bytes().split()[:1] != [_sha256(content).encode()]:
                raise ValueError(f"its SHA-256 is not that in {told.name}")
            # Not `splitlines`, which also splits at U+2028 and others that a string in JSON may hold.
            return [parse_object(line) for line in content.split(b"\n") if line]
        except (OSError, ValueError) as error:
            why = "gone" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            raise RunFolderError(
                f"{path}: {why}; remove {self.folder / 'stages.json'} and go on with --resume: "
                "what is whole is not done again"
            ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_result(value: Any) -> bool:
    """Whether a value of stages.json has the types that later stages rely on."""
    if not isinstance(value, dict):
        return False
    numbers = [value[key] for key in ("train_tokens", "train_seconds") if key in value]
    names = value.get("models", [])
    return (
        all(type(number) in (int, float) for number in numbers)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    )
