"""Pipes, devices and links in place of files: nothing waits, reads without end, or leads outside."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_distill import recipe
from mlx_distill.cache.store import refuse_other
from mlx_distill.compare import compare
from mlx_distill.data.rows import read_jsonl
from mlx_distill.errors import DataError, DistillError, ModelError, RecipeError, RunFolderError
from mlx_distill.layout import FINGERPRINT
from mlx_distill.look import find_run
from mlx_distill.model_names import find_model
from mlx_distill.odd_files import check_own, odd, odd_in
from mlx_distill.report_page import write_page
from mlx_distill.run_record import read_run
from mlx_distill.safetensors_check import check_model_folder
from mlx_distill.speech import speech
from mlx_distill.time_limit import time_limit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / FINGERPRINT).write_text("0", encoding="utf-8")
    (folder / "log.txt").write_text("", encoding="utf-8")
    return folder


def test_what_a_path_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "file").touch()
    assert [odd(tmp_path / name) for name in ("pipe", "link", "lost", "file", "none", ".", "a" * 999)] == [
        "a pipe", "a pipe", None, None, None, None, None,
    ]  # fmt: skip
    assert odd("/dev/zero") == "a device"
    with socket.socket(socket.AF_UNIX) as one:
        monkeypatch.chdir(tmp_path)  # the name of a socket has a hundred characters at most
        one.bind("socket")
        assert odd("socket") == "a socket"


def _inside(run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "latest").symlink_to("../log.txt")  # as trackers leave them


def _above(run: Path) -> None:
    """The folder itself lies on another drive."""
    moved = run.rename(run.parent.parent / "elsewhere")
    run.symlink_to(moved)


@pytest.mark.parametrize("change", [lambda run: None, _inside, _above])
def test_what_runs_leave_is_fine(change: Callable[[Path], None], run: Path) -> None:
    change(run)
    check_own(run)
    check_own(run / "none")


ODD: dict[str, Callable[[Path], object]] = {
    "is a pipe": lambda path: os.mkfifo(path),
    "is a folder, in place of a file": lambda path: path.mkdir(),
    "is a link that leads out of the folder": lambda path: path.symlink_to("/etc/hosts"),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-000001/weights.safetensors"])
def test_a_run_folder_of_others_is_looked_through(name: str, what: str, run: Path) -> None:
    ODD[what](run / name)
    assert odd_in(run) == f"{run / name} {what}"
    for use in (check_own, read_run, lambda run: find_run(str(run)), lambda run: find_model(str(run))):
        with pytest.raises(RunFolderError, match=f"{name} {what}, which no run leaves there; remove it"):
            use(run)
    with pytest.raises(DataError, match=f"`teacher.cache`: .*{name} {what}, which no cache holds"):
        refuse_other(run, {})


@pytest.mark.parametrize("target", ["../../mine", "/etc", ".", "itself"])
def test_a_linked_folder(target: str, run: Path) -> None:
    """What a run writes to `models` or `samples` would land, and replace what is, somewhere else."""
    (run.parent.parent / "mine").mkdir()
    name = "itself" if target == "itself" else "models"
    (run / name).symlink_to(target)
    assert (odd_in(run) is None) == (target == ".")


def test_no_reader_waits_for_a_pipe(tmp_path: Path) -> None:
    def refused(error: type[DistillError], read: Callable[[Path], object], name: str) -> str:
        path = tmp_path / name
        os.mkfifo(path)
        with pytest.raises(error) as caught, time_limit(9):  # else it would wait for ever
            read(path)
        assert str(caught.value).startswith(f"{path}: a pipe, and no file; ")
        path.unlink()
        return str(caught.value)

    refused(RecipeError, recipe.load, "recipe.yaml")
    refused(DataError, read_jsonl, "rows.jsonl")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        refused(ModelError, lambda path: check_model_folder(path.parent), name)


def test_no_device_is_replaced_by_what_is_written(tmp_path: Path) -> None:
    """A file is written beside it and renamed; root would have lost its /dev/null to `--out`."""
    out = tmp_path / "out"
    os.mkfifo(out)
    with pytest.raises(RunFolderError, match="out: a pipe, and no file; choose another place"):
        write_page({}, out)
    with pytest.raises(RecipeError, match="--out: .*out is a pipe; name a file"):
        compare(["a", "b"], speech(), prompts=["x"], out=out)
    assert odd(out) == "a pipe"
