"""What NVML, the driver's management library, tells of GPUs; all of it may be missing.

NVML stays open until the process ends: its users are processes that ask for their whole life.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML knows it."""

    nvml: Any
    """The module `pynvml`."""
    handle: Any


def load() -> Any:
    """The module `pynvml`, ready to be asked; None where there is none, or no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def current_gpu() -> Gpu | None:
    """torch's device 0; this initialises CUDA. None on a machine without a GPU or without NVML."""
    nvml = load() if torch.cuda.is_available() else None
    if nvml is None:
        return None
    # by UUID, for CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    handle = ask(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
    return None if handle is None else Gpu(nvml, handle)


def ask(nvml: Any, query: Callable[[], Any]) -> Any:
    """What the query gives; None where this card, driver or user gets no answer."""
    try:
        return query()
    except nvml.NVMLError:
        return None


def answers(nvml: Any, queries: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What the queries give, without those that get no answer."""
    found = {name: ask(nvml, query) for name, query in queries.items()}
    return {name: value for name, value in found.items() if value is not None}


def load_queries(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """How the GPU fares now, by name."""
    nvml, handle = gpu.nvml, gpu.handle
    return {
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        # bits of nvmlClocksEventReason…; the name that drivers of all ages know
        "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    }


def compute_pids(gpu: Gpu) -> frozenset[int]:
    """Processes that hold a CUDA context on the GPU, numbered as the driver sees them."""
    query = gpu.nvml.nvmlDeviceGetComputeRunningProcesses
    return frozenset(p.pid for p in ask(gpu.nvml, lambda: query(gpu.handle)) or ())


def processes_before() -> frozenset[int]:
    """Processes on any GPU now; to be asked before this one makes its own CUDA context.

    CUDA is not initialised. In a container the driver's number of this process isn't that of
    `os.getpid`, so that it can only be told apart by when it came.
    """
    nvml = load()
    if nvml is None:
        return frozenset()
    count = ask(nvml, nvml.nvmlDeviceGetCount) or 0
    by_index = nvml.nvmlDeviceGetHandleByIndex
    handles = [ask(nvml, functools.partial(by_index, i)) for i in range(count)]
    return frozenset().union(*(compute_pids(Gpu(nvml, h)) for h in handles if h is not None))


def count_neighbours(gpu: Gpu, before: frozenset[int]) -> int:
    """Processes of others on the GPU: those from before that are still there, and later ones.

    Of the later ones one is this process.
    """
    now = compute_pids(gpu)
    return len(now & before) + max(0, len(now - before) - 1)
