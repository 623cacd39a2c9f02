"""Sparse decode over a cache of 656-byte rows, for Hopper in Gluon: three roles in four warpgroups.

A program is launched for each SM and takes one piece of work, one split of the slots of a query for
16, 32 or 64 of its heads, after the other. A piece goes through its keys in blocks of 64:

    loader  4 warps   gathers the listed rows as they are into a ring of blocks, and the next query
    scores  4 warps   S = K·Qᵀ, weights P = 2^(S - reference) → ring of weights, and where the
                      reference grew the factor that outputs so far are to be multiplied by
    outputs 8 warps   Oᵀ = Oᵀ · factor + Vᵀ·P

Rows stay e4m3 in shared memory. Keys and values are turned to f16 in registers, on their way to the
tensor cores, which take a product's first operand from there: an e4m3 number is one of f16, two at
a time by one instruction, and a second multiplies both by the row's scale. bf16, whose range would
save what follows, takes six instructions a pair. Scales are divided by their row's largest, rounded
up to a power of two; that one comes back exactly, in a key's scores and weights. So a row's values
keep all their bits down to 2^-20 of its largest scale, and a row's weight down to 2^-20 of the
largest weight times scale: rows of zeros whose scale is 2^24 above the others' cost 0.3 %. Queries
become f16 too, each head with a power of two of its own; one that is not finite gives NaN, even to
a query without a valid slot.

Each role has a file: `decode_loader.py`, `decode_scores.py`, `decode_outputs.py`; what scores and
outputs do together before the blocks is in `decode_query.py`, what all share in `decode_tiles.py`.
Shared memory with 64 heads: query 72 KB, three blocks of rows 123 KB, two of weights 16 KB. What
was tried and what it gave: `docs/kernels/sparse_decode.md`.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_splits import combine_splits
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.decode_loader import load
from dsa_bench.kernels.decode_outputs import accumulate
from dsa_bench.kernels.decode_scores import score
from dsa_bench.kernels.decode_splits import MAX_SPLITS, PARTIAL_ROWS
from dsa_bench.kernels.decode_tiles import (
    OUTPUT_WARPS,
    Arguments,
    allocate_tiles,
    query_descriptors,
    query_types,
)
from dsa_bench.kernels.paging import HEAD_DIM_V

BLOCK_KV = 64
OUTPUT_REGISTERS = 168
LOADER_REGISTERS = {16: 32, 32: 32, 64: 24}
"""A thread, of the loader by the program's heads; what is left of 512, scores + twice the outputs +
loader, are the scores'. With 160 for the outputs ptxas runs their products one by one (C7512). With
64 heads and 24 for the loader instead of 32, 128 heads take 55.4 instead of 56.2 µs at batch 32 and
164.5 instead of 166.7 at 128; 16 heads at batch 32 29.7 instead of 29.1 (H100)."""
BLOCK_MICROSECONDS = {16: 2.2, 32: 1.8, 64: 2.2}
PIECE_MICROSECONDS = {16: 5.0, 32: 9.0, 64: 12.5}
"""Of a program by its heads, for a block of keys and for a piece around its blocks: fitted to
batches of 1, 32 and 128, 128 and 16 heads, 1 to 32 splits on an H100."""


@gluon.jit(do_not_specialize=["num_queries", "num_slots", "num_heads", "topk"])
def _row_decode_kernel(
    q_ptr, q_desc, rope_desc, cache_ptr, halves_ptr, scales_ptr, slots_ptr, lens_ptr, sink_ptr,
    out_ptr, lse_ptr, num_queries, num_slots, num_heads, topk, sm_scale_log2,
    NUM_BLOCKS: gl.constexpr, NUM_SPLITS: gl.constexpr, BLOCK_H: gl.constexpr,
    HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr, IS_RAGGED: gl.constexpr,
    HEADS_MASKED: gl.constexpr, IS_ONE_ROUND: gl.constexpr,
    OUTPUT_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: its three roles, piece after piece."""
    arguments = Arguments(
        q_ptr, cache_ptr, halves_ptr, scales_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
        num_queries, num_slots, num_heads, topk, sm_scale_log2,
        NUM_BLOCKS, NUM_SPLITS, BLOCK_H, HAS_LENS, HAS_SINK, IS_RAGGED, HEADS_MASKED, IS_ONE_ROUND,
    )  # fmt: skip
    tiles = allocate_tiles(BLOCK_H)
    gl.warp_specialize(
        [
            (score, (arguments, tiles)),
            (accumulate, (arguments, tiles)),
            (load, (arguments, q_desc, rope_desc, tiles)),
        ],
        [OUTPUT_WARPS, 4],
        [OUTPUT_REGISTERS, LOADER_REGISTERS],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8DecodeConfig:
    block_h: int
    """Heads of a program: 16, 32 or 64."""
    num_splits: int


def choose_config(num_queries: int, num_heads: int, topk: int, num_sms: int) -> Fp8DecodeConfig:
    """What takes the least time on the busiest SM, merging included. µs on an H100, topk 2048:

    queries × heads   64 heads a program   32                   16
    8 × 128           28.4 (8 splits)      27.8 (4), 32.2 (3)   35.3 (2)
    16 × 128          37.9 (4), 43.3 (3)   42.0 (2)
    64 × 128          85.2 (1), 111 (2)    124 (1)
    32 × 32                                31.7 (4)             35.5 (2), 47.8 (3)
    """
    blocks = -(-topk // BLOCK_KV)
    best, best_time = Fp8DecodeConfig(block_h=16, num_splits=1), float("inf")
    sizes = [h for h in (16, 32, 64) if h == 16 or h < 2 * num_heads]
    for block_h, num_splits in product(sizes, range(1, MAX_SPLITS + 1)):
        each = -(-blocks // num_splits)
        rows = num_splits * num_queries * num_heads
        if (num_splits - 1) * each >= blocks or (num_splits > 1 and rows > PARTIAL_ROWS):
            continue
        pieces = num_queries * -(-num_heads // block_h) * num_splits
        rounds = -(-pieces // num_sms)
        time = rounds * (each * BLOCK_MICROSECONDS[block_h] + PIECE_MICROSECONDS[block_h])
        if num_splits > 1:
            # a launch, and partial results at 3 TB/s
            time += 2.0 + rows * 4 * HEAD_DIM_V / 3e6
        if time < best_time:
            best, best_time = Fp8DecodeConfig(block_h=block_h, num_splits=num_splits), time
    return best


def attend_fp8_rows(
    q: Tensor, kv_cache: Tensor, topk_slots: Tensor, sm_scale: float, attn_sink: Tensor | None,
    topk_lens: Tensor | None, out: Tensor, lse: Tensor, *, config: Fp8DecodeConfig | None = None,
) -> None:  # fmt: skip
    """`sparse_decode` of a cache [num_pages, page_size, 656] uint8 -> out, lse; for arguments that
    were checked."""
    (batch_size, seq_len_q, num_heads, _), topk = q.shape, topk_slots.shape[2]
    queries = batch_size * seq_len_q
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    if config is None:
        config = choose_config(queries, num_heads, topk, num_sms)
    block_h, num_splits = config.block_h, config.num_splits
    partial_out, partial_lse = out.view(torch.int32), lse
    if num_splits > 1:
        rows = num_splits * queries * num_heads
        partial_out = torch.empty(rows, HEAD_DIM_V, device=q.device)
        partial_lse = torch.empty(rows, device=q.device)
    cache = kv_cache.flatten(0, 1)
    num_blocks = -(-topk // (BLOCK_KV * num_splits))
    num_pieces = queries * -(-num_heads // block_h) * num_splits
    _row_decode_kernel[(min(num_pieces, num_sms),)](
        q, *query_descriptors(q, block_h),
        cache.view(torch.int8), cache.view(torch.bfloat16), cache.view(torch.float32),
        topk_slots, topk_lens if topk_lens is not None else topk_slots,
        attn_sink if attn_sink is not None else lse, partial_out, partial_lse,
        queries, cache.shape[0], num_heads, topk, sm_scale * LOG2_E,
        NUM_BLOCKS=num_blocks, NUM_SPLITS=num_splits, BLOCK_H=block_h,
        HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None and num_splits == 1,
        IS_RAGGED=topk_lens is not None or topk != num_blocks * BLOCK_KV * num_splits,
        HEADS_MASKED=num_heads % block_h != 0, IS_ONE_ROUND=num_pieces <= num_sms,
        OUTPUT_REGISTERS=OUTPUT_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS[block_h],
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    if num_splits > 1:
        combine_splits(partial_out, partial_lse, num_splits, attn_sink, out, lse)


def compile_cases() -> list[CompileCase]:
    """Whole and split, 64 heads a program and fewer, with and without every flag."""
    bf16, fp32, int32 = "*bf16:16", "*fp32:16", "*i32:16"
    signature = {
        "q_ptr": bf16, "cache_ptr": "*i8:16", "halves_ptr": bf16, "scales_ptr": fp32,
        "slots_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32, "out_ptr": int32, "lse_ptr": fp32,
        "num_queries": "i32", "num_slots": "i32", "num_heads": "i32", "topk": "i32",
        "sm_scale_log2": "fp32",
    }  # fmt: skip
    cases = []
    # with 64 heads the scores spill two registers a block, the loader some that it rarely reads,
    # the outputs where they store, none in their loop
    for label, num_splits, block_h, flags, max_spill_bytes in (
        ("whole", 1, 64, False, 56), ("split", 16, 64, True, 48), ("few-heads", 1, 16, True, 8),
        ("few-heads-split", 16, 16, False, 0), ("32-heads", 2, 32, True, 8),
    ):  # fmt: skip
        cases.append(
            CompileCase(
                name=f"row_decode[{label}]",
                kernel=_row_decode_kernel,
                signature=signature | query_types(block_h)
                | ({"out_ptr": fp32} if num_splits > 1 else {}),
                constexprs={
                    **dict.fromkeys(("HAS_LENS", "IS_RAGGED", "HEADS_MASKED"), flags),
                    "IS_ONE_ROUND": num_splits > 1,
                    "HAS_SINK": flags and num_splits == 1,
                    "NUM_BLOCKS": 32 // num_splits, "NUM_SPLITS": num_splits, "BLOCK_H": block_h,
                    "OUTPUT_REGISTERS": OUTPUT_REGISTERS,
                    "LOADER_REGISTERS": LOADER_REGISTERS[block_h],
                },
                options={"num_warps": 4},
                must_have={
                    f"HGMMA.64x{block_h}x16": 52, "F2FP.F16.E4M3.UNPACK_B": 192,
                    "LDSM.16.MT88": 8, "LDSM.16.M88": 20,
                },
                max_spill_bytes=max_spill_bytes,
            )
        )  # fmt: skip
    return cases
