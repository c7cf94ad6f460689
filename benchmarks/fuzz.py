"""Malformed input of every kind, made by chance from right input: is each answered by one line and exit 2?

    OPENBLAS_NUM_THREADS=1 python benchmarks/fuzz.py [--inputs 2000] [--seed 0] [--kinds rows cache ...]

A small workshop (two tiny models, a tokenizer, data, a recipe, finished runs with a cache and checkpoints) is
made once. Each case damages one file of a copy, in one of the ways of `fuzz_damage.py`, and runs the command
that reads it, in this process. What may happen:

- exit 2 and one line on stderr (several for a recipe with several mistakes, one each): the input was refused;
- exit 0: the damage left it right (a comment, a space), or what was damaged could be made again;
- exit 75, for a server that gives no answer: the run can go on when it does.

Anything else is wrong, and is printed: a traceback, another exit code, a case that takes longer than a
minute, a run folder that was left behind by a command that refused its input.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_damage import Damage, any_bytes, any_header, any_json, any_kind, any_yaml
from fuzz_workshop import fill, served

LONGEST = 60  # seconds of one case


class Case(NamedTuple):
    kind: str
    what: str  # was done to it
    code: int | None  # how the command ended; None: not at all
    err: str
    wrong: str | None  # what may not happen


class Kind(NamedTuple):
    """A kind of input: which files, how they are damaged, what reads them."""

    files: tuple[str, ...]  # patterns below the workshop
    damages: tuple[Damage, ...]
    command: tuple[str, ...]
    codes: tuple[int, ...] = (0, 2)
    served: bool = False  # a server answers with `answer.json`
    lines: int | None = 1  # most lines of a refusal


ONE = ("train", "recipe.yaml", "name=other", "train.steps=1", "data.prompts=null", "generate={}")
HALF = ("train", "recipe.yaml", "name=half", "--resume")
OWN_STUDENT = ("student={model: student, method: lora, rank: 2}",)
SERVER = ("generate", "recipe.yaml", "name=other")
CHAT = ("chat", "teacher", "--prompt", "def", "--max-tokens", "2")
KINDS = {
    "recipe": Kind(("recipe.yaml",), (any_bytes, any_yaml), ("plan", "recipe.yaml"), lines=None),
    "rows": Kind(("good.jsonl", "asked.jsonl"), (any_bytes, any_json), ("plan", "recipe.yaml")),
    "problems": Kind(
        ("humaneval.jsonl", "mbpp.jsonl"),
        (any_json, any_bytes),
        (
            "plan",
            "recipe.yaml",
            "evaluate={tasks: [humaneval, mbpp], files: {humaneval: humaneval.jsonl, mbpp: mbpp.jsonl}}",
        ),
    ),
    "safetensors": Kind(("teacher/model.safetensors",), (any_header, any_header, any_bytes), ONE),
    "index": Kind(("teacher/model.safetensors.index.json",), (any_json, any_bytes), ONE),
    "config": Kind(
        ("teacher/config.json", "teacher/tokenizer_config.json", "teacher/generation_config.json"),
        (any_json, any_json, any_bytes),
        ONE,
    ),
    "tokenizer": Kind(("teacher/tokenizer.json",), (any_json, any_json, any_bytes), ONE),
    "student": Kind(
        ("student/*.json", "student/model.safetensors"), (any_json, any_header, any_bytes), ONE + OWN_STUDENT
    ),
    "chat": Kind(("teacher/*.json", "teacher/model.safetensors"), (any_json, any_header, any_bytes), CHAT),
    "endpoint": Kind(
        ("answer.json", "models.json"), (any_json, any_json, any_bytes), SERVER, (0, 2, 75), served=True
    ),
    "cache": Kind(("runs/half/cache/**/*",), (any_bytes,), HALF),
    "checkpoint": Kind(("runs/half/checkpoints/**/*",), (any_bytes, any_json), HALF),
    "samples": Kind(("runs/half/samples/**/*",), (any_bytes, any_json), HALF),
    "half run": Kind(("runs/half/*",), (any_bytes, any_json), HALF),
    "evaluated": Kind(("runs/whole/*",), (any_bytes, any_json), ("evaluate", "recipe.yaml", "name=whole")),
    "report": Kind(
        ("runs/whole/*", "runs/whole/samples/*"), (any_bytes, any_json, any_json), ("report", "runs/whole")
    ),
    "watch": Kind(("runs/whole/*",), (any_bytes, any_json, any_json), ("watch", "whole", "--once")),
}


def fuzz(inputs: int = 2000, seed: int = 0, kinds: list[str] | None = None) -> dict[str, Any]:
    """Try so many malformed inputs, the kinds in turn.

    Returns:
        `fuzz_inputs`; `fuzz_tracebacks`, of which everything that may not happen counts as one; and for each
        of `kinds` how many inputs were "refused", "accepted", "later" and "wrong". Each wrong one is printed.
    """
    named = kinds or list(KINDS)
    counts = {kind: {"refused": 0, "accepted": 0, "later": 0, "wrong": 0} for kind in named}
    with tempfile.TemporaryDirectory() as made:
        root = make(Path(made) / "workshop", named)
        check_sound(root, named)
        for number in range(inputs):
            case = try_case(named[number % len(named)], root, Path(made) / "copy", seed + number)
            ended = {0: "accepted", 2: "refused", 75: "later"}.get(case.code or 0, "wrong")
            counts[case.kind]["wrong" if case.wrong else ended] += 1
            if case.wrong:
                last = " / ".join(case.err.strip().splitlines()[-8:])
                print(f"{case.kind}: {case.what}: {case.wrong}: {last[-700:]}", flush=True)
    wrong = sum(count["wrong"] for count in counts.values())
    return {"fuzz_inputs": inputs, "fuzz_tracebacks": wrong, "kinds": counts}


def make(root: Path, kinds: Sequence[str]) -> Path:
    """Fill `root`: models, data, a recipe; if asked for, a run that is `half` done and a `whole` one."""
    fill(root)
    if any(pattern.startswith("runs/") for kind in kinds for pattern in KINDS[kind].files):
        _make_runs(root)
    for kind in kinds:
        assert _files(root, KINDS[kind]), kind
    return root


def _make_runs(root: Path) -> None:
    for command in (("evaluate", "recipe.yaml", "name=whole"), ("report", "runs/whole")):
        code, err = run(root, command)
        assert code == 0, err
    shutil.copytree(root / "runs" / "whole", root / "runs" / "half")
    stages = root / "runs" / "half" / "stages.json"
    told = json.loads(stages.read_text(encoding="utf-8"))
    stages.write_text(
        json.dumps({name: told[name] for name in ("generate", "score", "cache", "prune")}), encoding="utf-8"
    )


def check_sound(root: Path, kinds: Sequence[str]) -> None:
    """Every command succeeds on what is not damaged; else a refusal would prove nothing."""
    for kind in kinds:
        code, err = ended(root, root.with_name("copy"), KINDS[kind])
        assert code == 0, (kind, code, err)


def _files(root: Path, how: Kind) -> list[Path]:
    found = {path for pattern in how.files for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".html" and path.stat().st_size)


def ended(
    root: Path, scratch: Path, how: Kind, damage: Callable[[Path], None] = lambda _: None
) -> tuple[int | None, str]:
    """How the command of a kind ends on a copy of the workshop, once that was damaged."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(root, scratch)
    damage(scratch)
    with served(scratch) if how.served else contextlib.nullcontext(()) as more:
        return run(scratch, (*how.command, *more))


def try_case(kind: str, root: Path, scratch: Path, seed: int) -> Case:
    """Damage one file of a copy of the workshop, and see what the command says of it."""
    chance, how, what = random.Random(f"{kind} {seed}"), KINDS[kind], ""

    def damage(copy: Path) -> None:
        nonlocal what
        path = chance.choice(_files(copy, how))
        if chance.random() < 0.1 and not how.served:  # the server of `served` is ours, and needs its files
            done = f"{any_kind(path, chance)} in its place"
        else:
            content, done = _damaged(path, how, chance)
            path.write_bytes(content)
        what = f"{path.relative_to(copy)}: {done} (seed {seed})"

    code, err = ended(root, scratch, how, damage)
    wrong = _wrong(how, code, err)
    other = scratch / "runs" / "other"
    if wrong is None and code == 2 and not how.served and other.exists():
        wrong = f"refused, and left a run folder behind: {sorted(path.name for path in other.iterdir())}"
    return Case(kind, what, code, err, wrong)


def _damaged(path: Path, how: Kind, chance: random.Random) -> tuple[bytes, str]:
    """Content of another kind than a damage knows is damaged byte by byte."""
    content, damage = path.read_bytes(), chance.choice(how.damages)
    known: dict[Damage, tuple[str, ...]] = {any_header: (".safetensors",), any_json: (".json", ".jsonl")}
    if path.suffix not in known.get(damage, (path.suffix,)):
        damage = any_bytes
    return damage(content, chance)


def _wrong(how: Kind, code: int | None, err: str) -> str | None:
    lines = err.splitlines()
    if code is None:
        return f"longer than {LONGEST} s"
    if "Traceback" in err:
        return "a traceback"
    if code not in how.codes:
        return f"exit code {code}"
    said = [line for line in lines if line.startswith("error: ")]
    if code == 2 and (not said or len(said) < len(lines) or len(said) > (how.lines or len(said))):
        return f"{len(lines)} lines, of which {len(said)} are errors"
    return None


class _TooLong(BaseException):
    pass


def run(folder: Path, arguments: tuple[str, ...]) -> tuple[int | None, str]:
    """Exit code and stderr of the command line, in this process."""
    from mlx_distill import cli

    def too_long(*_: object) -> None:
        raise _TooLong

    out, err, before, argv = io.StringIO(), io.StringIO(), Path.cwd(), sys.argv
    handler = signal.signal(signal.SIGALRM, too_long)
    os.chdir(folder)
    sys.argv = ["mlx-distill", *arguments]
    signal.alarm(LONGEST)
    code: int | None = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0) if not isinstance(ended.code, str) else 1
    except _TooLong:
        code = None
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
        sys.argv = argv
    return code, err.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Malformed input, and how it is answered.")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=None)
    arguments = parser.parse_args()
    found = fuzz(arguments.inputs, arguments.seed, arguments.kinds)
    for kind, count in found["kinds"].items():
        print(f"{kind:12} " + "  ".join(f"{what} {number:4d}" for what, number in count.items()))
    print(f"{found['fuzz_inputs']} inputs, {found['fuzz_tracebacks']} answered wrongly")
    sys.exit(1 if found["fuzz_tracebacks"] else 0)


if __name__ == "__main__":
    main()
