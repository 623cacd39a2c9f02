"""One emulated program: its partitions as threads, the barriers between them, and what went wrong.

Time is counted, not slept: one partition runs at a time, up to where it loses time or waits, and
then the one goes on whose moment comes first. So nothing is ever idle, a seed gives the same run
again, and a deadlock is known the moment it happens: every partition waits, no waited-for condition
holds, and no asynchronous copy is in flight.
"""

import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        self.copies: list[Copy] = []
        self.unfenced: list[Any] = []
        self.predicates: dict[str, Any] = {}
        """Registers of the assembly that outlive the piece of it that sets them."""
        self.dice = random.Random()
        self.turn = threading.Semaphore(0)
        """Given to it when it may run."""


@dataclass(eq=False, slots=True)
class Copy:
    """An asynchronous copy, which runs when its moment has come."""

    work: Callable[[], None]
    has_landed: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A partition that goes on when `ready()`."""

    ready: Callable[[], bool]
    describe: Callable[[], str]
    turn: threading.Semaphore


current = Partition()


class Program:
    """One program of the grid: its position, its shared memory and its partitions."""

    def __init__(
        self, position: tuple[int, int, int], grid: tuple[int, int, int], seed: str
    ) -> None:
        self.position, self.grid, self.seed = position, grid, seed
        self.allocations: list[Any] = []
        """Shared memory in the order of allocation; the first lies at offset 0."""
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.waiting: dict[str, Waiting] = {}
        self.now = 0.0
        self.coming: list[tuple[float, float, Copy | threading.Semaphore]] = []
        """A heap: moment, a random number between those of one moment, what lands or goes on."""
        self.dice = random.Random(f"{seed} {position}")
        self.failure: BaseException | None = None

    def enter(self, name: str, num_warps: int) -> None:
        """Make the calling thread a partition of this program."""
        Partition.__init__(current)
        current.program, current.name, current.num_warps = self, name, num_warps
        current.dice.seed(f"{self.seed} {self.position} {name}")
        current.slowness = current.dice.choice([0, 1, 1, 10])

    def sleep(self, duration: float) -> None:
        """Let others run for so long."""
        self._plan(duration, current.turn)
        self._give_turn()
        current.turn.acquire()
        if self.failure is not None:
            raise Stopped

    def wait_until(self, ready: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Block the partition until `ready()`."""
        if not ready():
            self.waiting[current.name] = Waiting(ready, describe, current.turn)
            self._give_turn()
            current.turn.acquire()
        if self.failure is not None:
            raise Stopped

    def _plan(self, duration: float, what: Copy | threading.Semaphore) -> None:
        heapq.heappush(self.coming, (self.now + duration, self.dice.random(), what))

    def _give_turn(self) -> None:
        """Let copies land until a partition can go on, and give it its turn; it may be this one."""
        while True:
            for name, waiting in list(self.waiting.items()):
                if self.failure is not None or waiting.ready():
                    del self.waiting[name]
                    self._plan(0, waiting.turn)
            if self.coming:
                self.now, _, what = heapq.heappop(self.coming)
                if not isinstance(what, Copy):
                    what.release()
                    return
                self._land(what)
            elif self.waiting:
                lines = [f"{name} waits on {w.describe()}" for name, w in self.waiting.items()]
                self.fail(Deadlock("; ".join(sorted(lines))))
            else:
                return

    def _land(self, copy: Copy) -> None:
        error = _error_of(copy.work)
        copy.has_landed = True
        if error is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        if self.failure is None and not isinstance(error, Stopped):
            self.failure = error

    def start_copy(self, work: Callable[[], None]) -> None:
        """Run `work` at some later moment, as the copy engines do."""
        copy = Copy(work)
        current.copies.append(copy)
        self._plan(current.dice.random() * 4, copy)

    def run_partitions(self, parts: Sequence[tuple[str, int, Callable[[], None]]]) -> None:
        """Run (name, num_warps, body) each in a thread; raise what the first failing one raised."""

        def run(turn: threading.Semaphore, name: str, num_warps: int, body: Callable[[], None]):
            self.enter(name, num_warps)
            current.turn = turn
            turn.acquire()
            error = _error_of(lambda: (body(), finish_partition()))
            if error is not None:
                self.fail(error)
            self._give_turn()

        turns = [threading.Semaphore(0) for _ in parts]
        threads = [
            threading.Thread(target=run, args=(turn, *part), name=part[0])
            for turn, part in zip(turns, parts, strict=True)
        ]
        for turn, thread in zip(turns, threads, strict=True):
            self._plan(0, turn)
            thread.start()
        self._give_turn()
        for thread in threads:
            thread.join()
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
    wait_for_landing()


def wait_for_landing() -> None:
    """Until all copies of this partition have landed."""
    copies = current.copies
    current.program.wait_until(
        lambda: all(copy.has_landed for copy in copies), lambda: "its own copies"
    )
    copies.clear()


def pause(weight: float = 1) -> None:
    """Lose a random time, so that each seed interleaves the partitions differently."""
    if current.dice.random() < 0.5:
        current.program.sleep(current.dice.random() * current.slowness * weight)


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

    def arrive(self, arrivals: int, *, expect_bytes: int = 0) -> None:
        pause()
        self.count_down(arrivals, expect_bytes)

    def count_down(self, arrivals: int, num_bytes: int) -> None:
        """At once, as a copy does that lands; it takes bytes off, an arrival may add some."""
        if not self.count:
            raise EmulationError(f"{self.name} is used before it is initialised")
        self.pending -= arrivals
        self.pending_bytes += num_bytes
        if self.pending < 0:
            raise EmulationError(f"{self.name} gets more than {self.count} arrivals in a phase")
        if self.pending == 0 and self.pending_bytes == 0:
            self.pending = self.count
            self.phases += 1

    def wait(self, parity: int) -> None:
        pause()
        if not self.count:
            raise EmulationError(f"{self.name} is used before it is initialised")
        current.program.wait_until(
            lambda: self.phases % 2 != parity, lambda: f"{self.name} parity {parity} ({self})"
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
        elif wait:
            current.program.wait_until(
                lambda: self.phases > phase,
                lambda: f"{self.name} ({self.arrived.total()} of {num_threads} threads came)",
            )
