"""Lightning indexer: weighted sums over heads of ReLU dot products of queries with visible keys.

    index_logits[i, n] =
        index_k_scale[n] · Σ_h index_weights[i, h] · max(0, ⟨index_q[i, h], index_k[n]⟩)

Shapes:
    index_q        [seq_len_q, index_heads, index_dim]  e4m3 or bf16  its scale is in the weights
    index_k        [seq_len_kv, index_dim]              e4m3 or bf16  one key for all heads
    index_k_scale  [seq_len_kv]                         fp32          all ones for bf16
    index_weights  [seq_len_q, index_heads]             fp32          may be negative
    kv_start       [seq_len_q]                          int32         first visible key of a query
    kv_end         [seq_len_q]                          int32         one past the last visible key
    index_logits   [seq_len_q, seq_len_kv]              fp32

Conventions: products accumulate in fp32. A row with kv_end <= kv_start is empty. Columns outside
[kv_start, kv_end) are undefined, in the reference -inf: whoever reads logits bounds itself by the
same range.

Source: DeepSeek-V3.2 report, eq. 1; DeepGEMM `fp8_mqa_logits` with clean_logits=False.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, Tolerance, compare_tensors, compare_to_budget
from dsa_bench.kernels.fp8 import quantize_index_vectors
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

REFERENCE_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerShape:
    """Query i of a prefill chunk sees the keys 0 … seq_len_kv - seq_len_q + i."""

    seq_len_q: int
    seq_len_kv: int
    index_heads: int = 64
    index_dim: int = 128
    precision: str = "fp8"

    def __post_init__(self) -> None:
        if not 0 < self.seq_len_q <= self.seq_len_kv:
            raise Unsupported(
                f"seq_len_q {self.seq_len_q} must be 1 … seq_len_kv {self.seq_len_kv}"
                " (the chunk ends at L)"
            )

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        before = self.seq_len_kv - self.seq_len_q
        return self.seq_len_q * before + self.seq_len_q * (self.seq_len_q + 1) // 2

    @property
    def element_bytes(self) -> int:
        return 1 if self.precision == "fp8" else 2


@dataclass(frozen=True, slots=True)
class IndexerInputs:
    index_q: Tensor
    index_k: Tensor
    index_k_scale: Tensor
    index_weights: Tensor
    kv_start: Tensor
    kv_end: Tensor

    def select(self, rows: Tensor | slice) -> "IndexerInputs":
        """The same keys, only the queries in `rows`."""
        return replace(
            self,
            index_q=self.index_q[rows],
            index_weights=self.index_weights[rows],
            kv_start=self.kv_start[rows],
            kv_end=self.kv_end[rows],
        )


class IndexerOutputs(NamedTuple):
    index_logits: Tensor


def causal_range(
    seq_len_q: int, seq_len_kv: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """kv_start, kv_end of a prefill chunk that ends at position seq_len_kv."""
    first = seq_len_kv - seq_len_q + 1
    kv_end = torch.arange(first, seq_len_kv + 1, dtype=torch.int32, device=device)
    return torch.zeros_like(kv_end), kv_end


def make_index_vectors(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """fp32 vectors -> (values, scale) of the precision; bf16 has scale 1."""
    if precision == "fp8":
        return quantize_index_vectors(x)
    return x.bfloat16(), torch.ones(x.shape[:-1], device=x.device)


def make_inputs(shape: IndexerShape, *, seed: int, device: torch.device | str) -> IndexerInputs:
    """Gaussian queries, keys and weights, quantised as the model does it."""
    g = torch.Generator(device=device).manual_seed(seed)
    q = torch.randn(shape.seq_len_q, shape.index_heads, shape.index_dim, generator=g, device=device)
    k = torch.randn(shape.seq_len_kv, shape.index_dim, generator=g, device=device)
    index_q, q_scale = make_index_vectors(q, shape.precision)
    index_k, index_k_scale = make_index_vectors(k, shape.precision)
    weights = torch.randn(shape.seq_len_q, shape.index_heads, generator=g, device=device)
    kv_start, kv_end = causal_range(shape.seq_len_q, shape.seq_len_kv, device)
    return IndexerInputs(
        index_q, index_k, index_k_scale, weights * q_scale * weight_scale(shape), kv_start, kv_end
    )


def weight_scale(shape: IndexerShape) -> float:
    """index_heads^-1/2 · index_dim^-1/2, folded into the weights (0.0110485 for V3.2)."""
    return float((shape.index_heads * shape.index_dim) ** -0.5)


def visible(inputs: IndexerInputs, rows: Tensor | None = None) -> Tensor:
    """[rows, seq_len_kv] bool: column lies in [kv_start, kv_end)."""
    start, end = (x if rows is None else x[rows] for x in (inputs.kv_start, inputs.kv_end))
    columns = torch.arange(inputs.index_k.shape[0], device=start.device)
    return (columns >= start[:, None]) & (columns < end[:, None])


def weighted_relu_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Σ_h weights[…, h] · relu(q[…, h, :] · k[n, :]) in fp32, in chunks of rows: [rows, n]."""
    k = k.float()
    out = torch.empty(q.shape[0], k.shape[0], device=k.device)
    chunk = max(1, REFERENCE_CHUNK_ELEMENTS // (q.shape[1] * max(1, k.shape[0])))
    for begin in range(0, q.shape[0], chunk):
        part = slice(begin, begin + chunk)
        scores = torch.einsum("qhd,nd->qhn", q[part].float(), k).relu_()
        out[part] = torch.einsum("qhn,qh->qn", scores, weights[part].float())
    return out


def weighted_relu_scores_plain(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """What plain torch makes of it in bf16: products, weights and sums are each rounded.

    e4m3 values are exact in bf16, so quantisation is no part of the error.
    """
    keys, parts = k.bfloat16().mT, []
    size = max(1, REFERENCE_CHUNK_ELEMENTS // max(1, q.shape[1] * k.shape[0]))
    for queries, w in zip(q.split(size), weights.split(size), strict=True):
        scores = torch.matmul(queries.bfloat16(), keys).relu()
        parts.append(torch.matmul(w.bfloat16()[:, None], scores).squeeze(1).float())
    return torch.cat(parts)


def reference(inputs: IndexerInputs, *, rows: Tensor | None = None) -> IndexerOutputs:
    """The formula in fp32; -inf outside [kv_start, kv_end)."""
    q, w = (x if rows is None else x[rows] for x in (inputs.index_q, inputs.index_weights))
    logits = weighted_relu_scores(q, inputs.index_k, w) * inputs.index_k_scale
    return IndexerOutputs(logits.masked_fill_(~visible(inputs, rows), float("-inf")))


def plain(inputs: IndexerInputs, *, rows: Tensor | None = None) -> IndexerOutputs:
    """The formula in bf16, in every column: the measure of a kernel's error."""
    q, w = (x if rows is None else x[rows] for x in (inputs.index_q, inputs.index_weights))
    scores = weighted_relu_scores_plain(q, inputs.index_k, w)
    return IndexerOutputs(scores.mul_(inputs.index_k_scale))


def logits_tolerance(expected: Tensor, mask: Tensor) -> Tolerance:
    """cos as in DeepGEMM's tests; 1/256 of the rms, for fp8 products accumulate with few bits."""
    values = expected[mask].double()
    rms = values.square().mean().sqrt().item() if values.numel() else 0.0
    return Tolerance(abs=rms / 256 + 1e-30, rel=1 / 128, cos=5e-6)


def check(
    inputs: IndexerInputs, outputs: IndexerOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The visible columns against the reference: a fixed tolerance, twice the error of `plain`."""
    expected = reference(inputs, rows=rows).index_logits
    actual = outputs.index_logits if rows is None else outputs.index_logits[rows]
    mask = visible(inputs, rows)
    tolerance = logits_tolerance(expected, mask)
    low = plain(inputs, rows=rows).index_logits
    return (
        compare_tensors("index_logits", actual, expected, tolerance, mask=mask),
        compare_to_budget("index_logits_budget", actual, expected, low, mask=mask),
    )


def cost(shape: IndexerShape) -> Cost:
    """2 · index_heads · index_dim FLOP a visible pair; inputs and visible logits once."""
    query_bytes = shape.seq_len_q * shape.index_heads * (shape.index_dim * shape.element_bytes + 4)
    key_bytes = shape.seq_len_kv * (shape.index_dim * shape.element_bytes + 4)
    return Cost(
        flops=2.0 * shape.index_heads * shape.index_dim * shape.pairs,
        bytes_read=query_bytes + key_bytes,
        bytes_written=4.0 * shape.pairs,
    )


def memory(shape: IndexerShape) -> Memory:
    read = cost(shape).bytes_read
    return Memory(
        input_bytes=int(read) + 8 * shape.seq_len_q,
        output_bytes=4 * shape.seq_len_q * shape.seq_len_kv,
    )


def shape_of(case: Case, preset: Preset) -> IndexerShape:
    return IndexerShape(
        seq_len_q=case.seq_len_q,
        seq_len_kv=case.seq_len_kv,
        index_heads=preset.index_heads,
        index_dim=preset.index_dim,
        precision=case.precision,
    )


OPERATOR = Operator(
    name="indexer",
    summary="index logits of a prefill chunk over contiguous keys",
    phases=("prefill",),
    axes=frozenset({"precision"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.seq_len_q,
)
