"""Dense attention at the sparse model's dimensions: a query attends to all keys up to its own.

    out[i, h] = Σ_n softmax over n of (sm_scale · ⟨q[i, h], k[n, h]⟩) · v[n, h]
    lse[i, h] = ln Σ_n exp(sm_scale · ⟨q[i, h], k[n, h]⟩)
    over n = 0 … seq_len_kv - seq_len_q + i

Prefill is the MHA form, keys and values of each head on their own; one prompt:
    q    [seq_len_q, num_heads, 192]    bf16
    k    [seq_len_kv, num_heads, 192]   bf16
    v    [seq_len_kv, num_heads, 128]   bf16
    out  [seq_len_q, num_heads, 128]    bf16
    lse  [seq_len_q, num_heads]         fp32   natural logarithm

Decode is the MQA form, one latent key a token for all heads; contiguous caches, all of one length:
    q    [batch_size, seq_len_q, num_heads, 576]  bf16
    kv   [batch_size, seq_len_kv, 576]            bf16   values are its first 512 columns
    out  [batch_size, seq_len_q, num_heads, 512]  bf16
    lse  [batch_size, seq_len_q, num_heads]       fp32   natural logarithm
or, with `pages`, of different lengths, each sequence from a whole page on, behind the one before:
    kv   [num_pages, 64, 576]                     bf16

Conventions: the causal mask is aligned to the end of the keys, so query i is the position
seq_len_kv - seq_len_q + i, in decode by the length of each sequence. seq_len_q <= seq_len_kv, hence
no row is empty. Keys are finite, those behind the end of a sequence in its last page too. The
projections between the two forms (absorbing W_UK and W_UV) are no part of the operator.

Source: DeepSeek-V3.2 report, appendix A (MHA for prefill, MQA for decode). `sm_scale` is always
given: 576^-1/2, which others default to in the MQA form, is wrong for V3.2.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_tensors
from dsa_bench.baselines.key_pages import PAGE_SIZE, KeyPages, keys_of, lay_out_pages
from dsa_bench.kernels.attention import (
    DECODE_LSE_TOLERANCE,
    DECODE_OUT_TOLERANCE,
    LSE_TOLERANCE,
    OUT_TOLERANCE,
    budget_checks,
)
from dsa_bench.kernels.decode_lengths import (
    decode_lengths,
    expect_lengths,
    longest_sequence,
    pages_of,
)
from dsa_bench.kernels.sparse_prefill import make_attention_tensor, make_offset
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import EQUAL_LENGTHS, Case

REFERENCE_CHUNK_ELEMENTS = 2**26
INPUT_CHUNK_ELEMENTS = 2**28
LSE_FLOOR = 1e-4
"""torch's attention on a CPU takes a quick exponential: its lse is 5e-5 too large, for any number
of keys."""
PREFILL_LSE_TOLERANCE = dataclasses.replace(LSE_TOLERANCE, abs=LSE_FLOOR)
"""A query at the start of a prompt sees few keys: its lse is near 0, and nothing averages."""
DECODE_WORKSPACE_BYTES = 2**26
"""fp32 partial results of a decode split over keys: two waves of 64 rows on 132 SMs are 35 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseAttentionShape:
    """`phase` says the form: `prefill` is MHA 192/128 of one prompt,
    `decode` MQA 576/512 of a batch."""

    phase: str
    seq_len_q: int
    seq_len_kv: int
    batch_size: int = 1
    num_heads: int = 128
    head_dim_qk: int
    head_dim_v: int
    sm_scale: float = Preset(name="").sm_scale
    lengths: str = EQUAL_LENGTHS
    """A kind of `decode_lengths.py`; seq_len_kv is the longest."""

    def __post_init__(self) -> None:
        if not 0 < self.seq_len_q <= self.seq_len_kv:
            raise Unsupported(
                f"seq_len_q {self.seq_len_q} must be 1 … seq_len_kv {self.seq_len_kv}"
                " (the queries end at L)"
            )
        if self.is_prefill and self.batch_size != 1:
            raise Unsupported(
                f"prefill takes one prompt at a time, batch_size must be 1, got {self.batch_size}"
            )
        expect_lengths(self)

    @property
    def is_prefill(self) -> bool:
        return self.phase == "prefill"

    @property
    def is_ragged(self) -> bool:
        return self.lengths != EQUAL_LENGTHS

    @property
    def queries(self) -> int:
        return self.batch_size * self.seq_len_q

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return decode_lengths(self)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all sequences, for one head."""
        m = self.seq_len_q
        return sum(m * (n - m) + m * (m + 1) // 2 for n in self.seq_lens)

    @property
    def kv_elements(self) -> int:
        """Elements of k and v, or of the keys in kv."""
        if self.is_prefill:
            return self.seq_len_kv * self.num_heads * (self.head_dim_qk + self.head_dim_v)
        return sum(self.seq_lens) * self.head_dim_qk

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence; none where all are of one length."""
        return pages_of(self.seq_lens, PAGE_SIZE) if self.is_ragged else ()

    @property
    def room_elements(self) -> int:
        """Elements of kv behind the ends of the sequences."""
        rows = sum(self.pages) * PAGE_SIZE - sum(self.seq_lens) if self.pages else 0
        return rows * self.head_dim_qk

    @property
    def table_bytes(self) -> int:
        """Lengths and block table."""
        return 4 * self.batch_size * (1 + max(self.pages)) if self.pages else 0

    @property
    def exceeds_int32(self) -> bool:
        """Prefill's k, the largest tensor, has an element whose number is not an int32."""
        return self.is_prefill and self.seq_len_kv * self.num_heads * self.head_dim_qk > 2**31


@dataclass(frozen=True, slots=True)
class DensePrefillInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    sm_scale: float


@dataclass(frozen=True, slots=True)
class DenseDecodeInputs:
    q: Tensor
    kv: Tensor
    sm_scale: float
    head_dim_v: int = 512
    pages: KeyPages | None = None
    """None: all sequences are of one length."""


DenseInputs = DensePrefillInputs | DenseDecodeInputs


class DenseOutputs(NamedTuple):
    out: Tensor
    lse: Tensor | None
    """None from an implementation that has no way to give it."""


def make_inputs(
    shape: DenseAttentionShape, *, seed: int, device: torch.device | str
) -> DenseInputs:
    """Random queries, keys and values."""
    g = torch.Generator(device=device).manual_seed(seed)
    heads, width = shape.num_heads, shape.head_dim_qk
    if shape.is_prefill:
        return DensePrefillInputs(
            make_tensor(shape.seq_len_q, heads, width, generator=g),
            make_tensor(shape.seq_len_kv, heads, width, generator=g),
            make_tensor(shape.seq_len_kv, heads, shape.head_dim_v, generator=g),
            shape.sm_scale,
        )
    q = make_tensor(shape.batch_size, shape.seq_len_q, heads, width, generator=g)
    kv = make_tensor(*kv_rows(shape), width, generator=g)
    return DenseDecodeInputs(q, kv, shape.sm_scale, shape.head_dim_v, make_pages(shape, device))


def kv_rows(shape: DenseAttentionShape) -> tuple[int, int]:
    """Dimensions of kv in decode, without its columns."""
    if shape.pages:
        return sum(shape.pages), PAGE_SIZE
    return shape.batch_size, shape.seq_len_kv


def make_pages(shape: DenseAttentionShape, device: torch.device | str) -> KeyPages | None:
    return lay_out_pages(shape.seq_lens, device) if shape.is_ragged else None


def make_tensor(rows: int, *dims: int, generator: torch.Generator) -> Tensor:
    """`make_attention_tensor` in parts: in fp32 the keys of 128K tokens would take 13 GB."""
    out = torch.empty(rows, *dims, dtype=torch.bfloat16, device=generator.device)
    offset = make_offset(generator)
    for part in out.split(max(1, INPUT_CHUNK_ELEMENTS // math.prod(dims))):
        part.copy_(make_attention_tensor(*part.shape, generator=generator, offset=offset))
    return out


def reference(inputs: DenseInputs, *, rows: Tensor | None = None) -> DenseOutputs:
    """The formula in fp32, in chunks of heads and queries.

    A row is a query in prefill, a sequence in decode.
    """
    return attend_rows(inputs, rows, torch.float32, _attend_chunk)


def plain(inputs: DenseInputs, *, rows: Tensor | None = None) -> DenseOutputs:
    """The same in bf16: the measure of a kernel's error."""
    return attend_rows(inputs, rows, torch.bfloat16, _attend_chunk_plain)


def attend_rows(
    inputs: DenseInputs, rows: Tensor | None, dtype: torch.dtype, attend_chunk: "AttendChunk"
) -> DenseOutputs:
    every = torch.arange(inputs.q.shape[0], device=inputs.q.device)
    rows = every if rows is None else rows
    if isinstance(inputs, DensePrefillInputs):
        num_visible = rows + 1 + inputs.k.shape[0] - inputs.q.shape[0]
        part = _attend(
            inputs.q[rows], inputs.k, inputs.v, num_visible, inputs.sm_scale, dtype, attend_chunk
        )
        return DenseOutputs(part.out, part.lse)
    seq_len_q, num_heads = inputs.q.shape[1:3]
    earlier = torch.arange(1 - seq_len_q, 1, device=rows.device).repeat_interleave(num_heads)
    parts = []
    for b in rows.tolist():
        # heads share the key, so they are rows of one head
        q = inputs.q[b].flatten(0, 1).unsqueeze(1)
        kv = keys_of(inputs.kv, inputs.pages, b).unsqueeze(1)
        v, num_visible = kv[..., : inputs.head_dim_v], kv.shape[0] + earlier
        parts.append(_attend(q, kv, v, num_visible, inputs.sm_scale, dtype, attend_chunk))
    out = torch.stack([part.out.view(seq_len_q, num_heads, -1) for part in parts])
    lse = torch.stack([part.lse.view(seq_len_q, num_heads) for part in parts])
    return DenseOutputs(out, lse)


class Attended(NamedTuple):
    out: Tensor
    lse: Tensor


AttendChunk = Callable[[Tensor, Tensor, Tensor, Tensor, float], Attended]
"""q [rows, heads, …], k and v [keys, heads, …], hidden [rows, 1, keys], sm_scale."""


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float) -> Attended:
    logits = torch.einsum("qhd,khd->qhk", q, k) * sm_scale
    logits.masked_fill_(hidden, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_()
    return Attended(torch.einsum("qhk,khd->qhd", weights, v), lse)


def _attend_chunk_plain(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, sm_scale: float
) -> Attended:
    """Scaled queries, logits, weights and output are each rounded to bf16.

    torch's own attention scales the queries too, which shifts lse more than rounded logits do.
    """
    logits = torch.matmul((q * sm_scale).transpose(0, 1), k.permute(1, 2, 0))
    logits.masked_fill_(hidden.transpose(0, 1), float("-inf"))
    lse = logits.float().logsumexp(-1)
    out = torch.matmul(logits.softmax(-1), v.transpose(0, 1))
    return Attended(out.transpose(0, 1), lse.T)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_visible: Tensor,
    sm_scale: float,
    dtype: torch.dtype = torch.float32,
    attend_chunk: AttendChunk = _attend_chunk,
) -> Attended:
    """Row i of q [rows, heads, …] over the keys 0 … num_visible[i] - 1, in bounded memory.

    k and v are [keys, heads, …].
    """
    rows, heads, _ = q.shape
    num_keys = k.shape[0]
    out = torch.empty(rows, heads, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.empty(rows, heads, device=q.device)
    head_chunk = max(1, REFERENCE_CHUNK_ELEMENTS // (num_keys * (q.shape[-1] + v.shape[-1])))
    row_chunk = max(1, REFERENCE_CHUNK_ELEMENTS // (num_keys * head_chunk))
    positions = torch.arange(num_keys, device=q.device)
    for h in range(0, heads, head_chunk):
        head = slice(h, h + head_chunk)
        keys, values = k[:, head].to(dtype), v[:, head].to(dtype)
        for r in range(0, rows, row_chunk):
            row = slice(r, r + row_chunk)
            hidden = positions >= num_visible[row, None, None]
            part = attend_chunk(q[row, head].to(dtype), keys, values, hidden, sm_scale)
            out[row, head], lse[row, head] = part
    return Attended(out, lse)


def check(
    inputs: DenseInputs, outputs: DenseOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Both outputs against the fp32 reference: FlashMLA's tolerances (lse: see above), and twice
    the error of `plain`.

    An implementation that cannot give `lse` returns None for it; only then is it not checked.
    """
    expected = reference(inputs, rows=rows)
    prefill = isinstance(inputs, DensePrefillInputs)
    out_tolerance = OUT_TOLERANCE if prefill else DECODE_OUT_TOLERANCE
    lse_tolerance = PREFILL_LSE_TOLERANCE if prefill else DECODE_LSE_TOLERANCE
    out = outputs.out if rows is None else outputs.out[rows]
    lse = outputs.lse if outputs.lse is None or rows is None else outputs.lse[rows]
    checks = [compare_tensors("out", out, expected.out, out_tolerance)]
    if lse is not None:
        assert expected.lse is not None
        checks.append(compare_tensors("lse", lse, expected.lse, lse_tolerance))
    low = plain(inputs, rows=rows)
    checks += budget_checks(DenseOutputs(out, lse), expected, low, lse_floor=LSE_FLOOR)
    return tuple(checks)


def cost(shape: DenseAttentionShape) -> Cost:
    """2 · num_heads · (head_dim_qk + head_dim_v) FLOP a visible pair; each tensor once."""
    heads = shape.queries * shape.num_heads
    return Cost(
        flops=2.0 * shape.num_heads * (shape.head_dim_qk + shape.head_dim_v) * shape.pairs,
        bytes_read=2.0 * (heads * shape.head_dim_qk + shape.kv_elements),
        bytes_written=heads * (2.0 * shape.head_dim_v + 4.0),
    )


def memory(shape: DenseAttentionShape) -> Memory:
    """Inputs and outputs exactly; the workspace is that of the hungriest implementation.

    In prefill that is `sdpa_flash`, which widens values and outputs to head_dim_qk; in decode the
    partial results of a split over keys.
    """
    heads = shape.queries * shape.num_heads
    widened = 2 * (shape.seq_len_q + shape.seq_len_kv) * shape.num_heads * shape.head_dim_qk
    return Memory(
        input_bytes=2 * (heads * shape.head_dim_qk + shape.kv_elements + shape.room_elements)
        + shape.table_bytes,
        output_bytes=heads * (2 * shape.head_dim_v + 4),
        workspace_bytes=widened if shape.is_prefill else DECODE_WORKSPACE_BYTES,
    )


def shape_of(case: Case, preset: Preset) -> DenseAttentionShape:
    if case.precision != "bf16":
        raise Unsupported(
            f"dense_attention computes in bf16, got precision {case.precision}"
            " (its fp8 forms are not part of this operator)"
        )
    is_prefill = case.phase == "prefill"
    return DenseAttentionShape(
        phase=case.phase,
        seq_len_q=case.seq_len_q,
        seq_len_kv=case.seq_len_kv,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        head_dim_qk=preset.head_dim_qk_mha if is_prefill else preset.head_dim_qk,
        head_dim_v=preset.head_dim_v_mha if is_prefill else preset.head_dim_v,
        sm_scale=preset.sm_scale,
        lengths=case.lengths,
    )


OPERATOR = Operator(
    name="dense_attention",
    summary="attention to every earlier key: MHA form in prefill, MQA form in decode",
    phases=("prefill", "decode"),
    axes=frozenset({"batch_size", "lengths", "num_heads"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q if shape.is_prefill else shape.batch_size,
    always_checked=longest_sequence,
    finite=("out",),
)
