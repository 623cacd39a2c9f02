"""Sparse prefill: every implementation, emulated, interpreted and on a GPU."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import sparse_prefill_gluon, sparse_prefill_triton
from dsa_bench.kernels.sparse_prefill import (
    OPERATOR,
    SparsePrefillInputs,
    SparsePrefillShape,
    make_attention_tensor,
)
from dsa_bench.operator import Machine
from tests import hostile
from tests.gluon_emulator import emulated_gluon

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="a CPU")


def small():
    shape = SparsePrefillShape(seq_len_q=6, seq_len_kv=40, topk=16, num_heads=3)
    return OPERATOR.make_inputs(shape, seed=0, device="cpu")


MISTAKES = [
    ("q", lambda x: x.float(), TypeError, "q must be bfloat16"),
    ("q", lambda x: x[..., :500], ValueError, "q must be bfloat16 .*head_dim_qk=576"),
    ("q", lambda x: x.mT.contiguous().mT, ValueError, "q must be contiguous in its last dim"),
    ("kv", lambda x: x.half(), TypeError, "kv must be bfloat16"),
    ("kv", lambda x: torch.empty(40, 580).bfloat16()[:, :576], ValueError, "multiples of 16"),
    ("topk_indices", lambda x: x.long(), TypeError, "topk_indices must be int32"),
    ("topk_indices", lambda x: x[:3], ValueError, "topk_indices must be int32 .seq_len_q=6"),
    ("topk_lens", lambda x: torch.ones(5, dtype=torch.int32), ValueError, "topk_lens must be int"),
    ("attn_sink", lambda x: torch.ones(4), ValueError, "attn_sink must be float32 .num_heads=3"),
    ("sm_scale", lambda x: 0.0, ValueError, "sm_scale must be > 0, got 0"),
]


@pytest.mark.parametrize("kernels", ["gluon", "triton"])
@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_kernels_refuse(name, change, kind, sentence, kernels):
    inputs = small()
    wrong = replace(inputs, **{name: change(getattr(inputs, name))})
    with pytest.raises(kind, match=sentence):
        registry.implementation("sparse_prefill", kernels).run(wrong)


@pytest.mark.parametrize(
    ("name", "machine", "widths", "sentence"),
    [
        ("gluon", H100, (576, 512), None),
        ("gluon", CPU, (576, 512), "needs a Hopper GPU (sm_90), this is a CPU"),
        ("gluon", H100, (512, 512), None),
        ("gluon", H100, (320, 256), "needs head_dim 576/512 or 512/512, this case has 320/256"),
        ("triton", H100, (512, 512), None),
        ("triton", CPU, (576, 512), "needs sm_80 or newer, this is a CPU"),
        ("triton", H100, (320, 256), "576/512 or 512/512, this case has 320/256"),
    ],
)
def test_supports_says_why_not(name, machine, widths, sentence):
    shape = SparsePrefillShape(
        seq_len_q=64, seq_len_kv=4096, head_dim_qk=widths[0], head_dim_v=widths[1]
    )
    reason = registry.implementation("sparse_prefill", name).supports(shape, machine)
    assert reason is None if sentence is None else sentence in reason


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_registers_of_the_gluon_kernel_fit(heads):
    config = sparse_prefill_gluon.choose_config(heads, 2048)
    assert 4 * (2 * config.consumer_registers + config.loader_registers) <= 12 * 168


EMULATED = [
    (0, 1, 128, 64, 576, hostile.plain),
    (1, 2, 256, 64, 576, hostile.plain),
    (2, 3, 300, 16, 576, hostile.sparse_prefill_wild),
    (3, 1, 257, 72, 576, hostile.sparse_prefill_strided),
    (4, 1, 1, 8, 576, hostile.plain),
    (5, 2, 200, 64, 512, hostile.sparse_prefill_wild),
    # several pieces a program: an odd number of pairs turns the parity of the barriers
    (6, 5, 128, 64, 576, hostile.plain),
    (7, 3, 310, 130, 576, hostile.sparse_prefill_wild),
    (8, 7, 1, 8, 512, hostile.plain),
    (9, 3, 200, 70, 576, hostile.sparse_prefill_paged),
]


@pytest.mark.parametrize(("seed", "queries", "topk", "heads", "width", "mutate"), EMULATED)
def test_gluon_emulated(seed, queries, topk, heads, width, mutate):
    shape = SparsePrefillShape(
        seq_len_q=queries, seq_len_kv=310, topk=topk, num_heads=heads, head_dim_qk=width
    )
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    with emulated_gluon(seed=seed, num_sms=2) as emulated, hostile.poisoned_outputs():
        module = emulated.load("dsa_bench.kernels.sparse_prefill_gluon")
        outputs = module.run(inputs)
    hostile.assert_right("sparse_prefill", inputs, outputs)


def test_gluon_emulated_nan_of_a_listed_row_shows():
    shape = SparsePrefillShape(seq_len_q=3, seq_len_kv=310, topk=257, num_heads=16)
    inputs = hostile.nan_in_query(1, OPERATOR.make_inputs(shape, seed=8, device="cpu"))
    inputs.topk_indices[2] = -1
    with emulated_gluon(seed=8) as emulated, hostile.poisoned_outputs():
        outputs = emulated.load("dsa_bench.kernels.sparse_prefill_gluon").run(inputs)
    hostile.assert_nan_shows("sparse_prefill", inputs, outputs)


def test_gluon_emulated_peaked_is_as_exact_as_bf16():
    shape = SparsePrefillShape(seq_len_q=1, seq_len_kv=300, topk=256, num_heads=64)
    inputs = hostile.peaked(OPERATOR.make_inputs(shape, seed=7, device="cpu"))
    with emulated_gluon(seed=7) as emulated:
        outputs = emulated.load("dsa_bench.kernels.sparse_prefill_gluon").run(inputs)
    hostile.assert_as_exact_as_bf16(inputs, outputs.out)
    wrong = outputs.out.clone()
    wrong[0, 3] = wrong[0, 4]
    with pytest.raises(AssertionError):
        hostile.assert_as_exact_as_bf16(inputs, wrong)


INTERPRETED = [
    (1, 1, 1, 3, hostile.plain),
    (2, 3, 70, 20, hostile.sparse_prefill_wild),
    (3, 2, 130, 70, hostile.sparse_prefill_strided),
    (4, 2, 100, 20, hostile.sparse_prefill_paged),
]


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize(("seed", "queries", "topk", "heads", "mutate"), INTERPRETED)
def test_triton_interpreted(seed, queries, topk, heads, mutate, major, monkeypatch):
    monkeypatch.setattr(sparse_prefill_triton, "ask_device", lambda _: ((major, 0), 4))
    shape = SparsePrefillShape(seq_len_q=queries, seq_len_kv=140, topk=topk, num_heads=heads)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("sparse_prefill", "triton").run(inputs)
    hostile.assert_right("sparse_prefill", inputs, outputs)


SHAPES = [
    SparsePrefillShape(seq_len_q=256, seq_len_kv=8192),
    SparsePrefillShape(seq_len_q=100, seq_len_kv=3000, topk=512, num_heads=64),
    SparsePrefillShape(seq_len_q=64, seq_len_kv=3000, topk=1024, num_heads=32),
    SparsePrefillShape(seq_len_q=33, seq_len_kv=777, topk=300, num_heads=16),
    SparsePrefillShape(seq_len_q=77, seq_len_kv=777, topk=257, num_heads=48),
    SparsePrefillShape(seq_len_q=64, seq_len_kv=64, topk=1, num_heads=8),
    SparsePrefillShape(seq_len_q=1, seq_len_kv=5000),
    SparsePrefillShape(seq_len_q=9, seq_len_kv=900, topk=200, head_dim_qk=512),
    SparsePrefillShape(seq_len_q=300, seq_len_kv=2000, topk=512, num_heads=64, head_dim_qk=512),
    SparsePrefillShape(seq_len_q=301, seq_len_kv=900, topk=300, num_heads=24),
    SparsePrefillShape(seq_len_q=70000, seq_len_kv=70000, topk=128, num_heads=8),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("sparse_prefill", SHAPES))
def test_sparse_prefill_matches_reference(name, shape, mutate):
    hostile.assert_implementation("sparse_prefill", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill"))
def test_sparse_prefill_nan_of_a_listed_row_shows(name):
    implementation = hostile.runnable("sparse_prefill", name, SHAPES[1])
    inputs = hostile.nan_in_query(7, OPERATOR.make_inputs(SHAPES[1], seed=4, device="cuda"))
    hostile.assert_nan_shows("sparse_prefill", inputs, implementation.run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill"))
def test_sparse_prefill_peaked_is_as_exact_as_bf16(name):
    implementation = hostile.runnable("sparse_prefill", name, SHAPES[1])
    inputs = hostile.peaked(OPERATOR.make_inputs(SHAPES[1], seed=3, device="cuda"))
    hostile.assert_as_exact_as_bf16(inputs, implementation.run(inputs).out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("sparse_prefill"))
def test_sparse_prefill_reads_keys_beyond_2_31_elements(name):
    num_keys = 2**31 // 576 + 5000
    shape = SparsePrefillShape(seq_len_q=4, seq_len_kv=num_keys, topk=256, num_heads=64)
    implementation = hostile.runnable("sparse_prefill", name, shape)
    g = torch.Generator(device="cuda").manual_seed(0)
    kv = torch.zeros(num_keys, 576, dtype=torch.bfloat16, device="cuda")
    kv[-4000:] = make_attention_tensor(4000, 576, generator=g)
    q = make_attention_tensor(4, 64, 576, generator=g)
    last = torch.randint(0, 4000, (4, 256), generator=g, device="cuda", dtype=torch.int32)
    inputs = SparsePrefillInputs(q, kv, last + (num_keys - 4000), shape.sm_scale)
    hostile.assert_right("sparse_prefill", inputs, implementation.run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gluon", "triton"])
def test_sparse_prefill_repeats_to_the_bit(name):
    shape = SparsePrefillShape(seq_len_q=500, seq_len_kv=3000, topk=1000)
    implementation = hostile.runnable("sparse_prefill", name, shape)
    inputs = OPERATOR.make_inputs(shape, seed=11, device="cuda")
    first = implementation.run(inputs)
    for _ in range(20):
        for x, y in zip(first, implementation.run(inputs), strict=True):
            assert torch.equal(x, y)
