"""Product of rows with a weight matrix, in bf16 or in e4m3 with a scale for each block.

    out[t, o] = Σ_i x[t, i] · w[o, i]
    fp8: x[t, i] = values[t, i] · x_scale[t, i // 128]
         w[o, i] = values[o, i] · scale[o // 128, i // 128]

Shapes:
    x        [num_rows, in_features]        bf16 or e4m3  any row stride
    x_scale  [num_rows, in_features / 128]  fp32          with e4m3 alone, any strides
    weight   values [out_features, in_features] bf16 or e4m3,
             scale [⌈out_features / 128⌉, in_features / 128] fp32 or None
    out      [num_rows, out_features]       out_dtype; if None bf16 for e4m3, else that of x

Conventions: e4m3 products are summed over the 128 columns of a block; that sum times both scales is
added up in fp32. The last row of blocks may hold fewer than 128 rows.

Source: DeepSeek-V3 report, section 3.3.2 (tiles of 1 × 128, blocks of 128 × 128); DeepGEMM.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import BF16_ROUNDING, Check, compare_to_budget, shape_differs
from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.fp8 import E4M3_MAX, INDEX_AMAX_FLOOR, quantize
from dsa_bench.kernels.layer_weights import Matrix, quantize_blocks
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

BLOCK = 128
"""Columns under one scale of x; rows and columns under one scale of the weight."""
SUM_ROUNDING = 2.0**-13
"""Of a result that stays in fp32: Hopper's e4m3 tensor cores keep some 13 bits of a sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    num_rows: int
    in_features: int
    out_features: int
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.precision == "fp8" and self.in_features % BLOCK:
            raise Unsupported(
                f"in_features {self.in_features} must be a multiple of {BLOCK} in fp8"
                " (one scale covers that many)"
            )

    @property
    def num_blocks(self) -> int:
        """Scales of the weight; 0 in bf16."""
        if self.precision != "fp8":
            return 0
        return -(-self.out_features // BLOCK) * (self.in_features // BLOCK)


@dataclass(frozen=True, slots=True)
class LinearInputs:
    x: Tensor
    x_scale: Tensor | None
    weight: Matrix
    out_dtype: torch.dtype | None = None

    @property
    def result_dtype(self) -> torch.dtype:
        """What was asked for; else bf16 for e4m3, the dtype of x for others."""
        if self.out_dtype is not None:
            return self.out_dtype
        return torch.bfloat16 if self.x.dtype == torch.float8_e4m3fn else self.x.dtype


class LinearOutputs(NamedTuple):
    out: Tensor


def make_inputs(shape: LinearShape, *, seed: int, device: torch.device | str) -> LinearInputs:
    """Gaussian rows, a Gaussian weight of variance 1 / in_features; outputs are of order 1."""
    g = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(shape.num_rows, shape.in_features, generator=g, device=device)
    w = torch.randn(shape.out_features, shape.in_features, generator=g, device=device)
    w *= shape.in_features**-0.5
    if shape.precision != "fp8":
        return LinearInputs(x.bfloat16(), None, Matrix(w.bfloat16()))
    values, scale = quantize(x, BLOCK, INDEX_AMAX_FLOOR / E4M3_MAX)
    return LinearInputs(values, scale.T.contiguous().T, quantize_blocks(w))


def check_arguments(inputs: LinearInputs) -> None:
    """Refuse shapes, dtypes and devices that do not fit together, in a sentence."""
    x, x_scale, weight = inputs.x, inputs.x_scale, inputs.weight
    e4m3 = torch.float8_e4m3fn
    dtypes = (e4m3, torch.bfloat16, torch.float32)
    expect_tensor("x", x, dtypes, num_rows=None, in_features=None)
    rows, columns = weight.values.shape
    expect_tensor("x", x, weight.values.dtype, num_rows=None, in_features=columns)
    expect_same_device(x=x, x_scale=x_scale, weight=weight.values, scale=weight.scale)
    if x.dtype != e4m3:
        if x_scale is not None or weight.scale is not None:
            raise ValueError("scales go with e4m3 alone (pass None)")
        return
    if x_scale is None or weight.scale is None:
        raise ValueError("e4m3 needs both scales (pass x_scale and a Matrix with a scale)")
    if columns % BLOCK:
        raise ValueError(f"in_features must be a multiple of {BLOCK} in e4m3, got {columns}")
    blocks = columns // BLOCK
    for name, scale, outer in (
        ("x_scale", x_scale, x.shape[0]),
        ("weight.scale", weight.scale, -(-rows // BLOCK)),
    ):
        if scale.dtype != torch.float32 or scale.shape != (outer, blocks):
            raise ValueError(
                f"{name} must be float32 [{outer}, {blocks}], got {scale.dtype} {list(scale.shape)}"
            )


def dequantized_rows(inputs: LinearInputs, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x times its scale, rounded once, of all rows or of these."""
    x = inputs.x if rows is None else inputs.x[rows]
    if inputs.x_scale is None:
        return x.to(dtype)
    scale = inputs.x_scale if rows is None else inputs.x_scale[rows]
    groups: Tensor = x.float().unflatten(1, (-1, BLOCK)) * scale[..., None]
    return groups.flatten(1).to(dtype)


def exact(inputs: LinearInputs, *, rows: Tensor | None = None) -> LinearOutputs:
    """The formula in fp32, not rounded."""
    x = dequantized_rows(inputs, rows, torch.float32)
    return LinearOutputs(x @ inputs.weight.dequantize(torch.float32).T)


def reference(inputs: LinearInputs, *, rows: Tensor | None = None) -> LinearOutputs:
    """The formula in fp32; `out` in the dtype that an implementation gives."""
    check_arguments(inputs)
    return LinearOutputs(exact(inputs, rows=rows).out.to(inputs.result_dtype))


def plain(inputs: LinearInputs, *, rows: Tensor | None = None) -> LinearOutputs:
    """What plain torch makes of it in bf16; a result of fp32 is not rounded, its terms are."""
    x = dequantized_rows(inputs, rows, torch.bfloat16)
    w = inputs.weight.dequantize(torch.bfloat16)
    if inputs.result_dtype == torch.float32:
        return LinearOutputs(x.float() @ w.float().T)
    return LinearOutputs(x @ w.T)


def check(
    inputs: LinearInputs, outputs: LinearOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """The error against fp32 is at most twice that of plain bf16."""
    expected = exact(inputs, rows=rows).out
    actual = outputs.out if rows is None else outputs.out[rows]
    if actual.shape != expected.shape or actual.dtype != inputs.result_dtype:
        return (shape_differs("out_budget"),)
    stays = inputs.result_dtype == torch.float32
    simple = plain(inputs, rows=rows).out
    floor = SUM_ROUNDING if stays else BF16_ROUNDING
    return (compare_to_budget("out_budget", actual, expected, simple, floor=floor),)


def cost(shape: LinearShape) -> Cost:
    """2 FLOP a product; rows, weight and their scales once, `out` in bf16."""
    element_bytes = 1 if shape.precision == "fp8" else 2
    scales = shape.num_blocks
    if shape.precision == "fp8":
        scales += shape.num_rows * (shape.in_features // BLOCK)
    elements = shape.in_features * (shape.num_rows + shape.out_features)
    return Cost(
        flops=2.0 * shape.num_rows * shape.in_features * shape.out_features,
        bytes_read=float(element_bytes * elements + 4 * scales),
        bytes_written=2.0 * shape.num_rows * shape.out_features,
    )


def memory(shape: LinearShape) -> Memory:
    need = cost(shape)
    return Memory(input_bytes=int(need.bytes_read), output_bytes=int(need.bytes_written))


def num_tokens(case: Case) -> int:
    """Rows of a projection: the queries of a chunk, or those of all sequences."""
    return case.seq_len_q * (case.batch_size if case.phase == "decode" else 1)


def shape_of(case: Case, preset: Preset) -> LinearShape:
    """The output projection, the largest of a layer: all heads' values -> hidden."""
    return LinearShape(
        num_rows=num_tokens(case),
        in_features=case.num_heads * preset.head_dim_v_mha,
        out_features=preset.hidden_size,
        precision=case.precision,
    )


OPERATOR = Operator(
    name="linear",
    summary="product with a weight matrix: projections of the layer",
    phases=("prefill", "decode"),
    axes=frozenset({"precision", "batch_size", "num_heads"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_rows,
)
