"""Products of each head by torch.bmm, on views with the heads in front: nothing is copied.

cuBLAS takes matrices whose last stride is 1 and whose row stride is any, with any distance between
two heads, 0 included; so a slice of wider rows is read, and written, where it lies.
"""

import torch

from dsa_bench.kernels.head_linear import (
    HeadLinearInputs,
    HeadLinearOutputs,
    HeadLinearShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "head_linear"


def run(inputs: HeadLinearInputs) -> HeadLinearOutputs:
    check_arguments(inputs)
    x, out = inputs.x, inputs.out
    if out is None:
        out = torch.empty(*x.shape[:2], inputs.weight.shape[2], dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), inputs.weight, out=out.transpose(0, 1))
    return HeadLinearOutputs(out)


def supports(shape: HeadLinearShape, machine: Machine) -> str | None:
    if machine.capability is not None and machine.capability < (8, 0):
        return f"torch head_linear in bf16 needs sm_80 or newer, this is {machine.name}"
    return None


IMPLEMENTATIONS = (Implementation(name="torch", run=run, supports=supports, priority=10),)
