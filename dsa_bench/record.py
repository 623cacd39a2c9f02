"""One ended case as plain data: `Case` is what was asked for, `Record` what it gave."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")

SCHEMA = "dsa-bench/record@1"
RUN_SCHEMA = "dsa-bench/run@1"

PHASES = ("prefill", "decode")
MODES = ("cold", "warm", "graph", "sustained", "cpu")
AUTO_MODE = "auto"
"""The mode of the phase: decode `graph`, prefill `cold`; on a CPU `cpu`."""
STATUSES = ("ok", "wrong", "failed", "oom", "timeout", "skipped", "interrupted")


class SchemaError(ValueError):
    """A file was written by a newer dsa-bench, or isn't one of its files."""


def check_schema(text: object, expected: str) -> None:
    """Raise SchemaError unless `text` is `expected` or an older number of the same schema."""
    name, _, number = expected.rpartition("@")
    found_name, _, found_number = str(text).rpartition("@")
    if found_name != name or not found_number.isdigit():
        raise SchemaError(
            f"schema must be {expected}, got {text!r} (is this a dsa-bench run folder?)"
        )
    if int(found_number) > int(number):
        raise SchemaError(
            f"written by schema {text}, this dsa-bench reads up to {expected} (upgrade dsa-bench)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One point of a sweep. Sizes are elements; `None` means that the operator has no such axis."""

    op: str
    impl: str | Mapping[str, str]
    """Name of the implementation; for a composed operator stage -> name."""
    phase: str
    seq_len_kv: int
    """L: prefill, the position at which the chunk of queries ends; decode, the context."""
    seq_len_q: int
    topk: int | None = None
    precision: str = "bf16"
    batch_size: int = 1
    num_heads: int = 128
    preset: str = "v3.2"
    seed: int = 0
    mode: str = AUTO_MODE
    """How it is timed: one of MODES, or `auto`."""

    def to_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        if not isinstance(self.impl, str):
            out["impl"] = dict(self.impl)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Case":
        return _known(cls, data)

    @property
    def key(self) -> str:
        """Hash of the case; equal for equal cases, whatever the order of the fields.

        A field that came later counts only where it is not at its default, so that a case keeps its
        key for ever.
        """
        fields = self.to_json()
        if self.mode == AUTO_MODE:
            del fields["mode"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def impl_label(self) -> str:
        """`gluon`, or for a composition its parts, if they differ: `triton+gluon+gluon`."""
        if isinstance(self.impl, str):
            return self.impl
        parts = tuple(self.impl.values())
        return parts[0] if len(set(parts)) == 1 else "+".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What NVML told while a case was timed, some ten times a second."""

    seconds: tuple[float, ...] = ()
    """When each reading was taken, since the first; the other series have one value for each."""
    sm_clock_mhz: tuple[float, ...] = ()
    power_w: tuple[float, ...] = ()
    temperature_c: tuple[float, ...] = ()
    sm_clock_max_mhz: float | None = None
    throttle_reasons: int = 0
    """Every bit of NVML's clocks-event reasons that was set at some reading."""
    neighbours: int = 0
    """Processes of others that computed on the GPU."""
    energy_joules: float | None = None
    """Drawn by the whole card while `energy_calls` calls ran back to back; `sustained` alone."""
    energy_calls: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Raw samples of one timing mode."""

    mode: str
    """`cold`: L2 flushed before each call; `warm`: not flushed; `graph`: `cold` with a replay of a
    CUDA graph; `sustained`: calls back to back for two seconds and more; `cpu`: host clock.
    """
    seconds: tuple[float, ...]
    """One sample a call, in the order taken; in `sustained` a sample is the mean of several."""
    stop: str
    """Why sampling ended: `settled`, `max_samples`, `max_seconds`."""
    blocks: tuple[int, ...] = ()
    """Samples of each visit; between two visits the competitors of the case were timed."""
    beside: tuple[str, ...] = ()
    """Keys of these competitors."""
    overtaken: tuple[int, ...] = ()
    """Samples (from 0) at which the GPU may have waited for the host."""
    input_sets: int = 1
    """Sample i of a visit ran on set i % input_sets, each in storage of its own."""
    calls_per_sample: int = 1
    warmup_calls: int = 0
    event_overhead_seconds: float = 0.0
    """What two events with nothing between them show; not subtracted."""
    spin_seconds: float = 0.0
    """Longest spin by which the host was kept ahead."""
    flush_bytes: int = 0
    """Written and read before each call."""
    hidden_seconds: float = 0.0
    """Median time that the device worked on behind the end of the call."""
    telemetry: Telemetry | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """One stage of a case, from the profiler pass (not from the timing pass)."""

    name: str
    impl: str
    seconds: float
    """Kernel time of the stage in one call of the case."""
    flops: float
    bytes_read: float
    bytes_written: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """All launches of one kernel in one call of the case, from the profiler pass."""

    name: str
    stage: str
    calls: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Bytes on the device. `workspace_bytes` = peak - inputs - outputs, measured."""

    peak_bytes: int
    input_bytes: int
    output_bytes: int
    workspace_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one case gave: one line of `records.jsonl`. Derived figures belong to the report."""

    case: Case
    status: str
    reason: str = ""
    replicate: int = 0
    """Which repeat in a fresh process, from 0."""
    time: Timing | None = None
    stages: tuple[StageTime, ...] = ()
    kernels: tuple[KernelTime, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    """`flops`, `bytes_read`, `bytes_written` of one call, counted on valid entries."""
    memory: MemoryUse | None = None
    gate: Mapping[str, Any] = field(default_factory=dict)
    """`checks` (see accuracy.Check), `rows_checked`, `rows`; `dense_error` where it was taken."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Host seconds that the case spent in each phase: build (compilation counted in), gate,
    measure, …
    """
    flags: tuple[str, ...] = ()
    """Named reasons for doubt: see doubt.FLAGS."""
    lost_workers: int = 0
    """Workers that died or were killed over this case."""
    log: tuple[str, ...] = ()
    """The last lines that a lost worker wrote."""
    ended: float = 0.0
    """Unix time of its ending."""
    reproduce: str = ""
    """The command for this one case."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that this version does not know, kept as they were read."""

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"schema": SCHEMA, "key": self.case.key, "case": self.case.to_json()}
        for f in dataclasses.fields(self):
            if f.name not in ("case", "extra"):
                out[f.name] = _plain(getattr(self, f.name))
        return out | dict(self.extra)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Record":
        check_schema(data.get("schema"), SCHEMA)
        known = {f.name for f in dataclasses.fields(cls)} | {"schema", "key"}
        time, memory = data.get("time"), data.get("memory")
        return cls(
            case=Case.from_json(data["case"]),
            status=data["status"],
            reason=data.get("reason", ""),
            replicate=data.get("replicate", 0),
            time=_timing(time) if time else None,
            stages=tuple(_known(StageTime, s) for s in data.get("stages", ())),
            kernels=tuple(_known(KernelTime, k) for k in data.get("kernels", ())),
            cost=data.get("cost", {}),
            memory=_known(MemoryUse, memory) if memory else None,
            gate=data.get("gate", {}),
            phases=data.get("phases", {}),
            flags=tuple(data.get("flags", ())),
            lost_workers=data.get("lost_workers", 0),
            log=tuple(data.get("log", ())),
            ended=data.get("ended", 0.0),
            reproduce=data.get("reproduce", ""),
            extra={k: v for k, v in data.items() if k not in known},
        )


def _known(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from those items that it has fields for; a newer version may write more."""
    names = {f.name for f in dataclasses.fields(cast(Any, kind))}
    return kind(**{name: value for name, value in data.items() if name in names})


def _timing(data: Mapping[str, Any]) -> Timing:
    telemetry = data.get("telemetry")
    made = _known(Telemetry, _tuples(telemetry)) if telemetry else None
    return _known(Timing, {**_tuples(data), "telemetry": made})


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value
