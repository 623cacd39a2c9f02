"""Rotation of the queries' last 64 columns, interleaved, to where the attention wants them.

    out[t, h] = rotate_interleaved(x[t, h], rope_table[positions[t]])        (`rope.py`)

Shapes:
    x           [num_rows, num_heads, 64]  bf16  any strides but of the last dimension, which is 1
    positions   [num_rows]                 int32
    rope_table  [num_positions, 64]        fp32  cos | sin
    out         [num_rows, num_heads, 64]  as x  a view of a wider tensor, x itself, or a new one

Conventions: fp32 inside, one rounding. Source: DeepSeek-V3.2-Exp, inference/model.py (MLA).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_to_budget
from dsa_bench.kernels.paging import HEAD_DIM_QK, HEAD_DIM_ROPE, HEAD_DIM_V
from dsa_bench.kernels.rope import rope_table, rotate_interleaved
from dsa_bench.operator import Cost, Memory, Operator
from dsa_bench.preset import Preset
from dsa_bench.record import Case

QUERY_WIDTH = 192
"""Columns of a query in the MHA form, of which x is the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryRopeShape:
    num_rows: int
    num_heads: int = 128
    num_positions: int = 4096


@dataclass(frozen=True, slots=True)
class QueryRopeInputs:
    x: Tensor
    positions: Tensor
    rope_table: Tensor
    out: Tensor | None = None


class QueryRopeOutputs(NamedTuple):
    out: Tensor


def make_inputs(shape: QueryRopeShape, *, seed: int, device: torch.device | str) -> QueryRopeInputs:
    """Gaussian queries at random positions, rotated into the ends of 576 columns."""
    g = torch.Generator(device=device).manual_seed(seed)
    dims = (shape.num_rows, shape.num_heads)
    x = torch.randn(*dims, QUERY_WIDTH, generator=g, device=device).bfloat16()
    last = shape.num_positions
    positions = torch.randint(last, dims[:1], generator=g, device=device, dtype=torch.int32)
    out = torch.zeros(*dims, HEAD_DIM_QK, dtype=torch.bfloat16, device=device)
    return QueryRopeInputs(
        x[..., -HEAD_DIM_ROPE:],
        positions,
        rope_table(Preset(name=""), last, device),
        out[..., HEAD_DIM_V:],
    )


def rotated(inputs: QueryRopeInputs, rows: Tensor | None = None) -> Tensor:
    x, positions = inputs.x, inputs.positions
    if rows is not None:
        x, positions = x[rows], positions[rows]
    return rotate_interleaved(x, inputs.rope_table[positions.long()].unsqueeze(1))


def reference(inputs: QueryRopeInputs, *, rows: Tensor | None = None) -> QueryRopeOutputs:
    """Writes `out` if it is given, but for `rows` a tensor of their own."""
    made = rotated(inputs, rows)
    if inputs.out is None or rows is not None:
        return QueryRopeOutputs(made)
    inputs.out.copy_(made)
    return QueryRopeOutputs(inputs.out)


def check(
    inputs: QueryRopeInputs, outputs: QueryRopeOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Against fp32, under the budget of one rounding to bf16; x must still hold the queries."""
    out = outputs.out if rows is None else outputs.out[rows]
    expected = rotated(replace(inputs, x=inputs.x.float()), rows)
    return (compare_to_budget("out_budget", out, expected, rotated(inputs, rows)),)


def cost(shape: QueryRopeShape) -> Cost:
    moved = 2.0 * shape.num_rows * shape.num_heads * HEAD_DIM_ROPE
    angles = 4.0 * HEAD_DIM_ROPE * min(shape.num_rows, shape.num_positions)
    return Cost(flops=0.0, bytes_read=moved + angles, bytes_written=moved)


def memory(shape: QueryRopeShape) -> Memory:
    rows = 2 * shape.num_rows * shape.num_heads
    table = 4 * HEAD_DIM_ROPE * shape.num_positions
    return Memory(
        input_bytes=rows * (QUERY_WIDTH + HEAD_DIM_QK) + table + 4 * shape.num_rows, output_bytes=0
    )


def shape_of(case: Case, preset: Preset) -> QueryRopeShape:
    return QueryRopeShape(
        num_rows=case.batch_size * case.seq_len_q,
        num_heads=case.num_heads,
        num_positions=case.seq_len_kv,
    )


OPERATOR = Operator(
    name="query_rope",
    summary="rotation of the queries, interleaved, into the columns behind the absorbed ones",
    phases=("prefill", "decode"),
    axes=frozenset({"batch_size", "num_heads"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_rows,
)
