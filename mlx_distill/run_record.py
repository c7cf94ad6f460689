"""A finished run as its folder tells it, for those who only look at it."""

from pathlib import Path
from typing import Any, NamedTuple

from mlx_distill.errors import DataError, NotFound
from mlx_distill.metrics import Models
from mlx_distill.odd_files import check_own
from mlx_distill.plain_json import parse_object


class RunRecord(NamedTuple):
    """What a run folder holds, as far as the report reads it; what is not there is empty."""

    name: str
    models: Models
    comparisons: list[dict[str, Any]]  # of evaluation.json, as are these two
    tasks: dict[str, dict[str, Any]]
    recipe: str
    environment: dict[str, Any]
    stages: dict[str, Any]
    memory: dict[str, Any]
    log: list[dict[str, Any]]  # metrics.jsonl
    answers: list[dict[str, Any]]  # samples/evaluation.jsonl
    disagreements: list[dict[str, Any]]  # samples/disagreements.jsonl
    generated: list[dict[str, Any]]  # samples/generated.jsonl
    unreadable: list[str]  # what was left out, and why

    def stage(self, name: str) -> dict[str, Any]:
        """What a stage has left in stages.json; empty where it has not."""
        found = self.stages.get(name)
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> RunRecord:
    """What the folder of a run holds; only evaluation.json must be there.

    Raises:
        NotFound, DataError: it is not there, or cannot be read. RunFolderError: what no run leaves is there.
    """
    check_own(folder)
    path = folder / "evaluation.json"
    again = "write it with `mlx-distill evaluate RECIPE`"
    try:
        tree = parse_object(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file; {again}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {again}") from None
    models = tree.get("models") if tree.get("schema") == 1 else None
    if not isinstance(models, dict) or not models or not all(isinstance(x, dict) for x in models.values()):
        raise DataError(f'{path}: expected {{"schema": 1, "models": {{...}}}}; {again}')
    unreadable: list[str] = []

    def whole(name: str) -> dict[str, Any]:
        found = _read_lines(folder / name, unreadable, whole=True)
        return found[0] if found else {}

    def rows(name: str) -> list[dict[str, Any]]:
        return _read_lines(folder / "samples" / name, unreadable)

    compared, tasks = tree.get("comparisons"), tree.get("tasks")
    return RunRecord(
        name=str(tree.get("recipe") or folder.resolve().name),
        models=models,
        comparisons=[one for one in compared if isinstance(one, dict)] if isinstance(compared, list) else [],
        tasks={k: v for k, v in tasks.items() if isinstance(v, dict)} if isinstance(tasks, dict) else {},
        recipe=_read_text(folder / "recipe.yaml", unreadable),
        environment=whole("environment.json"),
        stages=whole("stages.json"),
        memory=whole("memory.json"),
        log=_read_lines(folder / "metrics.jsonl", unreadable),
        answers=rows("evaluation.jsonl"),
        disagreements=rows("disagreements.jsonl"),
        generated=rows("generated.jsonl"),
        unreadable=unreadable,
    )


def _read_text(path: Path, unreadable: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        unreadable.append(f"{path.name} could not be read ({error.strerror}).")
        return ""


def _read_lines(path: Path, unreadable: list[str], whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A killed run leaves half a line, which must not cost the report."""
    text = _read_text(path, unreadable)
    found, broken = [], 0
    for line in [text] if whole else text.split("\n"):
        if not line.strip():
            continue
        try:
            found.append(parse_object(line))
        except ValueError:
            broken += 1
    if broken:
        unreadable.append(f"{path.name}: {broken} {'line' if broken == 1 else 'lines'} could not be read.")
    return found
