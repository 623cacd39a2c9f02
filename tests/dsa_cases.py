"""Small cases of `dsa`, and large ones on a GPU, for the tests of the whole."""

from dataclasses import replace

import pytest

from dsa_bench import gate, machine, registry
from dsa_bench.kernels.dsa import OPERATOR, DsaShape
from dsa_bench.preset import PRESETS, Preset
from dsa_bench.record import Case
from tests import hostile

INF = float("inf")
SMALL = Preset(name="v3.2-cpu", num_heads=2, index_heads=4)


def prefill_shape(seq_len_q=6, seq_len_kv=40, topk=8, precision="fp8", **fields):
    return DsaShape(
        phase="prefill", seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, topk=topk,
        precision=precision, num_heads=2, preset=SMALL, **fields,
    )  # fmt: skip


def decode_shape(batch_size=3, seq_len_q=2, seq_len_kv=100, topk=8, precision="fp8", **fields):
    return DsaShape(
        phase="decode", seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, topk=topk,
        precision=precision, batch_size=batch_size, num_heads=2, preset=SMALL, **fields,
    )  # fmt: skip


SHAPES = [
    pytest.param(make(precision=precision), id=f"{make().phase}-{precision}")
    for make in (prefill_shape, decode_shape)
    for precision in ("fp8", "bf16")
]


def make_inputs(shape, seed=0):
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


def in_bf16(outputs):
    """As kernels give it: the output rounded to bf16."""
    return outputs._replace(out=outputs.out.bfloat16())


def on_gpu(
    phase, precision, seq_len_kv, seq_len_q, batch_size, workspace_bytes=None, op="dsa", **fields
):
    """Inputs and outputs of the best implementation, which are right on sampled rows."""
    case = Case(
        op=op, impl="auto", phase=phase, seq_len_kv=seq_len_kv, seq_len_q=seq_len_q,
        topk=2048, precision=precision, batch_size=batch_size, **fields,
    )  # fmt: skip
    here, operator = machine.detect("cuda"), registry.operator(op)
    case = replace(case, impl=registry.choose(op, case, PRESETS["v3.2"], here))
    resolved = registry.resolve(case, here, workspace_bytes=workspace_bytes)
    if resolved.reason:
        pytest.skip(resolved.reason)
    inputs = operator.make_inputs(resolved.shape, seed=1, device="cuda")
    with hostile.poisoned_outputs():
        outputs = resolved.run(inputs)
    rows = gate.sample_rows(operator.num_rows(resolved.shape), seed=3, device="cuda", limit=24)
    hostile.assert_right(op, inputs, outputs, rows)
    return inputs, outputs
