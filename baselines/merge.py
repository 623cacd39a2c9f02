"""Two attentions over disjoint keys become one.

    w = sigmoid(lse_b - lse_a)      out = out_a + w · (out_b - out_a)
    lse = ln(exp lse_a + exp lse_b)

Shapes:
    out_a, out_b  [rows, num_heads, head_dim_v]  bf16   any strides in rows and heads
    lse_a, lse_b  [rows, num_heads]              fp32   natural logarithm, finite

On a GPU one kernel does it, bound by memory: 6 bytes an element of out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.compile_case import CompileCase

BLOCK_ROWS = 16


@triton.jit
def _merge_by_lse_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr, num_rows, num_heads,
    stride_out_a_row, stride_out_a_head, stride_lse_a_row, stride_lse_a_head,
    stride_out_b_row, stride_out_b_head, stride_lse_b_row, stride_lse_b_head,
    BLOCK_ROWS: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS consecutive (row, head) pairs."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = offs < num_rows * num_heads
    row, head = offs // num_heads, offs % num_heads
    offs_v = tl.arange(0, HEAD_DIM_V)[None, :]
    lse_a = tl.load(lse_a_ptr + row * stride_lse_a_row + head * stride_lse_a_head, valid, 0.0)
    lse_b = tl.load(lse_b_ptr + row * stride_lse_b_row + head * stride_lse_b_head, valid, 0.0)
    base_a = row * stride_out_a_row + head * stride_out_a_head
    base_b = row * stride_out_b_row + head * stride_out_b_head
    # [BLOCK_ROWS, HEAD_DIM_V]
    out_a = tl.load(out_a_ptr + base_a[:, None] + offs_v, valid[:, None], 0.0).to(tl.float32)
    out_b = tl.load(out_b_ptr + base_b[:, None] + offs_v, valid[:, None], 0.0).to(tl.float32)
    largest = tl.maximum(lse_a, lse_b)
    weight_a, weight_b = tl.exp(lse_a - largest), tl.exp(lse_b - largest)
    total = weight_a + weight_b
    out = (out_a * weight_a[:, None] + out_b * weight_b[:, None]) / total[:, None]
    tl.store(
        out_ptr + offs[:, None] * HEAD_DIM_V + offs_v,
        out.to(out_ptr.dtype.element_ty),
        valid[:, None],
    )
    tl.store(lse_ptr + offs, largest + tl.log(total), valid)


def merge_by_lse(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the attention over the keys of both, contiguous."""
    if out_a.device.type == "cpu":
        out = torch.lerp(out_a.float(), out_b.float(), torch.sigmoid(lse_b - lse_a)[..., None])
        return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    launch_merge(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


def launch_merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor
) -> None:
    """The kernel; `out` and `lse` are contiguous, out_a and out_b are in their last dimension."""
    rows, heads, width = out_a.shape
    _merge_by_lse_kernel[(triton.cdiv(rows * heads, BLOCK_ROWS),)](
        out_a, lse_a, out_b, lse_b, out, lse, rows, heads,
        *out_a.stride()[:2], *lse_a.stride(), *out_b.stride()[:2], *lse_b.stride(),
        BLOCK_ROWS=BLOCK_ROWS, HEAD_DIM_V=width, num_warps=4,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    strides = (
        f"stride_{tensor}_{axis}"
        for tensor in ("out_a", "lse_a", "out_b", "lse_b")
        for axis in ("row", "head")
    )
    return [
        CompileCase(
            name="merge_by_lse",
            kernel=_merge_by_lse_kernel,
            signature={
                **dict.fromkeys(("out_a_ptr", "out_b_ptr", "out_ptr"), "*bf16:16"),
                **dict.fromkeys(("lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32:16"),
                **dict.fromkeys(("num_rows", "num_heads"), "i32:16"),
                **dict.fromkeys(strides, "i32:16"),
            },
            constexprs={"BLOCK_ROWS": BLOCK_ROWS, "HEAD_DIM_V": 128},
            options={"num_warps": 4},
        )
    ]
