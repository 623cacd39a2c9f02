"""An NVML of one GPU that tells what a test says."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """The part of pynvml that is asked; names in `refused` get no answer."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(
        self,
        pids: Sequence[int] = (),
        *,
        throttle: int | Callable[[], int] = 0,
        busy: int = 0,
        persistence: int = 1,
        refused: Sequence[str] = (),
    ) -> None:
        self.pids, self.throttle, self.busy = pids, throttle, busy
        self.persistence, self.refused = persistence, refused
        self.reads = 0

    def _told(self, name: str, value: Any) -> Any:
        if name in self.refused:
            raise self.NVMLError("not supported")
        return value

    def nvmlInit(self) -> None:
        self._told("init", None)

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlDeviceGetIndex(self, handle: object) -> int:
        return 3

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetVbiosVersion(self, handle: object) -> str:
        return "96.00"

    def nvmlDeviceGetCurrentEccMode(self, handle: object) -> int:
        return int(self._told("ecc", 1))

    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]:
        return [0, 1]

    def nvmlDeviceGetPersistenceMode(self, handle: object) -> int:
        return int(self._told("persistence", self.persistence))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: object) -> int:
        return int(self._told("power_limit", 700_000))

    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int:
        return 1980 * kind

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        self.reads += 1
        return int(self._told("clock", 900 * kind + self.reads))

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return int(self._told("temperature", 40))

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return int(self._told("power", 70_500))

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        reasons = self.throttle if isinstance(self.throttle, int) else self.throttle()
        return int(self._told("throttle", reasons))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self._told("processes", self.pids)]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        return int(self._told("energy", 12_345))
