"""Products with a weight: the reference, its check, and every implementation of it."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from dsa_bench.kernels import linear_torch, linear_triton
from dsa_bench.kernels.layer_weights import Matrix
from dsa_bench.kernels.linear import OPERATOR, LinearInputs, LinearOutputs, LinearShape
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
HOPPER = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="a CPU")


def shape_of(num_rows, in_features, out_features, precision="fp8"):
    return LinearShape(
        num_rows=num_rows, in_features=in_features, out_features=out_features, precision=precision
    )


def small(precision="fp8", seed=0, rows=5):
    return OPERATOR.make_inputs(shape_of(rows, 256, 200, precision), seed=seed, device="cpu")


def test_reference_matches_python():
    inputs = small()
    out = OPERATOR.reference(inputs).out
    assert out.dtype == BF16
    x, w = inputs.x.double(), inputs.weight.values.double()
    for t, o in ((0, 0), (4, 127), (2, 128), (3, 199)):
        blocks = [
            (x[t, i : i + 128] * w[o, i : i + 128]).sum().item()
            * inputs.x_scale[t, i // 128].item()
            * inputs.weight.scale[o // 128, i // 128].item()
            for i in (0, 128)
        ]
        assert out[t, o].item() == pytest.approx(sum(blocks), rel=2**-8, abs=1e-5)


def test_reference_of_bf16_and_fp32():
    inputs = small("bf16")
    x, w = inputs.x.double(), inputs.weight.values.double()
    assert torch.equal(OPERATOR.reference(inputs).out, (x.float() @ w.float().T).bfloat16())
    whole = LinearInputs(inputs.x.float(), None, Matrix(inputs.weight.values.float()))
    out = OPERATOR.reference(whole).out
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x @ w.T, rtol=1e-5, atol=1e-5)
    wide = OPERATOR.reference(replace(inputs, out_dtype=torch.float32)).out
    assert wide.dtype == torch.float32
    assert torch.equal(wide, out)
    rows = torch.tensor([3, 0])
    assert torch.equal(OPERATOR.reference(inputs, rows=rows).out, out[rows].bfloat16())


def test_quantised_inputs_are_near_their_source():
    """The fp8 inputs are the bf16 inputs of the same seed, to 2^-4 of an element."""
    fp8, bf16 = (OPERATOR.reference(small(p)).out.float() for p in ("fp8", "bf16"))
    assert 0 < (fp8 - bf16).norm() / bf16.norm() < 0.05


def other_scale(inputs, out):
    """As if the scales of the last block of columns were those of the first."""
    x_scale = inputs.x_scale.clone()
    x_scale[:, 1] = x_scale[:, 0]
    return OPERATOR.reference(replace(inputs, x_scale=x_scale)).out


def scale_of_another_block(inputs, out):
    scale = inputs.weight.scale.clone()
    scale[1] = scale[0]
    return OPERATOR.reference(replace(inputs, weight=Matrix(inputs.weight.values, scale))).out


WRONG = {
    "zeros": lambda inputs, out: torch.zeros_like(out),
    "stale": lambda inputs, out: OPERATOR.reference(small(seed=9)).out,
    "one-row-wrong": lambda inputs, out: out * (1 + 0.05 * (torch.arange(5) == 0)[:, None]),
    "one-column-wrong": lambda inputs, out: out + 0.1 * out.std() * (torch.arange(200) == 199),
    "columns-of-x-missing": lambda inputs, out: (
        OPERATOR.reference(replace(inputs, x_scale=inputs.x_scale * torch.tensor([1.0, 0.0]))).out
    ),
    "scale-of-x": other_scale,
    "scale-of-weight": scale_of_another_block,
    "nan": lambda inputs, out: out.masked_fill(torch.arange(200) == 130, float("nan")),
    "one-column-short": lambda inputs, out: out[:, :-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = hostile.linear_uneven(small())
    right = OPERATOR.reference(inputs).out
    assert hostile.passes(OPERATOR.check(inputs, LinearOutputs(right)))
    wrong = WRONG[name](inputs, right.clone()).to(BF16)
    assert not hostile.passes(OPERATOR.check(inputs, LinearOutputs(wrong)))


def test_check_holds_a_result_of_fp32_to_fp32():
    inputs = replace(small(), out_dtype=torch.float32)
    right = OPERATOR.reference(inputs).out
    assert hostile.passes(OPERATOR.check(inputs, LinearOutputs(right)))
    assert not hostile.passes(OPERATOR.check(inputs, LinearOutputs(right.bfloat16().float())))
    assert not hostile.passes(OPERATOR.check(inputs, LinearOutputs(right.bfloat16())))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_cost_and_memory_counted_by_hand(precision):
    shape, inputs = shape_of(5, 256, 200, precision), small(precision)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    tensors = (inputs.x, inputs.x_scale, inputs.weight.values, inputs.weight.scale)
    read = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert cost.flops == 2 * 5 * 256 * 200
    assert (cost.bytes_read, memory.input_bytes) == (read, read)
    assert cost.bytes_written == memory.output_bytes == OPERATOR.reference(inputs).out.nbytes


def test_shape_of_cases():
    case = Case(
        op="linear", impl="reference", phase="decode", seq_len_kv=4096, seq_len_q=2, batch_size=3,
        num_heads=16, precision="fp8",
    )  # fmt: skip
    assert OPERATOR.shape(case, PRESETS["v3.2"]) == shape_of(6, 2048, 7168)
    prefill = replace(case, phase="prefill", seq_len_q=512, precision="bf16")
    assert OPERATOR.shape(prefill, PRESETS["v3.2"]) == shape_of(512, 2048, 7168, "bf16")
    with pytest.raises(Unsupported, match="in_features 200 must be a multiple of 128"):
        shape_of(1, 200, 128)


MISTAKES = [
    ({"x": torch.zeros(5, 128).to(E4M3)}, ValueError, "x must be float8_e4m3fn .*in_features=256"),
    ({"x": torch.zeros(5, 256)}, TypeError, "x must be float8_e4m3fn"),
    ({"x_scale": None}, ValueError, "e4m3 needs both scales"),
    ({"x_scale": torch.ones(5, 3)}, ValueError, r"x_scale must be float32 .5, 2., got"),
    ({"weight": Matrix(torch.zeros(200, 256).to(E4M3), torch.ones(1, 2))}, ValueError,
     r"weight.scale must be float32 .2, 2., got torch.float32 .1, 2."),
    ({"x": torch.zeros(256, 5).to(E4M3).T}, ValueError, "x must be contiguous in its last"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES))
@pytest.mark.parametrize("module", [linear_torch, linear_triton])
def test_refuses(module, changes, kind, sentence):
    with pytest.raises(kind, match=sentence):
        module.run(replace(small(), **changes))


def test_bf16_with_a_scale_is_refused():
    inputs = replace(small("bf16"), x_scale=torch.ones(5, 2))
    with pytest.raises(ValueError, match="scales go with e4m3 alone"):
        linear_torch.run(inputs)


def test_triton_refuses_rows_that_tma_cannot_read():
    wide = torch.zeros(5, 264, dtype=torch.uint8).view(E4M3)
    with pytest.raises(ValueError, match="rows of x must begin at multiples of 16 bytes"):
        linear_triton.run(replace(small(), x=wide[:, :256]))
    with pytest.raises(TypeError, match="triton linear takes float8_e4m3fn"):
        linear_triton.run(small("bf16"))


def test_supports_says_why_not():
    bf16, fp8 = shape_of(8, 256, 200, "bf16"), shape_of(8, 256, 208)
    assert linear_torch.supports(bf16, CPU) is None
    assert "needs Hopper" in linear_torch.supports(fp8, CPU)
    assert "for fp8 alone" in linear_triton.supports(bf16, HOPPER)
    assert "needs Hopper" in linear_triton.supports(fp8, CPU)
    assert linear_triton.supports(fp8, HOPPER) is None
    assert "multiple of 8" in linear_triton.supports(shape_of(8, 256, 201), HOPPER)
    with patch.object(torch.version, "cuda", "12.8"):
        assert "needs a torch for CUDA 12.9" in linear_torch.supports(fp8, HOPPER)
    with patch.object(torch.version, "cuda", "13.0"):
        assert linear_torch.supports(fp8, HOPPER) is None
        assert "multiple of 16" in linear_torch.supports(shape_of(8, 256, 200), HOPPER)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_torch_in_bf16(rows, dtype):
    wide = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = replace(small("bf16"), x=wide[:, 20:276], out_dtype=dtype)
    outputs = linear_torch.run(inputs)
    assert outputs.out.shape == (rows, 200)
    hostile.assert_right("linear", inputs, outputs)


def emulated_scaled_mm(x, w, x_scale, x_kind, w_scale, w_kind, *, output_dtype):
    """What cuBLASLt asks for, and its arithmetic."""
    kinds = torch.nn.functional.ScalingType
    assert (x_kind, w_kind) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
    rows, blocks = x.shape[0], -(-x.shape[1] // 128)
    padded, row_blocks = -(-blocks // 4) * 4, -(-w.shape[1] // 128)
    assert rows % 4 == 0
    assert w.stride(0) == 1
    assert w.stride(1) % 16 == 0
    assert x_scale.shape == (rows, blocks)
    assert x_scale.stride() == (1, rows)
    assert w_scale.shape == (padded, row_blocks)
    assert w_scale.stride() == (1, padded)
    x = x.float() * x_scale.repeat_interleave(128, 1)
    weight_scale = w_scale[:blocks].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (x @ (w.float() * weight_scale[:, : w.shape[1]])).to(output_dtype)


@pytest.mark.parametrize("rows", [0, 1, 4, 33])
@pytest.mark.parametrize("columns", [256, 512])
def test_torch_in_fp8_gives_cublas_what_it_wants(rows, columns):
    inputs = OPERATOR.make_inputs(shape_of(rows, columns, 208), seed=rows, device="cpu")
    with patch.object(torch.nn.functional, "scaled_mm", emulated_scaled_mm):
        outputs = linear_torch.run(hostile.linear_strided(inputs))
    assert outputs.out.shape == (rows, 208)
    hostile.assert_right("linear", inputs, outputs)


def test_torch_copies_no_scale_that_fits():
    inputs = OPERATOR.make_inputs(shape_of(8, 512, 256), seed=0, device="cpu")
    x, x_scale = linear_torch.whole_quads(inputs.x, inputs.x_scale)
    w_scale = linear_torch.padded_weight_scale(inputs.weight.scale)
    for copy, original in (
        (x, inputs.x), (x_scale, inputs.x_scale), (w_scale, inputs.weight.scale),
    ):  # fmt: skip
        assert copy.data_ptr() == original.data_ptr()


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 12, 56, 128])
def test_splits_are_even_and_none_is_empty(num_blocks):
    for wanted in range(1, num_blocks + 1):
        splits = linear_triton.even_splits(num_blocks, wanted)
        share = -(-num_blocks // splits)
        assert 1 <= splits <= wanted
        assert (splits - 1) * share < num_blocks <= splits * share


def test_few_rows_use_all_multiprocessors():
    few = linear_triton.choose_config(32, 7168, 2240, 132)
    assert isinstance(few, linear_triton.FewRowsConfig)
    assert 132 <= -(-2240 // few.block_o) * few.num_splits <= 264
    assert linear_triton.choose_config(32, 1536, 32768, 132).num_splits == 1


@pytest.fixture
def four_multiprocessors(monkeypatch):
    hostile.pretend_gpu(monkeypatch, 9)


MANY, FEW = linear_triton.ManyRowsConfig, linear_triton.FewRowsConfig
CONFIGS = [
    ((5, 256, 200), None),
    ((1, 1024, 72), None),
    ((33, 640, 200), FEW(block_t=16, block_o=64, num_splits=3)),
    ((130, 128, 136), FEW(block_t=64, block_o=128, num_splits=1)),
    ((150, 256, 456), MANY()),
    ((70, 256, 328), MANY(block_m=64, right=0, group_m=1)),
    ((270, 128, 200), MANY(left=64, right=64, group_m=2)),
    ((257, 128, 72), None),
]


@pytest.mark.interpret
@pytest.mark.usefixtures("four_multiprocessors")
@pytest.mark.parametrize(("sizes", "config"), CONFIGS)
@pytest.mark.parametrize("name", ["plain", *hostile.MUTATIONS["linear"]])
def test_triton_interpreted(sizes, config, name):
    mutate = {"plain": hostile.plain, **hostile.MUTATIONS["linear"]}[name]
    inputs = mutate(OPERATOR.make_inputs(shape_of(*sizes), seed=3, device="cpu"))
    with hostile.poisoned_outputs():
        out = linear_triton.linear(inputs, config)
    hostile.assert_right("linear", inputs, LinearOutputs(out))


@pytest.mark.interpret
@pytest.mark.usefixtures("four_multiprocessors")
def test_triton_interpreted_in_fp32_and_without_rows():
    inputs = replace(small(rows=20), out_dtype=torch.float32)
    hostile.assert_right("linear", inputs, linear_triton.run(inputs))
    assert linear_triton.run(small(rows=0)).out.shape == (0, 200)


SHAPES = [
    shape_of(rows, in_features, out_features, precision)
    for precision in ("fp8", "bf16")
    for rows, in_features, out_features in (
        (1, 7168, 2240), (33, 7168, 2112), (32, 1536, 32768), (130, 2048, 7168), (4, 256, 1024),
        (700, 7168, 2240), (4096, 1536, 4160), (2050, 2048, 7168),
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("linear", SHAPES))
def test_linear_matches_reference(name, shape, mutate):
    hostile.assert_implementation("linear", name, shape, mutate)
