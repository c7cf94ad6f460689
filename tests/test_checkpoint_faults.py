"""Kill, a full and a broken drive at the system calls of a checkpoint write, through strace."""

import pytest

from benchmarks import checkpoint_faults as faults


@pytest.fixture(autouse=True)
def tracing(repository: object, monkeypatch: pytest.MonkeyPatch) -> None:
    why = faults.available()
    if why is not None:
        pytest.skip(why)
    monkeypatch.setenv("PYTHONPATH", str(repository))


def wrong(found: list[faults.Found]) -> list[faults.Found]:
    return [one for one in found if one.wrong is not None]


def injected(found: list[faults.Found]) -> None:
    """Faults have come: nobody survives a kill, and a drive that fails is noticed, but for some `close`s."""
    for one in found:
        assert one.code != 0 or (one.fault != "signal=KILL" and one.state == "second"), one
    assert sum(one.code == 0 for one in found) <= len(found) / 4


def test_some_faults_leave_a_whole_checkpoint() -> None:
    found = faults.try_faults(every=29)
    assert len(found) >= 6
    injected(found)
    assert wrong(found) == []


def test_a_writer_in_place_is_seen() -> None:
    assert wrong(faults.try_faults(["signal=KILL"], faults.IN_PLACE, every=20))


@pytest.mark.slow
def test_no_fault_leaves_anything_else() -> None:
    found = faults.try_faults()
    assert len(found) > 150
    injected(found)
    assert wrong(found) == []
    assert len(wrong(faults.try_faults(save=faults.IN_PLACE))) > 30


def test_calls_between_the_marks_are_counted_in_their_thread() -> None:
    log = """
10 openat(AT_FDCWD, "a") = 3
11 write(1, "x", 1) = 1
10 write(3, "x", 1) = 1
10 stat("/mark-begin") = -1 ENOENT
10 write(3, "x", 1) = 1
11 write(3, "x", 1) = 1
10 futex(0x7f) = 0
10 close(3) = 0
10 stat("/mark-end") = -1 ENOENT
"""
    assert faults.between_marks(log) == [faults.Call("write", 2), faults.Call("close", 1)]
    with pytest.raises(ValueError, match="no two marks"):
        faults.between_marks(log.replace("/mark-end", "/elsewhere"))
