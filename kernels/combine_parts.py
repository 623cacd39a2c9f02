"""Merging the lists of `row_decode.py` that several groups of programs shared.

A list's parts are partial results of groups that follow one another: that of its first group at the
group's own place, those of the others behind the places of all groups. The merging itself is that
of `combine_splits.py`. Lists that one group had alone are final, and nothing is done.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.combine_splits import choose_tile, merge_parts
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.dependent_launch import can_depend


@dataclass(frozen=True, slots=True)
class Parts:
    """Partial results, and which lists they are of: words as in `decode_config.py`."""

    out: Tensor
    """[2 · num_groups, num_heads, head_dim_v] fp32, normalised."""
    lse: Tensor
    """[2 · num_groups, num_heads] fp32, in log2 units; -inf where there was no key."""
    share: int
    piece_units: int
    num_blocks: int
    most_parts: int
    """Of any list."""

    @property
    def is_even(self) -> bool:
        """Whether all lists are cut in the same way, at the ends of stretches."""
        return self.most_parts * self.share == self.piece_units + self.num_blocks


# so that batches of other sizes are not compiled anew
@triton.jit(do_not_specialize=["num_groups", "share", "piece_units", "num_blocks", "most_parts"])
def _combine_parts_kernel(
    partial_out_ptr, partial_lse_ptr, sink_ptr, out_ptr, lse_ptr,
    num_groups, share, piece_units, num_blocks, most_parts,
    IS_EVEN: tl.constexpr, HAS_SINK: tl.constexpr, IS_DEPENDENT: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D columns of one head of a query, grid (heads, queries, columns)."""
    head, num_heads, query = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    if IS_EVEN:
        first_group = query * most_parts
        num_parts = most_parts
    else:
        list_end = (query + 1) * (piece_units + num_blocks)
        first_group = (list_end - num_blocks) // share
        num_parts = (list_end - 1) // share - first_group + 1
    offs_part = tl.arange(0, BLOCK_PARTS)
    exists = offs_part < num_parts
    place = first_group + offs_part + tl.where(offs_part > 0, num_groups, 0)
    offs_row = place.to(tl.int64) * num_heads + head
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if num_parts > 1:
        # parts travel together with the sums that say which of them count
        lse = tl.load(partial_lse_ptr + offs_row, mask=exists, other=-float("inf"))
        offs = offs_row[:, None] * HEAD_DIM_V + offs_d[None, :]
        parts = tl.load(partial_out_ptr + offs, mask=exists[:, None], other=0.0)
        merge_parts(
            parts, lse, query.to(tl.int64) * num_heads + head, head, offs_d,
            tl.program_id(2) == 0, sink_ptr, out_ptr, lse_ptr, HAS_SINK, HEAD_DIM_V,
        )  # fmt: skip


def may_overlap(num_rows: int) -> bool:
    """Whether merging so many rows is to be launched as soon as the kernel before has asked for all
    its keys, and not when it ends. Its programs then fill the SMs that are idle or free first, and
    wait there: good where they are enough for all SMs, or have next to nothing to do.

    Of a row 2 to 32 parts, H100, µs of both kernels, launched late and early: 16 rows 11.2, 10.8;
    32 rows 11.7, 11.7; 64 rows 12.7, 16.0; 128 rows 14.1, 15.8 (with 512 or 1024 programs 19.2,
    16.7); 256 rows 16.9, 17.6; 512 rows 28.6, 29.4; 1024 rows 27.2, 27.2; 2048 rows 36.3, 35.9;
    4096 rows 54.6, 54.1.
    """
    return num_rows <= 16 or num_rows >= 2048


def combine_parts(parts: Parts, attn_sink: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Merge the lists that were shared into `out` and `lse`; all others are left as they are.

    Args:
        parts: on the device of `out`, contiguous.
        attn_sink: [num_heads] fp32 or None.
        out, lse: [..., num_heads, head_dim_v] bf16 and [..., num_heads] fp32, contiguous.
    """
    num_heads, head_dim_v = out.shape[-2:]
    num_queries = lse.numel() // num_heads
    block_parts, block_d = choose_tile(parts.most_parts, head_dim_v, lse.numel())
    is_dependent = can_depend(out.device)
    _combine_parts_kernel[(num_heads, num_queries, head_dim_v // block_d)](
        parts.out, parts.lse, attn_sink if attn_sink is not None else lse, out, lse,
        parts.out.shape[0] // 2, parts.share, parts.piece_units, parts.num_blocks,
        parts.most_parts, IS_EVEN=parts.is_even, HAS_SINK=attn_sink is not None,
        IS_DEPENDENT=is_dependent, HEAD_DIM_V=head_dim_v,
        BLOCK_PARTS=block_parts, BLOCK_D=block_d, num_warps=4,
        # the interpreter knows no such option
        **({"launch_pdl": True} if is_dependent else {}),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    signature = {
        "partial_out_ptr": "*fp32:16", "partial_lse_ptr": "*fp32:16", "sink_ptr": "*fp32:16",
        "out_ptr": "*bf16:16", "lse_ptr": "*fp32:16",
        "num_groups": "i32", "share": "i32", "piece_units": "i32", "num_blocks": "i32",
        "most_parts": "i32",
    }  # fmt: skip
    cases = []
    for most_parts, has_sink in ((16, False), (2, True)):
        block_parts, block_d = choose_tile(most_parts, 512, 128)
        cases.append(
            CompileCase(
                name=f"combine_parts[{most_parts}]",
                kernel=_combine_parts_kernel,
                signature=signature,
                constexprs={
                    "IS_EVEN": not has_sink, "HAS_SINK": has_sink, "IS_DEPENDENT": True,
                    "HEAD_DIM_V": 512, "BLOCK_PARTS": block_parts, "BLOCK_D": block_d,
                },
                options={"num_warps": 4},
            )
        )  # fmt: skip
    return cases
