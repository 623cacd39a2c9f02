"""Quantisation of activations: the reference, its check, and every implementation of it."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import quantize_triton
from dsa_bench.kernels.quantize import OPERATOR, QuantizeInputs, QuantizeOutputs, QuantizeShape
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

BF16_MAX = torch.finfo(torch.bfloat16).max
CPU = Machine(device="cpu", name="a CPU")
A100 = Machine(device="cuda", name="an A100", capability=(8, 0))
H100 = Machine(device="cuda", name="an H100", capability=(9, 0))


def shape_of(num_rows, width):
    return QuantizeShape(num_rows=num_rows, width=width)


def small(seed=0, num_rows=5, width=384):
    return OPERATOR.make_inputs(shape_of(num_rows, width), seed=seed, device="cpu")


def edges(inputs):
    """Zeros, denormals, the largest bf16, a huge value among small ones, amax at 448 and above."""
    x = inputs.x.clone()
    rows = len(x)
    x[0] = 0
    x[1 % rows] = 1e-40
    x[2 % rows, ::3] = BF16_MAX
    x[2 % rows, 1::3] = -BF16_MAX
    x[3 % rows, 7::128] = 1e30
    x[4 % rows] = x[4 % rows].clamp(-400, 400)
    x[4 % rows, 5::128] = -448.0
    x[4 % rows, 9::256] = 450.0
    return replace(inputs, x=x)


def strided(inputs):
    return replace(inputs, x=hostile._inside_larger(inputs.x, 2, 64))


def test_reference_by_hand():
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([448.0, -1.0, 0.3])
    x[0, 128:130] = torch.tensor([450.0, -18.0])
    x[1, 255] = 1.75
    values, scale = OPERATOR.reference(QuantizeInputs(x))
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.tolist() == [[1.0, 2.0], [2.0**-22, 2.0**-8]]
    # steps of e4m3: 1/32 in 0.25 … 0.5, 16 in 128 … 256; 450 / 2 = 225 lies next to 224
    assert values[0, :3].float().tolist() == [448.0, -1.0, 0.3125]
    assert values[0, 128:130].float().tolist() == [224.0, -9.0]
    assert values[1, 255].item() == 448.0


@pytest.mark.parametrize("mutate", [hostile.plain, edges, strided])
def test_reference_matches_loops(mutate):
    inputs = mutate(small())
    values, scale = OPERATOR.reference(inputs)
    for t in range(5):
        for g in range(3):
            group = inputs.x[t, 128 * g : 128 * (g + 1)].double()
            amax = max(group.abs().max().item(), 1e-4)
            wanted = 2.0 ** math.ceil(math.log2(amax / 448))
            assert scale[t, g].item() == wanted
            rounded = (group / wanted).float().to(torch.float8_e4m3fn).float()
            assert torch.equal(values[t, 128 * g : 128 * (g + 1)].float(), rounded)


def test_reference_takes_rows_and_stores_scales_by_columns():
    inputs = small()
    values, scale = OPERATOR.reference(inputs)
    assert scale.stride() == (1, 5)
    rows = torch.tensor([3, 0])
    some = OPERATOR.reference(inputs, rows=rows)
    assert torch.equal(some.values.float(), values[rows].float())
    assert torch.equal(some.scale, scale[rows])


def towards_zero(values):
    """The next e4m3 value towards 0, where there is one."""
    bits = values.view(torch.uint8)
    return torch.where(bits & 0x7F > 0, bits - 1, bits).view(torch.float8_e4m3fn)


WRONG = {
    "zeros": lambda v, s: (torch.zeros_like(v.float()).to(v.dtype), s),
    "stale": lambda v, s: OPERATOR.reference(small(seed=9)),
    "one-step-off": lambda v, s: (towards_zero(v), s),
    "twice-the-scale": lambda v, s: ((v.float() / 2).to(v.dtype), s * 2),
    "scale-unused": lambda v, s: (v, torch.ones_like(s)),
    "scale-of-the-next-group": lambda v, s: (v, s.roll(1, 1) * 2),
    "rows-swapped": lambda v, s: (v.view(torch.uint8).flip(0).view(v.dtype), s),
    "nan": lambda v, s: (v, s.clone().fill_(math.nan)),
    "scale-transposed": lambda v, s: (v, s.T),
    "one-column-short": lambda v, s: (v[:, :-1], s),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    assert not hostile.passes(OPERATOR.check(inputs, QuantizeOutputs(*WRONG[name](*right))))


def test_check_looks_at_the_rows_it_was_given():
    inputs = small()
    values, scale = OPERATOR.reference(inputs)
    scale = scale.clone()
    scale[1] *= 2
    rows = torch.tensor([0, 4])
    assert hostile.passes(OPERATOR.check(inputs, QuantizeOutputs(values, scale), rows=rows))
    assert not hostile.passes(OPERATOR.check(inputs, QuantizeOutputs(values, scale)))


def test_cost_and_memory_counted_by_hand():
    shape = shape_of(5, 384)
    inputs = small()
    outputs = OPERATOR.reference(inputs)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert (cost.flops, cost.bytes_read) == (0, inputs.x.nbytes)
    assert cost.bytes_written == sum(x.nbytes for x in outputs)
    assert memory.input_bytes == inputs.x.nbytes
    assert memory.output_bytes == cost.bytes_written


@pytest.mark.parametrize(
    ("phase", "rows"), [("prefill", 2), ("decode", 6)], ids=["prefill", "decode"]
)
def test_shape_of_a_case(phase, rows):
    batch = 3 if phase == "decode" else 1
    case = Case(
        op="quantize", impl="reference", phase=phase, seq_len_kv=64, seq_len_q=2,
        batch_size=batch, num_heads=16,
    )  # fmt: skip
    assert OPERATOR.shape(case, PRESETS["v3.2"]) == shape_of(rows, 2048)


def test_a_width_that_makes_no_sense():
    with pytest.raises(Unsupported, match=r"width .*multiple of 128"):
        shape_of(2, 100)


MISTAKES = [
    (lambda x: x.double(), TypeError, "x must be bfloat16"),
    (lambda x: x[0], ValueError, "x must be bfloat16 .num_rows, width"),
    (lambda x: x[:, :100], ValueError, "width must be a multiple of 128"),
    (lambda x: x.T.contiguous().T, ValueError, "x must be contiguous in its last dimension"),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
def test_triton_refuses(change, kind, sentence):
    with pytest.raises(kind, match=sentence):
        quantize_triton.run(QuantizeInputs(change(small().x)))


def test_triton_supports_says_why_not():
    assert quantize_triton.supports(shape_of(1, 128), H100) is None
    for machine in (CPU, A100):
        assert machine.name in quantize_triton.supports(shape_of(1, 128), machine)


@pytest.mark.interpret
@pytest.mark.parametrize("num_rows", [0, 1, 9])
@pytest.mark.parametrize("mutate", [hostile.plain, edges, strided])
def test_triton_interpreted(num_rows, mutate):
    if not num_rows and mutate is edges:
        pytest.skip("no row to spoil")
    inputs = mutate(small(seed=num_rows, num_rows=num_rows, width=1152))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("quantize", "triton").run(inputs)
    hostile.assert_right("quantize", inputs, outputs)
    assert num_rows < 2 or outputs.scale.stride() == (1, num_rows)


@pytest.mark.interpret
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_triton_interpreted_shows_what_is_not_finite(value):
    x = small(width=256).x.clone()
    x[2, 130] = value
    values, scale = registry.implementation("quantize", "triton").run(QuantizeInputs(x))
    product = values.float() * scale.repeat_interleave(128, 1)
    assert not product[2, 130].isfinite()
    product[2, 128:] = 0
    assert product.isfinite().all()


SHAPES = [shape_of(1, 16384), shape_of(32, 16384), shape_of(777, 2048), shape_of(4096, 1152)]
MUTATIONS = {"plain": hostile.plain, "edges": edges, "strided": strided}


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("quantize"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_rows}x{shape.width}")
@pytest.mark.parametrize("kind", MUTATIONS)
def test_quantize_matches_reference(name, shape, kind):
    hostile.assert_implementation("quantize", name, shape, MUTATIONS[kind])
