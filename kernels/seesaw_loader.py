"""The loader of a program of `seesaw.py`, for bf16 rows: query and keys by cp.async.

Four warps; each copy is 16 bytes a thread, and a thread arrives at a half block's barrier when its
copies so far have landed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_H,
    BLOCK_KV,
    HALF_V,
    K0_LEFT,
    K0_RIGHT,
    K1_LEFT,
    K1_RIGHT,
    QUERY_FREE,
    QUERY_READY,
    ROPE,
    is_key,
    load_key_block,
)

BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
HALVES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Of copies: 16 bytes a thread, 8 threads a 128-byte line, by four warps."""

# triton 3.9 renamed the copy
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@aggregate
class Query:
    """64 heads of one query."""

    ptr: gl.tensor  # [heads, 576 or 512] bf16, at the program's first head
    stride_head: gl.tensor
    num_heads: gl.tensor  # from the first head on; only looked at where HEADS_MASKED
    HEADS_MASKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, stride_head, num_heads, HEADS_MASKED):
        self.ptr = ptr
        self.stride_head = stride_head
        self.num_heads = num_heads
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)


@gluon.jit
def load_query(query, tiles, queries_before):
    """The query tiles by cp.async, by four warps; heads that do not exist become 0."""
    mbarrier.wait(tiles.query.index(QUERY_FREE), (queries_before & 1) ^ 1)
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, HALVES))
    exists = offs_h >= 0
    if query.HEADS_MASKED:
        exists = offs_h < query.num_heads
    ptr, stride = query.ptr, query.stride_head
    copy_rows(tiles.q_left.index(0), ptr, stride, offs_h, exists, 0, HALF_V, HALVES)
    copy_rows(tiles.q_right.index(0), ptr, stride, offs_h, exists, HALF_V, HALF_V, HALVES)
    if tiles.HAS_ROPE:
        copy_rows(tiles.q_rope.index(0), ptr, stride, offs_h, exists, 2 * HALF_V, ROPE, HALVES)
    async_copy.mbarrier_arrive(tiles.query.index(QUERY_READY), increment_count=False)


@gluon.jit
def copy_rows(
    tile,
    kv_ptr,
    stride_row,
    rows,
    valid,
    FIRST: gl.constexpr,
    WIDTH: gl.constexpr,
    LAYOUT: gl.constexpr,
    VECTOR: gl.constexpr = 8,
):
    """Columns FIRST … of the rows -> tile [64, WIDTH], by cp.async of VECTOR elements, 16 bytes, a
    thread; 0 where not valid."""
    offs_d = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    offs_d = gl.max_contiguous(gl.multiple_of(offs_d, VECTOR), VECTOR)
    ptrs = kv_ptr + (rows.to(gl.int64) * stride_row)[:, None] + offs_d[None, :]
    copy_to_shared(tile, ptrs, mask=valid[:, None])


@gluon.jit
def load_bf16_rows(kv_ptr, stride_row, keys, tiles, pairs_before):
    """The loader for bf16 rows: half blocks in the order in which the consumers touch them."""
    ROWS: gl.constexpr = gl.SliceLayout(1, HALVES)
    next0 = load_key_block(keys, 0, ROWS)
    next1 = load_key_block(keys, BLOCK_KV, ROWS)
    for i in range(keys.STEPS):
        phase = ((pairs_before + i) & 1) ^ 1
        valid0 = is_key(next0, keys.num_keys)
        valid1 = is_key(next1, keys.num_keys)
        rows0 = gl.where(valid0, next0, 0)
        rows1 = gl.where(valid1, next1, 0)
        # the indices of the next pair travel while this one is gathered
        following = gl.minimum(i + 1, keys.STEPS - 1) * (2 * BLOCK_KV)
        next0 = load_key_block(keys, following, ROWS)
        next1 = load_key_block(keys, following + BLOCK_KV, ROWS)
        _load_left(kv_ptr, stride_row, rows0, valid0, tiles, phase, 0, K0_LEFT)
        _load_right(kv_ptr, stride_row, rows1, valid1, tiles, phase, 1, K1_RIGHT)
        _load_right(kv_ptr, stride_row, rows0, valid0, tiles, phase, 0, K0_RIGHT)
        _load_left(kv_ptr, stride_row, rows1, valid1, tiles, phase, 1, K1_LEFT)


@gluon.jit
def load_bf16_list(kv_ptr, stride_row, keys, tiles):
    """The loader of a program with one list of keys."""
    load_bf16_rows(kv_ptr, stride_row, keys, tiles, 0)
    async_copy.wait_group(0)


@gluon.jit
def _load_left(
    kv_ptr, stride_row, rows, valid, tiles, phase, BLOCK: gl.constexpr, BARRIER: gl.constexpr
):
    mbarrier.wait(tiles.free.index(BARRIER), phase)
    copy_rows(tiles.k_left.index(BLOCK), kv_ptr, stride_row, rows, valid, 0, HALF_V, HALVES)
    async_copy.mbarrier_arrive(tiles.ready.index(BARRIER), increment_count=False)


@gluon.jit
def _load_right(
    kv_ptr, stride_row, rows, valid, tiles, phase, BLOCK: gl.constexpr, BARRIER: gl.constexpr
):
    """With the rope columns."""
    mbarrier.wait(tiles.free.index(BARRIER), phase)
    copy_rows(tiles.k_right.index(BLOCK), kv_ptr, stride_row, rows, valid, HALF_V, HALF_V, HALVES)
    if tiles.HAS_ROPE:
        copy_rows(
            tiles.k_rope.index(BLOCK), kv_ptr, stride_row, rows, valid, 2 * HALF_V, ROPE, HALVES
        )
    async_copy.mbarrier_arrive(tiles.ready.index(BARRIER), increment_count=False)
