"""Queries of the indexer in plain Triton: a program takes a block of heads of one token.

A head's columns are four quarters of 32. The rotation pairs the first two. H_128 is H_4 times H_32
(Kronecker): the tensor cores multiply each quarter with H_32, whose signs are exact in bf16, and
sums and differences do the rest. That is a quarter of the products of H_128, and 1024 signs to
generate instead of 16384. Memory bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import hadamard_signs, power_of_two_scale
from dsa_bench.kernels.index_query import IndexQueryInputs, IndexQueryOutputs, IndexQueryShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "index_query"
LEAST_SCALE = tl.constexpr(2.0**-22)
"""2^ceil(log2(1e-4 / 448))."""


@triton.jit
def _index_query_kernel(
    x_ptr, head_weights_ptr, positions_ptr, table_ptr, q_ptr, weights_ptr,
    num_heads, stride_x, stride_w, weight_scale,
    FP8: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token, as four quarters of 32 columns."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = heads < num_heads
    here = exists[:, None]
    columns = tl.arange(0, 32)
    vectors = x_ptr + row * stride_x + heads[:, None] * 128 + columns[None, :]
    first = tl.load(vectors, mask=here, other=0.0).to(tl.float32)
    second = tl.load(vectors + 32, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(vectors + 64, mask=here, other=0.0)
    x3 = tl.load(vectors + 96, mask=here, other=0.0)
    angles = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * 64 + columns
    cos, sin = tl.load(angles)[None, :], tl.load(angles + 32)[None, :]
    x0 = (first * cos - second * sin).to(tl.bfloat16)
    x1 = (first * sin + second * cos).to(tl.bfloat16)
    # H_128 is H_4 times H_32 (Kronecker): products with H_32, then sums and differences
    signs = hadamard_signs(32)
    a, b, c, d = tl.dot(x0, signs), tl.dot(x1, signs), tl.dot(x2, signs), tl.dot(x3, signs)
    a, b = a + b, a - b
    c, d = c + d, c - d
    factor = 0.08838834764831845
    y0, y1 = ((a + c) * factor).to(tl.bfloat16), ((b + d) * factor).to(tl.bfloat16)
    y2, y3 = ((a - c) * factor).to(tl.bfloat16), ((b - d) * factor).to(tl.bfloat16)
    weights = tl.load(head_weights_ptr + row * stride_w + heads, mask=exists, other=0.0)
    weights = weights * weight_scale
    places = row * num_heads + heads
    q_row = q_ptr + places[:, None] * 128 + columns[None, :]
    if FP8:
        z0, z1, z2, z3 = y0.to(tl.float32), y1.to(tl.float32), y2.to(tl.float32), y3.to(tl.float32)
        largest = tl.maximum(tl.maximum(tl.abs(z0), tl.abs(z1)), tl.maximum(tl.abs(z2), tl.abs(z3)))
        scale, inverse = power_of_two_scale(tl.max(largest, 1), LEAST_SCALE)
        inverse = inverse[:, None]
        tl.store(q_row, (z0 * inverse).to(tl.float8e4nv), mask=here)
        tl.store(q_row + 32, (z1 * inverse).to(tl.float8e4nv), mask=here)
        tl.store(q_row + 64, (z2 * inverse).to(tl.float8e4nv), mask=here)
        tl.store(q_row + 96, (z3 * inverse).to(tl.float8e4nv), mask=here)
        weights = weights * scale
    else:
        tl.store(q_row, y0, mask=here)
        tl.store(q_row + 32, y1, mask=here)
        tl.store(q_row + 64, y2, mask=here)
        tl.store(q_row + 96, y3, mask=here)
    tl.store(weights_ptr + places, weights, mask=exists)


def index_query(
    x: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    rope_table: Tensor,
    *,
    precision: str,
    weight_scale: float,
) -> tuple[Tensor, Tensor]:
    """index_q and index_weights; formulas, shapes and conventions as in `index_query.py`."""
    expect_tensor("x", x, torch.bfloat16, num_rows=None, index_heads=None, index_dim=128)
    num_rows, num_heads, _ = x.shape
    if x.numel() and num_heads > 1 and x.stride(1) != 128:
        raise ValueError(f"the heads of x must be contiguous, got strides {tuple(x.stride())}")
    expect_tensor(
        "head_weights", head_weights, torch.float32, num_rows=num_rows, index_heads=num_heads
    )
    expect_tensor("positions", positions, torch.int32, num_rows=num_rows)
    expect_tensor("rope_table", rope_table, torch.float32, num_positions=None, head_dim_rope=64)
    expect_same_device(x=x, head_weights=head_weights, positions=positions, rope_table=rope_table)
    is_fp8 = precision == "fp8"
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    index_q = torch.empty(num_rows, num_heads, 128, dtype=dtype, device=x.device)
    weights = torch.empty(num_rows, num_heads, device=x.device)
    if x.numel():
        block = choose_block(num_rows, num_heads)
        _index_query_kernel[(num_rows, triton.cdiv(num_heads, block))](
            x, head_weights, positions, rope_table.contiguous(), index_q, weights,
            num_heads, x.stride(0), head_weights.stride(0), weight_scale,
            FP8=is_fp8, BLOCK_H=block, num_warps=4,
        )  # fmt: skip
    return index_q, weights


def choose_block(num_rows: int, num_heads: int) -> int:
    """Heads of a program: few while there are few rows; 16 are the least of a product."""
    return 16 if num_rows < 512 or num_heads <= 16 else 64


def run(inputs: IndexQueryInputs) -> IndexQueryOutputs:
    return IndexQueryOutputs(
        *index_query(
            inputs.x,
            inputs.head_weights,
            inputs.positions,
            inputs.rope_table,
            precision=inputs.precision,
            weight_scale=inputs.weight_scale,
        )
    )


def supports(shape: IndexQueryShape, machine: Machine) -> str | None:
    needed = (8, 9) if shape.precision == "fp8" else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return (
            f"triton index_query in {shape.precision} needs sm_{needed[0]}{needed[1]} or newer,"
            f" this is {machine.name}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for precision, block in (("fp8", 16), ("fp8", 64), ("bf16", 64)):
        signature = {
            "x_ptr": "*bf16:16", "head_weights_ptr": "*fp32:16", "positions_ptr": "*i32:16",
            "table_ptr": "*fp32:16", "q_ptr": "*fp8e4nv:16" if precision == "fp8" else "*bf16:16",
            "weights_ptr": "*fp32:16", "num_heads": "i32:16", "stride_x": "i32:16",
            "stride_w": "i32:16", "weight_scale": "fp32",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"index_query_triton[{precision}, {block}]",
                kernel=_index_query_kernel,
                signature=signature,
                constexprs={"FP8": precision == "fp8", "BLOCK_H": block},
                options={"num_warps": 4},
                must_have={"HMMA" if block < 64 else "HGMMA": 4},
            )
        )
    return cases
