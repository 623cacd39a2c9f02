"""Merging the splits of one attention row by their log-sums: shared by the decode kernels.

    w_i = 2^(lse_i - max lse)
    out = Σ w_i · out_i / Σ w_i      lse = ln 2 · (max lse + log2 Σ w_i)

Splits hold normalised outputs (fp32, or bf16 where the kernel is not ours) and log2 sums, -inf for
a split without a key. A row whose splits are all empty: out 0, lse +inf.
"""

import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.dependent_launch import can_depend

MAX_SPLITS = 64
TILE_ELEMENTS = 8192
"""fp32 partial results that one program holds: 64 registers a thread of 4 warps."""


@triton.jit
def _combine_splits_kernel(
    partial_out_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr, num_rows, num_heads, num_splits,
    HAS_SINK: tl.constexpr, IS_DEPENDENT: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one row (a head of a query)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_split = tl.arange(0, BLOCK_SPLITS)
    exists = offs_split < num_splits
    offs_row = offs_split.to(tl.int64) * num_rows + row
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
    # parts travel together with the sums that say which of them count: [BLOCK_SPLITS, BLOCK_D]
    lse = tl.load(partial_lse_ptr + offs_row, mask=exists, other=-float("inf"))
    offs_part = offs_row[:, None] * HEAD_DIM_V + offs_d[None, :]
    parts = tl.load(partial_out_ptr + offs_part, mask=exists[:, None], other=0.0)
    merge_parts(
        parts, lse, row, row % num_heads, offs_d, tl.program_id(1) == 0, sink_ptr, out_ptr, lse_ptr,
        HAS_SINK, HEAD_DIM_V,
    )  # fmt: skip


@triton.jit
def merge_parts(
    parts, lse, row, head, offs_d, is_first, sink_ptr, out_ptr, lse_ptr,
    HAS_SINK: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """[parts, columns offs_d] and [parts] -> the row (int64) of a head; the log-sum too, by the
    program that is first."""
    largest = tl.max(lse, 0)
    # of two infinities the difference is NaN
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    weight = tl.exp2(lse - largest)
    total = tl.sum(weight, 0)
    is_empty = total == 0
    # the part of an empty split may be anything
    parts = tl.where((weight > 0)[:, None], parts, 0.0)
    denominator = total
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
        denominator += tl.exp2(sink * 1.4426950408889634 - largest)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(is_empty, 1.0, denominator)
    tl.store(out_ptr + row * HEAD_DIM_V + offs_d, out.to(out_ptr.dtype.element_ty))
    natural = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + row, tl.where(is_empty, float("inf"), natural), mask=is_first)


def choose_tile(num_splits: int, head_dim_v: int, num_rows: int) -> tuple[int, int]:
    """(BLOCK_SPLITS, BLOCK_D): all splits, and as many columns as the tile has room for; fewer, 64
    at least, where there are fewer than 256 programs: two an SM or nearly so."""
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be 1 … {MAX_SPLITS}, got {num_splits}")
    block_splits = triton.next_power_of_2(num_splits)
    block_d = min(head_dim_v, TILE_ELEMENTS // block_splits)
    while block_d > 64 and 256 * block_d > num_rows * head_dim_v:
        block_d //= 2
    return block_splits, block_d


def combine_splits(
    partial_out: Tensor,
    partial_lse: Tensor,
    num_splits: int,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge into `out` and `lse`.

    Args:
        partial_out: [num_splits, rows, head_dim_v] fp32 or bf16, normalised.
        partial_lse: [num_splits, rows] fp32, in log2 units. All are contiguous.
        num_splits: 1 … MAX_SPLITS.
        attn_sink: [num_heads] fp32 or None.
        out, lse: [..., num_heads, head_dim_v] bf16 and [..., num_heads] fp32, of `rows` rows.
    """
    num_rows, num_heads = lse.numel(), lse.shape[-1]
    head_dim_v = out.shape[-1]
    block_splits, block_d = choose_tile(num_splits, head_dim_v, num_rows)
    is_dependent = can_depend(out.device)
    _combine_splits_kernel[(num_rows, head_dim_v // block_d)](
        partial_out, partial_lse, attn_sink if attn_sink is not None else partial_lse, out, lse,
        num_rows, num_heads, num_splits,
        HAS_SINK=attn_sink is not None, IS_DEPENDENT=is_dependent, HEAD_DIM_V=head_dim_v,
        BLOCK_SPLITS=block_splits, BLOCK_D=block_d, num_warps=4,
        # the interpreter knows no such option
        **({"launch_pdl": True} if is_dependent else {}),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    signature = {
        "partial_out_ptr": "*fp32:16", "partial_lse_ptr": "*fp32:16", "sink_ptr": "*fp32:16",
        "out_ptr": "*bf16:16", "lse_ptr": "*fp32:16", "num_rows": "i32:16", "num_heads": "i32:16",
        "num_splits": "i32",
    }  # fmt: skip
    cases = []
    for num_splits, has_sink in ((16, True), (MAX_SPLITS, False)):
        block_splits, block_d = choose_tile(num_splits, 512, 128)
        constexprs = {
            "HAS_SINK": has_sink, "IS_DEPENDENT": has_sink, "HEAD_DIM_V": 512,
            "BLOCK_SPLITS": block_splits, "BLOCK_D": block_d,
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"combine_splits[{num_splits}]",
                kernel=_combine_splits_kernel,
                signature=signature,
                constexprs=constexprs,
                options={"num_warps": 4},
            )
        )
    return cases
