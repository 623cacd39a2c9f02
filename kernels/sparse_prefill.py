"""Sparse multi-query attention of a prefill chunk over the keys that each query lists.

    out[i, h] = softmax over p of (sm_scale · ⟨q[i, h], kv[n_p]⟩) · kv[n_p, :head_dim_v]
    with n_p = topk_indices[i, p]

over p < topk_lens[i] with 0 <= n_p < seq_len_kv; the full definition is in `attention.py`.

Shapes:
    q             [seq_len_q, num_heads, head_dim_qk]  bf16
    kv            [seq_len_kv, head_dim_qk]            bf16   one key for all heads, values first
    topk_indices  [seq_len_q, topk]                    int32  rows of kv
    attn_sink     [num_heads] or None                  fp32   joins the denominator only
    topk_lens     [seq_len_q] or None                  int32  entries of an index row that are used
    out           [seq_len_q, num_heads, head_dim_v]   bf16
    max_logits    [seq_len_q, num_heads]               fp32   largest scaled logit
    lse           [seq_len_q, num_heads]               fp32   natural logarithm

Conventions: an index outside 0 … seq_len_kv - 1 is skipped, whatever its value; a repeated index
counts twice; there is no causal mask, the list is the mask. A row without a valid index: out 0,
max_logits -inf, lse +inf. A paged bf16 cache needs no copy: kv is the cache seen as rows,
kv_cache.flatten(0, 1), and topk_indices its slots, as `page_slots` makes them.

Source: DeepSeek-V3.2 report, section 2.1; FlashMLA `flash_mla_sparse_fwd`. `sm_scale` has no
default: 576^-1/2, which others default to, is wrong for V3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_tensors
from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.attention import (
    LSE_TOLERANCE,
    OUT_TOLERANCE,
    AttentionRow,
    attend,
    attend_plain,
    budget_checks,
    row_chunk,
)
from dsa_bench.kernels.index_patterns import expect_pattern, listed_keys, make_indices
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import RANDOM_INPUTS, Case


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsePrefillShape:
    """A chunk of seq_len_q queries that ends at position seq_len_kv of a prompt."""

    seq_len_q: int
    seq_len_kv: int
    topk: int = 2048
    num_heads: int = 128
    head_dim_qk: int = 576
    head_dim_v: int = 512
    sm_scale: float = Preset(name="").sm_scale
    inputs: str = RANDOM_INPUTS
    """Which keys the queries list: a pattern of `index_patterns.py`."""

    def __post_init__(self) -> None:
        if not 0 < self.seq_len_q <= self.seq_len_kv:
            raise Unsupported(
                f"seq_len_q {self.seq_len_q} must be 1 … seq_len_kv {self.seq_len_kv}"
                " (the chunk ends at L)"
            )
        if self.topk > self.seq_len_kv:
            raise Unsupported(f"topk {self.topk} is more than the {self.seq_len_kv} keys there are")
        expect_pattern(
            self.inputs,
            first_visible=self.first_visible,
            topk=self.topk,
            num_queries=self.seq_len_q,
        )

    @property
    def first_visible(self) -> int:
        """Keys that the first query sees."""
        return self.seq_len_kv - self.seq_len_q + 1

    @property
    def listed_keys(self) -> int:
        """Different keys of all lists; of random ones, if there are enough, every key."""
        if self.inputs == RANDOM_INPUTS:
            return min(self.seq_len_kv, self.pairs)
        return listed_keys(
            self.inputs,
            first_visible=self.first_visible,
            last_visible=self.seq_len_kv,
            topk=self.topk,
            num_queries=self.seq_len_q,
        )

    @property
    def pairs(self) -> int:
        """Valid (query, selected key) pairs: Σ_i min(visible keys of i, topk)."""
        first = self.first_visible
        short = max(0, min(self.topk, self.seq_len_kv + 1) - first)
        return short * first + short * (short - 1) // 2 + (self.seq_len_q - short) * self.topk


@dataclass(frozen=True, slots=True)
class SparsePrefillInputs:
    q: Tensor
    kv: Tensor
    topk_indices: Tensor
    sm_scale: float
    head_dim_v: int = 512
    attn_sink: Tensor | None = None
    topk_lens: Tensor | None = None


class SparsePrefillOutputs(NamedTuple):
    out: Tensor
    max_logits: Tensor
    lse: Tensor


def make_offset(generator: torch.Generator) -> Tensor:
    """One number within ±0.05."""
    return torch.rand(1, generator=generator, device=generator.device) * 0.1 - 0.05


def make_attention_tensor(
    *dims: int, generator: torch.Generator, offset: Tensor | None = None
) -> Tensor:
    """Gauss / 10 plus a common offset within ±0.05, clamped to ±10: as in FlashMLA's tests."""
    offset = make_offset(generator) if offset is None else offset
    x = torch.randn(*dims, generator=generator, device=generator.device)
    return x.div_(10).add_(offset).clamp_(-10, 10).bfloat16()


def make_inputs(
    shape: SparsePrefillShape, *, seed: int, device: torch.device | str
) -> SparsePrefillInputs:
    """Random queries and keys; each query lists keys that it can see, by the shape's pattern."""
    g = torch.Generator(device=device).manual_seed(seed)
    q = make_attention_tensor(shape.seq_len_q, shape.num_heads, shape.head_dim_qk, generator=g)
    kv = make_attention_tensor(shape.seq_len_kv, shape.head_dim_qk, generator=g)
    num_visible = torch.arange(shape.first_visible, shape.seq_len_kv + 1, device=device)
    indices = make_indices(shape.inputs, num_visible, shape.seq_len_kv, shape.topk, g)
    return SparsePrefillInputs(q, kv, indices, shape.sm_scale, shape.head_dim_v)


def reference(inputs: SparsePrefillInputs, *, rows: Tensor | None = None) -> SparsePrefillOutputs:
    """`attend` over the gathered keys, in fp32 and in chunks of rows."""
    return attend_rows(inputs, rows, attend)


def plain(inputs: SparsePrefillInputs, *, rows: Tensor | None = None) -> SparsePrefillOutputs:
    """The same in bf16: the measure of a kernel's error."""
    return attend_rows(inputs, rows, attend_plain)


def attend_rows(
    inputs: SparsePrefillInputs, rows: Tensor | None, attend_keys: Callable[..., AttentionRow]
) -> SparsePrefillOutputs:
    """`attend_keys`, `attend` or one like it, over the keys that each of the rows lists."""
    every = torch.arange(inputs.q.shape[0], device=inputs.q.device)
    rows = every if rows is None else rows
    num_keys, width = inputs.kv.shape
    topk = inputs.topk_indices.shape[1]
    positions = torch.arange(topk, device=rows.device)
    parts: list[AttentionRow] = []
    for part in rows.split(row_chunk(topk, inputs.q.shape[1], width)):
        indices = inputs.topk_indices[part].long()
        valid = (indices >= 0) & (indices < num_keys)
        if inputs.topk_lens is not None:
            valid &= positions < inputs.topk_lens[part, None]
        k = inputs.kv[torch.where(valid, indices, 0)]
        q = inputs.q[part]
        parts.append(attend_keys(q, k, valid, inputs.sm_scale, inputs.head_dim_v, inputs.attn_sink))
    return SparsePrefillOutputs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check(
    inputs: SparsePrefillInputs, outputs: SparsePrefillOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """All outputs against the fp32 reference: FlashMLA's tolerances, twice the error of `plain`."""
    expected = reference(inputs, rows=rows)
    actual = outputs if rows is None else SparsePrefillOutputs(*(x[rows] for x in outputs))
    return (
        compare_tensors("out", actual.out, expected.out, OUT_TOLERANCE),
        compare_tensors("max_logits", actual.max_logits, expected.max_logits, LSE_TOLERANCE),
        compare_tensors("lse", actual.lse, expected.lse, LSE_TOLERANCE),
        *budget_checks(actual, expected, plain(inputs, rows=rows)),
    )


def check_arguments(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    sm_scale: float,
    attn_sink: Tensor | None,
    topk_lens: Tensor | None,
    head_dims_qk: tuple[int, ...] = (576,),
) -> None:
    """Refuse what a kernel for these widths cannot read, in a sentence."""
    width = q.shape[-1] if q.dim() and q.shape[-1] in head_dims_qk else head_dims_qk[0]
    expect_tensor("q", q, torch.bfloat16, seq_len_q=None, num_heads=None, head_dim_qk=width)
    expect_tensor("kv", kv, torch.bfloat16, seq_len_kv=None, head_dim_qk=width)
    expect_tensor("topk_indices", topk_indices, torch.int32, seq_len_q=q.shape[0], topk=None)
    if attn_sink is not None:
        expect_tensor("attn_sink", attn_sink, torch.float32, num_heads=q.shape[1])
    if topk_lens is not None:
        expect_tensor("topk_lens", topk_lens, torch.int32, seq_len_q=q.shape[0])
    expect_same_device(
        q=q, kv=kv, topk_indices=topk_indices, attn_sink=attn_sink, topk_lens=topk_lens
    )
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be > 0, got {sm_scale} (V3.2: 0.1352338)")
    expect_aligned("q", q)
    expect_aligned("kv", kv)


def expect_aligned(name: str, tensor: Tensor) -> None:
    """16-byte loads: rows must begin at multiples of 16 elements."""
    if tensor.data_ptr() % 16 or any(stride % 16 for stride in tensor.stride()[:-1]):
        raise ValueError(
            f"{name} must have strides that are multiples of 16 elements,"
            f" got {tuple(tensor.stride())} (pass x.contiguous())"
        )
    # a tile's 64 heads are addressed from its first row with 32 bits
    if tensor.dim() == 3 and (tensor.shape[1] + 64) * tensor.stride(1) >= 2**31:
        raise ValueError(
            f"{name} must have its heads within 2^31 elements of each other,"
            f" got strides {tuple(tensor.stride())} (pass x.contiguous())"
        )


def cost(shape: SparsePrefillShape) -> Cost:
    """2 · num_heads · (head_dim_qk + head_dim_v) FLOP a valid pair; each tensor once."""
    heads = shape.seq_len_q * shape.num_heads
    return Cost(
        flops=2.0 * shape.num_heads * (shape.head_dim_qk + shape.head_dim_v) * shape.pairs,
        bytes_read=2.0 * heads * shape.head_dim_qk
        + 2.0 * shape.listed_keys * shape.head_dim_qk
        + 4.0 * shape.seq_len_q * shape.topk,
        bytes_written=heads * (2.0 * shape.head_dim_v + 8.0),
    )


def memory(shape: SparsePrefillShape) -> Memory:
    heads = shape.seq_len_q * shape.num_heads
    return Memory(
        input_bytes=2 * (heads + shape.seq_len_kv) * shape.head_dim_qk
        + 4 * shape.seq_len_q * shape.topk,
        output_bytes=heads * (2 * shape.head_dim_v + 8),
    )


def shape_of(case: Case, preset: Preset) -> SparsePrefillShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    if case.precision != "bf16":
        raise Unsupported(
            "sparse_prefill computes in bf16; precision fp8 is the indexer's and the decode caches'"
        )
    return SparsePrefillShape(
        seq_len_q=case.seq_len_q,
        seq_len_kv=case.seq_len_kv,
        topk=case.topk,
        num_heads=case.num_heads,
        head_dim_qk=preset.head_dim_qk,
        head_dim_v=preset.head_dim_v,
        sm_scale=preset.sm_scale,
        inputs=case.inputs,
    )


OPERATOR = Operator(
    name="sparse_prefill",
    summary="multi-query attention of a prefill chunk over selected keys",
    phases=("prefill",),
    axes=frozenset({"topk", "num_heads", "inputs"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q,
    finite=("out",),
)
