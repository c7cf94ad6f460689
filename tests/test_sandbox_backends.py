"""Which backend a machine has, what it is told, and that nothing runs where none protects."""

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest
from sandboxed import broken, skip_without

from mlx_distill.errors import DataError, SandboxError
from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.sandbox import Program, backends, commands, worker
from mlx_distill.evaluate.sandbox.child import calls, watch
from mlx_distill.evaluate.sandbox.seatbelt import profile, quoted


def test_the_backend_of_this_machine_holds_what_it_promises() -> None:
    kind = sandbox.backend()
    assert sandbox.require(unsafe=True) == kind
    if kind == "limits":
        pytest.skip("nothing protects here")
    assert sandbox.require() == kind
    assert backends.hole(kind) is None
    assert sandbox.PROTECTING.index(kind) == min(
        i for i, one in enumerate(sandbox.PROTECTING) if not (backends.missing(one) or backends.hole(one))
    )


def test_without_protection_nothing_runs_unless_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    why = {"bubblewrap": "bwrap is not installed"}
    monkeypatch.setattr(backends, "missing", lambda kind: why.get(kind, "not tried"))
    monkeypatch.setattr(backends, "_found", backends._found.__wrapped__)
    with pytest.raises(SandboxError, match="bwrap is not installed.*--confirm-run-unsafe-code") as error:
        sandbox.run([Program("", ("1",))], seconds=1)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert sandbox.require(unsafe=True) == "limits"
    assert sandbox.run([Program("", ("1",))], seconds=1, unsafe=True)[0].values == [1]


def test_a_backend_that_lets_through_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not enough that programs run: "limits" runs them, and they read what they like."""
    assert backends.hole("limits") == "a program can read a file of yours"
    if sys.platform == "linux":
        skip_without("landlock")
        changed = ("confine.py", "                calls.allow_only()", "                pass")
        monkeypatch.setattr(worker, "CODE", broken(tmp_path, changed))
        assert backends.hole("landlock") == "a program can start a process"


def test_a_run_stops_before_anything_long(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    from mlx_distill import pipeline, sandbox_checks
    from mlx_distill.console import Console
    from mlx_distill.data.rows import Row
    from mlx_distill.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "x",
            "student": {"model": "s"},
            "teacher": {"model": "t"},
            "data": {"train": "a.jsonl", "valid": "b.jsonl", "test": "c.jsonl"},
            "objective": {"forward_kl": {}},
            "train": {"steps": 1},
            "evaluate": {"tasks": ["code"]},
        }
    )

    def refuse(unsafe: bool) -> str:
        if unsafe:
            return "limits"
        raise SandboxError("sandbox: none")

    def prepare(*_: object, **__: object) -> None:
        raise DataError("prepared")

    monkeypatch.setattr(sandbox, "require", refuse)
    monkeypatch.setattr(pipeline, "prepare", prepare)
    with pytest.raises(SandboxError):
        pipeline.run(recipe, Console(), root=run_folder)
    for upto, unsafe in (("train", False), ("report", True)):
        with pytest.raises(DataError, match="prepared"):
            pipeline.run(recipe, Console(), root=run_folder, upto=upto, unsafe=unsafe)
    sandbox_checks.check_tasks(recipe, "report", ["evaluate"], unsafe=False)  # measured already

    filters = recipe.generate.filters.model_copy(update={"verified": True})
    verified = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"filters": filters})})
    tested, referenced = Row(prompt="a", tests=("assert f()",)), Row(prompt="a", references=("b",))
    with pytest.raises(SandboxError):
        sandbox_checks.check_prompts(verified, [referenced, tested], [], unsafe=False)
    sandbox_checks.check_prompts(verified, [referenced], [], unsafe=False)
    sandbox_checks.check_prompts(verified, [tested], ["generate"], unsafe=False)
    sandbox_checks.check_prompts(recipe, [tested], [], unsafe=False)


# Texts that other programs read.


def test_the_arguments_of_bubblewrap(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    link = tmp_path / "lib64"
    link.symlink_to("lib")
    arguments = commands.bubblewrap([str(library), str(link)])
    text = " ".join(arguments)
    assert f"--ro-bind {library} {library}" in text
    assert f"--symlink lib {link}" in text
    assert {"--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1"} <= set(arguments)
    assert arguments[-1] == "--"
    assert "--share-net" not in arguments and "--bind" not in arguments and "--proc" not in arguments
    places = [i for i, one in enumerate(arguments) if one in ("--size", "--tmpfs", "--remount-ro")]
    assert [arguments[i] for i in places] == ["--size", "--tmpfs", "--remount-ro"]  # --size is for the next


# Operations and filters of Apple's own profiles in /usr/share/sandbox and /System/Library/Sandbox/Profiles.
OPERATIONS = {
    "default", "file-read*", "file-read-metadata", "file-map-executable", "file-write-create",
    "file-write-data", "file-write-unlink", "sysctl-read", "process-info*", "process-fork", "process-exec*",
    "signal", "network*", "mach-lookup", "mach-register", "ipc-posix*", "ipc-sysv*",
}  # fmt: skip
FILTERS = {"subpath", "literal", "sysctl-name", "target"}


def expressions(text: str) -> list[list[object]]:
    """The lists of a Scheme text; a string comes with its quote, so that it is no symbol."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+', text)
    assert re.sub(r"\s", "", text) == re.sub(r"\s", "", "".join(tokens)), "something is no token"
    stack: list[list[object]] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            assert len(stack) > 1, "closed too often"
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    assert len(stack) == 1, "not closed"
    return stack[0]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("odd", ["/a b", '/a"b', "/a\\b", '/a\\"(deny', "/ä)", "/(allow default)"])
def test_the_profile_for_macos_is_well_formed(odd: str) -> None:
    rules = expressions(profile(["/usr/lib", odd], f"{odd}/work"))
    assert rules[:2] == [["version", "1"], ["deny", "default"]]
    for rule in rules[1:]:
        action, *rest = rule
        assert action in ("allow", "deny")
        operations = [one for one in rest if isinstance(one, str)]
        assert operations and set(operations) <= OPERATIONS
        for one in rest:
            if isinstance(one, list):
                assert one[0] in FILTERS and len(one) == 2
    allowed = [
        operation
        for rule in rules
        if rule[0] == "allow"
        for operation in rule[1:]
        if isinstance(operation, str)
    ]
    assert not {"default", "process-fork", "process-exec*", "network*", "mach-lookup"} & set(allowed)
    written = [
        rule for rule in rules if rule[0] == "allow" and any("file-write" in str(one) for one in rule[1:])
    ]
    targets = [one[1] for rule in written for one in rule[1:] if isinstance(one, list)]
    assert targets == ['"/dev/null"', quoted(f"{odd}/work")]
    strings = re.findall(r'"(?:[^"\\]|\\.)*"', profile(["/usr/lib", odd], f"{odd}/work"))
    assert {re.sub(r"\\(.)", r"\1", one[1:-1]) for one in strings} >= {odd, f"{odd}/work", "/usr/lib"}


def test_no_rule_is_written_for_a_path_that_cannot_be_quoted() -> None:
    with pytest.raises(ValueError, match="control characters"):
        profile(["/usr/lib"], "/a\nb")
    with pytest.raises(AssertionError):  # the reader of this test can fail
        expressions('(allow file-read* (subpath "/a"b"))')


def test_the_numbers_of_kernel_calls_are_the_kernels() -> None:
    headers = [
        Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        Path("/usr/include/asm-generic/unistd.h"),
    ]
    if not all(header.exists() for header in headers):
        pytest.skip("no headers of the kernel here")
    table = dict(calls.ALLOWED)
    table |= {name: numbers for name, (numbers, *_) in calls.NARROW.items()}
    for column, header in enumerate(headers):
        found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text(encoding="utf-8"))
        known = {name: int(number) for name, number in found}
        known |= {"newfstatat": known.get("newfstatat", known.get("fstatat"))}
        for name, numbers in table.items():
            number = numbers[column]
            newer = number is not None and number > max(one for one in known.values() if one)
            assert newer or number == known.get(name), name


def test_the_filter_of_calls_jumps_within_itself() -> None:
    for machine in ("x86_64", "aarch64"):
        steps = calls._filter(machine)
        assert len(steps) < 4096
        assert steps[-1][0] == calls._ANSWER
        for place, (operation, true, false, constant) in enumerate(steps):
            assert 0 <= constant < 2**32
            if operation in (calls._EQUAL, calls._AT_LEAST):
                assert place + 1 + max(true, false) < len(steps) and max(true, false) < 256


# What is looked at, and cleared away.


def test_a_folder_that_holds_too_much_is_noticed(tmp_path: Path) -> None:
    assert watch.fits(str(tmp_path))
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "sparse").write_bytes(b"")
    os.truncate(tmp_path / "sparse", watch.FOLDER_BYTES - 1)  # a link takes a byte
    assert watch.fits(str(tmp_path))
    (tmp_path / "more").write_text("x", encoding="utf-8")
    assert not watch.fits(str(tmp_path))
    (tmp_path / "sparse").unlink()
    for number in range(watch.FOLDER_FILES):
        (tmp_path / f"{number}").mkdir()
    assert not watch.fits(str(tmp_path))


def test_a_folder_is_emptied_however_deep(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept", encoding="utf-8")
    work = tmp_path / "work"
    here = os.getcwd()
    os.mkdir(work)
    try:
        os.chdir(work)
        for _ in range(1500):  # far beyond the longest path, and Python's recursion
            os.mkdir("dddddddddd")
            os.chdir("dddddddddd")
        os.symlink(kept, "link")
        os.symlink(tmp_path, "folder")
        os.mkdir("locked", 0)
    finally:
        os.chdir(here)
    watch.renew(str(work))
    assert os.listdir(work) == []
    assert kept.read_text(encoding="utf-8") == "kept"
    watch.renew(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()


def test_memory_of_a_process_is_read() -> None:
    if sys.platform not in ("linux", "darwin"):
        pytest.skip("neither /proc nor libproc")
    held = ctypes.create_string_buffer(b"x" * (64 << 20))
    assert watch.memory(os.getpid()) > len(held)
    assert watch.memory(2**22 + 1) == 0
