"""Takes the groups of a run through worker processes, and saves each ending at once.

A case that takes too long is charged and its worker killed. When a worker dies the case in flight
is tried once more, alone and in a fresh one; a second death sets it aside. The others of its group
go on. Nothing here knows torch, prints, or needs a GPU.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsa_bench.record import Case, Record
from dsa_bench.schedule import Group
from dsa_bench.store import LOST_WORKERS_LIMIT
from dsa_bench.worker_process import (
    Worker,
    WorkerDied,
    WorkerGone,
    WorkerTimeout,
    start_worker,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What is told while a run goes on."""

    ended: int
    """How many cases have ended; of a record, itself counted in."""
    case: Case
    phase: str = ""
    """What the worker does; empty once the case has ended."""
    record: Record | None = None
    """The ending; None while the case is in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the cases of one run are taken."""

    verb: str
    """`run`, `check` or `profile`."""
    options: Mapping[str, Any]
    """What the worker is told with each request."""
    timeout: float
    """Seconds that one case may take, all phases together."""
    log: Path


def run(
    groups: Iterable[Group],
    *,
    settings: Settings,
    save: Callable[[Record], Record],
    tell: Callable[[Progress], None] = lambda progress: None,
    start: Callable[[Path], Worker] = start_worker,
    lost: Mapping[tuple[str, int], int] | None = None,
) -> bool:
    """Take every case to its ending and save it; False if a person interrupted.

    `save` gets each record once and gives it back as it was kept. `lost` says how many workers a
    (key, replicate) has cost before. Each replicate begins in a fresh worker. At the first Ctrl-C
    the case in flight ends as `interrupted` and the worker is stopped; a second one while it stops
    kills it at once and is passed on.
    """
    session = _Session(settings=settings, start=start, save=save, tell=tell, lost=dict(lost or {}))
    try:
        for group in groups:
            session.take(group)
    except KeyboardInterrupt:
        session.interrupt()
        return False
    finally:
        session.stop()
    return True


@dataclass(slots=True)
class _Request:
    """One group of cases at a worker."""

    waiting: dict[str, Case]
    """By key, without those that have ended."""
    cases: tuple[Case, ...]
    current: int = 0
    """Which case the worker works on."""
    spent: dict[int, float] = field(default_factory=dict)

    @property
    def culprit(self) -> Case | None:
        """The case to charge if the worker is lost now; None where its record came before that."""
        case = self.cases[self.current]
        if case.key in self.waiting or len(self.waiting) < len(self.cases):
            return self.waiting.get(case.key)
        return next(iter(self.waiting.values()))


@dataclass(slots=True)
class _Session:
    """The worker of the moment, if there is one, and what it has cost."""

    settings: Settings
    start: Callable[[Path], Worker]
    save: Callable[[Record], Record]
    tell: Callable[[Progress], None]
    lost: dict[tuple[str, int], int]
    worker: Worker | None = None
    replicate: int = 0
    ended: int = 0
    in_flight: Case | None = None

    def take(self, group: Group) -> None:
        """Take a group to its end; cases that lost their worker once come last, each alone."""
        if group.replicate != self.replicate:
            self.stop()
            self.replicate = group.replicate
        for item in group.items:
            if item.reason:
                self._end(Record(case=item.case, status="skipped", reason=item.reason))
        rest = [item.case for item in group.items if not item.reason]
        again: list[Case] = []
        while rest or again:
            asked = rest or [again.pop(0)]
            rest = self._request(asked, again)

    def _request(self, cases: list[Case], again: list[Case]) -> list[Case]:
        """Take cases to one worker; those that are left when it was lost over another."""
        request = _Request(waiting={case.key: case for case in cases}, cases=tuple(cases))
        self._begin(request)
        failed = False
        try:
            while (event := self._answer(request)).get("event") != "done":
                failed |= self._heed(event, request)
            for case in request.waiting.values():
                self._end(Record(case=case, status="failed", reason="the worker gave no record"))
            rest = []
        except WorkerTimeout as error:
            reason = f"no answer after {self.settings.timeout:g} s, {error}"
            self._charge(request, "timeout", reason, again)
            rest, failed = list(request.waiting.values()), True
        except WorkerDied as error:
            self._charge(request, "failed", str(error), again)
            rest, failed = list(request.waiting.values()), True
        if failed:
            # after a device fault every later call in that process fails too
            self.stop()
        return rest

    def _begin(self, request: _Request) -> None:
        self.in_flight = request.cases[0]
        self._tell_phase("start")
        if self.worker is None:
            self.worker = self.start(self.settings.log)
        self.worker.ask(
            {
                "verb": self.settings.verb,
                "cases": [case.to_json() for case in request.cases],
                "options": dict(self.settings.options),
            }
        )

    def _answer(self, request: _Request) -> dict[str, Any]:
        """The next event; the time until it is charged to the case in flight."""
        assert self.worker is not None
        begin, used = time.monotonic(), request.spent.get(request.current, 0.0)
        try:
            event = self.worker.answer(self.settings.timeout - used)
        except WorkerGone:
            # it ended itself after an earlier request: nobody here is to blame
            self.stop()
            self._begin(request)
            return self._answer(request)
        request.spent[request.current] = used + time.monotonic() - begin
        return event

    def _heed(self, event: Mapping[str, Any], request: _Request) -> bool:
        """Act on a phase or a record; whether it was the record of a failure."""
        try:
            request.current = int(event["case"])
            case = request.cases[request.current]
            if event["event"] == "phase":
                self.in_flight = case
                self._tell_phase(str(event["phase"]))
                return False
            record = replace(Record.from_json(event["record"]), case=case)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise WorkerDied(f"worker answered with a broken record: {error}") from None
        if request.waiting.pop(case.key, None) is not None:
            self._end(record)
        return record.status == "failed"

    def _charge(self, request: _Request, status: str, reason: str, again: list[Case]) -> None:
        """The worker was lost: end the case that did it, or leave it for another try."""
        case = request.culprit
        if case is None:
            return
        del request.waiting[case.key]
        place = (case.key, self.replicate)
        self.lost[place] = self.lost.get(place, 0) + 1
        if status == "failed" and self.lost[place] < LOST_WORKERS_LIMIT:
            again.append(case)
            return
        if self.lost[place] >= LOST_WORKERS_LIMIT:
            reason = f"{reason} (set aside: it has cost {self.lost[place]} workers)"
        log = self.worker.last_lines if self.worker is not None else ()
        self._end(Record(case=case, status=status, reason=reason, log=log))

    def _end(self, record: Record) -> None:
        place = (record.case.key, self.replicate)
        record = replace(
            record,
            replicate=self.replicate,
            lost_workers=self.lost.get(place, 0),
            ended=time.time(),
        )
        # before it is saved: an interrupt behind that must not end the case again
        self.in_flight = None
        kept = self.save(record)
        self.ended += 1
        self.tell(Progress(ended=self.ended, case=kept.case, record=kept))

    def _tell_phase(self, phase: str) -> None:
        if self.in_flight is not None:
            self.tell(Progress(ended=self.ended, case=self.in_flight, phase=phase))

    def interrupt(self) -> None:
        """End the case in flight, if there is one."""
        if self.in_flight is not None:
            case, reason = self.in_flight, "stopped by a person"
            self._end(Record(case=case, status="interrupted", reason=reason))

    def stop(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop()
