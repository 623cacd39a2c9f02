"""Reading of one sequence out of the paged caches: contiguous keys for a prefill chunk.

    slot = block_table[t // page_size] · page_size + t % page_size
    kv[t] = dequantised row `slot` of kv_cache
    index_k[t] · index_k_scale[t] = row `slot` of index_cache

Shapes (precision fp8 | bf16 | fp32, the last for references):
    kv_cache       [num_pages, page_size, 656] uint8, or [num_pages, page_size, 576] bf16 or fp32
    index_cache    [num_pages, page_size · 132] uint8, or [num_pages, page_size · 128] bf16 or fp32;
                   None: no index outputs
    block_table    [max_pages]          int32              pages of the sequence, in order
    kv             [num_tokens, 576]    bf16 | bf16 | fp32
    index_k        [num_tokens, 128]    e4m3 | bf16 | fp32
    index_k_scale  [num_tokens]         fp32               ones but for fp8

The layout of both caches is in `paging.py`.

Conventions: 0 <= num_tokens <= max_pages · page_size. Entries of block_table behind the last page
of the sequence are never read; pages are not checked against num_pages. A latent is value · scale
in fp32, rounded to bf16, which is exact where the scale is a power of two; index keys are copied.

Source: vLLM's prefill of V3.2, which gathers index keys of its chunk and a bf16 copy of latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, shape_differs
from dsa_bench.kernels.paging import (
    HEAD_DIM_QK,
    INDEX_DIM,
    index_row_bytes,
    make_block_table,
    make_cache,
    mla_row_bytes,
    pack_index_pages,
    pack_mla_rows,
    split_index_pages,
    unpack_mla_rows,
)
from dsa_bench.kernels.sparse_prefill import make_attention_tensor
from dsa_bench.operator import Cost, Memory, Operator
from dsa_bench.preset import Preset
from dsa_bench.record import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReadShape:
    """num_tokens of one sequence, in a cache that holds no other."""

    num_tokens: int
    page_size: int = 64
    precision: str = "fp8"
    with_index: bool = True

    @property
    def max_pages(self) -> int:
        return -(-self.num_tokens // self.page_size)


@dataclass(frozen=True, slots=True)
class CacheReadInputs:
    kv_cache: Tensor
    index_cache: Tensor | None
    block_table: Tensor
    num_tokens: int
    page_size: int


class CacheReadOutputs(NamedTuple):
    kv: Tensor
    index_k: Tensor | None
    index_k_scale: Tensor | None


def make_inputs(shape: CacheReadShape, *, seed: int, device: torch.device | str) -> CacheReadInputs:
    """Random tokens in a cache whose pages are randomly permuted."""
    g = torch.Generator(device=device).manual_seed(seed)

    def pages_of(pages: int) -> tuple[Tensor, ...]:
        kv = make_attention_tensor(pages, shape.page_size, HEAD_DIM_QK, generator=g)
        k = torch.randn(pages, shape.page_size, INDEX_DIM, generator=g, device=device)
        return (pack_mla_rows(kv, shape.precision), pack_index_pages(k, shape.precision))

    kv_cache, index_cache = make_cache(shape.max_pages, shape.page_size, pages_of, device=device)
    return CacheReadInputs(
        kv_cache,
        index_cache if shape.with_index else None,
        make_block_table(1, shape.max_pages, g)[0],
        shape.num_tokens,
        shape.page_size,
    )


def reference(inputs: CacheReadInputs, *, rows: Tensor | None = None) -> CacheReadOutputs:
    """The formulas, of all tokens or of the positions in `rows`."""
    table = inputs.block_table
    positions = torch.arange(inputs.num_tokens, device=table.device) if rows is None else rows
    page, offset = table[positions // inputs.page_size].long(), positions % inputs.page_size
    kv = unpack_mla_rows(inputs.kv_cache[page, offset])
    kv = kv if inputs.kv_cache.dtype == torch.float32 else kv.bfloat16()
    if inputs.index_cache is None:
        return CacheReadOutputs(kv, None, None)
    values, scale = split_index_pages(inputs.index_cache, inputs.page_size)
    # as bytes: not every device can gather e4m3
    index_k = values.view(torch.uint8)[page, offset].view(values.dtype)
    ones = torch.ones(positions.numel(), device=table.device)
    return CacheReadOutputs(kv, index_k, ones if scale is None else scale[page, offset])


def check(
    inputs: CacheReadInputs, outputs: CacheReadOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Equality, element by element; NaN equals NaN."""
    expected = reference(inputs, rows=rows)
    checks = []
    for name, wanted, output in zip(expected._fields, expected, outputs, strict=True):
        if wanted is None and output is None:
            continue
        actual = output if output is None or rows is None else output[rows]
        if wanted is None or actual is None or actual.shape != wanted.shape:
            checks.append(shape_differs(name))
            continue
        x, y = actual.float(), wanted.float()
        differs = (x != y) & ~(x.isnan() & y.isnan())
        wrong = float(differs.sum().item()) if actual.dtype == wanted.dtype else float(x.numel())
        passed = actual.dtype == wanted.dtype and wrong == 0
        checks.append(
            Check(name=name, passed=passed, figures={"wrong": wrong}, limits={"wrong": 0.0})
        )
    return tuple(checks)


def _index_out_bytes(precision: str) -> int:
    """A token's index key and its scale, as they are returned."""
    return INDEX_DIM * {"fp8": 1, "bf16": 2, "fp32": 4}[precision] + 4


def _kv_out_bytes(precision: str) -> int:
    return HEAD_DIM_QK * (4 if precision == "fp32" else 2)


def cost(shape: CacheReadShape) -> Cost:
    """Rows and pages of the table read once, outputs written."""
    read, written = mla_row_bytes(shape.precision), _kv_out_bytes(shape.precision)
    if shape.with_index:
        read += index_row_bytes(shape.precision)
        written += _index_out_bytes(shape.precision)
    return Cost(
        flops=0.0,
        bytes_read=float(shape.num_tokens * read + 4 * shape.max_pages),
        bytes_written=float(shape.num_tokens * written),
    )


def memory(shape: CacheReadShape) -> Memory:
    row = mla_row_bytes(shape.precision)
    row += index_row_bytes(shape.precision) if shape.with_index else 0
    return Memory(
        input_bytes=shape.max_pages * (shape.page_size * row + 4),
        output_bytes=int(cost(shape).bytes_written),
    )


def shape_of(case: Case, preset: Preset) -> CacheReadShape:
    return CacheReadShape(
        num_tokens=case.seq_len_kv, page_size=preset.page_size, precision=case.precision
    )


OPERATOR = Operator(
    name="cache_read",
    summary="one sequence out of both paged caches, dequantised and contiguous",
    phases=("prefill",),
    axes=frozenset({"precision"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_tokens,
)
