"""Rows of the latent cache from new tokens, in plain Triton: norm, rotation, quantisation; formulas
and layouts are in `cache_write.py` and `paging.py`.

A token a warp, 16 columns and a pair of rope columns a lane, or two tokens a warp.
"""

import triton
import triton.language as tl

from dsa_bench.kernels.e4m3_triton import power_of_two_scale
from dsa_bench.kernels.token_rows import (
    is_slot,
    parts_of_pairs,
    quantize_in_fp32,
    read_place,
    read_words,
    tokens_of_lanes,
)

LEAST_LATENT_SCALE = tl.constexpr(2.0**-13)
"""2^ceil(log2(1e-4)): LATENT_SCALE_FLOOR."""


@triton.jit
def _latent_columns(WIDTH: tl.constexpr):
    """[32, 1, 16 / WIDTH, WIDTH]: of a lane, WIDTH beside one another: 16 bytes of the cache."""
    lane = tl.arange(0, 32)[:, None, None, None]
    part = tl.arange(0, 16 // WIDTH)[None, None, :, None]
    return (part * 32 + lane) * WIDTH + tl.arange(0, WIDTH)[None, None, None, :]


@triton.jit
def _read_latent(kv_ptr, token, num_tokens, stride_kv, WIDTH: tl.constexpr, IN_WORDS: tl.constexpr):
    """(latent, key) as pairs: [32, LATENT_T, 2, 4] in the order of `_latent_columns`, and one."""
    row = kv_ptr + token.to(tl.int64) * stride_kv
    exists = token < num_tokens
    lane = tl.arange(0, 32)[:, None]
    each, part = lane[:, :, None, None], tl.arange(0, 2)[None, None, :, None]
    first = each * 8 + part * 4 if WIDTH == 16 else (part * 32 + each) * 4
    words = first + tl.arange(0, 4)[None, None, None, :]
    latent = read_words(row[:, :, None, None], words, exists[:, :, None, None], IN_WORDS)
    return latent, read_words(row, 256 + lane, exists, IN_WORDS)


@triton.jit
def _read_angle(rope_ptr, position, slot, num_slots):
    """(cos, sin) of the pair of each lane; not read of a token that has no slot."""
    has_slot = is_slot(slot, num_slots)
    angle = rope_ptr + position.to(tl.int64) * 64 + tl.arange(0, 32)[:, None]
    cos = tl.load(angle, mask=has_slot, other=0.0)
    return cos, tl.load(angle + 32, mask=has_slot, other=0.0)


@triton.jit
def _write_latent(
    latent, key, cos, sin, slot, weight, values_ptr, scale_ptr, key_ptr, num_slots, eps,
    FP8: tl.constexpr, LATENT_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    low, high = parts_of_pairs(latent)
    x = tl.reshape(tl.join(low, high), [32, LATENT_T, 16 // WIDTH, WIDTH])
    mean_square = tl.sum(tl.sum(tl.sum(x * x, 3), 2), 0, keep_dims=True) / 512
    # as torch.rsqrt on a GPU; a rounded root and a division take 20 instructions more
    x = x * tl.rsqrt(mean_square + eps)[:, :, None, None] * weight
    first, second = parts_of_pairs(key)
    pair = tl.join(first * cos - second * sin, first * sin + second * cos).to(tl.bfloat16)

    has_slot, row = is_slot(slot, num_slots), slot.to(tl.int64)
    written, columns = has_slot[:, :, None, None], _latent_columns(WIDTH)
    lane = tl.arange(0, 32)[:, None]
    pair_columns = lane[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    if FP8:
        # what is rounded before and after it is compared has the same maximum
        largest = tl.reshape(tl.max(tl.max(tl.abs(x), 3), 2), [4, 8, LATENT_T])
        largest = tl.max(largest, 1, keep_dims=True).to(tl.bfloat16).to(tl.float32)
        largest = tl.reshape(tl.broadcast_to(largest, [4, 8, LATENT_T]), [32, LATENT_T])
        scale, inverse = power_of_two_scale(largest, LEAST_LATENT_SCALE)
        values = quantize_in_fp32(x.to(tl.bfloat16), inverse[:, :, None, None])
        tl.store(values_ptr + (row * 656)[:, :, None, None] + columns, values, mask=written)
        scales = scale_ptr + row * 164 + 128 + lane // 8
        tl.store(scales, scale, mask=has_slot & (lane % 8 == 0))
        keys = key_ptr + (row * 328 + 264)[:, :, None] + pair_columns
    else:
        values = values_ptr + (row * 576)[:, :, None, None] + columns
        tl.store(values, x.to(tl.bfloat16), mask=written)
        keys = key_ptr + (row * 576 + 512)[:, :, None] + pair_columns
    tl.store(keys, pair, mask=has_slot[:, :, None])


@triton.jit
def cache_latents(
    kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr, key_ptr,
    num_tokens, num_slots, stride_kv, eps, first_t, step_t,
    FP8: tl.constexpr, LATENT_T: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """LATENT_T rows of the latent cache from first_t on, and those step_t further, and so on.

    Pointers to caches count elements of their own type.
    """
    WIDTH: tl.constexpr = 16 if FP8 else 8
    token = tokens_of_lanes(first_t, 32, LATENT_T)
    latent, key = _read_latent(kv_ptr, token, num_tokens, stride_kv, WIDTH, IN_WORDS)
    # where x is, or it would go through shared memory
    columns = _latent_columns(WIDTH) + tl.zeros([1, LATENT_T, 1, 1], tl.int32)
    weight = tl.load(kv_norm_ptr + columns).to(tl.float32)
    position, slot = read_place(positions_ptr, slots_ptr, token, num_tokens)
    token += step_t
    next_position, next_slot = read_place(positions_ptr, slots_ptr, token, num_tokens)
    cos, sin = _read_angle(rope_ptr, position, slot, num_slots)
    for _ in range(first_t, num_tokens, step_t):
        next_latent, next_key = _read_latent(kv_ptr, token, num_tokens, stride_kv, WIDTH, IN_WORDS)
        next_cos, next_sin = _read_angle(rope_ptr, next_position, next_slot, num_slots)
        token += step_t
        next_position, later_slot = read_place(positions_ptr, slots_ptr, token, num_tokens)
        # always: but without a branch the compiler moves these loads behind the arithmetic
        if num_slots > 0:
            _write_latent(
                latent, key, cos, sin, slot, weight, values_ptr, scale_ptr, key_ptr, num_slots, eps,
                FP8, LATENT_T, WIDTH,
            )  # fmt: skip
        latent, key, cos, sin = next_latent, next_key, next_cos, next_sin
        slot, next_slot = next_slot, later_slot
