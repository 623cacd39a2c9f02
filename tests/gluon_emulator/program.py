"""One emulated program: its partitions as threads, the barriers between them, and what went wrong.

All waiting goes through one condition variable, so a deadlock is known the moment it happens: every
partition waits, no waited-for condition holds, and no asynchronous copy is in flight.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

WARP_SIZE = 32


class EmulationError(Exception):
    """The kernel broke a rule of the machine."""


class Deadlock(EmulationError):
    """Every partition waits, and nothing can come that ends it."""


class Stopped(Exception):
    """Another partition has failed; this one has nothing to report."""


class Partition(threading.local):
    """What one warp-specialised partition (a thread here) knows of itself."""

    program: "Program"
    name = "default"
    num_warps = 4
    slowness = 1
    """Some partitions are much slower than others: that brings out missing waits."""

    def __init__(self) -> None:
        self.mma_queue: list[Any] = []
        self.copy_queue: list[Callable[[], None]] = []
        self.copies: list[threading.Thread] = []
        self.unfenced: list[Any] = []
        self.predicates: dict[str, Any] = {}
        """Registers of the assembly that outlive the piece of it that sets them."""
        self.dice = random.Random()


current = Partition()


class Program:
    """One program of the grid: its position, its shared memory and its partitions."""

    def __init__(
        self, position: tuple[int, int, int], grid: tuple[int, int, int], delay: float, seed: str
    ) -> None:
        self.position, self.grid, self.delay, self.seed = position, grid, delay, seed
        self.allocations: list[Any] = []
        """Shared memory in the order of allocation; the first lies at offset 0."""
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.changed = threading.Condition()
        self.waiting: dict[str, tuple[Callable[[], bool], Callable[[], str]]] = {}
        self.alive = 1
        self.in_flight = 0
        self.failure: BaseException | None = None

    def enter(self, name: str, num_warps: int) -> None:
        """Make the calling thread a partition of this program."""
        Partition.__init__(current)
        current.program, current.name, current.num_warps = self, name, num_warps
        current.dice.seed(f"{self.seed} {self.position} {name}")
        current.slowness = current.dice.choice([0, 1, 1, 10])

    def wait_until(self, ready: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Block the partition until `ready()`; call with `changed` held."""
        self.waiting[current.name] = (ready, describe)
        self.find_deadlock()
        self.changed.wait_for(lambda: self.failure is not None or ready())
        del self.waiting[current.name]
        if self.failure is not None:
            raise Stopped

    def find_deadlock(self) -> None:
        all_wait = self.waiting and len(self.waiting) == self.alive
        if not all_wait or self.in_flight or self.failure is not None:
            return
        if not any(ready() for ready, _ in self.waiting.values()):
            lines = [
                f"{name} waits on {text()}" for name, (_, text) in sorted(self.waiting.items())
            ]
            self.fail(Deadlock("; ".join(lines)))

    def fail(self, error: BaseException) -> None:
        if self.failure is None and not isinstance(error, Stopped):
            self.failure = error
        self.changed.notify_all()

    def start_copy(self, work: Callable[[], None]) -> None:
        """Run `work` at some later moment, as the copy engines do."""
        with self.changed:
            self.in_flight += 1
        delay = current.dice.random() * self.delay * 4

        def run() -> None:
            time.sleep(delay)
            error = _error_of(work)
            with self.changed:
                self.in_flight -= 1
                if error is not None:
                    self.fail(error)
                self.changed.notify_all()
                self.find_deadlock()

        thread = threading.Thread(target=run, name=f"copy of {current.name}")
        current.copies.append(thread)
        thread.start()

    def run_partitions(self, parts: Sequence[tuple[str, int, Callable[[], None]]]) -> None:
        """Run (name, num_warps, body) each in a thread; raise what the first failing one raised."""
        self.alive = len(parts)

        def run(name: str, num_warps: int, body: Callable[[], None]) -> None:
            self.enter(name, num_warps)
            error = _error_of(lambda: (body(), finish_partition()))
            with self.changed:
                self.alive -= 1
                if error is not None:
                    self.fail(error)
                self.find_deadlock()

        threads = [threading.Thread(target=run, args=part, name=part[0]) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.alive = 1
        if self.failure is not None:
            raise self.failure


def _error_of(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def finish_partition() -> None:
    """What must hold when a partition (or a program) ends."""
    if current.mma_queue:
        raise EmulationError(f"{current.name} ends with an unfinished warpgroup_mma")
    for thread in current.copies:
        thread.join()


def pause(weight: float = 1) -> None:
    """Lose a random time, so that each run interleaves the partitions differently."""
    if current.program.delay and current.dice.random() < 0.5:
        time.sleep(current.dice.random() * current.program.delay * current.slowness * weight)


class Barrier:
    """An mbarrier: arrivals and bytes to come in this phase, and how many phases have ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.pending = 0
        self.pending_bytes = 0
        self.phases = 0

    def index(self, i: Any) -> "Barrier":
        if int(i) != 0:
            raise EmulationError(f"{self.name} is a single barrier, indexed by {int(i)}")
        return self

    def init(self, count: int) -> None:
        if self.count and self.pending != self.count:
            raise EmulationError(f"{self.name} is initialised in the middle of a phase")
        self.count = self.pending = int(count)

    def arrive(self, arrivals: int, *, expect_bytes: int = 0, copied_bytes: int = 0) -> None:
        pause()
        with current.program.changed:
            if not self.count:
                raise EmulationError(f"{self.name} is used before it is initialised")
            self.pending -= arrivals
            self.pending_bytes += expect_bytes - copied_bytes
            if self.pending < 0:
                raise EmulationError(f"{self.name} gets more than {self.count} arrivals in a phase")
            if self.pending == 0 and self.pending_bytes == 0:
                self.pending = self.count
                self.phases += 1
                current.program.changed.notify_all()

    def wait(self, parity: int) -> None:
        pause()
        with current.program.changed:
            if not self.count:
                raise EmulationError(f"{self.name} is used before it is initialised")
            current.program.wait_until(
                lambda: self.phases % 2 != parity,
                lambda: f"{self.name} parity {parity} ({self})",
            )

    def __str__(self) -> str:
        return f"{self.phases} phases done, {self.pending} of {self.count} arrivals to come"


class NamedBarrier:
    """A hardware barrier by number: `bar.arrive` and `bar.sync` with a count of threads."""

    def __init__(self, number: int) -> None:
        self.name = f"named barrier {number}"
        self.arrived: Counter[str] = Counter()
        self.phases = 0

    def hit(self, num_threads: int, *, wait: bool) -> None:
        pause()
        program = current.program
        with program.changed:
            if self.arrived[current.name]:
                raise EmulationError(f"{current.name} arrives twice in one phase of {self.name}")
            phase = self.phases
            self.arrived[current.name] += WARP_SIZE * current.num_warps
            total = self.arrived.total()
            if total > num_threads:
                raise EmulationError(f"{self.name} counts {num_threads} threads, {total} came")
            if total == num_threads:
                self.arrived.clear()
                self.phases += 1
                program.changed.notify_all()
            elif wait:
                program.wait_until(
                    lambda: self.phases > phase,
                    lambda: f"{self.name} ({self.arrived.total()} of {num_threads} threads came)",
                )
