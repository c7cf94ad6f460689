"""Meters tell the joules that were spent, or why they cannot; fakes spend a known number of them."""

import errno
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_distill import doctor
from mlx_distill.evaluate import energy, joules
from mlx_distill.evaluate.energy import (
    AppleCounter,
    EnergyMeter,
    NvidiaCounter,
    RaplCounter,
    Unavailable,
    energy_meter,
    power_state,
)
from mlx_distill.evaluate.joules import energies
from mlx_distill.evaluate.timing import ANSWER

MICROJOULES = 1_000_000
WRAP = 262_143_328_850


# --- RAPL ---------------------------------------------------------------------------------------


def zone(powercap: Path, name: str, label: str, microjoules: int, wrap: int = WRAP) -> Path:
    """A zone of a fake sysfs tree."""
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n", encoding="utf-8")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n", encoding="utf-8")
    (folder / "energy_uj").write_text(f"{microjoules}\n", encoding="utf-8")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A machine with two packages, and with everything that must not be counted twice."""
    zone(tmp_path, "intel-rapl:0", "package-0", 5 * MICROJOULES)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 7 * MICROJOULES)
    zone(tmp_path, "intel-rapl:2", "psys", 0)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    return tmp_path


def spend(powercap: Path, microjoules: int, *names: str) -> None:
    for name in names:
        counter = powercap / name / "energy_uj"
        counter.write_text(
            str((int(counter.read_text(encoding="utf-8")) + microjoules) % WRAP), encoding="utf-8"
        )


def test_rapl_adds_up_the_packages_and_nothing_inside_or_around_them(powercap: Path) -> None:
    meter = EnergyMeter(RaplCounter(powercap))
    meter.begin()
    spend(powercap, 3 * MICROJOULES, *(path.name for path in powercap.iterdir()))
    found = meter.end()
    assert found.rails == {"package-0": 3.0, "package-1": 3.0}
    assert found.joules == 6.0
    assert meter.available and meter.label == "CPU package energy (RAPL)"


def test_rapl_counts_on_where_the_counter_wraps(powercap: Path) -> None:
    counter = powercap / "intel-rapl:0" / "energy_uj"
    counter.write_text(str(WRAP - 2 * MICROJOULES), encoding="utf-8")
    meter = EnergyMeter(RaplCounter(powercap))
    meter.begin()
    spend(powercap, 5 * MICROJOULES, "intel-rapl:0")
    assert (
        int(counter.read_text(encoding="utf-8")) == 3 * MICROJOULES
    )  # a plain difference would be far below zero
    assert meter.end().rails == pytest.approx({"package-0": 5.0, "package-1": 0.0})
    meter.begin()
    spend(powercap, MICROJOULES, "intel-rapl:0")
    assert meter.end().joules == pytest.approx(1.0)


def test_rapl_without_a_package_is_no_meter(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(Unavailable, match="has no processor package"):
            RaplCounter(folder)
    zone(tmp_path, "intel-rapl:0", "psys", 0)
    with pytest.raises(Unavailable, match="has no processor package"):
        RaplCounter(tmp_path)


def test_rapl_that_only_root_may_read_is_no_meter(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.read_text

    def refused(path: Path, *rest: Any, **named: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, *rest, **named)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(Unavailable, match=r"intel-rapl:0/energy_uj: only root may read it"):
        RaplCounter(powercap)


def test_rapl_that_says_nonsense_is_no_meter(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").write_text("many\n", encoding="utf-8")
    with pytest.raises(Unavailable, match="cannot be read"):
        RaplCounter(powercap)


# --- Apple and NVIDIA, of the shape of their packages ---------------------------------------------


class FakeMonitor:
    """As much of zeus_apple_silicon.AppleEnergyMonitor 1.1.0 as its documentation promises."""

    spent: dict[str, Any]  # millijoules of the next window

    def __init__(self) -> None:
        self.windows = set[str]()

    def begin_window(self, key: str, restart: bool = False) -> None:
        if key in self.windows and not restart:
            raise RuntimeError("Measurement with specified key already exists.")
        self.windows.add(key)

    def end_window(self, key: str) -> Any:
        if key not in self.windows:
            raise RuntimeError("No measurement with provided key had been started.")
        self.windows.remove(key)
        fields = (
            "cpu_total_mj efficiency_cores_mj performance_cores_mj efficiency_cluster_mj "
            "performance_cluster_mj efficiency_core_manager_mj performance_core_manager_mj dram_mj gpu_mj "
            "gpu_sram_mj ane_mj"
        )
        return types.SimpleNamespace(**(dict.fromkeys(fields.split()) | self.spent))


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> type[FakeMonitor]:
    module = types.ModuleType("zeus_apple_silicon")
    module.AppleEnergyMonitor = FakeMonitor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    FakeMonitor.spent = {"cpu_total_mj": 1500, "gpu_mj": 2000, "gpu_sram_mj": 0, "dram_mj": 500}
    FakeMonitor.spent |= {"performance_cores_mj": [700, 700], "efficiency_cluster_mj": [300]}
    return FakeMonitor


def test_apple_adds_up_rails_that_do_not_overlap(apple: type[FakeMonitor]) -> None:
    meter = EnergyMeter(AppleCounter())
    meter.begin()
    found = meter.end()
    assert found.rails == {"cpu": 1.5, "gpu": 2.0, "gpu_sram": 0.0, "dram": 0.5}  # no `ane` in this machine
    assert found.joules == 4.0  # cores and clusters are in cpu already
    assert meter.label == "SoC energy, modelled (IOReport)"


def test_apple_begins_anew_where_a_window_was_left_open(apple: type[FakeMonitor]) -> None:
    meter = EnergyMeter(AppleCounter())
    meter.begin()
    meter.begin()
    assert meter.end().joules == 4.0
    with pytest.raises(RuntimeError, match="No measurement"):
        meter.end()


def fake_nvml(monkeypatch: pytest.MonkeyPatch, readings: list[Any], **changes: Any) -> Any:
    """As much of nvidia-ml-py as is called; `readings` in millijoules, or errors to raise."""

    class NVMLError(Exception):
        pass

    def read(handle: str) -> int:
        assert handle == "handle of GPU-1234"
        value = readings.pop(0)
        if isinstance(value, str):
            raise NVMLError(value)
        return value

    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"
    module.nvmlDeviceGetTotalEnergyConsumption = read
    for name, value in changes.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_nvidia_reads_the_board_that_mlx_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, [1000, 5000, 9250])
    meter = EnergyMeter(NvidiaCounter({"uuid": "GPU-1234"}))
    meter.begin()
    assert meter.end() == (4.25, {"gpu": 4.25})
    assert meter.label == "GPU board energy (NVML)"


def test_nvidia_without_driver_or_counter_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, ["Not Supported"])
    with pytest.raises(Unavailable, match="NVML: Not Supported"):
        NvidiaCounter({"uuid": "GPU-1234"})
    module = fake_nvml(monkeypatch, [])

    def no_driver() -> None:
        raise module.NVMLError("NVML Shared Library Not Found")

    module.nvmlInit = no_driver
    with pytest.raises(Unavailable, match="Library Not Found"):
        NvidiaCounter({"uuid": "GPU-1234"})
    with pytest.raises(Unavailable, match="which GPU"):
        NvidiaCounter({})


def test_each_machine_has_its_meter(
    apple: type[FakeMonitor], powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RaplCounter.__init__, "__defaults__", (powercap,))
    monkeypatch.setattr(mx, "device_info", lambda: {"uuid": "GPU-1234"})
    fake_nvml(monkeypatch, [0])
    kinds = {}
    for system in ("linux", "darwin"):
        for device in (mx.cpu, mx.gpu):
            monkeypatch.setattr(sys, "platform", system)
            monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
            kinds[system, str(device)] = type(energy_meter().counter)
    monkeypatch.undo()
    assert list(kinds.values()) == [RaplCounter, NvidiaCounter, AppleCounter, AppleCounter]


def test_a_missing_package_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)  # its import fails
    monkeypatch.setattr(sys, "platform", "darwin")
    meter = energy_meter()
    row = next(doctor.energy())
    monkeypatch.undo()
    assert not meter.available
    assert meter.label is None
    assert meter.why == "zeus-apple-silicon is not installed: pip install 'mlx-distill[energy]'"
    assert row == ("energy", "zeus-apple-silicon is not installed", "pip install 'mlx-distill[energy]'")
    with pytest.raises(RuntimeError, match="not installed"):
        meter.begin()


def test_the_doctor_names_the_meter_or_why_there_is_none(
    powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "_counter_of_this_machine", lambda: RaplCounter(powercap))
    assert next(doctor.energy()) == ("energy", "CPU package energy (RAPL)", None)
    monkeypatch.setattr(energy, "_counter_of_this_machine", lambda: RaplCounter(powercap / "none"))
    what, value, advice = next(doctor.energy())
    assert (what, advice) == ("energy", None)
    assert value.endswith("has no processor package (RAPL)")


# --- joules a token, in a world whose every joule is known ----------------------------------------


class World:
    """A clock and a meter that a model moves: `watts` at rest, and more for each token it computes."""

    label = "a known world"

    def __init__(self, *, watts: float = 10.0, written: float = 0.5, read: float = 0.125):
        self.watts, self.cost = watts, {True: written, False: read}  # joules a token, beyond rest
        self.now = self.joules = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.joules += self.watts * seconds

    def begin(self) -> None:
        self.begun = self.joules

    def end(self) -> dict[str, float]:
        risen = self.joules - self.begun
        return {"cpu": 0.25 * risen, "gpu": 0.75 * risen}

    def clock(self) -> float:
        return self.now


class Model:
    """Computes nothing; takes time and energy by the token. A token read alone is one written."""

    def __init__(self, world: World, cache: type = KVCache, **options: Any):
        self.world, self.cache, self.options = world, cache, options
        self.calls: list[tuple[int, int]] = []  # place in the row, tokens

    def make_cache(self) -> list[Any]:
        return [self.cache(**self.options)]

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        number = tokens.shape[1]
        self.calls.append((cache[0].offset, number))
        cache[0].update_and_fetch(mx.zeros((1, 1, number, 1)), mx.zeros((1, 1, number, 1)))
        self.world.wait(0.01 * number)
        self.world.joules += number * self.world.cost[number == 1]
        return mx.zeros((1, number, 4))


def measured(world: World, *lengths: int, meter: Any = None, **options: Any) -> tuple[Any, Any, Model]:
    model = Model(world, **options)
    prompts = {length: mx.zeros(length, dtype=mx.int32) for length in lengths}
    counter = EnergyMeter(world if meter is None else meter)
    return *energies(model, prompts, counter, clock=world.clock, wait=world.wait), model


def test_joules_a_token_are_those_that_were_spent() -> None:
    rows, about, _ = measured(World(), 8, 64)
    assert about == {"energy_meter": "a known world", "idle_watts": pytest.approx(10.0)}
    for length, row in rows.items():
        assert row["joules_per_token"] == pytest.approx(0.5)
        assert row["joules_per_token_spread"] == pytest.approx(0.0, abs=1e-9)
        assert row["joules_per_token_gross"] == pytest.approx(0.5 + 10.0 * 0.01)
        assert row["joules_per_token_rails"] == pytest.approx({"cpu": 0.15, "gpu": 0.45})
        # All but the last token of a prompt are read together; the last one is computed as a written one.
        assert row["joules_per_prompt_token"] == pytest.approx((0.125 * (length - 1) + 0.5) / length)
    # The usual mistakes would be seen: rest not taken off, or 33 tokens counted as 32.
    assert abs(rows[8]["joules_per_token_gross"] - 0.5) > 0.05
    assert abs(0.5 * (ANSWER + 1) / ANSWER - 0.5) > 0.01


def test_windows_are_long_enough_and_each_writes_from_the_same_place() -> None:
    world = World()
    model = Model(world)
    work = joules.writing(model, mx.zeros(16, dtype=mx.int32))
    model.calls.clear()
    window = joules._window(EnergyMeter(world), work, world.clock)
    assert window.seconds >= joules.SECONDS
    assert window.tokens == len(model.calls) > ANSWER + 1  # one burst takes 0.33 s
    assert window.joules == pytest.approx(window.tokens * (0.5 + 0.1))
    assert {place for place, _ in model.calls} == set(range(15, 16 + ANSWER))
    reads = joules.reading(model, mx.zeros(16, dtype=mx.int32))
    model.calls.clear()
    assert reads() == 16 == sum(number for _, number in model.calls)


def test_a_cache_that_cannot_go_back_is_measured_too() -> None:
    """A full window of attention; it stays as large while the answer goes on."""
    rows, _, model = measured(World(), 16, cache=RotatingKVCache, max_size=8)
    assert rows[16]["joules_per_token"] == pytest.approx(0.5)
    assert max(place for place, _ in model.calls) > 16 + ANSWER  # it went on


def test_windows_take_turns_and_noise_becomes_spread() -> None:
    class Noisy(World):
        windows = 0

        def end(self) -> dict[str, float]:
            self.windows += 1
            # Rest three times, then reading and writing by turns; writing: windows 5, 7, 9.
            factor = {5: 0.9, 7: 1.0, 9: 1.3}.get(self.windows, 1.0)
            return {"cpu": factor * (self.joules - self.begun)}

    rows, _, _ = measured(Noisy(watts=0.001), 16)
    assert rows[16]["joules_per_token"] == pytest.approx(0.5, rel=1e-3)
    # Quartiles of 0.45, 0.5, 0.65 are 0.475 and 0.575.
    assert rows[16]["joules_per_token_spread"] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("stuck", ["at once", "midway"])
def test_a_counter_that_does_not_move_gives_null_and_no_zero(stuck: str) -> None:
    class Stuck(World):
        def end(self) -> dict[str, float]:
            return {"cpu": 0.0 if stuck == "at once" or self.now > 6.0 else self.joules - self.begun}

    world = Stuck()
    rows, about, _ = measured(world, 8, 64)
    why = r"a known world: its counter did not move within 1\.\d s"
    for row in rows.values():
        assert row["joules_per_token"] is None
        assert re.fullmatch(why, row["joules_per_token_why"])
        assert row.keys() == {"joules_per_token", "joules_per_token_why"}
    assert about == {}
    assert (world.now < 4.0) == (stuck == "at once")  # it does not go on for nothing


@pytest.mark.parametrize("place", ["begin", "end"])
def test_a_meter_that_raises_midway_gives_null_with_its_reason(place: str) -> None:
    class Broken(World):
        def begin(self) -> None:
            super().begin()
            if place == "begin" and self.now > 5.0:
                raise OSError("No such device")

        def end(self) -> dict[str, float]:
            if place == "end" and self.now > 5.0:
                raise OSError("No such device")
            return super().end()

    rows, about, _ = measured(Broken(), 8)
    why = "a known world: OSError: No such device"
    assert (rows, about) == ({8: {"joules_per_token": None, "joules_per_token_why": why}}, {})


def test_without_a_meter_the_reason_is_told_and_nothing_is_run() -> None:
    world = World()
    model = Model(world)
    prompts = {8: mx.zeros(8, dtype=mx.int32)}
    rows, about = energies(model, prompts, EnergyMeter(None, "it has none"), clock=world.clock)
    assert (rows, about) == ({8: {"joules_per_token": None, "joules_per_token_why": "it has none"}}, {})
    assert model.calls == [] and world.now == 0.0


def test_work_that_drowns_in_the_power_at_rest_is_null() -> None:
    """Never a negative energy, nor a zero."""
    world = World(written=-0.05, read=0.125)  # a machine that was busy with something else at rest
    rows, about, _ = measured(world, 64)
    assert rows[64]["joules_per_token"] is None
    assert rows[64]["joules_per_token_why"] == "no more than at rest: 5 W at work, 10 W before"
    assert rows[64]["joules_per_prompt_token"] > 0
    assert about["idle_watts"] == pytest.approx(10.0)


# --- what macOS says of the power -----------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for pmset")
@pytest.mark.parametrize(
    ("ps", "therm", "expected"),
    [
        (
            "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=123)\t81%; discharging",
            "Note: No thermal warning level has been recorded\nNote: No CPU power status has been recorded",
            {"power_source": "Battery Power", "thermal": "no warning recorded"},
        ),
        (
            "Now drawing from 'AC Power'",
            "CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 80",
            {"power_source": "AC Power", "thermal": "CPU_Scheduler_Limit 100, CPU_Speed_Limit 80"},
        ),
        ("something new", "", {}),
    ],
)
def test_power_source_and_thermal_state(
    ps: str, therm: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ps").write_text(ps, encoding="utf-8")
    (tmp_path / "therm").write_text(therm, encoding="utf-8")
    script = tmp_path / "pmset"
    script.write_text(
        f'#!/bin/sh\nwhile read -r line; do echo "$line"; done < "{tmp_path}/$2"\necho "$line"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert power_state() == expected


def test_elsewhere_there_is_no_power_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_state() == {}
