"""The machine a case runs on: what is installed, its ceilings, what makes times noisy."""

import functools
import importlib.metadata
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dsa_bench
from dsa_bench.operator import Machine, UsageError

LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "pandas",
    "matplotlib",
    "fa3-fwd",
    "flash-attn",
    "flash-mla",
    "deep-gemm",
    "flashinfer-python",
    "sgl-kernel",
    "tilelang",
    "nvidia-ml-py",
)
GIB = 2**30
MIB = 2**20
COPY_BYTES = {"cuda": GIB, "cpu": 128 * MIB}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
CEILING_SAMPLES = {"cuda": 20, "cpu": 5}
IDLE_UTILISATION_PERCENT = 5
BUSY_LOAD_SHARE = 0.25


def detect(device: str) -> Machine:
    """The machine behind `auto`, `cuda` or `cpu`; `auto` takes the GPU where there is one."""
    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device {device!r} is unknown; known: auto, cuda, cpu")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UsageError(
            f"torch {torch.__version__} sees no CUDA device"
            " (pass --device cpu, or install a CUDA build)"
        )
    if device == "cpu" or not has_gpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(device="cpu", name=_cpu_name(), memory_bytes=memory)
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        device="cuda",
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_bytes(machine: Machine) -> int:
    """Bytes a case may take: free ones of the device, and those that torch holds unused."""
    if machine.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def describe(machine: Machine) -> dict[str, Any]:
    """What `run.json` keeps of the machine; keys that cannot be read are left out."""
    out: dict[str, Any] = {
        "device": machine.device,
        "name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_threads_used": torch.get_num_threads(),
        "platform": " ".join(
            (platform.system(), platform.release().partition("-")[0], platform.machine())
        ),
    }
    if machine.device == "cuda":
        out |= {
            "capability": list(machine.capability or ()),
            "num_sms": machine.num_sms,
            "l2_bytes": machine.l2_bytes,
        }
        with _nvml() as (nvml, handle):
            if nvml is not None:
                out |= _gpu_facts(nvml, handle)
    return out


def _gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    facts: dict[str, Callable[[], Any]] = {
        "driver": nvml.nvmlSystemGetDriverVersion,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
    }
    return _readable(nvml, facts)


def _readable(nvml: Any, facts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Values of the queries that this card and driver answer."""
    out = {}
    for name, query in facts.items():
        try:
            out[name] = query()
        except nvml.NVMLError:
            continue
    return out


@contextmanager
def _nvml() -> Iterator[tuple[Any, Any]]:
    """(pynvml, handle of torch's device 0), or (None, None) where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        yield None, None
        return
    try:
        pynvml.nvmlInit()
        # by UUID, for CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    except pynvml.NVMLError:
        yield None, None
        return
    try:
        yield pynvml, handle
    finally:
        pynvml.nvmlShutdown()


def versions() -> dict[str, str]:
    """Versions of what shapes a number, by name; libraries that aren't installed are left out."""
    out = {"python": platform.python_version(), "dsa_bench": dsa_bench.__version__}
    for name in LIBRARIES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # the module knows its local part (+cu130), which the package's metadata may lack
    out["torch"] = str(torch.__version__)
    if torch.version.cuda:
        out["cuda"] = torch.version.cuda
    return out


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """`commit` and `dirty` of the checkout that this package runs from; empty outside of one."""
    where = folder or Path(__file__).resolve().parent
    commit = _git(where, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {"commit": commit, "dirty": bool(_git(where, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def doctor_rows(machine: Machine) -> list[dict[str, str]]:
    """Rows of `dsa-bench doctor`: `item`, `value`, and `hint` where a person should act."""
    rows = [_row("device", f"{machine.name} ({machine.device})")]
    rows += [_row(name, version) for name, version in versions().items()]
    rows += [_row(name, "not installed") for name in LIBRARIES if name not in versions()]
    free = free_bytes(machine)
    rows.append(
        _row(
            "memory free",
            f"{free / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB",
            "" if free > machine.memory_bytes / 2 else "long contexts will end as oom",
        )
    )
    rows.append(_load_row())
    return rows + (_gpu_rows() if machine.device == "cuda" else [])


def _row(item: str, value: str, hint: str = "") -> dict[str, str]:
    return {"item": item, "value": value, "hint": hint}


def _load_row() -> dict[str, str]:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    busy = load > BUSY_LOAD_SHARE * cores
    hint = "other programs use the CPU: times on the CPU will be noisy" if busy else ""
    return _row("cpu load", f"{load:.1f} on {cores} cores", hint)


def _gpu_rows() -> list[dict[str, str]]:
    with _nvml() as (nvml, handle):
        if nvml is None:
            hint = "clocks and neighbours cannot be read (pip install nvidia-ml-py)"
            return [_row("nvml", "not available", hint)]
        facts = _gpu_facts(nvml, handle) | _readable(nvml, _gpu_state(nvml, handle))
    rows = [_row(name, str(value)) for name, value in facts.items() if name not in _JUDGED]
    others = [pid for pid in facts.get("processes", ()) if pid != os.getpid()]
    hint = "their work shares the GPU: times will be noisy" if others else ""
    rows.append(_row("other processes on the GPU", str(len(others)), hint))
    used = facts.get("utilisation_percent", 0)
    hint = "the GPU is busy: wait until it is idle" if used > IDLE_UTILISATION_PERCENT else ""
    rows.append(_row("utilisation", f"{used} %", hint))
    slow = facts.get("throttle_reasons", 0) & ~_HARMLESS_THROTTLE
    hint = "the clock is held down: let the GPU cool, or look at its power limit" if slow else ""
    rows.append(_row("clock held down", f"{slow:#x}" if slow else "no", hint))
    return rows


_JUDGED = ("processes", "utilisation_percent", "throttle_reasons")
_HARMLESS_THROTTLE = 0x1 | 0x2
"""Idle, and clocks set by an application."""


def _gpu_state(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    return {
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "processes": lambda: [p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)],
    }


def measure_ceilings(machine: Machine) -> dict[str, float]:
    """What a large copy and a large matrix product reach here: best of several, within two seconds.

    `copy_bytes_per_second` counts bytes read and written. `bf16_flops_per_second` (and `fp8_…`
    where the card has it) counts 2 for each multiply-add; a CPU has `fp32_flops_per_second`, the
    precision of its references.
    """
    device = machine.device
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(functools.partial(target.copy_, source), device)
    out = {"copy_bytes_per_second": 2 * COPY_BYTES[device] / seconds}
    for precision, product in _products(machine).items():
        flops = 2 * MATMUL_SIZE[device] ** 3
        out[f"{precision}_flops_per_second"] = flops / _best_seconds(product, device)
    if device == "cuda":
        torch.cuda.empty_cache()
    return out


def _products(machine: Machine) -> dict[str, Callable[[], Any]]:
    size = MATMUL_SIZE[machine.device]
    # random, for a product of zeros draws less power and runs faster
    a = torch.randn(size, size, device=machine.device)
    b = torch.randn(size, size, device=machine.device)
    if machine.device == "cpu":
        return {"fp32": lambda: a @ b}
    a16, b16 = a.bfloat16(), b.bfloat16()
    products: dict[str, Callable[[], Any]] = {"bf16": lambda: a16 @ b16}
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
        return min(_host_seconds(call) for _ in range(CEILING_SAMPLES[device]))
    event: Any = torch.cuda.Event  # untyped in torch
    marks = [event(enable_timing=True) for _ in range(CEILING_SAMPLES[device] + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return float(min(begin.elapsed_time(end) for begin, end in pairs)) / 1000


def _host_seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
