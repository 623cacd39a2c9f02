"""Index logits over a paged cache on Hopper, in Gluon: four consumers and a loader by TMA.

A program is launched for each SM and takes an equal share of the visits of sequences to tiles of 64
keys (`visible_tiles.py`), worked out by itself from the lengths: one long sequence among short ones
leaves no SM idle, and no schedule is made beforehand.

    loader     1 warp    the new tokens' queries, then tile after tile of keys into a ring
    consumers  4 warps   four of them: products of 64 keys, sum over heads, store

With few queries consumers take the tiles in turn, with many each has columns of its own
(`page_tiles.py`). Bound by reading 132 bytes a key for one or two queries of 64 heads, from then on
by the sums.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.index_arguments import check_paged_arguments
from dsa_bench.kernels.logit_scores import logit_layout, score_layout, sum_heads
from dsa_bench.kernels.logit_tiles import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    HEADS_TAKEN,
    LOADER_REGISTERS,
    descriptor_types,
)
from dsa_bench.kernels.page_tiles import (
    MAX_SEQ_LEN_Q,
    TILE_KEYS,
    PagedKeys,
    allocate_page_tiles,
    load_pages,
    page_descriptors,
    plan_tiles,
    wait_for_share,
)
from dsa_bench.kernels.visible_tiles import Ranges, visible_tiles


@gluon.jit
def _score(
    weights_ptr, logits_ptr, ranges, tiles,
    HEADS: gl.constexpr, HAS_SCALE: gl.constexpr, WHO: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Piece after piece the logits of consumer WHO: its group's columns of its way's tiles."""
    COLUMNS: gl.constexpr = tiles.q.shape[1]
    KEYS: gl.constexpr = tiles.k.shape[1]
    GROUP: gl.constexpr = WHO % tiles.GROUPS
    WAY: gl.constexpr = WHO // tiles.GROUPS
    WAYS: gl.constexpr = CONSUMERS // tiles.GROUPS
    FIRST_Q: gl.constexpr = GROUP * (COLUMNS // HEADS)
    offs_c = gl.arange(0, COLUMNS, gl.SliceLayout(0, SCORES))
    block, skipped, visits = wait_for_share(tiles)
    n = 0
    piece = 0
    while visits > 0:
        first, end = visible_tiles(ranges, block)
        first = first + skipped
        end = gl.minimum(end, first + visits)
        if first < end:
            query = block * ranges.BLOCK_Q + FIRST_Q
            exists = FIRST_Q + offs_c // HEADS < ranges.BLOCK_Q
            weights = gl.load(weights_ptr + query * HEADS + offs_c, mask=exists, other=0.0)
            row_ptr = logits_ptr + query.to(gl.int64) * ranges.num_keys
            slot = piece % tiles.Q_SLOTS
            mbarrier.wait(tiles.q_ready.index(slot), piece // tiles.Q_SLOTS & 1)
            q = tiles.q.index(slot * tiles.GROUPS + GROUP).permute((1, 0))
            # the program's n-th tile is way n % WAYS's
            for tile in range(first + ((WAY - n) & (WAYS - 1)), end, WAYS):
                number = n + tile - first
                stage = number % tiles.STAGES
                mbarrier.wait(tiles.k_ready.index(stage), number // tiles.STAGES & 1)
                none = gl.zeros([KEYS, COLUMNS], gl.float32, SCORES)
                token = warpgroup_mma(tiles.k.index(stage), q, none, use_acc=False, is_async=True)
                scale = _load_scale(tiles, stage, HEADS, HAS_SCALE, SCORES)
                scores = warpgroup_mma_wait(0, deps=[token])
                mbarrier.arrive(tiles.k_free.index(stage), count=1)
                _store(
                    row_ptr, ranges.num_keys, scores, weights, scale, tile * KEYS,
                    HEADS, ranges.BLOCK_Q - FIRST_Q, SCORES,
                )  # fmt: skip
            mbarrier.arrive(tiles.q_free.index(slot), count=1)
            n += end - first
            piece += 1
        visits = visits - (end - first)
        skipped = 0
        block = block + 1


@gluon.constexpr_function
def keys_layout(columns, heads, scores):
    """Of the keys of a tile where its logits are: a thread sums up one query alone, or shares them
    with its quad."""
    return gl.SliceLayout(1, scores if columns == heads else logit_layout(columns // heads))


@gluon.jit
def _load_scale(
    tiles, stage, HEADS: gl.constexpr, HAS_SCALE: gl.constexpr, SCORES: gl.constexpr
):  # fmt: skip
    LAYOUT: gl.constexpr = keys_layout(tiles.q.shape[1], HEADS, SCORES)
    if HAS_SCALE:
        return tiles.scales.index(stage).load(LAYOUT)
    return gl.full([tiles.k.shape[1]], 1.0, gl.float32, LAYOUT)


@gluon.jit
def _store(
    row_ptr, stride, scores, weights, scale, kv,
    HEADS: gl.constexpr, QUERIES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Logits of a tile from key kv on, of the first QUERIES of the queries in `scores`.

    No bound for keys: a row ends with a page.
    """
    OWN: gl.constexpr = scores.shape[1] // HEADS
    KEYS: gl.constexpr = scores.shape[0]
    LAYOUT: gl.constexpr = keys_layout(scores.shape[1], HEADS, SCORES)
    offs_kv = kv + gl.arange(0, KEYS, LAYOUT)
    if OWN == 1:
        logits = gl.sum(gl.maximum(scores, 0.0) * weights[None, :], 1)
        gl.store(row_ptr + offs_kv, logits * scale)
    else:
        LOGITS: gl.constexpr = logit_layout(OWN)
        logits = sum_heads(scores, weights, scale[:, None], HEADS, LOGITS)
        offs_q = gl.arange(0, OWN, gl.SliceLayout(0, LOGITS))
        ptrs = row_ptr + offs_q.to(gl.int64)[None, :] * stride + offs_kv[:, None]
        gl.store(ptrs, logits, mask=(offs_q < QUERIES)[None, :])


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["num_queries", "num_keys", "max_pages"])
def _paged_logits_kernel(
    q_desc, k_desc, scales_ptr, weights_ptr, lens_ptr, table_ptr, logits_ptr,
    num_queries, num_keys, max_pages,
    SEQ_LEN_Q: gl.constexpr, HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DEPTH: gl.constexpr,
    GROUPS: gl.constexpr, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """DEPTH: what one product sums over, 32 in fp8 and 16 in bf16."""
    SCORES: gl.constexpr = score_layout(q_desc.block_type.shape[0], DEPTH)
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    ranges = Ranges(lens_ptr, lens_ptr, num_queries, num_keys, SEQ_LEN_Q, KEYS, 1, True)
    pages = PagedKeys(table_ptr, scales_ptr, max_pages, PAGE_SIZE, HAS_SCALE)
    tiles = allocate_page_tiles(q_desc, k_desc, GROUPS, Q_SLOTS, STAGES, HAS_SCALE)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_score, (weights_ptr, logits_ptr, ranges, tiles, HEADS, HAS_SCALE, 0, SCORES)),
            (_score, (weights_ptr, logits_ptr, ranges, tiles, HEADS, HAS_SCALE, 1, SCORES)),
            (_score, (weights_ptr, logits_ptr, ranges, tiles, HEADS, HAS_SCALE, 2, SCORES)),
            (_score, (weights_ptr, logits_ptr, ranges, tiles, HEADS, HAS_SCALE, 3, SCORES)),
            (load_pages, (q_desc, k_desc, pages, ranges, tiles, HEADS)),
        ],
        [4, 4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def paged_logits(
    index_q: Tensor,
    index_cache: Tensor,
    index_weights: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    page_size: int,
) -> Tensor:
    """Index logits of new tokens; formula, shapes and conventions as in `paged_indexer.py`.

    1 … 8 new tokens a sequence, 8, 16, 32 or 64 heads, pages of a multiple of 64 keys; all
    contiguous. seq_lens are clamped to [0, max_pages · page_size].
    """
    check_paged_arguments(index_q, index_cache, index_weights, seq_lens, block_table, page_size)
    batch_size, seq_len_q, heads, _ = index_q.shape
    if heads not in HEADS_TAKEN or not 0 < seq_len_q <= MAX_SEQ_LEN_Q or page_size % TILE_KEYS:
        raise ValueError(
            f"index_heads must be in {HEADS_TAKEN}, seq_len_q 1 … {MAX_SEQ_LEN_Q} and page_size a"
            f" multiple of {TILE_KEYS}, got {heads}, {seq_len_q}, {page_size}"
        )
    num_keys = block_table.shape[1] * page_size
    logits = torch.empty(batch_size, seq_len_q, num_keys, device=index_q.device)
    if logits.numel() == 0 or index_cache.numel() == 0:
        return logits
    plan = plan_tiles(seq_len_q, heads, index_q.dtype)
    is_fp8 = index_q.itemsize == 1
    num_sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    _paged_logits_kernel[(num_sms,)](
        *page_descriptors(index_q, index_cache, plan),
        index_cache.view(torch.float32) if is_fp8 else index_weights, index_weights, seq_lens,
        block_table, logits, batch_size * seq_len_q, num_keys, block_table.shape[1],
        SEQ_LEN_Q=seq_len_q, HEADS=heads, PAGE_SIZE=page_size, DEPTH=32 // index_q.itemsize,
        GROUPS=plan.groups, Q_SLOTS=plan.q_slots, STAGES=plan.stages, HAS_SCALE=is_fp8,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return logits


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape: the products of one, two and eight new tokens, and few heads."""
    cases = []
    for dtype, heads, seq_len_q, instruction in (
        (torch.float8_e4m3fn, 64, 1, "QGMMA.64x64x32"),
        (torch.float8_e4m3fn, 64, 2, "QGMMA.64x128x32"),
        (torch.float8_e4m3fn, 64, 8, "QGMMA.64x128x32"),
        (torch.float8_e4m3fn, 8, 8, "QGMMA.64x64x32"),
        (torch.bfloat16, 64, 1, "HGMMA.64x64x16"),
        (torch.bfloat16, 64, 4, "HGMMA.64x128x16"),
    ):
        plan, is_fp8 = plan_tiles(seq_len_q, heads, dtype), dtype.itemsize == 1
        fp32, int32 = "*fp32:16", "*i32:16"
        cases.append(
            CompileCase(
                name=f"paged_logits[{'fp8' if is_fp8 else 'bf16'}, {heads}, q{seq_len_q}]",
                kernel=_paged_logits_kernel,
                signature={
                    **descriptor_types(dtype, plan.columns, TILE_KEYS),
                    "scales_ptr": fp32, "weights_ptr": fp32,
                    "lens_ptr": int32, "table_ptr": int32, "logits_ptr": fp32,
                    "num_queries": "i32", "num_keys": "i32", "max_pages": "i32",
                },
                constexprs={
                    "SEQ_LEN_Q": seq_len_q, "HEADS": heads, "PAGE_SIZE": 64,
                    "DEPTH": 32 // dtype.itemsize, "GROUPS": plan.groups,
                    "Q_SLOTS": plan.q_slots, "STAGES": plan.stages, "HAS_SCALE": is_fp8,
                },
                options={"num_warps": 4},
                must_have={instruction: 16 * dtype.itemsize, "UTMALDG": 1 + plan.groups},
                # lengths of many queries, once, while the loader counts visits
                max_spill_bytes=352 if seq_len_q == 8 else 0,
            )
        )  # fmt: skip
    return cases
