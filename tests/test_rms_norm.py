"""RMS norm of the query latent: the reference, its check, and every implementation of it."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import rms_norm_triton
from dsa_bench.kernels.quantize import quantize_groups
from dsa_bench.kernels.rms_norm import OPERATOR, RmsNormInputs, RmsNormOutputs, RmsNormShape
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

CPU = Machine(device="cpu", name="a CPU")
A100 = Machine(device="cuda", name="an A100", capability=(8, 0))
H100 = Machine(device="cuda", name="an H100", capability=(9, 0))
KINDS = pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "fp8"])


def shape_of(num_rows, width, quantized=False):
    return RmsNormShape(num_rows=num_rows, width=width, quantized=quantized)


def small(quantized=False, seed=0, num_rows=6, width=384, device="cpu"):
    return OPERATOR.make_inputs(shape_of(num_rows, width, quantized), seed=seed, device=device)


def edges(inputs):
    """Rows of zeros, of denormals, of large values, with one huge value, and small beside eps."""
    x = inputs.x.clone()
    rows = len(x)
    x[0] = 0
    x[1 % rows] = 1e-40
    x[2 % rows] *= 1e15
    x[3 % rows, 5] = 1e15
    x[4 % rows] *= 1e-4
    return replace(inputs, x=x)


def strided(inputs):
    return replace(inputs, x=hostile._inside_larger(inputs.x, 2, 64))


@KINDS
@pytest.mark.parametrize("mutate", [hostile.plain, edges, strided])
def test_reference_matches_fp64(quantized, mutate):
    inputs = mutate(small(quantized))
    x, weight = inputs.x.double(), inputs.weight.double()
    size = (x.square().sum(-1) / 384 + inputs.eps).sqrt()
    wanted = x / size[:, None] * weight
    outputs = OPERATOR.reference(inputs)
    if not quantized:
        assert outputs.out.dtype == torch.bfloat16 and outputs.scale is None
        assert ((outputs.out.double() - wanted).abs() <= 1.01 * 2**-8 * wanted.abs()).all()
        return
    assert outputs.out.dtype == torch.float8_e4m3fn and outputs.scale.shape == (6, 3)
    scale = outputs.scale.double().repeat_interleave(128, 1)
    # a rounding to bf16, then one to e4m3, whose smallest step is 2^-9
    error = (outputs.out.double() * scale - wanted).abs()
    assert (error <= (2**-4 + 2**-7) * wanted.abs() + 2**-10 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_keeps_the_dtype_and_rounds_fp32_nowhere(dtype):
    inputs = small()
    inputs = replace(inputs, x=inputs.x.to(dtype))
    out = OPERATOR.reference(inputs).out
    assert out.dtype == dtype
    x = inputs.x.double()
    exact = x / (x.square().mean(-1, keepdim=True) + inputs.eps).sqrt() * inputs.weight.double()
    error = ((out.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max().item()
    assert error < 1e-6 if dtype == torch.float32 else 1e-4 < error < 2**-8 * 1.01


def test_quantised_is_the_quantisation_of_the_rounded_norm():
    plain, quantized = OPERATOR.reference(small()), OPERATOR.reference(small(True))
    values, scale = quantize_groups(plain.out)
    assert torch.equal(quantized.out.float(), values.float())
    assert torch.equal(quantized.scale, scale) and quantized.scale.stride() == (1, 6)


@KINDS
def test_reference_takes_rows(quantized):
    inputs, rows = small(quantized), torch.tensor([4, 1])
    whole, some = OPERATOR.reference(inputs), OPERATOR.reference(inputs, rows=rows)
    assert torch.equal(some.out.float(), whole.out[rows].float())
    assert not quantized or torch.equal(some.scale, whole.scale[rows])


def without_weight(inputs):
    return OPERATOR.reference(replace(inputs, weight=torch.ones_like(inputs.weight)))


def without_last_group(inputs):
    """The mean of squares is taken of the first columns alone."""
    part = inputs.x[:, :-128].float().square().mean(-1, keepdim=True)
    whole = inputs.x.float().square().mean(-1, keepdim=True)
    return OPERATOR.reference(
        replace(inputs, x=(inputs.x.float() * (whole / part).sqrt()).bfloat16(), eps=0.0)
    )


WRONG = {
    "unweighted": without_weight,
    "mean-of-a-part": without_last_group,
    "eps-forgotten": lambda inputs: OPERATOR.reference(replace(inputs, eps=0.0)),
    "stale": lambda inputs: OPERATOR.reference(small(inputs.quantized, seed=9)),
    "rows-swapped": lambda inputs: OPERATOR.reference(replace(inputs, x=inputs.x.flip(0))),
}


@KINDS
@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name, quantized):
    # rows so small that eps counts
    inputs = small(quantized)
    inputs = replace(inputs, x=inputs.x * 2**-9)
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(inputs)))
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs)))


@KINDS
def test_check_sees_one_nan_and_the_rows_it_was_given(quantized):
    inputs = small(quantized)
    out, scale = OPERATOR.reference(inputs)
    bits = out.view(torch.uint8).clone()
    bits[2, 6:8] = 0x7F if quantized else 0xFF
    wrong = RmsNormOutputs(bits.view(out.dtype), scale)
    assert wrong.out[2].float().isnan().any()
    assert not hostile.passes(OPERATOR.check(inputs, wrong))
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 1, 5])))


def test_check_sees_a_wrong_scale():
    inputs = small(True)
    out, scale = OPERATOR.reference(inputs)
    for wrong in (scale * 2, scale.roll(1, 0) * 2, torch.ones_like(scale)):
        assert not hostile.passes(OPERATOR.check(inputs, RmsNormOutputs(out, wrong)))


@KINDS
def test_cost_and_memory_counted_by_hand(quantized):
    shape, inputs = shape_of(6, 384, quantized), small(quantized)
    outputs = OPERATOR.reference(inputs)
    made = sum(x.nbytes for x in outputs if x is not None)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert (cost.flops, cost.bytes_written) == (0, made)
    assert cost.bytes_read == 2 * (6 * 384 + 384)
    assert memory.output_bytes == made
    assert memory.input_bytes == inputs.x.untyped_storage().nbytes() + inputs.weight.nbytes


@KINDS
def test_shape_of_a_case(quantized):
    case = Case(
        op="rms_norm", impl="reference", phase="decode", seq_len_kv=64, seq_len_q=2, batch_size=3,
        precision="fp8" if quantized else "bf16",
    )  # fmt: skip
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    assert (shape.num_rows, shape.width, shape.quantized) == (6, 1536, quantized)
    assert OPERATOR.make_inputs(shape, seed=0, device="cpu").x.stride() == (1536 + 128 + 576, 1)


def test_a_width_that_makes_no_sense():
    assert shape_of(2, 100).width == 100
    with pytest.raises(Unsupported, match=r"width .*multiple of 128"):
        shape_of(2, 100, quantized=True)


MISTAKES = [
    (lambda i: replace(i, x=i.x.double()), TypeError, "x must be bfloat16"),
    (lambda i: replace(i, x=i.x[0]), ValueError, "x must be bfloat16 .num_rows, width"),
    (lambda i: replace(i, weight=i.weight[:-1]), ValueError, "weight must be .* .width=384"),
    (
        lambda i: replace(i, x=i.x[:, :100], weight=i.weight[:100]),
        ValueError,
        "if quantised a multiple of 128, got 100",
    ),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
def test_triton_refuses(change, kind, sentence):
    with pytest.raises(kind, match=sentence):
        rms_norm_triton.run(change(small(True)))


def test_triton_supports_says_why_not():
    assert rms_norm_triton.supports(shape_of(1, 128, True), H100) is None
    assert rms_norm_triton.supports(shape_of(1, 128), A100) is None
    assert "an A100" in rms_norm_triton.supports(shape_of(1, 128, True), A100)
    assert "a CPU" in rms_norm_triton.supports(shape_of(1, 128), CPU)
    assert "16384" in rms_norm_triton.supports(shape_of(1, 16384), H100)


@pytest.mark.interpret
@KINDS
@pytest.mark.parametrize(("num_rows", "width"), [(0, 256), (1, 1536), (6, 384), (3, 100)])
@pytest.mark.parametrize("mutate", [hostile.plain, edges, strided])
def test_triton_interpreted(quantized, num_rows, width, mutate):
    if (not num_rows and mutate is edges) or (quantized and width % 128):
        pytest.skip("no row to spoil, or no such width")
    inputs = mutate(small(quantized, num_rows, num_rows, width))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("rms_norm", "triton").run(inputs)
    hostile.assert_right("rms_norm", inputs, outputs)
    assert not quantized or num_rows < 2 or outputs.scale.stride() == (1, num_rows)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum of a row of NaN
@KINDS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_triton_interpreted_shows_what_is_not_finite(quantized, value):
    inputs = small(quantized)
    x = inputs.x.clone()
    x[2, 130] = value
    out, scale = registry.implementation("rms_norm", "triton").run(replace(inputs, x=x))
    product = out.float() * (1 if scale is None else scale.repeat_interleave(128, 1))
    assert not product[2, 130].isfinite()
    assert product[[0, 1, 3, 4, 5]].isfinite().all()


SHAPES = [(1, 1536), (32, 1536), (4096, 1536), (777, 256)]
MUTATIONS = {"plain": hostile.plain, "edges": edges, "strided": strided}


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("name", hostile.names("rms_norm"))
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
@pytest.mark.parametrize("kind", MUTATIONS)
def test_rms_norm_matches_reference(name, num_rows, width, quantized, kind):
    implementation = hostile.runnable("rms_norm", name, shape_of(num_rows, width, quantized))
    inputs: RmsNormInputs = MUTATIONS[kind](small(quantized, 1, num_rows, width, device="cuda"))
    with hostile.poisoned_outputs():
        first, second = implementation.run(inputs), implementation.run(inputs)
    hostile.assert_right("rms_norm", inputs, first)
    for one, other in zip(first, second, strict=True):
        assert one is None or torch.equal(hostile.bits(one), hostile.bits(other))
