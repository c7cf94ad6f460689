"""What this machine offers to a distillation, and what to install: `mlx-distill doctor`.

Each check returns rows of (what, value, advice); advice is None where nothing needs doing. A check
that fails becomes a row that says so: the doctor is for machines on which something is wrong.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mlx_distill
from mlx_distill import blas

Row = tuple[str, str, str | None]  # what, value, advice

GIB = 2**30
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a Linux container, in bytes
SLOW_GFLOPS = 30  # netlib's BLAS does 3 to 6 on one core, OpenBLAS 100, a GPU thousands

# Extra -> the packages that it brings and what they are for.
EXTRAS = {
    "report": (("matplotlib",), "curves in report.html"),
    "datasets": (("datasets",), "data sets from the Hub"),
    "filters": (("py3langid", "datasketch"), "languages and near duplicates of answers"),
    "harness": (("lm_eval",), "tasks of lm-evaluation-harness"),
    "tensorboard": (("tensorboard",), "train.log_to"),
    "wandb": (("wandb",), "train.log_to"),
    "trackio": (("trackio",), "train.log_to"),
}

SANDBOXES = {
    "bubblewrap": "programs see no files of yours, no network and no other process",
    "unshare": "programs see no files of yours, no network and no other process",
    "landlock": "programs read no files of yours, and use no network and no other process",
    "seatbelt": "programs read no files of yours, and use no network and no other process",
    "limits": "programs would run with your rights on files and network",
}


def report() -> list[Row]:
    """Every check, in order. Never raises; takes about a second."""
    rows: list[Row] = []
    for check in (system, versions, memory, device, matmul, compiler, energy, sandbox, extras):
        rows += attempt(check)
    return rows


def attempt(check: Callable[[], Iterator[Row]]) -> list[Row]:
    """The rows of a check, and one more about what stopped it."""
    rows: list[Row] = []
    try:
        rows.extend(check())
    except Exception as error:
        rows.append((check.__name__, f"cannot be read: {type(error).__name__}: {error}", None))
    return rows


def memory_gib() -> float | None:
    """GiB of physical memory, or of what a Linux container is limited to where that is less.

    None where the system does not tell.
    """
    found = []
    with suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        found.append(int(LIMIT.read_text(encoding="utf-8")))  # "max" where there is none
    return min((size for size in found if size > 0), default=0) / GIB or None


def system() -> Iterator[Row]:
    release = f"macOS {platform.mac_ver()[0]}" if on_mac() else platform.platform(terse=True)
    yield "platform", f"{release}, {platform.machine()}", None
    rosetta = on_mac() and platform.machine() != "arm64"
    yield "chip", chip(), "use a native arm64 Python; MLX needs Apple Silicon" if rosetta else None
    yield "python", f"{platform.python_version()}, {sys.executable}", None


def versions() -> Iterator[Row]:
    yield "mlx-distill", f"{mlx_distill.__version__}, {Path(mlx_distill.__file__).parent}", None
    for package in ("mlx", "mlx-lm", "transformers"):
        version = version_of(package)
        yield package, version or "not installed", None if version else install_advice()


def memory() -> Iterator[Row]:
    gib = memory_gib()
    yield "memory", "not told by this system" if gib is None else f"{gib:.1f} GiB", None


def device() -> Iterator[Row]:
    """Where MLX computes, and how much memory it recommends to use there."""
    try:
        import mlx.core as mx
    except ImportError as error:
        yield "device", f"mlx cannot be imported: {error}", install_advice()
        return
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    backend = "Metal" if mx.metal.is_available() else "CUDA" if on_gpu else "CPU"
    advice = "Metal is not available: is this a virtual machine?" if on_mac() and not on_gpu else None
    yield "device", f"{backend}, {mx.device_info().get('device_name', 'unknown')}", advice
    usable = mx.device_info().get("max_recommended_working_set_size")
    if usable:
        yield "memory for MLX", f"{int(usable) / GIB:.1f} GiB recommended at most", None
    if backend == "CPU" and sys.platform.startswith("linux"):
        yield openblas()


def openblas() -> Row:
    library = blas.library_in_front()
    if library:
        return "BLAS", f"{library}, in front of MLX's own", None
    if mlx_distill.BLAS == "too late":
        return "BLAS", "MLX's own, slow: mlx was imported first", "import mlx_distill before mlx"
    return "BLAS", "MLX's own, slow", f"{blas.INSTALL} (ten times faster training)"


def matmul() -> Iterator[Row]:
    """Measured, since a library that is loaded is not yet one that is used."""
    speed = matmul_gflops()
    slow = speed < SLOW_GFLOPS and sys.platform.startswith("linux")
    advice = "see BLAS above; or the machine is busy" if slow else None
    yield "matmul", f"{speed:.0f} GFLOP/s, 512x512x512 float32", advice


def matmul_gflops(size: int = 512, repeats: int = 5) -> float:
    """Best of some products of two float32 matrices on MLX's default device, in GFLOP/s."""
    import mlx.core as mx

    matrix = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(matrix @ matrix)  # the first one pays for start-up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def compiler() -> Iterator[Row]:
    """MLX's CPU backend calls g++ for fused kernels, and runs them one by one where there is none."""
    if not sys.platform.startswith("linux"):
        return
    found = shutil.which("g++")
    advice = None if found else "apt-get install g++"
    yield "mx.compile", found or "no g++: same results, somewhat slower", advice


def energy() -> Iterator[Row]:
    """What can tell the energy of a token, without root."""
    from mlx_distill.evaluate.energy import energy_meter

    meter = energy_meter()
    if meter.available:
        yield "energy", str(meter.label), None
        return
    what, _, advice = str(meter.why).partition(": pip ")
    yield "energy", what, f"pip {advice}" if advice else None


def sandbox() -> Iterator[Row]:
    """What holds generated programs while their tests run."""
    from mlx_distill.evaluate import sandbox

    kind = sandbox.backend()
    advice = None
    if kind not in sandbox.PROTECTING:
        advice = "they run only with --confirm-run-unsafe-code; see docs/sandbox.md"
    yield "sandbox", f"{kind}: {SANDBOXES[kind]}", advice


def extras() -> Iterator[Row]:
    for extra, (packages, purpose) in EXTRAS.items():
        found = {package: version_of(package) for package in packages}
        said = ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in found.items())
        advice = None if all(found.values()) else f"for {purpose}: pip install 'mlx-distill[{extra}]'"
        yield f"extra {extra}", said, advice


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_advice() -> str:
    if on_mac():
        return "pip install mlx-distill"
    return "pip install 'mlx-distill[cpu]', or [cuda13] with an NVIDIA GPU"


def chip() -> str:
    """Name of the processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if on_mac():
        name = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    elif info.is_file():
        models = [
            line.split(":", 1)[1]
            for line in info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        name = models[0].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def on_mac() -> bool:
    return sys.platform == "darwin"
