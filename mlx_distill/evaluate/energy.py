"""Energy meters that need no root: what a piece of work took, in joules, or why that cannot be told.

A meter never says 0 for "not measured". What each one sees is in its label, and docs/speed.md says what it
does not see: none of them is the power at the wall.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

POWERCAP = Path("/sys/class/powercap")
INSTALL = "pip install 'mlx-distill[energy]'"


class Energy(NamedTuple):
    """What a meter saw between `begin` and `end`."""

    joules: float  # of all rails
    rails: dict[str, float]  # joules of each


class Unavailable(Exception):
    """This machine has no meter of that kind; the message says why."""


class Counter(Protocol):
    """A way to read energy. Its constructor raises `Unavailable`."""

    label: str  # what is measured, and how, as `energy_meter` of evaluation.json has it

    def begin(self) -> None: ...

    def end(self) -> dict[str, float]: ...  # joules of each rail since `begin`; no two rails overlap


class EnergyMeter(NamedTuple):
    """The meter of this machine: `available`, or else `why` not."""

    counter: Counter | None
    why: str | None = None

    @property
    def available(self) -> bool:
        return self.counter is not None

    @property
    def label(self) -> str | None:
        return None if self.counter is None else self.counter.label

    def begin(self) -> None:
        """Begin a window. A window that was begun and not ended is forgotten."""
        self._counter().begin()

    def end(self) -> Energy:
        """End the window.

        Raises:
            whatever the meter's own library raises; callers turn it into a null with its reason.
        """
        rails = self._counter().end()
        return Energy(sum(rails.values()), rails)

    def _counter(self) -> Counter:
        if self.counter is None:
            raise RuntimeError(self.why)
        return self.counter


def energy_meter() -> EnergyMeter:
    """The meter of the device on which MLX computes."""
    try:
        return EnergyMeter(_counter_of_this_machine())
    except Unavailable as error:
        return EnergyMeter(None, str(error))


def _counter_of_this_machine() -> Counter:
    if sys.platform == "darwin":
        return AppleCounter()
    import mlx.core as mx

    return NvidiaCounter(mx.device_info()) if mx.default_device() == mx.gpu else RaplCounter()


class AppleCounter:
    """The "Energy Model" of IOReport, through zeus-apple-silicon: an estimate, of the chip and its memory.

    Resolution 1 mJ. Windows below 10 ms are noise.
    """

    label = "SoC energy, modelled (IOReport)"
    RAILS = ("cpu_total", "gpu", "gpu_sram", "dram", "ane")  # clusters and cores are parts of cpu_total
    WINDOW = "mlx-distill"

    def __init__(self) -> None:
        try:
            from zeus_apple_silicon import AppleEnergyMonitor
        except ImportError:
            raise Unavailable(f"zeus-apple-silicon is not installed: {INSTALL}") from None
        # Made at the first window: where IOReport has no such model, as in a virtual machine, it may crash.
        self._make, self._monitor = AppleEnergyMonitor, None

    def begin(self) -> None:
        self._monitor = self._monitor or self._make()
        self._monitor.begin_window(self.WINDOW, restart=True)

    def end(self) -> dict[str, float]:
        assert self._monitor is not None
        found = self._monitor.end_window(self.WINDOW)
        millijoules = {rail: getattr(found, f"{rail}_mj") for rail in self.RAILS}
        return {rail.removesuffix("_total"): mj / 1e3 for rail, mj in millijoules.items() if mj is not None}


class NvidiaCounter:
    """The counter of a whole NVIDIA board, its memory included (Volta and newer), renewed every 20 to 100 ms.

    Args:
        device: what MLX says of its GPU; `uuid` names it, as NVML's numbers may differ from CUDA's.
    """

    label = "GPU board energy (NVML)"

    def __init__(self, device: dict[str, Any]) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unavailable(f"nvidia-ml-py is not installed: {INSTALL}") from None
        if "uuid" not in device:
            raise Unavailable("MLX does not say which GPU it uses")
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(device["uuid"])
            self._begun = self._read(self._handle)
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from None

    def begin(self) -> None:
        self._begun = self._read(self._handle)

    def end(self) -> dict[str, float]:
        return {"gpu": (self._read(self._handle) - self._begun) / 1e3}


class RaplCounter:
    """The processor packages of Intel and AMD under Linux, without the memory beside them.

    Left out are zones inside a package (`core`, `uncore`, `dram`), the whole platform (`psys`), which has the
    packages in it, and the second way to the same counter (`intel-rapl-mmio`).
    """

    label = "CPU package energy (RAPL)"

    def __init__(self, powercap: Path = POWERCAP) -> None:
        try:
            zones = sorted(powercap.glob("intel-rapl:*"))
            named = {zone: (zone / "name").read_text(encoding="utf-8").strip() for zone in zones}
            self._names = {zone: name for zone, name in named.items() if name.startswith("package")}
            self._wraps = {
                zone: int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) for zone in self._names
            }
            self._begun = self._read()
        except PermissionError as error:
            raise Unavailable(f"{error.filename}: only root may read it (RAPL)") from None
        except (OSError, ValueError) as error:
            raise Unavailable(f"RAPL cannot be read: {error}") from None
        if not self._names:
            raise Unavailable(f"no energy counter: {powercap} has no processor package (RAPL)")

    def begin(self) -> None:
        self._begun = self._read()

    def end(self) -> dict[str, float]:
        rails, now = dict[str, float](), self._read()
        for zone, name in self._names.items():
            risen = now[zone] - self._begun[zone]
            rails[name] = (risen if risen >= 0 else risen + self._wraps[zone]) / 1e6
        return rails

    def _read(self) -> dict[Path, int]:
        """Microjoules; back to 0 at `max_energy_range_uj`, which takes minutes at the least."""
        return {zone: int((zone / "energy_uj").read_text(encoding="utf-8")) for zone in self._names}


def power_state() -> dict[str, str]:
    """`power_source` and `thermal` as macOS tells them; empty elsewhere."""
    if shutil.which("pmset") is None:
        return {}
    found = {}
    if source := re.search(r"drawing from '([^']+)'", _pmset("ps")):
        found["power_source"] = source[1]
    thermal = _pmset("therm")
    if "No thermal warning" in thermal:
        found["thermal"] = "no warning recorded"
    elif limits := re.findall(r"(\w[\w ]*?)\s*=\s*(\w+)", thermal):
        found["thermal"] = ", ".join(f"{name} {value}" for name, value in limits)
    return found


def _pmset(what: str) -> str:
    try:
        return subprocess.run(
            ["pmset", "-g", what], capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
