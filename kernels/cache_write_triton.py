"""Caching of new tokens in plain Triton, in one launch for both caches.

A program makes index keys, four tokens a warp and eight lanes each, or latents, a token a warp.
Few tokens take one step of each program. Many are walked by as many programs as fit on the SMs at
once, and what the next step needs is read before this one's arithmetic: its rows and angles, the
positions of the one after. Nothing goes through shared memory and no warp waits for another.
The Hadamard transform is 7 steps of sums and differences in fp32, within a thread or between two of
a warp. Memory bound in prefill, bound by its launch in decode.

Tensors of [lanes, tokens] hold one element a thread, the lane in dimension 0: of dimensions in
which nothing is contiguous the compiler lays the first along the lanes of a warp.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.cache_write import CacheWriteInputs, CacheWriteOutputs, CacheWriteShape
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import (
    hadamard_128,
    pair_of_columns,
    power_of_two_scale,
    rotate_half_split_64,
)
from dsa_bench.kernels.listed_attention import ask_device
from dsa_bench.kernels.paging import HEAD_DIM_QK, INDEX_DIM, INDEX_ROW_BYTES, MLA_ROW_BYTES
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "cache_write"
KEYS_A_WARP = 4
"""Index keys that a warp makes at once, of eight lanes each."""
LEAST_LATENT_SCALE = tl.constexpr(2.0**-13)
"""2^ceil(log2(1e-4)): LATENT_SCALE_FLOOR."""
LEAST_INDEX_SCALE = tl.constexpr(2.0**-22)
"""2^ceil(log2(1e-4 / 448)): INDEX_AMAX_FLOOR."""


@triton.jit
def _tokens_of_lanes(first_t, LANES: tl.constexpr, ROWS: tl.constexpr):
    """[LANES, ROWS] of first_t … first_t + ROWS - 1, each in all its lanes.

    By way of a remainder, or the compiler would see that they follow one another and lay them, not
    the lanes, along a warp.
    """
    return tl.reshape(first_t + tl.arange(0, LANES * ROWS) % ROWS, [LANES, ROWS])


@triton.jit
def _read_place(positions_ptr, slots_ptr, token, num_tokens):
    """(position, slot); the slot is -1 beyond the last token."""
    exists = token < num_tokens
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    return position, tl.load(slots_ptr + token, mask=exists, other=-1)


@triton.jit
def _is_slot(slot, num_slots):
    return (slot >= 0) & (slot < num_slots)


@triton.jit
def _read_words(row, words, exists, IN_WORDS: tl.constexpr):
    """Pairs of bf16 in int32; `row` points to int32 if IN_WORDS, else to bf16 of any alignment.

    Pairs, because a loop that carries bf16 from one step to the next holds 16 bits a register, and
    waits for the load at the end of the step to part them.
    """
    if IN_WORDS:
        pairs = tl.load(row + words, mask=exists, other=0)
    else:
        low = tl.load(row + 2 * words, mask=exists, other=0.0).to(tl.int16, bitcast=True)
        high = tl.load(row + 2 * words + 1, mask=exists, other=0.0).to(tl.int16, bitcast=True)
        pairs = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return pairs


@triton.jit
def _parts(pairs):
    """(first, second) of each pair, in fp32."""
    first, second = pairs << 16, pairs & -65536
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _quantize(y, inverse):
    """bf16 times `inverse`, a power of two in fp32, to e4m3, as `quantize_by` does: by way of fp32,
    for which the compiler's own way takes three instructions for two elements and this one two."""
    y = (y * inverse.to(tl.bfloat16)).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return y.to(tl.float32, bitcast=True).to(tl.float8e4nv)


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
    latent = _read_words(row[:, :, None, None], words, exists[:, :, None, None], IN_WORDS)
    return latent, _read_words(row, 256 + lane, exists, IN_WORDS)


@triton.jit
def _read_angle(rope_ptr, position, slot, num_slots):
    """(cos, sin) of the pair of each lane; not read of a token that has no slot."""
    is_slot = _is_slot(slot, num_slots)
    angle = rope_ptr + position.to(tl.int64) * 64 + tl.arange(0, 32)[:, None]
    cos = tl.load(angle, mask=is_slot, other=0.0)
    return cos, tl.load(angle + 32, mask=is_slot, other=0.0)


@triton.jit
def _write_latent(
    latent, key, cos, sin, slot, weight, values_ptr, scale_ptr, key_ptr, num_slots, eps,
    FP8: tl.constexpr, LATENT_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    low, high = _parts(latent)
    x = tl.reshape(tl.join(low, high), [32, LATENT_T, 16 // WIDTH, WIDTH])
    mean_square = tl.sum(tl.sum(tl.sum(x * x, 3), 2), 0, keep_dims=True) / 512
    # as torch.rsqrt on a GPU; a rounded root and a division take 20 instructions more
    x = x * tl.rsqrt(mean_square + eps)[:, :, None, None] * weight
    first, second = _parts(key)
    pair = tl.join(first * cos - second * sin, first * sin + second * cos).to(tl.bfloat16)

    is_slot, row = _is_slot(slot, num_slots), slot.to(tl.int64)
    written, columns = is_slot[:, :, None, None], _latent_columns(WIDTH)
    lane = tl.arange(0, 32)[:, None]
    pair_columns = lane[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    if FP8:
        # what is rounded before and after it is compared has the same maximum
        largest = tl.reshape(tl.max(tl.max(tl.abs(x), 3), 2), [4, 8, LATENT_T])
        largest = tl.max(largest, 1, keep_dims=True).to(tl.bfloat16).to(tl.float32)
        largest = tl.reshape(tl.broadcast_to(largest, [4, 8, LATENT_T]), [32, LATENT_T])
        scale, inverse = power_of_two_scale(largest, LEAST_LATENT_SCALE)
        values = _quantize(x.to(tl.bfloat16), inverse[:, :, None, None])
        tl.store(values_ptr + (row * 656)[:, :, None, None] + columns, values, mask=written)
        scales = scale_ptr + row * 164 + 128 + lane // 8
        tl.store(scales, scale, mask=is_slot & (lane % 8 == 0))
        keys = key_ptr + (row * 328 + 264)[:, :, None] + pair_columns
    else:
        values = values_ptr + (row * 576)[:, :, None, None] + columns
        tl.store(values, x.to(tl.bfloat16), mask=written)
        keys = key_ptr + (row * 576 + 512)[:, :, None] + pair_columns
    tl.store(keys, pair, mask=is_slot[:, :, None])


@triton.jit
def _cache_latents(
    kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr, key_ptr,
    num_tokens, num_slots, stride_kv, eps, first_t, step_t,
    FP8: tl.constexpr, LATENT_T: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """LATENT_T rows of the latent cache from first_t on, and those step_t further, and so on.

    Pointers to caches count elements of their own type.
    """
    WIDTH: tl.constexpr = 16 if FP8 else 8
    token = _tokens_of_lanes(first_t, 32, LATENT_T)
    latent, key = _read_latent(kv_ptr, token, num_tokens, stride_kv, WIDTH, IN_WORDS)
    # where x is, or it would go through shared memory
    columns = _latent_columns(WIDTH) + tl.zeros([1, LATENT_T, 1, 1], tl.int32)
    weight = tl.load(kv_norm_ptr + columns).to(tl.float32)
    position, slot = _read_place(positions_ptr, slots_ptr, token, num_tokens)
    token += step_t
    next_position, next_slot = _read_place(positions_ptr, slots_ptr, token, num_tokens)
    cos, sin = _read_angle(rope_ptr, position, slot, num_slots)
    for _ in range(first_t, num_tokens, step_t):
        next_latent, next_key = _read_latent(kv_ptr, token, num_tokens, stride_kv, WIDTH, IN_WORDS)
        next_cos, next_sin = _read_angle(rope_ptr, next_position, next_slot, num_slots)
        token += step_t
        next_position, later_slot = _read_place(positions_ptr, slots_ptr, token, num_tokens)
        # always: but without a branch the compiler moves these loads behind the arithmetic
        if num_slots > 0:
            _write_latent(
                latent, key, cos, sin, slot, weight, values_ptr, scale_ptr, key_ptr, num_slots, eps,
                FP8, LATENT_T, WIDTH,
            )  # fmt: skip
        latent, key, cos, sin = next_latent, next_key, next_cos, next_sin
        slot, next_slot = next_slot, later_slot


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
    low = _read_words(row, words, exists, IN_WORDS)
    return low, _read_words(row, 32 + words, exists, IN_WORDS)


@triton.jit
def _read_index_angle(rope_ptr, position, slot, num_slots, BLOCK_T: tl.constexpr):
    """(cos, sin) of each column of the first half; not read of a token that has no slot."""
    position, slot = _of_columns(position, BLOCK_T, 8), _of_columns(slot, BLOCK_T, 8)
    is_slot = _is_slot(slot, num_slots)
    angle = rope_ptr + position.to(tl.int64) * 64 + pair_of_columns()[None, :]
    cos = tl.load(angle, mask=is_slot, other=0.0)
    return cos, tl.load(angle + 32, mask=is_slot, other=0.0)


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
    written = _is_slot(wide_slot, num_slots)
    low = tl.reshape(tl.join(*_parts(low)), [BLOCK_T, 64])
    high = tl.reshape(tl.join(*_parts(high)), [BLOCK_T, 64])
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
        inverse = power_of_two_scale(largest, LEAST_INDEX_SCALE)[1]
        tl.store(values, _quantize(low.to(tl.bfloat16), inverse), mask=written)
        tl.store(values + 64, _quantize(high.to(tl.bfloat16), inverse), mask=written)
        # once more where the slots are, a lane of each token
        largest = tl.broadcast_to(tl.permute(largest, [1, 0]), [8, BLOCK_T])
        scale = power_of_two_scale(largest, LEAST_INDEX_SCALE)[0]
        page, offset = (slot // PAGE_SIZE).to(tl.int64), slot % PAGE_SIZE
        scales = scale_ptr + page * (PAGE_SIZE * 33) + PAGE_SIZE * 32 + offset
        is_first = tl.arange(0, 8)[:, None] == 0
        tl.store(scales, scale, mask=_is_slot(slot, num_slots) & is_first)
    else:
        values = values_ptr + wide_slot.to(tl.int64) * 128 + offs_d[None, :]
        tl.store(values, low.to(tl.bfloat16), mask=written)
        tl.store(values + 64, high.to(tl.bfloat16), mask=written)


@triton.jit
def _cache_index_keys(
    index_k_ptr, weight_ptr, bias_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr,
    num_tokens, num_slots, stride_index_k, eps, first_t, step_t,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, BLOCK_T: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of the index cache from first_t on, and those step_t further, and so on."""
    token = _tokens_of_lanes(first_t, 8, BLOCK_T)
    low, high = _read_index_key(index_k_ptr, token, num_tokens, stride_index_k, BLOCK_T, IN_WORDS)
    position, slot = _read_place(positions_ptr, slots_ptr, token, num_tokens)
    for _ in range(first_t, num_tokens, step_t):
        cos, sin = _read_index_angle(rope_ptr, position, slot, num_slots, BLOCK_T)
        token += step_t
        next_low, next_high = _read_index_key(
            index_k_ptr, token, num_tokens, stride_index_k, BLOCK_T, IN_WORDS
        )
        position, next_slot = _read_place(positions_ptr, slots_ptr, token, num_tokens)
        # always: but without a branch the compiler moves these loads behind the arithmetic
        if num_slots > 0:
            # at every step anew, from L1: to hold them would take 32 registers
            weight, bias = _read_halves(weight_ptr), _read_halves(bias_ptr)
            _write_index_key(
                low, high, cos, sin, slot, weight, bias, values_ptr, scale_ptr,
                num_slots, eps, PAGE_SIZE, FP8, BLOCK_T,
            )  # fmt: skip
        low, high, slot = next_low, next_high, next_slot


@triton.jit
def _cache_write_kernel(
    kv_ptr, kv_norm_ptr, index_k_ptr, index_weight_ptr, index_bias_ptr,
    positions_ptr, rope_ptr, slots_ptr,
    kv_values_ptr, kv_scale_ptr, kv_key_ptr, index_values_ptr, index_scale_ptr,
    num_tokens, num_slots, stride_kv, stride_index_k, eps,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, INDEX_PARTS: tl.constexpr,
    LATENT_PARTS: tl.constexpr, BLOCK_T: tl.constexpr, LATENT_T: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    """One program: index keys in the first INDEX_PARTS rows of the grid, latents in the others."""
    column, columns, part = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    if part >= INDEX_PARTS:
        first_t = (column * LATENT_PARTS + part - INDEX_PARTS) * LATENT_T
        _cache_latents(
            kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr,
            kv_values_ptr, kv_scale_ptr, kv_key_ptr,
            num_tokens, num_slots, stride_kv, eps, first_t, columns * (LATENT_PARTS * LATENT_T),
            FP8, LATENT_T, IN_WORDS,
        )  # fmt: skip
    elif INDEX_PARTS:
        first_t = (column * INDEX_PARTS + part) * BLOCK_T
        _cache_index_keys(
            index_k_ptr, index_weight_ptr, index_bias_ptr, positions_ptr, rope_ptr, slots_ptr,
            index_values_ptr, index_scale_ptr,
            num_tokens, num_slots, stride_index_k, eps, first_t, columns * (INDEX_PARTS * BLOCK_T),
            PAGE_SIZE, FP8, BLOCK_T, IN_WORDS,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheWriteConfig:
    """A grid of `columns` times `index_parts` programs for index keys, `latent_parts` for latents.

    They step on by what the whole grid takes at once, until all tokens are written.
    """

    columns: int
    index_parts: int
    latent_parts: int
    latent_t: int
    """Latents that a program makes at once: one or two a warp."""
    num_warps: int = 4
    max_registers: int | None = None
    """A thread; None leaves them to the compiler."""

    @property
    def block_t(self) -> int:
        """Index keys that a program makes at once."""
        return KEYS_A_WARP * self.num_warps


def choose_config(num_tokens: int, num_sms: int) -> CacheWriteConfig:
    """One step of as many programs as it takes, or as many as the SMs hold at once.

    With 80 registers those are six an SM. H100, fp8, 16384 tokens, µs by index + latent programs an
    SM: 1 + 5 18.7, 2 + 4 16.2, 1 + 4 17.8; one step of each program, as many as it takes, 19.2.
    """
    latent_t, block_t = 4, 16
    columns = min(num_sms, -(-num_tokens // block_t))
    index_parts, latent_parts = 1, -(-min(block_t, num_tokens) // latent_t)
    if num_tokens > block_t * num_sms:
        index_parts, latent_parts = 2, 4
    return CacheWriteConfig(
        columns=columns, index_parts=index_parts, latent_parts=latent_parts, latent_t=latent_t
    )


def cache_write(inputs: CacheWriteInputs, *, config: CacheWriteConfig | None = None) -> None:
    """Write new tokens into both caches; formulas, shapes and conventions as in `cache_write.py`.

    `kv` and `index_k` are bf16 with any row stride (an odd one is slow), the caches contiguous.
    """
    check_arguments(inputs)
    num_tokens, page_size = inputs.slots.shape[0], inputs.page_size
    if not num_tokens:
        return
    if config is None:
        config = choose_config(num_tokens, ask_device(inputs.kv.device)[1])
    kv, kv_cache, index_cache = inputs.kv, inputs.kv_cache, inputs.index_cache
    index_k, is_fp8 = inputs.index_k, kv_cache.dtype == torch.uint8
    index_parts = 0 if index_k is None else config.index_parts
    if index_k is None or index_cache is None:
        index_k, index_cache = kv, kv_cache
    in_words = _has_words(kv) and _has_words(index_k)
    if in_words:
        kv, index_k = kv.view(torch.int32), index_k.view(torch.int32)
    e4m3, fp32 = torch.float8_e4m3fn, torch.float32
    _cache_write_kernel[(config.columns, index_parts + config.latent_parts)](
        kv, inputs.kv_norm, index_k, inputs.index_norm_weight, inputs.index_norm_bias,
        inputs.positions, inputs.rope_table, inputs.slots,
        kv_cache.view(e4m3) if is_fp8 else kv_cache,
        kv_cache.view(fp32) if is_fp8 else inputs.rope_table,
        kv_cache.view(torch.bfloat16),
        index_cache.view(e4m3) if is_fp8 else index_cache,
        index_cache.view(fp32) if is_fp8 else inputs.rope_table,
        num_tokens, kv_cache.shape[0] * page_size, kv.stride(0), index_k.stride(0), inputs.eps,
        PAGE_SIZE=page_size, FP8=is_fp8, INDEX_PARTS=index_parts,
        LATENT_PARTS=config.latent_parts, BLOCK_T=config.block_t, LATENT_T=config.latent_t,
        IN_WORDS=in_words,
        num_warps=config.num_warps, maxnreg=config.max_registers,
    )  # fmt: skip


def _has_words(x: Tensor) -> bool:
    """Whether each row of bf16 is one of pairs too."""
    return x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0 and x.data_ptr() % 4 == 0


def check_arguments(inputs: CacheWriteInputs) -> None:
    """Refuse what the kernel cannot read or write, in a sentence."""
    bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32
    num_tokens, page_size = inputs.kv.shape[0], inputs.page_size
    expect_tensor("kv", inputs.kv, bf16, num_tokens=None, head_dim_qk=HEAD_DIM_QK)
    expect_tensor("kv_norm", inputs.kv_norm, bf16, head_dim_v=HEAD_DIM_QK - 64)
    expect_tensor("positions", inputs.positions, int32, num_tokens=num_tokens)
    expect_tensor("slots", inputs.slots, int32, num_tokens=num_tokens)
    expect_tensor("rope_table", inputs.rope_table, fp32, num_positions=None, head_dim_rope=64)
    is_fp8 = inputs.kv_cache.dtype == torch.uint8
    row = MLA_ROW_BYTES if is_fp8 else HEAD_DIM_QK
    pages = {"num_pages": None, "page_size": page_size}
    expect_tensor("kv_cache", inputs.kv_cache, (torch.uint8, bf16), **pages, row=row)
    if (inputs.index_k is None) != (inputs.index_cache is None):
        raise ValueError("index_k and index_cache must both be given, or both be None")
    tensors = {"kv_cache": inputs.kv_cache, "rope_table": inputs.rope_table}
    if inputs.index_k is not None and inputs.index_cache is not None:
        width = page_size * (INDEX_ROW_BYTES if is_fp8 else INDEX_DIM)
        expect_tensor("index_k", inputs.index_k, bf16, num_tokens=num_tokens, index_dim=INDEX_DIM)
        for name in ("index_norm_weight", "index_norm_bias"):
            expect_tensor(name, getattr(inputs, name), fp32, index_dim=INDEX_DIM)
        num_pages = inputs.kv_cache.shape[0]
        expect_tensor(
            "index_cache", inputs.index_cache, inputs.kv_cache.dtype,
            num_pages=num_pages, page_width=width,
        )  # fmt: skip
        tensors["index_cache"] = inputs.index_cache
    expect_same_device(
        kv=inputs.kv, index_k=inputs.index_k, kv_norm=inputs.kv_norm, positions=inputs.positions,
        slots=inputs.slots, index_norm_weight=inputs.index_norm_weight,
        index_norm_bias=inputs.index_norm_bias, **tensors,
    )  # fmt: skip
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must be contiguous and aligned to 16 bytes,"
                f" got strides {tuple(tensor.stride())} (allocate it as a tensor of its own)"
            )


def run(inputs: CacheWriteInputs) -> CacheWriteOutputs:
    cache_write(inputs)
    return CacheWriteOutputs(inputs.kv_cache, inputs.index_cache)


def supports(shape: CacheWriteShape, machine: Machine) -> str | None:
    if shape.precision not in ("fp8", "bf16"):
        return f"triton cache_write writes fp8 and bf16, this case is {shape.precision}"
    needed = (8, 9) if shape.precision == "fp8" else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return (
            f"triton cache_write in {shape.precision} needs sm_{needed[0]}{needed[1]} or newer,"
            f" this is {machine.name}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for precision in ("fp8", "bf16"):
        is_fp8 = precision == "fp8"
        values = "*fp8e4nv:16" if is_fp8 else "*bf16:16"
        signature = {
            "kv_ptr": "*i32:16", "kv_norm_ptr": "*bf16:16", "index_k_ptr": "*i32:16",
            "index_weight_ptr": "*fp32:16", "index_bias_ptr": "*fp32:16",
            "positions_ptr": "*i32:16", "rope_ptr": "*fp32:16", "slots_ptr": "*i32:16",
            "kv_values_ptr": values, "kv_scale_ptr": "*fp32:16", "kv_key_ptr": "*bf16:16",
            "index_values_ptr": values, "index_scale_ptr": "*fp32:16",
            "num_tokens": "i32:16", "num_slots": "i32:16",
            "stride_kv": "i32:16", "stride_index_k": "i32:16", "eps": "fp32",
        }  # fmt: skip
        config = choose_config(4096, 132)
        constexprs = {
            "PAGE_SIZE": 64, "FP8": is_fp8, "INDEX_PARTS": config.index_parts,
            "LATENT_PARTS": config.latent_parts, "BLOCK_T": config.block_t,
            "LATENT_T": config.latent_t, "IN_WORDS": True,
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"cache_write_triton[{precision}]",
                kernel=_cache_write_kernel,
                signature=signature,
                constexprs=constexprs,
                options={"num_warps": config.num_warps},
                must_have={"LDG.E.128": 16, "STG.E.128": 1, "SHFL": 60},
            )
        )
    return cases
