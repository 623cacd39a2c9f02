"""Sparse decode for Hopper in Gluon: split over the selected keys, one program a query, 64 heads
and a split.

The consumers are `seesaw.py`'s. For a bf16 cache the loader is its gather by cp.async; for an fp8
cache it loads 16 bytes of e4m3 a thread, converts them to bf16 with their scale in registers and
stores them into the swizzled tiles, two groups of 128 columns in flight. Converting 64 rows of
512 takes longer than multiplying them, so the fp8 kernel is bound by the loader's instructions
(269 TFLOP/s with fp8 and 473 with bf16 at batch 128, topk 2048, H100). FlashMLA's two programs of
a query share the conversion through a cluster, which Triton 3.6 cannot express.

With more than one split, partial outputs (fp32) and log2 sums go through memory and
`combine_splits.py`; with one split the program writes the result itself. Supports bf16 and fp8
caches, any number of heads and queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_splits import combine_splits
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.paging import HEAD_DIM_V
from dsa_bench.kernels.seesaw import (
    Result,
    attend_left,
    attend_right,
)
from dsa_bench.kernels.seesaw_loader import (
    Query,
    copy_rows,
    load_bf16_list,
    load_query,
)
from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_KV,
    HALF_V,
    K0_LEFT,
    K0_RIGHT,
    K1_LEFT,
    K1_RIGHT,
    ROPE,
    KeyList,
    allocate_tiles,
    is_key,
    load_key_block,
    seen_as,
)
from dsa_bench.kernels.sparse_decode import (
    MAX_SPLITS,
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_decode"
BLOCK_H = 64
PAIR = 128

ROW_WORDS = gl.constexpr(656 // 4)
GROUP_WORDS = gl.constexpr(128 // 4)
"""One scale covers 128 e4m3 values, 32 words of 4."""
FIRST_SCALE = gl.constexpr(512 // 4)
FIRST_ROPE = gl.constexpr(528 // 2)
TILE_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
"""The bytes of a bf16 tile seen as int32."""
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
HALVES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Layouts of the loader: 16 bytes a thread, 8 threads a 128-byte line."""


@gluon.jit
def _load_group(words_ptr, rows, valid, GROUP: gl.constexpr):
    """Group GROUP of the rows: [64, 32] words of 4 e4m3 and [64] scales; 0 where not valid.

    The bytes travel as int32: an fp8 tensor that lives across a loop edge takes a register a byte
    (4.9 KB of spills).
    """
    row_start = rows.to(gl.int64) * ROW_WORDS
    offs = GROUP * GROUP_WORDS + gl.arange(0, GROUP_WORDS, gl.SliceLayout(0, WORDS))
    offs = gl.max_contiguous(gl.multiple_of(offs, 4), 4)
    words = gl.load(words_ptr + row_start[:, None] + offs[None, :], mask=valid[:, None], other=0)
    scale = gl.load(words_ptr + row_start + FIRST_SCALE + GROUP, mask=valid, other=0)
    return words, scale.to(gl.float32, bitcast=True)


@gluon.jit
def _store_group(tile_words, words, scale):
    """Dequantise 128 columns: e4m3 → f16 → fp32 · scale → bf16 (Hopper has no e4m3 → bf16)."""
    scale, words = gl.broadcast(scale[:, None], words)
    low, high = gl.inline_asm_elementwise(
        """{ .reg .b16 a, b, e0, e1, e2, e3; .reg .b32 h0, h1; .reg .f32 f0, f1, f2, f3;
        mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 h0, a; cvt.rn.f16x2.e4m3x2 h1, b;
        mov.b32 {e0, e1}, h0; mov.b32 {e2, e3}, h1;
        cvt.f32.f16 f0, e0; cvt.f32.f16 f1, e1; cvt.f32.f16 f2, e2; cvt.f32.f16 f3, e3;
        mul.f32 f0, f0, $3; mul.f32 f1, f1, $3; mul.f32 f2, f2, $3; mul.f32 f3, f3, $3;
        cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2; }""",
        "=r,=r,r,f",
        [words, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    tile_words.store(gl.reshape(gl.join(low, high), [BLOCK_KV, 2 * GROUP_WORDS]))


@gluon.jit
def _key_rows(keys, first, LAYOUT: gl.constexpr):
    """Rows of the block that begins at entry `first`, and which of them are valid."""
    entries = load_key_block(keys, first, LAYOUT)
    valid = is_key(entries, keys.num_keys)
    return gl.where(valid, entries, 0), valid


@gluon.jit
def _copy_rope(halves_ptr, keys, first, tiles, BLOCK: gl.constexpr, BARRIER: gl.constexpr):
    """The bf16 tail of a block's rows, by cp.async; each thread arrives once when its copies have
    landed."""
    rows, valid = _key_rows(keys, first, gl.SliceLayout(1, HALVES))
    copy_rows(
        tiles.k_rope.index(BLOCK), halves_ptr, 2 * ROW_WORDS, rows, valid, FIRST_ROPE, ROPE, HALVES
    )
    async_copy.mbarrier_arrive(tiles.ready.index(BARRIER), increment_count=False)


@gluon.jit
def _publish(tiles, BARRIER: gl.constexpr):
    """The half block is stored: make it visible to wgmma, tell the consumers."""
    fence_async_shared()
    mbarrier.arrive(tiles.ready.index(BARRIER), count=1)


@gluon.jit
def _load_fp8_rows(words_ptr, halves_ptr, keys, tiles):
    """The loader for 656-byte rows, half block by half block.

    Groups 0, 1 of a row are its left half, 2, 3 its right. `a` and `b` hold the two groups in
    flight; a group's registers are refilled with the half block after next as soon as they are
    stored.
    """
    ROWS: gl.constexpr = gl.SliceLayout(1, WORDS)
    HALF_WORDS: gl.constexpr = 2 * GROUP_WORDS
    k0_left = seen_as(tiles.k_left.index(0), gl.int32, HALF_V // 2, TILE_WORDS)
    k1_left = seen_as(tiles.k_left.index(1), gl.int32, HALF_V // 2, TILE_WORDS)
    k0_right = seen_as(tiles.k_right.index(0), gl.int32, HALF_V // 2, TILE_WORDS)
    k1_right = seen_as(tiles.k_right.index(1), gl.int32, HALF_V // 2, TILE_WORDS)
    rows0, valid0 = _key_rows(keys, 0, ROWS)
    a, a_scale = _load_group(words_ptr, rows0, valid0, 0)
    b, b_scale = _load_group(words_ptr, rows0, valid0, 1)
    for i in range(keys.STEPS):
        phase = (i & 1) ^ 1
        first = i * (2 * BLOCK_KV)
        rows1, valid1 = _key_rows(keys, first + BLOCK_KV, ROWS)

        mbarrier.wait(tiles.free.index(K0_LEFT), phase)
        _store_group(k0_left.slice(0, HALF_WORDS, 1), a, a_scale)
        a, a_scale = _load_group(words_ptr, rows1, valid1, 2)
        _store_group(k0_left.slice(HALF_WORDS, HALF_WORDS, 1), b, b_scale)
        b, b_scale = _load_group(words_ptr, rows1, valid1, 3)
        _publish(tiles, K0_LEFT)

        mbarrier.wait(tiles.free.index(K1_RIGHT), phase)
        _copy_rope(halves_ptr, keys, first + BLOCK_KV, tiles, 1, K1_RIGHT)
        _store_group(k1_right.slice(0, HALF_WORDS, 1), a, a_scale)
        if keys.STEPS == 1:
            # read again rather than kept: without the loop ptxas spills 40 bytes
            rows0, valid0 = _key_rows(keys, first, ROWS)
        a, a_scale = _load_group(words_ptr, rows0, valid0, 2)
        _store_group(k1_right.slice(HALF_WORDS, HALF_WORDS, 1), b, b_scale)
        b, b_scale = _load_group(words_ptr, rows0, valid0, 3)
        _publish(tiles, K1_RIGHT)

        mbarrier.wait(tiles.free.index(K0_RIGHT), phase)
        _copy_rope(halves_ptr, keys, first, tiles, 0, K0_RIGHT)
        _store_group(k0_right.slice(0, HALF_WORDS, 1), a, a_scale)
        if keys.STEPS == 1:
            rows1, valid1 = _key_rows(keys, first + BLOCK_KV, ROWS)
        a, a_scale = _load_group(words_ptr, rows1, valid1, 0)
        _store_group(k0_right.slice(HALF_WORDS, HALF_WORDS, 1), b, b_scale)
        b, b_scale = _load_group(words_ptr, rows1, valid1, 1)
        _publish(tiles, K0_RIGHT)

        following = gl.minimum(i + 1, keys.STEPS - 1) * (2 * BLOCK_KV)
        rows0, valid0 = _key_rows(keys, following, ROWS)
        mbarrier.wait(tiles.free.index(K1_LEFT), phase)
        _store_group(k1_left.slice(0, HALF_WORDS, 1), a, a_scale)
        a, a_scale = _load_group(words_ptr, rows0, valid0, 0)
        _store_group(k1_left.slice(HALF_WORDS, HALF_WORDS, 1), b, b_scale)
        b, b_scale = _load_group(words_ptr, rows0, valid0, 1)
        _publish(tiles, K1_LEFT)
    async_copy.wait_group(0)


# a 1 would be specialised to a constant, which KeyList refuses
@gluon.jit(do_not_specialize=["num_slots", "topk"])
def _sparse_decode_kernel(
    q_ptr, cache_ptr, halves_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr, lse_ptr,
    num_slots, num_heads, topk, qk_scale_log2, stride_q_row, stride_q_head, stride_slots_row,
    NUM_PAIRS: gl.constexpr, HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_RAGGED: gl.constexpr, HEADS_MASKED: gl.constexpr,
    IS_PARTIAL: gl.constexpr, IS_FP8: gl.constexpr,
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
    # fp8: a left half arrives once, when stored; a right half besides once a thread, for the rope
    tiles = allocate_tiles(1 if IS_FP8 else 128, 129 if IS_FP8 else 128, HAS_ROPE=True)
    q_start = q_ptr + row * stride_q_row + first_head * stride_q_head
    query = Query(q_start, stride_q_head, num_heads - first_head, HEADS_MASKED)
    load_query(query, tiles, 0)
    if IS_FP8:
        gl.warp_specialize(
            [
                (attend_left, (tiles, keys, result, qk_scale_log2, 0, 0)),
                (attend_right, (tiles, keys, result, qk_scale_log2, 0, 0)),
                (_load_fp8_rows, (cache_ptr, halves_ptr, keys, tiles)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (attend_left, (tiles, keys, result, qk_scale_log2, 0, 0)),
                (attend_right, (tiles, keys, result, qk_scale_log2, 0, 0)),
                (load_bf16_list, (cache_ptr, 576, keys, tiles)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDecodeConfig:
    """Registers a thread: 4 · (2 consumers + loader) must not exceed 12 · 168."""

    num_splits: int
    consumer_registers: int
    loader_registers: int


def choose_config(
    num_queries: int, num_heads: int, topk: int, num_sms: int, precision: str
) -> SparseDecodeConfig:
    """Splits that need the fewest rounds of the key loop on the busiest SM, counting start and
    merging.

    A pair of blocks takes about 7 µs in the fp8 kernel, a program's start and end with merging as
    long as four pairs (H100, batch 16, topk 2048: 138, 82 and 56 µs in 1, 2 and 4 splits). With
    fp8 the loader converts in registers, so it has 104.
    """
    pairs = -(-topk // PAIR)
    programs = num_queries * -(-num_heads // BLOCK_H)
    best, best_time = 1, float("inf")
    for num_splits in range(1, min(pairs, MAX_SPLITS) + 1):
        pairs_a_split = -(-pairs // num_splits)
        # ptxas spills 16 bytes in an fp8 kernel of exactly two pairs
        if num_splits * pairs_a_split - pairs >= pairs_a_split or pairs_a_split == 2:
            continue
        waves = -(-programs * num_splits // num_sms)
        time = waves * (pairs_a_split + 3) + (num_splits > 1)
        if time < best_time:
            best, best_time = num_splits, time
    consumer, loader = (200, 104) if precision == "fp8" else (224, 56)
    return SparseDecodeConfig(num_splits=best, consumer_registers=consumer, loader_registers=loader)


def sparse_decode(
    q: Tensor,
    kv_cache: Tensor,
    topk_slots: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparseDecodeOutputs:
    """Sparse attention of new tokens over a paged cache; formula and conventions as in
    `sparse_decode.py`.

    Args:
        q: [batch_size, seq_len_q, num_heads, 576] bf16, contiguous.
        kv_cache: [num_pages, page_size, 656] uint8 or [num_pages, page_size, 576] bf16, contiguous.
        topk_slots: [batch_size, seq_len_q, topk] int32, contiguous.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [batch_size, seq_len_q] int32.
    Returns:
        out [batch_size, seq_len_q, num_heads, 512] bf16, lse [batch_size, seq_len_q, num_heads]
        fp32.
    """
    check_arguments(q, kv_cache, topk_slots, sm_scale, attn_sink, topk_lens)
    (batch_size, seq_len_q, num_heads, _), topk = q.shape, topk_slots.shape[2]
    queries = batch_size * seq_len_q
    out = torch.empty(*q.shape[:3], HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(*q.shape[:3], device=q.device)
    if out.numel() == 0 or topk == 0:
        return SparseDecodeOutputs(out.zero_(), lse.fill_(float("inf")))
    is_fp8 = kv_cache.dtype == torch.uint8
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    config = choose_config(queries, num_heads, topk, num_sms, "fp8" if is_fp8 else "bf16")
    is_split = config.num_splits > 1
    partial_out, partial_lse = out, lse
    if is_split:
        rows = config.num_splits * queries * num_heads
        partial_out = torch.empty(rows, HEAD_DIM_V, device=q.device)
        partial_lse = torch.empty(rows, device=q.device)
    rows_of_cache = kv_cache.flatten(0, 1)
    words = rows_of_cache.view(torch.int32) if is_fp8 else rows_of_cache
    halves = rows_of_cache.view(torch.bfloat16) if is_fp8 else rows_of_cache
    num_pairs = -(-topk // (PAIR * config.num_splits))
    # with fp8 the masks are always on: ptxas then spills nothing, without them 8 bytes
    _sparse_decode_kernel[(queries * -(-num_heads // BLOCK_H), config.num_splits)](
        q, words, halves, topk_slots,
        topk_lens if topk_lens is not None else topk_slots,
        attn_sink if attn_sink is not None else lse, partial_out, partial_lse,
        rows_of_cache.shape[0], num_heads, topk, sm_scale * LOG2_E,
        q.stride(1), q.stride(2), topk_slots.stride(1),
        NUM_PAIRS=num_pairs, HAS_LENS=topk_lens is not None,
        HAS_SINK=attn_sink is not None and not is_split,
        IS_RAGGED=is_fp8 or topk_lens is not None or topk != num_pairs * PAIR * config.num_splits,
        HEADS_MASKED=is_fp8 or num_heads % BLOCK_H != 0, IS_PARTIAL=is_split, IS_FP8=is_fp8,
        CONSUMER_REGISTERS=config.consumer_registers, LOADER_REGISTERS=config.loader_registers,
        num_warps=4,
    )  # fmt: skip
    if is_split:
        combine_splits(partial_out, partial_lse, config.num_splits, attn_sink, out, lse)
    return SparseDecodeOutputs(out, lse)


def run(inputs: SparseDecodeInputs) -> SparseDecodeOutputs:
    return sparse_decode(
        inputs.q,
        inputs.kv_cache,
        inputs.topk_slots,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens,
    )


def supports(shape: SparseDecodeShape, machine: Machine) -> str | None:
    if not machine.is_hopper:
        return (
            f"gluon sparse_decode needs a Hopper GPU (sm_90), this is {machine.name} (use triton)"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """Both precisions, split and whole, with and without every flag."""
    fp32, int32, size = "*fp32:16", "*i32:16", "i32:16"
    cases = []
    for precision, is_split, flags in (
        ("fp8", False, False), ("fp8", True, True), ("bf16", False, True), ("bf16", True, False),
    ):  # fmt: skip
        is_fp8 = precision == "fp8"
        config = choose_config(1, 128, 2048, 132, precision)
        signature = {
            "q_ptr": "*bf16:16", "cache_ptr": int32 if is_fp8 else "*bf16:16",
            "halves_ptr": "*bf16:16",
            "slots_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32,
            "out_ptr": fp32 if is_split else "*bf16:16", "lse_ptr": fp32,
            "num_slots": "i32", "num_heads": size, "topk": "i32", "qk_scale_log2": "fp32",
            "stride_q_row": size, "stride_q_head": size, "stride_slots_row": size,
        }  # fmt: skip
        constexprs = dict.fromkeys(("IS_RAGGED", "HEADS_MASKED"), flags or is_fp8)
        cases.append(
            CompileCase(
                name=f"sparse_decode_gluon[{precision}-{'split' if is_split else 'whole'}]",
                kernel=_sparse_decode_kernel,
                signature=signature,
                constexprs={
                    **constexprs,
                    "HAS_LENS": flags,
                    "HAS_SINK": flags and not is_split,
                    "NUM_PAIRS": 4,
                    "IS_PARTIAL": is_split,
                    "IS_FP8": is_fp8,
                    "CONSUMER_REGISTERS": config.consumer_registers,
                    "LOADER_REGISTERS": config.loader_registers,
                },
                options={"num_warps": 4},
                must_have={"HGMMA.64x256": 16, "HGMMA.64x64": 72},
            )
        )
    return cases
