"""Several processes on one machine against one: the same losses, how fast, and how they end together.

    OPENBLAS_NUM_THREADS=1 python benchmarks/distributed_bench.py [--steps 50] [--ranks 2 4]

The quickstart's student learns from the embedded teacher, live: 50 steps of 2 micro-batches, as
`mlx.launch -n N --backend ring` starts them, on the loopback. `worst_loss_difference_N` is the largest
relative difference of a step's loss between N processes and one. `mean_of_means_difference` is the same
between one process and the usual mistake, taken on the same batches: each of two machines divides by its own
labels, and the means are averaged. `throughput_ratio_N` is tokens a second of N processes over those of one,
medians of the steps after the tenth; on one machine all share its cores, and it shows what the exchange
costs rather than what a second machine wins. `seconds_until_all_ended_N` is from the SIGKILL of the last rank
to the end of all.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

from mlx_distill.data.batch import Batches
from mlx_distill.distributed.dealing import Deal
from mlx_distill.models import load as load_model
from mlx_distill.optimizer import make_optimizer
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import load
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import make_objective, make_step

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
OPTIONS = [
    "data.prompts=null",
    "data.valid=null",
    "data.train.rows=400",
    "train.micro_batches=2",  # of which four processes get halves
    "train.batch_tokens=1024",
    "train.log_every=1",
    "train.eval_every=0",
    "train.save_every=0",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    options = [*OPTIONS, f"train.steps={arguments.steps}"]
    config = {"recipe": "quickstart", "options": options, "blas": mlx_distill.BLAS}
    lines: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, **more: Any) -> None:
        lines.append({"name": name, "value": value, "unit": unit, **more, "config": config})
        print(name, value, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        one, alone = trained(Path(folder), 1, options)
        for size in arguments.ranks:
            many, speed = trained(Path(folder), size, options)
            add(f"worst_loss_difference_{size}", worst(many, one), "relative")
            add(f"throughput_ratio_{size}", speed / alone, "tokens/s, N/1", spread=[speed, alone])
        add("mean_of_means_difference", mean_of_means(options, arguments.steps), "relative")
        for size in arguments.ranks:
            add(f"seconds_until_all_ended_{size}", killed(Path(folder), size), "s")
    record("distributed", lines)


def worst(many: list[float], one: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(many, one, strict=True))


def trained(folder: Path, size: int, options: list[str]) -> tuple[list[float], float]:
    """Loss of each step, and the median of tokens a second."""
    processes = start(folder, size, [*options, f"name=of-{size}"])
    for rank, process in enumerate(processes):
        if process.wait():
            raise SystemExit(f"rank {rank} ended with {process.returncode}")
    lines = (folder / "runs" / f"of-{size}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    speeds = [one["tokens_per_second"] for one in values[10:]]
    return [one["loss"] for one in values], statistics.median(speeds)


def killed(folder: Path, size: int) -> float:
    """Seconds from the death of the last rank to the end of all."""
    options = [*OPTIONS, "train.steps=100000", "name=killed", "--overwrite"]
    processes = start(folder, size, options, stdout=subprocess.PIPE)
    out = processes[0].stdout
    assert out is not None
    next(line for line in out if b" 5/100000 " in line)
    processes[-1].kill()
    before = time.perf_counter()
    codes = [process.wait(timeout=60) for process in processes]
    seconds = time.perf_counter() - before
    if codes != [75] * (size - 1) + [-9]:
        raise SystemExit(f"exit codes {codes}")
    return seconds


def start(
    folder: Path, size: int, options: list[str], stdout: int = subprocess.DEVNULL
) -> "list[subprocess.Popen[bytes]]":
    """The processes that `mlx.launch -n SIZE --backend ring` starts, or one without it."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    hosts = [[f"127.0.0.1:{server.getsockname()[1]}"] for server in servers]
    for server in servers:
        server.close()
    (folder / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
    found = []
    for rank in range(size):
        several = {"MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)} if size > 1 else {}
        environment = {**os.environ, "PYTHONPATH": str(QUICKSTART.parent.parent), **several}
        command = [sys.executable, "-m", "mlx_distill", "train", str(QUICKSTART), *options]
        found.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout))
    return found


def mean_of_means(options: list[str], steps: int) -> float:
    """How far the loss comes away where two machines average their means."""
    prepared = prepare(load(QUICKSTART, options))
    return worst(curve(prepared, steps, means=True), curve(prepared, steps, means=False))


def curve(prepared: Prepared, steps: int, *, means: bool) -> list[float]:
    """Loss of each step of two machines that get one micro-batch each, computed in this process."""
    recipe, size = prepared.recipe, prepared.vocabulary
    teacher = LiveTeacher(load_model("embedded", "teacher.model"), prepared.teachers["teacher"].vocabulary)
    student = make_student(recipe.student, prepared.tokenizer, recipe.seed).model
    student.train()
    optimizer = make_optimizer(recipe.train)
    optimizer.init(student.trainable_parameters())
    functions = make_step(make_objective(student, [teacher], recipe, size), optimizer, recipe)
    batches = Batches(prepared.train, recipe.train.batch_tokens, recipe.seed)
    losses = []
    for step in range(1, steps + 1):
        machines = []
        for rank in range(2):
            for piece in Deal(rank, 2, recipe.train.micro_batches).pieces(step):
                batch = batches[piece.micro_batch]
                sums, parts = functions.gradients(batch, [teacher.targets(batch)], {})
                weight = batch.weights.sum()
                scale = weight if means else mx.array(1.0)
                machines.append(tree_map(lambda x, by=scale: x / by, [sums, parts, weight]))
        # Divided by the labels of both machines; or, where each has divided by its own, by two.
        sums, parts, weight = tree_map(mx.add, *machines)
        norm, _ = functions.update(sums, weight, parts)
        mx.eval(student.state, optimizer.state, parts, norm)
        weighted = sum(recipe.objective[name].weight * float(value) for name, value in parts.items())
        losses.append(weighted / float(weight))
    return losses


if __name__ == "__main__":
    main()
