"""One product for each head: rows of a head with that head's own matrix.

    out[t, h, o] = Σ_i x[t, h, i] · weight[h, i, o]

Shapes:
    x       [num_rows, num_heads, in_features]         bf16  any strides; may repeat over heads
    weight  [num_heads, in_features, out_features]     bf16  any strides
    out     [num_rows, num_heads, out_features]        as x  a new tensor, or the one that is given

Conventions: sums in fp32. A given `out` is written in place and returned; it may be a view: the
first 512 columns of a query whose last 64 hold the rotated part.

Source: DeepSeek-V3.2 report, section 2 (absorbing W_UK into the query, W_UV behind the latents).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_to_budget
from dsa_bench.expect import expect_same_device
from dsa_bench.operator import Cost, Memory, Operator
from dsa_bench.preset import Preset
from dsa_bench.record import Case

REFERENCE_CHUNK_ELEMENTS = 2**27
"""Rows and results of a chunk of heads in fp32: 512 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLinearShape:
    num_rows: int
    in_features: int
    out_features: int
    num_heads: int = 128
    row_width: int = 0
    """Width of the rows that `out` is the beginning of; 0: a tensor of its own."""


@dataclass(frozen=True, slots=True)
class HeadLinearInputs:
    x: Tensor
    weight: Tensor
    out: Tensor | None = None


class HeadLinearOutputs(NamedTuple):
    out: Tensor


def make_inputs(
    shape: HeadLinearShape, *, seed: int, device: torch.device | str
) -> HeadLinearInputs:
    """Gaussian rows, Gaussian weights of variance 1 / in_features; outputs are of order 1."""
    g = torch.Generator(device=device).manual_seed(seed)
    heads, dims = shape.num_heads, (shape.in_features, shape.out_features)
    x = torch.randn(shape.num_rows, heads, dims[0], generator=g, device=device)
    weight = torch.randn(heads, *dims, generator=g, device=device) * shape.in_features**-0.5
    out = None
    if shape.row_width:
        rows = torch.zeros(
            shape.num_rows, heads, shape.row_width, dtype=torch.bfloat16, device=device
        )
        out = rows[..., : shape.out_features]
    return HeadLinearInputs(x.bfloat16(), weight.bfloat16(), out)


def check_arguments(inputs: HeadLinearInputs) -> None:
    """Refuse shapes, dtypes and devices that do not fit together, in a sentence."""
    x, weight, out = inputs.x, inputs.weight, inputs.out
    expect_same_device(x=x, weight=weight, out=out)
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != x.shape[1:]:
        raise ValueError(
            "x must be [num_rows, num_heads, in_features] and weight [num_heads, in_features,"
            f" out_features], got {list(x.shape)} and {list(weight.shape)}"
        )
    wanted = [*x.shape[:2], weight.shape[2]]
    if out is not None and list(out.shape) != wanted:
        raise ValueError(f"out must be {wanted}, got {list(out.shape)}")
    dtypes = {tensor.dtype for tensor in (x, weight, out) if tensor is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"x, weight and out must be of one float dtype, got {names}")


def exact(inputs: HeadLinearInputs, *, rows: Tensor | None = None) -> HeadLinearOutputs:
    """The formula in fp32, not rounded, in chunks of heads."""
    x = inputs.x if rows is None else inputs.x[rows]
    width = x.shape[0] * (x.shape[2] + inputs.weight.shape[2])
    size = max(1, REFERENCE_CHUNK_ELEMENTS // max(1, width))
    pairs = zip(x.split(size, 1), inputs.weight.split(size), strict=True)
    parts = [torch.einsum("thi,hio->tho", a.float(), b.float()) for a, b in pairs]
    return HeadLinearOutputs(torch.cat(parts, 1))


def reference(inputs: HeadLinearInputs, *, rows: Tensor | None = None) -> HeadLinearOutputs:
    """The formula in fp32, in the dtype of x; all rows go to a given `out`."""
    check_arguments(inputs)
    out = exact(inputs, rows=rows).out.to(inputs.x.dtype)
    if rows is None and inputs.out is not None:
        out = inputs.out.copy_(out)
    return HeadLinearOutputs(out)


def plain(inputs: HeadLinearInputs, *, rows: Tensor | None = None) -> HeadLinearOutputs:
    """What plain torch makes of it in bf16, head by head: the measure of a kernel's error."""
    x = inputs.x if rows is None else inputs.x[rows]
    heads = range(x.shape[1])
    parts = [x[:, h].bfloat16() @ inputs.weight[h].bfloat16() for h in heads]
    return HeadLinearOutputs(torch.stack(parts, 1))


def check(
    inputs: HeadLinearInputs, outputs: HeadLinearOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The error against fp32 is at most twice that of plain bf16."""
    actual = outputs.out if rows is None else outputs.out[rows]
    expected, simple = exact(inputs, rows=rows).out, plain(inputs, rows=rows).out
    return (compare_to_budget("out_budget", actual, expected, simple),)


def cost(shape: HeadLinearShape) -> Cost:
    """2 FLOP a product; rows, weights and results once, in bf16."""
    per_row = shape.num_rows * shape.num_heads
    weights = shape.num_heads * shape.in_features * shape.out_features
    return Cost(
        flops=2.0 * shape.num_rows * weights,
        bytes_read=2.0 * (per_row * shape.in_features + weights),
        bytes_written=2.0 * per_row * shape.out_features,
    )


def memory(shape: HeadLinearShape) -> Memory:
    """The rows that hold a given `out` are there before the call."""
    need = cost(shape)
    rows_bytes = 2 * shape.num_rows * shape.num_heads * shape.row_width
    return Memory(
        input_bytes=int(need.bytes_read) + rows_bytes,
        output_bytes=0 if shape.row_width else int(need.bytes_written),
    )


def shape_of(case: Case, preset: Preset) -> HeadLinearShape:
    """W_UK absorbed into the query: nope parts -> the first columns of a query on latents."""
    return HeadLinearShape(
        num_rows=case.seq_len_q * (case.batch_size if case.phase == "decode" else 1),
        in_features=preset.head_dim_nope,
        out_features=preset.head_dim_v,
        num_heads=case.num_heads,
        row_width=preset.head_dim_qk,
    )


OPERATOR = Operator(
    name="head_linear",
    summary="product of each head with its own matrix: W_UK and W_UV",
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
