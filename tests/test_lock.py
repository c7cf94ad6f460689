"""One writer at a time: who is refused, and what is taken over."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import workshop
from workshop import command

from mlx_distill import pipeline
from mlx_distill.errors import RunFolderError
from mlx_distill.lock import LOCK, one_writer, refuse_if_taken

HOLDER = """
import sys
from pathlib import Path
from mlx_distill.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds the lock until its stdin ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(workshop.REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_another_process_is_refused_until_the_first_ends_or_is_killed(run_folder: Path) -> None:
    child = holder(run_folder)
    refusal = f"process {child.pid} on {platform.node()}, since .* wait for it, stop it"
    with pytest.raises(RunFolderError, match=refusal) as caught:
        refuse_if_taken(run_folder)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(RunFolderError, match=refusal), one_writer(run_folder):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert (run_folder / LOCK).exists()  # it has not cleaned up
    refuse_if_taken(run_folder)
    with one_writer(run_folder):
        assert json.loads((run_folder / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()

    child = holder(run_folder)
    child.communicate("")
    assert child.returncode == 0
    refuse_if_taken(run_folder)
    assert not run_folder.exists()  # made for the lock, and empty


def test_it_is_given_back_however_the_block_ends(run_folder: Path) -> None:
    def fails() -> None:
        (run_folder / "work").write_text("", encoding="utf-8")
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), one_writer(run_folder):
            fails()
        assert [path.name for path in run_folder.iterdir()] == ["work"]


def test_a_drive_that_fails_in_the_end_hides_no_error(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def work() -> None:
        monkeypatch.setattr(Path, "unlink", fails)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), one_writer(run_folder):
        work()
    refuse_if_taken(run_folder)  # the lock went with the descriptor


def test_a_lock_that_was_removed_before_it_was_had_is_none(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before removes its file and lets go: who has that open locks what nobody else can find."""
    flock, calls = fcntl.flock, list[int]()

    def late(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (run_folder / LOCK).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with one_writer(run_folder):
        assert len(calls) == 2
        with pytest.raises(RunFolderError, match="being written"), one_writer(run_folder):
            pass


@pytest.mark.parametrize(
    ("told", "refused"),
    [
        ({}, None),
        ({"pid": os.getpid(), "host": platform.node(), "born": None}, "wait for it"),
        ({"pid": os.getpid(), "host": platform.node(), "born": "0"}, None),  # another process of that number
        ({"pid": 7, "host": "elsewhere", "born": None}, r"if it has ended, remove .*/\.lock"),
    ],
)
def test_where_no_file_is_locked_its_words_count(
    told: dict[str, Any], refused: str | None, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc").is_dir() and told.get("born") == "0":
        pytest.skip("this system does not tell when a process was born")

    def unsupported(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run_folder.mkdir(parents=True)
    (run_folder / LOCK).write_text(json.dumps(told) if told else "", encoding="utf-8")
    if refused is None:
        with one_writer(run_folder):
            pass
        return
    with pytest.raises(RunFolderError, match=refused), one_writer(run_folder):
        pass
    assert json.loads((run_folder / LOCK).read_text(encoding="utf-8")) == told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_second_run_is_refused_before_anything_is_read(
    how: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: pytest.fail("it was read"))
    with one_writer(folder / "runs" / "taken"):
        (folder / "runs" / "taken" / "fingerprint").write_text("1", encoding="utf-8")
        ended = command(folder, capsys, "train", "recipe.yaml", "name=taken", how)
        assert (ended.code, len(ended.err)) == (2, 1)
        assert ended.err[0].startswith(f"error: runs/taken is being written by process {os.getpid()} on ")
        assert (folder / "runs" / "taken" / "fingerprint").read_text(encoding="utf-8") == "1"


def test_a_run_that_replaces_another_keeps_its_lock(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it is killed while it removes, nothing says that a stage has finished."""
    asked = ["train", "recipe.yaml", "name=again", "train.steps=1"]
    assert command(folder, capsys, *asked).code == 0
    run, removed = folder / "runs" / "again", list[str]()

    class Killed(BaseException):
        pass

    def dies(path: Path) -> None:
        removed.append(path.name)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mlx_distill.run_folder.shutil.rmtree", dies)
        with pytest.raises(Killed):
            command(folder, capsys, *asked, "--overwrite")
    assert removed and (run / "fingerprint").exists() and not (run / "stages.json").exists()
    assert command(folder, capsys, *asked, "--resume").code == 0
    assert json.loads((run / "stages.json").read_text(encoding="utf-8")).keys() >= {"train"}

    locked: list[bool] = []
    plain = pipeline.open_run

    def opened(*arguments: Any, **how: Any) -> Any:
        run = plain(*arguments, **how)
        locked.append((folder / "runs" / "again" / LOCK).exists())
        return run

    monkeypatch.setattr(pipeline, "open_run", opened)
    assert command(folder, capsys, *asked, "--overwrite").code == 0
    assert locked == [True] and not (run / LOCK).exists()
