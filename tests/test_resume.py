"""Every kind of run, killed and gone on with, ends with the bits of one that nobody disturbed."""

import hashlib
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
import workshop

from mlx_distill import checkpoint, files, learning, pipeline, recipe, train
from mlx_distill.console import Console
from mlx_distill.on_policy import OwnRows
from mlx_distill.stage_log import StageLog

STEPS = 6
COMMON = [
    f"train.steps={STEPS}",
    "train.save_every=2",
    "train.warmup=2",
    "train.compile=false",  # the first kinds turn it on: each trace takes a second
    "evaluate={tasks: [], baseline: false}",
    "export.formats=[]",
    "quantize=null",
]
COMPILED = "train.compile=true"
LORA = "student={model: student, method: lora, rank: 4, dropout: 0.1}"
OWN = "generate.on_policy={max_tokens: 6, share: 0.9, buffer: 30}"


class Kind(NamedTuple):
    """A kind of run."""

    overrides: list[str]
    upto: str = "train"
    stage: str = "student"  # in which it is killed at a step


def of(*overrides: str, **how: Any) -> Kind:
    return Kind(list(overrides), **how)


KINDS = {
    "full": of(COMPILED),
    "lora": of(LORA, COMPILED),
    "on-policy": of(OWN, "objective={reverse_kl: {}}", "train.batch_tokens=128"),
    "self-teacher": of(LORA, "teacher={model: student, ema: 0.5}"),
    "cached": of("teacher.source=cache", "teacher.top_k=8"),
    "generated": of(
        "data={prompts: good.jsonl, max_tokens: 128}",
        "generate={max_tokens: 30, temperature: 1.0, samples: 4}",
    ),
    "features": of("objective={cross_entropy: {}, hidden_mse: {}}"),
    "rounds": of(
        "student={prune: {sizes: {intermediate_size: 32}, rounds: 2, heal: 4, tokens: 200}}", stage="round-1"
    ),
    "dwq": of(
        "quantize={method: dwq, bits: 3, group_size: 32, steps: 6}", upto="quantize", stage="student-3bit"
    ),
}
RARER = {
    "dora": of(LORA.replace("lora", "dora")),
    "micro-batches": of("train.micro_batches=3", "train.gradient_checkpointing=true", COMPILED),
    "baseline": of("evaluate.baseline=true", upto="baseline", stage="baseline"),
    "several-teachers": of(
        "student={model: student}",
        "teacher={model: teacher, weight: 2, others: [{model: student, top_k: 8}]}",
    ),
    "self-teacher-full": of("student={model: student}", "teacher={model: student, ema: 0.5}", COMPILED),
    "adaptive-on-policy": of(
        OWN.replace("}", ", schedule: adaptive}"),
        "objective={reverse_kl: {}}",
        "data.valid=good.jsonl",
        "train.eval_every=1",
        "train.learning_rate=0.5",  # validation becomes worse
    ),
    "policy-gradient": of("generate.on_policy={max_tokens: 6}", "objective={policy_gradient: {}}"),
    "sampled-cache": of("teacher.source=cache", "teacher.sampled=8"),
    "curriculum": of("train.curriculum={by: teacher_nll, pace: competence}"),
    "attention": of("objective={cross_entropy: {}, attention_relations: {}}"),
    "exits": of("student.shape.num_hidden_layers=3", "objective={cross_entropy: {}, exit_kl: {exits: [2]}}"),
    "sparse": of("student={prune: {sparsity: {share: 0.5}, tokens: 200}}"),
    "qad": of(
        "quantize={method: qad, bits: 3, group_size: 32, steps: 6}", upto="quantize", stage="student-3bit"
    ),
    "other-tokenizer": of(
        "student={model: student}",
        "teacher={model: stranger}",
        "objective={cross_tokenizer: {}, cross_entropy: {}}",
    ),
    "new-tokenizer": of(
        "student.tokenizer={pieces: 40, byte_fallback: false}",
        "teacher=null",
        "objective={cross_entropy: {}}",
    ),
}


class Killed(BaseException):
    """As a process that is not there any more: nothing catches it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


def go(folder: Path, name: str, kind: Kind, *, step: int = 0, write: int = 0) -> tuple[bool, str]:
    """Begin or go on: whether the run came to its end, and what it said.

    Args:
        step: kills it behind this step of the kind's stage. write: at the so manieth flush of a file.
    """
    flush, log, flushed = files.flush, StageLog.metrics, 0

    def flush_or_die(descriptor: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == write:
            raise Killed
        flush(descriptor)

    def log_or_die(self: StageLog, counters: Any, *rest: Any) -> None:
        if self.stage == kind.stage and counters.step == step:
            raise Killed
        log(self, counters, *rest)

    said = io.StringIO()
    mx.random.seed(len(name) + step + write)  # no run may hang on what the process did before
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(files, "flush", flush_or_die)
        patch.setattr(StageLog, "metrics", log_or_die)
        loaded = recipe.load("recipe.yaml", [f"name={name}", *COMMON, *kind.overrides])
        try:
            pipeline.run(loaded, Console(said), upto=kind.upto, resume=True)
        except Killed:
            return False, said.getvalue()
    return True, said.getvalue()


def digests(folder: Path, name: str) -> dict[str, str]:
    """SHA-256 of the weights of every model of a run."""
    models = folder / "runs" / name / "models"
    found = sorted(models.rglob("*.safetensors"))
    return {str(path.relative_to(models)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def every(kinds: dict[str, Kind], *marks: Any) -> list[Any]:
    return [pytest.param(name, kind, id=name, marks=marks) for name, kind in kinds.items()]


@pytest.mark.parametrize(("name", "kind"), every(KINDS) + every(RARER, pytest.mark.slow))
def test_a_killed_run_ends_with_the_same_bits(name: str, kind: Kind, folder: Path) -> None:
    """Killed behind a step that no checkpoint holds, and while files are written, wherever chance has it."""
    chance = random.Random(name)
    assert go(folder, f"whole-{name}", kind)[0]
    whole = digests(folder, f"whole-{name}")
    assert whole

    killed = f"killed-{name}"
    steps = 4 if kind.stage == "round-1" else STEPS
    assert not go(folder, killed, kind, step=chance.randint(3, steps))[0]
    ended, said = go(folder, killed, kind, write=chance.randint(1, 24))
    for _ in range(9):
        if ended:
            break
        ended, more = go(folder, killed, kind, write=chance.randint(8, 60))
        said += more
    assert go(folder, killed, kind)[0]
    assert f"{kind.stage}: going on from step" in said
    assert digests(folder, killed) == whole


# Mistakes: what is left out, or begins anew, when a run goes on


def without_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load

    def forgetful(folder: Path, student: Any, optimizer: Any, *rest: Any) -> Any:
        fresh = optimizer.state
        counters = load(folder, student, optimizer, *rest)
        optimizer.state = fresh
        return counters

    patch.setattr(checkpoint, "load", forgetful)


def with_the_data_from_its_beginning(patch: pytest.MonkeyPatch) -> None:
    make = learning.make_batches

    class FromTheBeginning:
        def __init__(self, *arguments: Any):
            self.batches, self.first = make(*arguments), -1

        def __getitem__(self, index: int) -> Any:
            self.first = index if self.first < 0 else self.first
            return self.batches[index - self.first]

    patch.setattr(learning, "make_batches", FromTheBeginning)


def with_the_keys_from_their_beginning(patch: pytest.MonkeyPatch) -> None:
    seed, steps = train.seed_global, list[int]()

    def begun_anew(run_seed: int, purpose: str, step: int) -> None:
        steps.append(step)
        seed(run_seed, purpose, step - steps[0] + 1)

    patch.setattr(train, "seed_global", begun_anew)


def without_what_the_student_wrote(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OwnRows, "restore", lambda *_: None)


def with_an_average_of_its_own_alone(patch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load
    patch.setattr(checkpoint, "load", lambda folder, student, optimizer, *_: load(folder, student, optimizer))


def as_it_is(patch: pytest.MonkeyPatch) -> None: ...


PLAIN = of(LORA, "data.train={source: good.jsonl, rows: 11}", "train.batch_tokens=64")
MISTAKES = [
    (as_it_is, PLAIN),
    (without_the_optimizer, PLAIN),
    (with_the_data_from_its_beginning, PLAIN),
    (with_the_keys_from_their_beginning, PLAIN),
    pytest.param(without_what_the_student_wrote, KINDS["on-policy"], marks=pytest.mark.slow),
    pytest.param(with_an_average_of_its_own_alone, KINDS["self-teacher"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mistake", "kind"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_left_out_is_seen(
    mistake: Callable[[pytest.MonkeyPatch], None], kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = f"complete-{[PLAIN, *KINDS.values()].index(kind)}"
    if not (folder / "runs" / whole).exists():
        assert go(folder, whole, kind)[0]
    name = mistake.__name__.replace("_", "-")
    assert not go(folder, name, kind, step=4)[0]
    mistake(monkeypatch)
    ended, said = go(folder, name, kind)
    assert ended and "student: going on from step 2" in said
    assert (digests(folder, name) == digests(folder, whole)) is (mistake is as_it_is)


CHILD = """
import os, signal, sys
from mlx_distill.stage_log import StageLog
log, step = StageLog.metrics, int(sys.argv.pop(1))

def log_or_die(self, counters, *rest):
    if counters.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, counters, *rest)

StageLog.metrics = log_or_die
from mlx_distill.cli import main
main()
"""


@pytest.mark.parametrize(
    ("name", "step"), [("lora", 3), pytest.param("on-policy", 5, marks=pytest.mark.slow)]
)
def test_a_process_that_was_killed_goes_on_in_another(name: str, step: int, folder: Path) -> None:
    """SIGKILL, and a lock that nobody has given back."""
    kind, killed = KINDS[name], f"sigkill-{name}"
    asked = ["train", "recipe.yaml", f"name={killed}", *COMMON, *kind.overrides]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(step), *asked],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(workshop.REPOSITORY)},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == -9, child.stderr.decode()
    assert (folder / "runs" / killed / ".lock").exists()
    ended, said = go(folder, killed, kind)
    assert ended and f"student: going on from step {step - 1}" in said
    assert not (folder / "runs" / killed / ".lock").exists()
    if not (folder / "runs" / f"whole-{name}").exists():
        assert go(folder, f"whole-{name}", kind)[0]
    assert digests(folder, killed) == digests(folder, f"whole-{name}")
