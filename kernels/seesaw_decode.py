"""Sparse decode over a bf16 cache, for Hopper in Gluon: split over the selected keys, one program a
query, 64 heads and a split.

The consumers are `seesaw.py`'s, the loader is its gather by cp.async. With more than one split,
partial outputs (fp32) and log2 sums go through memory and `combine_splits.py`; with one split the
program writes the result itself. Any number of heads and queries.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_splits import combine_splits
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.decode_splits import MAX_SPLITS, PARTIAL_ROWS
from dsa_bench.kernels.paging import HEAD_DIM_V
from dsa_bench.kernels.seesaw import Result, attend_left, attend_right
from dsa_bench.kernels.seesaw_loader import Query, load_bf16_list, load_query
from dsa_bench.kernels.seesaw_tiles import KeyList, allocate_tiles

BLOCK_H = 64
PAIR = 128
CONSUMER_REGISTERS, LOADER_REGISTERS = 224, 56
"""A thread: 4 · (2 consumers + loader) must not exceed 12 · 168."""


# a 1 would be specialised to a constant, which KeyList refuses
@gluon.jit(do_not_specialize=["num_slots", "topk"])
def _seesaw_decode_kernel(
    q_ptr, cache_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    num_slots, num_heads, topk, qk_scale_log2, stride_q_row, stride_q_head, stride_slots_row,
    NUM_PAIRS: gl.constexpr, HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_RAGGED: gl.constexpr, HEADS_MASKED: gl.constexpr, IS_PARTIAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: one query, 64 of its heads, one split of its slots."""
    head_tiles = (num_heads + 63) // 64
    query_number = gl.program_id(0) // head_tiles
    row = query_number.to(gl.int64)
    first_head = (gl.program_id(0) % head_tiles) * 64
    length = topk
    if HAS_LENS:
        # not below 0: the begin of a split is taken off
        length = gl.maximum(gl.minimum(gl.load(lens_ptr + row), topk), 0)
    begin = gl.program_id(1) * (NUM_PAIRS * 128)
    keys = KeyList(
        slots_ptr + row * stride_slots_row + begin, length - begin, num_slots, NUM_PAIRS, IS_RAGGED
    )
    num_rows = gl.num_programs(0) // head_tiles * num_heads
    first_row = gl.program_id(1) * num_rows + query_number * num_heads + first_head
    result = Result(
        out_ptr, lse_ptr, lse_ptr, sink_ptr, first_row, first_head, num_heads,
        IS_PARTIAL, False, HAS_SINK, HEADS_MASKED,
    )  # fmt: skip
    tiles = allocate_tiles(HAS_ROPE=True)
    q_start = q_ptr + row * stride_q_row + first_head * stride_q_head
    query = Query(q_start, stride_q_head, num_heads - first_head, HEADS_MASKED)
    load_query(query, tiles, 0)
    gl.warp_specialize(
        [
            (attend_left, (tiles, keys, result, qk_scale_log2, 0, 0)),
            (attend_right, (tiles, keys, result, qk_scale_log2, 0, 0)),
            (load_bf16_list, (cache_ptr, 576, keys, tiles)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def choose_splits(num_queries: int, num_heads: int, topk: int, num_sms: int) -> int:
    """Splits that need the fewest rounds of the key loop on the busiest SM, counting a program's
    start and end with merging as three pairs of blocks."""
    pairs = -(-topk // PAIR)
    programs = num_queries * -(-num_heads // BLOCK_H)
    best, best_time = 1, float("inf")
    for num_splits in range(1, min(pairs, MAX_SPLITS) + 1):
        pairs_a_split = -(-pairs // num_splits)
        rows = num_splits * num_queries * num_heads
        is_too_much = num_splits > 1 and rows > PARTIAL_ROWS
        if is_too_much or num_splits * pairs_a_split - pairs >= pairs_a_split:
            continue
        waves = -(-programs * num_splits // num_sms)
        time = waves * (pairs_a_split + 3) + (num_splits > 1)
        if time < best_time:
            best, best_time = num_splits, time
    return best


def attend_bf16_rows(
    q: Tensor, kv_cache: Tensor, topk_slots: Tensor, sm_scale: float, attn_sink: Tensor | None,
    topk_lens: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """`sparse_decode` of a cache [num_pages, page_size, 576] bf16 -> out, lse; for arguments that
    were checked."""
    (batch_size, seq_len_q, num_heads, _), topk = q.shape, topk_slots.shape[2]
    queries = batch_size * seq_len_q
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    num_splits = choose_splits(queries, num_heads, topk, num_sms)
    is_split = num_splits > 1
    partial_out, partial_lse = out, lse
    if is_split:
        rows = num_splits * queries * num_heads
        partial_out = torch.empty(rows, HEAD_DIM_V, device=q.device)
        partial_lse = torch.empty(rows, device=q.device)
    cache = kv_cache.flatten(0, 1)
    num_pairs = -(-topk // (PAIR * num_splits))
    _seesaw_decode_kernel[(queries * -(-num_heads // BLOCK_H), num_splits)](
        q, cache, topk_slots,
        topk_lens if topk_lens is not None else topk_slots,
        attn_sink if attn_sink is not None else lse, partial_out, partial_lse,
        cache.shape[0], num_heads, topk, sm_scale * LOG2_E,
        q.stride(1), q.stride(2), topk_slots.stride(1),
        NUM_PAIRS=num_pairs, HAS_LENS=topk_lens is not None,
        HAS_SINK=attn_sink is not None and not is_split,
        IS_RAGGED=topk_lens is not None or topk != num_pairs * PAIR * num_splits,
        HEADS_MASKED=num_heads % BLOCK_H != 0, IS_PARTIAL=is_split,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS, num_warps=4,
    )  # fmt: skip
    if is_split:
        combine_splits(partial_out, partial_lse, num_splits, attn_sink, out, lse)


def compile_cases() -> list[CompileCase]:
    """Split and whole, with and without every flag."""
    bf16, fp32, int32, size = "*bf16:16", "*fp32:16", "*i32:16", "i32:16"
    cases = []
    for is_split, flags in ((False, True), (True, False)):
        signature = {
            "q_ptr": bf16, "cache_ptr": bf16, "slots_ptr": int32, "lens_ptr": int32,
            "sink_ptr": fp32, "out_ptr": fp32 if is_split else bf16, "lse_ptr": fp32,
            "num_slots": "i32", "num_heads": size, "topk": "i32", "qk_scale_log2": "fp32",
            "stride_q_row": size, "stride_q_head": size, "stride_slots_row": size,
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"seesaw_decode[{'split' if is_split else 'whole'}]",
                kernel=_seesaw_decode_kernel,
                signature=signature,
                constexprs={
                    **dict.fromkeys(("IS_RAGGED", "HEADS_MASKED", "HAS_LENS"), flags),
                    "HAS_SINK": flags and not is_split,
                    "NUM_PAIRS": 4,
                    "IS_PARTIAL": is_split,
                    "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
                    "LOADER_REGISTERS": LOADER_REGISTERS,
                },
                options={"num_warps": 4},
                must_have={"HGMMA.64x256": 16, "HGMMA.64x64": 72},
            )
        )
    return cases
