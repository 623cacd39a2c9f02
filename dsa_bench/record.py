"""One ended case as plain data: `Case` is what was asked for, `Record` what it gave."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsa_bench.untrusted import Refused, build, expect, number, shown, text

SCHEMA = "dsa-bench/record@1"
RUN_SCHEMA = "dsa-bench/run@1"

PHASES = ("prefill", "decode")
MODES = ("cold", "warm", "graph", "sustained", "cpu")
MAX_KERNELS = 20
"""A record keeps the longest of its kernels."""
AUTO_MODE = "auto"
"""The mode of the phase: decode `graph`, prefill `cold`; on a CPU `cpu`."""
INPUT_KINDS = ("random", "needle", "local", "heavy")
"""Made-up inputs of an operator that has the axis; see kernels/content.py."""
RANDOM_INPUTS = INPUT_KINDS[0]
LENGTH_KINDS = ("equal", "spread", "one-long")
"""How long the sequences of a decode batch are; see kernels/decode_lengths.py."""
EQUAL_LENGTHS = LENGTH_KINDS[0]
OVERLAP = "overlap="
"""Before R, 0 … 1: lists of keys that share so much; see kernels/index_patterns.py."""
STATUSES = ("ok", "wrong", "failed", "oom", "timeout", "skipped", "interrupted")
CHECKSUM = "crc32"
"""Field behind all others in a line of a run folder; it belongs to the line, not to the record."""

MAX_NAME = 100
"""Characters of a name in a record that others wrote."""
MAX_PATH = 4096
"""Characters of a path in a record."""
MAX_SIZE = 2**31
"""Bound of a size: the product of two still is an integer of 64 bits."""
MAX_SAMPLES = 20_000
"""Ten times what is ever taken; the statistics of a series cost more than its length."""
MAX_SECONDS = 1e9
MIN_SECONDS = 1e-12


class SchemaError(ValueError):
    """A file was written by a newer dsa-bench, or isn't one of its files."""


def check_schema(text: object, expected: str) -> None:
    """Raise SchemaError unless `text` is `expected` or an older number of the same schema."""
    name, _, number = expected.rpartition("@")
    # of few digits: int() refuses those of other scripts, and more than 4300
    found = re.fullmatch(rf"{re.escape(name)}@([0-9]{{1,9}})", str(text))
    if found is None:
        raise SchemaError(
            f"schema must be {expected}, got {shown(text)} (is this a dsa-bench run folder?)"
        )
    if int(found[1]) > int(number):
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
    """L: prefill, the position at which the chunk of queries ends; decode, the longest context."""
    seq_len_q: int
    topk: int | None = None
    precision: str = "bf16"
    batch_size: int = 1
    num_heads: int = 128
    preset: str = "v3.2"
    seed: int = 0
    mode: str = AUTO_MODE
    """How it is timed: one of MODES, or `auto`."""
    tensor_parallel: int = 1
    """Ranks among which the heads are divided; a case is the work of one of them."""
    inputs: str = RANDOM_INPUTS
    """One of INPUT_KINDS, `overlap=R`, or the path of a .safetensors file of captured inputs."""
    weights: str = ""
    """FILE or FILE:LAYER of the weights; empty: made up."""
    lengths: str = EQUAL_LENGTHS
    """One of LENGTH_KINDS; in prefill, which has one sequence, EQUAL_LENGTHS."""

    def to_json(self) -> dict[str, Any]:
        out = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not isinstance(self.impl, str):
            out["impl"] = dict(self.impl)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Case":
        """The case of a JSON object; Refused where a field isn't what it must be."""
        case = build(cls, data, "case")
        _check_case(case)
        return case

    @property
    def key(self) -> str:
        """Hash of the case; equal for equal cases, whatever the order of the fields.

        A field that came later counts only where it is not at its default, so that a case keeps its
        key for ever.
        """
        fields = self.to_json()
        for name, default in LATER_FIELDS.items():
            if fields[name] == default:
                del fields[name]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def impl_label(self) -> str:
        """`gluon`, or for a composition its parts, if they differ: `triton+gluon+gluon`."""
        if isinstance(self.impl, str):
            return self.impl
        parts = tuple(self.impl.values())
        return parts[0] if len(set(parts)) == 1 else "+".join(parts)


LATER_FIELDS: Mapping[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(Case)
    if field.name in ("mode", "tensor_parallel", "inputs", "weights", "lengths")
}
"""Fields of a case that came after the first keys, with their defaults."""


def overlap_of(inputs: str) -> float | None:
    """R of `overlap=R`, from 0 to 1; None of other inputs."""
    if not inputs.startswith(OVERLAP):
        return None
    try:
        share = float(inputs.removeprefix(OVERLAP))
    except ValueError:
        return None
    return share if 0.0 <= share <= 1.0 else None


def split_weights(text: str) -> tuple[str, int | None]:
    """FILE or FILE:LAYER -> the path, and the number of the layer if one is given."""
    path, separator, layer = text.rpartition(":")
    if separator and path and layer.isascii() and layer.isdigit():
        return path, int(layer)
    return text, None


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
    fresh_seconds: tuple[float, ...] = ()
    """Of the samples those, one a visit, whose inputs the call had never met."""
    calls_per_sample: int = 1
    warmup_calls: int = 0
    event_overhead_seconds: float = 0.0
    """What two events with nothing between them show; not subtracted."""
    spin_seconds: float = 0.0
    """Spin by which the host was kept ahead at the last sample."""
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
    """`checks` (see accuracy.Check), `rows_checked`, `rows`; where they were taken `dense_error`,
    the distance from dense attention, and `rounding_error`, that from bf16 tensors.
    """
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
        """The record of a JSON object; SchemaError or Refused where it isn't one."""
        if not isinstance(data, Mapping):
            raise Refused(f"it must be an object, got {shown(data)}")
        check_schema(data.get("schema"), SCHEMA)
        known = {f.name for f in dataclasses.fields(cls)} | {"schema", "key", CHECKSUM}
        extra = {k: v for k, v in data.items() if k not in known}
        record = build(cls, {**data, "extra": extra}, "")
        _check_record(record)
        return record


def _check_case(case: Case) -> None:
    """Refused for names and sizes that no case has."""
    stages = {"impl": case.impl} if isinstance(case.impl, str) else case.impl
    plain = ("op", "phase", "precision", "preset", "mode", "lengths")
    names = {name: getattr(case, name) for name in plain}
    for name, value in {**names, **stages}.items():
        text(name, "the name of a stage", MAX_NAME)
        text(value, f"case.{name}", MAX_NAME)
    for name in ("inputs", "weights"):
        text(getattr(case, name), f"case.{name}", MAX_PATH)
    sizes = ("seq_len_kv", "seq_len_q", "topk", "batch_size", "num_heads", "tensor_parallel")
    for name in sizes:
        size = getattr(case, name)
        if size is not None and not 1 <= size < MAX_SIZE:
            raise Refused(f"case.{name} must be from 1 to {MAX_SIZE - 1}, got {size}")
    if case.num_heads % case.tensor_parallel:
        raise Refused(
            f"case.tensor_parallel must divide the {case.num_heads} heads,"
            f" got {case.tensor_parallel}"
        )


def _check_record(record: Record) -> None:
    """Refused for values of the right type that no measurement gives."""
    _check_case(record.case)
    if record.status not in STATUSES:
        raise SchemaError(
            f"status must be one of {', '.join(STATUSES)}, got {shown(record.status)}"
            " (upgrade dsa-bench if a newer one wrote it)"
        )
    if record.time is not None:
        _check_timing(record.time)
    for stage in record.stages:
        for name in ("seconds", "flops", "bytes_read", "bytes_written"):
            number(getattr(stage, name), f"{name} of stage {shown(stage.name)}", low=0.0)
    for kernel in record.kernels:
        for name in ("calls", "seconds"):
            number(getattr(kernel, name), f"{name} of kernel {shown(kernel.name)}", low=0.0)
    for name, value in (*record.cost.items(), *record.phases.items()):
        number(value, f"cost or phase {shown(name)}", low=0.0)
    _check_gate(record.gate)


def _check_timing(timing: Timing) -> None:
    """Refused for samples that no clock gives, and for marks that do not fit them."""
    text(timing.mode, "time.mode", MAX_NAME)
    count = len(timing.seconds)
    if count > MAX_SAMPLES:
        raise Refused(f"time.seconds must have at most {MAX_SAMPLES} items, got {count}")
    for i, seconds in enumerate(timing.seconds):
        number(seconds, f"time.seconds[{i}]", low=MIN_SECONDS, high=MAX_SECONDS)
    if timing.blocks and sum(timing.blocks) != count:
        raise Refused(f"time.blocks must add up to {count} samples, got {sum(timing.blocks)}")
    for index in timing.overtaken:
        if index >= count:
            raise Refused(f"time.overtaken must be below {count}, got {index}")
    read = timing.telemetry or Telemetry()
    for name in ("sm_clock_mhz", "power_w", "temperature_c"):
        if len(getattr(read, name)) not in (0, len(read.seconds)):
            raise Refused(f"time.telemetry.{name} must have {len(read.seconds)} readings")


def _check_gate(gate: Mapping[str, Any]) -> None:
    """A figure that was not finite is null in a file, and may be NaN in an answer of a worker."""
    checks = gate.get("checks", [])
    if not isinstance(checks, list):
        raise Refused(f"gate.checks must be a list, got {shown(checks)}")
    for i, check in enumerate(checks):
        found = expect(Mapping[str, Any], check, f"gate.checks[{i}]")
        for part, kind in (("name", str), ("passed", bool)):
            if part in found:
                expect(kind, found[part], f"gate.checks[{i}].{part}")
        for part in ("figures", "limits"):
            place = f"gate.checks[{i}].{part}"
            for name, value in expect(Mapping[str, Any], found.get(part, {}), place).items():
                _check_figure(value, f"{place}.{shown(name)}")
    for place in ("dense_error", "rounding_error"):
        taken = gate.get(place)
        if not isinstance(taken, Mapping):
            _check_figure(taken, f"gate.{place}")
            continue
        for name, value in taken.items():
            _check_figure(value, f"gate.{place}.{shown(name)}")


def _check_figure(value: Any, place: str) -> None:
    is_not_finite = isinstance(value, float) and not math.isfinite(value)
    if value is not None and not is_not_finite:
        number(value, place)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value
