"""Products with a weight by torch: torch.mm in bf16, cuBLASLt's block-scaled product in e4m3.

torch.nn.functional.scaled_mm wants the scales of x column by column, as `quantize` and `rms_norm`
write them, and the scales of the weight in rows of a multiple of 4 columns, as they are where
in_features is a multiple of 512. cuBLASLt reads scales by 16 bytes, so a number of rows that 4 does
not divide is rounded up: x and its scales are copied to whole quads first.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dsa_bench.kernels.linear import (
    BLOCK,
    LinearInputs,
    LinearOutputs,
    LinearShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "linear"
SCALE_ALIGNMENT = 4
"""cuBLASLt loads 16 bytes of scales."""
FEATURE_ALIGNMENT = 16
"""cuBLASLt loads 16 bytes of e4m3."""
LEAST_CUDA = (12, 9)


def run(inputs: LinearInputs) -> LinearOutputs:
    check_arguments(inputs)
    if inputs.x.dtype == torch.float8_e4m3fn:
        return LinearOutputs(_scaled_product(inputs))
    x, w, dtype = inputs.x, inputs.weight.values, inputs.result_dtype
    if dtype == x.dtype:
        return LinearOutputs(torch.mm(x, w.T))
    if x.is_cuda:
        return LinearOutputs(torch.mm(x, w.T, out_dtype=dtype))
    # torch.mm has no out_dtype on a CPU
    return LinearOutputs(torch.mm(x.float(), w.float().T).to(dtype))


def _scaled_product(inputs: LinearInputs) -> Tensor:
    assert inputs.x_scale is not None and inputs.weight.scale is not None  # check_arguments did
    num_rows = inputs.x.shape[0]
    if num_rows == 0:
        shape = (0, inputs.weight.values.shape[0])
        return torch.empty(shape, dtype=inputs.result_dtype, device=inputs.x.device)
    x, x_scale = whole_quads(inputs.x, inputs.x_scale)
    kinds = functional.ScalingType
    out = functional.scaled_mm(
        x,
        inputs.weight.values.T,
        x_scale,
        kinds.BlockWise1x128,
        padded_weight_scale(inputs.weight.scale),
        kinds.BlockWise128x128,
        output_dtype=inputs.result_dtype,
    )
    return out[:num_rows]


def whole_quads(x: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded up to a multiple of 4 with zeros; scales column by column, stride (1, rows)."""
    rows = x.shape[0]
    missing = -rows % SCALE_ALIGNMENT
    if missing:
        bits = functional.pad(x.view(torch.uint8), (0, 0, 0, missing))
        x = bits.view(x.dtype)
    columns = functional.pad(x_scale.T, (0, missing)) if missing else x_scale.T.contiguous()
    return x, columns.T


def padded_weight_scale(scale: Tensor) -> Tensor:
    """[columns rounded up to a multiple of 4, rows] with stride (1, columns rounded up)."""
    missing = -scale.shape[1] % SCALE_ALIGNMENT
    return (functional.pad(scale, (0, missing)) if missing else scale.contiguous()).T


def supports(shape: LinearShape, machine: Machine) -> str | None:
    if shape.precision != "fp8":
        if machine.capability is not None and machine.capability < (8, 0):
            return f"torch linear in bf16 needs sm_80 or newer, this is {machine.name}"
        return None
    if not machine.is_hopper:
        return (
            "torch linear in fp8 needs Hopper (cuBLASLt scales blocks of 128 there alone), this is"
            f" {machine.name}"
        )
    if not hasattr(functional, "scaled_mm"):
        return f"torch linear in fp8 needs torch 2.10 or newer, this is {torch.__version__}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if cuda < LEAST_CUDA:
        return f"torch linear in fp8 needs a torch for CUDA 12.9 or newer, this is {cuda}"
    if shape.out_features % FEATURE_ALIGNMENT or shape.in_features % BLOCK:
        return (
            f"torch linear in fp8 needs out_features of a multiple of {FEATURE_ALIGNMENT} and"
            f" in_features of a multiple of {BLOCK}, this case has {shape.out_features} and"
            f" {shape.in_features}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="torch", run=run, supports=supports, priority=20),)
