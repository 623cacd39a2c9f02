"""Caching of new tokens in plain Triton, in one launch for both caches.

Programs of a row of the grid share BLOCK_T tokens: the first one makes their index keys, each
other one normalises, rotates and packs LATENT_T latents, one or two rows a warp. The Hadamard
transform is 7 steps of sums and differences in fp32, within a thread or between two of a warp.
Memory bound in prefill, bound by its launch in decode.
"""

import torch
import triton
import triton.language as tl

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.cache_write import CacheWriteInputs, CacheWriteOutputs, CacheWriteShape
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.e4m3_triton import (
    hadamard_128,
    pair_of_columns,
    quantize_by,
    rotate_half_split_64,
)
from dsa_bench.kernels.paging import HEAD_DIM_QK, INDEX_DIM, INDEX_ROW_BYTES, MLA_ROW_BYTES
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "cache_write"
BLOCK_T = 16
"""Tokens whose index keys one program makes."""
NUM_WARPS = 4
LEAST_LATENT_SCALE = tl.constexpr(2.0**-13)
"""2^ceil(log2(1e-4)): LATENT_SCALE_FLOOR."""
LEAST_INDEX_SCALE = tl.constexpr(2.0**-22)
"""2^ceil(log2(1e-4 / 448)): INDEX_AMAX_FLOOR."""


@triton.jit
def _scale_of(largest, LEAST: tl.constexpr):
    """(2^ceil(log2(largest / 448)), at least LEAST, a power of two; its inverse), both exact.

    448 = 1.75 · 2^8, so a mantissa above 1.75 carries into the exponent.
    """
    bits = tl.maximum(largest, LEAST * 448.0).to(tl.int32, bitcast=True)
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    inverse = (254 << 23) - bits
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _places(slots_ptr, offs_t, exists, num_slots, PAGE_SIZE: tl.constexpr):
    """(whether there is something to write, page, offset in it), in int64."""
    slots = tl.load(slots_ptr + offs_t, mask=exists, other=-1)
    has_slot = (slots >= 0) & (slots < num_slots)
    slots = tl.where(has_slot, slots, 0)
    return has_slot, (slots // PAGE_SIZE).to(tl.int64), (slots % PAGE_SIZE).to(tl.int64)


@triton.jit
def _write_latents(
    kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr, key_ptr,
    num_tokens, num_slots, stride_kv, eps, first_t,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, LATENT_T: tl.constexpr,
):  # fmt: skip
    """LATENT_T rows of the latent cache; its pointers count elements of their own type."""
    offs_t = first_t + tl.arange(0, LATENT_T)
    exists = offs_t < num_tokens
    # waits for no slot: only the angles are not read of a token that has none
    kv_row = kv_ptr + offs_t.to(tl.int64)[:, None] * stride_kv
    offs_v = tl.arange(0, 512)
    offs_r = tl.arange(0, 64)
    offs_i = tl.arange(0, 32)
    x = tl.load(kv_row + offs_v[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    key = tl.load(kv_row + 512 + offs_r[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    # where x is, or it would go through shared memory
    weights = kv_norm_ptr + offs_v[None, :] + tl.zeros([LATENT_T, 1], tl.int32)
    weight = tl.load(weights).to(tl.float32)
    tl.debug_barrier()  # else some of these loads stand behind those that wait for others
    positions = tl.load(positions_ptr + offs_t, mask=exists, other=0).to(tl.int64)
    has_slot, page, offset = _places(slots_ptr, offs_t, exists, num_slots, PAGE_SIZE)
    row = page * PAGE_SIZE + offset
    written = has_slot[:, None]
    angles = rope_ptr + positions[:, None] * 64 + offs_i[None, :]
    cos = tl.load(angles, mask=written, other=0.0)
    sin = tl.load(angles + 32, mask=written, other=0.0)

    mean_square = tl.sum(x * x, 1) / 512
    x = x * (1.0 / tl.sqrt_rn(mean_square + eps))[:, None] * weight
    first, second = tl.split(tl.reshape(key, [LATENT_T, 32, 2]))
    pairs = tl.join(first * cos - second * sin, first * sin + second * cos)
    key = tl.reshape(pairs, [LATENT_T, 64]).to(tl.bfloat16)
    latent = x.to(tl.bfloat16)

    if FP8:
        # what is rounded before and after it is compared has the same maximum
        largest = tl.max(tl.abs(tl.reshape(x, [LATENT_T, 4, 128])), 2).to(tl.bfloat16)
        scale, inverse = _scale_of(largest.to(tl.float32), LEAST_LATENT_SCALE)
        groups = quantize_by(tl.reshape(latent, [LATENT_T, 4, 128]), inverse[:, :, None])
        values = tl.reshape(groups, [LATENT_T, 512])
        tl.store(values_ptr + row[:, None] * 656 + offs_v[None, :], values, mask=written)
        offs_g = tl.arange(0, 4)
        tl.store(scale_ptr + row[:, None] * 164 + 128 + offs_g[None, :], scale, mask=written)
        tl.store(key_ptr + row[:, None] * 328 + 264 + offs_r[None, :], key, mask=written)
    else:
        tl.store(values_ptr + row[:, None] * 576 + offs_v[None, :], latent, mask=written)
        tl.store(key_ptr + row[:, None] * 576 + 512 + offs_r[None, :], key, mask=written)


@triton.jit
def _write_index_keys(
    index_k_ptr, weight_ptr, bias_ptr, positions_ptr, rope_ptr, slots_ptr, values_ptr, scale_ptr,
    num_tokens, num_slots, stride_index_k, eps, first_t,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of the index cache; its pointers count elements of their own type."""
    offs_t = first_t + tl.arange(0, BLOCK_T)
    exists = offs_t < num_tokens
    # waits for no slot: only the angles are not read of a token that has none
    offs_d = tl.arange(0, 64)
    ptrs = index_k_ptr + offs_t.to(tl.int64)[:, None] * stride_index_k + offs_d[None, :]
    low = tl.load(ptrs, mask=exists[:, None], other=0.0).to(tl.float32)
    high = tl.load(ptrs + 64, mask=exists[:, None], other=0.0).to(tl.float32)
    low_weight, high_weight = tl.load(weight_ptr + offs_d), tl.load(weight_ptr + 64 + offs_d)
    low_bias, high_bias = tl.load(bias_ptr + offs_d), tl.load(bias_ptr + 64 + offs_d)
    tl.debug_barrier()  # else some of these loads stand behind those that wait for others
    positions = tl.load(positions_ptr + offs_t, mask=exists, other=0).to(tl.int64)
    has_slot, page, offset = _places(slots_ptr, offs_t, exists, num_slots, PAGE_SIZE)
    written = has_slot[:, None]
    angles = rope_ptr + positions[:, None] * 64 + pair_of_columns()[None, :]
    cos = tl.load(angles, mask=written, other=0.0)
    sin = tl.load(angles + 32, mask=written, other=0.0)

    mean = (tl.sum(low + high, 1) / 128)[:, None]
    low, high = low - mean, high - mean
    inverse = (1.0 / tl.sqrt_rn(tl.sum(low * low + high * high, 1) / 128 + eps))[:, None]
    low = low * inverse * low_weight[None, :] + low_bias[None, :]
    high = high * inverse * high_weight[None, :] + high_bias[None, :]
    low, high = low.to(tl.bfloat16).to(tl.float32), high.to(tl.bfloat16).to(tl.float32)
    low = rotate_half_split_64(low, cos, sin, BLOCK_T).to(tl.bfloat16).to(tl.float32)
    low, high = hadamard_128(low, high, BLOCK_T)
    if FP8:
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1).to(tl.bfloat16)
        scale, inverse = _scale_of(largest.to(tl.float32), LEAST_INDEX_SCALE)
        inverse = inverse[:, None]
        first = page * (PAGE_SIZE * 132) + offset * 128
        values = values_ptr + first[:, None] + offs_d[None, :]
        tl.store(values, quantize_by(low.to(tl.bfloat16), inverse), mask=written)
        tl.store(values + 64, quantize_by(high.to(tl.bfloat16), inverse), mask=written)
        scale_ptrs = scale_ptr + page * (PAGE_SIZE * 33) + PAGE_SIZE * 32 + offset
        tl.store(scale_ptrs, scale, mask=has_slot)
    else:
        first = (page * PAGE_SIZE + offset) * 128
        values = values_ptr + first[:, None] + offs_d[None, :]
        tl.store(values, low.to(tl.bfloat16), mask=written)
        tl.store(values + 64, high.to(tl.bfloat16), mask=written)


@triton.jit
def _cache_write_kernel(
    kv_ptr, kv_norm_ptr, index_k_ptr, index_weight_ptr, index_bias_ptr,
    positions_ptr, rope_ptr, slots_ptr,
    kv_values_ptr, kv_scale_ptr, kv_key_ptr, index_values_ptr, index_scale_ptr,
    num_tokens, num_slots, stride_kv, stride_index_k, eps,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, HAS_INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr, LATENT_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T index keys, or LATENT_T latents."""
    first_t = tl.program_id(0) * BLOCK_T
    part = tl.program_id(1)
    if HAS_INDEX:
        part -= 1
    if part >= 0:
        _write_latents(
            kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr,
            kv_values_ptr, kv_scale_ptr, kv_key_ptr,
            num_tokens, num_slots, stride_kv, eps, first_t + part * LATENT_T,
            PAGE_SIZE, FP8, LATENT_T,
        )  # fmt: skip
    elif HAS_INDEX:
        _write_index_keys(
            index_k_ptr, index_weight_ptr, index_bias_ptr, positions_ptr, rope_ptr, slots_ptr,
            index_values_ptr, index_scale_ptr,
            num_tokens, num_slots, stride_index_k, eps, first_t,
            PAGE_SIZE, FP8, BLOCK_T,
        )  # fmt: skip


def choose_latent_t(num_tokens: int) -> int:
    """Latents of a program: 4096 tokens in programs of 4 are more than an H100 holds at once.

    H100, fp8, µs for 4 / 8 / 16: 4096 tokens 8.9 / 8.2 / 8.4, 16384 tokens 20.0 / 18.7 / 18.9.
    """
    return 8 if num_tokens >= 2048 else 4


def cache_write(inputs: CacheWriteInputs, *, latent_t: int | None = None) -> None:
    """Write new tokens into both caches; formulas, shapes and conventions as in `cache_write.py`.

    `kv` and `index_k` are bf16 with any row stride, the caches contiguous. `latent_t` is 4, 8 or
    16; None chooses.
    """
    check_arguments(inputs)
    num_tokens, page_size = inputs.slots.shape[0], inputs.page_size
    if not num_tokens:
        return
    kv_cache, index_cache, index_k = inputs.kv_cache, inputs.index_cache, inputs.index_k
    has_index, is_fp8 = index_k is not None, kv_cache.dtype == torch.uint8
    if index_k is None or index_cache is None:
        index_k, index_cache = inputs.kv, kv_cache
    latent_t = latent_t or choose_latent_t(num_tokens)
    parts = -(-min(BLOCK_T, num_tokens) // latent_t) + has_index
    e4m3, fp32 = torch.float8_e4m3fn, torch.float32
    _cache_write_kernel[(-(-num_tokens // BLOCK_T), parts)](
        inputs.kv, inputs.kv_norm, index_k, inputs.index_norm_weight, inputs.index_norm_bias,
        inputs.positions, inputs.rope_table, inputs.slots,
        kv_cache.view(e4m3) if is_fp8 else kv_cache,
        kv_cache.view(fp32) if is_fp8 else inputs.rope_table,
        kv_cache.view(torch.bfloat16),
        index_cache.view(e4m3) if is_fp8 else index_cache,
        index_cache.view(fp32) if is_fp8 else inputs.rope_table,
        num_tokens, kv_cache.shape[0] * page_size, inputs.kv.stride(0), index_k.stride(0),
        inputs.eps,
        PAGE_SIZE=page_size, FP8=is_fp8, HAS_INDEX=has_index,
        BLOCK_T=BLOCK_T, LATENT_T=latent_t, num_warps=NUM_WARPS,
    )  # fmt: skip


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
            "kv_ptr": "*bf16:16", "kv_norm_ptr": "*bf16:16", "index_k_ptr": "*bf16:16",
            "index_weight_ptr": "*fp32:16", "index_bias_ptr": "*fp32:16",
            "positions_ptr": "*i32:16", "rope_ptr": "*fp32:16", "slots_ptr": "*i32:16",
            "kv_values_ptr": values, "kv_scale_ptr": "*fp32:16", "kv_key_ptr": "*bf16:16",
            "index_values_ptr": values, "index_scale_ptr": "*fp32:16",
            "num_tokens": "i32:16", "num_slots": "i32:16",
            "stride_kv": "i32:16", "stride_index_k": "i32:16", "eps": "fp32",
        }  # fmt: skip
        for num_tokens in (1, 4096):
            latent_t = choose_latent_t(num_tokens)
            constexprs = {"PAGE_SIZE": 64, "FP8": is_fp8, "HAS_INDEX": True}
            cases.append(
                CompileCase(
                    name=f"cache_write_triton[{precision}, {latent_t}]",
                    kernel=_cache_write_kernel,
                    signature=signature,
                    constexprs={**constexprs, "BLOCK_T": BLOCK_T, "LATENT_T": latent_t},
                    options={"num_warps": NUM_WARPS},
                    must_have={"LDG.E.128": 16, "STG.E.128": 1, "SHFL": 60},
                )
            )
    return cases
