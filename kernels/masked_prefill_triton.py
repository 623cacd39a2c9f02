"""Masked multi-head prefill in Triton: a bit mask of the lists, then attention to tiles of keys.

The first kernel turns the list of a query into 64-bit words, one for 64 keys, by atomic `or`, and
counts: how many keys from the first on are listed without a gap, and where the last listed one is.
The second is the loop of dense attention. One program owns BLOCK_Q queries of one head; the
accumulator stays in registers, keys and values stream through shared memory by TMA, the value
product of a block is issued before the softmax of the next and runs beside it. Blocks that every
query of the tile lists whole are not masked, blocks behind the last listed key not visited. In
between a thread reads a word of each of its rows and a block; a key then costs one `and` and one
select beside the eight instructions of its softmax. Programs that run together belong to a few
heads, so that L2 serves their keys, and the longest go first. Bound: the tensor cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.listed_attention import ask_device, natural_sum
from dsa_bench.kernels.masked_prefill import (
    BITS_BLOCK,
    MaskedPrefillInputs,
    MaskedPrefillOutputs,
    MaskedPrefillShape,
    bits_per_row,
    check_arguments,
)
from dsa_bench.kernels.online_softmax import NO_MAXIMUM, softmax_step
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "masked_prefill"
NOPE, ROPE, WIDTH_V = 128, 64, 128
HEAD_DIMS = (NOPE + ROPE, WIDTH_V)
LIST_BLOCK = 1024
"""Entries of a list that a program of the first kernel takes at once."""


@triton.jit
def _bit_place(column):
    """(byte of a 32-bit word, bit of that byte) of a column of 32.

    A quad of lanes holds a row of scores, two columns of each eight a lane: a byte is a lane's.
    """
    return (column >> 1) & 3, ((column >> 3) & 3) * 2 + (column & 1)


@triton.jit
def _list_bits_kernel(
    indices_ptr, words_ptr, bounds_ptr, seq_len_kv, topk, stride_indices_row, words_per_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query to bits of zeroed 32-bit words, and its two bounds."""
    row = tl.program_id(0).to(tl.int64)
    num_listed = 0
    end = 0
    for first in range(0, topk, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        key = tl.load(indices_ptr + row * stride_indices_row + offs, mask=offs < topk, other=-1)
        valid = (key >= 0) & (key < seq_len_kv)
        byte, place = _bit_place(key)
        bit = (1 << (8 * byte + place)).to(tl.int32)
        word = words_ptr + row * words_per_row + key // 32
        before = tl.atomic_or(word, bit, mask=valid, sem="relaxed")
        # a repeated key finds its bit set
        num_listed += tl.sum((valid & ((before & bit) == 0)).to(tl.int32), 0)
        end = tl.maximum(end, tl.max(tl.where(valid, key + 1, 0), 0))
    tl.store(bounds_ptr + 2 * row, tl.where(num_listed == end, end, 0))
    tl.store(bounds_ptr + 2 * row + 1, end)


@triton.jit
def _score(q_nope, q_rope, k_nope_desc, k_rope_desc, kv_begin, head):
    """[BLOCK_Q, BLOCK_KV] unscaled scores of the keys from kv_begin; 0 beyond the last key."""
    BLOCK_KV: tl.constexpr = k_nope_desc.block_shape[1]
    NOPE: tl.constexpr = k_nope_desc.block_shape[2]
    ROPE: tl.constexpr = k_rope_desc.block_shape[2]
    k_nope = k_nope_desc.load([head, kv_begin, 0]).reshape(BLOCK_KV, NOPE)
    k_rope = k_rope_desc.load([head, kv_begin, NOPE]).reshape(BLOCK_KV, ROPE)
    scores = tl.dot(q_nope, k_nope.T)
    return tl.dot(q_rope, k_rope.T, scores)


@triton.jit
def _mask_bits(scores, words):
    """-inf where the bit of the key is 0; one 64-bit word a row.

    The bit becomes the sign of an infinity, and that a limit: comparing it with 0 took twice the
    instructions, because LLVM gathers 32 comparisons in one vector and takes it apart again.
    """
    offs = tl.arange(0, scores.shape[1])[None, :]
    byte, bit = _bit_place(offs)
    low, high = words.to(tl.int32)[:, None], (words >> 32).to(tl.int32)[:, None]
    word = tl.where((offs & 32) == 0, low, high)
    mine = ~(word << (24 - 8 * byte)) & -(2**24)
    limit = (mine << (7 - bit)) | 0x7F800000
    return tl.minimum(scores, limit.to(tl.float32, bitcast=True))


@triton.jit
def _mask_later(scores, kv_begin, last_visible):
    """-inf where the key comes after the last one that the row sees."""
    offs_kv = kv_begin + tl.arange(0, scores.shape[1])
    return tl.where(offs_kv[None, :] <= last_visible[:, None], scores, -float("inf"))


@triton.jit
def _masked_prefill_kernel(
    q_nope_desc, q_rope_desc, k_nope_desc, k_rope_desc, v_desc, out_desc, lse_ptr,
    bits_ptr, bounds_ptr, seq_len_q, seq_len_kv, num_heads, words_per_row, qk_scale_log2,
    HAS_LIST: tl.constexpr, HEADS_TOGETHER: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one head. Descriptors see [num_heads, tokens, width]."""
    BLOCK_Q: tl.constexpr = q_nope_desc.block_shape[1]
    BLOCK_KV: tl.constexpr = k_nope_desc.block_shape[1]
    NOPE: tl.constexpr = q_nope_desc.block_shape[2]
    ROPE: tl.constexpr = q_rope_desc.block_shape[2]
    WIDTH_V: tl.constexpr = v_desc.block_shape[2]
    num_blocks_q = tl.cdiv(seq_len_q, BLOCK_Q)
    first_head = tl.program_id(0) // (num_blocks_q * HEADS_TOGETHER) * HEADS_TOGETHER
    heads_here = tl.minimum(num_heads - first_head, HEADS_TOGETHER)
    place = tl.program_id(0) % (num_blocks_q * HEADS_TOGETHER)
    head = first_head + place % heads_here
    q_begin = (num_blocks_q - 1 - place // heads_here) * BLOCK_Q

    offs_q = q_begin + tl.arange(0, BLOCK_Q)
    is_query = offs_q < seq_len_q
    last_visible = seq_len_kv - seq_len_q + offs_q
    rows = offs_q.to(tl.int64)
    words_ptr = bits_ptr + rows * words_per_row
    if HAS_LIST:
        whole = tl.min(tl.load(bounds_ptr + 2 * rows, mask=is_query, other=seq_len_kv), 0)
        keys = tl.max(tl.load(bounds_ptr + 2 * rows + 1, mask=is_query, other=0), 0)
    else:
        whole = seq_len_kv - seq_len_q + q_begin + 1
        keys = tl.minimum(seq_len_kv, seq_len_kv - seq_len_q + q_begin + BLOCK_Q)
    first_masked = whole // BLOCK_KV
    end = tl.maximum(tl.cdiv(keys, BLOCK_KV), 1)

    q_nope = q_nope_desc.load([head, q_begin, 0]).reshape(BLOCK_Q, NOPE)
    q_rope = q_rope_desc.load([head, q_begin, NOPE]).reshape(BLOCK_Q, ROPE)
    row_max = tl.full([BLOCK_Q], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, WIDTH_V], tl.float32)

    scores = _score(q_nope, q_rope, k_nope_desc, k_rope_desc, 0, head)
    if HAS_LIST:
        scores = _mask_bits(scores, tl.load(words_ptr, mask=is_query, other=0))
    else:
        scores = _mask_later(scores, 0, last_visible)
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale_log2)
    # the value product of block i - 1 is issued before the softmax of block i and runs beside it
    for phase in tl.static_range(2):
        first = 1 if phase == 0 else tl.maximum(first_masked, 1)
        last = first_masked if phase == 0 else end
        if HAS_LIST and phase == 1:
            words = tl.load(words_ptr + first, mask=is_query & (first < end), other=0)
        for i in tl.range(first, last, num_stages=NUM_STAGES):
            scores = _score(q_nope, q_rope, k_nope_desc, k_rope_desc, i * BLOCK_KV, head)
            v = v_desc.load([head, (i - 1) * BLOCK_KV, 0]).reshape(BLOCK_KV, WIDTH_V)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
            if phase == 1:
                if HAS_LIST:
                    scores = _mask_bits(scores, words)
                    words = tl.load(words_ptr + i + 1, mask=is_query & (i + 1 < end), other=0)
                else:
                    scores = _mask_later(scores, i * BLOCK_KV, last_visible)
            weights, rescale, row_max, row_sum = softmax_step(
                scores, row_max, row_sum, qk_scale_log2
            )
    v = v_desc.load([head, (end - 1) * BLOCK_KV, 0]).reshape(BLOCK_KV, WIDTH_V)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])

    # == 0 and not > 0: a sum of NaN stays one
    share = tl.where(row_sum == 0, 0.0, 1.0 / row_sum)
    out = (acc * share[:, None]).to(out_desc.dtype)
    out_desc.store([head, q_begin, 0], out.reshape(1, BLOCK_Q, WIDTH_V))
    lse = natural_sum(row_max * qk_scale_log2, row_sum)
    tl.store(lse_ptr + rows * num_heads + head, lse, mask=is_query)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedPrefillConfig:
    """Queries of a tile (its keys are a word of the bit mask), and how it is run."""

    block_q: int = 128
    heads_together: int = 8
    """8 heads of 8K keys are 42 MB of keys and values, as much as the L2 of an H100 holds."""
    num_warps: int = 8
    num_stages: int = 4


def choose_config(capability: tuple[int, int]) -> MaskedPrefillConfig:
    return MaskedPrefillConfig()


def list_bits(topk_indices: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """(bits [rows, words] int64, bit n of word w is key 64 · w + n; bounds [rows, 2] int32).

    The bounds are the number of keys listed without a gap from key 0 on, or 0 where there is a
    gap, and 1 + the last listed key.
    """
    rows, topk = topk_indices.shape
    device = topk_indices.device
    bits = torch.zeros(rows, bits_per_row(num_keys), dtype=torch.int64, device=device)
    bounds = torch.empty(rows, 2, dtype=torch.int32, device=device)
    words = bits.view(torch.int32)
    _list_bits_kernel[(rows,)](
        topk_indices, words, bounds, num_keys, topk, topk_indices.stride(0), words.shape[1],
        BLOCK=LIST_BLOCK, num_warps=8,
    )  # fmt: skip
    return bits, bounds


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks of one head of [tokens, num_heads, width]."""
    x = x.transpose(0, 1)
    # a dimension of one element has any stride, which TMA would not take
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:2], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, columns])


def masked_prefill(inputs: MaskedPrefillInputs) -> MaskedPrefillOutputs:
    """Shapes and conventions as in `masked_prefill.py`; strides are multiples of 8 elements."""
    check_arguments(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    (seq_len_q, num_heads, _), seq_len_kv = q.shape, k.shape[0]
    out = torch.empty(seq_len_q, num_heads, WIDTH_V, dtype=q.dtype, device=q.device)
    lse = torch.empty(seq_len_q, num_heads, device=q.device)
    if not out.numel():
        return MaskedPrefillOutputs(out, lse)
    if not seq_len_kv:
        return MaskedPrefillOutputs(out.zero_(), lse.fill_(float("inf")))
    has_list = inputs.topk_indices is not None
    bits = bounds = lse
    if inputs.topk_indices is not None:
        bits, bounds = list_bits(inputs.topk_indices, seq_len_kv)
    config = choose_config(ask_device(q.device)[0])
    block_q = config.block_q
    _masked_prefill_kernel[(triton.cdiv(seq_len_q, block_q) * num_heads,)](
        _tiles(q, block_q, NOPE), _tiles(q, block_q, ROPE),
        _tiles(k, BITS_BLOCK, NOPE), _tiles(k, BITS_BLOCK, ROPE), _tiles(v, BITS_BLOCK, WIDTH_V),
        _tiles(out, block_q, WIDTH_V), lse, bits, bounds,
        seq_len_q, seq_len_kv, num_heads, bits_per_row(seq_len_kv), inputs.sm_scale * LOG2_E,
        HAS_LIST=has_list, HEADS_TOGETHER=config.heads_together,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return MaskedPrefillOutputs(out, lse)


def run(inputs: MaskedPrefillInputs) -> MaskedPrefillOutputs:
    return masked_prefill(inputs)


def supports(shape: MaskedPrefillShape, machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "triton masked_prefill needs a Hopper GPU (its tiles fill 208 KB of shared memory)"
    if (shape.head_dim_qk, shape.head_dim_v) != HEAD_DIMS:
        return (
            "triton masked_prefill needs head widths 192/128,"
            f" this case has {shape.head_dim_qk}/{shape.head_dim_v}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """The bit mask; attention with and without a list."""
    fp32, int32, size = "*fp32:16", "*i32:16", "i32:16"
    launch = choose_config((9, 0))

    def tile(rows: int, columns: int) -> str:
        return f"tensordesc<bf16{[1, rows, columns]}>"

    bits_case = CompileCase(
        name="masked_prefill_triton[bits]",
        kernel=_list_bits_kernel,
        signature={
            "indices_ptr": int32, "words_ptr": int32, "bounds_ptr": int32, "seq_len_kv": "i32",
            "topk": size, "stride_indices_row": size, "words_per_row": "i32",
        },
        constexprs={"BLOCK": LIST_BLOCK},
        options={"num_warps": 8},
    )  # fmt: skip
    attention_cases = [
        CompileCase(
            name=f"masked_prefill_triton[{'list' if has_list else 'causal'}]",
            kernel=_masked_prefill_kernel,
            signature={
                "q_nope_desc": tile(launch.block_q, NOPE),
                "q_rope_desc": tile(launch.block_q, ROPE),
                "k_nope_desc": tile(BITS_BLOCK, NOPE), "k_rope_desc": tile(BITS_BLOCK, ROPE),
                "v_desc": tile(BITS_BLOCK, WIDTH_V), "out_desc": tile(launch.block_q, WIDTH_V),
                "lse_ptr": fp32, "bits_ptr": "*i64:16", "bounds_ptr": int32,
                "seq_len_q": size, "seq_len_kv": size, "num_heads": size, "words_per_row": "i32",
                "qk_scale_log2": "fp32",
            },
            constexprs={
                "HAS_LIST": has_list, "HEADS_TOGETHER": launch.heads_together,
                "NUM_STAGES": launch.num_stages,
            },
            options={"num_warps": launch.num_warps},
            must_have={"HGMMA.64x64x16": 36, "HGMMA.64x128x16": 12, "UTMALDG": 9},
        )
        for has_list in (True, False)
    ]  # fmt: skip
    return [bits_case, *attention_cases]
