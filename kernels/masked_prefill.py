"""Multi-head attention of a prefill chunk, each query masked to the keys that it lists.

    out[i, h] = Σ_{n ∈ S_i} exp(sm_scale · ⟨q[i, h], k[n, h]⟩ - lse[i, h]) · v[n, h]
    lse[i, h] = ln Σ_{n ∈ S_i} exp(sm_scale · ⟨q[i, h], k[n, h]⟩)
    S_i = {n of topk_indices[i] : 0 <= n < seq_len_kv}
    without a list S_i = {0, …, seq_len_kv - seq_len_q + i}

Shapes:
    q             [seq_len_q, num_heads, 192]   bf16   any strides, the last 1; so k and v
    k             [seq_len_kv, num_heads, 192]  bf16
    v             [seq_len_kv, num_heads, 128]  bf16
    topk_indices  [seq_len_q, topk] or None     int32  keys; None: causal, aligned to the end
    out           [seq_len_q, num_heads, 128]   bf16
    lse           [seq_len_q, num_heads]        fp32   natural logarithm

Conventions: the list is the mask: there is no causal one beside it, an index outside
0 … seq_len_kv - 1 is skipped, whatever its value, and a repeated index counts once. A row without a
valid index: out 0, lse +inf. All rows of k and v are finite, listed or not, as in
`dense_attention`: a kernel multiplies the value of every key of a tile, some by 0.

It gives what `sparse_prefill` gives behind the projections W_UK and W_UV, at 640 FLOP a pair and
head in place of 2176, but for all pairs up to the last listed key: `cost` counts listed pairs, a
kernel executes all causal ones. So it is for short prompts: the two meet near 7K keys at topk 2048.

Source: DeepSeek-V3.2 report, section 3 (masked MHA mode for short prefill) and appendix A.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_tensors
from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.attention import LSE_TOLERANCE, OUT_TOLERANCE, budget_checks
from dsa_bench.kernels.index_patterns import random_indices
from dsa_bench.kernels.sparse_prefill import make_attention_tensor
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

REFERENCE_CHUNK_ELEMENTS = 2**25
"""Logits and keys of a chunk in fp32: 128 MB."""
BITS_BLOCK = 64
"""Keys of one element of the bit mask that a kernel makes of the list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedPrefillShape:
    """A chunk of seq_len_q queries that ends at position seq_len_kv of a prompt."""

    seq_len_q: int
    seq_len_kv: int
    topk: int | None = 2048
    """None: no list, every key up to the query's own."""
    num_heads: int = 128
    head_dim_qk: int = 192
    head_dim_v: int = 128
    sm_scale: float = Preset(name="").sm_scale

    def __post_init__(self) -> None:
        if not 0 < self.seq_len_q <= self.seq_len_kv:
            raise Unsupported(
                f"seq_len_q {self.seq_len_q} must be 1 … seq_len_kv {self.seq_len_kv}"
                " (the chunk ends at L)"
            )
        if self.topk is not None and self.topk > self.seq_len_kv:
            raise Unsupported(f"topk {self.topk} is more than the {self.seq_len_kv} keys there are")

    @property
    def pairs(self) -> int:
        """Valid (query, listed key) pairs of one head: Σ_i min(visible keys of i, topk)."""
        topk = self.seq_len_kv if self.topk is None else self.topk
        first = self.seq_len_kv - self.seq_len_q + 1
        short = max(0, min(topk, self.seq_len_kv + 1) - first)
        return short * first + short * (short - 1) // 2 + (self.seq_len_q - short) * topk


@dataclass(frozen=True, slots=True)
class MaskedPrefillInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    topk_indices: Tensor | None
    sm_scale: float


class MaskedPrefillOutputs(NamedTuple):
    out: Tensor
    lse: Tensor


def make_inputs(
    shape: MaskedPrefillShape, *, seed: int, device: torch.device | str
) -> MaskedPrefillInputs:
    """Random queries, keys and values; each query lists random keys that it can see."""
    g = torch.Generator(device=device).manual_seed(seed)
    heads, width = shape.num_heads, shape.head_dim_qk
    q = make_attention_tensor(shape.seq_len_q, heads, width, generator=g)
    k = make_attention_tensor(shape.seq_len_kv, heads, width, generator=g)
    v = make_attention_tensor(shape.seq_len_kv, heads, shape.head_dim_v, generator=g)
    indices = None
    if shape.topk is not None:
        first = shape.seq_len_kv - shape.seq_len_q + 1
        num_visible = torch.arange(first, shape.seq_len_kv + 1, device=device)
        indices = random_indices(num_visible, shape.seq_len_kv, shape.topk, g)
    return MaskedPrefillInputs(q, k, v, indices, shape.sm_scale)


def reference(inputs: MaskedPrefillInputs, *, rows: Tensor | None = None) -> MaskedPrefillOutputs:
    """The formula in fp32, in chunks of heads and rows; `out` in the type of q."""
    exact = _attend(inputs, rows, exactly=True)
    return MaskedPrefillOutputs(exact.out.to(inputs.q.dtype), exact.lse)


def plain(inputs: MaskedPrefillInputs, *, rows: Tensor | None = None) -> MaskedPrefillOutputs:
    """The same in bf16: the measure of a kernel's error."""
    return _attend(inputs, rows, exactly=False)


def listed_keys(inputs: MaskedPrefillInputs, rows: Tensor) -> Tensor:
    """[rows, seq_len_kv] bool: the keys that each of these queries attends to."""
    num_queries, num_keys = inputs.q.shape[0], inputs.k.shape[0]
    if inputs.topk_indices is None:
        last = rows + num_keys - num_queries
        return torch.arange(num_keys, device=rows.device) <= last[:, None]
    indices = inputs.topk_indices[rows].long()
    valid = (indices >= 0) & (indices < num_keys)
    # the column behind the last takes what names no key
    listed = torch.zeros(len(rows), num_keys + 1, dtype=torch.bool, device=rows.device)
    return listed.scatter_(1, torch.where(valid, indices, num_keys), True)[:, :num_keys]


def _attend(
    inputs: MaskedPrefillInputs, rows: Tensor | None, *, exactly: bool
) -> MaskedPrefillOutputs:
    """fp32 `out` if `exactly`, else what plain torch makes of it in bf16; in bounded memory."""
    q, k, v = inputs.q, inputs.k, inputs.v
    rows = torch.arange(q.shape[0], device=q.device) if rows is None else rows
    dtype = torch.float32 if exactly else torch.bfloat16
    attend_chunk = _attend_chunk if exactly else _attend_chunk_plain
    num_keys, heads = k.shape[:2]
    out = torch.empty(len(rows), heads, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.empty(len(rows), heads, device=q.device)
    keys_size = max(1, num_keys) * (k.shape[-1] + v.shape[-1])
    head_chunk = max(1, REFERENCE_CHUNK_ELEMENTS // keys_size)
    row_chunk = max(1, REFERENCE_CHUNK_ELEMENTS // (max(1, num_keys) * head_chunk))
    for h in range(0, heads, head_chunk):
        head = slice(h, h + head_chunk)
        keys, values = k[:, head].to(dtype), v[:, head].to(dtype)
        for r in range(0, len(rows), row_chunk):
            part = rows[r : r + row_chunk]
            hidden = ~listed_keys(inputs, part)[:, None]
            one = attend_chunk(q[part, head].to(dtype), keys, values, hidden, inputs.sm_scale)
            out[r : r + row_chunk, head], lse[r : r + row_chunk, head] = one
    return MaskedPrefillOutputs(out, lse)


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float
) -> MaskedPrefillOutputs:
    """q [rows, heads, …], k and v [keys, heads, …], hidden [rows, 1, keys]."""
    logits = torch.einsum("qhd,khd->qhk", q, k) * sm_scale
    logits.masked_fill_(hidden, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    lse.masked_fill_(hidden.all(-1), float("inf"))
    weights = logits.sub_(lse.unsqueeze(-1)).exp_()
    return MaskedPrefillOutputs(torch.einsum("qhk,khd->qhd", weights, v), lse)


def _attend_chunk_plain(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float
) -> MaskedPrefillOutputs:
    """Scaled queries, logits, weights and output are each rounded to bf16."""
    logits = torch.matmul((q * sm_scale).transpose(0, 1), k.permute(1, 2, 0))
    logits.masked_fill_(hidden.transpose(0, 1), float("-inf"))
    lse = logits.float().logsumexp(-1).T
    out = torch.matmul(logits.softmax(-1).nan_to_num(nan=0.0), v.transpose(0, 1))
    return MaskedPrefillOutputs(out.transpose(0, 1), lse.masked_fill(hidden.all(-1), float("inf")))


def check(
    inputs: MaskedPrefillInputs, outputs: MaskedPrefillOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Both outputs against the fp32 formula: FlashMLA's tolerances, twice the error of `plain`."""
    expected = _attend(inputs, rows, exactly=True)
    actual = outputs if rows is None else MaskedPrefillOutputs(*(x[rows] for x in outputs))
    return (
        compare_tensors("out", actual.out, expected.out, OUT_TOLERANCE),
        compare_tensors("lse", actual.lse, expected.lse, LSE_TOLERANCE),
        *budget_checks(actual, expected, plain(inputs, rows=rows)),
    )


def check_arguments(inputs: MaskedPrefillInputs) -> None:
    """Refuse what a kernel of these widths cannot read, in a sentence."""
    q, k, v, indices = inputs.q, inputs.k, inputs.v, inputs.topk_indices
    expect_tensor("q", q, torch.bfloat16, seq_len_q=None, num_heads=None, head_dim_qk=192)
    heads = q.shape[1]
    expect_tensor("k", k, torch.bfloat16, seq_len_kv=None, num_heads=heads, head_dim_qk=192)
    keys = k.shape[0]
    expect_tensor("v", v, torch.bfloat16, seq_len_kv=keys, num_heads=heads, head_dim_v=128)
    if indices is not None:
        expect_tensor("topk_indices", indices, torch.int32, seq_len_q=q.shape[0], topk=None)
    elif q.shape[0] > keys:
        raise ValueError(
            f"seq_len_q {q.shape[0]} must be at most seq_len_kv {keys} (or pass topk_indices)"
        )
    expect_same_device(q=q, k=k, v=v, topk_indices=indices)
    if not inputs.sm_scale > 0:
        raise ValueError(f"sm_scale must be > 0, got {inputs.sm_scale} (V3.2: 0.1352338)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        # copies in bulk read 16 bytes at a time
        steps = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
        if x.numel() and (x.data_ptr() % 16 or any(stride % 8 for stride in steps[:-1])):
            raise ValueError(
                f"{name} must have strides that are multiples of 8 elements,"
                f" got {tuple(x.stride())} (pass x.contiguous())"
            )


def bits_per_row(num_keys: int) -> int:
    """int64 elements of a row of the bit mask."""
    return -(-num_keys // BITS_BLOCK)


def cost(shape: MaskedPrefillShape) -> Cost:
    """2 · num_heads · (head_dim_qk + head_dim_v) FLOP a listed pair; each tensor once."""
    heads = shape.seq_len_q * shape.num_heads
    width = shape.head_dim_qk + shape.head_dim_v
    return Cost(
        flops=2.0 * shape.num_heads * width * shape.pairs,
        bytes_read=float(_input_bytes(shape)),
        bytes_written=heads * (2.0 * shape.head_dim_v + 4.0),
    )


def _input_bytes(shape: MaskedPrefillShape) -> int:
    queries = shape.seq_len_q * shape.num_heads * shape.head_dim_qk
    keys = shape.seq_len_kv * shape.num_heads * (shape.head_dim_qk + shape.head_dim_v)
    return 2 * (queries + keys) + 4 * shape.seq_len_q * (shape.topk or 0)


def memory(shape: MaskedPrefillShape) -> Memory:
    """The workspace is the bit mask, and two bounds a query."""
    heads = shape.seq_len_q * shape.num_heads
    mask = 8 * shape.seq_len_q * (bits_per_row(shape.seq_len_kv) + 1)
    return Memory(
        input_bytes=_input_bytes(shape),
        output_bytes=heads * (2 * shape.head_dim_v + 4),
        workspace_bytes=mask if shape.topk is not None else 0,
    )


def shape_of(case: Case, preset: Preset) -> MaskedPrefillShape:
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    if case.precision != "bf16":
        raise Unsupported(
            "masked_prefill computes in bf16; precision fp8 is the indexer's and the decode caches'"
        )
    return MaskedPrefillShape(
        seq_len_q=case.seq_len_q,
        seq_len_kv=case.seq_len_kv,
        topk=case.topk,
        num_heads=case.num_heads,
        head_dim_qk=preset.head_dim_qk_mha,
        head_dim_v=preset.head_dim_v_mha,
        sm_scale=preset.sm_scale,
    )


OPERATOR = Operator(
    name="masked_prefill",
    summary="multi-head attention of a prefill chunk, masked to selected keys",
    phases=("prefill",),
    axes=frozenset({"topk", "num_heads"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q,
    finite=("out",),
)
