"""Where the time goes: one pass under torch's profiler, apart from the timing pass.

A composed operator marks its stages by `record_function("stage:<name>")`. On CUDA a kernel belongs
to the stage inside whose mark the host launched it (linked by the correlation number), however late
the GPU runs it. On a CPU a stage's time is the sum of the self times of the torch operations inside
its mark.
"""

import csv
import gzip
import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dsa_bench.operator import Run
from dsa_bench.record import MAX_KERNELS, KernelTime, StageTime

Event = Mapping[str, Any]

STAGE_PREFIX = "stage:"
CALL_MARK = "dsa_bench:call"
OTHER = "other"
"""Stage of what a composed operator does outside of its marks."""
GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCH_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver"})
OWNER_CATEGORIES = frozenset({"cpu_op", "user_annotation"})
MAX_NAME = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One launch of a kernel, or one torch operation on a CPU, within a call."""

    name: str
    stage: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Times of one call by stage and by kernel: the MAX_KERNELS longest, in falling order."""

    stages: tuple[StageTime, ...]
    kernels: tuple[KernelTime, ...]


class Marks:
    """Intervals on the host's time line, by name; the innermost one that holds a time counts."""

    def __init__(self, events: Iterable[Event], prefix: str) -> None:
        found = [
            (float(e["ts"]), float(e["ts"]) + float(e["dur"]), str(e["name"]).removeprefix(prefix))
            for e in events
            if e.get("cat") == "user_annotation" and str(e["name"]).startswith(prefix)
        ]
        self.intervals = sorted(found)
        self._starts = [begin for begin, _, _ in self.intervals]

    def at(self, ts: float) -> str | None:
        for begin, end, name in reversed(self.intervals[: bisect_right(self._starts, ts)]):
            if begin <= ts <= end:
                return name
        return None


def trace_case(
    run: Run,
    inputs: Any,
    *,
    stages: Sequence[StageTime],
    device: str,
    calls: int = 3,
    before: Callable[[], object] | None = None,
    keep: Path | None = None,
) -> Breakdown:
    """Profile some calls and split their time.

    Args:
        run, inputs: What is called; it has been called before, so nothing compiles here.
        stages: Name, implementation and cost of each stage, with any seconds.
        device: `cuda` or `cpu`.
        calls: How many calls are profiled; times are per call.
        before: Called before each profiled call, and not counted: flushes L2.
        keep: Path without suffix; leaves `<keep>.trace.json.gz` and `<keep>.memory.csv`.
    """
    _, events = profile_calls(
        run, inputs, device=device, calls=calls, before=before, memory=keep is not None, keep=keep
    )
    if keep is not None:
        write_memory_timeline(events, keep.with_name(f"{keep.name}.memory.csv"), device)
    return summarise(events, stages, device=device)


def profile_calls(
    run: Run,
    inputs: Any,
    *,
    device: str,
    calls: int = 1,
    before: Callable[[], object] | None = None,
    memory: bool = False,
    keep: Path | None = None,
) -> tuple[Any, list[Event]]:
    """Outputs of the last call, and the events of the trace."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=memory, acc_events=True) as profiler:
        outputs = None
        for _ in range(calls):
            if before is not None:
                before()
            with record_function(CALL_MARK):
                outputs = None  # before the next call, as in the timing pass
                outputs = run(inputs)
            if device == "cuda":
                torch.cuda.synchronize()
    scratch = tempfile.TemporaryDirectory() if keep is None else nullcontext(keep.parent)
    with scratch as folder:
        name = "trace" if keep is None else keep.name
        path = Path(folder) / f"{name}.trace.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return outputs, read_events(path)


def read_events(path: Path) -> list[Event]:
    """The events of a chrome trace, gzipped or not."""
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return list(json.loads(text)["traceEvents"])


def summarise(events: Sequence[Event], stages: Sequence[StageTime], *, device: str) -> Breakdown:
    """Split the marked calls of a trace by stage and kernel, per call."""
    calls = Marks(events, CALL_MARK)
    marks = Marks(events, STAGE_PREFIX)
    only = stages[0].name if len(stages) == 1 else None
    found = gpu_work(events) if device == "cuda" else cpu_work(events)
    count = max(1, len(calls.intervals))
    work = [
        Work(name=name, stage=only or marks.at(ts) or OTHER, seconds=seconds / count)
        for name, ts, seconds in found
        if calls.at(ts) is not None
    ]
    return Breakdown(stages=_stage_times(work, stages), kernels=_kernel_times(work, count))


def gpu_work(events: Iterable[Event]) -> list[tuple[str, float, float]]:
    """(name, host time of the launch in µs, seconds on the GPU) of kernels, copies and fills."""
    events = list(events)
    launches = _starts(events, LAUNCH_CATEGORIES, "correlation")
    # the annotation or operation that launched it, where the launch itself wasn't recorded
    owners = _starts(events, OWNER_CATEGORIES, "External id")
    found = []
    for event in events:
        if event.get("cat") not in GPU_CATEGORIES:
            continue
        args, own = event["args"], float(event["ts"])
        ts = launches.get(args.get("correlation"), owners.get(args.get("External id"), own))
        found.append((shorten(str(event["name"])), ts, float(event["dur"]) / 1e6))
    return found


def _starts(events: Iterable[Event], categories: Set[str], key: str) -> dict[Any, float]:
    """Number in `key` -> start in µs, of the events of these categories."""
    return {
        e["args"][key]: float(e["ts"])
        for e in events
        if e.get("cat") in categories and key in e.get("args", {})
    }


def cpu_work(events: Iterable[Event]) -> list[tuple[str, float, float]]:
    """(name, start in µs, self time in seconds) of torch's operations, without those inside."""
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    operations.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    own = [float(e["dur"]) for e in operations]
    open_ones: list[int] = []
    for index, event in enumerate(operations):
        while open_ones and not _holds(operations[open_ones[-1]], event):
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]] -= float(event["dur"])
        open_ones.append(index)
    return [
        (str(e["name"]), float(e["ts"]), max(0.0, seconds) / 1e6)
        for e, seconds in zip(operations, own, strict=True)
    ]


def _holds(outer: Event, inner: Event) -> bool:
    same_thread = outer["tid"] == inner["tid"]
    return bool(same_thread and inner["ts"] < outer["ts"] + outer["dur"])


def _stage_times(work: Sequence[Work], stages: Sequence[StageTime]) -> tuple[StageTime, ...]:
    seconds: dict[str, float] = defaultdict(float)
    for item in work:
        seconds[item.stage] += item.seconds
    known = {stage.name for stage in stages}
    extra = [
        StageTime(name=name, impl="", seconds=spent, flops=0.0, bytes_read=0.0, bytes_written=0.0)
        for name, spent in seconds.items()
        if name not in known
    ]
    return (*(replace(stage, seconds=seconds[stage.name]) for stage in stages), *extra)


def _kernel_times(work: Sequence[Work], calls: int) -> tuple[KernelTime, ...]:
    launches: dict[tuple[str, str], list[float]] = defaultdict(list)
    for item in work:
        launches[item.stage, item.name].append(item.seconds)
    times = [
        KernelTime(name=name, stage=stage, calls=len(each) / calls, seconds=sum(each))
        for (stage, name), each in launches.items()
    ]
    return tuple(sorted(times, key=lambda k: -k.seconds)[:MAX_KERNELS])


def shorten(name: str) -> str:
    """Name of a kernel without namespaces and arguments; a functor's name stays.

    `void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, …>(int, …)`
    becomes `vectorized_elementwise_kernel<FillFunctor>`.
    """
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    if plain.startswith(("Memcpy", "Memset")):
        return plain
    head = re.split(r"[<(]", plain, maxsplit=1)[0].rpartition("::")[2].strip()
    functor = re.search(r"\b(\w+(?:Functor|Ops?))\b\s*<", plain[len(head) :])
    short = f"{head}<{functor.group(1)}>" if functor else head
    return (short or plain)[:MAX_NAME]


def peak_growth(run: Run, inputs: Any) -> tuple[Any, int]:
    """Outputs of one call on a CPU, and the most bytes that it held beyond what was held before."""
    outputs, events = profile_calls(run, inputs, device="cpu", memory=True)
    held = peak = 0
    for event in memory_events(events, device_type=0):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return outputs, peak


def memory_events(events: Iterable[Event], *, device_type: int) -> list[Event]:
    """Allocations (Bytes > 0) and releases in order of time; device type 0 is the CPU, 1 CUDA."""
    found = [
        e
        for e in events
        if e.get("name") == "[memory]" and e["args"].get("Device Type") == device_type
    ]
    return sorted(found, key=lambda e: float(e["ts"]))


def write_memory_timeline(events: Iterable[Event], path: Path, device: str) -> None:
    """CSV of `seconds` since the first allocation and `allocated_bytes` on the device after it."""
    found = memory_events(events, device_type=1 if device == "cuda" else 0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seconds", "allocated_bytes"))
        for event in found:
            seconds = (float(event["ts"]) - float(found[0]["ts"])) / 1e6
            writer.writerow((f"{seconds:.6f}", event["args"]["Total Allocated"]))
