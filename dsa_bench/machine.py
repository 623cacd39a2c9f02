"""The machine a case runs on: what is installed, what makes times noisy."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dsa_bench
from dsa_bench.nvml import Gpu, answers, ask, count_neighbours, current_gpu, load_queries
from dsa_bench.operator import Machine, UsageError

LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "pandas",
    "matplotlib",
    "fa3-fwd",
    "flash-attn-4",
    "flash-mla",
    "sglang-kernel",
    "deep-gemm",
    "tokenspeed-deepgemm",
    "flashinfer-python",
)
GIB = 2**30
UUID_DIGITS = 8
IDLE_UTILISATION_PERCENT = 5
BUSY_LOAD_SHARE = 0.25
STEADY_CLOCK_SHARE = 0.75
"""Of the highest clock: about what matrix products keep under the power limit."""
CLOCK_STEP_MHZ = 15


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
            # enough to tell two cards apart; the rest would name this one for ever
            "uuid": str(torch.cuda.get_device_properties(0).uuid)[:UUID_DIGITS],
        }
        gpu = current_gpu()
        if gpu is not None:
            out |= _gpu_facts(gpu)
    return out


def _gpu_facts(gpu: Gpu) -> dict[str, Any]:
    nvml, handle = gpu.nvml, gpu.handle
    return answers(
        nvml,
        {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "vbios": lambda: nvml.nvmlDeviceGetVbiosVersion(handle),
            "ecc": lambda: bool(nvml.nvmlDeviceGetCurrentEccMode(handle)),
            "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),
            "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(
                handle, nvml.NVML_CLOCK_MEM
            ),
        },
    )


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


def load_average() -> float:
    """Programs that ran or wanted to, mean of the last minute."""
    return os.getloadavg()[0]


def busy_hint(machine: Machine, before: frozenset[int] = frozenset()) -> str:
    """What other work will make times noisy now, as a sentence; empty on a quiet machine.

    `before` is what `nvml.processes_before` gave when this process had no CUDA context yet.
    """
    if machine.device == "cpu":
        load, cores = load_average(), len(os.sched_getaffinity(0))
        if load > BUSY_LOAD_SHARE * cores:
            return f"other programs use the CPU: load {load:.1f} on {cores} cores"
        return ""
    gpu = current_gpu()
    if gpu is None:
        return ""
    others = count_neighbours(gpu, before)
    if others:
        return f"other processes hold the GPU: {others} (see nvidia-smi)"
    used = _utilisation(gpu)
    return f"the GPU is busy: {used} % used (wait until it is idle)" if _is_busy(used) else ""


def _utilisation(gpu: Gpu) -> int:
    """Percent of the time since the driver's last look at which a kernel ran."""
    found = ask(gpu.nvml, lambda: gpu.nvml.nvmlDeviceGetUtilizationRates(gpu.handle).gpu)
    return int(found or 0)


def _is_busy(used: int) -> bool:
    return used > IDLE_UTILISATION_PERCENT


def doctor_rows(machine: Machine, before: frozenset[int] = frozenset()) -> list[dict[str, str]]:
    """Rows of `dsa-bench doctor`: `item`, `value`, and `hint` where a person should act.

    `before` as in `busy_hint`.
    """
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
    return rows + (_gpu_rows(before) if machine.device == "cuda" else [])


def _row(item: str, value: str, hint: str = "") -> dict[str, str]:
    return {"item": item, "value": value, "hint": hint}


def _load_row() -> dict[str, str]:
    load, cores = load_average(), len(os.sched_getaffinity(0))
    busy = load > BUSY_LOAD_SHARE * cores
    hint = "other programs use the CPU: times on the CPU will be noisy" if busy else ""
    return _row("cpu load", f"{load:.1f} on {cores} cores", hint)


def _gpu_rows(before: frozenset[int]) -> list[dict[str, str]]:
    gpu = current_gpu()
    if gpu is None:
        hint = "clocks and neighbours cannot be read (pip install nvidia-ml-py)"
        return [_row("nvml", "not available", hint)]
    facts = _gpu_facts(gpu) | answers(gpu.nvml, load_queries(gpu))
    rows = [_row(name, str(value)) for name, value in facts.items() if name not in _JUDGED]
    others, used = count_neighbours(gpu, before), _utilisation(gpu)
    hint = "their work shares the GPU: times will be noisy" if others else ""
    rows.append(_row("other processes on the GPU", str(others), hint))
    hint = "the GPU is busy: wait until it is idle" if _is_busy(used) else ""
    rows.append(_row("utilisation", f"{used} %", hint))
    slow = facts.get("throttle_reasons", 0) & ~_HARMLESS_THROTTLE
    hint = "the clock is held down: let the GPU cool, or look at its power limit" if slow else ""
    rows.append(_row("clock held down", f"{slow:#x}" if slow else "no", hint))
    return rows + _clock_rows(gpu, facts)


def _clock_rows(gpu: Gpu, facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The commands that steady the clock; they need root, and so are left to a person."""
    index = ask(gpu.nvml, lambda: gpu.nvml.nvmlDeviceGetIndex(gpu.handle)) or 0
    command = f"sudo nvidia-smi -i {index}"
    rows = []
    if "persistence" in facts:
        hint = f"the GPU goes to sleep between processes: {command} -pm 1"
        on = facts["persistence"]
        rows.append(_row("persistence", "on" if on else "off", "" if on else hint))
    if "sm_clock_max_mhz" in facts:
        clock = int(STEADY_CLOCK_SHARE * facts["sm_clock_max_mhz"]) // CLOCK_STEP_MHZ
        steady = clock * CLOCK_STEP_MHZ
        hint = (
            f"for steadier times {command} -lgc {steady}, then dsa-bench doctor --measure"
            f" (undo: {command} -rgc)"
        )
        rows.append(_row("clock", "free to change, unless you locked it", hint))
    return rows


_JUDGED = ("throttle_reasons", "persistence")
_HARMLESS_THROTTLE = 0x1 | 0x2
"""Idle, and clocks set by an application."""
