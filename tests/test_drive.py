"""A drive that fills up or fails in the middle of a run: one line, exit 75, and the same bits in the end."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import workshop
from workshop import command

from mlx_distill.drive import resumable_if_full
from mlx_distill.errors import RunFolderError, Stopped

RUN = [
    "recipe.yaml",
    "data={train: good.jsonl, prompts: good.jsonl, test: good.jsonl, max_tokens: 128}",
    "generate={max_tokens: 30, temperature: 1.0, samples: 4}",
    "teacher={model: teacher, source: cache, top_k: 8}",
    "train={steps: 4, save_every: 2, log_every: 1, batch_tokens: 256, learning_rate: 0.01, compile: false}",
    "quantize={bits: 4, group_size: 32}",
    "evaluate={tasks: [fidelity], baseline: false}",
    "export.formats=[]",  # writes nothing, in processes of its own
]
FULL, BROKEN = "the drive is full", "the drive fails"
# What is written, in the order of a run.
WRITES = [
    ("samples/written", errno.ENOSPC, FULL),
    ("cache/teacher/00000.safetensors", errno.EDQUOT, FULL),
    ("metrics.jsonl", errno.ENOSPC, FULL),
    ("checkpoints/step-000002", errno.ENOSPC, FULL),
    ("checkpoints/step-000002", errno.EIO, BROKEN),
    ("models/student", errno.ENOSPC, FULL),
    ("probes/student", errno.EROFS, BROKEN),
    ("stages.json", errno.EIO, BROKEN),
    ("evaluation.json", errno.ENOSPC, FULL),
    ("report.html", errno.ENOSPC, FULL),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workshop.make(tmp_path_factory.mktemp("workshop"))


def failing(patch: pytest.MonkeyPatch, place: str, reason: int) -> None:
    """Let the drive refuse what is written there."""
    replace, plain = os.replace, open

    def fails(path: Any) -> None:
        if place in str(path):
            raise OSError(reason, os.strerror(reason), str(path))

    def renamed(before: Any, after: Any) -> None:
        fails(after)
        replace(before, after)

    def opened(path: Any, *how: Any, **more: Any) -> Any:
        fails(path)
        return plain(path, *how, **more)

    patch.setattr(os, "replace", renamed)
    patch.setattr("mlx_distill.stage_log.open", opened, raising=False)


def weights(run: Path) -> dict[str, bytes]:
    found = sorted((run / "models").rglob("*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


SOME = [WRITES[i] for i in (1, 2, 4, 9)]


@pytest.mark.parametrize(
    ("name", "writes"),
    [("some", SOME), pytest.param("every", WRITES, marks=pytest.mark.slow)],
    ids=["some", "every"],
)
def test_wherever_it_fails_the_run_goes_on_to_the_same_bits(
    name: str, writes: list[tuple[str, int, str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / "runs" / "whole").exists():
        assert command(folder, capsys, "run", *RUN, "name=whole").code == 0
    run = folder / "runs" / name
    for place, reason, said in writes:
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, place, reason)
            ended = command(folder, capsys, "run", *RUN, f"name={name}", "--resume")
        assert ended.code == 75, (place, ended.err)
        go_on, error = ended.err
        assert go_on.startswith("go on with: ") and go_on.endswith("--resume")
        assert error.startswith(f"error: {said} (") and place.split("/")[-1] in error
        assert not list(run.rglob("*.part")), place
    ended = command(folder, capsys, "run", *RUN, f"name={name}", "--resume")
    assert ended.code == 0
    assert weights(run) == weights(folder / "runs" / "whole")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(
        (folder / "runs" / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )


def test_other_errors_are_not_the_drives() -> None:
    for error in (PermissionError(errno.EACCES, "no"), RunFolderError("holds another run")):
        with pytest.raises(type(error)), resumable_if_full():
            raise error
    with pytest.raises(Stopped, match=r"the drive is full \(run folder\); make room"), resumable_if_full():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(Stopped, match=r"the drive fails \(a: Input/output error\)"), resumable_if_full():
        raise OSError(errno.EIO, "Input/output error", "a")
