"""A hundred kills in one kind of run, faults in checkpoint writes, malformed input: is what is left right?

    OPENBLAS_NUM_THREADS=1 python benchmarks/soak_bench.py [--kills 100] [--inputs 2000] [--seed 0]

- kills, students_differing: a run like the quickstart, smaller (the embedded teacher answers prompts, its
  likeliest tokens are stored, student and baseline are trained, quantized, evaluated, exported, reported),
  killed by SIGKILL at random instants, with its children, and gone on with by `--resume` until it ends. Then
  its students, its baseline, its samples, the numbers of its evaluation and those in its report are compared
  with those of a run that nobody disturbed: bit for bit, but for seconds and memory. It is repeated until
  there were so many kills.
- unreadable_states: checkpoints after SIGKILL, ENOSPC and EIO at every system call of a write, by
  checkpoint_faults.py.
- fuzz_inputs, fuzz_tracebacks: fuzz.py.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import record

RECIPE = """
name: soak
student:
  shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: embedded, source: cache, top_k: 16}
data:
  train: {source: pocket, rows: 60}
  prompts: {source: pocket, rows: 400, start: 200}
  valid: {source: pocket, rows: 20, split: valid}
  test: {source: pocket, rows: 20, split: test}
generate: {max_tokens: 60, batch_size: 16, temperature: 0.9, top_k: 20}
objective:
  forward_kl: {weight: 1.0}
  cross_entropy: {weight: 0.5}
train: {steps: 120, batch_tokens: 1024, learning_rate: 3e-3, log_every: 10, eval_every: 40, save_every: 10}
quantize: {method: dwq, bits: 4, group_size: 32, steps: 60}
evaluate: {tasks: [fidelity, code], max_tokens: 40}
"""
RUN = [sys.executable, "-m", "mlx_distill", "run", "soak.yaml", "--resume"]
LONGEST = 8.0  # seconds after its start at which a process is killed at the latest


def main() -> None:
    parser = argparse.ArgumentParser(description="What is left after kills, faults and malformed input.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = soak(arguments.kills, arguments.seed)
    from checkpoint_faults import unreadable_states
    from fuzz import fuzz

    tried, wrong = unreadable_states()
    lines.append(line("unreadable_states", wrong, f"of {tried} faults", {"tried": tried}))
    found = fuzz(arguments.inputs, arguments.seed)
    config = {"seed": arguments.seed, "kinds": found["kinds"]}
    lines.append(line("fuzz_inputs", found["fuzz_inputs"], "malformed inputs", config))
    lines.append(line("fuzz_tracebacks", found["fuzz_tracebacks"], "answered wrongly", config))
    record("soak", lines)


def soak(kills: int, seed: int) -> list[dict[str, Any]]:
    chance, stages, differing, runs = random.Random(seed), Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        seconds = finished(root / "undisturbed")
        expected = left_by(root / "undisturbed")
        print(f"undisturbed: {seconds:.0f} s, {len(expected)} files and numbers", file=sys.stderr)
        while sum(stages.values()) < kills:
            folder, runs = root / f"run-{runs}", runs + 1
            disturb(folder, chance, stages, kills)
            found = left_by(folder)
            differing += [f"{folder.name}: {name}" for name in expected if found.get(name) != expected[name]]
            differing += [f"{folder.name}: {name} is too much" for name in found.keys() - expected.keys()]
            print(f"{folder.name}: {sum(stages.values())} kills, {len(differing)} differ", file=sys.stderr)
            shutil.rmtree(folder)
    for name in differing:
        print(f"differs: {name}", file=sys.stderr)
    students = {name.partition(":")[0] for name in differing}
    config = {"runs": runs, "by_stage": dict(stages), "compared": len(expected), "seed": seed}
    return [
        line("kills", sum(stages.values()), "SIGKILLs", config),
        line("students_differing", len(students), f"of {runs} runs", config),
    ]


def disturb(folder: Path, chance: random.Random, stages: "Counter[str]", kills: int) -> None:
    """Run it to its end, killing it on the way until there were `kills` in all."""
    while True:
        process = started(folder)
        left = sum(stages.values()) < kills
        try:
            process.wait(chance.uniform(0.2, chance.choice([LONGEST / 2, LONGEST])) if left else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stages[stage_of(folder)] += 1
            continue
        if process.returncode:
            last = (folder / "log").read_text(encoding="utf-8")[-2000:]
            raise SystemExit(f"{folder}: ended with {process.returncode}: {last}")
        return


def started(folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    (folder / "soak.yaml").write_text(RECIPE, encoding="utf-8")
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(RUN, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finished(folder: Path) -> float:
    """Seconds that it takes undisturbed."""
    before = time.monotonic()
    process = started(folder)
    if process.wait():
        raise SystemExit((folder / "log").read_text(encoding="utf-8")[-2000:])
    return time.monotonic() - before


def stage_of(folder: Path) -> str:
    """The stage that a run is in, by those that are finished."""
    from mlx_distill.layout import STAGES

    path = folder / "runs" / "soak" / "stages.json"
    if not path.parent.is_dir():
        return "before it began"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return next((name for name in STAGES if name not in done), "after the end")


def left_by(folder: Path) -> dict[str, str]:
    """What a run leaves whose bits are promised: path or number -> digest or value."""
    run = folder / "runs" / "soak"
    found: dict[str, str] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and name.split("/")[0] in ("models", "samples", "cache", "probes"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for metrics in evaluation["models"].values():
        metrics.pop("train_seconds", None)
    found["evaluation.json"] = json.dumps(evaluation)
    page = (run / "report.html").read_text(encoding="utf-8")
    shown = Counter(re.findall(r'<data value="([^"]*)"', page))
    written = [value for metrics in evaluation["models"].values() for value in metrics.values()]
    numbers = [repr(value) for value in written if isinstance(value, (int, float))]
    found["report.html"] = json.dumps([shown[number] for number in numbers])
    return found


def line(name: str, value: float, unit: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "config": config}


if __name__ == "__main__":
    main()
