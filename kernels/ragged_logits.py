"""Index logits over contiguous keys on Hopper, in Gluon: four consumers and a loader by TMA.

A program is launched for each SM and takes an equal share of the visits of blocks of queries to
tiles of 128 keys (`visible_tiles.py`):

    loader     1 warp    the block's queries, then tile after tile of keys into a ring
    consumers  4 warps   four of them, each with 128 columns of its own, queries × heads: products
                         of 64 keys, sum over heads, store

While one consumer has the tensor cores the others sum up; they need no turns. All take the same
tiles of keys, so that a key comes from L2 once for 8 queries of 64 heads. Bound by power: on an
H100 at 16K keys the tensor cores are busy 68 % of the time, at 1.72 of 1.98 GHz. What was tried and
what it gave: `docs/kernels/indexer.md`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.index_arguments import check_arguments
from dsa_bench.kernels.logit_scores import score, score_layout
from dsa_bench.kernels.logit_tiles import (
    BLOCK_KV,
    CONSUMER_REGISTERS,
    HEADS_TAKEN,
    INDEX_DIM,
    LOADER_REGISTERS,
    allocate_tiles,
    choose_ring,
    load,
    ranges_of,
    tile_descriptors,
    tile_types,
)
from dsa_bench.kernels.seesaw_tiles import opaque_zero
from dsa_bench.kernels.visible_tiles import share_of_program


@aggregate
class Rows:
    """Where logits go."""

    logits_ptr: gl.tensor
    stride: gl.tensor

    @gluon.constexpr_function
    def __init__(self, logits_ptr, stride):
        self.logits_ptr = logits_ptr
        self.stride = stride


@aggregate
class Place:
    """The first query of a consumer, and those of its queries that exist."""

    query: gl.tensor
    exists: gl.tensor

    @gluon.constexpr_function
    def __init__(self, query, exists):
        self.query = query
        self.exists = exists


@gluon.jit
def _begin_rows(rows, ranges, query, part, QUERIES: gl.constexpr, LOGITS: gl.constexpr):
    offs_q = query + gl.arange(0, QUERIES, gl.SliceLayout(0, LOGITS))
    return Place(query, (offs_q < ranges.num_queries)[None, :])


@gluon.jit
def _store(rows, place, logits, kv, LOGITS: gl.constexpr):
    QUERIES: gl.constexpr = logits.shape[1]
    offs_kv = kv + gl.arange(0, logits.shape[0], gl.SliceLayout(1, LOGITS))
    offs_q = place.query + gl.arange(0, QUERIES, gl.SliceLayout(0, LOGITS))
    if QUERIES > 2:
        # worked out anew: kept through the loop, pointers of so many rows are spilled
        offs_q += opaque_zero()
    ptrs = rows.logits_ptr + offs_q.to(gl.int64)[None, :] * rows.stride + offs_kv[:, None]
    # no bound for keys: rows end behind a whole tile
    gl.store(ptrs, logits, mask=place.exists)
    return place


@gluon.jit
def _end_rows(rows, place):
    pass


@gluon.jit
def _score(
    weights_ptr, scale_ptr, rows, share, tiles,
    HEADS: gl.constexpr, WHO: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    score(
        weights_ptr, scale_ptr, rows, share, tiles, _begin_rows, _store, _end_rows,
        HEADS, WHO, SCORES,
    )  # fmt: skip


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["num_queries", "num_keys", "stride"])
def _logits_kernel(
    q_desc, k_desc, scale_ptr, weights_ptr, start_ptr, end_ptr, logits_ptr,
    num_queries, num_keys, stride,
    HEADS: gl.constexpr, DEPTH: gl.constexpr, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr,
    KEY_STEP: gl.constexpr,
):  # fmt: skip
    """DEPTH: what one product sums over, 32 in fp8 and 16 in bf16."""
    SCORES: gl.constexpr = score_layout(q_desc.block_type.shape[0], DEPTH)
    ranges = ranges_of(start_ptr, end_ptr, num_queries, num_keys, q_desc, k_desc, HEADS, KEY_STEP)
    share = share_of_program(ranges, 1)
    tiles = allocate_tiles(q_desc, k_desc, Q_SLOTS, STAGES)
    fence_async_shared()
    rows = Rows(logits_ptr, stride)
    gl.warp_specialize(
        [
            (_score, (weights_ptr, scale_ptr, rows, share, tiles, HEADS, 0, SCORES)),
            (_score, (weights_ptr, scale_ptr, rows, share, tiles, HEADS, 1, SCORES)),
            (_score, (weights_ptr, scale_ptr, rows, share, tiles, HEADS, 2, SCORES)),
            (_score, (weights_ptr, scale_ptr, rows, share, tiles, HEADS, 3, SCORES)),
            (load, (q_desc, k_desc, share, tiles)),
        ],
        [4, 4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def ragged_logits(
    index_q: Tensor,
    index_k: Tensor,
    index_k_scale: Tensor,
    index_weights: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    *,
    logits_dtype: torch.dtype = torch.float32,
    key_step: int = 1,
) -> Tensor:
    """Index logits; formula and conventions as in `indexer.py`.

    Args:
        index_q: [seq_len_q, index_heads, 128] e4m3 or bf16, contiguous; 8, 16, 32 or 64 heads.
        index_k: [seq_len_kv, 128], the same dtype, contiguous.
        index_k_scale: [seq_len_kv] fp32.
        index_weights: [seq_len_q, index_heads] fp32, contiguous.
        kv_start, kv_end: [seq_len_q] int32; clamped to [0, seq_len_kv].
        logits_dtype: fp32 or bf16.
        key_step: column n of the logits is that of key n · key_step; others are left out.
    Returns:
        [seq_len_q, keys]; a row begins every `keys` elements, rounded up to 128.
    """
    check_arguments(index_q, index_k, index_k_scale, index_weights, kv_start, kv_end)
    (num_queries, heads, dim), num_keys = index_q.shape, -(-index_k.shape[0] // key_step)
    if heads not in HEADS_TAKEN or dim != INDEX_DIM:
        raise ValueError(
            f"index_heads must be in {HEADS_TAKEN} and index_dim 128, got {heads}, {dim}"
        )
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"logits_dtype must be float32 or bfloat16, got {logits_dtype}")
    stride = -(-num_keys // BLOCK_KV) * BLOCK_KV
    logits = torch.empty(num_queries, stride, dtype=logits_dtype, device=index_q.device)
    if logits.numel() == 0:
        return logits[:, :num_keys]
    ring = choose_ring(index_q.dtype)
    num_sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    _logits_kernel[(num_sms,)](
        *tile_descriptors(index_q, index_k[::key_step]), index_k_scale, index_weights,
        kv_start, kv_end, logits, num_queries, num_keys, stride,
        HEADS=heads, DEPTH=32 // index_q.itemsize, Q_SLOTS=ring.q_slots, STAGES=ring.stages,
        KEY_STEP=key_step, num_warps=4,
    )  # fmt: skip
    return logits[:, :num_keys]


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape in fp8 and bf16, and the fewest heads, with the most queries a block."""
    cases = []
    for dtype, heads, instruction in (
        (torch.float8_e4m3fn, 64, "QGMMA.64x128x32"),
        (torch.float8_e4m3fn, 8, "QGMMA.64x64x32"),
        (torch.float8_e4m3fn, 16, "QGMMA.64x64x32"),
        (torch.float8_e4m3fn, 32, "QGMMA.64x128x32"),
        (torch.bfloat16, 64, "HGMMA.64x128x16"),
    ):
        ring = choose_ring(dtype)
        cases.append(
            CompileCase(
                name=f"ragged_logits[{'fp8' if dtype.itemsize == 1 else 'bf16'}, {heads}]",
                kernel=_logits_kernel,
                signature={
                    **tile_types(dtype, heads), "scale_ptr": "*fp32:16", "weights_ptr": "*fp32:16",
                    "start_ptr": "*i32:16", "end_ptr": "*i32:16", "logits_ptr": "*fp32:16",
                    "num_queries": "i32", "num_keys": "i32", "stride": "i32",
                },
                constexprs={
                    "HEADS": heads, "DEPTH": 32 // dtype.itemsize,
                    "Q_SLOTS": ring.q_slots, "STAGES": ring.stages, "KEY_STEP": 1,
                },
                options={"num_warps": 4},
                must_have={instruction: 32 * dtype.itemsize, "UTMALDG": 5, "SHFL.BFLY": 24},
                # the number of a thread and what hangs on it: one load in 355 instructions
                max_spill_bytes=96,
            )
        )  # fmt: skip
    return cases
