"""Dense attention in Triton for Hopper: the MHA form for prefill, the MQA form for decode.

Prefill: one program owns 128 queries of one head; the accumulator stays in registers, keys and
values stream through shared memory by TMA. The value product of a block is issued before the
softmax of the next, so that the tensor cores work while exponentials are taken; only the last
blocks of keys are masked. Programs that run together belong to a few heads, so that L2 serves their
keys, and the longest go first. Bound: the tensor cores.

Decode: one program owns 64 (query, head) rows of a sequence and one part of its keys. A tile of
keys is loaded once for both products; the accumulator lies in two halves of 256 columns (one of 512
spills). Partial results in fp32 are joined by `combine_splits`. Bound: memory below 64 rows, else
the tensor cores, of which a third is lost: both warpgroups compute the whole tile of scores, for
Triton gives the first of two chained products no other layout. Each sequence is cut in equally many
parts, so a batch of different lengths waits for its longest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseInputs,
    DenseOutputs,
    DensePrefillInputs,
)
from dsa_bench.baselines.dense_attention_arguments import (
    HEAD_DIM_QK,
    HEAD_DIM_V,
    HEAD_DIM_V_MHA,
    NOPE,
    ROPE,
    check_decode,
    check_prefill,
    num_sms,
    obstacle_of_widths,
)
from dsa_bench.baselines.dense_decode_splits import allocate, choose_num_splits, combine
from dsa_bench.baselines.key_pages import KeyPages
from dsa_bench.kernels.combine_splits import MAX_SPLITS
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.online_softmax import NO_MAXIMUM, softmax_step
from dsa_bench.operator import Implementation, Machine

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

HALF = 256

BLOCK_H, BLOCK_KV = 64, 64
"""Tile of the decode kernel: q and two stages of keys take 221 of 227 KB of shared memory."""
SPLIT_COST_BLOCKS = 4
"""What a part costs beside its keys (load q, write and join fp32 partials), in blocks of keys."""


@triton.jit
def _score_mha(q_nope, q_rope, k_nope_desc, k_rope_desc, kv_begin, column):
    """[BLOCK_Q, BLOCK_KV] unscaled scores of the keys from kv_begin; 0 beyond the last key."""
    k_nope = k_nope_desc.load([kv_begin, column])
    k_rope = k_rope_desc.load([kv_begin, column + q_nope.shape[1]])
    scores = tl.dot(q_nope, k_nope.T)
    return tl.dot(q_rope, k_rope.T, scores)


@triton.jit
def _mask(scores, kv_begin, last_visible):
    """-inf where the key of a column comes after the last one that the row sees."""
    offs_kv = kv_begin + tl.arange(0, scores.shape[1])
    return tl.where(offs_kv[None, :] <= last_visible[:, None], scores, -float("inf"))


@triton.jit
def _dense_prefill_kernel(
    q_nope_desc, q_rope_desc, k_nope_desc, k_rope_desc, v_desc, out_desc, lse_ptr,
    seq_len_q, seq_len_kv, num_heads, qk_scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, HEADS_TOGETHER: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one head. Descriptors see [tokens, num_heads · width]."""
    NOPE: tl.constexpr = q_nope_desc.block_shape[1]
    ROPE: tl.constexpr = q_rope_desc.block_shape[1]
    WIDTH_V: tl.constexpr = v_desc.block_shape[1]
    num_blocks_q = tl.cdiv(seq_len_q, BLOCK_Q)
    group = tl.program_id(0) // (num_blocks_q * HEADS_TOGETHER)
    first_head = group * HEADS_TOGETHER
    heads_here = tl.minimum(num_heads - first_head, HEADS_TOGETHER)
    place = tl.program_id(0) % (num_blocks_q * HEADS_TOGETHER)
    head = first_head + place % heads_here
    q_begin = (num_blocks_q - 1 - place // heads_here) * BLOCK_Q
    column, column_v = head * (NOPE + ROPE), head * WIDTH_V

    offs_q = q_begin + tl.arange(0, BLOCK_Q)
    last_visible = seq_len_kv - seq_len_q + offs_q
    first_masked = (seq_len_kv - seq_len_q + q_begin + 1) // BLOCK_KV
    end = tl.cdiv(tl.minimum(seq_len_kv, seq_len_kv - seq_len_q + q_begin + BLOCK_Q), BLOCK_KV)

    q_nope = q_nope_desc.load([q_begin, column])
    q_rope = q_rope_desc.load([q_begin, column + NOPE])
    row_max = tl.full([BLOCK_Q], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, WIDTH_V], tl.float32)

    scores = _score_mha(q_nope, q_rope, k_nope_desc, k_rope_desc, 0, column)
    scores = _mask(scores, 0, last_visible)
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale_log2)
    # the value product of block i - 1 is issued before the softmax of block i and runs beside it
    for phase in tl.static_range(2):
        first = 1 if phase == 0 else tl.maximum(first_masked, 1)
        last = first_masked if phase == 0 else end
        for i in tl.range(first, last, num_stages=NUM_STAGES):
            scores = _score_mha(q_nope, q_rope, k_nope_desc, k_rope_desc, i * BLOCK_KV, column)
            v = v_desc.load([(i - 1) * BLOCK_KV, column_v])
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
            if phase == 1:
                scores = _mask(scores, i * BLOCK_KV, last_visible)
            weights, rescale, row_max, row_sum = softmax_step(
                scores, row_max, row_sum, qk_scale_log2
            )
    v = v_desc.load([(end - 1) * BLOCK_KV, column_v])
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])

    out_desc.store([q_begin, column_v], (acc / row_sum[:, None]).to(out_desc.dtype))
    lse = (row_max * qk_scale_log2 + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + offs_q.to(tl.int64) * num_heads + head, lse, offs_q < seq_len_q)


@triton.jit
def _dense_decode_kernel(
    q_half_desc, q_rope_desc, kv_half_desc, kv_rope_desc, out_ptr, lse_ptr,
    seq_lens_ptr, table_ptr, seq_len_q, seq_len_kv, max_pages, num_heads, num_splits, qk_scale_log2,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, IS_PARTIAL: tl.constexpr,
    IS_RAGGED: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H of the seq_len_q · num_heads rows of one sequence, one part of its keys.

    Descriptors see [batch_size, rows or keys, width]; if IS_RAGGED those of keys see the pages of
    all sequences, of BLOCK_KV keys, as one. If IS_PARTIAL it writes fp32 and the lse in log2 units,
    [num_splits, batch_size, rows, …]; a part without a visible key writes 0 and -inf.
    """
    HALF: tl.constexpr = kv_half_desc.block_shape[2]
    ROPE: tl.constexpr = kv_rope_desc.block_shape[2]
    num_rows = seq_len_q * num_heads
    row_begin = tl.program_id(0) * BLOCK_H
    batch, split = tl.program_id(1), tl.program_id(2)
    kv_batch, kv_first = batch, 0
    if IS_RAGGED:
        seq_len_kv = tl.load(seq_lens_ptr + batch)
        kv_batch, kv_first = 0, tl.load(table_ptr + batch * max_pages) * BLOCK_KV
    offs_row = row_begin + tl.arange(0, BLOCK_H)
    last_visible = seq_len_kv - seq_len_q + offs_row // num_heads
    last_row = tl.minimum(row_begin + BLOCK_H, num_rows) - 1
    num_blocks = tl.cdiv(seq_len_kv - seq_len_q + last_row // num_heads + 1, BLOCK_KV)
    first_block = num_blocks * split // num_splits
    end_block = num_blocks * (split + 1) // num_splits

    q_left = q_half_desc.load([batch, row_begin, 0]).reshape(BLOCK_H, HALF)
    q_right = q_half_desc.load([batch, row_begin, HALF]).reshape(BLOCK_H, HALF)
    q_rope = q_rope_desc.load([batch, row_begin, 2 * HALF]).reshape(BLOCK_H, ROPE)
    row_max = tl.full([BLOCK_H], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc_left = tl.zeros([BLOCK_H, HALF], tl.float32)
    acc_right = tl.zeros([BLOCK_H, HALF], tl.float32)
    for i in tl.range(first_block, end_block, num_stages=NUM_STAGES):
        kv_begin = i * BLOCK_KV
        kv_row = kv_first + kv_begin
        kv_left = kv_half_desc.load([kv_batch, kv_row, 0]).reshape(BLOCK_KV, HALF)
        kv_right = kv_half_desc.load([kv_batch, kv_row, HALF]).reshape(BLOCK_KV, HALF)
        kv_rope = kv_rope_desc.load([kv_batch, kv_row, 2 * HALF]).reshape(BLOCK_KV, ROPE)
        scores = tl.dot(q_left, kv_left.T)
        scores = tl.dot(q_right, kv_right.T, scores)
        scores = tl.dot(q_rope, kv_rope.T, scores)
        scores = _mask(scores, kv_begin, last_visible)
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale_log2)
        weights = weights.to(kv_left.dtype)
        acc_left = tl.dot(weights, kv_left, acc_left * rescale[:, None])
        acc_right = tl.dot(weights, kv_right, acc_right * rescale[:, None])

    # a part before the diagonal may hold no key that an early query sees
    # == 0 and not > 0: a sum of NaN stays one
    share = tl.where(row_sum == 0, 0.0, 1.0 / row_sum)[:, None]
    log2_sum = row_max * qk_scale_log2 + tl.log2(row_sum)
    lse_log2 = tl.where(row_sum == 0, -float("inf"), log2_sum)
    place = (split * tl.num_programs(1) + batch).to(tl.int64) * num_rows + offs_row
    valid = offs_row < num_rows
    base = place[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(out_ptr + base, (acc_left * share).to(out_ptr.dtype.element_ty), valid[:, None])
    right = (acc_right * share).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + HALF, right, valid[:, None])
    tl.store(lse_ptr + place, lse_log2 if IS_PARTIAL else lse_log2 * LN_2, valid)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """Tile sizes of the prefill kernel."""

    block_q: int = 128
    block_kv: int = 64
    """128 keys leave room for two stages, and the second would be loaded just before its use."""
    heads_together: int = 8
    """8 heads of 8K keys are 42 MB of keys and values, as much as the L2 of an H100 holds."""
    num_warps: int = 8
    num_stages: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """In how many parts the keys are cut, and the launch."""

    num_splits: int
    num_warps: int = 8
    num_stages: int = 2


def choose_config(*, batch_size: int, num_rows: int, seq_len_kv: int, num_sms: int) -> DecodeConfig:
    """`num_rows` is seq_len_q · num_heads."""
    num_splits = choose_num_splits(
        tiles=batch_size * triton.cdiv(num_rows, BLOCK_H),
        steps=triton.cdiv(seq_len_kv, BLOCK_KV),
        split_cost=SPLIT_COST_BLOCKS,
        num_sms=num_sms,
    )
    return DecodeConfig(num_splits=num_splits)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float, config: PrefillConfig | None = None
) -> DenseOutputs:
    """MHA form, causal to the end of the keys.

    Args:
        q: [seq_len_q, num_heads, 192] bf16, contiguous, as are the others.
        k: [seq_len_kv, num_heads, 192] bf16.
        v: [seq_len_kv, num_heads, 128] bf16.
    """
    config = config or PrefillConfig()
    check_prefill(q, k, v)
    (seq_len_q, num_heads, _), seq_len_kv = q.shape, k.shape[0]
    out = q.new_empty(seq_len_q, num_heads, HEAD_DIM_V_MHA)
    lse = torch.empty(seq_len_q, num_heads, device=q.device)
    if not q.numel():
        return DenseOutputs(out, lse)

    def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [rows, columns])

    _dense_prefill_kernel[(triton.cdiv(seq_len_q, config.block_q) * num_heads,)](
        tiles(q, config.block_q, NOPE),
        tiles(q, config.block_q, ROPE),
        tiles(k, config.block_kv, NOPE),
        tiles(k, config.block_kv, ROPE),
        tiles(v, config.block_kv, HEAD_DIM_V_MHA),
        tiles(out, config.block_q, HEAD_DIM_V_MHA),
        lse, seq_len_q, seq_len_kv, num_heads, sm_scale * LOG2_E,
        BLOCK_Q=config.block_q, BLOCK_KV=config.block_kv, HEADS_TOGETHER=config.heads_together,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return DenseOutputs(out, lse)


def decode(
    q: Tensor,
    kv: Tensor,
    *,
    sm_scale: float,
    pages: KeyPages | None = None,
    config: DecodeConfig | None = None,
) -> DenseOutputs:
    """MQA form, causal to the end of the keys.

    Args:
        q: [batch_size, seq_len_q, num_heads, 576] bf16, contiguous, as is the other.
        kv: [batch_size, seq_len_kv, 576] bf16; with pages [num_pages, 64, 576].
        pages: where the keys of sequences of different lengths are.
    """
    check_decode(q, kv, pages)
    batch_size, seq_len_q, num_heads, _ = q.shape
    num_rows = seq_len_q * num_heads
    seq_len_kv = kv.shape[1] if pages is None else max(pages.lengths)
    config = config or choose_config(
        batch_size=batch_size, num_rows=num_rows, seq_len_kv=seq_len_kv, num_sms=num_sms(q.device)
    )
    splits = config.num_splits
    results = allocate(q, HEAD_DIM_V, splits)
    if not q.numel():
        return results.outputs
    rows = q.view(batch_size, num_rows, HEAD_DIM_QK)
    keys = kv if pages is None else kv.view(1, -1, HEAD_DIM_QK)
    seq_lens, table, max_pages = results.part_lse, results.part_lse, 0
    if pages is not None:
        seq_lens, table, max_pages = pages.seq_lens, pages.block_table, pages.block_table.shape[1]
    _dense_decode_kernel[(triton.cdiv(num_rows, BLOCK_H), batch_size, splits)](
        TensorDescriptor.from_tensor(rows, [1, BLOCK_H, HALF]),
        TensorDescriptor.from_tensor(rows, [1, BLOCK_H, ROPE]),
        TensorDescriptor.from_tensor(keys, [1, BLOCK_KV, HALF]),
        TensorDescriptor.from_tensor(keys, [1, BLOCK_KV, ROPE]),
        results.part, results.part_lse,
        seq_lens, table, seq_len_q, seq_len_kv, max_pages, num_heads, splits, sm_scale * LOG2_E,
        BLOCK_H=BLOCK_H, BLOCK_KV=BLOCK_KV, IS_PARTIAL=splits > 1, IS_RAGGED=pages is not None,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return combine(results)


def run(inputs: DenseInputs, /) -> DenseOutputs:
    if isinstance(inputs, DensePrefillInputs):
        return prefill(inputs.q, inputs.k, inputs.v, sm_scale=inputs.sm_scale)
    return decode(inputs.q, inputs.kv, sm_scale=inputs.sm_scale, pages=inputs.pages)


def supports(shape: DenseAttentionShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "triton dense_attention needs a Hopper GPU (its tiles fill 222 KB of shared memory)"
    return obstacle_of_widths("triton", shape)


IMPLEMENTS = "dense_attention"
IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """Both forms at the V3.2 shape; decode whole, in parts, and of different lengths in parts."""
    fp32, size = "*fp32:16", "i32:16"

    def tile(*block: int) -> str:
        return f"tensordesc<bf16{list(block)}>"

    launch, parts = PrefillConfig(), DecodeConfig(num_splits=MAX_SPLITS)
    block_q, block_kv = launch.block_q, launch.block_kv
    prefill_case = CompileCase(
        name="dense_prefill_triton",
        kernel=_dense_prefill_kernel,
        signature={
            "q_nope_desc": tile(block_q, NOPE), "q_rope_desc": tile(block_q, ROPE),
            "k_nope_desc": tile(block_kv, NOPE), "k_rope_desc": tile(block_kv, ROPE),
            "v_desc": tile(block_kv, HEAD_DIM_V_MHA), "out_desc": tile(block_q, HEAD_DIM_V_MHA),
            "lse_ptr": fp32, "seq_len_q": size, "seq_len_kv": size, "num_heads": size,
            "qk_scale_log2": "fp32",
        },
        constexprs={
            "BLOCK_Q": block_q, "BLOCK_KV": block_kv,
            "HEADS_TOGETHER": launch.heads_together, "NUM_STAGES": launch.num_stages,
        },
        options={"num_warps": launch.num_warps},
        must_have={"HGMMA.64x64x16": 36, "HGMMA.64x128x16": 12, "UTMALDG": 9},
    )  # fmt: skip
    decode_cases = [
        CompileCase(
            name=f"dense_decode_triton[{name}]",
            kernel=_dense_decode_kernel,
            signature={
                "q_half_desc": tile(1, BLOCK_H, HALF), "q_rope_desc": tile(1, BLOCK_H, ROPE),
                "kv_half_desc": tile(1, BLOCK_KV, HALF), "kv_rope_desc": tile(1, BLOCK_KV, ROPE),
                "out_ptr": "*bf16:16" if name == "whole" else fp32, "lse_ptr": fp32,
                "seq_lens_ptr": "*i32:16", "table_ptr": "*i32:16", "seq_len_q": "i32",
                "seq_len_kv": size, "max_pages": "i32", "num_heads": size, "num_splits": "i32",
                "qk_scale_log2": "fp32",
            },
            constexprs={
                "BLOCK_H": BLOCK_H, "BLOCK_KV": BLOCK_KV, "IS_PARTIAL": name != "whole",
                "IS_RAGGED": name == "ragged", "NUM_STAGES": parts.num_stages,
            },
            options={"num_warps": parts.num_warps},
            must_have={"HGMMA.64x128x16": 8, "UTMALDG": 6},
        )
        for name in ("whole", "parts", "ragged")
    ]  # fmt: skip
    return [prefill_case, *decode_cases]
