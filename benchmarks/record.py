"""What every benchmark does with its numbers: JSON lines last on stdout, and kept in `results/`."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(bench: str, lines: list[dict[str, Any]]) -> None:
    """Print one JSON line a measured thing, and append them to `results/BENCH.jsonl`.

    Args:
        lines: each with "name", "value", "unit" and "config".
    """
    made_by = {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{bench}.jsonl", "a", encoding="utf-8") as file:
        for line in lines:
            text = json.dumps({"bench": bench, **line, **made_by})
            file.write(text + "\n")
            print(text)


def _commit() -> str:
    def git(*words: str) -> str:
        command, folder = ["git", *words], Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")  # which it appends to
        return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
