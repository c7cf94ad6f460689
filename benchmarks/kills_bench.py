"""SIGKILL at random instants while answers are written and targets stored: is anything else left behind?

    OPENBLAS_NUM_THREADS=1 python benchmarks/kills_bench.py [--kills 200] [--each 20] [--seed 0]

`mlx-distill cache` of a small recipe (prompts that the embedded teacher answers, then a cache of its
likeliest tokens) runs in a process of its own. It is killed at a random instant of the half second after it
has left something new below `samples/` or `cache/`, one time in five at any instant after its start, and gone
on with by `--resume`, until it ends by itself or has been killed `--each` times; then the next run begins. Of
each run that has ended every file below `samples/` and `cache/` is compared, byte for byte, with those of a
run that nobody disturbed. Blocks of answers and shards are small here, so that the kills fall on many of
them: 8 answers a block, 300 counted labels a shard.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from record import record

SHARD = 300  # counted labels
RECIPE = """
name: kills
student:
  shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: embedded, source: cache, top_k: 16}
data:
  train: {source: pocket, rows: 120}
  prompts: {source: pocket, rows: 40, start: 200}
generate: {max_tokens: 60, batch_size: 4, samples: 2, temperature: 0.9, top_k: 20}
objective: {forward_kl: }
train: {steps: 1}
evaluate: {tasks: []}
"""
CHILD = """
import sys
from mlx_distill import answers
from mlx_distill.cache import capture
answers.BATCHES, capture.SHARD = 2, int(sys.argv.pop(1))
from mlx_distill.cli import main
main()
"""


def started(folder: Path, name: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, going on where it was."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(SHARD), "cache", "kills.yaml", f"name={name}", "--resume"],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begun(process: "subprocess.Popen[str]") -> None:
    """Wait for the line that opens the first stage, or the end."""
    assert process.stdout is not None
    for line in process.stdout:
        if "labelled rows" in line:
            return


def moved(process: "subprocess.Popen[str]", run: Path) -> None:
    """Wait until another file stands below samples/ or cache/, or the end."""
    before = names(run)
    while process.poll() is None and names(run) == before:
        time.sleep(0.01)


def disturbed(folder: Path, name: str, kills: int, chance: random.Random, longest: float) -> list[str]:
    """Start, kill and go on until the run ends; during what it was killed each time."""
    instants: list[str] = []
    while True:
        process = started(folder, name)
        try:
            if len(instants) == kills:
                process.wait()
            elif chance.random() < 0.2:
                process.wait(chance.uniform(0, longest))
            else:
                moved(process, folder / "runs" / name)
                process.wait(chance.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            instants.append(reached(folder / "runs" / name))
            continue
        output = process.stdout.read() if process.stdout is not None else ""
        if process.returncode:
            raise SystemExit(f"{name} ended with {process.returncode}: {output}")
        return instants


def reached(run: Path) -> str:
    """What a run that was killed was doing."""
    stages = run / "stages.json"
    told = stages.read_text(encoding="utf-8") if stages.exists() else ""
    if '"cache"' in told:
        return "ending"
    if '"generate"' in told:
        return "caching"
    return "writing answers" if (run / "samples").exists() else "starting"


def names(run: Path) -> list[Path]:
    """Every file below samples/ and cache/."""
    return sorted(path for part in ("samples", "cache") for path in (run / part).rglob("*") if path.is_file())


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in names(run)}


def different(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=20, help="kills of one run, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = parser.parse_args()
    chance, when, runs, off = random.Random(arguments.seed), Counter[str](), 0, list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "kills.yaml").write_text(RECIPE, encoding="utf-8")
        process = started(folder, "undisturbed")
        begun(process)
        began = time.perf_counter()
        output = process.communicate()[0]
        longest = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the undisturbed run ended with {process.returncode}: {output}")
        expected = content(folder / "runs" / "undisturbed")
        while when.total() < arguments.kills:
            runs += 1
            most = min(arguments.each, arguments.kills - when.total())
            when.update(disturbed(folder, f"run-{runs}", most, chance, longest))
            off += different(content(folder / "runs" / f"run-{runs}"), expected)
            print(f"{when.total()} kills, {runs} runs, different: {off}", file=sys.stderr, flush=True)
    config = {
        "runs": runs,
        "during": dict(when),
        "files_of_a_run": len(expected),
        "seconds_of_a_run": round(longest, 2),
        "seed": arguments.seed,
        "different": off,
    }
    record(
        "kills",
        [
            {"name": "kills", "value": when.total(), "unit": "SIGKILLs", "config": config},
            {"name": "files_differing", "value": len(off), "unit": "files, over all runs", "config": config},
        ],
    )
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
