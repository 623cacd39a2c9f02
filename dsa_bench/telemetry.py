"""Clock, power, heat and neighbours of the GPU while a case is timed, some ten times a second."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsa_bench import nvml as management
from dsa_bench.operator import Machine
from dsa_bench.record import Telemetry

PERIOD_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the GPU told at one time; None: no answer."""

    at: float
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttle_reasons: int
    neighbours: int


class Monitor:
    """Reads while it watches, in a thread; without `nvml` it does nothing.

        with monitor.watching():  # as often as the case is visited
            ...
        telemetry = monitor.take()

    Calls into NVML leave the interpreter's lock free, so the thread holds it for microseconds.
    """

    def __init__(
        self,
        nvml: Any = None,
        handle: Any = None,
        *,
        before: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
        period: float = PERIOD_SECONDS,
    ) -> None:
        self._gpu = None if nvml is None else management.Gpu(nvml, handle)
        self._before, self._clock, self._period = before, clock, period
        self._readings: list[Reading] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read every `period` seconds until the block ends, and at its end if not yet."""
        if self._gpu is None:
            yield
            return
        gpu, count, stop = self._gpu, len(self._readings), threading.Event()

        def watch() -> None:
            while not stop.wait(self._period):
                self._readings.append(self._read(gpu))

        thread = threading.Thread(target=watch, name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if len(self._readings) == count:
                self._readings.append(self._read(gpu))

    def take(self) -> Telemetry | None:
        """The readings since the last take; None where there are none."""
        readings, self._readings = self._readings, []
        if self._gpu is None or not readings:
            return None
        nvml, handle = self._gpu.nvml, self._gpu.handle
        reasons = 0
        for reading in readings:
            reasons |= reading.throttle_reasons
        highest = management.ask(
            nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        )
        return Telemetry(
            seconds=tuple(reading.at - readings[0].at for reading in readings),
            sm_clock_mhz=_series(readings, "sm_clock_mhz"),
            power_w=_series(readings, "power_w"),
            temperature_c=_series(readings, "temperature_c"),
            sm_clock_max_mhz=None if highest is None else float(highest),
            throttle_reasons=reasons,
            neighbours=max(reading.neighbours for reading in readings),
        )

    def energy_joules(self) -> float | None:
        """What the whole card has drawn since its driver was loaded; None where it cannot tell."""
        if self._gpu is None:
            return None
        query, handle = self._gpu.nvml.nvmlDeviceGetTotalEnergyConsumption, self._gpu.handle
        millijoules = management.ask(self._gpu.nvml, lambda: query(handle))
        return None if millijoules is None else millijoules / 1000

    def _read(self, gpu: management.Gpu) -> Reading:
        found = management.answers(gpu.nvml, management.load_queries(gpu))
        return Reading(
            at=self._clock(),
            sm_clock_mhz=found.get("sm_clock_mhz"),
            power_w=found.get("power_w"),
            temperature_c=found.get("temperature_c"),
            throttle_reasons=found.get("throttle_reasons", 0),
            neighbours=management.count_neighbours(gpu, self._before),
        )


def open_monitor(machine: Machine, before: frozenset[int] = frozenset()) -> Monitor:
    """A monitor of the GPU that torch uses; one that does nothing where NVML cannot be asked.

    `before` is what `nvml.processes_before` gave when this process had no CUDA context yet.
    """
    gpu = management.current_gpu() if machine.device == "cuda" else None
    return Monitor() if gpu is None else Monitor(gpu.nvml, gpu.handle, before=before)


def _series(readings: list[Reading], name: str) -> tuple[float, ...]:
    """One value for each reading, or none at all, so that it goes with their times."""
    values = [getattr(reading, name) for reading in readings]
    return () if None in values else tuple(map(float, values))
