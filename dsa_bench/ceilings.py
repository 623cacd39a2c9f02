"""What this machine reaches at best: copy, L2 and matrix rates, measured and kept per machine."""

import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dsa_bench import nvml as management
from dsa_bench.operator import Machine

SCHEMA = "dsa-bench/ceilings@1"
BF16, FP32 = "bf16_flops_per_second", "fp32_flops_per_second"
RATES_VERSION = 2
"""Of what is measured: rates of another version are measured again."""
FOLDER_VARIABLE = "DSA_BENCH_CACHE"
GIB = 2**30
MIB = 2**20
COPY_BYTES = {"cuda": GIB, "cpu": 128 * MIB}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
SAMPLES = {"cuda": 20, "cpu": 5}
L2_SHARE = 0.25
"""Of L2 at most: small enough to stay in it whole, in both halves of an H100's."""
SUSTAINED_SECONDS = 2.0
TAIL_SECONDS = 1.0
BATCH_SECONDS = 0.05

Work = tuple[Callable[[], Any], float]
"""A call, and how many bytes or FLOPs it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates of one machine and when they were taken."""

    rates: Mapping[str, float] = field(default_factory=dict)
    measured: str = ""
    """ISO time in UTC; empty: not measured yet."""
    note: str = ""
    """Why they were not kept for the next run, as a sentence."""


def known_ceilings(machine: Machine) -> Ceilings:
    """Those kept from an earlier run on this machine; empty where there are none."""
    entry = _read_entries(cache_file()).get(cache_key(machine))
    if not isinstance(entry, dict):
        return Ceilings()
    rates, measured = entry.get("rates"), entry.get("measured")
    if not isinstance(rates, dict) or not isinstance(measured, str):
        return Ceilings()
    fine = all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in rates.values())
    return Ceilings(rates=rates, measured=measured) if rates and fine else Ceilings()


def fresh_ceilings(machine: Machine, *, busy: str = "") -> Ceilings:
    """Measured now and kept for later runs; not kept where other work made the machine slower.

    `busy` is what `machine.busy_hint` says. A rate that is too low would make floors of times that
    are none, in every later run.
    """
    rates = measure_ceilings(machine)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if busy:
        return Ceilings(rates=rates, measured=now, note=f"ceilings were not kept: {busy}")
    path, note = cache_file(), ""
    entry = {"machine": machine.name, "measured": now, "rates": rates}
    try:
        _write_entries(path, _read_entries(path) | {cache_key(machine): entry})
    except OSError as error:
        note = f"ceilings were not kept: {path}: {error.strerror} (set {FOLDER_VARIABLE})"
    return Ceilings(rates=rates, measured=now, note=note)


def cache_file() -> Path:
    """`ceilings.json` in $DSA_BENCH_CACHE, else in dsa-bench of $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get(FOLDER_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own or os.path.join(base, "dsa-bench")) / "ceilings.json"


def cache_key(machine: Machine) -> str:
    """All that a rate depends on: the very GPU, its driver and power limit, torch."""
    parts = [f"rates {RATES_VERSION}", machine.name, f"torch {torch.__version__}"]
    if machine.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        return " | ".join((*parts, f"{cores} cores", f"{torch.get_num_threads()} threads"))
    parts.append(str(torch.cuda.get_device_properties(0).uuid))
    gpu = management.current_gpu()
    if gpu is not None:
        queries = {
            "driver": gpu.nvml.nvmlSystemGetDriverVersion,
            "mW": lambda: gpu.nvml.nvmlDeviceGetEnforcedPowerLimit(gpu.handle),
        }
        parts += [f"{k} {v}" for k, v in management.answers(gpu.nvml, queries).items()]
    return " | ".join(parts)


def _read_entries(path: Path) -> dict[str, Any]:
    """Key -> entry; nothing where the file is missing, damaged or of another version."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return {}
    entries = found.get("entries")
    return entries if isinstance(entries, dict) else {}


def _write_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """In one step, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"schema": SCHEMA, "entries": entries}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def measure_ceilings(machine: Machine, *, sustained: bool = True) -> dict[str, float]:
    """What a large copy, reads from L2 and a large matrix product reach here.

    `copy_bytes_per_second` counts bytes read and written, `l2_bytes_per_second` (GPU) bytes read.
    `bf16_flops_per_second` (and `fp8_…` where the card has it) counts 2 for each multiply-add; a
    CPU has `fp32_…` beside it, the precision of its references, and as `bf16_…` the higher of both,
    for there a bf16 case may be computed in fp32. Each is the best of several calls. `sustained_…`
    of copy and products (GPU) is the mean over the last of two seconds of calls back to back, where
    the power limit has pulled the clock down: seven seconds in all.
    """
    calls, is_gpu = _calls(machine), machine.device == "cuda"
    best = {name: _best_seconds(call, machine.device) for name, (call, _) in calls.items()}
    out = {name: work / best[name] for name, (_, work) in calls.items()}
    if not is_gpu:
        out[BF16] = max(out[BF16], out[FP32])
    # only now: seconds of work heat the card and would pull down the bursts
    for name, (call, work) in calls.items():
        if sustained and is_gpu and not name.startswith("l2"):
            out[f"sustained_{name}"] = work / _sustained_seconds(call, best[name])
    if is_gpu:
        torch.cuda.empty_cache()
    return out


def _calls(machine: Machine) -> dict[str, Work]:
    """Name of a rate -> what to time for it."""
    device = machine.device
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    calls: dict[str, Work] = {"copy_bytes_per_second": (copy, 2.0 * COPY_BYTES[device])}
    if device == "cuda":
        calls["l2_bytes_per_second"] = _l2_read(machine)
    flops = 2.0 * MATMUL_SIZE[device] ** 3
    for precision, product in _products(machine).items():
        calls[f"{precision}_flops_per_second"] = (product, flops)
    return calls


def _l2_read(machine: Machine) -> Work:
    from dsa_bench.kernels import l2_read_triton as kernel

    fitting = max(1, int(L2_SHARE * machine.l2_bytes) // (4 * kernel.BLOCK))
    blocks = 2 ** (fitting.bit_length() - 1)
    x = torch.randint(-9, 9, (blocks * kernel.BLOCK,), device="cuda", dtype=torch.int32)
    programs = kernel.PROGRAMS_PER_SM * machine.num_sms
    sums = torch.empty(programs, device="cuda", dtype=torch.int32)
    return functools.partial(kernel.l2_read, x, sums), float(programs * x.nbytes)


def _products(machine: Machine) -> dict[str, Callable[[], Any]]:
    size = MATMUL_SIZE[machine.device]
    # random, for a product of zeros draws less power and runs faster
    a = torch.randn(size, size, device=machine.device)
    b = torch.randn(size, size, device=machine.device)
    a16, b16 = a.bfloat16(), b.bfloat16()
    products: dict[str, Callable[[], Any]] = {"bf16": lambda: a16 @ b16}
    if machine.device == "cpu":
        return products | {"fp32": lambda: a @ b}
    if machine.capability is not None and machine.capability >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=machine.device)
        products["fp8"] = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)
    return products


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    """Least seconds of several calls after two for warm-up."""
    for _ in range(2):
        call()
    if device == "cpu":
        return min(_host_seconds(call) for _ in range(SAMPLES[device]))
    marks = [_mark()]
    for _ in range(SAMPLES[device]):
        call()
        marks.append(_mark())
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return float(min(begin.elapsed_time(end) for begin, end in pairs)) / 1000


def _sustained_seconds(call: Callable[[], Any], call_seconds: float) -> float:
    """Mean seconds of a call in the last second of at least two of calls back to back."""
    calls = max(1, round(BATCH_SECONDS / call_seconds))
    marks = [_mark()]
    begin = time.perf_counter()
    while time.perf_counter() - begin < SUSTAINED_SECONDS or len(marks) < 3:
        for _ in range(calls):
            call()
        marks.append(_mark())
        # one batch stays ahead of the GPU, so that it never waits for the host
        marks[-2].synchronize()
    torch.cuda.synchronize()
    batches = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
    return tail_mean(batches, TAIL_SECONDS) / calls


def tail_mean(batches: Sequence[float], tail: float) -> float:
    """Mean of the fewest last values that add up to `tail`, or of all."""
    taken: list[float] = []
    for seconds in reversed(batches):
        taken.append(seconds)
        if sum(taken) >= tail:
            break
    return sum(taken) / len(taken)


def _mark() -> Any:
    event: Any = torch.cuda.Event  # untyped in torch
    mark = event(enable_timing=True)
    mark.record()
    return mark


def _host_seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
