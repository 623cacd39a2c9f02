"""Rows of the index cache from new tokens, in plain Triton: norm, rotation, Hadamard transform,
quantisation; formulas and layouts are in `cache_write.py` and `paging.py`.

Four tokens a warp, eight lanes each. The Hadamard transform is 7 steps of sums and differences in
fp32, within a thread or between two of a warp.
"""

import triton
import triton.language as tl

from dsa_bench.kernels.e4m3_triton import (
    LEAST_SCALE,
    hadamard_128,
    pair_of_columns,
    power_of_two_scale,
    rotate_half_split_64,
)
from dsa_bench.kernels.token_rows import (
    is_slot,
    parts_of_pairs,
    quantize_in_fp32,
    read_place,
    read_words,
    tokens_of_lanes,
)

KEYS_A_WARP = 4
"""Index keys that a warp makes at once, of eight lanes each."""


@triton.jit
def _of_columns(x, ROWS: tl.constexpr, EACH: tl.constexpr):
    """[8, ROWS], the same in all lanes of a row, as [ROWS, 8 · EACH] of EACH columns a lane."""
    x = tl.permute(tl.broadcast_to(x[:, :, None], [8, ROWS, EACH]), [1, 0, 2])
    return tl.max_constancy(tl.reshape(x, [ROWS, 8 * EACH]), [1, 8 * EACH])


@triton.jit
def _read_index_key(
    index_k_ptr, token, num_tokens, stride_index_k, BLOCK_T: tl.constexpr, IN_WORDS: tl.constexpr
):
    """Both halves of each index key, as pairs [BLOCK_T, 32]."""
    token = _of_columns(token, BLOCK_T, 4)
    row = index_k_ptr + token.to(tl.int64) * stride_index_k
    exists, words = token < num_tokens, tl.arange(0, 32)[None, :]
    low = read_words(row, words, exists, IN_WORDS)
    return low, read_words(row, 32 + words, exists, IN_WORDS)


@triton.jit
def _read_index_angle(rope_ptr, position, slot, num_slots, BLOCK_T: tl.constexpr):
    """(cos, sin) of each column of the first half; not read of a token that has no slot."""
    position, slot = _of_columns(position, BLOCK_T, 8), _of_columns(slot, BLOCK_T, 8)
    has_slot = is_slot(slot, num_slots)
    angle = rope_ptr + position.to(tl.int64) * 64 + pair_of_columns()[None, :]
    cos = tl.load(angle, mask=has_slot, other=0.0)
    return cos, tl.load(angle + 32, mask=has_slot, other=0.0)


@triton.jit
def _read_halves(vector_ptr):
    offs_d = tl.arange(0, 64)[None, :]
    return tl.load(vector_ptr + offs_d), tl.load(vector_ptr + 64 + offs_d)


@triton.jit
def _write_index_key(
    low, high, cos, sin, slot, weight, bias, values_ptr, scale_ptr,
    num_slots, eps, PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offs_d, wide_slot = tl.arange(0, 64), _of_columns(slot, BLOCK_T, 8)
    written = is_slot(wide_slot, num_slots)
    low = tl.reshape(tl.join(*parts_of_pairs(low)), [BLOCK_T, 64])
    high = tl.reshape(tl.join(*parts_of_pairs(high)), [BLOCK_T, 64])
    mean = (tl.sum(low + high, 1) / 128)[:, None]
    low, high = low - mean, high - mean
    inverse = tl.rsqrt(tl.sum(low * low + high * high, 1) / 128 + eps)[:, None]
    low = low * inverse * weight[0] + bias[0]
    high = high * inverse * weight[1] + bias[1]
    low, high = low.to(tl.bfloat16).to(tl.float32), high.to(tl.bfloat16).to(tl.float32)
    low = rotate_half_split_64(low, cos, sin, BLOCK_T).to(tl.bfloat16).to(tl.float32)
    low, high = hadamard_128(low, high, BLOCK_T)
    if FP8:
        page, offset = (wide_slot // PAGE_SIZE).to(tl.int64), wide_slot % PAGE_SIZE
        values = values_ptr + page * (PAGE_SIZE * 132) + offset * 128 + offs_d[None, :]
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1, keep_dims=True)
        largest = largest.to(tl.bfloat16).to(tl.float32)
        inverse = power_of_two_scale(largest, LEAST_SCALE)[1]
        tl.store(values, quantize_in_fp32(low.to(tl.bfloat16), inverse), mask=written)
        tl.store(values + 64, quantize_in_fp32(high.to(tl.bfloat16), inverse), mask=written)
        # once more where the slots are, a lane of each token
        largest = tl.broadcast_to(tl.permute(largest, [1, 0]), [8, BLOCK_T])
        scale = power_of_two_scale(largest, LEAST_SCALE)[0]
        page, offset = (slot // PAGE_SIZE).to(tl.int64), slot % PAGE_SIZE
        scales = scale_ptr + page * (PAGE_SIZE * 33) + PAGE_SIZE * 32 + offset
        is_first = tl.arange(0, 8)[:, None] == 0
        tl.store(scales, scale, mask=is_slot(slot, num_slots) & is_first)
    else:
        values = values_ptr + wide_slot.to(tl.int64) * 128 + offs_d[None, :]
        tl.store(values, low.to(tl.bfloat16), mask=written)
        tl.store(values + 64, high.to(tl.bfloat16), mask=written)


@triton.jit
def cache_index_keys(
    index_k_ptr, weight_ptr, bias_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr,
    num_tokens, num_slots, stride_index_k, eps, first_t, step_t,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, BLOCK_T: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of the index cache from first_t on, and those step_t further, and so on."""
    token = tokens_of_lanes(first_t, 8, BLOCK_T)
    low, high = _read_index_key(index_k_ptr, token, num_tokens, stride_index_k, BLOCK_T, IN_WORDS)
    position, slot = read_place(positions_ptr, slots_ptr, token, num_tokens)
    for _ in range(first_t, num_tokens, step_t):
        cos, sin = _read_index_angle(rope_ptr, position, slot, num_slots, BLOCK_T)
        token += step_t
        next_low, next_high = _read_index_key(
            index_k_ptr, token, num_tokens, stride_index_k, BLOCK_T, IN_WORDS
        )
        position, next_slot = read_place(positions_ptr, slots_ptr, token, num_tokens)
        # always: but without a branch the compiler moves these loads behind the arithmetic
        if num_slots > 0:
            # at every step anew, from L1: to hold them would take 32 registers
            weight, bias = _read_halves(weight_ptr), _read_halves(bias_ptr)
            _write_index_key(
                low, high, cos, sin, slot, weight, bias, values_ptr, scale_ptr,
                num_slots, eps, PAGE_SIZE, FP8, BLOCK_T,
            )  # fmt: skip
        low, high, slot = next_low, next_high, next_slot
