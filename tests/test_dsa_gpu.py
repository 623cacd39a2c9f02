"""The best implementations of `dsa` on a GPU."""

from dataclasses import replace

import pytest

from dsa_bench import gate, machine, registry
from dsa_bench.kernels import dsa
from dsa_bench.kernels.dsa import OPERATOR
from dsa_bench.operator import Implementation
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.dsa_cases import on_gpu


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("phase", "seq_len_q", "batch_size"),
    [("prefill", 4096, 1), ("prefill", 16384, 1), ("decode", 1, 32), ("decode", 3, 5)],
)
def test_dsa_on_the_gpu_at_16k(phase, seq_len_q, batch_size, precision):
    on_gpu(phase, precision, 16384, seq_len_q, batch_size)


@pytest.mark.gpu
@pytest.mark.parametrize(("seq_len_q", "batch_size"), [(1, 1), (3, 5), (2, 150)])
def test_decode_on_the_gpu_launches_no_page_slots(seq_len_q, batch_size):
    case = Case(
        op="dsa", impl="auto", phase="decode", seq_len_kv=16384, seq_len_q=seq_len_q, topk=2048,
        precision="fp8", batch_size=batch_size,
    )  # fmt: skip
    here, preset = machine.detect("cuda"), PRESETS["v3.2"]
    resolved = registry.resolve(
        replace(case, impl=registry.choose("dsa", case, preset, here)), here
    )
    if resolved.reason:
        pytest.skip(resolved.reason)
    if resolved.parts["topk"].name != "gluon":
        pytest.skip("the top-k of this machine gives no slots")

    def refuse(inputs):
        raise RuntimeError("page_slots")

    inputs = OPERATOR.make_inputs(resolved.shape, seed=1, device="cuda")
    stages = {**resolved.parts, "page_slots": Implementation(name="none", run=refuse)}
    with hostile.poisoned_outputs():
        outputs = OPERATOR.compose("decode", stages)(inputs)
    rows = gate.sample_rows(batch_size, seed=3, device="cuda", limit=24)
    hostile.assert_right("dsa", inputs, outputs, rows)
    with pytest.raises(RuntimeError, match="page_slots"):
        dsa.run_decode(inputs, stages, topk_indices=outputs.topk_indices)


@pytest.mark.gpu
def test_dsa_on_the_gpu_in_chunks_selects_the_same():
    whole = on_gpu("prefill", "fp8", 16384, 1024, 1)[1]
    parts = on_gpu("prefill", "fp8", 16384, 1024, 1, workspace_bytes=4 * 16384 * 100)[1]
    same = whole.topk_indices.sort(1).values == parts.topk_indices.sort(1).values
    # a tile of other queries may sum in another order, which swaps keys at the boundary
    assert same.float().mean() > 0.99
