"""What a call holds, what inputs hold, and what does not fit."""

import pytest
import torch

from dsa_bench.machine import detect
from dsa_bench.memory_use import held_bytes, measure_memory, shortage
from dsa_bench.operator import Memory
from tests import fake_operator
from tests.fake_operator import CPU, FakeInputs, FakeShape


def test_held_bytes_counts_a_shared_storage_once() -> None:
    x = torch.zeros(100, 4)
    assert held_bytes({"a": x, "b": (x[:10], [x.view(-1)]), "n": 3}) == 1600
    inputs = FakeInputs(torch.zeros(8, 4, dtype=torch.bfloat16))
    assert held_bytes((inputs, x)) == 64 + 1600


def test_memory_of_a_call_on_the_cpu() -> None:
    def run(inputs: FakeInputs) -> fake_operator.FakeOutputs:
        workspace = inputs.x.repeat(8, 1)  # 8 inputs
        return fake_operator.FakeOutputs(workspace[: inputs.x.shape[0]] + inputs.x)

    inputs = fake_operator.make_inputs(FakeShape(num_rows=1024), seed=0, device="cpu")
    size = 1024 * fake_operator.NUM_COLS * 4
    predicted = Memory(input_bytes=size, output_bytes=size, workspace_bytes=7)
    use = measure_memory(run, inputs, predicted=predicted, machine=CPU)
    assert use.input_bytes == size and use.output_bytes == size
    assert use.workspace_bytes == 8 * size and use.peak_bytes == 10 * size
    assert use.predicted_bytes == 2 * size + 7


def test_shortage_says_what_is_needed_and_what_is_free() -> None:
    gib = 2**30
    memory = Memory(input_bytes=90 * gib, output_bytes=2 * gib, workspace_bytes=gib // 2)
    assert shortage(memory, int(78.3 * gib)) == (
        "needs 92.5 GiB, 78.3 GiB free (inputs 90.0, outputs 2.0, workspace 0.5)"
    )
    assert shortage(memory, memory.total_bytes) == ""


@pytest.mark.gpu
def test_gpu_memory_of_a_call() -> None:
    def run(inputs: FakeInputs) -> fake_operator.FakeOutputs:
        workspace = inputs.x.repeat(8, 1)
        return fake_operator.FakeOutputs(workspace[: inputs.x.shape[0]] + inputs.x)

    inputs = fake_operator.make_inputs(FakeShape(num_rows=2**18), seed=0, device="cuda")
    size = inputs.x.nbytes
    predicted = Memory(input_bytes=size, output_bytes=size)
    use = measure_memory(run, inputs, predicted=predicted, machine=detect("cuda"))
    assert (use.input_bytes, use.output_bytes) == (size, size)
    assert use.workspace_bytes == 8 * size and use.peak_bytes == 10 * size
