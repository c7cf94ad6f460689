"""Programs that attack the sandbox, and what it would look like if one of them won.

Every attack pretends to solve one problem whose right answer cannot be computed: `solve(3)` is a random word.
Whoever passes has cheated. What else it may want is laid out for it by a `World`: files at home and
elsewhere, sockets that listen, a process to kill; `attacks.py` lays it out and tries them.

In the sources, words in capitals stand for parts of that world; `loot` brings something out as the message
of an error, which is part of every outcome, and `loot(WON)` says that something forbidden went well.
"""

from typing import NamedTuple


class Attack(NamedTuple):
    name: str
    tries: str
    source: str
    within: bool = True  # it must also fail where the tests run in its own process, which is weaker
    seconds: float = 1.0  # that it gets


def body(lines: str) -> str:
    """A program whose `solve` does this."""
    return "def solve(n):\n" + "".join(f"    {line}\n" for line in lines.strip("\n").split("\n"))


def syscall(number: int, *arguments: str) -> str:
    """A program that makes a call of the kernel (x86-64) and says if it went well."""
    words = ", ".join(f"ctypes.c_long({one})" if one.isdigit() else one for one in arguments)
    call = f"ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long({number}), {words})"
    return "import ctypes\n" + body(f"if {call} >= 0: loot(WON)")


PROCESSES = [
    Attack("fork bomb", "take all processes", "import os\nwhile True:\n    os.fork()", seconds=0.5),
    Attack("fork", "leave a process that writes later", "import os, time\n" + body("""
if os.fork() == 0:
    time.sleep(0.1)
    open(OUTSIDE + '/mark', 'w').close()
    os._exit(0)""")),
    Attack("daemon", "leave the session, fork twice, write later", "import os, time\n" + body("""
for _ in range(2):
    os.setsid() if _ else None
    if os.fork(): os._exit(0)
time.sleep(0.1)
open(OUTSIDE + '/mark', 'w').close()""")),
    Attack("spawn", "start another program", "import os\n" + body(
        "os.posix_spawn('/bin/sh', ['sh', '-c', 'echo > ' + OUTSIDE + '/mark'], {})")),
    Attack("shell", "start a shell", "import subprocess\n" + body(
        "loot(subprocess.check_output('cat ' + SECRET, shell=True))")),
    Attack("execve", "become a shell", "import os\n" + body(
        "os.execve('/bin/sh', ['sh', '-c', 'touch ' + OUTSIDE + '/mark; sleep 9'], {})")),
    Attack("preload", "become a Python with a library in front", "import os, sys\n" + body("""
os.environ['LD_PRELOAD'] = OUTSIDE + '/mark.so'
os.execv('/usr/bin/env', ['env', 'sh', '-c', 'touch ' + OUTSIDE + '/mark'])""")),
    Attack("multiprocessing", "compute in a pool", "import multiprocessing\n" + body(
        "multiprocessing.get_context('fork').Pool(2).map(print, [1])")),
    Attack("raw clone", "fork without libc's fork", "import ctypes, os, time\n" + body("""
if ctypes.CDLL(None).syscall(ctypes.c_long(56), ctypes.c_long(17), *[ctypes.c_long(0)] * 4) == 0:
    open(OUTSIDE + '/mark', 'w').close()
    os._exit(0)""")),
    Attack("zombies", "leave children that nobody waits for", "import os\n" + body("""
for _ in range(100):
    if os.fork() == 0: os._exit(0)
loot(WON)""")),
    Attack("sleeping threads", "outlive the limit in threads", "import threading, time\n" + body("""
for _ in range(50): threading.Thread(target=time.sleep, args=(60,)).start()"""), seconds=0.4),
    Attack("daemon thread", "go on after the answer", "import threading, time\n" + body("""
def later():
    time.sleep(0.1)
    open(OUTSIDE + '/mark', 'w').close()
threading.Thread(target=later, daemon=True).start()
return 'done'""")),
    Attack("exit handler", "hang at the end", "import atexit, time\natexit.register(time.sleep, 60)\n"
           + body("return 'done'")),
    Attack("raise limits", "get more processes and memory", "import resource\n" + body("""
for which in (resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    resource.setrlimit(which, (10**6, 10**6))
loot(WON)""")),
]  # fmt: skip

SIGNALS = [
    Attack("kill the parent", "end what judges it", "import os\n" + body("os.kill(os.getppid(), 9)")),
    Attack("stop the parent", "hang what judges it", "import os, time\n" + body("""
os.kill(os.getppid(), 19)
time.sleep(60)"""), seconds=0.3),
    Attack("kill all", "end every process", "import os\n" + body("os.kill(-1, 9)")),
    Attack("kill its group", "end its group", "import os\n" + body("os.killpg(0, 9)")),
    Attack("kill a process", "end a process of the user", "import os\n" + body("os.kill(CANARY, 9)")),
    Attack("kill the referee", "end what it takes for its referee", "import os\n" + body("""
for pid in range(os.getpid() - 8, os.getpid() + 9):
    if pid not in (os.getpid(), os.getppid()):
        os.kill(pid, 9)""")),
    Attack("signal by a file", "have the kernel send one (F_SETSIG)", "import fcntl, os\n" + body("""
for target in (CANARY, os.getppid()):
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, target)
    fcntl.fcntl(reading, 10, 9)
    fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(writing, b'x')""")),
    Attack("signal by pidfd", "signal through a descriptor", "import os, signal\n" + body(
        "signal.pidfd_send_signal(os.pidfd_open(CANARY), 9)")),
    Attack("limit another", "have a process run out of time", "import resource\n" + body("""
resource.prlimit(CANARY, resource.RLIMIT_NOFILE, (0, 0))
loot(WON)""")),
    Attack("queue a signal", "signal with a value", "import ctypes, os\n" + body("""
information = (ctypes.c_int * 32)(9, 0, -1)
ctypes.CDLL(None).syscall(ctypes.c_long(129), ctypes.c_long(CANARY), ctypes.c_long(9), information)""")),
    Attack("stop itself", "hang its judge", "import os\n" + body("os.kill(os.getpid(), 19)"), seconds=0.3),
    Attack("ignore all signals", "survive the time limit", "import signal\n" + body("""
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass"""), seconds=0.3),
    Attack("alarms", "start again at every alarm", "import signal\n" + body("""
def again(*_):
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while True: pass
signal.signal(signal.SIGALRM, again)
again()"""), seconds=0.3),
    Attack("patch signal and os", "disarm what ends it", "import os, signal, time\n" + body("""
signal.setitimer = signal.alarm = os.kill = os.killpg = time.monotonic = lambda *a: 0
while True: pass"""), seconds=0.3),
]  # fmt: skip

RESOURCES = [
    Attack("memory at once", "take 8 GiB", "import mmap\n" + body("""
held = mmap.mmap(-1, 8 << 30)
loot(WON)""")),
    Attack("memory", "take memory till there is none", body("""
held = []
while True: held.append(bytes(1 << 26))"""), seconds=3.0),
    Attack("disk", "fill the drive with files", "import os\n" + body("""
number, block = 0, b'x' * (1 << 20)
while True:
    try:
        with open(f'f{number}', 'wb') as file: file.write(block)
    except OSError:
        number = 0
    number += 1
    if number > 400: loot(WON)"""), seconds=0.5),
    Attack("big file", "write one big file", body("""
with open('big', 'wb') as file:
    for _ in range(64): file.write(b'x' * (1 << 20))
loot(WON)""")),
    Attack("many files", "take all files that a drive may have", body("""
for number in range(200_000): open(f'e{number}', 'w').close()
loot(WON)"""), seconds=2.0),
    Attack("deep folders", "leave what no simple removal removes", "import os\n" + body("""
for _ in range(900):
    os.mkdir('d', 0o700)
    os.chdir('d')
os.mkdir('locked', 0)"""), seconds=2.0),
    Attack("descriptors", "take all open files", "import os\n" + body("""
for _ in range(1000): os.dup(1)
loot(WON)""")),
    Attack("endless output", "print for ever", body("while True: print('x' * 1000)"), seconds=0.3),
    Attack("endless value", "answer for ever", "import os\n" + body("""
while True: os.write(3, b'x' * 1000)"""), seconds=0.5),
    Attack("endless lines", "answer in endless lines", "import os\n" + body("""
while True: os.write(3, b'\\n' * 1000)"""), seconds=0.5),
    Attack("huge value", "answer with 64 MiB", body("return 'x' * (64 << 20)")),
    Attack("huge number", "answer with a million digits", body("return 1 << 4_000_000")),
    Attack("huge computation", "never come back from C", body("return 9 ** 9 ** 9"), seconds=0.3),
    Attack("slow expression", "never come back from re", "import re\n" + body(
        "return re.match('(a+)+$', 'a' * 60 + 'b')"), seconds=0.3),
    Attack("deep value", "answer with what is too deep to read", body("""
value = []
for _ in range(100_000): value = [value]
return value""")),
    Attack("deep tuple", "the same of tuples", body("""
value = ()
for _ in range(100_000): value = (value,)
return value""")),
    Attack("value in itself", "answer with what never ends", body("""
value = [1]
value.append(value)
return value""")),
    Attack("one hash", "answer with what takes time by the square to read", "import json, os\n" + body("""
numbers = [(2**61 - 1) * k for k in range(40_000)]
os.write(3, json.dumps(['value', {'set': numbers}]).encode() + b'\\n')
time.sleep(9)""").replace("json, os", "json, os, time"), seconds=0.5),
    Attack("forged depth", "send what no reader reads", "import os\n" + body("""
os.write(3, b'[' * 60_000 + b'\\n')
os.write(3, b'{"value": ' * 6_000 + b'\\n')""")),
    Attack("C stack", "overflow the stack", "import sys\nsys.setrecursionlimit(10**9)\n" + body(
        "return list(map(solve, [n + 1]))"), seconds=3.0),
    Attack("crash", "read address 0", "import ctypes\n" + body("ctypes.string_at(0)")),
    Attack("core dump", "leave an image of its memory", "import os, resource\n" + body("""
resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))
os.abort()""")),
    Attack("collector", "do harm when it is freed", "import os, time\n" + body("""
class Last:
    def __del__(self): time.sleep(60)
global kept
kept = Last()
del kept"""), seconds=0.3),
]  # fmt: skip

_OPENERS = {
    "open": "open(SECRET).read()",
    "os.open": "__import__('os').read(__import__('os').open(SECRET, 0), 999)",
    "io.FileIO": "__import__('io').FileIO(SECRET).read()",
    "posix": "__import__('posix').read(__import__('posix').open(SECRET, 0), 999)",
    "pathlib": "__import__('pathlib').Path(SECRET).read_text()",
    "linecache": "__import__('linecache').getlines(SECRET)",
    "loader": "__import__('importlib.machinery').machinery.SourceFileLoader('x', SECRET).get_data(SECRET)",
    "reload": "(__import__('importlib').reload(__import__('os')), open(SECRET).read())",
    "subclasses": (
        "[c for b in ().__class__.__base__.__subclasses__() if b.__name__ == '_IOBase' "
        "for d in b.__subclasses__() for c in d.__subclasses__() if c.__name__ == 'FileIO'][0](SECRET).read()"
    ),
    "libc": "(lambda c, b: (c.read(c.open(SECRET.encode(), 0), b, 99), b.value))"
    "(__import__('ctypes').CDLL(None), __import__('ctypes').create_string_buffer(99))",
    "mmap": "(lambda o, m: m.mmap(o.open(SECRET, 0), 0, prot=m.PROT_READ)[:])"
    "(__import__('os'), __import__('mmap'))",
    "up": "open('../' * 12 + SECRET.lstrip('/')).read()",
    "symlink": "(__import__('os').symlink(SECRET, 'link'), open('link').read())",
    "hard link": "(__import__('os').link(SECRET, 'hard'), open('hard').read())",
    "rename": "(__import__('os').rename(SECRET, 'mine'), open('mine').read())",
    "copy": "(__import__('shutil').copyfile(SECRET, 'copy'), open('copy').read())",
    "sendfile": "(lambda o: (o.sendfile(o.open('s', 66), o.open(SECRET, 0), 0, 99), open('s').read()))"
    "(__import__('os'))",
    "listing": "(__import__('os').listdir(__import__('os').path.dirname(SECRET)), WON)",
    "walking": "(next(__import__('os').walk(__import__('os').path.dirname(SECRET))), WON)",
    "proc root": "open('/proc/self/root' + SECRET).read()",
    "proc cwd": "open(f'/proc/{__import__(\"os\").getppid()}/cwd/' + SECRET).read()",
    "passwd": "open('/etc/passwd').read()[:60]",
    "users": "__import__('pwd').getpwuid(0)",
    "environment": "(dict(__import__('os').environ), open('/proc/self/environ').read())",
    "parent's environment": "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()",
    "import": "(__import__('sys').path.insert(0, __import__('os').path.dirname(SECRET)), "
    "__import__('planted').content)",
    "sqlite": "__import__('sqlite3').connect(SECRET + '.db').execute('select * from t').fetchall()",
    "stdin": "__import__('sys').stdin.read() + __import__('os').read(0, 99).decode() or 1 / 0",
}
READING = [
    Attack(f"read: {name}", "read a file of the user's", body(f"loot({code})"))
    for name, code in _OPENERS.items()
]

_WRITERS = {
    "new file": "open(OUTSIDE + '/mark', 'w')",
    "overwrite": "open(KEPT, 'w')",
    "append": "open(KEPT, 'a').write('x')",
    "empty by reading": "os.open(KEPT, os.O_RDONLY | os.O_TRUNC)",
    "empty by neither": "os.open(KEPT, 3 | os.O_TRUNC)",
    "truncate": "os.truncate(KEPT, 0)",
    "remove": "os.unlink(KEPT)",
    "move": "os.rename(KEPT, KEPT + '2')",
    "mode": "os.chmod(KEPT, 0)",
    "times": "os.utime(KEPT, (0, 0))",
    "attribute": "os.setxattr(KEPT, 'user.x', b'x')",
    "folder": "os.mkdir(OUTSIDE + '/mark')",
    "pipe": "os.mkfifo(OUTSIDE + '/mark')",
    "link outside": "os.link(KEPT, OUTSIDE + '/mark')",
    "through a symlink": "(os.symlink(OUTSIDE, 'way'), open('way/mark', 'w'))",
    "up": "open('../' * 12 + OUTSIDE.lstrip('/') + '/mark', 'w')",
    "home": "open(os.path.join(os.path.dirname(SECRET), 'mark'), 'w')",
    "shared memory": "(open('/dev/shm/mlx_distill-attack', 'w'), loot(WON))",
    "library": "(open(os.path.join(os.path.dirname(os.__file__), 'mlx_distill_attack.py'), 'w'), loot(WON))",
    "its judge": "(open(CODE + '/child/attack.py', 'w'), loot(WON))",
    "change root": "(os.chroot('.'), loot(WON))",
}
WRITING = [
    Attack(f"write: {name}", "change what is not its own", "import os\n" + body(code))
    for name, code in _WRITERS.items()
]

NETWORK = [
    Attack("loopback", "connect to a server of the user's", "import socket\n" + body(
        "socket.create_connection(('127.0.0.1', PORT), 1).send(b'x')")),
    Attack("datagram", "send a packet", "import socket\n" + body("""
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))
loot(WON)""")),
    Attack("outside", "connect to the world", "import socket\n" + body("""
socket.create_connection(('192.0.2.1', 80), 0.2)
loot(WON)"""), seconds=0.5),
    Attack("names", "ask a name server", "import socket\n" + body("""
loot((WON, socket.getaddrinfo('example.com', 80)))""")),
    Attack("unix socket", "connect by a path", "import socket\n" + body(
        "socket.socket(socket.AF_UNIX).connect(UNIX)")),
    Attack("abstract socket", "connect by a name", "import socket\n" + body(
        "socket.socket(socket.AF_UNIX).connect(ABSTRACT)")),
    Attack("pair of sockets", "send from half a pair to another's socket", "import socket\n" + body("""
one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
one.sendto(b'x', LETTERS)""")),
    Attack("server", "wait for connections", "import socket\n" + body("""
socket.create_server(('127.0.0.1', 0))
loot(WON)""")),
    Attack("download", "use a client of the library", "import urllib.request\n" + body(
        "loot(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/', timeout=0.3).read())"), seconds=0.5),
]  # fmt: skip

KERNEL = [
    Attack("trace the parent", "stop and read its judge (ptrace)", syscall(
        101, "16", "ctypes.c_long(__import__('os').getppid())", "0", "0")),
    Attack("trace a process", "stop and read a process", syscall(
        101, "16", "ctypes.c_long(CANARY)", "0", "0")),
    Attack("read memory", "read a process's memory", "import ctypes, os\n" + body("""
buffer = ctypes.create_string_buffer(64)
mine = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
theirs = (ctypes.c_void_p * 2)(id(loot), 64)
for pid in (os.getppid(), os.getpid() + 1, os.getpid() - 1, CANARY):
    number, other, one, none = (ctypes.c_long(number) for number in (310, pid, 1, 0))
    if ctypes.CDLL(None).syscall(number, other, mine, one, theirs, one, none) > 0: loot(WON)""")),
    Attack("memory file", "read its judge through /proc", "import os\n" + body("""
for pid in (os.getppid(), os.getpid() + 1, os.getpid() - 1):
    try: open(f'/proc/{pid}/mem', 'rb').read(1)
    except OSError as error: assert error.errno in (1, 2, 13), error
    else: loot(WON)""")),
    Attack("descriptors of the parent", "take an open file (pidfd_getfd)", "import ctypes, os\n" + body("""
there = os.pidfd_open(os.getppid())
if ctypes.CDLL(None).syscall(ctypes.c_long(438), there, 0, 0) >= 0: loot(WON)""")),
    Attack("new namespaces", "be root in a namespace", syscall(272, "268435456")),
    Attack("mount", "mount over a folder", syscall(165, "b'none'", "b'/'", "b'tmpfs'", "0", "None")),
    Attack("new mounts", "open a tree of mounts", syscall(428, "ctypes.c_long(-100)", "b'/'", "1")),
    Attack("keyring", "keep something in the kernel (add_key)", syscall(
        248, "b'user'", "b'attack'", "b'x'", "1", "ctypes.c_long(-3)")),
    Attack("io_uring", "have the kernel do it", syscall(425, "4", "ctypes.create_string_buffer(120)")),
    Attack("program in the kernel", "load one (bpf)", syscall(
        321, "0", "ctypes.create_string_buffer(120)", "72")),
    Attack("page faults", "handle its own (userfaultfd)", syscall(323, "1")),
    Attack("counters", "watch another process (perf)", syscall(
        298, "ctypes.create_string_buffer(b'\\1\\0\\0\\0p', 112)", "ctypes.c_long(CANARY)", "0", "0", "0")),
    Attack("file in memory", "execute from memory (memfd)", syscall(319, "b'x'", "0")),
    Attack("System V memory", "leave memory behind", syscall(29, "0", "4096", "950")),
    Attack("System V queue", "leave messages behind", syscall(68, "0", "950")),
    Attack("clock", "set the time", syscall(227, "0", "(ctypes.c_long * 2)(0, 0)")),
    Attack("other numbers", "call through the numbers of x32", syscall(0x40000000 + 39)),
]  # fmt: skip

EQUAL = (
    "def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
)
_FORGED = r"""
import json, os
for line in ([["value", True]], ["value", True], {"value": True, "objects": []}, ["value", "PASSED"], True):
    for descriptor in range(64):
        try: os.write(descriptor, json.dumps(line).encode() + b'\n')
        except OSError: pass
"""
_SEARCH = r"""
import ctypes, gc, re
def solve(n):
    found = set()
    libc, page = ctypes.CDLL(None), ctypes.create_string_buffer(1)
    for middle in {id(one) >> 22 for one in gc.get_objects()} | {id(libc) >> 22, id(page) >> 22}:
        for start in range((middle - 1) << 22, (middle + 2) << 22, 4096):
            if libc.mincore(ctypes.c_void_p(start), 4096, page) == 0:
                found.update(re.findall(rb'kes[t]rel-[0-9a-f]{16}', ctypes.string_at(start, 4096)))
    return found.pop().decode() if found else None
"""
CHEATING = [
    Attack("exit 0", "end well", "import sys\nsys.exit(0)"),
    Attack("exit 0 when called", "end well", "import sys\n" + body("sys.exit(0)")),
    Attack("leave", "end without a word", "import os\n" + body("os._exit(0)")),
    Attack("leave at once", "end without a word", "import os\nos._exit(0)"),
    Attack("SystemExit", "raise what is no Exception", body("raise SystemExit(0)")),
    Attack("KeyboardInterrupt", "raise what stops the harness", body("raise KeyboardInterrupt")),
    Attack("GeneratorExit", "raise what ends a generator", body("raise GeneratorExit")),
    Attack("print", "say that it passed", "print('PASSED\\nok\\n1 passed')\n" + body("print('PASSED')")),
    Attack("forge", "write verdicts to all descriptors", _FORGED + body("return True")),
    Attack("forge when called", "write verdicts to all descriptors", body(_FORGED + "return True")),
    Attack("forge and leave", "write verdicts and end well", _FORGED + "os._exit(0)"),
    *[
        Attack(name, "equal everything", f"class A({base}):\n    {EQUAL}{more}", within=False)
        for name, base, more in (
            ("equal object", "", body("return A()")),
            ("equal number", "int", body("return A()")),
            ("equal text", "str", body("return A()")),
            ("equal list", "list", body("return A()")),
            ("equal class", "type", "class B(metaclass=A): pass\n" + body("return B")),
            ("equal function", "", "    __call__ = lambda self, n: self\nsolve = A()"),
            ("false class", "", "    __class__ = str\n" + body("return A()")),
        )
    ],
    Attack("mock", "be whatever is asked", "from unittest.mock import ANY\n" + body("return ANY"),
           within=False),
    Attack("pickle", "be something else once it is read", "class A:\n    def __reduce__(self):\n"
           "        return open, (OUTSIDE + '/mark', 'w')\n" + body("return A()")),
    Attack("patch json", "send what passes", "import json\njson.dumps = lambda *a, **k: '[\"value\", true]'\n"
           "json.loads = lambda *a, **k: True\n" + body("return 1")),
    Attack("patch os.write", "send what passes", "import os\nwrite = os.write\n"
           "os.write = lambda d, b: write(d, b'[\"value\", true]\\n') and len(b)\n" + body("return 1")),
    Attack("patch builtins", "change what comparing means", "import builtins\n"
           "for name in ('isinstance', 'type', 'len', 'repr', 'str', 'compile', 'AssertionError'):\n"
           "    setattr(builtins, name, lambda *a, **k: True)\n" + body("return 1")),
    Attack("patch modules", "replace the modules of its judge", "import sys\n"
           "for name in list(sys.modules): sys.modules[name] = None\n" + body("return 1")),
    Attack("skip lines", "step over the tests (settrace)", "import sys\n" + body("""
def step(frame, event, argument):
    return step
sys.settrace(step)
frame = sys._getframe(1)
while frame:
    frame.f_trace = step
    frame = frame.f_back
return 1""")),
    Attack("frames", "find what is expected in its callers", r"""
import sys
def solve(n):
    frame, found = sys._getframe(), ''
    while frame:
        found += repr(frame.f_locals) + repr(frame.f_globals)[:100_000] + repr(frame.f_code.co_consts)
        frame = frame.f_back
    import re
    return (re.findall('kes[t]rel-[0-9a-f]{16}', found) or [None])[0]
""", within=False),
    Attack("all objects", "find what is expected among all objects", r"""
import gc, re
def solve(n):
    for one in gc.get_objects():
        for inner in [one, *gc.get_referents(one)]:
            if isinstance(inner, str) and (found := re.findall('kes[t]rel-[0-9a-f]{16}', inner)):
                return found[0]
""", within=False),
    Attack("memory of its own", "find what is expected, or was, in its memory", _SEARCH, within=False,
           seconds=5.0),
    Attack("read the tests", "read what its judge reads", "import os, re, select\n" + body(r"""
for descriptor in (0, 1, 2, 3, 4, 5, 6, 7):
    try:
        if select.select([descriptor], [], [], 0.01)[0]:
            found = re.findall(rb'kes[t]rel-[0-9a-f]{16}', os.read(descriptor, 1 << 16))
            if found: return found[0].decode()
    except OSError: pass""")),
    Attack("numbers", "change what a small number is", "import ctypes\n" + body("""
ctypes.memmove(id(3) + 24, ctypes.string_at(id(4) + 24, 4), 4)
return 3"""), within=False),
    Attack("surrogates", "write what no file takes", body("raise ValueError('\\ud800\\x1b[2J\\r\\0')")),
    Attack("surrogates in a value", "send what no file takes", body("return {'\\ud800': '\\udfff'}")),
    Attack("long names", "flood the log", "A = type('A' * (1 << 20), (Exception,), {})\n"
           + body("raise A()")),
    Attack("error that fails", "fail in the handler", "class A(Exception):\n"
           "    def __str__(self): raise self\n    __name__ = property(lambda self: 1 / 0)\n"
           + body("raise A()")),
    Attack("no folder", "remove the ground", "import os\n" + body("""
os.rmdir(os.getcwd())
os.chdir('/')
return 1""")),
    Attack("generators", "answer for ever", body("yield from iter(int, 1)")),
]  # fmt: skip

ATTACKS = [*PROCESSES, *SIGNALS, *RESOURCES, *READING, *WRITING, *NETWORK, *KERNEL, *CHEATING]
