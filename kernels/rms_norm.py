"""RMS norm of the query latent, quantised for the product that follows where that is in fp8.

    y[t, i] = x[t, i] / sqrt(mean_i x[t, i]² + eps) · weight[i]
    out = y,  or quantised: e4m3 and a scale for each 128 columns (`quantize.py`)

Shapes:
    x       [num_rows, width]        bf16  any row stride
    weight  [width]                  bf16
    out     [num_rows, width]        as x, or e4m3
    scale   [num_rows, width / 128]  fp32  stored by column; None where nothing is quantised

Conventions: sums in fp32; y is rounded to the dtype of x before it is quantised.
Source: DeepSeek-V3.2-Exp, inference/model.py (q_norm).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, compare_to_budget
from dsa_bench.kernels.quantize import GROUP, quantize_groups
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

REST = 704
"""Columns of the down projection behind the query latent: x is a slice of a wider tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RmsNormShape:
    num_rows: int
    width: int
    quantized: bool = False

    def __post_init__(self) -> None:
        if self.quantized and self.width % GROUP:
            raise Unsupported(f"width must be a multiple of {GROUP}, got {self.width}")


@dataclass(frozen=True, slots=True)
class RmsNormInputs:
    x: Tensor
    weight: Tensor
    eps: float
    quantized: bool = False


class RmsNormOutputs(NamedTuple):
    out: Tensor
    scale: Tensor | None


def make_inputs(shape: RmsNormShape, *, seed: int, device: torch.device | str) -> RmsNormInputs:
    """Gaussian rows, a slice of a wider tensor, and weights about 1."""
    g = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(shape.num_rows, shape.width + REST, generator=g, device=device).bfloat16()
    weight = 1 + torch.randn(shape.width, generator=g, device=device) / 10
    eps = Preset(name="").norm_eps
    return RmsNormInputs(x[:, : shape.width], weight.bfloat16(), eps, shape.quantized)


def reference(inputs: RmsNormInputs, *, rows: Tensor | None = None) -> RmsNormOutputs:
    x = (inputs.x if rows is None else inputs.x[rows]).float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + inputs.eps) * inputs.weight.float()
    y = y.to(inputs.x.dtype)
    return RmsNormOutputs(*quantize_groups(y)) if inputs.quantized else RmsNormOutputs(y, None)


def widen(outputs: RmsNormOutputs) -> Tensor:
    """`out` in fp32, dequantised."""
    out = outputs.out.float()
    return out if outputs.scale is None else out * outputs.scale.repeat_interleave(GROUP, 1)


def check(
    inputs: RmsNormInputs, outputs: RmsNormOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Against fp32, under the budget of plain bf16; what is quantised is compared dequantised."""
    exact = replace(inputs, x=inputs.x.float())
    if rows is not None:
        scale = None if outputs.scale is None else outputs.scale[rows]
        outputs = RmsNormOutputs(outputs.out[rows], scale)
    expected, plain = (widen(reference(x, rows=rows)) for x in (exact, inputs))
    return (compare_to_budget("out_budget", widen(outputs), expected, plain),)


def cost(shape: RmsNormShape) -> Cost:
    elements = shape.num_rows * shape.width
    written = 1.0 + 4.0 / GROUP if shape.quantized else 2.0
    return Cost(
        flops=0.0,
        bytes_read=2.0 * (elements + shape.width),
        bytes_written=elements * written,
    )


def memory(shape: RmsNormShape) -> Memory:
    elements = shape.num_rows * shape.width
    return Memory(
        input_bytes=2 * (shape.num_rows * (shape.width + REST) + shape.width),
        output_bytes=elements + 4 * elements // GROUP if shape.quantized else 2 * elements,
    )


def shape_of(case: Case, preset: Preset) -> RmsNormShape:
    return RmsNormShape(
        num_rows=case.batch_size * case.seq_len_q,
        width=preset.q_lora_rank,
        quantized=case.precision == "fp8",
    )


OPERATOR = Operator(
    name="rms_norm",
    summary="RMS norm of the query latent, quantised where the next product is in fp8",
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
