"""Rotation of queries in plain Triton: a program turns a block of heads of one token.

Every pair of columns is loaded once, taken apart and put together again in registers, so a tensor
can be rotated in place. Memory bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.query_rope import QueryRopeInputs, QueryRopeOutputs, QueryRopeShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "query_rope"
BLOCK_H = 32


@triton.jit
def _query_rope_kernel(
    x_ptr, positions_ptr, table_ptr, out_ptr, num_heads,
    stride_xt, stride_xh, stride_ot, stride_oh, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = (heads < num_heads)[:, None]
    columns = tl.arange(0, 64)[None, :]
    wide = heads.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_xt + wide * stride_xh + columns, mask=exists, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_H, 32, 2]))
    tl.debug_barrier()  # else some loads of x stand behind the angles, which wait for a position
    angles = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * 64 + tl.arange(0, 32)
    cos, sin = tl.load(angles)[None, :], tl.load(angles + 32)[None, :]
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    y = tl.reshape(turned, [BLOCK_H, 64]).to(tl.bfloat16)
    tl.store(out_ptr + row * stride_ot + wide * stride_oh + columns, y, mask=exists)


def query_rope(
    x: Tensor, positions: Tensor, rope_table: Tensor, out: Tensor | None = None
) -> Tensor:
    """Rotate x [num_rows, num_heads, 64] bf16 into `out`, which may be x; as in `query_rope.py`."""
    expect_tensor("x", x, torch.bfloat16, num_rows=None, num_heads=None, head_dim_rope=64)
    num_rows, num_heads, _ = x.shape
    expect_tensor("positions", positions, torch.int32, num_rows=num_rows)
    expect_tensor("rope_table", rope_table, torch.float32, num_positions=None, head_dim_rope=64)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    expect_tensor(
        "out", out, torch.bfloat16, num_rows=num_rows, num_heads=num_heads, head_dim_rope=64
    )
    expect_same_device(x=x, positions=positions, rope_table=rope_table, out=out)
    if x.numel():
        _query_rope_kernel[(num_rows, triton.cdiv(num_heads, BLOCK_H))](
            x, positions, rope_table.contiguous(), out, num_heads,
            *x.stride()[:2], *out.stride()[:2], BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip
    return out


def run(inputs: QueryRopeInputs) -> QueryRopeOutputs:
    return QueryRopeOutputs(query_rope(inputs.x, inputs.positions, inputs.rope_table, inputs.out))


def supports(shape: QueryRopeShape, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability < (8, 0):
        return f"triton query_rope needs sm_80 or newer, this is {machine.name}"
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    signature = {
        "x_ptr": "*bf16:16", "positions_ptr": "*i32:16", "table_ptr": "*fp32:16",
        "out_ptr": "*bf16:16", "num_heads": "i32",
        "stride_xt": "i32:16", "stride_xh": "i32:16", "stride_ot": "i32:16", "stride_oh": "i32:16",
    }  # fmt: skip
    return [
        CompileCase(
            name="query_rope_triton",
            kernel=_query_rope_kernel,
            signature=signature,
            constexprs={"BLOCK_H": BLOCK_H},
            options={"num_warps": 4},
        )
    ]
