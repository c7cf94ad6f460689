"""Fixtures that every test may use."""

from pathlib import Path

import pytest

import mlx_distill  # noqa: F401 - before any test imports mlx.core: it puts a fast BLAS in front

REPOSITORY = Path(__file__).resolve().parent.parent


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
