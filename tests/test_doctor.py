"""The doctor tells the truth, and speaks even where nothing works."""

import builtins
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_distill
from mlx_distill import blas, doctor

REPOSITORY = Path(__file__).resolve().parent.parent
LINUX_CPU = sys.platform.startswith("linux") and mx.default_device() == mx.Device(mx.cpu)


def rows() -> dict[str, tuple[str, str | None]]:
    return {what: (value, advice) for what, value, advice in doctor.report()}


def test_every_row_is_one_line_of_text_and_each_has_its_own_name():
    report = doctor.report()
    assert len({what for what, _, _ in report}) == len(report)
    for what, value, advice in report:
        for text in (what, value, advice or "-"):
            assert isinstance(text, str)
            assert text.strip()
            assert "\n" not in text


def test_it_names_what_a_bug_report_needs():
    found = rows()
    assert {"platform", "chip", "python", "memory", "mlx", "mlx-lm", "device", "matmul", "sandbox"} <= set(
        found
    )
    assert found["mlx-distill"][0].startswith(mlx_distill.__version__)
    assert "cannot be read" not in " ".join(value for value, _ in found.values())


def test_memory_agrees_with_the_kernel():
    gib = doctor.memory_gib()
    assert 0 < gib <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def test_a_check_that_fails_becomes_a_row():
    def broken():
        yield "first", "value", None
        raise OSError("no such thing")

    assert doctor.attempt(broken) == [
        ("first", "value", None),
        ("broken", "cannot be read: OSError: no such thing", None),
    ]


def test_without_mlx_it_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without_mlx(name, *arguments, **options):
        if name.startswith("mlx.core"):
            raise ImportError("libmlx.so: cannot open shared object file")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_mlx)
    value, advice = rows()["device"]
    assert "libmlx.so" in value
    assert advice
    assert "pip install" in advice


def test_an_extra_that_is_missing_comes_with_its_line(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    assert rows()["extra report"] == (
        "no matplotlib",
        "for curves in report.html: pip install 'mlx-distill[report]'",
    )


def in_new_process(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return done.stdout.strip()


@pytest.mark.skipif(not LINUX_CPU, reason="the BLAS matters on the Linux CPU backend only")
@pytest.mark.skipif(mlx_distill.BLAS != "openblas", reason="OpenBLAS is not installed")
class TestOpenBLAS:
    def test_it_is_in_front_of_mlx(self):
        library = blas.library_in_front()
        assert library
        assert "openblas" in library
        assert rows()["BLAS"] == (f"{library}, in front of MLX's own", None)

    def test_it_is_what_matmul_uses(self):
        """The measured ratio is 12 to 60; half the machine may be busy with something else."""
        code = "import {first}; from mlx_distill.doctor import matmul_gflops; print(matmul_gflops(256))"
        fast = float(in_new_process(code.format(first="mlx_distill")))
        slow = float(in_new_process(code.format(first="mlx.core")))
        assert fast > 3 * slow

    def test_mlx_imported_first_is_too_late_and_the_doctor_says_so(self):
        code = (
            "import mlx.core; import mlx_distill; from mlx_distill import doctor;"
            "print(mlx_distill.BLAS); print(doctor.openblas()[2])"
        )
        assert in_new_process(code).splitlines() == ["too late", "import mlx_distill before mlx"]
        caught = (
            "import warnings; warnings.simplefilter('error'); import mlx.core\n"
            "try:\n    import mlx_distill\nexcept UserWarning as warning: print(warning)"
        )
        assert "import mlx_distill first" in in_new_process(caught)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems need no OpenBLAS")
def test_without_openblas_the_doctor_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mlx_distill, "BLAS", "not installed")
    monkeypatch.setattr(blas, "library_in_front", lambda: None)
    assert doctor.openblas()[2] == f"{blas.INSTALL} (ten times faster training)"
