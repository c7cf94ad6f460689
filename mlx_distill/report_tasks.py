"""How each task was asked: versions, rows, decoding settings, prompts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.run_record import RunRecord

_FIRST = (
    "version",
    "rows",
    "temperature",
    "samples",
    "seed",
    "max_tokens",
    "batch_size",
    "seconds",
    "digest",
)
_SETTLES = (
    "version",
    "digest",
    "rows",
    "prompt",
    "temperature",
    "samples",
    "max_tokens",
)  # what a score is of


def tasks(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """A table of the tasks of each run, and their prompts; None where no run says."""
    tables = [
        _table(run.tasks, f"How the tasks were asked{f', {run.name}' if len(runs) > 1 else ''}")
        for run in runs
        if run.tasks
    ]
    return {"tables": tables} if tables else None


def _table(found: Mapping[str, Mapping[str, Any]], title: str) -> dict[str, Any]:
    pairs = [(key, value) for values in found.values() for key, value in values.items()]
    keys = dict.fromkeys(key for key, value in pairs if key != "prompt" and value is not None)
    columns = [*(key for key in _FIRST if key in keys), *(key for key in keys if key not in _FIRST)]
    return {
        "title": title,
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [(task, [_shown(values.get(key)) for key in columns]) for task, values in found.items()],
        "prompts": [(task, str(values["prompt"])) for task, values in found.items() if values.get("prompt")],
    }


def _shown(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def unlike(runs: Sequence[RunRecord]) -> list[str]:
    """A warning for each task that two of the runs were not asked alike."""
    lines = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        having = [run for run in runs if task in run.tasks]
        for key in _SETTLES:
            if len({json.dumps(run.tasks[task].get(key)) for run in having}) > 1:
                values = ", ".join(f"{run.name} {_shown(run.tasks[task].get(key))}" for run in having)
                what = {"digest": "other rows", "prompt": "other prompts"}.get(
                    key
                ) or f"{key} differs: {values}"
                lines.append(
                    f"{task} was not the same test for all runs ({what}): its numbers do not compare."
                )
                break
    return lines
