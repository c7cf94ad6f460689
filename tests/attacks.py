"""Tries the programs of `attack_programs.py` on the sandbox, and sees what they win."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attack_programs import ATTACKS, Attack

from mlx_distill.evaluate.sandbox import Outcome, Program, Refereed, Runnable, Within, backend
from mlx_distill.evaluate.sandbox.worker import CODE, Worker

PRELUDE = "def loot(what):\n    raise RuntimeError(str(what)[-150:])\n\n"
WAYS = ("values", "referee", "within")  # in which a program is judged: `Program`, `Refereed`, `Within`


@dataclass
class World:
    """What an attack might want, laid out in the open, and what the right answer is."""

    expected: str
    home: Path
    outside: Path
    token: str
    canary: subprocess.Popen[bytes]
    listeners: list[socket.socket]
    names: dict[str, object]

    def reset(self) -> None:
        """After an attack that won, so that it does not count twice."""
        for path in self.outside.iterdir():
            if path.name not in ("kept", "unix", "letters"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.home / "secret").write_text(self.token, encoding="utf-8")
        self.outside.joinpath("kept").unlink(missing_ok=True)
        self.outside.joinpath("kept").write_text("kept", encoding="utf-8")
        self.home.joinpath("mark").unlink(missing_ok=True)
        if self.canary.poll() is not None:
            self.canary = _canary()
            self.names["CANARY"] = self.canary.pid

    def harmed(self) -> Iterator[str]:
        """What is not as it was laid out."""
        kept = self.outside / "kept"
        if sorted(path.name for path in self.outside.iterdir()) != ["kept", "letters", "unix"]:
            yield "changed a folder outside"
        elif (
            kept.read_text(encoding="utf-8") != "kept"
            or kept.stat().st_mode & 0o777 != 0o644
            or kept.stat().st_mtime < 9
        ):
            yield "changed a file outside"
        elif sys.platform == "linux" and os.listxattr(kept):
            yield "gave a file outside an attribute"
        if (self.home / "mark").exists() or not (self.home / "secret").exists():
            yield "changed the home folder"
        if self.canary.poll() is not None:
            yield "killed a process"
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(9)
                yield "reached a socket"


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Lay it out, and take it away again."""
    place = Path.home() if os.access(Path.home(), os.W_OK) else None  # one that is read-only is left alone
    with (
        tempfile.TemporaryDirectory(prefix=".mlx_distill-attack-", dir=place) as home,
        tempfile.TemporaryDirectory(prefix="mlx_distill-attack-") as outside,
        contextlib.ExitStack() as stack,
    ):
        token = "lo" + "ot-" + secrets.token_hex(8)
        Path(home, "secret").write_text(token, encoding="utf-8")
        Path(home, "planted.py").write_text(f"content = {token!r}", encoding="utf-8")
        with contextlib.closing(sqlite3.connect(Path(home, "secret.db"))) as database:
            database.execute("create table t (x)")
            database.execute("insert into t values (?)", (token,))
            database.commit()
        Path(outside, "kept").write_text("kept", encoding="utf-8")
        Path(outside, "kept").chmod(0o644)
        abstract = f"\0mlx_distill-{secrets.token_hex(4)}"
        stream, letters = socket.SOCK_STREAM, socket.SOCK_DGRAM
        places = [
            (socket.AF_INET, stream, ("127.0.0.1", 0)),
            (socket.AF_UNIX, stream, f"{outside}/unix"),
            (socket.AF_UNIX, letters, f"{outside}/letters"),
            *([(socket.AF_UNIX, stream, abstract)] if sys.platform == "linux" else []),
        ]
        listeners = []
        for family, kind, address in places:
            listeners.append(stack.enter_context(socket.socket(family, kind)))
            listeners[-1].bind(address)
            listeners[-1].setblocking(False)
            if kind == stream:
                listeners[-1].listen()
        canary = _canary()
        names = {
            "SECRET": f"{home}/secret", "OUTSIDE": outside, "KEPT": f"{outside}/kept",
            "PORT": listeners[0].getsockname()[1], "UNIX": f"{outside}/unix", "LETTERS": f"{outside}/letters",
            "ABSTRACT": abstract, "CANARY": canary.pid, "WON": "it " + "won",
        }  # fmt: skip
        expected = "kes" + "trel-" + secrets.token_hex(8)
        laid = World(expected, Path(home), Path(outside), token, canary, listeners, names)
        try:
            yield laid
        finally:
            laid.canary.kill()
            laid.canary.wait()


def _canary() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])


def problem(source: str, way: str, expected: str) -> Runnable:
    """A program, and the problem whose answer nobody can compute, judged in one of three ways."""
    if way == "values":
        return Program(source, ("solve(3)",))
    test = f"assert solve(3) == {expected!r}"
    if way == "referee":
        return Refereed(source, "", (test,), ("solve",))
    return Within(source, "", (test,))


def passed(outcome: Outcome, way: str, expected: str) -> bool:
    """As a caller judges."""
    return outcome.values == [expected if way == "values" else True]


def try_attack(attack: Attack, way: str, worker: Worker, laid: World) -> list[str]:
    """What the attack won; nothing, on a sandbox that holds.

    Args:
        way: "values", "referee" or "within", see `WAYS`.
        worker: runs it, and an honest program after it.
    """
    names = laid.names | {"CODE": str(CODE)}
    given = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + PRELUDE
    honest = f"def solve(n):\n    return {laid.expected!r} if n == 3 else None"
    before = time.monotonic()
    assert passed(worker.run(problem(honest, way, laid.expected), 10), way, laid.expected)
    usual = time.monotonic() - before

    won = []
    before = time.monotonic()
    outcome = worker.run(problem(given + attack.source, way, laid.expected), attack.seconds)
    took = time.monotonic() - before
    if passed(outcome, way, laid.expected):
        won.append("passed")
    shown = repr(outcome)
    if "it " + "won" in shown or laid.token in shown or "root:x:" in shown or "pw_dir" in shown:
        won.append(f"brought out {outcome.why}")
    if outcome.why is not None and not (outcome.why.isprintable() and len(outcome.why) <= 600):
        won.append("wrote what no log takes")
    if took > 3 * attack.seconds + 5:
        won.append(f"took {took:.1f} s of {attack.seconds:g}")
    if len(processes(worker)) > 1:
        won.append(f"left processes {processes(worker)}")

    before = time.monotonic()
    after = worker.run(problem(honest, way, laid.expected), 10)
    took = time.monotonic() - before
    if not passed(after, way, laid.expected):
        won.append(f"spoilt the next problem: {after.why}")
    if took > 50 * usual + 1:
        won.append(f"slowed the next problem, {took:.2f} s instead of {usual:.2f}")
    listing = worker.run(Program("import os", ("os.listdir()",)), 10)
    if listing.values != [[]]:
        won.append(f"left files for the next problem: {listing}"[:200])
    if attack.source.count("sleep(0."):
        time.sleep(0.15)  # it may have meant to write by now
    found = list(laid.harmed())
    if found:
        laid.reset()
    return won + found


def processes(worker: Worker) -> list[int]:
    """On Linux, process ids of the worker's server and of all that was forked from it and is not gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            here = worker.scratch is not None and os.path.realpath(worker.scratch.name).encode() in line
            if here and b"child.server" in line and not re.match(rb"[^\0]*(unshare|bwrap)\0", line):
                found.append(int(path.parent.name))
    return found


def try_all(kind: str | None = None, attacks: Sequence[Attack] = ATTACKS) -> tuple[int, list[str]]:
    """Every attack in every way that it must fail, on one backend; by default the machine's own.

    Returns:
        how many were tried, and a line for each that won something.
    """
    tried, won = 0, []
    with world() as laid, Worker(kind or backend()) as worker:
        for attack in attacks:
            for way in WAYS:
                if way == "within" and not attack.within:
                    continue
                tried += 1
                won += [f"{attack.name}, {way}: {what}" for what in try_attack(attack, way, worker, laid)]
    return tried, won


def main() -> None:
    """Try all attacks on the backends that are named."""
    for kind in sys.argv[1:] or [backend()]:
        tried, won = try_all(kind)
        print(f"{kind}: {len(won)} of {tried} won", *won, sep="\n  ")  # noqa: T201


if __name__ == "__main__":
    main()
