"""Products of each head: the reference, its check, and every implementation of it."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import head_linear_torch
from dsa_bench.kernels.head_linear import (
    OPERATOR,
    HeadLinearInputs,
    HeadLinearOutputs,
    HeadLinearShape,
)
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile


def shape_of(num_rows, in_features, out_features, num_heads=3, row_width=0):
    return HeadLinearShape(
        num_rows=num_rows, in_features=in_features, out_features=out_features,
        num_heads=num_heads, row_width=row_width,
    )  # fmt: skip


def small(seed=0, rows=5, row_width=0):
    return OPERATOR.make_inputs(shape_of(rows, 32, 48, 3, row_width), seed=seed, device="cpu")


def exact(inputs):
    """[rows, heads, out] in fp64, head by head."""
    heads = range(inputs.x.shape[1])
    return torch.stack([inputs.x[:, h].double() @ inputs.weight[h].double() for h in heads], 1)


def test_reference_matches_fp64():
    inputs = small()
    out = OPERATOR.reference(inputs).out
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(inputs), rtol=2**-8, atol=1e-6)
    whole = HeadLinearInputs(inputs.x.float(), inputs.weight.float())
    wide = OPERATOR.reference(whole).out
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact(inputs), rtol=1e-6, atol=1e-6)
    rows = torch.tensor([4, 1])
    assert torch.equal(OPERATOR.reference(inputs, rows=rows).out, out[rows])


@pytest.mark.parametrize("run", [OPERATOR.reference, head_linear_torch.run])
def test_a_given_out_is_written_where_it_lies(run):
    inputs = small(row_width=56)
    rows = inputs.out._base
    rows.fill_(7)
    out = run(inputs).out
    assert out.data_ptr() == rows.data_ptr()
    assert out.stride() == (3 * 56, 56, 1)
    assert (rows[..., 48:] == 7).all()
    assert torch.equal(rows[..., :48], OPERATOR.reference(replace(inputs, out=None)).out)


def test_rows_of_the_reference_leave_the_given_out_alone():
    inputs = small(row_width=56)
    OPERATOR.reference(inputs, rows=torch.tensor([1]))
    assert (inputs.out == 0).all()


WRONG = {
    "zeros": lambda inputs, out: torch.zeros_like(out),
    "stale": lambda inputs, out: OPERATOR.reference(small(seed=9)).out,
    "heads-turned": lambda inputs, out: out.roll(1, 1),
    "one-head-for-all": lambda inputs, out: (
        OPERATOR.reference(replace(inputs, weight=inputs.weight[:1].expand_as(inputs.weight))).out
    ),
    "one-vector-wrong": lambda inputs, out: out.index_fill(0, torch.tensor([3]), 0),
    "one-column-wrong": lambda inputs, out: out * (1 + 0.2 * (torch.arange(48) == 47)),
    "nan": lambda inputs, out: out.masked_fill(torch.arange(48) == 5, float("nan")),
    "one-column-short": lambda inputs, out: out[..., :-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs).out
    assert hostile.passes(OPERATOR.check(inputs, HeadLinearOutputs(right)))
    wrong = HeadLinearOutputs(WRONG[name](inputs, right.clone()).bfloat16())
    assert not hostile.passes(OPERATOR.check(inputs, wrong))


def test_check_of_rows_looks_at_no_other():
    inputs = small()
    good = OPERATOR.reference(inputs).out
    good[2] = 0
    rows = torch.tensor([0, 4])
    assert hostile.passes(OPERATOR.check(inputs, HeadLinearOutputs(good), rows=rows))
    assert not hostile.passes(OPERATOR.check(inputs, HeadLinearOutputs(good)))


@pytest.mark.parametrize("row_width", [0, 56])
def test_cost_and_memory_counted_by_hand(row_width):
    shape, inputs = shape_of(5, 32, 48, 3, row_width), small(row_width=row_width)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert cost.flops == 2 * 5 * 3 * 32 * 48
    assert cost.bytes_read == inputs.x.nbytes + inputs.weight.nbytes
    assert cost.bytes_written == 2 * 5 * 3 * 48
    given = 0 if inputs.out is None else inputs.out._base.nbytes
    assert memory.input_bytes == cost.bytes_read + given
    assert memory.output_bytes == (0 if row_width else cost.bytes_written)


def test_shape_of_a_case_is_the_absorbed_query():
    case = Case(
        op="head_linear", impl="torch", phase="decode", seq_len_kv=4096, seq_len_q=2, batch_size=3,
        num_heads=16,
    )  # fmt: skip
    assert OPERATOR.shape(case, PRESETS["v3.2"]) == shape_of(6, 128, 512, 16, 576)
    prefill = replace(case, phase="prefill", seq_len_q=100)
    assert OPERATOR.shape(prefill, PRESETS["v3.2"]).num_rows == 100


MISTAKES = [
    ({"x": torch.zeros(5, 2, 32).bfloat16()}, ValueError, "x must be .num_rows, num_heads, in_fea"),
    ({"x": torch.zeros(5, 96).bfloat16()}, ValueError, "x must be .* got .5, 96. and .3, 32, 48."),
    ({"out": torch.zeros(5, 3, 47).bfloat16()}, ValueError, r"out must be .5, 3, 48., got"),
    ({"weight": torch.zeros(3, 32, 48)}, TypeError, "one float dtype, got bfloat16, float32"),
    ({"out": torch.zeros(5, 3, 48)}, TypeError, "x, weight and out must be of one float dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
@pytest.mark.parametrize("run", [OPERATOR.reference, head_linear_torch.run])
def test_refuses(run, changes, kind, sentence):
    with pytest.raises(kind, match=sentence):
        run(replace(small(), **changes))


def test_supports_says_why_not():
    old = Machine(device="cuda", name="V100", capability=(7, 0))
    assert "needs sm_80 or newer" in head_linear_torch.supports(shape_of(1, 32, 48), old)
    assert head_linear_torch.supports(shape_of(1, 32, 48), Machine(device="cpu", name="")) is None


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("name", ["plain", *hostile.MUTATIONS["head_linear"]])
def test_torch_matches_reference(rows, name):
    mutate = {"plain": hostile.plain, **hostile.MUTATIONS["head_linear"]}[name]
    inputs = mutate(small(rows=rows, seed=rows))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("head_linear", "torch").run(inputs)
    assert outputs.out.shape == (rows, 3, 48)
    hostile.assert_right("head_linear", inputs, outputs)


SHAPES = [
    shape_of(1, 128, 512, 128, 576), shape_of(33, 128, 512, 16, 576),
    shape_of(700, 512, 128, 128), shape_of(4096, 128, 512, 128, 576),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("head_linear", SHAPES))
def test_head_linear_matches_reference(name, shape, mutate):
    hostile.assert_implementation("head_linear", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4096])
def test_a_given_out_costs_no_copy(rows):
    """On a GPU nothing is allocated beside cuBLAS' workspace, which the first call takes."""
    inputs = OPERATOR.make_inputs(shape_of(rows, 128, 512, 128, 576), seed=0, device="cuda")
    head_linear_torch.run(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_linear_torch.run(inputs)
    assert torch.cuda.max_memory_allocated() == before
