"""What runs in the sandbox's child process: a server that forks one process for each program it is sent.

`sandbox.py` starts it as `python -s -P -S -B child.py BACKEND SCRATCH`. It uses the standard library alone,
and Python starts once, not once a program. It reads a JSON object a line on descriptor 0 and answers with
one a line on descriptor 1; a program sees neither, only a pipe of its own for its values. Nothing here
compares: what a call should return is never sent to this process.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
import types
from collections import Counter, OrderedDict, defaultdict
from typing import Any

MEMORY = 1 << 30  # bytes of address space (Linux)
FILE_SIZE = 1 << 20  # bytes in one file
OPEN_FILES = 32
VALUES = 1 << 20  # bytes of values that one program may send
FOLDER = "16m"  # all that a program keeps in its folder (unshare)

LINUX = sys.platform == "linux"
_PIPE = 3  # the descriptor that a program sends its values on
_DICTS = (dict, defaultdict, Counter, OrderedDict)

# System calls that a program on Linux is refused, as (x86-64, arm64): new processes and threads, other
# programs, signals, another session, the network, other processes' memory and limits, new namespaces.
_REFUSED = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157), "setpgid": (109, 154),
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "prlimit64": (302, 261), "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, kernel's number


def main() -> None:
    backend, scratch = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness decides when to stop
    if backend == "unshare":
        seal(scratch)
    os.chdir(scratch)
    send({"backend": backend})
    with os.fdopen(0, "rb", closefd=False) as requests:
        for number, line in enumerate(requests):
            send(serve(json.loads(line), f"program-{number}", alone=backend == "unshare"))


def send(message: dict[str, Any]) -> None:
    write(1, json.dumps(message).encode() + b"\n")


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def serve(request: dict[str, Any], folder: str, alone: bool) -> dict[str, Any]:
    """Run one program in a process and a folder of its own, and clear both away.

    Args:
        request: `source`, `calls` and `seconds`.
        alone: the server has a process namespace to itself, so whatever else lives in it is the program's.
    """
    os.mkdir(folder)
    pipe, its_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            play(request, its_end, folder)
        finally:
            os._exit(1)
    os.close(its_end)
    if not alone:
        send({"pid": pid})  # should the program kill this server, the harness can still end the program
    lines, ending = listen(pipe, 1 + len(request["calls"]), request["seconds"])
    os.close(pipe)
    status = end(pid, alone)
    for left in os.listdir():  # its own folder, and whatever else it made beside it
        try:
            os.rmdir(left)
        except NotADirectoryError:
            os.unlink(left)
        except OSError:
            shutil.rmtree(left, ignore_errors=True)
    if ending is None and os.WIFSIGNALED(status):
        ending = f"killed (memory or signal {os.WTERMSIG(status)})"
    elif ending is None:
        ending = f"no value: the program ended by itself with exit code {os.waitstatus_to_exitcode(status)}"
    return {"lines": lines.decode("ascii", "replace"), "ending": ending}


def listen(pipe: int, wanted: int, seconds: float) -> tuple[bytes, str | None]:
    """What the program sends, until that is `wanted` lines or its end, and why it was cut short if it was."""
    lines, deadline = b"", time.monotonic() + seconds
    while lines.count(b"\n") < wanted:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return lines, f"timed out after {seconds:g} s"
        piece = os.read(pipe, 1 << 16)
        if not piece:
            time.sleep(0.002)  # closed, so at its end: let its exit code come before our signal
            return lines, None
        lines += piece
        if len(lines) > VALUES:
            return lines, f"returned more than {VALUES >> 20} MiB"
    return lines, None


def end(pid: int, alone: bool) -> int:
    """Kill the program and all that it started; return its exit status."""
    if not alone:
        # macOS answers PermissionError where only the unreaped program is left of the group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have come to its own session yet
        return os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all of the namespace but us: no fork slips through
    status = 0
    with contextlib.suppress(ChildProcessError):
        while True:  # as process 1 we inherit every orphan, so this waits for all of them
            reaped, its_status = os.waitpid(-1, 0)
            status = its_status if reaped == pid else status
    return status


# From here on: in the process of the program.


def play(request: dict[str, Any], its_end: int, folder: str) -> None:
    """Execute the program, then each call, and send a line for each. Does not return."""
    os.setsid()
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, source in ((0, nothing), (1, nothing), (2, nothing), (_PIPE, its_end)):
        os.dup2(source, descriptor)
    os.closerange(_PIPE + 1, 256)
    confine(request["seconds"])
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and pickle look
    loaded = attempt(request["source"], "exec", vars(module))
    report(loaded)
    for call in request["calls"] if loaded[0] == "value" else ():
        report(attempt(call, "eval", vars(module)))
    os._exit(0)


def report(line: list[Any]) -> None:
    write(_PIPE, json.dumps(line).encode() + b"\n")


def attempt(text: str, mode: str, names: dict[str, Any]) -> list[Any]:
    """["value", plain value], or ["error", why in one line]."""
    try:
        return ["value", plain(eval(compile(text, "<program>", mode, dont_inherit=True), names))]
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no way out either
        return ["error", describe(error)]


def describe(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())[:200]
    except BaseException:  # `__str__` is the program's own
        words = ""
    return type(error).__name__ + (f": {words}" if words else "")


def plain(value: Any) -> Any:
    """`value` as JSON, with a tag where JSON would lose the type.

    Types are compared exactly: a subclass could bring its own `==`. The three dicts of `collections`
    are read as the dict they are equal to.
    """
    kind = type(value)
    if value is None or is_one_of(kind, (bool, int, float, str)):
        return value
    if kind is list:
        return [plain(part) for part in value]
    if kind is tuple:
        return {"tuple": [plain(part) for part in value]}
    if is_one_of(kind, (set, frozenset)):
        return {"set": [plain(part) for part in value]}
    if is_one_of(kind, _DICTS):
        return {"dict": [[plain(key), plain(part)] for key, part in dict.items(value)]}
    raise TypeError(f"returned a {kind.__name__}, which is no plain value")


def is_one_of(kind: type, kinds: tuple[type, ...]) -> bool:
    return any(kind is one for one in kinds)  # `in` would ask a metaclass of the program's own


def confine(seconds: float) -> None:
    """Give up, for good, what a function that computes a value has no need of."""
    limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
    limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)  # no further process; root is exempt
    if LINUX:  # macOS refuses RLIMIT_AS
        limit(resource.RLIMIT_AS, MEMORY)
        forbid()


def limit(which: int, value: int) -> None:
    """Set the soft and the hard limit, or leave a stricter one in place."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def forbid() -> None:
    """Linux: drop every capability, die with the server, and refuse the system calls of `_REFUSED`.

    A kernel without seccomp leaves the limits and the namespaces as the only bounds.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_ulong
    libc.prctl(1, number(signal.SIGKILL), number(0), number(0), number(0))  # PR_SET_PDEATHSIG
    libc.prctl(38, number(1), number(0), number(0), number(0))  # PR_SET_NO_NEW_PRIVS
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    architecture = _ARCHITECTURES.get(os.uname().machine)
    if architecture is None or sys.maxsize < 2**32:
        return
    column, kernel_name = architecture
    refused = [numbers[column] for numbers in _REFUSED.values() if numbers[column] is not None]
    # Classic BPF (code, jump if true, jump if false, constant): see the kernel's seccomp_filter.rst.
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # refuse: errno 1, PermissionError
    steps = [(load, 0, 0, 4), (equal, 1, 0, kernel_name), (answer, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, len(refused) + 1, 0, 0x40000000)]  # the x32 calls, a second set of numbers
    steps += [(equal, len(refused) - index, 0, call) for index, call in enumerate(refused)]
    steps += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = b"".join(
        operation.to_bytes(2, sys.byteorder) + bytes([true, false]) + constant.to_bytes(4, sys.byteorder)
        for operation, true, false, constant in steps
    )
    held = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    program = Filter(len(steps), ctypes.addressof(held))
    libc.prctl(22, number(2), ctypes.byref(program), number(0), number(0))  # PR_SET_SECCOMP, a filter


def seal(scratch: str) -> None:
    """In a mount namespace: everything becomes read-only, and `scratch` an empty folder in memory.

    Raises:
        OSError: the kernel is older than 5.12 or refuses. The harness then takes the other backend.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY set, none cleared
    here, recursive = -100, 0x8000  # AT_FDCWD, AT_RECURSIVE
    failed = libc.syscall(ctypes.c_long(442), here, b"/", recursive, read_only, ctypes.c_size_t(32))
    if not failed:
        options = f"size={FOLDER},mode=700".encode()
        failed = libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", ctypes.c_ulong(6), options)
    if failed:
        raise OSError(ctypes.get_errno(), "no read-only mount namespace")


if __name__ == "__main__":
    main()
