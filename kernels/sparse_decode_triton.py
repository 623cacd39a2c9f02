"""Sparse decode in plain Triton, for every GPU with bf16 tensor cores; split over the keys.

One program owns a query, up to 64 of its heads and one split of its slots, which it walks in blocks
(`listed_attention.py`). Rows of a bf16 cache are gathered by asynchronous copies. Of an fp8 cache
the e4m3 bytes are; they are converted to bf16 in registers and stored to shared memory, from where
both products read them. With fp8 and many queries this conversion binds (211
TFLOP/s at batch 128, topk 2048, on an H100), with few queries the number of programs.

With more than one split, partial outputs (fp32) and log2 sums go through memory and
`combine_splits.py`; with one split the program writes the result itself. Supports bf16 caches from
sm_80 on, fp8 from sm_89 on, any number of heads, queries and entries. A head all of whose scores
are -inf counts as one without a key.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_splits import MAX_SPLITS, combine_splits
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.listed_attention import (
    HALF_V,
    ROPE,
    Tiling,
    ask_device,
    attend_bf16_rows,
    choose_tiling,
    find_rows,
    load_entries,
    log2_sum,
    natural_sum,
    output_factor,
    store_columns,
)
from dsa_bench.kernels.online_softmax import NO_MAXIMUM, softmax_step
from dsa_bench.kernels.paging import HEAD_DIM_V
from dsa_bench.kernels.sparse_decode import (
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_decode"
START_BLOCKS, MERGE_BLOCKS = 6, 2
"""What a program's start and end take, and merging the splits, in blocks of keys: as with Gluon."""

WIDTH_V = tl.constexpr(512)
ROW_BYTES = tl.constexpr(656)
GROUP = tl.constexpr(128)
"""One scale covers 128 e4m3 values."""
FIRST_SCALE = tl.constexpr(512 // 4)
FIRST_ROPE = tl.constexpr(528 // 2)


@triton.jit
def _load_fp8_latents(values_ptr, scales_ptr, rows, valid):
    """[BLOCK_KV, 512] bf16, dequantised: e4m3 → fp32 · scale → bf16; 0 where not valid."""
    groups = tl.arange(0, WIDTH_V // GROUP)
    columns = groups[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    ptrs = values_ptr + rows[:, None, None] * ROW_BYTES + columns
    values = tl.load(ptrs, mask=valid[:, None, None], other=0.0)  # [BLOCK_KV, 4, GROUP]
    ptrs = scales_ptr + rows[:, None] * (ROW_BYTES // 4) + FIRST_SCALE + groups[None, :]
    scale = tl.load(ptrs, mask=valid[:, None], other=0.0)
    latents = (values.to(tl.float32) * scale[:, :, None]).to(tl.bfloat16)
    return tl.reshape(latents, [rows.shape[0], WIDTH_V])


@triton.jit
def _attend_fp8_rows(
    q_ptrs, is_head, values_ptr, scales_ptr, halves_ptr, num_rows, list_ptr, end, qk_scale_log2,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """(unnormalised output, maximum as a power of 2, sum) of all entries.

    Latents and output are whole, not halves as with bf16: two conversions in flight make ptxas
    spill 400 bytes, one of all 512 columns none.
    """
    offs_v, offs_rope = tl.arange(0, WIDTH_V), tl.arange(0, ROPE)
    q = tl.load(q_ptrs + offs_v[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_ptrs + WIDTH_V + offs_rope[None, :], mask=is_head[:, None], other=0.0)
    row_max = tl.full([BLOCK_H], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, WIDTH_V], tl.float32)
    entries = load_entries(list_ptr, 0, end, BLOCK_KV)
    for first in tl.range(0, end, BLOCK_KV, num_stages=NUM_STAGES):
        rows, valid = find_rows(entries, num_rows)
        entries = load_entries(list_ptr, first + BLOCK_KV, end, BLOCK_KV)
        k = _load_fp8_latents(values_ptr, scales_ptr, rows, valid)
        rope_ptrs = halves_ptr + rows[:, None] * (ROW_BYTES // 2) + FIRST_ROPE + offs_rope[None, :]
        k_rope = tl.load(rope_ptrs, mask=valid[:, None], other=0.0)
        scores = tl.dot(q_rope, tl.trans(k_rope))  # [BLOCK_H, BLOCK_KV]
        scores = tl.dot(q, tl.trans(k), scores)
        scores = tl.where(valid[None, :], scores, -float("inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale_log2)
        acc = tl.dot(weights.to(tl.bfloat16), k, acc * rescale[:, None])
    return acc, row_max * qk_scale_log2, row_sum


@triton.jit
def _sparse_decode_kernel(
    q_ptr, cache_ptr, scales_ptr, halves_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    num_slots, num_heads, topk, span, stride_q_head, stride_cache_row, qk_scale_log2,
    HAS_LENS: tl.constexpr, HAS_SINK: tl.constexpr, IS_PARTIAL: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one query, BLOCK_H of its heads, one split of `span` slots."""
    head_tiles = tl.cdiv(num_heads, BLOCK_H)
    row = (tl.program_id(0) // head_tiles).to(tl.int64)
    first_head = (tl.program_id(0) % head_tiles) * BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)
    is_head = offs_h < num_heads - first_head
    length = topk
    if HAS_LENS:
        # not below 0: the begin of a split is taken off
        length = tl.maximum(tl.minimum(tl.load(lens_ptr + row), topk), 0)
    begin = tl.program_id(1) * span
    end = tl.minimum(length - begin, span)
    list_ptr = slots_ptr + row * topk + begin
    q_ptrs = q_ptr + (row * num_heads + first_head) * stride_q_head
    q_ptrs += offs_h[:, None] * stride_q_head
    num_queries = tl.num_programs(0) // head_tiles
    first_row = (tl.program_id(1).to(tl.int64) * num_queries + row) * num_heads + first_head
    out_ptr += first_row * WIDTH_V
    sink_ptr += first_head
    if IS_FP8:
        acc, row_max, row_sum = _attend_fp8_rows(
            q_ptrs, is_head, cache_ptr, scales_ptr, halves_ptr, num_slots, list_ptr, end,
            qk_scale_log2, BLOCK_H, BLOCK_KV, NUM_STAGES,
        )  # fmt: skip
        factor = output_factor(row_max, row_sum, sink_ptr, offs_h, is_head, HAS_SINK)
        store_columns(out_ptr, offs_h, acc, factor, is_head, WIDTH_V)
    else:
        left, right, row_max, row_sum = attend_bf16_rows(
            q_ptrs, is_head, cache_ptr, stride_cache_row, num_slots, list_ptr, end,
            qk_scale_log2, True, BLOCK_H, BLOCK_KV, NUM_STAGES,
        )  # fmt: skip
        factor = output_factor(row_max, row_sum, sink_ptr, offs_h, is_head, HAS_SINK)
        store_columns(out_ptr, offs_h, left, factor, is_head, WIDTH_V)
        store_columns(out_ptr + HALF_V, offs_h, right, factor, is_head, WIDTH_V)
    lse = log2_sum(row_max, row_sum) if IS_PARTIAL else natural_sum(row_max, row_sum)
    tl.store(lse_ptr + first_row + offs_h, lse, mask=is_head)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDecodeConfig:
    tiling: Tiling
    num_splits: int


def choose_config(
    num_queries: int, num_heads: int, topk: int, num_sms: int, capability: tuple[int, int]
) -> SparseDecodeConfig:
    """Splits that need the fewest blocks of time on the busiest SM, start and merging counted."""
    tiling = choose_tiling(num_heads, capability)
    blocks = max(1, -(-topk // tiling.block_kv))
    programs = num_queries * -(-num_heads // tiling.block_h)

    def time(num_splits: int) -> int:
        waves = -(-programs * num_splits // num_sms)
        merging = MERGE_BLOCKS if num_splits > 1 else 0
        return waves * (-(-blocks // num_splits) + START_BLOCKS) + merging

    most = min(blocks, MAX_SPLITS)
    return SparseDecodeConfig(tiling=tiling, num_splits=min(range(1, most + 1), key=time))


def sparse_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_slots: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparseDecodeOutputs:
    """Sparse attention of new tokens over a paged cache, as `sparse_decode.py` defines it.

    Args:
        q: [batch_size, seq_len_q, num_heads, 576] bf16, contiguous.
        kv_cache: [num_pages, page_size, 656] uint8 or [num_pages, page_size, 576] bf16, contiguous.
        topk_slots: [batch_size, seq_len_q, topk] int32, contiguous.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [batch_size, seq_len_q] int32.
    Returns:
        out [batch_size, seq_len_q, num_heads, 512] bf16,
        lse [batch_size, seq_len_q, num_heads] fp32.
    """
    check_arguments(q, kv_cache, topk_slots, sm_scale, attn_sink, topk_lens)
    (batch_size, seq_len_q, num_heads, _), topk = q.shape, topk_slots.shape[2]
    queries = batch_size * seq_len_q
    out = torch.empty(*q.shape[:3], HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(*q.shape[:3], device=q.device)
    if out.numel() == 0:
        return SparseDecodeOutputs(out, lse)
    capability, num_sms = ask_device(q.device)
    config = choose_config(queries, num_heads, topk, num_sms, capability)
    tiling, num_splits = config.tiling, config.num_splits
    is_split = num_splits > 1
    partial_out, partial_lse = out, lse
    if is_split:
        partial_out = torch.empty(num_splits * lse.numel(), HEAD_DIM_V, device=q.device)
        partial_lse = torch.empty(num_splits * lse.numel(), device=q.device)
    rows = kv_cache.flatten(0, 1)
    is_fp8 = rows.dtype == torch.uint8
    span = -(-topk // (num_splits * tiling.block_kv)) * tiling.block_kv
    _sparse_decode_kernel[(queries * -(-num_heads // tiling.block_h), num_splits)](
        q, rows.view(torch.float8_e4m3fn) if is_fp8 else rows,
        rows.view(torch.float32) if is_fp8 else lse, rows.view(torch.bfloat16), topk_slots,
        topk_lens if topk_lens is not None else topk_slots,
        attn_sink if attn_sink is not None else lse, partial_out, partial_lse,
        rows.shape[0], num_heads, topk, span, q.stride(2), rows.stride(0), sm_scale * LOG2_E,
        HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None and not is_split,
        IS_PARTIAL=is_split, IS_FP8=is_fp8,
        BLOCK_H=tiling.block_h, BLOCK_KV=tiling.block_kv, NUM_STAGES=tiling.num_stages,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if is_split:
        combine_splits(partial_out, partial_lse, num_splits, attn_sink, out, lse)
    return SparseDecodeOutputs(out, lse)


def run(inputs: SparseDecodeInputs) -> SparseDecodeOutputs:
    return sparse_decode(
        inputs.q,
        inputs.kv_cache,
        inputs.topk_slots,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.needed_lens,
    )


def supports(shape: SparseDecodeShape, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability < (8, 0):
        return f"triton sparse_decode needs sm_80 or newer, this is {machine.name}"
    if shape.precision == "fp8" and machine.capability < (8, 9):
        return (
            f"triton sparse_decode of an fp8 cache needs sm_89 or newer, which convert e4m3,"
            f" this is {machine.name} (use --precision bf16)"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=10),)


def compile_cases() -> list[CompileCase]:
    """Both precisions, split and whole, with and without flags, and heads too few for wgmma."""
    fp32, int32, size = "*fp32:16", "*i32:16", "i32:16"
    cases = []
    for precision, num_heads, is_split, flags in (
        ("fp8", 128, False, False), ("fp8", 128, True, True), ("fp8", 16, True, True),
        ("bf16", 128, False, True), ("bf16", 128, True, False), ("bf16", 32, True, True),
    ):  # fmt: skip
        is_fp8 = precision == "fp8"
        tiling = choose_tiling(num_heads, (9, 0))
        signature = {
            "q_ptr": "*bf16:16", "cache_ptr": "*fp8e4nv:16" if is_fp8 else "*bf16:16",
            "scales_ptr": fp32, "halves_ptr": "*bf16:16", "slots_ptr": int32, "lens_ptr": int32,
            "sink_ptr": fp32, "out_ptr": fp32 if is_split else "*bf16:16", "lse_ptr": fp32,
            "num_slots": "i32", "num_heads": size, "topk": size, "span": size,
            "stride_q_head": size, "stride_cache_row": size, "qk_scale_log2": "fp32",
        }  # fmt: skip
        products = {"HGMMA.64x": 72} if tiling.block_h == 64 else {"HMMA": 64}
        place = "split" if is_split else "whole"
        cases.append(
            CompileCase(
                name=f"sparse_decode_triton[{precision}-{place}-heads{num_heads}]",
                kernel=_sparse_decode_kernel,
                signature=signature,
                constexprs={
                    "HAS_LENS": flags,
                    "HAS_SINK": flags and not is_split,
                    "IS_PARTIAL": is_split,
                    "IS_FP8": is_fp8,
                    "BLOCK_H": tiling.block_h,
                    "BLOCK_KV": tiling.block_kv,
                    "NUM_STAGES": tiling.num_stages,
                },
                options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
                must_have={**products, "LDGSTS": 16},
                # the fp32 store's addresses, put away before the loop, and one address in it
                max_spill_bytes=28 if precision == "bf16" and is_split and not flags else 0,
            )
        )
    return cases
