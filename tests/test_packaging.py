"""What is declared is what is used, what is installed works, and the command starts quickly."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlx_distill
from mlx_distill.bundled import recipes_folder

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Import name -> name on the package index, where the two differ.
DISTRIBUTIONS = {
    "mlx_lm": "mlx-lm",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "lm_eval": "lm-eval",
    "pynvml": "nvidia-ml-py",
    "zeus_apple_silicon": "zeus-apple-silicon",
}

# Of what starting the command must not pay for: seconds each, or a device.
HEAVY = {
    "mlx.core",
    "mlx_lm",
    "transformers",
    "tokenizers",
    "matplotlib",
    "numpy",
    "huggingface_hub",
    "httpx2",
    "datasets",
    "datasketch",
    "py3langid",
    "lm_eval",
    "tensorboard",
    "wandb",
    "trackio",
}


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Distributions of other people's that these statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"mlx_distill"}
    return {DISTRIBUTIONS.get(top, top) for top in tops}


def declared(lines: list[str]) -> set[str]:
    return {requirement.name for requirement in requirements(lines)}


BACKENDS = ("cpu", "cuda13")  # extras that bring mlx itself
OPTIONAL = {name for extra in EXTRAS.keys() - {*BACKENDS, "dev"} for name in declared(EXTRAS[extra])}


def test_every_import_of_the_package_is_declared():
    allowed = declared(PROJECT["dependencies"]) | OPTIONAL
    for path in (REPOSITORY / "mlx_distill").rglob("*.py"):
        assert imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) <= allowed, path


def test_every_dependency_is_imported_somewhere():
    used = set()
    for path in (REPOSITORY / "mlx_distill").rglob("*.py"):
        used |= imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    assert declared(PROJECT["dependencies"]) | OPTIONAL == used


def test_optional_packages_are_never_imported_at_the_top_of_a_file():
    """But in `harness_model.py`, whose class is of a kind of lm-eval's; it is imported where it is used."""
    for path in (REPOSITORY / "mlx_distill").rglob("*.py"):
        top = ast.parse(path.read_text(encoding="utf-8")).body
        assert path.name == "harness_model.py" or not imported(top) & OPTIONAL, path
        froms = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert "mlx_distill.evaluate.harness_model" not in froms, path


def test_every_dependency_is_installed_in_the_declared_range():
    for requirement in requirements(PROJECT["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


def test_mlx_comes_with_mlx_lm_extras_in_one_range_everywhere():
    """On Linux mlx has no backend by itself; our extras are named and act as mlx-lm's."""
    names = {r.name for r in requirements(PROJECT["dependencies"]) if r.marker is None}
    assert "mlx" not in names
    (base,) = [r for r in requirements(PROJECT["dependencies"]) if r.name == "mlx"]
    offered = importlib.metadata.metadata("mlx-lm").get_all("Provides-Extra")
    for extra in BACKENDS:
        (line,) = requirements(EXTRAS[extra])
        assert (line.name, line.extras, line.specifier) == ("mlx", {extra}, base.specifier)
        assert offered is not None
        assert extra in offered


def test_the_version_is_written_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", mlx_distill.__version__)


def test_bundled_recipes_are_found_in_a_clone():
    assert recipes_folder() == REPOSITORY / "recipes"


def test_bundled_recipes_are_found_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "mlx_distill"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr("mlx_distill.bundled.__file__", str(package / "bundled.py"))
    assert recipes_folder() == package / "recipes"


def test_a_package_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_distill.bundled.__file__", str(tmp_path / "mlx_distill" / "bundled.py"))
    with pytest.raises(FileNotFoundError, match="install mlx-distill again"):
        recipes_folder()


def test_the_command_line_starts_without_the_heavy_packages():
    """`--help` within half a second; what is imported is a surer measure than a clock."""
    code = "import json, sys, mlx_distill.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert set(json.loads(done.stdout)) & HEAVY == set()


def test_the_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "mlx_distill", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert "recipe" in done.stdout.lower()
    assert PROJECT["scripts"] == {"mlx-distill": "mlx_distill.cli:main"}


def test_make_knows_the_targets_that_the_readme_names():
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test", "test-slow", "check", "clean"):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


@pytest.mark.slow
def test_a_wheel_carries_recipes_and_assets(tmp_path):
    """Needs the network, for the build backend."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-{mlx_distill.__version__}-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("recipes", "mlx_distill/recipes"), ("mlx_distill", "mlx_distill")):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}/{path.relative_to(REPOSITORY / folder).as_posix()}" in names
    assert not {name for name in names if name.startswith(("tests/", "recipes/", "benchmarks/"))}


@pytest.mark.slow
def test_all_extras_resolve_together():
    """Needs the network. Extras that shut each other out would show only at a user's."""
    extras = ",".join(EXTRAS)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            f".[{extras}]",
        ],
        check=True,
        cwd=REPOSITORY,
    )
