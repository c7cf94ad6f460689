"""No attack wins on a sandbox that holds; and with one guard removed, one does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from attack_programs import ATTACKS, READING, RESOURCES, WRITING, Attack
from attacks import WAYS, World, try_all, try_attack, world
from sandboxed import broken, skip_without

from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.sandbox import worker
from mlx_distill.evaluate.sandbox.worker import Worker


@pytest.fixture(scope="module")
def laid() -> Iterator[World]:
    with world() as laid:
        yield laid


@pytest.fixture(scope="module")
def server() -> Iterator[Worker]:
    """One for all attacks, so that each also tries to spoil the next."""
    if sandbox.backend() not in sandbox.PROTECTING:
        pytest.skip("nothing on this machine holds programs")
    with Worker(sandbox.backend()) as server:
        yield server


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_no_attack_wins(attack: Attack, laid: World, server: Worker) -> None:
    """On the backend of this machine, in each way in which tests judge."""
    for way in WAYS:
        if attack.within or way != "within":
            assert try_attack(attack, way, server, laid) == [], way


OTHERS = ["bubblewrap", "unshare", "landlock", "seatbelt"]
FILES = [attack for attack in (*READING, *WRITING, *RESOURCES) if attack.seconds >= 1]


@pytest.mark.parametrize("kind", OTHERS)
def test_no_attack_on_files_wins_on_another_backend(kind: str, laid: World) -> None:
    """Files are where backends differ; `make test-slow` tries the others."""
    skip_without(kind)
    if kind == sandbox.backend():
        pytest.skip("tried above")
    with Worker(kind) as server:
        won = {attack.name: try_attack(attack, "referee", server, laid) for attack in FILES}
    assert {name: what for name, what in won.items() if what} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_no_attack_wins_anywhere(kind: str) -> None:
    skip_without(kind)
    tried, won = try_all(kind)
    assert tried > 3 * len(ATTACKS) - 30
    assert won == []


def test_there_are_attacks_of_each_kind() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 45


# Each removes one guard: the file, what stands there, what would stand there without it; the backend; the
# attacks, and the way in which they then win.
GUARDS = {
    "filter of kernel calls": (
        [("confine.py", "                calls.allow_only()", "                pass")],
        "limits",
        ["loopback", "kill a process", "signal by a file", "daemon", "write: times"],
        "values",
    ),
    "rules for files": (
        [("confine.py", "if rules is not None:", "if False:")],
        "landlock",
        ["read: open", "read: sqlite", "write: new file", "write: home"],
        "referee",
    ),
    "new root": (
        [("confine.py", 'if self.backend == "unshare":', "if False:"),
         ("confine.py", '"unshare" else self.work', '"" else self.work'),
         ("server.py", "    renew(guards.work)\n    send",
          "    renew('work')\n    os.chdir('work')\n    send"),
         ("player.py", "    os.chdir(guards.work)\n", ""),
         ("confine.py", 'work: str = os.path.join(setting["scratch"], "work")', "work: str = '.'")],
        "unshare",
        ["read: open", "write: new file"],
        "values",
    ),
    "limit of memory": (
        [("limits.py", "    if LINUX:  # macOS", "    if False:  # macOS")],
        "limits",
        ["memory at once"],
        "values",
    ),
    "watch over the folder": (
        [("monitor.py", "        ending = watched and watched()\n", "")],
        "landlock",
        ["disk"],
        "values",
    ),
    "clearing away": (
        [("server.py", "        renew(guards.work)\n        send", "        send")],
        "landlock",
        ["deep folders"],
        "values",
    ),
    "tests are read after the fork": (
        [("monitor.py", "        pids = [start(lambda: player.play(guards, request), says, hears)]\n",
          "        judge_by = started([1], True)\n"
          "        pids = [start(lambda: player.play(guards, request), says, hears)]\n"),
         ("monitor.py", "        judge_by = started(pids, True)\n", "")],
        "unshare",
        ["frames", "all objects", "memory of its own"],
        "referee",
    ),
    "a server that reads nothing": (
        [("server.py", "        select.select([0], [], [])\n        monitor = os.fork()\n",
          "        request = read_line() or os._exit(0)\n        monitor = os.fork()\n"),
         ("server.py", "                request = read_line()\n", ""),
         ("server.py", "        status = os.wait", "        seen.append(request)\n        status = os.wait"),
         ("server.py", "    gc.freeze()\n", "    seen = []\n"),
        ],
        "unshare",
        ["memory of its own"],
        "referee",
    ),
    "fcntl": (
        [("calls.py", "(0, 1, 2, 3, 4, 5, 6, 7, 1030)", "(0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 1030)")],
        "limits",
        ["signal by a file"],
        "values",
    ),
    "opening": (
        [("calls.py", '"openat": ((257, 56), 2, 0x203', '"openat": ((257, 56), 2, 3')],
        "limits",
        ["write: empty by reading"],
        "values",
    ),
    "limits of others": (
        [("calls.py", "2, 0xFFFFFFFF, (0,))", "1, 0xFFFFFF00, (0,))"),
         ("calls.py", 'if name == "prlimit64"', "if False")],
        "limits",
        ["limit another"],
        "values",
    ),
    "pairs of sockets": (
        [("calls.py", 'if name == "socketpair"', "if False")],
        "landlock",
        ["pair of sockets"],
        "values",
    ),
    "a referee": ([], None, ["equal object", "frames", "mock"], "within"),
}  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
def test_without_a_guard_attacks_win(guard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changes, kind, names, way = GUARDS[guard]
    kind = kind or sandbox.backend()
    if kind != "limits":
        skip_without(kind)
    chosen = [attack for attack in ATTACKS if attack.name in names]
    assert len(chosen) == len(names)
    monkeypatch.setattr(worker, "CODE", broken(tmp_path, *changes))
    with world() as laid, Worker(kind) as server:
        for attack in chosen:
            patient = attack._replace(seconds=max(attack.seconds, 5.0))
            assert try_attack(patient, way, server, laid) != [], attack.name
