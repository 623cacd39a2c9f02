"""A clock that stands still, and a GPU with a time line of its own."""

import math
from dataclasses import dataclass, field


class FakeClock:
    """Time that passes only when somebody lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeCuda:
    """A GPU with a time line of its own: work is queued by the host and runs in order."""

    clock: FakeClock
    gpu_time: float = 0.0
    cycles_per_second: float = 1e9
    slept: list[float] = field(default_factory=list)
    other_stream: float = 0.0
    """When the work of another stream ends."""

    def launch(self, seconds: float, queueing: float) -> None:
        """The host needs `queueing` to launch work that takes the GPU `seconds`."""
        self.clock.now += queueing
        self.gpu_time = max(self.gpu_time, self.clock.now) + seconds

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.cycles_per_second)
        self.launch(cycles / self.cycles_per_second, 0.0)

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.gpu_time, self.other_stream)

    def Event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


@dataclass
class FakeEvent:
    cuda: FakeCuda
    at: float = math.nan

    def record(self) -> None:
        self.at = max(self.cuda.gpu_time, self.cuda.clock.now)

    def query(self) -> bool:
        return self.at <= self.cuda.clock.now

    def synchronize(self) -> None:
        self.cuda.clock.now = max(self.cuda.clock.now, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.at - self.at) * 1000
