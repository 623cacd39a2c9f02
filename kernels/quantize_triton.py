"""Activations to e4m3 in plain Triton: a program takes 8 groups of a few rows. Memory bound."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import LEAST_SCALE, power_of_two_scale
from dsa_bench.kernels.quantize import QuantizeInputs, QuantizeOutputs, QuantizeShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "quantize"
GROUP = 128
BLOCK_T, BLOCK_G = 4, 8


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scale_ptr, num_rows, num_groups, stride_x,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_G groups of 128 columns of BLOCK_T rows."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    exists = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
    columns = groups[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    wide = rows.to(tl.int64)[:, None, None]
    x = tl.load(x_ptr + wide * stride_x + columns, mask=exists[:, :, None], other=0.0)
    x = x.to(tl.float32)
    scale, inverse = power_of_two_scale(tl.max(tl.abs(x), 2), LEAST_SCALE)
    values = (x * inverse[:, :, None]).to(tl.float8e4nv)
    tl.store(values_ptr + wide * (num_groups * 128) + columns, values, mask=exists[:, :, None])
    by_column = groups.to(tl.int64)[None, :] * num_rows + rows[:, None]
    tl.store(scale_ptr + by_column, scale, mask=exists)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """values and scale of x [num_rows, width] bf16; conventions as in `quantize.py`."""
    expect_tensor("x", x, torch.bfloat16, num_rows=None, width=None)
    num_rows, width = x.shape
    if width % GROUP:
        raise ValueError(f"width must be a multiple of {GROUP}, got {width}")
    num_groups = width // GROUP
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_groups, num_rows, device=x.device)
    if x.numel():
        _quantize_kernel[(triton.cdiv(num_rows, BLOCK_T), triton.cdiv(num_groups, BLOCK_G))](
            x, values, scale, num_rows, num_groups, x.stride(0),
            BLOCK_T=BLOCK_T, BLOCK_G=BLOCK_G, num_warps=4,
        )  # fmt: skip
    return values, scale.T


def run(inputs: QuantizeInputs) -> QuantizeOutputs:
    return QuantizeOutputs(*quantize(inputs.x))


def supports(shape: QuantizeShape, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability < (8, 9):
        return f"triton quantize writes e4m3, which needs sm_89 or newer, this is {machine.name}"
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    signature = {
        "x_ptr": "*bf16:16", "values_ptr": "*fp8e4nv:16", "scale_ptr": "*fp32:16",
        "num_rows": "i32", "num_groups": "i32", "stride_x": "i32:16",
    }  # fmt: skip
    return [
        CompileCase(
            name="quantize_triton",
            kernel=_quantize_kernel,
            signature=signature,
            constexprs={"BLOCK_T": BLOCK_T, "BLOCK_G": BLOCK_G},
            options={"num_warps": 4},
        )
    ]
