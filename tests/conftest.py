"""Fixtures that every test may use."""

import signal
from pathlib import Path

import pytest

import mlx_distill  # noqa: F401 - before any test imports mlx.core: it puts a fast BLAS in front

REPOSITORY = Path(__file__).resolve().parent.parent

# `nohup`, and a shell's `&`, have the tests and their processes ignore what some of them send.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, tokenizers and texts, which do not travel with the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real models and data")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder that does not exist yet, under a name with a space."""
    return tmp_path / "my runs" / "tiny"
