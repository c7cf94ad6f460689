"""A fast BLAS for MLX on Linux, where the wheel carries an unoptimized one.

MLX's Linux wheel links netlib's reference BLAS: 3 to 6 GFLOP/s where OpenBLAS does 100 on the same
core. The dynamic linker takes the first definition of a symbol that it meets, so loading the
system's OpenBLAS globally before `mlx.core` puts it in front. Nothing happens on macOS, where MLX
uses Metal and Accelerate, or where no OpenBLAS is installed.
"""

import ctypes
import sys
import warnings
from pathlib import Path

LIBRARY = "libopenblas.so.0"
INSTALL = "apt-get install libopenblas0-pthread"  # Debian and Ubuntu


def prefer_openblas() -> str:
    """Load OpenBLAS in front of MLX's own BLAS, and say in a few words what happened.

    Returns:
        "openblas", "not needed" (no Linux), "not installed", or "too late" (mlx was imported first), which
        also warns: nothing else would show that everything takes several times as long.
    """
    if not sys.platform.startswith("linux"):
        return "not needed"
    if "mlx.core" in sys.modules:
        if library_in_front() is None:
            warnings.warn(
                "mlx was imported before mlx_distill, and keeps its own slow BLAS; import mlx_distill first",
                stacklevel=3,
            )
        return "too late"
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "not installed"
    return "openblas"


def threads() -> int | None:
    """On how many threads OpenBLAS multiplies, by which it rounds otherwise; None where it is not in use."""
    library = library_in_front() if sys.platform.startswith("linux") else None
    if library is None:
        return None
    count = getattr(ctypes.CDLL(library), "openblas_get_num_threads", None)
    return None if count is None else int(count())


def library_in_front() -> str | None:
    """Path of the library whose `cblas_sgemm` MLX calls on Linux; None where it is MLX's own.

    Asks the linker instead of believing `prefer_openblas`: the global scope is where MLX's symbols
    are looked up first, and it also shows a library that the user put there with LD_PRELOAD.
    """
    try:
        address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value or 0
    except AttributeError:
        return None
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, _, end = line.split(maxsplit=1)[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return line.split(maxsplit=5)[-1]
    return None
