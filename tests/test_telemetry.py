"""What a monitor reads of a GPU, with an NVML and a clock of its own."""

import itertools
import sys
import time

import pytest
import torch

from dsa_bench import nvml as management
from dsa_bench.operator import Machine
from dsa_bench.telemetry import Monitor, open_monitor
from tests.fake_nvml import FakeNvml


def ticking() -> "itertools.count[float]":
    return itertools.count(100.0, 0.5)


def monitor(nvml: FakeNvml, **settings: object) -> Monitor:
    clock = ticking()
    return Monitor(nvml, "handle", clock=lambda: next(clock), **settings)  # type: ignore[arg-type]


def wait_for(nvml: FakeNvml, reads: int) -> None:
    limit = time.monotonic() + 5
    while nvml.reads < reads and time.monotonic() < limit:
        time.sleep(0.001)


def test_it_reads_again_and_again_while_it_watches() -> None:
    nvml = FakeNvml()
    watcher = monitor(nvml, period=0.001)
    with watcher.watching():
        wait_for(nvml, 3)
    seen = nvml.reads
    time.sleep(0.02)
    assert nvml.reads == seen
    told = watcher.take()
    assert told is not None and seen >= 3
    assert told.seconds == tuple(0.5 * i for i in range(seen))
    assert told.sm_clock_mhz == tuple(900.0 + i for i in range(1, seen + 1))
    assert told.power_w == (70.5,) * seen and told.temperature_c == (40.0,) * seen
    assert told.sm_clock_max_mhz == 1980.0


def test_a_visit_shorter_than_the_period_gives_one_reading_at_its_end() -> None:
    nvml = FakeNvml()
    watcher = monitor(nvml, period=60.0)
    for visit in range(2):
        with watcher.watching():
            assert nvml.reads == visit
    told = watcher.take()
    assert told is not None and told.seconds == (0.0, 0.5)
    assert told.sm_clock_mhz == (901.0, 902.0)


def test_taking_begins_anew() -> None:
    watcher = monitor(FakeNvml(), period=60.0)
    assert watcher.take() is None
    for _ in range(2):
        with watcher.watching():
            pass
        told = watcher.take()
        assert told is not None and told.seconds == (0.0,)
    assert watcher.take() is None


def test_every_reason_that_was_ever_set_is_kept() -> None:
    reasons = iter((0x4, 0x0, 0x20))
    watcher = monitor(FakeNvml(throttle=lambda: next(reasons)), period=60.0)
    for _ in range(3):
        with watcher.watching():
            pass
    told = watcher.take()
    assert told is not None and told.throttle_reasons == 0x24


def test_what_cannot_be_read_stays_empty() -> None:
    nvml = FakeNvml(refused=("power", "throttle", "processes", "energy"))
    watcher = monitor(nvml, period=60.0)
    with watcher.watching():
        pass
    told = watcher.take()
    assert told is not None and told.power_w == () and told.temperature_c == (40.0,)
    assert told.throttle_reasons == 0 and told.neighbours == 0
    assert watcher.energy_joules() is None


def test_a_series_with_a_gap_is_left_out() -> None:
    nvml = FakeNvml()
    watcher = monitor(nvml, period=60.0)
    with watcher.watching():
        pass
    nvml.refused = ("temperature",)
    with watcher.watching():
        pass
    told = watcher.take()
    assert told is not None and len(told.seconds) == len(told.power_w) == 2
    assert told.temperature_c == ()


@pytest.mark.parametrize(
    ("before", "now", "neighbours"),
    [
        ((), (7,), 0),  # 7 is this process, whatever its number
        ((), (), 0),
        ((1,), (1, 7), 1),
        ((1,), (7,), 0),  # 1 has gone
        ((1,), (1,), 1),  # this process isn't listed
        ((1, 2), (1, 2, 7, 8), 3),
        ((), (7, 8), 1),
    ],
)
def test_neighbours_are_told_apart_by_when_they_came(
    before: tuple[int, ...], now: tuple[int, ...], neighbours: int
) -> None:
    watcher = monitor(FakeNvml(now), before=frozenset(before), period=60.0)
    with watcher.watching():
        pass
    told = watcher.take()
    assert told is not None and told.neighbours == neighbours


def test_the_thread_ends_with_an_error_of_the_case() -> None:
    nvml = FakeNvml()
    watcher = monitor(nvml, period=0.001)
    with pytest.raises(ZeroDivisionError), watcher.watching():
        raise ZeroDivisionError
    seen = nvml.reads
    time.sleep(0.02)
    assert nvml.reads == seen >= 1


def test_energy_is_in_joules() -> None:
    assert monitor(FakeNvml()).energy_joules() == 12.345


def test_without_a_gpu_it_does_nothing() -> None:
    watcher = open_monitor(Machine(device="cpu", name="C"))
    with watcher.watching():
        pass
    assert watcher.take() is None and watcher.energy_joules() is None


def test_processes_before_are_those_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml((4, 5)))
    assert management.processes_before() == {4, 5}


@pytest.mark.parametrize("module", [None, FakeNvml((4,), refused=("init",))])
def test_no_nvml_is_no_error(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert management.processes_before() == frozenset()
    assert management.load() is None


@pytest.mark.gpu
def test_a_gpu_at_work_is_watched() -> None:
    watcher = open_monitor(Machine(device="cuda", name="H"), management.processes_before())
    x = torch.randn(4096, 4096, device="cuda")
    with watcher.watching():
        limit = time.monotonic() + 0.5
        while time.monotonic() < limit:
            x @ x
            torch.cuda.synchronize()
    told = watcher.take()
    assert told is not None and 3 <= len(told.seconds) <= 6
    assert told.sm_clock_max_mhz is not None
    assert all(100 < clock <= told.sm_clock_max_mhz for clock in told.sm_clock_mhz)
    assert len(told.sm_clock_mhz) == len(told.seconds)
