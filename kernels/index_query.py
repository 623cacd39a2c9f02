"""Queries of the indexer: rotated, Hadamard, quantised, their scales folded into the head weights.

    y = [rotate_half_split(x[t, j, :64], rope_table[positions[t]]) | x[t, j, 64:]]
    q = hadamard_128 · y · 128^-1/2
    fp8:   s = 2^ceil(log2(max(amax q, 1e-4) / 448)),  index_q = e4m3(q / s)
    bf16:  s = 1,  index_q = q
    index_weights[t, j] = head_weights[t, j] · weight_scale · s

Shapes:
    x              [num_rows, index_heads, 128]  bf16  any row stride, heads contiguous
    head_weights   [num_rows, index_heads]       fp32  W_w h
    positions      [num_rows]                    int32
    rope_table     [num_positions, 64]           fp32  cos | sin
    index_q        [num_rows, index_heads, 128]  e4m3, or as x
    index_weights  [num_rows, index_heads]       fp32

Conventions: rotation and sums in fp32; y and q are rounded to the dtype of x. `weight_scale` is
64^-1/2 · 128^-1/2 for V3.2. The rotated columns come first, opposite to the main attention.
Source: DeepSeek-V3.2-Exp, inference/model.py (Indexer), with its rotation as corrected in November
2025.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_to_budget
from dsa_bench.kernels.fp8 import quantize_index_vectors
from dsa_bench.kernels.paging import HEAD_DIM_ROPE, INDEX_DIM
from dsa_bench.kernels.rope import hadamard, rope_table, rotate_half_split
from dsa_bench.operator import Cost, Memory, Operator
from dsa_bench.preset import Preset
from dsa_bench.record import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexQueryShape:
    num_rows: int
    index_heads: int = 64
    precision: str = "fp8"
    num_positions: int = 4096


@dataclass(frozen=True, slots=True)
class IndexQueryInputs:
    x: Tensor
    head_weights: Tensor
    positions: Tensor
    rope_table: Tensor
    precision: str
    weight_scale: float


class IndexQueryOutputs(NamedTuple):
    index_q: Tensor
    index_weights: Tensor


def make_inputs(
    shape: IndexQueryShape, *, seed: int, device: torch.device | str
) -> IndexQueryInputs:
    """Gaussian queries of different sizes at random positions; the rows of a wider tensor."""
    g = torch.Generator(device=device).manual_seed(seed)
    dims = (shape.num_rows, shape.index_heads)
    size = (torch.rand(*dims, 1, generator=g, device=device) * 8 - 4).exp2()
    wide = torch.zeros(dims[0], dims[1] + 1, INDEX_DIM, dtype=torch.bfloat16, device=device)
    wide[:, 1:] = torch.randn(*dims, INDEX_DIM, generator=g, device=device) * size
    last = shape.num_positions
    return IndexQueryInputs(
        wide[:, 1:],
        torch.randn(dims, generator=g, device=device),
        torch.randint(last, dims[:1], generator=g, device=device, dtype=torch.int32),
        rope_table(Preset(name=""), last, device),
        shape.precision,
        float((shape.index_heads * INDEX_DIM) ** -0.5),
    )


def reference(inputs: IndexQueryInputs, *, rows: Tensor | None = None) -> IndexQueryOutputs:
    x, weights, positions = inputs.x, inputs.head_weights, inputs.positions
    if rows is not None:
        x, weights, positions = x[rows], weights[rows], positions[rows]
    angles = inputs.rope_table[positions.long()].unsqueeze(1)
    first, second = x.split((HEAD_DIM_ROPE, INDEX_DIM - HEAD_DIM_ROPE), dim=-1)
    y = torch.cat([rotate_half_split(first, angles), second], dim=-1)
    q = (y.float() @ hadamard(INDEX_DIM, x.device)).to(x.dtype)
    weights = weights * inputs.weight_scale
    if inputs.precision != "fp8":
        return IndexQueryOutputs(q, weights)
    values, scale = quantize_index_vectors(q)
    return IndexQueryOutputs(values, weights * scale)


def weighted(outputs: IndexQueryOutputs) -> Tensor:
    """index_q · |index_weights|: what both amount to in a score, up to the sign."""
    return outputs.index_q.float() * outputs.index_weights.abs().unsqueeze(-1)


def check(
    inputs: IndexQueryInputs, outputs: IndexQueryOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Query times weight against fp32, under the budget of plain bf16; the signs of weights."""
    exact = replace(inputs, x=inputs.x.float())
    if rows is not None:
        outputs = IndexQueryOutputs(*(x[rows] for x in outputs))
    expected, plain = (reference(x, rows=rows) for x in (exact, inputs))
    flipped = (outputs.index_weights.sign() != expected.index_weights.sign()).sum().item()
    return (
        compare_to_budget("index_q_budget", weighted(outputs), weighted(expected), weighted(plain)),
        Check(
            name="weight_signs",
            passed=flipped == 0,
            figures={"flipped": float(flipped)},
            limits={"flipped": 0.0},
        ),
    )


def _bytes(shape: IndexQueryShape) -> tuple[int, int]:
    """Read and written."""
    vectors = shape.num_rows * shape.index_heads
    angles = 4 * HEAD_DIM_ROPE * min(shape.num_rows, shape.num_positions)
    width = 1 if shape.precision == "fp8" else 2
    return vectors * (2 * INDEX_DIM + 4) + angles, vectors * (width * INDEX_DIM + 4)


def cost(shape: IndexQueryShape) -> Cost:
    """No FLOPs: the rotation by Hadamard's matrix needs additions alone."""
    read, written = _bytes(shape)
    return Cost(flops=0.0, bytes_read=float(read), bytes_written=float(written))


def memory(shape: IndexQueryShape) -> Memory:
    _, written = _bytes(shape)
    rows, table = shape.num_rows, 4 * HEAD_DIM_ROPE * shape.num_positions
    vectors = rows * (shape.index_heads + 1)
    return Memory(
        input_bytes=vectors * 2 * INDEX_DIM + rows * (shape.index_heads * 4 + 4) + table,
        output_bytes=written,
    )


def shape_of(case: Case, preset: Preset) -> IndexQueryShape:
    return IndexQueryShape(
        num_rows=case.batch_size * case.seq_len_q,
        index_heads=preset.index_heads,
        precision=case.precision,
        num_positions=case.seq_len_kv,
    )


OPERATOR = Operator(
    name="index_query",
    summary="queries of the indexer: rotation, Hadamard, e4m3, scales folded into head weights",
    phases=("prefill", "decode"),
    axes=frozenset({"precision", "batch_size"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_rows,
)
