"""Caching of new tokens in plain Triton, in one launch for both caches.

A program makes index keys (`index_key_rows.py`) or latents (`latent_rows.py`). Few tokens take one
step of each program. Many are walked by as many programs as fit on the SMs at once, and what the
next step needs is read before this one's arithmetic: its rows and angles, the positions of the one
after. Nothing goes through shared memory and no warp waits for another. Memory bound in prefill,
bound by its launch in decode: `docs/kernels/cache_write.md`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.cache_write import CacheWriteInputs, CacheWriteOutputs, CacheWriteShape
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.index_key_rows import KEYS_A_WARP, cache_index_keys
from dsa_bench.kernels.latent_rows import cache_latents
from dsa_bench.kernels.listed_attention import ask_device
from dsa_bench.kernels.paging import HEAD_DIM_QK, INDEX_DIM, INDEX_ROW_BYTES, MLA_ROW_BYTES
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "cache_write"


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
        cache_latents(
            kv_ptr, kv_norm_ptr, positions_ptr, rope_ptr, slots_ptr,
            kv_values_ptr, kv_scale_ptr, kv_key_ptr,
            num_tokens, num_slots, stride_kv, eps, first_t, columns * (LATENT_PARTS * LATENT_T),
            FP8, LATENT_T, IN_WORDS,
        )  # fmt: skip
    elif INDEX_PARTS:
        first_t = (column * INDEX_PARTS + part) * BLOCK_T
        cache_index_keys(
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
    """Rows that are read in words, and those whose stride is odd."""
    cases = []
    for precision, in_words in (("fp8", True), ("bf16", True), ("fp8", False)):
        is_fp8 = precision == "fp8"
        values = "*fp8e4nv:16" if is_fp8 else "*bf16:16"
        row, stride = ("*i32:16", "i32:16") if in_words else ("*bf16", "i32")
        signature = {
            "kv_ptr": row, "kv_norm_ptr": "*bf16:16", "index_k_ptr": row,
            "index_weight_ptr": "*fp32:16", "index_bias_ptr": "*fp32:16",
            "positions_ptr": "*i32:16", "rope_ptr": "*fp32:16", "slots_ptr": "*i32:16",
            "kv_values_ptr": values, "kv_scale_ptr": "*fp32:16", "kv_key_ptr": "*bf16:16",
            "index_values_ptr": values, "index_scale_ptr": "*fp32:16",
            "num_tokens": "i32:16", "num_slots": "i32:16",
            "stride_kv": stride, "stride_index_k": stride, "eps": "fp32",
        }  # fmt: skip
        config = choose_config(4096, 132)
        constexprs = {
            "PAGE_SIZE": 64, "FP8": is_fp8, "INDEX_PARTS": config.index_parts,
            "LATENT_PARTS": config.latent_parts, "BLOCK_T": config.block_t,
            "LATENT_T": config.latent_t, "IN_WORDS": in_words,
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"cache_write_triton[{precision}{'' if in_words else ', odd rows'}]",
                kernel=_cache_write_kernel,
                signature=signature,
                constexprs=constexprs,
                options={"num_warps": config.num_warps},
                must_have={"LDG.E.128": 16 if in_words else 2, "STG.E.128": 1, "SHFL": 60},
                max_shared_bytes=0 if in_words else None,
            )
        )
    return cases
