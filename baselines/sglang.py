"""SGLang's top-k in CUDA, from the wheel `sglang-kernel`.

Of its operators `fast_topk_transform_ragged_fused` fits the contract: it takes the k largest of
`lengths` logits from `row_starts` on and adds an offset to each index, which is the start again, so
that they are columns; the tail of a short row is -1. `lengths` is kv_end - kv_start or 0, two small
kernels inside the timed call.

The library of operators is loaded by itself: importing the package would take hold of the GPU. It
needs the system library libnuma.so.1.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape, refuse_options
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

TOPK = 2048
"""Compiled into the kernel."""
WHEEL_FILE = "sm90/common_ops.abi3.so"
NUMA = "libnuma.so.1"


@cache
def ops() -> Any:
    """The namespace of its operators, loaded once."""
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("sgl_kernel is not installed")
    try:
        ctypes.CDLL(NUMA, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"{NUMA} is missing (apt install libnuma1)") from error
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / WHEEL_FILE))
    return torch.ops.sgl_kernel


LIBRARY = Library(
    title="SGLang's kernels",
    modules=("sgl_kernel",),
    distributions=("sglang-kernel",),
    install="pip install sglang-kernel",
    load=ops,
)


@torch.no_grad()
def run(inputs: TopkInputs, /) -> TopkOutputs:
    refuse_options(inputs, "sglang's top-k")
    logits = inputs.index_logits
    # a range that is turned round is empty here, and a wild read there
    lengths = torch.maximum(inputs.kv_end, inputs.kv_start) - inputs.kv_start
    out = torch.empty(logits.shape[0], TOPK, dtype=torch.int32, device=logits.device)
    ops().fast_topk_transform_ragged_fused(logits, lengths, out, inputs.kv_start, inputs.kv_start)
    return TopkOutputs(out)


def supports(shape: TopkShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "sglang's top-k, as this loads it, needs a Hopper GPU (compute capability 9.0)"
    if shape.topk != TOPK:
        return f"sglang's top-k takes topk {TOPK} only, this case has {shape.topk}"
    if shape.logits != "fp32":
        return f"sglang's top-k takes fp32 logits, this case has {shape.logits}"
    return LIBRARY.obstacle()


IMPLEMENTS = "topk"
IMPLEMENTATIONS = (
    Implementation(name="sglang", run=run, supports=supports, library=LIBRARY, priority=-10),
)
