"""The fast tests on an unkind machine: do they all pass?

    python benchmarks/suite_bench.py

A clone of this tree, in a folder with spaces, runs its fast tests twice at the same time, in processes

- without a network: a network namespace of their own, in which only the loopback is up;
- whose home folder cannot be written: a read-only mount;
- whose locale is plain ASCII: LC_ALL=C, with neither of Python's ways to make that UTF-8.

- suites: how many ran. tests_passed, tests_failed, tests_skipped: of all of them; errors count as failed.

Needs Linux, and `unshare` with the right to namespaces.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

REPOSITORY = Path(__file__).resolve().parent.parent
SUITES = 2
# What runs inside the namespaces: it looks whether they are as they should be, then becomes the tests.
INSIDE = """
import fcntl, os, socket, struct, sys
made = socket.socket()
fcntl.ioctl(made, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running
home = os.environ["HOME"]
try:
    open(os.path.join(home, "probe"), "w")
    sys.exit("the home folder can be written")
except OSError:
    pass
try:
    socket.create_connection(("192.0.2.1", 80), 1)
    sys.exit("there is a network")
except OSError:
    pass
if sys.getfilesystemencoding() == "utf-8" or sys.stdout.encoding.lower() == "utf-8":
    sys.exit("the locale is UTF-8")
os.execv(sys.executable, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:]])
"""
UNKIND = 'mount --bind "$HOME" "$HOME" && mount -o remount,bind,ro "$HOME" && exec "$@"'


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="two words ") as scratch:
        root = Path(scratch)
        clone, home = root / "a clone", root / "my home"
        subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
        if (REPOSITORY.parent / "shared").is_dir():
            (root / "shared").symlink_to(REPOSITORY.parent / "shared")
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
        environment |= {
            "HOME": str(home),
            "LC_ALL": "C",
            "LANG": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONPATH": str(clone),
            "OPENBLAS_NUM_THREADS": "1",
        }
        environment.pop("PYTHONIOENCODING", None)
        spaces = ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        command = [*spaces, "sh", "-c", UNKIND, "sh", sys.executable, "-c", INSIDE, *sys.argv[1:]]
        suites = [
            subprocess.Popen(
                command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for _ in range(SUITES)
        ]
        told = [suite.communicate()[0].decode(errors="replace") for suite in suites]
    found: dict[str, int] = {}
    for text, suite in zip(told, suites, strict=True):
        print("\n".join(text.splitlines()[-30:]), file=sys.stderr)
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text.strip().rpartition("\n")[2])
        if not counts:
            raise SystemExit(f"the tests did not run: exit code {suite.returncode}")
        for number, what in counts:
            kind = "failed" if what.startswith("error") else what
            found[kind] = found.get(kind, 0) + int(number)
    lines: list[dict[str, Any]] = [
        {"name": "suites", "value": SUITES, "unit": "at once", "config": {"pytest": sys.argv[1:]}}
    ]
    for kind in ("passed", "failed", "skipped"):
        lines.append({"name": f"tests_{kind}", "value": found.get(kind, 0), "unit": "tests", "config": {}})
    record("suite", lines)


if __name__ == "__main__":
    main()
