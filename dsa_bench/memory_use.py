"""How much memory a call holds, and whether a case fits into what is free."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsa_bench import trace
from dsa_bench.operator import Machine, Memory, Run
from dsa_bench.record import MemoryUse

GIB = 2**30


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of a dataclass, NamedTuple, mapping or sequence, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def held_bytes(value: Any) -> int:
    """Bytes of the storages under a value's tensors; a shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors_in(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_memory(run: Run, inputs: Any, *, predicted: Memory, machine: Machine) -> MemoryUse:
    """One call with torch's allocator watched: its peak on CUDA, the profiler's events on a CPU.

    Memory that a library takes without torch's allocator isn't seen.
    """
    if machine.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run(inputs)
        torch.cuda.synchronize()
        grown = torch.cuda.max_memory_allocated() - before
    else:
        outputs, grown = trace.peak_growth(run, inputs)
    input_bytes, output_bytes = held_bytes(inputs), held_bytes(outputs)
    return MemoryUse(
        peak_bytes=input_bytes + grown,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        workspace_bytes=max(0, grown - output_bytes),
        predicted_bytes=predicted.total_bytes,
    )


def shortage(predicted: Memory, free: int) -> str:
    """Sentence on why a case cannot fit into what is free; empty where it can."""
    if predicted.total_bytes <= free:
        return ""
    parts = ", ".join(
        f"{name} {size / GIB:.1f}"
        for name, size in (
            ("inputs", predicted.input_bytes),
            ("outputs", predicted.output_bytes),
            ("workspace", predicted.workspace_bytes),
        )
    )
    return f"needs {predicted.total_bytes / GIB:.1f} GiB, {free / GIB:.1f} GiB free ({parts})"
