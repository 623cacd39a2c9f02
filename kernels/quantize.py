"""Activations to e4m3, with a scale for each 128 columns of a row, as block-scaled products take.

    scale[t, g] = 2^ceil(log2(max(amax of the group, 1e-4) / 448))
    values[t, i] = e4m3(x[t, i] / scale[t, i // 128])

Shapes:
    x       [num_rows, width]        bf16  any row stride; width a multiple of 128
    values  [num_rows, width]        e4m3
    scale   [num_rows, width / 128]  fp32  stored by column: stride (1, num_rows)

Conventions: an element that is not finite stays so, or becomes NaN; the others of its group are
undefined. Source: DeepSeek-V3.2-Exp, inference/kernel.py (block
quantisation of activations, power-of-two scales).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, shape_differs
from dsa_bench.kernels import fp8
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

GROUP = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeShape:
    num_rows: int
    width: int

    def __post_init__(self) -> None:
        if self.width % GROUP:
            raise Unsupported(f"width must be a multiple of {GROUP}, got {self.width}")


@dataclass(frozen=True, slots=True)
class QuantizeInputs:
    x: Tensor


class QuantizeOutputs(NamedTuple):
    values: Tensor
    scale: Tensor


def make_inputs(shape: QuantizeShape, *, seed: int, device: torch.device | str) -> QuantizeInputs:
    """Gaussian rows whose sizes differ by up to 2^8."""
    g = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(shape.num_rows, shape.width, generator=g, device=device)
    size = torch.rand(shape.num_rows, 1, generator=g, device=device) * 8 - 4
    return QuantizeInputs((x * size.exp2()).bfloat16())


def quantize_groups(x: Tensor) -> QuantizeOutputs:
    """The formulas on x of any dtype."""
    values, scale = fp8.quantize(x, GROUP, fp8.INDEX_AMAX_FLOOR / fp8.E4M3_MAX)
    return QuantizeOutputs(values, scale.T.contiguous().T)


def reference(inputs: QuantizeInputs, *, rows: Tensor | None = None) -> QuantizeOutputs:
    return quantize_groups(inputs.x if rows is None else inputs.x[rows])


def check(
    inputs: QuantizeInputs, outputs: QuantizeOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Equal in every bit: division by a power of two is exact, and a rounding has one result.

    Of a group that is not finite nothing is compared but that those elements are lost.
    """
    x = inputs.x if rows is None else inputs.x[rows]
    values, scale = outputs if rows is None else (part[rows] for part in outputs)
    expected = reference(inputs, rows=rows)
    if values.shape != expected.values.shape or scale.shape != expected.scale.shape:
        return (shape_differs("values"),)
    finite = x.unflatten(-1, (-1, GROUP)).isfinite()
    whole = finite.all(-1)
    values, wanted = (v.float().unflatten(-1, (-1, GROUP)) for v in (values, expected.values))
    result = values * scale.unsqueeze(-1)
    return (
        _none("values", (values != wanted) & whole.unsqueeze(-1)),
        _none("scale", (scale != expected.scale) & whole),
        _none("hidden", ~finite & result.isfinite()),
    )


def _none(name: str, wrong: Tensor) -> Check:
    """Not one element is wrong."""
    count = float(wrong.sum().item())
    return Check(name=name, passed=count == 0, figures={"wrong": count}, limits={"wrong": 0.0})


def cost(shape: QuantizeShape) -> Cost:
    elements = shape.num_rows * shape.width
    return Cost(flops=0.0, bytes_read=2.0 * elements, bytes_written=elements * (1.0 + 4.0 / GROUP))


def memory(shape: QuantizeShape) -> Memory:
    elements = shape.num_rows * shape.width
    return Memory(input_bytes=2 * elements, output_bytes=elements + 4 * elements // GROUP)


def shape_of(case: Case, preset: Preset) -> QuantizeShape:
    return QuantizeShape(
        num_rows=case.batch_size * case.seq_len_q, width=case.num_heads * preset.head_dim_v_mha
    )


OPERATOR = Operator(
    name="quantize",
    summary="activations to e4m3 with a scale for each 128 columns, as block-scaled products take",
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
