"""Queries of the indexer in plain Triton: a program takes a block of heads of one token.

Memory bound: registers and instructions are spared, so that many loads are under way. Two ways to
multiply with Hadamard's matrix, neither of which moves data through shared memory:

products  H_128 is H_8 times H_16 (Kronecker): the tensor cores multiply by H_16, whose signs are
          exact in bf16, sums and differences do the rest. A warp takes 16 heads. Which four bits of
          a column's number H_16 gets is chosen so that what a thread loads in 16 bytes is its part
          of an operand, and its part of the product is what it stores in 16 bytes.
shuffles  7 steps of sums and differences, 3 of them between threads. Few registers, more
          instructions: a low latency where there are few rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import (
    LEAST_SCALE,
    hadamard_128,
    pair_of_columns,
    power_of_two_scale,
    quantize_by,
    rotate_half_split_64,
)
from dsa_bench.kernels.index_query import IndexQueryInputs, IndexQueryOutputs, IndexQueryShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "index_query"
NORM = tl.constexpr(0.08838834764831845)
"""128^-1/2."""


@triton.jit
def _signs(FP8: tl.constexpr):
    """[16, 16] bf16: H_16 of the bits of a column's number that `_operands_…`, `_join_…` name."""
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    if FP8:  # rows are bits 4, 3, 5, 0; columns 3, 5, 4, 0
        j = ((j & 2) << 2) | ((j & 8) >> 1) | ((j & 4) >> 1) | (j & 1)
    # bit n of 0x6996 is the parity of n
    bits = (((0x6996 >> (i & j)) & 1) << 15) | 0x3F80
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _operands_of_quarter(x, WARPS: tl.constexpr):
    """32 columns -> two [rows, 16], of bit 2; their columns are bits 1, 4, 3, 0.

    Rows too are put where the tensor cores want them: 16 of a warp beside one another.
    """
    # rows 16, warp, 8 of a load; bits 4 and 3, 2, 1, 0
    x = tl.reshape(x, [2, WARPS, 8, 4, 2, 2, 2])
    low, high = tl.split(tl.permute(x, [1, 0, 2, 5, 3, 6, 4]))
    return tl.reshape(low, [16 * WARPS, 16]), tl.reshape(high, [16 * WARPS, 16])


@triton.jit
def _join_quarter(low, high, WARPS: tl.constexpr):
    """Undoes `_operands_of_quarter`."""
    x = tl.reshape(tl.join(low, high), [WARPS, 2, 8, 2, 4, 2, 2])
    return tl.reshape(tl.permute(x, [1, 0, 2, 4, 6, 3, 5]), [16 * WARPS, 32])


@triton.jit
def _products_of_quarters(
    a0, a1, b0, b1, c0, c1, d0, d1, signs, minus, HALF: tl.constexpr, WARPS: tl.constexpr
):
    """Quarters 0 and 1 of the result, or 2 and 3, of the operands of four quarters.

    Each half begins with other products: those that both could share would hold registers.
    """
    if HALF == 0:
        a0, a1 = tl.dot(c0, signs, tl.dot(a0, signs)), tl.dot(c1, signs, tl.dot(a1, signs))
        b0, b1 = tl.dot(d0, signs, tl.dot(b0, signs)), tl.dot(d1, signs, tl.dot(b1, signs))
    else:
        a0, a1 = tl.dot(a0, signs, tl.dot(c0, minus)), tl.dot(a1, signs, tl.dot(c1, minus))
        b0, b1 = tl.dot(b0, signs, tl.dot(d0, minus)), tl.dot(b1, signs, tl.dot(d1, minus))
    a0, a1 = a0 + a1, a0 - a1
    b0, b1 = b0 + b1, b0 - b1
    a0, b0 = (a0 + b0) * NORM, (a0 - b0) * NORM
    a1, b1 = (a1 + b1) * NORM, (a1 - b1) * NORM
    first = _join_quarter(a0.to(tl.bfloat16), a1.to(tl.bfloat16), WARPS)
    return first, _join_quarter(b0.to(tl.bfloat16), b1.to(tl.bfloat16), WARPS)


@triton.jit
def _operands_of_half(x, y, WARPS: tl.constexpr):
    """2 · 32 columns -> four [rows, 16], of bits 2 and 1; their columns are bits 4, 3, 5, 0.

    Not 5, 4, 3, 0: what was joined Triton takes for 8 bits wide, and gives a thread four columns
    beside one another. In another order it would be right too, after 32 shuffles.
    """
    # rows 16, warp, 8 of a load; bits 4 and 3, 2, 1, 0, 5
    z = tl.reshape(tl.join(x, y), [2, WARPS, 8, 4, 2, 2, 2, 2])
    z0, z1 = tl.split(tl.permute(z, [1, 0, 2, 3, 7, 6, 5, 4]))
    z00, z01 = tl.split(z0)
    z10, z11 = tl.split(z1)
    z00, z01 = tl.reshape(z00, [16 * WARPS, 16]), tl.reshape(z01, [16 * WARPS, 16])
    return z00, z01, tl.reshape(z10, [16 * WARPS, 16]), tl.reshape(z11, [16 * WARPS, 16])


@triton.jit
def _join_half(z00, z01, z10, z11, WARPS: tl.constexpr):
    """64 columns of four products, whose columns are bits 3, 5, 4, 0."""
    z = tl.join(tl.join(z00, z01), tl.join(z10, z11))
    z = tl.reshape(z, [WARPS, 2, 8, 2, 4, 2, 2, 2])
    return tl.reshape(tl.permute(z, [1, 0, 2, 4, 3, 7, 6, 5]), [16 * WARPS, 64])


@triton.jit
def _products_of_halves(
    l00, l01, l10, l11, h00, h01, h10, h11, signs, minus, HALF: tl.constexpr
):  # fmt: skip
    """(largest of each row before it is rounded, four products in bf16) of half HALF."""
    if HALF == 0:
        z00, z01 = tl.dot(h00, signs, tl.dot(l00, signs)), tl.dot(h01, signs, tl.dot(l01, signs))
        z10, z11 = tl.dot(h10, signs, tl.dot(l10, signs)), tl.dot(h11, signs, tl.dot(l11, signs))
    else:
        z00, z01 = tl.dot(l00, signs, tl.dot(h00, minus)), tl.dot(l01, signs, tl.dot(h01, minus))
        z10, z11 = tl.dot(l10, signs, tl.dot(h10, minus)), tl.dot(l11, signs, tl.dot(h11, minus))
    z00, z01 = z00 + z01, z00 - z01
    z10, z11 = z10 + z11, z10 - z11
    z00, z10 = (z00 + z10) * NORM, (z00 - z10) * NORM
    z01, z11 = (z01 + z11) * NORM, (z01 - z11) * NORM
    largest = tl.maximum(tl.abs(z00), tl.abs(z01))
    largest = tl.maximum(largest, tl.maximum(tl.abs(z10), tl.abs(z11)))
    z00, z01 = z00.to(tl.bfloat16), z01.to(tl.bfloat16)
    return tl.max(largest, 1), z00, z01, z10.to(tl.bfloat16), z11.to(tl.bfloat16)


@triton.jit
def _index_query_products_kernel(
    x_ptr, head_weights_ptr, positions_ptr, table_ptr, q_ptr, weights_ptr,
    num_heads, stride_x, stride_w, weight_scale,
    FP8: tl.constexpr, BLOCK_H: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token, 16 a warp."""
    tl.static_assert(BLOCK_H == 16 * WARPS, "a warp takes 16 heads")
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = heads < num_heads
    here = exists[:, None]
    columns = tl.arange(0, 32)
    vectors = x_ptr + row * stride_x + heads[:, None] * 128 + columns[None, :]
    first = tl.load(vectors, mask=here, other=0.0)
    second = tl.load(vectors + 32, mask=here, other=0.0)
    x2 = tl.load(vectors + 64, mask=here, other=0.0)
    x3 = tl.load(vectors + 96, mask=here, other=0.0)
    weights = tl.load(head_weights_ptr + row * stride_w + heads, mask=exists, other=0.0)
    tl.debug_barrier()  # else most loads of x stand behind the angles, which wait for a position
    angles = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * 64 + columns
    cos, sin = tl.load(angles)[None, :], tl.load(angles + 32)[None, :]
    signs = _signs(FP8)
    first, second = first.to(tl.float32), second.to(tl.float32)
    x0 = (first * cos - second * sin).to(tl.bfloat16)
    x1 = (first * sin + second * cos).to(tl.bfloat16)
    weights = weights * weight_scale
    places = row * num_heads + heads
    if FP8:
        a, b, c, d = _operands_of_half(x0, x1, WARPS)
        e, f, g, h = _operands_of_half(x2, x3, WARPS)
        largest, y0, y1, y2, y3 = _products_of_halves(a, b, c, d, e, f, g, h, signs, -signs, 0)
        other, z0, z1, z2, z3 = _products_of_halves(a, b, c, d, e, f, g, h, signs, -signs, 1)
        # what is rounded before and after it is compared has the same maximum
        largest = tl.maximum(largest, other).to(tl.bfloat16).to(tl.float32)
        scale, inverse = power_of_two_scale(largest, LEAST_SCALE)
        inverse = inverse[:, None]
        q_row = q_ptr + places[:, None] * 128 + tl.arange(0, 64)[None, :]
        y0, y1, y2, y3 = (
            quantize_by(y0, inverse), quantize_by(y1, inverse),
            quantize_by(y2, inverse), quantize_by(y3, inverse),
        )  # fmt: skip
        tl.store(q_row, _join_half(y0, y1, y2, y3, WARPS), mask=here)
        z0, z1, z2, z3 = (
            quantize_by(z0, inverse), quantize_by(z1, inverse),
            quantize_by(z2, inverse), quantize_by(z3, inverse),
        )  # fmt: skip
        tl.store(q_row + 64, _join_half(z0, z1, z2, z3, WARPS), mask=here)
        scale = tl.permute(tl.reshape(scale, [WARPS, 2, 8]), [1, 0, 2])
        weights = weights * tl.reshape(scale, [BLOCK_H])
    else:
        a, b = _operands_of_quarter(x0, WARPS)
        c, d = _operands_of_quarter(x1, WARPS)
        e, f = _operands_of_quarter(x2, WARPS)
        g, h = _operands_of_quarter(x3, WARPS)
        q_row = q_ptr + places[:, None] * 128 + columns[None, :]
        y0, y1 = _products_of_quarters(a, b, c, d, e, f, g, h, signs, -signs, 0, WARPS)
        tl.store(q_row, y0, mask=here)
        tl.store(q_row + 32, y1, mask=here)
        y0, y1 = _products_of_quarters(a, b, c, d, e, f, g, h, signs, -signs, 1, WARPS)
        tl.store(q_row + 64, y0, mask=here)
        tl.store(q_row + 96, y1, mask=here)
    tl.store(weights_ptr + places, weights, mask=exists)


@triton.jit
def _index_query_shuffles_kernel(
    x_ptr, head_weights_ptr, positions_ptr, table_ptr, q_ptr, weights_ptr,
    num_heads, stride_x, stride_w, weight_scale,
    FP8: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token, as two halves of 64 columns."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = heads < num_heads
    here = exists[:, None]
    columns = tl.arange(0, 64)[None, :]
    vectors = x_ptr + row * stride_x + heads[:, None] * 128 + columns
    low = tl.load(vectors, mask=here, other=0.0)
    high = tl.load(vectors + 64, mask=here, other=0.0)
    weights = tl.load(head_weights_ptr + row * stride_w + heads, mask=exists, other=0.0)
    tl.debug_barrier()  # else most loads of x stand behind the angles, which wait for a position
    angles = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * 64 + pair_of_columns()
    cos, sin = tl.load(angles)[None, :], tl.load(angles + 32)[None, :]
    low = rotate_half_split_64(low.to(tl.float32), cos, sin, BLOCK_H)
    low = low.to(tl.bfloat16).to(tl.float32)
    low, high = hadamard_128(low, high.to(tl.float32), BLOCK_H)
    weights = weights * weight_scale
    places = row * num_heads + heads
    q_row = q_ptr + places[:, None] * 128 + columns
    if FP8:
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        largest = largest.to(tl.bfloat16).to(tl.float32)
        scale, inverse = power_of_two_scale(largest, LEAST_SCALE)
        inverse = inverse[:, None]
        tl.store(q_row, quantize_by(low.to(tl.bfloat16), inverse), mask=here)
        tl.store(q_row + 64, quantize_by(high.to(tl.bfloat16), inverse), mask=here)
        weights = weights * scale
    else:
        tl.store(q_row, low.to(tl.bfloat16), mask=here)
        tl.store(q_row + 64, high.to(tl.bfloat16), mask=here)
    tl.store(weights_ptr + places, weights, mask=exists)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexQueryConfig:
    method: str
    """`products` or `shuffles`."""
    block_h: int
    """Heads of a program."""
    num_warps: int

    def __post_init__(self) -> None:
        if self.method not in ("products", "shuffles"):
            raise ValueError(f"method must be products or shuffles, got {self.method}")
        if self.method == "products" and self.block_h != 16 * self.num_warps:
            raise ValueError(
                f"products takes 16 heads a warp, got block_h {self.block_h}"
                f" and num_warps {self.num_warps}"
            )


def choose_config(num_rows: int, num_heads: int) -> IndexQueryConfig:
    """Many warps of few instructions while there are few rows, then few instructions in all.

    H100, 4096 rows of 64 heads, µs in fp8 / bf16: products of 32 heads 38.3 / 46.8, of 16 43.2 /
    49.5, of 64 44.0 / 46.9; shuffles of 16 heads 46.7 / 48.9, of 32 43.7 / 47.2.
    """
    if num_rows < 512 or num_heads <= 16:
        return IndexQueryConfig(method="shuffles", block_h=16, num_warps=4)
    return IndexQueryConfig(method="products", block_h=32, num_warps=2)


def index_query(
    x: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    rope_table: Tensor,
    *,
    precision: str,
    weight_scale: float,
    config: IndexQueryConfig | None = None,
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
    if not x.numel():
        return index_q, weights
    config = config or choose_config(num_rows, num_heads)
    arguments = (
        x, head_weights, positions, rope_table.contiguous(), index_q, weights,
        num_heads, x.stride(0), head_weights.stride(0), weight_scale,
    )  # fmt: skip
    grid, num_warps = (num_rows, triton.cdiv(num_heads, config.block_h)), config.num_warps
    if config.method == "products":
        _index_query_products_kernel[grid](
            *arguments, FP8=is_fp8, BLOCK_H=config.block_h, WARPS=num_warps, num_warps=num_warps
        )
    else:
        _index_query_shuffles_kernel[grid](
            *arguments, FP8=is_fp8, BLOCK_H=config.block_h, num_warps=num_warps
        )
    return index_q, weights


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
    configs = {choose_config(num_rows, 64) for num_rows in (1, 4096)}
    cases = []
    for config in sorted(configs, key=lambda config: config.method):
        for precision in ("fp8", "bf16"):
            is_fp8, is_products = precision == "fp8", config.method == "products"
            signature = {
                "x_ptr": "*bf16:16", "head_weights_ptr": "*fp32:16", "positions_ptr": "*i32:16",
                "table_ptr": "*fp32:16", "q_ptr": "*fp8e4nv:16" if is_fp8 else "*bf16:16",
                "weights_ptr": "*fp32:16", "num_heads": "i32:16", "stride_x": "i32:16",
                "stride_w": "i32:16", "weight_scale": "fp32",
            }  # fmt: skip
            constexprs = {"FP8": is_fp8, "BLOCK_H": config.block_h}
            wide = {"LDG.E.128": 12, "STG.E.128": 4 if is_fp8 else 8, "HMMA": 24}
            cases.append(
                CompileCase(
                    name=f"index_query_triton[{config.method}, {precision}, {config.block_h}]",
                    kernel=_index_query_products_kernel
                    if is_products
                    else _index_query_shuffles_kernel,
                    signature=signature,
                    constexprs=constexprs | ({"WARPS": config.num_warps} if is_products else {}),
                    options={"num_warps": config.num_warps},
                    must_have=wide if is_products else {"LDG.E.128": 6, "SHFL": 50},
                )
            )
    return cases
