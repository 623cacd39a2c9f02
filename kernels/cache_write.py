"""Caching of new tokens: norms and rotations of latents and index keys, written to their slots.

    c = rms_norm(kv[t, :512]) · kv_norm           r = rotate_interleaved(kv[t, 512:], positions[t])
    y = layer_norm(index_k[t]) · index_norm_weight + index_norm_bias
    k = hadamard_128 · [rotate_half_split(y[:64], positions[t]) | y[64:]] · 128^-1/2
    row slots[t] of kv_cache <- [c | r]           row slots[t] of index_cache <- k

Shapes:
    kv                 [num_tokens, 576]  bf16  any row stride
    kv_norm            [512]              bf16
    index_k            [num_tokens, 128]  bf16  any row stride; None: no index cache
    index_norm_weight  [128]              fp32, as index_norm_bias
    positions          [num_tokens]       int32  rows of rope_table
    rope_table         [num_positions, 64] fp32  cos | sin (`rope.py`)
    slots              [num_tokens]       int32  page · page_size + offset
    kv_cache           [num_pages, page_size, 656] uint8, or [num_pages, page_size, 576] bf16
    index_cache        [num_pages, page_size · 132] uint8, or [num_pages, page_size · 128] bf16

The layout of both caches is in `paging.py`; a uint8 cache is written in fp8. The outputs are the
caches that came in: they are written in place.

Conventions: a token whose slot is not in 0 … num_pages · page_size - 1 is skipped, whatever else
stands in its rows. No two tokens have the same slot. All bytes of other slots stay.

Rounding: sums, norms and rotations are in fp32. To bf16 are rounded c; r; y; the rotated first half
of y; k. What was rounded to bf16 is then quantised. Tensors in fp32 are rounded nowhere, but by the
quantisation if the cache is fp8.

Source: DeepSeek-V3.2-Exp, inference/model.py (MLA and Indexer), with the layout of the index key's
rotation as it was corrected in November 2025.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import BF16_ROUNDING, Check, compare_to_budget
from dsa_bench.kernels.fp8 import (
    E4M3_MAX,
    INDEX_AMAX_FLOOR,
    LATENT_SCALE_FLOOR,
    round_up_to_power_of_two,
)
from dsa_bench.kernels.paged_indexer import expect_new_tokens
from dsa_bench.kernels.paging import (
    HEAD_DIM_QK,
    HEAD_DIM_ROPE,
    HEAD_DIM_V,
    INDEX_DIM,
    LATENT_GROUP,
    PRECISIONS,
    SCALE_BYTES,
    index_row_bytes,
    make_block_table,
    mla_row_bytes,
    pack_index_pages,
    pack_mla_rows,
    split_index_pages,
    unpack_index_pages,
    unpack_mla_rows,
)
from dsa_bench.kernels.rope import hadamard, rope_table, rotate_half_split, rotate_interleaved
from dsa_bench.operator import Cost, Memory, Operator
from dsa_bench.preset import Preset
from dsa_bench.record import Case

E4M3_ROUNDING = 2.0**-4
"""Largest relative error of one rounding to e4m3."""
SCALE_MARGIN = 2.0**-6
"""Roundings to bf16 may move the largest element of a group by this share at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheWriteShape:
    """The last seq_len_q tokens of each of batch_size contexts of seq_len_kv."""

    batch_size: int
    seq_len_kv: int
    seq_len_q: int = 1
    page_size: int = 64
    precision: str = "fp8"
    with_index: bool = True

    def __post_init__(self) -> None:
        expect_new_tokens(self.seq_len_q, self.seq_len_kv)

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len_q

    @property
    def max_pages(self) -> int:
        return -(-self.seq_len_kv // self.page_size)


@dataclass(frozen=True, slots=True)
class CacheWriteInputs:
    kv: Tensor
    kv_norm: Tensor
    index_k: Tensor | None
    index_norm_weight: Tensor | None
    index_norm_bias: Tensor | None
    eps: float
    positions: Tensor
    rope_table: Tensor
    slots: Tensor
    kv_cache: Tensor
    index_cache: Tensor | None
    page_size: int


class CacheWriteOutputs(NamedTuple):
    kv_cache: Tensor
    index_cache: Tensor | None


class NewRows(NamedTuple):
    """What is to be cached, before it is packed."""

    kv: Tensor
    index_k: Tensor | None


def make_inputs(
    shape: CacheWriteShape, *, seed: int, device: torch.device | str
) -> CacheWriteInputs:
    """Gaussian tokens, as slices of one wider tensor, at the ends of contexts in permuted pages.

    The caches are full of NaN: a row that was not written shows.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    preset, tokens = Preset(name=""), shape.num_tokens
    width = preset.q_lora_rank + INDEX_DIM + HEAD_DIM_QK
    down = torch.randn(tokens, width, generator=g, device=device).bfloat16()
    _, index_k, kv = down.split((preset.q_lora_rank, INDEX_DIM, HEAD_DIM_QK), dim=1)
    first = shape.seq_len_kv - shape.seq_len_q
    positions = torch.arange(first, shape.seq_len_kv, device=device).repeat(shape.batch_size)
    table = make_block_table(shape.batch_size, shape.max_pages, g)
    sequence = torch.arange(shape.batch_size, device=device).repeat_interleave(shape.seq_len_q)
    slots = table[sequence, positions // shape.page_size] * shape.page_size
    kv_cache, index_cache = _nan_caches(shape, device)
    return CacheWriteInputs(
        kv,
        1 + torch.randn(HEAD_DIM_V, generator=g, device=device).div(10).bfloat16(),
        index_k if shape.with_index else None,
        1 + torch.randn(INDEX_DIM, generator=g, device=device) / 10,
        torch.randn(INDEX_DIM, generator=g, device=device) / 10,
        preset.norm_eps,
        positions.to(torch.int32),
        rope_table(preset, shape.seq_len_kv, device),
        (slots + positions % shape.page_size).to(torch.int32),
        kv_cache,
        index_cache,
        shape.page_size,
    )


def _nan_caches(shape: CacheWriteShape, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    """Bytes 0xFF: a NaN of e4m3, bf16 and fp32."""
    dtype = next(dtype for dtype, name in PRECISIONS.items() if name == shape.precision)
    pages, page_size = shape.batch_size * shape.max_pages, shape.page_size
    rows, index_rows = mla_row_bytes(shape.precision), index_row_bytes(shape.precision)
    kv = torch.full((pages, page_size, rows), 0xFF, dtype=torch.uint8, device=device)
    if not shape.with_index:
        return kv.view(dtype), None
    index = torch.full((pages, page_size * index_rows), 0xFF, dtype=torch.uint8, device=device)
    return kv.view(dtype), index.view(dtype)


def reference(inputs: CacheWriteInputs, *, rows: Tensor | None = None) -> CacheWriteOutputs:
    """The formulas; writes the caches of `inputs`, of the tokens in `rows` if there are any."""
    chosen = _written(inputs, rows)
    new, slots = new_rows(chosen), chosen.slots.long()
    precision = PRECISIONS[inputs.kv_cache.dtype]
    page, offset = slots // inputs.page_size, slots % inputs.page_size
    inputs.kv_cache[page, offset] = pack_mla_rows(new.kv, precision)
    if new.index_k is not None and inputs.index_cache is not None:
        packed = pack_index_pages(new.index_k.unsqueeze(1), precision)
        values, scale = split_index_pages(inputs.index_cache, inputs.page_size)
        new_values, new_scale = split_index_pages(packed, 1)
        # as bytes: not every device can scatter e4m3
        values.view(torch.uint8)[page, offset] = new_values.view(torch.uint8)[:, 0]
        if scale is not None and new_scale is not None:
            scale[page, offset] = new_scale[:, 0]
    return CacheWriteOutputs(inputs.kv_cache, inputs.index_cache)


def new_rows(inputs: CacheWriteInputs) -> NewRows:
    """The formulas, of all tokens; rounded to the dtype of `kv` and `index_k` where they say so."""
    angles = inputs.rope_table[inputs.positions.long()]
    latent, key = inputs.kv.split((HEAD_DIM_V, HEAD_DIM_ROPE), dim=-1)
    x = latent.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + inputs.eps) * inputs.kv_norm.float()
    kv = torch.cat([x.to(latent.dtype), rotate_interleaved(key, angles)], dim=-1)
    return NewRows(kv, _index_keys(inputs, angles))


def _index_keys(inputs: CacheWriteInputs, angles: Tensor) -> Tensor | None:
    weight, bias = inputs.index_norm_weight, inputs.index_norm_bias
    if inputs.index_k is None or weight is None or bias is None:
        return None
    x = inputs.index_k.float()
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + inputs.eps)
    y = (x * weight + bias).to(inputs.index_k.dtype)
    first, second = y.split((HEAD_DIM_ROPE, INDEX_DIM - HEAD_DIM_ROPE), dim=-1)
    rotated = torch.cat([rotate_half_split(first, angles), second], dim=-1)
    return (rotated.float() @ hadamard(INDEX_DIM, y.device)).to(y.dtype)


def _written(inputs: CacheWriteInputs, rows: Tensor | None) -> CacheWriteInputs:
    """The same caches; of the tokens, or of those in `rows`, the ones that have a slot."""
    num_slots = inputs.kv_cache.shape[0] * inputs.page_size
    has_slot = (inputs.slots >= 0) & (inputs.slots < num_slots)
    kept = has_slot.nonzero().flatten() if rows is None else rows[has_slot[rows]]
    return replace(
        inputs,
        kv=inputs.kv[kept],
        index_k=None if inputs.index_k is None else inputs.index_k[kept],
        positions=inputs.positions[kept],
        slots=inputs.slots[kept],
    )


def _in_dtype(inputs: CacheWriteInputs, dtype: torch.dtype) -> CacheWriteInputs:
    index_k = None if inputs.index_k is None else inputs.index_k.to(dtype)
    return replace(inputs, kv=inputs.kv.to(dtype), index_k=index_k)


def check(
    inputs: CacheWriteInputs, outputs: CacheWriteOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The dequantised rows of these tokens against those of fp32 tensors: twice bf16's error.

    Where the cache is fp8 both are quantised, so the error is that of elements which a rounding to
    bf16 moves into the next e4m3 value, and the scales must be the least powers of two.
    """
    for name in ("kv_cache", "index_cache"):
        mine, own = getattr(outputs, name), getattr(inputs, name)
        if (mine is None) != (own is None) or (own is not None and mine.shape != own.shape):
            return (Check(name=name, passed=False, figures={"shape_differs": 1.0}, limits={}),)
    chosen, page_size = _written(inputs, rows), inputs.page_size
    is_fp8 = inputs.kv_cache.dtype == torch.uint8
    exact, low = (new_rows(_in_dtype(chosen, dtype)) for dtype in (torch.float32, torch.bfloat16))
    slots = chosen.slots.long()
    page, offset = slots // page_size, slots % page_size
    packed = outputs.kv_cache[page, offset]
    checks = list(_latent_checks(packed, exact.kv, low.kv, is_fp8))
    if outputs.index_cache is not None and exact.index_k is not None and low.index_k is not None:
        index_rows = _rows_as_pages(outputs.index_cache, page, offset, page_size)
        checks += _index_checks(index_rows, exact.index_k, low.index_k, is_fp8)
    return tuple(checks)


def _rows_as_pages(index_cache: Tensor, page: Tensor, offset: Tensor, page_size: int) -> Tensor:
    """The tokens in these places, each packed as a page of one token."""
    values, scale = split_index_pages(index_cache, page_size)
    taken = values.view(torch.uint8)[page, offset]
    if scale is not None:
        scale_bytes = scale[page, offset].unsqueeze(1).view(torch.uint8)
        taken = torch.cat([taken, scale_bytes], dim=1)
    return taken.view(index_cache.dtype)


def _latent_checks(packed: Tensor, exact: Tensor, low: Tensor, is_fp8: bool) -> tuple[Check, ...]:
    precision, floor = ("fp8", E4M3_ROUNDING) if is_fp8 else ("fp32", BF16_ROUNDING)
    expected, plain = (unpack_mla_rows(pack_mla_rows(x, precision)) for x in (exact, low))
    actual, v = unpack_mla_rows(packed), HEAD_DIM_V
    latents = (x[..., :v] for x in (actual, expected, plain))
    keys = (actual[..., v:], exact[..., v:], low[..., v:])
    checks = (
        compare_to_budget("latent", *latents, floor=floor),
        compare_to_budget("rotated_key", *keys),
    )
    if not is_fp8:
        return checks
    scale_bytes = packed[..., v : v + v // LATENT_GROUP * SCALE_BYTES].contiguous()
    largest = exact[..., :v].unflatten(-1, (-1, LATENT_GROUP)).abs().amax(-1)
    scale = scale_bytes.view(torch.float32)
    return (*checks, _scale_check("latent_scale", scale, largest, LATENT_SCALE_FLOOR))


def _index_checks(pages: Tensor, exact: Tensor, low: Tensor, is_fp8: bool) -> tuple[Check, ...]:
    precision, floor = ("fp8", E4M3_ROUNDING) if is_fp8 else ("fp32", BF16_ROUNDING)
    expected, plain = (pack_index_pages(x.unsqueeze(1), precision) for x in (exact, low))
    values, scale = unpack_index_pages(pages, 1)
    rows = [values * scale.unsqueeze(-1)]
    for packed in (expected, plain):
        x, s = unpack_index_pages(packed, 1)
        rows.append(x * s.unsqueeze(-1))
    budget = compare_to_budget("index_k", *rows, floor=floor)
    if not is_fp8:
        return (budget,)
    largest = exact.abs().amax(-1, keepdim=True)
    return (budget, _scale_check("index_scale", scale, largest, INDEX_AMAX_FLOOR / E4M3_MAX))


def _scale_check(name: str, scale: Tensor, largest: Tensor, floor: float) -> Check:
    """2^ceil(log2(max(largest / 448, floor))), whichever way roundings moved `largest`.

    Where it is no finite number nothing is asked of the scale: the values show it.
    """
    low, high = (
        round_up_to_power_of_two((largest * share / E4M3_MAX).clamp_min(floor))
        for share in (1 - SCALE_MARGIN, 1 + SCALE_MARGIN)
    )
    wrong = largest.isfinite() & (scale != low) & (scale != high)
    count = float(wrong.sum().item())
    return Check(name=name, passed=count == 0, figures={"wrong": count}, limits={"wrong": 0.0})


def cost(shape: CacheWriteShape) -> Cost:
    """Tokens, their angles, positions and slots read once, rows written; no matrix product."""
    index = INDEX_DIM if shape.with_index else 0
    index_bytes = index_row_bytes(shape.precision) if shape.with_index else 0
    angles = min(shape.num_tokens, shape.seq_len_q) * HEAD_DIM_ROPE * 4.0
    read = shape.num_tokens * (2.0 * (HEAD_DIM_QK + index) + 8.0)
    written = shape.num_tokens * float(mla_row_bytes(shape.precision) + index_bytes)
    return Cost(
        flops=0.0,
        bytes_read=read + angles + 2.0 * HEAD_DIM_V + 8.0 * index,
        bytes_written=written,
    )


def memory(shape: CacheWriteShape) -> Memory:
    """The caches are inputs, of all tokens of the contexts; the outputs are the same."""
    width = Preset(name="").q_lora_rank + INDEX_DIM + HEAD_DIM_QK
    row = mla_row_bytes(shape.precision)
    row += index_row_bytes(shape.precision) if shape.with_index else 0
    slots = shape.batch_size * shape.max_pages * shape.page_size
    fixed = 2 * HEAD_DIM_V + 8 * INDEX_DIM + shape.seq_len_kv * HEAD_DIM_ROPE * 4
    return Memory(
        input_bytes=slots * row + shape.num_tokens * (2 * width + 8) + fixed, output_bytes=0
    )


def shape_of(case: Case, preset: Preset) -> CacheWriteShape:
    return CacheWriteShape(
        batch_size=case.batch_size,
        seq_len_kv=case.seq_len_kv,
        seq_len_q=case.seq_len_q,
        page_size=preset.page_size,
        precision=case.precision,
    )


OPERATOR = Operator(
    name="cache_write",
    summary="norms and rotations of new tokens, written to both paged caches",
    phases=("prefill", "decode"),
    axes=frozenset({"precision", "batch_size"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_tokens,
)
