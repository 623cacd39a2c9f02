"""Reading of one sequence out of the paged caches in plain Triton: BLOCK_T tokens a program.

Memory bound: in fp8 788 bytes read and 1284 written a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.cache_read import CacheReadInputs, CacheReadOutputs, CacheReadShape
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.paging import HEAD_DIM_QK, INDEX_DIM, INDEX_ROW_BYTES, MLA_ROW_BYTES
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "cache_read"
BLOCK_T = 8
NUM_WARPS = 4


@triton.jit
def _cache_read_kernel(
    kv_values_ptr, kv_scale_ptr, kv_key_ptr, index_values_ptr, index_scale_ptr, table_ptr,
    kv_ptr, index_k_ptr, index_k_scale_ptr, num_tokens,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, HAS_INDEX: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens; pointers into the caches count elements of their own type."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = offs_t < num_tokens
    page = tl.load(table_ptr + offs_t // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
    offset = (offs_t % PAGE_SIZE).to(tl.int64)
    row = (page * PAGE_SIZE + offset)[:, None]
    token = offs_t.to(tl.int64)[:, None]
    mask = exists[:, None]
    offs_v, offs_r = tl.arange(0, 512)[None, :], tl.arange(0, 64)[None, :]
    offs_d = tl.arange(0, 128)[None, :]
    # all loads before the first store, so that none waits for another
    if FP8:
        latent = tl.load(kv_values_ptr + row * 656 + offs_v, mask=mask, other=0.0)
        offs_g = tl.arange(0, 4)[None, :]
        scale = tl.load(kv_scale_ptr + row * 164 + 128 + offs_g, mask=mask, other=0.0)
        key = tl.load(kv_key_ptr + row * 328 + 264 + offs_r, mask=mask, other=0.0)
    else:
        latent = tl.load(kv_values_ptr + row * 576 + offs_v, mask=mask, other=0.0)
        key = tl.load(kv_key_ptr + row * 576 + 512 + offs_r, mask=mask, other=0.0)
    if HAS_INDEX:
        if FP8:
            first = (page * (PAGE_SIZE * 132) + offset * 128)[:, None]
            scale_ptrs = index_scale_ptr + page * (PAGE_SIZE * 33) + PAGE_SIZE * 32 + offset
            index_scale = tl.load(scale_ptrs, mask=exists, other=0.0)
        else:
            first = row * 128
            index_scale = tl.full([BLOCK_T], 1.0, tl.float32)
        index_k = tl.load(index_values_ptr + first + offs_d, mask=mask, other=0.0)
        tl.store(index_k_ptr + token * 128 + offs_d, index_k, mask=mask)
        tl.store(index_k_scale_ptr + offs_t, index_scale, mask=exists)
    if FP8:
        groups = tl.reshape(latent.to(tl.float32), [BLOCK_T, 4, 128]) * scale[:, :, None]
        latent = tl.reshape(groups, [BLOCK_T, 512]).to(tl.bfloat16)
    tl.store(kv_ptr + token * 576 + offs_v, latent, mask=mask)
    tl.store(kv_ptr + token * 576 + 512 + offs_r, key, mask=mask)


def cache_read(
    kv_cache: Tensor,
    index_cache: Tensor | None,
    block_table: Tensor,
    num_tokens: int,
    *,
    page_size: int,
) -> CacheReadOutputs:
    """The first num_tokens tokens of a sequence; formulas and conventions as in `cache_read.py`.

    Args:
        kv_cache: [num_pages, page_size, 656] uint8 or [num_pages, page_size, 576] bf16, contiguous.
        index_cache: [num_pages, page_size · 132] uint8, [num_pages, page_size · 128] bf16, or None.
        block_table: [max_pages] int32.
    Returns:
        kv [num_tokens, 576] bf16; index_k [num_tokens, 128] e4m3 or bf16 and index_k_scale
        [num_tokens] fp32, or None.
    """
    check_arguments(kv_cache, index_cache, block_table, num_tokens, page_size)
    is_fp8, device = kv_cache.dtype == torch.uint8, kv_cache.device
    e4m3, bf16, fp32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
    kv = torch.empty(num_tokens, HEAD_DIM_QK, dtype=bf16, device=device)
    index_k = index_k_scale = None
    if index_cache is not None:
        dtype = e4m3 if is_fp8 else bf16
        index_k = torch.empty(num_tokens, INDEX_DIM, dtype=dtype, device=device)
        index_k_scale = torch.empty(num_tokens, dtype=fp32, device=device)
    if num_tokens:
        index = kv_cache if index_cache is None else index_cache
        _cache_read_kernel[(-(-num_tokens // BLOCK_T),)](
            kv_cache.view(e4m3) if is_fp8 else kv_cache,
            kv_cache.view(fp32) if is_fp8 else block_table,
            kv_cache.view(bf16),
            index.view(e4m3) if is_fp8 else index,
            index.view(fp32) if is_fp8 else block_table,
            block_table,
            kv,
            index_k if index_k is not None else kv,
            index_k_scale if index_k_scale is not None else kv,
            num_tokens,
            PAGE_SIZE=page_size, FP8=is_fp8, HAS_INDEX=index_cache is not None, BLOCK_T=BLOCK_T,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return CacheReadOutputs(kv, index_k, index_k_scale)


def check_arguments(
    kv_cache: Tensor,
    index_cache: Tensor | None,
    block_table: Tensor,
    num_tokens: int,
    page_size: int,
) -> None:
    """Refuse what the kernel cannot read, in a sentence."""
    is_fp8 = kv_cache.dtype == torch.uint8
    row = MLA_ROW_BYTES if is_fp8 else HEAD_DIM_QK
    dtypes = (torch.uint8, torch.bfloat16)
    expect_tensor("kv_cache", kv_cache, dtypes, num_pages=None, page_size=page_size, row=row)
    expect_tensor("block_table", block_table, torch.int32, max_pages=None)
    tensors = {"kv_cache": kv_cache}
    if index_cache is not None:
        width = page_size * (INDEX_ROW_BYTES if is_fp8 else INDEX_DIM)
        num_pages = kv_cache.shape[0]
        expect_tensor(
            "index_cache", index_cache, kv_cache.dtype, num_pages=num_pages, page_width=width
        )
        tensors["index_cache"] = index_cache
    expect_same_device(**tensors, block_table=block_table)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must be contiguous and aligned to 16 bytes,"
                f" got strides {tuple(tensor.stride())} (pass x.contiguous())"
            )
    room = block_table.shape[0] * page_size
    if not 0 <= num_tokens <= room:
        raise ValueError(f"num_tokens must be 0 … max_pages · page_size = {room}, got {num_tokens}")


def run(inputs: CacheReadInputs) -> CacheReadOutputs:
    return cache_read(
        inputs.kv_cache,
        inputs.index_cache,
        inputs.block_table,
        inputs.num_tokens,
        page_size=inputs.page_size,
    )


def supports(shape: CacheReadShape, machine: Machine) -> str | None:
    if shape.precision not in ("fp8", "bf16"):
        return f"triton cache_read reads fp8 and bf16, this case is {shape.precision}"
    needed = (8, 9) if shape.precision == "fp8" else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return (
            f"triton cache_read in {shape.precision} needs sm_{needed[0]}{needed[1]} or newer,"
            f" this is {machine.name}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for precision in ("fp8", "bf16"):
        is_fp8 = precision == "fp8"
        values, scale = ("*fp8e4nv:16", "*fp32:16") if is_fp8 else ("*bf16:16", "*i32:16")
        signature = {
            "kv_values_ptr": values, "kv_scale_ptr": scale, "kv_key_ptr": "*bf16:16",
            "index_values_ptr": values, "index_scale_ptr": scale, "table_ptr": "*i32:16",
            "kv_ptr": "*bf16:16", "index_k_ptr": values, "index_k_scale_ptr": "*fp32:16",
            "num_tokens": "i32:16",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"cache_read_triton[{precision}]",
                kernel=_cache_read_kernel,
                signature=signature,
                constexprs={
                    "PAGE_SIZE": 64, "FP8": is_fp8, "HAS_INDEX": True, "BLOCK_T": BLOCK_T,
                },
                options={"num_warps": NUM_WARPS},
                must_have={"LDG.E.128": 1, "STG.E.128": 2},
            )
        )  # fmt: skip
    return cases
