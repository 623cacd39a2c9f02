"""Sparse multi-query attention of new tokens over the slots of a paged cache that they list.

    out[b, j, h] = softmax over p of (sm_scale · ⟨q[b, j, h], row(s_p)⟩) · row(s_p)[:512]
    with s_p = topk_slots[b, j, p]

row(slot) is the dequantised cache row, rounded to bf16 (layout: `paging.py`); the full definition
of the softmax, the sink and empty rows is in `attention.py`.

Shapes:
    q           [batch_size, seq_len_q, num_heads, 576]  bf16
    kv_cache    [num_pages, page_size, 656] uint8, or [num_pages, page_size, 576] bf16
    topk_slots  [batch_size, seq_len_q, topk]            int32  page · page_size + offset
    attn_sink   [num_heads] or None                      fp32
    topk_lens   [batch_size, seq_len_q] or None          int32  used entries of an index row; a
                                                                length above topk counts as topk
    out         [batch_size, seq_len_q, num_heads, 512]  bf16
    lse         [batch_size, seq_len_q, num_heads]       fp32   natural logarithm

Conventions: a slot outside 0 … num_pages · page_size - 1 is skipped, whatever its value. Rows that
no valid slot names are never read into the result: they may hold NaN. A query without a valid slot:
out 0, lse +inf.

Source: FlashMLA `flash_mla_with_kvcache` with is_fp8_kvcache and indices. Differences: only -1 is
invalid there, a larger slot is a wild read; lse is [batch, heads, seq_len_q] there.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_tensors
from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.attention import (
    DECODE_LSE_TOLERANCE,
    DECODE_OUT_TOLERANCE,
    AttentionRow,
    attend,
    attend_plain,
    budget_checks,
    row_chunk,
)
from dsa_bench.kernels.decode_lengths import (
    decode_lengths,
    expect_lengths,
    longest_sequence,
    pages_of,
)
from dsa_bench.kernels.decode_splits import MAX_SPLITS, PARTIAL_ROWS
from dsa_bench.kernels.index_patterns import expect_pattern, listed_keys, make_indices
from dsa_bench.kernels.paged_indexer import expect_new_tokens
from dsa_bench.kernels.paging import (
    HEAD_DIM_QK,
    HEAD_DIM_V,
    MLA_ROW_BYTES,
    make_cache,
    mla_row_bytes,
    pack_mla_rows,
    unpack_mla_rows,
)
from dsa_bench.kernels.sparse_prefill import make_attention_tensor
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import EQUAL_LENGTHS, RANDOM_INPUTS, Case


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDecodeShape:
    """Each of seq_len_q queries selects topk rows of its sequence, or all where it has fewer; the
    longest sequence has seq_len_kv tokens."""

    batch_size: int
    seq_len_kv: int
    topk: int = 2048
    seq_len_q: int = 1
    num_heads: int = 128
    page_size: int = 64
    precision: str = "fp8"
    sm_scale: float = Preset(name="").sm_scale
    inputs: str = RANDOM_INPUTS
    """Which keys the queries list: a pattern of `index_patterns.py`."""
    lengths: str = EQUAL_LENGTHS
    """A kind of `decode_lengths.py`."""

    def __post_init__(self) -> None:
        expect_new_tokens(self.seq_len_q, self.seq_len_kv)
        if self.topk > self.seq_len_kv:
            raise Unsupported(f"topk {self.topk} is more than the {self.seq_len_kv} keys there are")
        expect_lengths(self)
        expect_pattern(
            self.inputs,
            first_visible=min(self.seq_lens),
            topk=self.topk,
            num_queries=self.seq_len_q,
        )

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return decode_lengths(self)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return pages_of(self.seq_lens, self.page_size)

    @property
    def queries(self) -> int:
        return self.batch_size * self.seq_len_q

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are listed."""
        return self.seq_len_q * sum(min(self.topk, n) for n in self.seq_lens)

    @property
    def listed_keys(self) -> float:
        """Different keys that the queries of the whole batch list."""
        return sum(count * self._listed_of(n) for n, count in Counter(self.seq_lens).items())

    def _listed_of(self, num_keys: int) -> float:
        """Different ones that the q = seq_len_q queries of a sequence of n keys list together.

        Where they list k of them independently, n · (1 - (1 - k/n)^q) on average; with q = 1 k.
        """
        if self.inputs == RANDOM_INPUTS:
            unread = (1.0 - min(self.topk, num_keys) / num_keys) ** self.seq_len_q
            return num_keys * (1.0 - unread)
        return listed_keys(
            self.inputs,
            first_visible=num_keys,
            last_visible=num_keys,
            topk=self.topk,
            num_queries=self.seq_len_q,
        )


@dataclass(frozen=True, slots=True)
class SparseDecodeInputs:
    q: Tensor
    kv_cache: Tensor
    topk_slots: Tensor
    sm_scale: float
    attn_sink: Tensor | None = None
    topk_lens: Tensor | None = None
    is_padded: bool = False
    """Whether all entries behind topk_lens are -1: then lengths only say what may be left out."""

    @property
    def needed_lens(self) -> Tensor | None:
        """topk_lens, for who gains nothing by it or pays for it; None if the slots say it all."""
        return None if self.is_padded else self.topk_lens


class SparseDecodeOutputs(NamedTuple):
    out: Tensor
    lse: Tensor


def make_inputs(
    shape: SparseDecodeShape, *, seed: int, device: torch.device | str
) -> SparseDecodeInputs:
    """Random queries and cache; a query lists rows of its own sequence, by the shape's pattern."""
    g = torch.Generator(device=device).manual_seed(seed)

    def latent_pages(pages: int) -> tuple[Tensor, ...]:
        kv = make_attention_tensor(pages, shape.page_size, HEAD_DIM_QK, generator=g)
        return (pack_mla_rows(kv, shape.precision),)

    (cache,) = make_cache(sum(shape.pages), shape.page_size, latent_pages, device=device)
    q = make_attention_tensor(
        shape.batch_size, shape.seq_len_q, shape.num_heads, HEAD_DIM_QK, generator=g
    )
    positions = _list_positions(shape, g).view(shape.batch_size, shape.seq_len_q, -1)
    first_page = torch.tensor([0, *itertools.accumulate(shape.pages)][:-1], dtype=torch.int32)
    first_slot = (first_page * shape.page_size).to(device)[:, None, None]
    slots = torch.where(positions < 0, positions, positions + first_slot)
    return SparseDecodeInputs(q, cache, slots, shape.sm_scale)


def _list_positions(shape: SparseDecodeShape, generator: torch.Generator) -> Tensor:
    """[queries, topk] int32, each row below the length of its sequence; -1 where that is short."""

    def listed(num_keys: int, rows: int) -> Tensor:
        visible = torch.full((rows,), num_keys, device=generator.device)
        room = max(num_keys, shape.topk)
        return make_indices(shape.inputs, visible, room, shape.topk, generator)

    if shape.lengths == EQUAL_LENGTHS:
        return listed(shape.seq_len_kv, shape.queries)
    # a pattern is drawn over the keys of one sequence
    return torch.cat([listed(n, shape.seq_len_q) for n in shape.seq_lens])


def reference(inputs: SparseDecodeInputs, *, rows: Tensor | None = None) -> SparseDecodeOutputs:
    """`attend` over the gathered and dequantised cache rows, in fp32 and in chunks of queries."""
    return _attend_rows(inputs, rows, attend)


def plain(inputs: SparseDecodeInputs, *, rows: Tensor | None = None) -> SparseDecodeOutputs:
    """The same in bf16, over the same dequantised rows: the measure of a kernel's error."""
    return _attend_rows(inputs, rows, attend_plain)


def _attend_rows(
    inputs: SparseDecodeInputs, rows: Tensor | None, attend_keys: Callable[..., AttentionRow]
) -> SparseDecodeOutputs:
    q, slots = (x if rows is None else x[rows] for x in (inputs.q, inputs.topk_slots))
    lens = inputs.topk_lens if inputs.topk_lens is None or rows is None else inputs.topk_lens[rows]
    batch_size, seq_len_q = q.shape[:2]
    q, slots = q.flatten(0, 1), slots.flatten(0, 1).long()
    cache = inputs.kv_cache.flatten(0, 1)
    valid = (slots >= 0) & (slots < cache.shape[0])
    if lens is not None:
        valid &= torch.arange(slots.shape[1], device=slots.device) < lens.reshape(-1, 1)
    parts = []
    every = torch.arange(q.shape[0], device=q.device)
    for part in every.split(row_chunk(slots.shape[1], q.shape[1], q.shape[2])):
        k = unpack_mla_rows(cache[torch.where(valid[part], slots[part], 0)])
        parts.append(
            attend_keys(q[part], k, valid[part], inputs.sm_scale, HEAD_DIM_V, inputs.attn_sink)
        )
    out = torch.cat([part.out for part in parts]).unflatten(0, (batch_size, seq_len_q))
    lse = torch.cat([part.lse for part in parts]).unflatten(0, (batch_size, seq_len_q))
    return SparseDecodeOutputs(out, lse)


def check(
    inputs: SparseDecodeInputs, outputs: SparseDecodeOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Both outputs against the fp32 reference: FlashMLA's tolerances, twice `plain`'s error."""
    expected = reference(inputs, rows=rows)
    actual = outputs if rows is None else SparseDecodeOutputs(*(x[rows] for x in outputs))
    return (
        compare_tensors("out", actual.out, expected.out, DECODE_OUT_TOLERANCE),
        compare_tensors("lse", actual.lse, expected.lse, DECODE_LSE_TOLERANCE),
        *budget_checks(actual, expected, plain(inputs, rows=rows)),
    )


def check_arguments(
    q: Tensor,
    kv_cache: Tensor,
    topk_slots: Tensor,
    sm_scale: float,
    attn_sink: Tensor | None,
    topk_lens: Tensor | None,
) -> None:
    """Refuse what no kernel of this operator can read, in a sentence."""
    dims = {"batch_size": q.shape[0], "seq_len_q": q.shape[1] if q.dim() > 1 else None}
    expect_tensor(
        "q",
        q,
        torch.bfloat16,
        batch_size=None,
        seq_len_q=None,
        num_heads=None,
        head_dim_qk=HEAD_DIM_QK,
    )
    row = MLA_ROW_BYTES if kv_cache.dtype == torch.uint8 else HEAD_DIM_QK
    dtypes = (torch.uint8, torch.bfloat16)
    expect_tensor("kv_cache", kv_cache, dtypes, num_pages=None, page_size=None, row=row)
    expect_tensor("topk_slots", topk_slots, torch.int32, **dims, topk=None)
    if attn_sink is not None:
        expect_tensor("attn_sink", attn_sink, torch.float32, num_heads=q.shape[2])
    if topk_lens is not None:
        expect_tensor("topk_lens", topk_lens, torch.int32, **dims)
    expect_same_device(
        q=q, kv_cache=kv_cache, topk_slots=topk_slots, attn_sink=attn_sink, topk_lens=topk_lens
    )
    if topk_lens is not None and not topk_lens.is_contiguous():
        raise ValueError(
            f"topk_lens must be contiguous, got strides {topk_lens.stride()} (pass x.contiguous())"
        )
    for name, tensor in (("q", q), ("kv_cache", kv_cache), ("topk_slots", topk_slots)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} must be contiguous and aligned to 16 bytes,"
                f" got strides {tuple(tensor.stride())} (pass x.contiguous())"
            )
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be > 0, got {sm_scale} (V3.2: 0.1352338)")


def cost(shape: SparseDecodeShape) -> Cost:
    """2 · num_heads · (576 + 512) FLOP a selected row; rows listed often are read once."""
    heads = shape.queries * shape.num_heads
    row_bytes = shape.listed_keys * mla_row_bytes(shape.precision)
    return Cost(
        flops=2.0 * shape.num_heads * (HEAD_DIM_QK + HEAD_DIM_V) * shape.pairs,
        bytes_read=2.0 * heads * HEAD_DIM_QK + row_bytes + 4.0 * shape.queries * shape.topk,
        bytes_written=heads * (2.0 * HEAD_DIM_V + 4.0),
    )


def memory(shape: SparseDecodeShape) -> Memory:
    tokens = sum(shape.pages) * shape.page_size
    heads = shape.queries * shape.num_heads
    return Memory(
        input_bytes=tokens * mla_row_bytes(shape.precision)
        + 2 * heads * HEAD_DIM_QK
        + 4 * shape.queries * shape.topk,
        output_bytes=heads * (2 * HEAD_DIM_V + 4),
        # Gluon's fp8 kernel has two places for each group that shares lists
        workspace_bytes=min(2 * MAX_SPLITS * heads, PARTIAL_ROWS) * (HEAD_DIM_V + 1) * 4,
    )


def shape_of(case: Case, preset: Preset) -> SparseDecodeShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    return SparseDecodeShape(
        batch_size=case.batch_size,
        seq_len_kv=case.seq_len_kv,
        topk=case.topk,
        seq_len_q=case.seq_len_q,
        num_heads=case.num_heads,
        page_size=preset.page_size,
        precision=case.precision,
        sm_scale=preset.sm_scale,
        inputs=case.inputs,
        lengths=case.lengths,
    )


OPERATOR = Operator(
    name="sparse_decode",
    summary="multi-query attention of new tokens over selected rows of a paged cache",
    phases=("decode",),
    axes=frozenset({"topk", "precision", "batch_size", "lengths", "num_heads", "inputs"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.batch_size,
    always_checked=longest_sequence,
    finite=("out",),
)
