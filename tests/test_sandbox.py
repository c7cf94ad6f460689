"""Programs that fail, hang, cheat or attack: each is a failed program and nothing more."""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sandboxed import AS_ON_MACOS, WAYS, broken, skip_without, use

from mlx_distill.errors import Fault
from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.sandbox import Failed, Outcome, Program, backends, worker
from mlx_distill.evaluate.sandbox.child.plain import decode
from mlx_distill.progress import Advance


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    use(request.param, monkeypatch, tmp_path)
    return request.param


def run(*programs: Program, seconds: float = 5.0) -> list[Outcome]:
    return sandbox.run(programs, seconds=seconds, workers=1)  # all on one server, one after the other


def why(source: str, *calls: str, seconds: float = 5.0) -> str:
    """Why a program failed that must fail, on a sandbox that must live on."""
    outcome, after = run(Program(source, calls or ("1",)), Program("", ("40 + 2",)), seconds=seconds)
    assert after == Outcome([42], None)
    assert outcome.why is not None
    return outcome.why


def test_values_come_back_with_their_types(way: str) -> None:
    calls = (
        "[1, 1.0, True, None]",
        "(1, [2, (3,)])",
        "{1: 'a', (2, 3): {4}}",
        "'\\ud800 é\\n'",
        "-0.0",
        "10**300",
    )
    outcome = run(Program("", (*calls, "float('inf')")))[0]
    assert outcome.why is None
    assert repr(outcome.values) == repr([*map(eval, calls), math.inf])


def test_dicts_of_collections_are_the_dict_they_equal(way: str) -> None:
    source = "from collections import Counter, OrderedDict, defaultdict"
    calls = ("Counter('aab')", "OrderedDict(a=1)", "defaultdict(list, {1: [2]})")
    assert run(Program(source, calls))[0].values == [{"a": 2, "b": 1}, {"a": 1}, {1: [2]}]


def test_each_call_fails_alone(way: str) -> None:
    source = "def half(x):\n    return 10 // x"
    values = run(Program(source, ("half(2)", "half(0)", "half(5)", "helf(1)")))[0].values
    assert values is not None
    assert [values[0], values[2]] == [5, 2]
    assert values[1] == Failed("ZeroDivisionError: integer division or modulo by zero")
    assert values[3].why.startswith("NameError: name 'helf' is not defined")


def test_calls_share_the_program_but_programs_share_nothing(way: str) -> None:
    source = "import builtins, os\nseen = []\nbuiltins.len = lambda x: 7\nopen('left', 'w').close()"
    calls = ("seen.append(1)", "seen", "len([])", "os.listdir()")
    first, second = run(Program(source, calls), Program("import os", ("len([])", "os.listdir()")))
    assert first.values == [None, [1], 7, ["left"]]
    assert second.values == [0, []]


@pytest.mark.parametrize("source", ["def f(:", "x = 1 / 0", "\0", "import numpy", "raise SystemExit(0)"])
def test_a_program_that_does_not_load_has_no_values(source: str) -> None:
    outcome = run(Program(source, ("1",)))[0]
    assert outcome.values is None
    assert outcome.why
    assert "\n" not in outcome.why


def test_a_loop_or_a_sleep_is_cut_and_earlier_values_stay(way: str) -> None:
    started = time.monotonic()
    endless, asleep = run(
        Program("def f():\n    while True: pass", ("1", "f()", "2")),
        Program("import time", ("1", "time.sleep(60)")),
        seconds=0.3,
    )
    assert time.monotonic() - started < 2
    cut = Failed("timed out after 0.3 s")
    assert endless.values == [1, cut, cut]
    assert asleep.values == [1, cut]


def test_a_sleeping_thread_does_not_outlive_its_program(way: str) -> None:
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    started = time.monotonic()
    run(Program(source, ("1",)))
    assert time.monotonic() - started < 2


def test_no_process_outlives_its_program(way: str, tmp_path: Path) -> None:
    """Where fork works at all (macOS as root), the program's child is killed with it."""
    mark = tmp_path / "mark"
    later = f"time.sleep(0.4)\n    open({str(mark)!r}, 'w')\n    os._exit(0)"
    started = time.monotonic()
    run(Program(f"import os, time\nif os.fork() == 0:\n    {later}", ("1",)))
    assert time.monotonic() - started < 0.4  # nor does anybody wait for it
    time.sleep(0.5)
    assert not mark.exists()


def test_a_fork_bomb_is_contained(way: str) -> None:
    if way == "limits as on macOS" and os.geteuid() == 0:
        pytest.skip("root is exempt from RLIMIT_NPROC, and nothing else stops it here")
    reason = why("import os\nwhile True:\n    os.fork()", seconds=1.0)
    assert reason.startswith(("PermissionError", "BlockingIOError"))


def test_memory_is_bounded_on_linux(way: str) -> None:
    if sys.platform != "linux" or way == "limits as on macOS":
        pytest.skip("macOS has no limit on address space")
    assert why("x = bytearray(4 << 30)") == "MemoryError"
    assert why("x = []\nwhile True:\n    x.append(bytes(1 << 26))") == "MemoryError"


def test_memory_is_watched_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On Linux the watch reads /proc, on macOS what Activity Monitor shows; the rest is the same."""
    changes = [
        AS_ON_MACOS,
        ("limits.py", "MEMORY = 1 << 30", "MEMORY = 1 << 27"),
    ]
    monkeypatch.setattr(worker, "CODE", broken(tmp_path, *changes))
    monkeypatch.setattr(backends, "require", lambda unsafe: "limits")
    grow = "import time\nx = []\nwhile True:\n    x.append(b'x' * (1 << 20))\n    time.sleep(0.001)"
    assert why(grow, seconds=20) == "used more than 128 MiB of memory"
    assert run(Program("x = b'x' * (1 << 26)", ("len(x)",)))[0].values == [1 << 26]


@pytest.mark.parametrize(
    ("source", "call", "reason"),
    [
        ("import sys\nsys.exit(0)", "1", "SystemExit: 0"),
        ("import os\nos._exit(0)", "1", "no value: the program ended by itself with exit code 0"),
        ("import os", "os._exit(0)", "no value: the program ended by itself with exit code 0"),
        ("import os\nos.close(3)", "1", ""),
        ("print('PASSED', 1, 42)", "missing", "NameError"),
        ("import os\nos.write(3, b'PASSED\\n' * 9)", "1", "no value: what came back is not readable"),
        ('import os\nos.write(3, b\'["value", {"set": [[]]}]\\n\')', "1", "no value: what came back"),
        ("class A:\n    pass", "A", "TypeError: returned a type, which is no plain value"),
        ("", "(x for x in [1])", "TypeError: returned a generator, which is no plain value"),
        ("", "map(int, '12')", "TypeError: returned a map, which is no plain value"),
        ("", "{}.keys()", "TypeError: returned a dict_keys, which is no plain value"),
        ("import os\nos.write(3, b'[' * 100000 + b'\\n')", "1", "no value: what came back is not readable"),
        ("", "'x' * (2 << 20)", "returned more than 1 MiB"),
        ("x = []\nx.append(x)", "x", "RecursionError"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return [f()]", "f()", ""),
        ("class A(Exception):\n    def __str__(self):\n        raise self\nraise A", "1", "A"),
    ],
)
def test_no_way_out_is_a_value(source: str, call: str, reason: str) -> None:
    assert why(source, call, seconds=1.0).startswith(reason)


EQUAL = "def __eq__(self, other):\n        return True\n"


@pytest.mark.parametrize(
    "source",
    [
        f"class A:\n    {EQUAL}",
        f"class A(int):\n    {EQUAL}",
        f"class A(list):\n    {EQUAL}",
        f"class M(type):\n    {EQUAL}    __hash__ = type.__hash__\nclass A(metaclass=M):\n    pass",
    ],
)
def test_an_object_equal_to_everything_is_no_value(source: str) -> None:
    assert why(source, "A()") == "TypeError: returned a A, which is no plain value"
    assert why(source, "[A()]") == "TypeError: returned a A, which is no plain value"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_killing_or_stopping_the_parent_kills_no_harness(
    way: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.3)
    source = f"import os, time\nos.kill(os.getppid(), {int(number)})\ntime.sleep(60)"
    reason = why(source, seconds=0.5)
    assert reason == "killed the process that ran it" or reason.startswith(("PermissionError", "timed out"))


def test_no_network_on_linux(way: str) -> None:
    if sys.platform != "linux" or way == "limits as on macOS":
        pytest.skip("macOS: a later sandbox profile")
    assert why("import socket\nsocket.create_connection(('127.0.0.1', 9))").startswith("PermissionError")


@pytest.mark.parametrize("kind", ["bubblewrap", "unshare"])
def test_namespaces_let_it_write_in_its_folder_only(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(kind)
    monkeypatch.setattr(backends, "require", lambda unsafe: kind)
    mine = tmp_path / "mine"
    mine.write_text("kept", encoding="utf-8")
    for line in (f"open({str(mine)!r}, 'w')", f"os.unlink({str(mine)!r})", f"os.rename({str(mine)!r}, 'x')"):
        assert why("import os\n" + line).startswith(("OSError", "FileNotFoundError"))
    assert mine.read_text(encoding="utf-8") == "kept"
    assert run(Program("open('own', 'w').write('a')", ("open('own').read()",)))[0].values == ["a"]
    seen = run(Program("import os", ("os.getpid()", "os.listdir('/')")))[0].values
    assert seen is not None
    assert seen[0] < 99  # it has numbers of its own
    assert not {"proc", "sys", "run"} & set(seen[1])


def test_it_sees_neither_our_environment_nor_our_descriptors(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    source = (
        "import os\ndef is_open(descriptor):\n    try:\n        os.fstat(descriptor)\n    except OSError:\n"
        "        return False\n    return True"
    )
    calls = ("dict(os.environ)", "[n for n in range(512) if is_open(n)]", "input()")
    values = run(Program(source, calls))[0].values
    assert values == [{}, [0, 1, 2, 3], Failed("EOFError: EOF when reading a line")]
    if "macOS" not in way:
        environment = run(Program("", ("open('/proc/self/environ').read()",)))[0].values
        assert "SECRET_TOKEN" not in str(environment)


def test_nothing_is_left_behind(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(worker.tempfile, "tempdir", str(folder))
    source = "import os\nos.mkdir('a')\nopen('a/b', 'w').close()\nopen('c', 'w').close()\nos.mkdir('d', 0)"
    run(Program(source, ("1",)), Program("while True: pass", ("1",)), seconds=0.2)
    assert list(folder.iterdir()) == []


def test_the_code_around_it_cannot_be_imported(way: str) -> None:
    assert why("import child") == "ModuleNotFoundError: No module named 'child'"
    assert run(Program("import sys", ("[n for n in sys.modules if n.startswith('child')]",)))[0].values == [
        []
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does this on Linux alone")
@pytest.mark.parametrize("kind", ["unshare", "landlock"])
def test_a_program_ends_with_its_server(kind: str) -> None:
    """Whatever kills the server: nobody else would end the program."""
    skip_without(kind)
    with worker.Worker(kind) as server, ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(server.ask, Program("import time\ntime.sleep(60)", ("1",)), 60.0)
        while not (pids := started_by(server)):
            time.sleep(0.01)
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGKILL)
        with pytest.raises(worker.ServerDied):
            asleep.result()
        for pid in pids:
            until = time.monotonic() + 20
            while Path(f"/proc/{pid}").exists() and state_of(pid) != "Z" and time.monotonic() < until:
                time.sleep(0.01)
            assert not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z"


def started_by(server: worker.Worker) -> list[int]:
    """Process ids of the sessions that a server's monitor has started, as seen from here."""
    assert server.process is None or server.process.pid
    tree: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            _, _, rest = path.read_text(encoding="utf-8").rpartition(")")
            tree.setdefault(int(rest.split()[1]), []).append(int(path.parent.name))
    below = tree.get(server.process.pid, []) if server.process is not None else []
    found = []
    while below:
        pid = below.pop()
        below += tree.get(pid, [])
        with suppress(OSError):
            if os.getsid(pid) == pid:
                found.append(pid)
    return found


def state_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    return "Z"


def test_keys_that_share_a_hash_are_refused() -> None:
    """A set of them would take the harness time by the square; one that is merely large does not."""
    shared = [(2**61 - 1) * number for number in range(2_000)]
    for tag in ({"set": shared}, {"dict": [[key, 1] for key in shared]}):
        with pytest.raises(ValueError, match="share their hashes"):
            decode(tag)
    assert decode({"set": list(range(-5_000, 5_000))}) == set(range(-5_000, 5_000))


def test_the_order_is_kept_and_progress_counts(way: str) -> None:
    programs = [Program(f"def f(x):\n    return x * {k}", ("f(2)", "f(3)")) for k in range(60)]
    seen = []

    @contextmanager
    def progress(title: str, total: int, unit: str) -> Iterator[Advance]:
        seen.append(total)
        yield lambda amount=1, **columns: seen.append(amount)

    outcomes = sandbox.run(programs, seconds=5, workers=3, progress=progress)
    assert seen == [60] + [1] * 60
    assert [outcome.values for outcome in outcomes] == [[2 * k, 3 * k] for k in range(60)]
    assert sandbox.run([], seconds=5) == []


def test_sets_of_strings_have_one_order() -> None:
    """So that two evaluations of the same answers agree."""
    program = Program("", ("list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})",))
    assert len({str(run(program)[0].values) for _ in range(3)}) == 1


def test_a_server_that_starts_no_more_is_no_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "require", lambda unsafe: "limits")
    monkeypatch.setattr(worker, "CODE", Path("missing"))
    with pytest.raises(Fault, match="no process can be started any more .*No module named 'child'"):
        run(Program("", ("1",)))


def test_a_machine_without_child_processes_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CODE", Path("missing"))
    with pytest.raises(Fault, match="runs no program here .*No module named 'child'"):
        backends._found.__wrapped__()
