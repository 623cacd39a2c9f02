"""Rows whose lists of candidates were not complete, done whole: for Hopper in Gluon.

A program takes one such row after the other: it scores all keys that the row sees into a row of
scratch memory, by the same arithmetic as `logit_scores.py`, and selects from it exactly. Slow, for
nothing is loaded ahead, and seldom needed: thousands of equal logits at the threshold, or an order
of keys that the sample is blind to.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.candidate_list import list_words
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.logit_scores import HALF, logit_layout, score_layout, sum_heads
from dsa_bench.kernels.logit_tiles import BLOCK_KV, choose_columns
from dsa_bench.kernels.radix_select import BINS
from dsa_bench.kernels.row_scan import finish_row, locate_row
from dsa_bench.kernels.shared_words import block_barrier
from dsa_bench.kernels.tma_tiles import tile_layout

VECTOR = gl.constexpr(4)
ELEMENTS = gl.constexpr(8)
NUM_WARPS = gl.constexpr(4)


@gluon.jit
def _score_row(
    q_tile, k_tile, q_ptr, k_ptr, scale_ptr, weights_ptr, row_ptr, row, num_rows, first_kv, end_kv,
    HEADS: gl.constexpr, COLUMNS: gl.constexpr, DIM: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Logits of keys first_kv … end_kv - 1 -> row_ptr[key]. The product has the columns of the next
    rows too, as everywhere; they are dropped."""
    SCORES: gl.constexpr = score_layout(COLUMNS, DEPTH)
    QUERIES: gl.constexpr = COLUMNS // HEADS
    LOGITS: gl.constexpr = logit_layout(QUERIES)
    TILE: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    offs_c = gl.arange(0, COLUMNS, gl.SliceLayout(1, TILE))
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, TILE))
    exists = row + offs_c // HEADS < num_rows
    offs = (row.to(gl.int64) * HEADS + offs_c)[:, None] * DIM + offs_d[None, :]
    q_tile.store(gl.load(q_ptr + offs, mask=exists[:, None], other=0.0))
    offs_c = gl.arange(0, COLUMNS, gl.SliceLayout(0, SCORES))
    weights = gl.load(
        weights_ptr + row.to(gl.int64) * HEADS + offs_c,
        mask=row + offs_c // HEADS < num_rows, other=0.0,
    )  # fmt: skip
    offs_q = gl.arange(0, QUERIES, gl.SliceLayout(0, LOGITS))
    for kv in range(first_kv, end_kv, HALF):
        keys = kv + gl.arange(0, HALF, gl.SliceLayout(1, TILE))
        ptrs = k_ptr + keys.to(gl.int64)[:, None] * DIM + offs_d[None, :]
        k = gl.load(ptrs, mask=(keys < end_kv)[:, None], other=0.0)
        block_barrier()
        k_tile.store(k)
        fence_async_shared()
        block_barrier()
        none = gl.zeros([HALF, COLUMNS], gl.float32, SCORES)
        token = warpgroup_mma(k_tile, q_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        offs_kv = kv + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
        scale = gl.load(scale_ptr + offs_kv, mask=offs_kv < end_kv, other=0.0)[:, None]
        scores = warpgroup_mma_wait(0, deps=[token])
        logits = sum_heads(scores, weights, scale, HEADS, LOGITS)
        mask = (offs_kv < end_kv)[:, None] & (offs_q == 0)[None, :]
        gl.store(row_ptr + offs_kv[:, None] + offs_q[None, :], logits, mask=mask)


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "stride"])
def _rescue_kernel(
    q_ptr, k_ptr, scale_ptr, weights_ptr, start_ptr, end_ptr, failed_ptr, scratch_ptr, out_ptr,
    num_rows, num_keys, stride,
    TOPK: gl.constexpr, WORDS: gl.constexpr, SORTED: gl.constexpr, HEADS: gl.constexpr,
    COLUMNS: gl.constexpr, DIM: gl.constexpr, DEPTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Program after program, the rows that failed; scratch: [programs, stride] fp32."""
    # first and largest, so that it begins at word 0
    memory = gl.allocate_shared_memory(
        gl.int32, [2 * WORDS // BINS + 1, BINS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bins = memory.index(2 * WORDS // BINS)
    BIN_LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    bins.store(gl.zeros([BINS], gl.int32, BIN_LAYOUT))
    element = gl.load(q_ptr)  # for its type
    q_tile = gl.allocate_shared_memory(element.dtype, [COLUMNS, DIM], LAYOUT)
    k_tile = gl.allocate_shared_memory(element.dtype, [HALF, DIM], LAYOUT)
    scratch_row = scratch_ptr + gl.program_id(0).to(gl.int64) * stride
    for number in range(gl.program_id(0), num_rows, gl.num_programs(0)):
        row = gl.to_tensor(number)
        if gl.load(failed_ptr + row) != 0:
            start = gl.minimum(gl.maximum(gl.load(start_ptr + row), 0), num_keys)
            end = gl.maximum(gl.minimum(gl.load(end_ptr + row), num_keys), start)
            _score_row(
                q_tile, k_tile, q_ptr, k_ptr, scale_ptr, weights_ptr, scratch_row, row, num_rows,
                start, end, HEADS, COLUMNS, DIM, DEPTH,
            )  # fmt: skip
            block_barrier()
            row_ptr, base, first, limit = locate_row(
                scratch_row - row.to(gl.int64) * stride, start_ptr, end_ptr, row, num_keys, stride,
                VECTOR,
            )  # fmt: skip
            finish_row(
                bins, gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), row_ptr,
                base, first, limit, out_ptr + row.to(gl.int64) * TOPK,
                TOPK, WORDS, SORTED, 0, VECTOR, ELEMENTS, NUM_WARPS,
            )  # fmt: skip
            block_barrier()
    memory._keep_alive()


def rescue_rows(
    tensors: tuple[Tensor, ...], failed: Tensor, out: Tensor, *, sorted_indices: bool,
    workspace_bytes: int,
) -> None:  # fmt: skip
    """Write the rows of `out` whose `failed` is not 0; `tensors` are those of `ragged_logits`."""
    index_q, index_k, *_ = tensors
    (num_queries, heads, dim), num_keys = index_q.shape, index_k.shape[0]
    stride = -(-num_keys // BLOCK_KV) * BLOCK_KV
    num_sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    programs = max(1, min(num_sms, num_queries, workspace_bytes // (4 * stride)))
    scratch = torch.empty(programs, stride, device=index_q.device)
    _rescue_kernel[(programs,)](
        *tensors, failed, scratch, out, num_queries, num_keys, stride,
        TOPK=out.shape[1], WORDS=list_words(out.shape[1]), SORTED=sorted_indices, HEADS=heads,
        COLUMNS=choose_columns(heads), DIM=dim, DEPTH=32 // index_q.itemsize,
        LAYOUT=tile_layout(index_q.dtype), num_warps=4,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape."""
    dtype, heads = torch.float8_e4m3fn, 64
    fp32, int32, byte = "*fp32:16", "*i32:16", "*fp8e4nv:16"
    return [
        CompileCase(
            name="rescued_rows",
            kernel=_rescue_kernel,
            signature={
                "q_ptr": byte, "k_ptr": byte, "scale_ptr": fp32, "weights_ptr": fp32,
                "start_ptr": int32, "end_ptr": int32, "failed_ptr": int32, "scratch_ptr": fp32,
                "out_ptr": int32, "num_rows": "i32", "num_keys": "i32", "stride": "i32:16",
            },
            constexprs={
                "TOPK": 2048, "WORDS": list_words(2048), "SORTED": False, "HEADS": heads,
                "COLUMNS": choose_columns(heads), "DIM": 128, "DEPTH": 32 // dtype.itemsize,
                "LAYOUT": tile_layout(dtype),
            },
            options={"num_warps": 4},
            must_have={"QGMMA.64x128x32": 4},
        )
    ]  # fmt: skip
