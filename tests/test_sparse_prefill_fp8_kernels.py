"""Sparse prefill in fp8: every implementation, emulated and on a GPU."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import sparse_prefill_fp8_gluon
from dsa_bench.kernels.sparse_prefill import SparsePrefillShape
from dsa_bench.kernels.sparse_prefill_fp8 import OPERATOR, quantize
from dsa_bench.operator import Machine
from tests import hostile
from tests.gluon_emulator import Deadlock, EmulationError, emulated_gluon

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="a CPU")
KERNEL = "dsa_bench.kernels.sparse_prefill_fp8_gluon"


def test_supports_says_why_not():
    shape = SparsePrefillShape(seq_len_q=64, seq_len_kv=8192)
    supports = registry.implementation("sparse_prefill_fp8", "gluon").supports
    assert supports(shape, H100) is None
    assert "needs a Hopper GPU (sm_90), this is a CPU" in supports(shape, CPU)
    assert "topk up to 4096, this case has 4097" in supports(replace(shape, topk=4097), H100)


def test_registers_of_the_gluon_kernel_fit():
    outputs, loader = (
        sparse_prefill_fp8_gluon.OUTPUT_REGISTERS, sparse_prefill_fp8_gluon.LOADER_REGISTERS
    )  # fmt: skip
    left = 512 - 2 * outputs - loader
    assert left % 8 == 0 and left >= 112  # with fewer the scores spill


def test_gluon_refuses_more_keys_than_one_accumulator_may_sum():
    shape = SparsePrefillShape(seq_len_q=1, seq_len_kv=4097, topk=4097, num_heads=1)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    with pytest.raises(ValueError, match="topk must be up to 4096, got 4097"):
        sparse_prefill_fp8_gluon.run(inputs)


def emulate(inputs, *, seed, num_sms=2, changes=None):
    """Outputs of the emulated kernel, with `changes` to its modules."""
    with emulated_gluon(seed=seed, num_sms=num_sms) as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        emulated.change(changes or {})
        return kernel.run(inputs)


EMULATED = [
    (0, 1, 128, 64, 576, hostile.plain),
    (1, 3, 300, 16, 576, hostile.sparse_prefill_fp8_wild),
    (2, 2, 257, 72, 576, hostile.sparse_prefill_fp8_sharp),
    (3, 1, 1, 8, 576, hostile.plain),
    (4, 3, 200, 64, 512, hostile.sparse_prefill_fp8_wild),
    # several pieces a program: an odd number of blocks turns the parity of the barriers
    (5, 5, 192, 64, 576, hostile.sparse_prefill_fp8_sharp),
    (6, 3, 310, 130, 576, hostile.sparse_prefill_fp8_wild),
    (7, 7, 1, 8, 512, hostile.plain),
]


@pytest.mark.parametrize(("seed", "queries", "topk", "heads", "width", "mutate"), EMULATED)
def test_gluon_emulated(seed, queries, topk, heads, width, mutate):
    shape = SparsePrefillShape(
        seq_len_q=queries, seq_len_kv=310, topk=topk, num_heads=heads, head_dim_qk=width
    )
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    hostile.assert_right("sparse_prefill_fp8", inputs, emulate(inputs, seed=seed))


def test_gluon_emulated_nan_of_a_listed_row_shows():
    shape = SparsePrefillShape(seq_len_q=3, seq_len_kv=310, topk=257, num_heads=16)
    inputs = hostile.nan_in_query(1, OPERATOR.make_inputs(shape, seed=8, device="cpu"))
    inputs.topk_indices[2] = -1
    hostile.assert_nan_shows("sparse_prefill_fp8", inputs, emulate(inputs, seed=8, num_sms=132))


class NeverSmaller:
    """Gluon whose minimum is 1: no factor seems to change the outputs."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def min(self, x, axis):
        return torch.ones(())


MISTAKES = {
    "stages-differ": {"fp8_loader.STAGES": lambda stages: stages - 1},
    "outputs-not-rescaled": {"fp8_outputs.gl": NeverSmaller},
    "keys-in-another-order": {"fp8_scores._as_loaded": lambda _: lambda p: p},
    "logarithm-to-base-2": {"fp8_scores.LN_2": lambda _: 1.0},
}


def sharp(seed):
    """Keys that grow along the list, so that the maximum does."""
    shape = SparsePrefillShape(seq_len_q=3, seq_len_kv=310, topk=300, num_heads=16)
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    exact = inputs.exact()
    growing = exact.kv * torch.linspace(0.1, 3, 310)[:, None].bfloat16()
    ordered = exact.topk_indices.sort(1).values
    return quantize(replace(exact, q=exact.q * 8, kv=growing, topk_indices=ordered))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_found(mistake):
    def is_found(seed):
        inputs = sharp(seed)
        try:
            outputs = emulate(inputs, seed=seed, changes=MISTAKES[mistake])
        except (Deadlock, EmulationError):
            return True
        return not hostile.passes(OPERATOR.check(inputs, outputs))

    hostile.assert_right("sparse_prefill_fp8", sharp(0), emulate(sharp(0), seed=0))
    assert any(is_found(seed) for seed in range(4))


SHAPES = [
    SparsePrefillShape(seq_len_q=256, seq_len_kv=8192),
    SparsePrefillShape(seq_len_q=100, seq_len_kv=3000, topk=512, num_heads=64),
    SparsePrefillShape(seq_len_q=64, seq_len_kv=3000, topk=1024, num_heads=32),
    SparsePrefillShape(seq_len_q=33, seq_len_kv=777, topk=300, num_heads=16),
    SparsePrefillShape(seq_len_q=77, seq_len_kv=777, topk=257, num_heads=48),
    SparsePrefillShape(seq_len_q=64, seq_len_kv=64, topk=1, num_heads=8),
    SparsePrefillShape(seq_len_q=1, seq_len_kv=5000),
    SparsePrefillShape(seq_len_q=300, seq_len_kv=2000, topk=512, num_heads=64, head_dim_qk=512),
    SparsePrefillShape(seq_len_q=301, seq_len_kv=900, topk=300, num_heads=24),
    SparsePrefillShape(seq_len_q=70000, seq_len_kv=70000, topk=128, num_heads=8),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("sparse_prefill_fp8", SHAPES))
def test_sparse_prefill_fp8_matches_reference(name, shape, mutate):
    hostile.assert_implementation("sparse_prefill_fp8", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill_fp8"))
def test_sparse_prefill_fp8_nan_of_a_listed_row_shows(name):
    implementation = hostile.runnable("sparse_prefill_fp8", name, SHAPES[1])
    inputs = hostile.nan_in_query(7, OPERATOR.make_inputs(SHAPES[1], seed=4, device="cuda"))
    hostile.assert_nan_shows("sparse_prefill_fp8", inputs, implementation.run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill_fp8"))
def test_sparse_prefill_fp8_reads_keys_beyond_2_31_bytes(name):
    num_keys = 2**31 // 512 + 5000
    shape = SparsePrefillShape(seq_len_q=4, seq_len_kv=num_keys, topk=256, num_heads=64)
    implementation = hostile.runnable("sparse_prefill_fp8", name, shape)
    few = OPERATOR.make_inputs(replace(shape, seq_len_kv=4000), seed=0, device="cuda")
    kv = torch.zeros(num_keys, 512, dtype=few.kv.dtype, device="cuda")
    k_rope = torch.zeros(num_keys, 64, dtype=torch.bfloat16, device="cuda")
    kv[-4000:], k_rope[-4000:] = few.kv, few.k_rope
    far = replace(few, kv=kv, k_rope=k_rope, topk_indices=few.topk_indices + (num_keys - 4000))
    outputs = implementation.run(far)
    hostile.assert_right("sparse_prefill_fp8", few, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill_fp8"))
def test_sparse_prefill_fp8_repeats_to_the_bit(name):
    shape = SparsePrefillShape(seq_len_q=500, seq_len_kv=3000, topk=1000)
    implementation = hostile.runnable("sparse_prefill_fp8", name, shape)
    inputs = OPERATOR.make_inputs(shape, seed=11, device="cuda")
    first = implementation.run(inputs)
    for _ in range(20):
        for x, y in zip(first, implementation.run(inputs), strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_sparse_prefill_fp8_is_near_bf16_attention():
    shape = SparsePrefillShape(seq_len_q=64, seq_len_kv=8192)
    inputs = OPERATOR.make_inputs(shape, seed=5, device="cuda")
    outputs = registry.implementation("sparse_prefill_fp8", "gluon").run(inputs)
    found = OPERATOR.figures(inputs, outputs)["rounding_error"]["relative_l2"]
    rounded = OPERATOR.figures(inputs, OPERATOR.reference(inputs))["rounding_error"]["relative_l2"]
    # what the rounding of the inputs alone does, and what the kernel may add
    assert rounded < found < rounded + 2**-5
