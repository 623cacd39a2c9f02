"""Sparse decode over a cache of 656-byte rows, for Hopper in Gluon: three roles in four warpgroups.

At most one program is launched for each SM, for a tile of 16, 32 or 64 heads. It does one piece of
work after the other: a query with all keys of its list, or with some of them where other programs
share the list (`decode_config.py` says how). A piece goes through its keys in blocks of 64:

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

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_parts import Parts, combine_parts, may_overlap
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.decode_config import BLOCK_KV, Fp8DecodeConfig, choose_config, divide
from dsa_bench.kernels.decode_loader import load
from dsa_bench.kernels.decode_outputs import accumulate
from dsa_bench.kernels.decode_scores import score
from dsa_bench.kernels.decode_tiles import (
    OUTPUT_WARPS,
    Arguments,
    allocate_tiles,
    query_descriptors,
    query_types,
)
from dsa_bench.kernels.paging import HEAD_DIM_V

OUTPUT_REGISTERS = 168
LOADER_REGISTERS = {16: 32, 32: 32, 64: 24}
"""A thread, of the loader by the program's heads; what is left of 512, scores + twice the outputs +
loader, are the scores'. With 160 for the outputs ptxas runs their products one by one (C7512). With
64 heads and 24 for the loader instead of 32, 128 heads take 55.4 instead of 56.2 µs at batch 32 and
164.5 instead of 166.7 at 128; 16 heads at batch 32 29.7 instead of 29.1 (H100)."""


@gluon.jit(do_not_specialize=["num_queries", "num_slots", "num_heads", "topk", "share"])
def _row_decode_kernel(
    q_ptr, q_desc, rope_desc, cache_ptr, halves_ptr, scales_ptr, slots_ptr, lens_ptr, sink_ptr,
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
    num_queries, num_slots, num_heads, topk, share, sm_scale_log2,
    NUM_BLOCKS: gl.constexpr, PIECE_UNITS: gl.constexpr, BLOCK_H: gl.constexpr,
    HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr, IS_RAGGED: gl.constexpr,
    HEADS_MASKED: gl.constexpr, HAS_PARTS: gl.constexpr, HAS_WHOLE: gl.constexpr,
    IS_ONE_PIECE: gl.constexpr, EVEN_BLOCKS: gl.constexpr, LETS_NEXT: gl.constexpr,
    OUTPUT_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program, a tile of heads of a group: its three roles, piece after piece."""
    arguments = Arguments(
        q_ptr, cache_ptr, halves_ptr, scales_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
        partial_out_ptr, partial_lse_ptr, num_queries, num_slots, num_heads, topk, share,
        sm_scale_log2, NUM_BLOCKS, PIECE_UNITS, BLOCK_H, HAS_LENS, HAS_SINK, IS_RAGGED,
        HEADS_MASKED, HAS_PARTS, HAS_WHOLE, IS_ONE_PIECE, EVEN_BLOCKS, LETS_NEXT,
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


def attend_fp8_rows(
    q: Tensor, kv_cache: Tensor, topk_slots: Tensor, sm_scale: float, attn_sink: Tensor | None,
    topk_lens: Tensor | None, out: Tensor, lse: Tensor, *, config: Fp8DecodeConfig | None = None,
) -> None:  # fmt: skip
    """`sparse_decode` of a cache [num_pages, page_size, 656] uint8 -> out, lse; for arguments that
    were checked."""
    (batch_size, seq_len_q, num_heads, _), topk = q.shape, topk_slots.shape[2]
    queries = batch_size * seq_len_q
    if config is None:
        num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        config = choose_config(queries, num_heads, topk, num_sms)
    num_blocks = -(-topk // BLOCK_KV)
    division = divide(queries, num_blocks, config)
    has_parts = division.num_partial > 0
    # where there are none, nobody looks at them
    partial_out, partial_lse = out, lse
    if has_parts:
        places = 2 * division.num_groups
        partial_out = torch.empty(places, num_heads, HEAD_DIM_V, device=q.device)
        partial_lse = torch.empty(places, num_heads, device=q.device)
    cache = kv_cache.flatten(0, 1)
    _row_decode_kernel[(-(-num_heads // config.block_h), division.num_groups)](
        q, *query_descriptors(q, config.block_h),
        cache.view(torch.int8), cache.view(torch.bfloat16), cache.view(torch.float32),
        topk_slots, topk_lens if topk_lens is not None else topk_slots,
        attn_sink if attn_sink is not None else lse, out.view(torch.int32), lse,
        partial_out.view(torch.int64), partial_lse,
        queries, cache.shape[0], num_heads, topk, division.share, sm_scale * LOG2_E,
        NUM_BLOCKS=num_blocks, PIECE_UNITS=config.piece_units, BLOCK_H=config.block_h,
        HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None,
        IS_RAGGED=topk_lens is not None or topk % BLOCK_KV != 0,
        HEADS_MASKED=num_heads % config.block_h != 0,
        HAS_PARTS=has_parts, HAS_WHOLE=division.num_whole > 0,
        IS_ONE_PIECE=division.is_one_piece,
        EVEN_BLOCKS=division.even_blocks if topk_lens is None else 0,
        LETS_NEXT=has_parts and may_overlap(lse.numel()),
        OUTPUT_REGISTERS=OUTPUT_REGISTERS, LOADER_REGISTERS=LOADER_REGISTERS[config.block_h],
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    if has_parts:
        parts = Parts(
            partial_out, partial_lse, division.share, config.piece_units, num_blocks,
            division.most_parts,
        )  # fmt: skip
        combine_parts(parts, attn_sink, out, lse)


def compile_cases() -> list[CompileCase]:
    """One piece a program and many, whole lists and shared ones, with and without every flag."""
    bf16, fp32, int32 = "*bf16:16", "*fp32:16", "*i32:16"
    signature = {
        "q_ptr": bf16, "cache_ptr": "*i8:16", "halves_ptr": bf16, "scales_ptr": fp32,
        "slots_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32, "out_ptr": int32, "lse_ptr": fp32,
        "partial_out_ptr": "*i64:16", "partial_lse_ptr": fp32,
        "num_queries": "i32", "num_slots": "i32", "num_heads": "i32", "topk": "i32",
        "share": "i32", "sm_scale_log2": "fp32",
    }  # fmt: skip
    cases = []
    # with 64 heads the scores spill two registers a block, the loader some that it rarely reads,
    # the outputs where they store, most where a piece may be a list or a part, none in their loop
    for label, block_h, pieces, has_lens, max_spill_bytes in (
        ("whole", 64, "whole", False, 80), ("whole-lens", 64, "whole", True, 120),
        ("mixed", 64, "both", False, 696), ("mixed-lens", 64, "both", True, 720),
        ("part", 64, "part", False, 48),
        ("few-heads", 16, "whole", True, 8), ("few-heads-part", 16, "part", False, 8),
        ("32-heads", 32, "both", True, 8),
    ):  # fmt: skip
        cases.append(
            CompileCase(
                name=f"row_decode[{label}]",
                kernel=_row_decode_kernel,
                signature=signature | query_types(block_h),
                constexprs={
                    **dict.fromkeys(("HAS_LENS", "IS_RAGGED", "HEADS_MASKED"), has_lens),
                    "IS_ONE_PIECE": pieces == "part",
                    "EVEN_BLOCKS": 2 if pieces == "part" else 0,
                    "LETS_NEXT": pieces == "part",
                    "HAS_SINK": has_lens,
                    "HAS_PARTS": pieces != "whole", "HAS_WHOLE": pieces != "part",
                    "NUM_BLOCKS": 32, "PIECE_UNITS": 0 if pieces == "whole" else 2,
                    "BLOCK_H": block_h,
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
