"""One `run`, `check` or `profile` from what was asked to what is left in the run folder."""

import contextlib
import random
import re
import shlex
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsa_bench import doubt, plugins, runner, schedule, sweep
from dsa_bench.operator import UsageError
from dsa_bench.record import Record
from dsa_bench.runner import Progress
from dsa_bench.schedule import Group
from dsa_bench.store import Run, create_run, expect_free, open_writer, read_run
from dsa_bench.sweep import Layer, Planned
from dsa_bench.worker_process import Worker, start_worker

DEFAULT_TIMEOUT = 120.0
DEVICES = ("auto", "cuda", "cpu")
EFFORTS = ("quick", "standard", "precise")
# a trace of each of many cases is slow to take and more than a person reads
MAX_PROFILED = 8
DEFAULT_SWEEPS = {
    "run": {"cuda": "v3.2", "cpu": "cpu"},
    "profile": {"cuda": "v3.2", "cpu": "cpu"},
    "check": {"cuda": "check", "cpu": "check-cpu"},
}
LOG = "worker.log"
TRACES = "traces"
REPORTS = {"html": "report.html", "png": "figures", "md": "report.md", "csv": "report.csv"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a person asked for."""

    verb: str
    sweep: str | None
    overrides: Mapping[str, Any]
    """Key of a sweep file -> text from the command line."""
    argv: tuple[str, ...]
    device: str = "auto"
    effort: str = "quick"
    replicates: int = 1
    timeout: float | None = None
    output: Path | None = None
    gpu_hour_usd: float = 2.0
    hostile: bool = False
    """What is ok meets the hostile inputs too, after all cases."""

    @property
    def is_bare(self) -> bool:
        """Nothing was selected, so the defaults choose the cases."""
        return self.sweep is None and not self.overrides


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Cases that are ready to be taken."""

    verb: str
    path: Path | None
    """The run folder; None: nothing is kept."""
    planned: tuple[Planned, ...]
    """Every case, also those that an earlier session ended."""
    groups: tuple[Group, ...]
    """What is still to do."""
    header: Mapping[str, Any]
    is_resumed: bool
    timeout: float
    options: Mapping[str, Any]
    busy: str = ""
    """What else keeps the machine busy, as a sentence."""
    lost: Mapping[tuple[str, int], int]
    """Workers that (key, replicate) has cost before."""

    @property
    def num_endings(self) -> int:
        """How many records the groups will give."""
        return sum(len(group.items) for group in self.groups)

    @property
    def device(self) -> str:
        return str(self.header["machine"]["device"])

    @property
    def is_hostile(self) -> bool:
        """The run was begun with --hostile."""
        return self.header["options"].get("hostile") is True


def prepare(request: Request, *, is_dry: bool = False) -> Job:
    """Examine the machine and plan the cases; nothing is written. A dry job is only to be shown."""
    command_line = Layer(source="", table=request.overrides)
    named = [sweep.load(request.sweep)] if request.sweep else []
    _refuse_early(request, [*named, command_line])
    from dsa_bench.probe import probe

    with_ceilings = request.verb == "run" and not is_dry
    with ThreadPoolExecutor(max_workers=1) as other:
        asked = other.submit(probe, request.device, with_ceilings=with_ceilings)
        # loads torch, which takes seconds: meanwhile another process examines the machine
        from dsa_bench import plan

        found = asked.result()
    name = request.sweep or DEFAULT_SWEEPS[request.verb][found.machine.device]
    wanted = sweep.resolve(name, *(named or [sweep.load(name)]), command_line)
    planned = plan.plan(wanted, found.machine)
    if request.verb == "profile":
        planned = _few(planned, request)
    timeout = DEFAULT_TIMEOUT if request.timeout is None else request.timeout
    options = {"device": found.machine.device, "effort": request.effort}
    settings = {
        "timeout": timeout,
        "gpu_hour_usd": request.gpu_hour_usd,
        "replicates": request.replicates,
        "order_seed": random.SystemRandom().getrandbits(32),
        **({"hostile": True} if request.hostile else {}),
    }
    brought = plugins.digests()
    header = {
        "protocol": doubt.PROTOCOL,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(request.argv),
        "verb": request.verb,
        **found.header,
        "options": options | settings,
        "sweep": wanted.to_json(),
        "plan": [item.to_json() for item in planned],
    } | ({"impl_files": brought} if brought else {})
    path = request.output
    if path is None and request.verb != "check":
        path = default_folder(found.machine.name)
    return Job(
        verb=request.verb,
        path=path,
        planned=planned,
        groups=_groups(request.verb, planned, settings),
        header=header,
        is_resumed=False,
        timeout=timeout,
        options=options,
        busy=found.busy,
        lost={},
    )


def _groups(
    verb: str, planned: Sequence[Planned], settings: Mapping[str, Any]
) -> tuple[Group, ...]:
    """All groups of a run; only what is timed needs competitors beside it."""
    return schedule.groups(
        planned,
        replicates=int(settings.get("replicates", 1)),
        seed=int(settings.get("order_seed", 0)),
        together=verb == "run",
    )


def _refuse_early(request: Request, layers: Sequence[Layer]) -> None:
    """UsageError for what is wrong whatever the machine is; torch takes seconds to load."""
    if request.effort not in EFFORTS:
        raise sweep.unknown("--effort", request.effort, EFFORTS)
    if request.device not in DEVICES:
        raise sweep.unknown("--device", request.device, DEVICES)
    sweep.resolve("", *layers)
    if request.output is not None:
        expect_free(request.output)


def prepare_resume(folder: Path, *, timeout: float | None) -> Job:
    """The cases of a run that have not ended; on the machine that it began on."""
    from dsa_bench.probe import probe

    run = read_run(folder)
    try:
        header, options = run.header, run.header["options"]
        planned = tuple(Planned.from_json(item) for item in header["plan"])
        machine, device = header["machine"]["name"], header["machine"]["device"]
        groups = _groups(header.get("verb", "run"), planned, options)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder}/run.json lacks {error} (run the sweep again)") from None
    _expect_same_files(folder, header)
    _expect_same_machine(folder, machine, probe(device, with_ceilings=False).header)
    return Job(
        verb=header.get("verb", "run"),
        path=folder,
        planned=planned,
        groups=_without(groups, run.ended),
        header=header,
        is_resumed=True,
        timeout=float(options["timeout"]) if timeout is None else timeout,
        options={key: options[key] for key in ("device", "effort") if key in options},
        lost={(r.case.key, r.replicate): r.lost_workers for r in run.records},
    )


def expect_measured_here(folder: Path, job: Job) -> None:
    """UsageError unless findings of this job belong to what this folder's run has measured."""
    (run,) = read_finished([folder])
    _expect_same_files(folder, run.header)
    _expect_same_machine(folder, (run.header.get("machine") or {}).get("name"), job.header)


def _expect_same_machine(folder: Path, name: object, header: Mapping[str, Any]) -> None:
    here = header["machine"]["name"]
    if here != name:
        raise UsageError(f"{folder} was measured on {name}, this machine has {here} (use -o)")


def _expect_same_files(folder: Path, header: Mapping[str, Any]) -> None:
    """UsageError unless the run was begun with the files that are in use, byte by byte.

    A run folder may be somebody else's: the code that it names is never run by itself.
    """
    begun = header.get("impl_files", [])
    if begun != plugins.digests():
        names = ", ".join(str(item.get("path")) for item in begun) or "none"
        raise UsageError(
            f"{folder} was begun with --impl-file {names} (give the same files, unchanged)"
        )


def _without(groups: Sequence[Group], ended: Container[tuple[str, int]]) -> tuple[Group, ...]:
    """The groups without the (key, replicate) that have ended."""
    left = []
    for group in groups:
        items = [item for item in group.items if (item.case.key, group.replicate) not in ended]
        if items:
            left.append(replace(group, items=tuple(items)))
    return tuple(left)


def default_folder(machine: str) -> Path:
    """`results/<UTC timestamp>-<machine>`."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return Path("results") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{slug}"


def _few(planned: tuple[Planned, ...], request: Request) -> tuple[Planned, ...]:
    """The cases to profile; without a selection the largest DSA case of each phase."""
    if request.is_bare:
        last = {item.case.phase: item for item in planned if item.case.op == "dsa"}
        return tuple(last.values())
    if len(planned) > MAX_PROFILED:
        raise UsageError(
            f"profile takes at most {MAX_PROFILED} cases, this selection has {len(planned)}"
            " (narrow it: --op dsa --phase decode -L 32k -k 2k)"
        )
    return planned


def execute(
    job: Job,
    tell: Callable[[Progress], None],
    *,
    start: Callable[[Path], Worker] = start_worker,
) -> tuple[Run, bool]:
    """Take the cases; what the folder holds in the end, and whether nobody interrupted."""
    with _place(job) as (folder, save, kept):
        options = dict(job.options)
        if job.verb == "profile":
            options["trace_dir"] = str((folder / TRACES).resolve())

        def finish(record: Record) -> Record:
            kept = _finished(record, job)
            save(kept)
            return kept

        finished = runner.run(
            job.groups,
            settings=runner.Settings(
                verb=job.verb, options=options, timeout=job.timeout, log=folder / LOG
            ),
            save=finish,
            tell=tell,
            start=start,
            lost=job.lost,
        )
        if job.path is None:
            return Run(path=folder, header=job.header, records=tuple(kept)), finished
        return read_run(job.path), finished


def _finished(record: Record, job: Job) -> Record:
    """The record with all doubts that its samples raise, and the command that repeats it.

    They are judged here and not in the worker, where what is measured could reach the judge.
    """
    effort = job.options.get("effort", "quick")
    return replace(
        record,
        flags=doubt.judge(record, job.header.get("ceilings") or {}),
        reproduce=" ".join(
            (
                sweep.reproduce(record.case, device=job.device, effort=effort),
                *(f"--impl-file {shlex.quote(str(path))}" for path in plugins.files()),
            )
        ),
    )


Place = tuple[Path, Callable[[Record], None], list[Record]]


@contextlib.contextmanager
def _place(job: Job) -> Iterator[Place]:
    """(folder, how a record is kept, records kept in memory alone)."""
    kept: list[Record] = []
    if job.path is None:
        with tempfile.TemporaryDirectory(prefix="dsa-bench-") as name:
            yield Path(name), kept.append, kept
        return
    if not job.is_resumed:
        create_run(job.path, job.header)
    if job.verb == "profile":
        (job.path / TRACES).mkdir(exist_ok=True)
    with open_writer(job.path) as writer:
        yield job.path, writer.append, kept


def read_finished(paths: Sequence[Path]) -> list[Run]:
    """Runs to report on; UsageError where one is torn or has no records."""
    runs = []
    for path in paths:
        run = read_run(path)
        if run.torn:
            raise UsageError(
                f"{path}/records.jsonl breaks off in its last line, after case {len(run.records)}"
                f" (finish it with dsa-bench run --resume {path})"
            )
        if not run.records:
            raise UsageError(
                f"{path} has no records yet (finish it with dsa-bench run --resume {path})"
            )
        runs.append(run)
    return runs


def write_report(runs: Sequence[Run], form: str, path: Path) -> None:
    """Write one form of the report: `html`, `png` (a folder of figures), `md` or `csv`."""
    from dsa_bench.reports import html, plots, tables

    write: Callable[[Sequence[Run], Path], object] = {
        "html": html.write_html,
        "png": plots.write_pngs,
        "md": tables.write_markdown,
        "csv": tables.write_csv,
    }[form]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(runs, path)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror or error}") from None


def write_all_reports(run: Run) -> dict[str, str]:
    """Write every form into the run folder; form -> why it could not be written."""
    failures = {}
    for form, name in REPORTS.items():
        try:
            write_report([run], form, run.path / name)
        # the records are safe, and a form that fails must not take the others with it
        except Exception as error:
            failures[form] = f"{type(error).__name__}: {error}"
    return failures
