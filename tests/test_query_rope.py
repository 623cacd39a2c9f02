"""Rotation of the main queries: the reference, its check, and every implementation of it."""

import cmath
from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import query_rope_triton
from dsa_bench.kernels.query_rope import (
    OPERATOR,
    QueryRopeInputs,
    QueryRopeOutputs,
    QueryRopeShape,
)
from dsa_bench.kernels.rope import frequencies, rope_table
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

V32 = PRESETS["v3.2"]
LAST = 163839
"""The last position of the model."""
CPU = Machine(device="cpu", name="a CPU")
H100 = Machine(device="cuda", name="an H100", capability=(9, 0))


def shape_of(num_rows, num_heads, num_positions=40):
    return QueryRopeShape(num_rows=num_rows, num_heads=num_heads, num_positions=num_positions)


def small(seed=0, num_rows=5, num_heads=6):
    return OPERATOR.make_inputs(shape_of(num_rows, num_heads), seed=seed, device="cpu")


def far(inputs):
    """Positions up to the last one, unsorted, some twice."""
    positions = hostile._ints(0, LAST, inputs.positions.shape, inputs.x.device, 3)
    positions[:1], positions[1:2], positions[2:3], positions[3:4] = LAST, 0, LAST - 1, LAST
    table = rope_table(V32, LAST + 1, inputs.x.device)
    return replace(inputs, positions=positions, rope_table=table)


def extreme(inputs):
    """A token of zeros, one of denormals, large values, heads with one large value."""
    x = inputs.x.clone()
    x[:1] = 0
    x[1:2] = 1e-40
    x[2:3] *= 1e35
    x[3:4, ::2, 7] = 1e30
    return replace(inputs, x=x)


def strided(inputs):
    """Queries between NaN, heads outermost in memory."""
    x = hostile._inside_larger(inputs.x.transpose(0, 1).contiguous(), 1, 3, 64).transpose(0, 1)
    return replace(inputs, x=x)


def allocating(inputs):
    return replace(inputs, out=None)


MUTATIONS = {
    "plain": hostile.plain, "far": far, "extreme": extreme, "strided": strided,
    "allocating": allocating,
}  # fmt: skip


@pytest.mark.parametrize("mutate", [hostile.plain, far])
def test_reference_is_a_product_of_complex_numbers(mutate):
    inputs = mutate(small())
    inputs = replace(inputs, x=inputs.x.float(), out=None)
    out = OPERATOR.reference(inputs).out
    turns = frequencies(V32).tolist()
    for t, h in ((0, 0), (1, 5), (3, 2), (4, 4)):
        position = int(inputs.positions[t])
        for i in (0, 1, 10, 17, 23, 31):
            # the angle is rounded to fp32 before its cosine is taken
            angle = torch.tensor(position, dtype=torch.float32) * torch.tensor(turns[i])
            pair = complex(*inputs.x[t, h, 2 * i : 2 * i + 2].tolist())
            turned = pair * cmath.exp(1j * angle.item())
            actual = complex(*out[t, h, 2 * i : 2 * i + 2].tolist())
            assert abs(actual - turned) < 1e-5


def test_reference_writes_into_out_and_nothing_beside_it():
    inputs = small()
    wide = inputs.out._base
    assert wide.shape == (5, 6, 576)
    wide.fill_(7)
    out = OPERATOR.reference(inputs).out
    assert out.data_ptr() == wide[..., 512:].data_ptr() and (wide[..., :512] == 7).all()
    assert torch.equal(out, OPERATOR.reference(replace(inputs, out=None)).out)
    rows = torch.tensor([3, 1])
    wide.fill_(7)
    assert torch.equal(
        OPERATOR.reference(inputs, rows=rows).out,
        OPERATOR.reference(replace(inputs, out=None)).out[rows],
    )
    assert (wide == 7).all()


def test_reference_rotates_in_place():
    inputs = small()
    x = inputs.x.contiguous()
    wanted = OPERATOR.reference(replace(inputs, out=None)).out
    assert torch.equal(OPERATOR.reference(replace(inputs, x=x, out=x)).out, wanted)
    assert torch.equal(x, wanted)


def half_split(inputs):
    """The pairs of the indexer's rotation."""
    order = torch.arange(64).view(2, 32).T.flatten()
    mixed = torch.empty_like(inputs.x.contiguous())
    mixed[..., :] = inputs.x[..., order]
    out = OPERATOR.reference(replace(inputs, x=mixed, out=None)).out
    back = torch.empty_like(out)
    back[..., order] = out
    return back


WRONG = {
    "not-turned": lambda inputs: inputs.x,
    "half-split": half_split,
    "turned-back": lambda inputs: (
        OPERATOR.reference(
            replace(inputs, rope_table=inputs.rope_table * torch.tensor([1.0] * 32 + [-1.0] * 32))
        ).out
    ),
    "one-position-on": lambda inputs: (
        OPERATOR.reference(replace(inputs, positions=(inputs.positions + 1) % 40)).out
    ),
    "order-of-rows": lambda inputs: (
        OPERATOR.reference(replace(inputs, positions=torch.arange(5, dtype=torch.int32))).out
    ),
    "stale": lambda inputs: OPERATOR.reference(small(seed=9)).out,
    "heads-swapped": lambda inputs: OPERATOR.reference(inputs).out.flip(1),
    "one-element": lambda inputs: OPERATOR.reference(inputs).out + (torch.arange(64) == 63) * 0.5,
    "one-head-nan": lambda inputs: torch.where(
        torch.arange(6)[:, None] == 5, float("nan"), OPERATOR.reference(inputs).out
    ),
    "one-column-short": lambda inputs: OPERATOR.reference(inputs).out[..., :-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = allocating(small())
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(inputs)))
    assert not hostile.passes(OPERATOR.check(inputs, QueryRopeOutputs(WRONG[name](inputs))))


def test_check_looks_at_the_rows_it_was_given():
    inputs = small()
    out = OPERATOR.reference(inputs).out.clone()
    out[1] = 0
    rows = torch.tensor([0, 4])
    assert hostile.passes(OPERATOR.check(inputs, QueryRopeOutputs(out), rows=rows))
    assert not hostile.passes(OPERATOR.check(inputs, QueryRopeOutputs(out)))


def test_cost_and_memory_counted_by_hand():
    shape, inputs = shape_of(5, 6), small()
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert (cost.flops, cost.bytes_written) == (0, 5 * 6 * 64 * 2)
    assert 5 * 6 * 64 * 2 + 5 * 64 * 4 <= cost.bytes_read <= 5 * 6 * 64 * 2 + 5 * 65 * 4
    held = [inputs.x.untyped_storage(), inputs.out.untyped_storage()]
    rest = inputs.positions.nbytes + inputs.rope_table.nbytes
    assert memory.input_bytes == sum(x.nbytes() for x in held) + rest
    assert memory.output_bytes == 0


def test_shape_of_a_case():
    case = Case(
        op="query_rope", impl="reference", phase="decode", seq_len_kv=64, seq_len_q=2, batch_size=3,
        num_heads=16,
    )  # fmt: skip
    shape = OPERATOR.shape(case, V32)
    assert (shape.num_rows, shape.num_heads, OPERATOR.num_rows(shape)) == (6, 16, 6)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    assert int(inputs.positions.max()) < 64 <= inputs.rope_table.shape[0]


MISTAKES = [
    (lambda i: replace(i, x=i.x.double()), TypeError, "x must be bfloat16"),
    (lambda i: replace(i, x=i.x[0]), ValueError, "x must be bfloat16 .num_rows, num_heads"),
    (lambda i: replace(i, positions=i.positions.long()), TypeError, "positions must be int32"),
    (lambda i: replace(i, positions=i.positions[1:]), ValueError, "positions must be .*rows=5"),
    (lambda i: replace(i, rope_table=i.rope_table.double()), TypeError, "rope_table must be float"),
    (lambda i: replace(i, out=i.out[:, :1]), ValueError, "out must be bfloat16 .num_rows=5, num_h"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
def test_triton_refuses(change, kind, sentence):
    with pytest.raises(kind, match=sentence):
        query_rope_triton.run(change(small()))


def test_triton_supports_says_why_not():
    assert query_rope_triton.supports(shape_of(1, 8), H100) is None
    assert "a CPU" in query_rope_triton.supports(shape_of(1, 8), CPU)


def run_triton(inputs):
    return registry.implementation("query_rope", "triton").run(inputs)


@pytest.mark.interpret
@pytest.mark.parametrize(("num_rows", "num_heads"), [(0, 4), (1, 128), (4, 33)])
@pytest.mark.parametrize("kind", MUTATIONS)
def test_triton_interpreted(num_rows, num_heads, kind):
    inputs = MUTATIONS[kind](small(num_rows, num_rows, num_heads))
    wide = None if inputs.out is None else inputs.out._base.fill_(7)
    with hostile.poisoned_outputs():
        outputs = run_triton(inputs)
    hostile.assert_right("query_rope", inputs, outputs)
    assert wide is None or (wide[..., :512] == 7).all()


@pytest.mark.interpret
@pytest.mark.parametrize("mutate", [far, strided])
def test_triton_interpreted_in_place(mutate):
    inputs = mutate(small())
    before = inputs.x.clone()
    outputs = run_triton(replace(inputs, out=inputs.x))
    assert outputs.out.data_ptr() == inputs.x.data_ptr()
    hostile.assert_right("query_rope", replace(inputs, x=before), outputs)


@pytest.mark.interpret
def test_triton_interpreted_shows_nan():
    inputs = allocating(small())
    x = inputs.x.clone()
    x[2, 3, 9] = float("nan")
    out = run_triton(replace(inputs, x=x)).out
    wrong = torch.zeros(5, 6, 64, dtype=torch.bool)
    wrong[2, 3, 8:10] = True
    assert torch.equal(out.isnan(), wrong)


SHAPES = [shape_of(1, 128), shape_of(32, 128), shape_of(2000, 128), shape_of(301, 17)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("query_rope"))
@pytest.mark.parametrize("shape", SHAPES, ids=hostile.label)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_query_rope_matches_reference(name, shape, kind):
    hostile.assert_implementation("query_rope", name, shape, MUTATIONS[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("query_rope"))
def test_query_rope_in_place(name):
    shape = shape_of(1000, 128)
    implementation = hostile.runnable("query_rope", name, shape)
    inputs: QueryRopeInputs = OPERATOR.make_inputs(shape, seed=1, device="cuda")
    before = inputs.x.clone()
    outputs = implementation.run(replace(inputs, out=inputs.x))
    hostile.assert_right("query_rope", replace(inputs, x=before), outputs)
