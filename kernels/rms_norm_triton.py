"""RMS norm in plain Triton, quantised on the way out: one program a row. Memory bound."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import LEAST_SCALE, power_of_two_scale
from dsa_bench.kernels.rms_norm import RmsNormInputs, RmsNormOutputs, RmsNormShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "rms_norm"
GROUP = 128
MAX_WIDTH = 8192


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, scale_ptr, num_rows, width, stride_x, eps,
    QUANTIZED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: one row, as BLOCK_G groups of 128 columns."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    exists = columns < width
    x = tl.load(x_ptr + wide * stride_x + columns, mask=exists, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=exists, other=0.0).to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, 1), 0) / width
    y = (x * (1.0 / tl.sqrt_rn(mean_square + eps)) * weight).to(tl.bfloat16)
    if QUANTIZED:
        y = y.to(tl.float32)
        scale, inverse = power_of_two_scale(tl.max(tl.abs(y), 1), LEAST_SCALE)
        values = (y * inverse[:, None]).to(tl.float8e4nv)
        tl.store(out_ptr + wide * width + columns, values, mask=exists)
        by_column = groups.to(tl.int64) * num_rows + row
        tl.store(scale_ptr + by_column, scale, mask=groups * 128 < width)
    else:
        tl.store(out_ptr + wide * width + columns, y, mask=exists)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, quantized: bool = False
) -> tuple[Tensor, Tensor | None]:
    """out and scale; formulas and conventions as in `rms_norm.py`.

    Args:
        x: [num_rows, width] bf16, any row stride.
        weight: [width] bf16.
    """
    expect_tensor("x", x, torch.bfloat16, num_rows=None, width=None)
    num_rows, width = x.shape
    expect_tensor("weight", weight, torch.bfloat16, width=width)
    expect_same_device(x=x, weight=weight)
    if width > MAX_WIDTH or (quantized and width % GROUP):
        raise ValueError(
            f"width must be at most {MAX_WIDTH}, if quantised a multiple of {GROUP}, got {width}"
        )
    dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
    out = torch.empty(num_rows, width, dtype=dtype, device=x.device)
    scale = torch.empty(width // GROUP, num_rows, device=x.device) if quantized else None
    if x.numel():
        block = triton.next_power_of_2(triton.cdiv(width, GROUP))
        _rms_norm_kernel[(num_rows,)](
            x, weight, out, scale if quantized else weight, num_rows, width, x.stride(0), eps,
            QUANTIZED=quantized, BLOCK_G=block, num_warps=4,
        )  # fmt: skip
    return out, None if scale is None else scale.T


def run(inputs: RmsNormInputs) -> RmsNormOutputs:
    return RmsNormOutputs(
        *rms_norm(inputs.x, inputs.weight, inputs.eps, quantized=inputs.quantized)
    )


def supports(shape: RmsNormShape, machine: Machine) -> str | None:
    needed = (8, 9) if shape.quantized else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return f"triton rms_norm needs sm_{needed[0]}{needed[1]} or newer, this is {machine.name}"
    if shape.width > MAX_WIDTH:
        return f"triton rms_norm takes rows of up to {MAX_WIDTH} columns, got {shape.width}"
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for quantized in (False, True):
        signature = {
            "x_ptr": "*bf16:16", "weight_ptr": "*bf16:16",
            "out_ptr": "*fp8e4nv:16" if quantized else "*bf16:16",
            "scale_ptr": "*fp32:16" if quantized else "*bf16:16",
            "num_rows": "i32", "width": "i32:16", "stride_x": "i32:16", "eps": "fp32",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"rms_norm_triton[{'fp8' if quantized else 'bf16'}]",
                kernel=_rms_norm_kernel,
                signature=signature,
                constexprs={"QUANTIZED": quantized, "BLOCK_G": 16},
                options={"num_warps": 4},
            )
        )
    return cases
