"""Sparse prefill in fp8: reference, rounding, arguments, counts, figures."""

import math
from dataclasses import fields, replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import attention, sparse_prefill
from dsa_bench.kernels.sparse_prefill import SparsePrefillShape
from dsa_bench.kernels.sparse_prefill_fp8 import OPERATOR, check_arguments, plain, quantize
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.fp8_prefill import (
    INF,
    NAN,
    make,
    mutations,
    online,
    widths,
    with_lens,
    with_sink,
)
from tests.sparse_prefill_loops import loops

CPU = Machine(device="cpu", name="CPU")
V32 = PRESETS["v3.2"]


def in_fp64(inputs):
    """(q, kv) of the formula: latents times their scales, then the rope columns."""
    q = inputs.q.double() * inputs.q_scale.double()[:, :, None]
    kv = inputs.kv.double() * inputs.kv_scale.item()
    if inputs.q_rope is None:
        return q, kv
    return torch.cat([q, inputs.q_rope.double()], 2), torch.cat([kv, inputs.k_rope.double()], 1)


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=4e-6)


@mutations
@widths
@pytest.mark.parametrize("strong", [1.0, 16.0, 256.0])
def test_reference_matches_loops(strong, width, mutate):
    inputs = mutate(make(width=width, strong=strong))
    assert_equal(OPERATOR.reference(inputs), loops(*in_fp64(inputs), inputs))


@widths
def test_an_empty_row_gives_zero_and_infinities(width):
    inputs = make(width=width)
    empty = replace(inputs, topk_indices=torch.full_like(inputs.topk_indices, -1))
    for case in (empty, with_sink(empty)):
        for outputs in (OPERATOR.reference(case), plain(case)):
            assert (outputs.out == 0).all()
            assert (outputs.max_logits == -INF).all()
            assert (outputs.lse == INF).all()
        assert hostile.passes(OPERATOR.check(case, online(case)))
        wrong = OPERATOR.reference(case)
        wrong.out[3, 1, 9] = 1e-3
        assert not hostile.passes(OPERATOR.check(case, wrong))


def test_nan_of_a_listed_key_shows_where_it_is_listed():
    inputs = hostile.nan_in_query(1, make())
    found = OPERATOR.reference(inputs)
    for x in found:
        assert x[1].isnan().all() and not x[[0, 2, 3, 4, 5]].isnan().any()
    wrong = online(inputs)
    for check in OPERATOR.check(inputs, wrong):
        assert check.passed, check
    # the NaN widens no limit: one wrong element of another row shows
    wrong.out[4, 1, 7] += 0.03
    assert not next(x for x in OPERATOR.check(inputs, wrong) if x.name == "out").passed


def test_reference_of_some_rows_in_small_chunks(monkeypatch):
    inputs = with_lens(make(strong=16.0))
    whole = OPERATOR.reference(inputs)
    monkeypatch.setattr(attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    rows = torch.tensor([3, 0, 2])
    assert_equal(OPERATOR.reference(inputs, rows=rows), [x[rows] for x in whole])
    assert_equal(plain(inputs, rows=rows), [x[rows] for x in plain(inputs)])


def half_step(x, scale):
    """Of e4m3 at x / scale, which has three bits behind the leading one, times scale."""
    exponent = torch.frexp(x / scale).exponent - 1
    return scale * 2.0 ** (exponent.clamp(min=-6) - 4) * (x != 0)


def is_power_of_two(x):
    return torch.frexp(x).mantissa == 0.5


def uneven():
    """bf16 inputs whose queries and keys differ in size by up to 2^20, some of them 0."""
    shape = SparsePrefillShape(seq_len_q=6, seq_len_kv=40, topk=16, num_heads=3)
    inputs = sparse_prefill.make_inputs(shape, seed=2, device="cpu")
    sizes = 2.0 ** torch.arange(18).view(6, 3, 1)
    q, kv = inputs.q * sizes, inputs.kv * 2.0 ** -torch.arange(40).div(2)[:, None]
    q[2, 1], kv[7] = 0, 0
    return replace(inputs, q=q.bfloat16(), kv=kv.bfloat16())


@pytest.mark.parametrize("name", ["random", "uneven"])
def test_latents_are_rounded_to_the_nearest_and_rope_is_left(name):
    exact = make().exact() if name == "random" else uneven()
    rounded = quantize(exact)
    assert rounded.q.dtype == rounded.kv.dtype == torch.float8_e4m3fn
    assert rounded.q_scale.shape == (6, 3) and rounded.kv_scale.shape == (1,)
    assert rounded.q_scale.dtype == rounded.kv_scale.dtype == torch.float32
    for scale, values in (
        (rounded.q_scale, rounded.q.float().abs().amax(-1)),
        (rounded.kv_scale, rounded.kv.float().abs().max()),
    ):
        assert is_power_of_two(scale).all()
        # half of what there is at least, but where the floor of the scales is above the values
        assert ((values >= 224) | (scale == 2.0**-13)).all()
    q, kv = exact.q[..., :512].float(), exact.kv[:, :512].float()
    scale = rounded.q_scale[..., None]
    assert ((rounded.q.float() * scale - q).abs() <= half_step(q, scale)).all()
    scale = rounded.kv_scale
    assert ((rounded.kv.float() * scale - kv).abs() <= half_step(kv, scale)).all()
    assert torch.equal(hostile.bits(rounded.q_rope), hostile.bits(exact.q[..., 512:]))
    assert torch.equal(hostile.bits(rounded.k_rope), hostile.bits(exact.kv[:, 512:]))
    assert rounded.q_rope.is_contiguous() and rounded.k_rope.is_contiguous()


def test_the_rest_is_handed_on():
    exact = with_lens(with_sink(uneven()))
    rounded = quantize(replace(exact, sm_scale=0.7))
    for name in ("topk_indices", "attn_sink", "topk_lens"):
        assert torch.equal(getattr(rounded, name), getattr(exact, name))
    assert rounded.sm_scale == 0.7 and rounded.exact is None


def test_zeros_are_rounded_to_zeros():
    exact = uneven()
    zeros = quantize(replace(exact, q=exact.q * 0, kv=exact.kv * 0))
    assert (zeros.q.float() == 0).all() and (zeros.kv.float() == 0).all()
    for scale in (zeros.q_scale, zeros.kv_scale):
        assert is_power_of_two(scale).all() and (scale > 0).all()


def test_without_rope_columns_there_are_no_rope_tensors():
    exact = uneven()
    narrow = quantize(
        replace(exact, q=exact.q[..., :512].contiguous(), kv=exact.kv[:, :512].contiguous())
    )
    wide = quantize(exact)
    assert narrow.q_rope is None and narrow.k_rope is None
    for name in ("q", "q_scale", "kv", "kv_scale"):
        assert torch.equal(hostile.bits(getattr(narrow, name)), hostile.bits(getattr(wide, name)))


@widths
def test_inputs_are_those_of_sparse_prefill_rounded(width):
    shape = SparsePrefillShape(
        seq_len_q=6, seq_len_kv=40, topk=16, num_heads=3, head_dim_qk=width, sm_scale=0.2
    )
    wanted = sparse_prefill.make_inputs(shape, seed=5, device="cpu")
    inputs = OPERATOR.make_inputs(shape, seed=5, device="cpu")
    for one, other in ((inputs, quantize(wanted)), (inputs.exact(), wanted)):
        for field in fields(one):
            x, y = getattr(one, field.name), getattr(other, field.name)
            if torch.is_tensor(x):
                assert x.dtype == y.dtype and torch.equal(hostile.bits(x), hostile.bits(y))
            elif field.name != "exact":
                assert x == y
    assert inputs.sm_scale == 0.2


def arguments(inputs):
    return {x.name: getattr(inputs, x.name) for x in fields(inputs) if x.name != "exact"}


def columns_of_wider(x):
    return torch.zeros(x.shape[0], x.shape[1] + 16).to(x.dtype)[:, : x.shape[1]]


def turned(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


MISTAKES = [
    *((name, lambda x: x.half(), TypeError, f"{name} must be {dtype}") for name, dtype in [
        ("q", "float8_e4m3fn"), ("q_rope", "bfloat16"), ("q_scale", "float32"),
        ("kv", "float8_e4m3fn"), ("k_rope", "bfloat16"), ("kv_scale", "float32"),
        ("topk_indices", "int32"), ("attn_sink", "float32"), ("topk_lens", "int32"),
    ]),
    ("q", lambda x: x[..., :500], ValueError, "q must be float8_e4m3fn .*head_dim_v=512"),
    ("q", lambda x: x[0], ValueError, "q must be float8_e4m3fn .*got float8_e4m3fn .3, 512"),
    ("kv", lambda x: x[:, :500], ValueError, "kv must be float8_e4m3fn .*head_dim_v=512"),
    ("q_rope", lambda x: x[..., :32], ValueError, "q_rope must be bfloat16 .*rope=64"),
    ("q_rope", lambda x: x[:, :2], ValueError, "q_rope must be bfloat16 .*num_heads=3"),
    ("k_rope", lambda x: x[:, :32], ValueError, "k_rope must be bfloat16 .*rope=64"),
    ("k_rope", lambda x: x[:39], ValueError, "k_rope must be bfloat16 .seq_len_kv=40"),
    ("k_rope", lambda x: None, ValueError, "q_rope and k_rope must be given both or neither"),
    ("q_rope", lambda x: None, ValueError, "q_rope and k_rope must be given both or neither"),
    ("q_scale", lambda x: x[:5], ValueError, "q_scale must be float32 .seq_len_q=6, num_heads=3"),
    ("q_scale", lambda x: x[:, :2], ValueError, "q_scale must be float32 .*num_heads=3"),
    ("kv_scale", lambda x: x.expand(40), ValueError, "kv_scale must be float32 .one=1.*got .*40"),
    ("kv_scale", lambda x: x[0], ValueError, "kv_scale must be float32 .one=1.*got float32 .."),
    ("topk_indices", lambda x: x[:3], ValueError, "topk_indices must be int32 .seq_len_q=6"),
    ("topk_lens", lambda x: x[:5], ValueError, "topk_lens must be int32 .seq_len_q=6"),
    ("attn_sink", lambda x: x[:2], ValueError, "attn_sink must be float32 .num_heads=3"),
    ("sm_scale", lambda x: 0.0, ValueError, "sm_scale must be > 0, got 0"),
    ("sm_scale", lambda x: NAN, ValueError, "sm_scale must be > 0, got nan"),
    *((name, turned, ValueError, f"{name} must be contiguous, got strides")
      for name in ("q", "q_rope")),
    *((name, columns_of_wider, ValueError, f"{name} must be contiguous, got strides")
      for name in ("q_scale", "kv", "k_rope", "topk_indices")),
    ("kv", lambda x: x.T.contiguous().T, ValueError, "kv must be contiguous in its last dim"),
    ("kv", lambda x: x.to("meta"), ValueError, "on one device, got q on cpu, .*kv on meta"),
    ("kv_scale", lambda x: x.to("meta"), ValueError, "on one device, .*kv_scale on meta"),
    ("attn_sink", lambda x: x.to("meta"), ValueError, "on one device, .*attn_sink on meta"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_arguments_are_refused(name, change, kind, sentence):
    right = arguments(with_lens(with_sink(make())))
    check_arguments(**right)
    with pytest.raises(kind, match=sentence):
        check_arguments(**right | {name: change(right[name])})


def test_cost_counted_by_hand():
    # queries at positions 2, 3, 4 see 3, 4, 5 keys and take at most 4 of them: 11 pairs
    cost = OPERATOR.cost(SparsePrefillShape(seq_len_q=3, seq_len_kv=5, topk=4, num_heads=2))
    assert cost.flops == 2 * 2 * (576 + 512) * 11
    assert cost.bytes_read == 3 * 2 * (512 + 128 + 4) + 5 * (512 + 128) + 4 + 3 * 4 * 4
    assert cost.bytes_written == 3 * 2 * (2 * 512 + 4 + 4)
    # 3 lists of 4 hold 12 of the 50 keys at most; no rope columns
    narrow = SparsePrefillShape(seq_len_q=3, seq_len_kv=50, topk=4, num_heads=2, head_dim_qk=512)
    cost = OPERATOR.cost(narrow)
    assert cost.flops == 2 * 2 * (512 + 512) * 12
    assert cost.bytes_read == 3 * 2 * (512 + 4) + 12 * 512 + 4 + 3 * 4 * 4


@widths
@pytest.mark.parametrize("seq_len_kv", [21, 50])
def test_memory_is_what_the_tensors_take(seq_len_kv, width):
    shape = SparsePrefillShape(
        seq_len_q=5, seq_len_kv=seq_len_kv, topk=8, num_heads=3, head_dim_qk=width
    )
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    taken = sum(x.nbytes for x in arguments(inputs).values() if torch.is_tensor(x))
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == taken
    assert memory.output_bytes == sum(x.nbytes for x in online(inputs))
    # all of it is read once, but for keys beyond the 5 · 8 that are listed
    assert OPERATOR.cost(shape).bytes_read == taken - max(0, seq_len_kv - 40) * (2 * width - 512)
    assert OPERATOR.num_rows(shape) == 5


def case(**changes):
    known = {"seq_len_q": 64, "seq_len_kv": 128, "topk": 32, "phase": "prefill",
             "precision": "fp8"}  # fmt: skip
    return Case(op="sparse_prefill_fp8", impl="reference", **known | changes)


@pytest.mark.parametrize(("rope", "width"), [(64, 576), (0, 512)])
def test_shape_is_that_of_sparse_prefill(rope, width):
    preset = replace(V32, head_dim_rope=rope)
    shape = OPERATOR.shape(case(num_heads=16), preset)
    assert shape == sparse_prefill.shape_of(case(num_heads=16, precision="bf16"), preset)
    assert (shape.seq_len_q, shape.seq_len_kv, shape.topk, shape.num_heads) == (64, 128, 32, 16)
    assert (shape.head_dim_qk, shape.head_dim_v) == (width, 512)


@pytest.mark.parametrize(
    ("changes", "dims", "sentence"),
    [
        ({"precision": "bf16"}, {}, "sparse_prefill_fp8 computes in fp8, got precision bf16"),
        ({}, {"head_dim_v": 256}, "512 latent columns and 64 or no .* has head_dim 320/256"),
        ({}, {"head_dim_rope": 32}, "512 latent columns and 64 or no .* has head_dim 544/512"),
        ({}, {"head_dim_v": 448, "head_dim_rope": 64}, "has head_dim 512/448"),
        ({"topk": None}, {}, "topk has no value"),
        ({"topk": 129}, {}, "topk 129 is more than the 128 keys there are"),
    ],
)
def test_a_case_that_it_cannot_take(changes, dims, sentence):
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(case(**changes), replace(V32, **dims))


def test_a_cpu_has_the_reference():
    assert registry.choose("sparse_prefill_fp8", case(), V32, CPU) == "reference"
    inputs = make()
    outputs = registry.implementation("sparse_prefill_fp8", "reference").run(inputs)
    assert_equal(outputs, loops(*in_fp64(inputs), inputs))


@pytest.mark.parametrize("seed", range(3))
def test_figures_say_how_far_from_bf16(seed):
    inputs = make(seq_len_q=10, seed=seed)
    found = OPERATOR.figures(inputs, OPERATOR.reference(inputs))
    assert 0.003 < found["rounding_error"]["relative_l2"] < 0.05
    # the first 8 rows by the formula
    exact = inputs.exact()
    wanted = loops(exact.q.double(), exact.kv.double(), inputs).out[:8]
    error = loops(*in_fp64(inputs), inputs).out[:8] - wanted
    assert found == {
        "rounding_error": {
            "relative_l2": pytest.approx((error.norm() / wanted.norm()).item(), 1e-3)
        }
    }


def test_figures_of_exact_outputs_are_nothing():
    inputs = make()
    found = OPERATOR.figures(inputs, sparse_prefill.reference(inputs.exact()))
    assert found["rounding_error"]["relative_l2"] < 1e-6
    assert OPERATOR.figures(replace(inputs, exact=None), OPERATOR.reference(inputs)) == {}


def test_figures_look_at_the_rows_they_are_given():
    inputs = make(seq_len_q=10)
    outputs = sparse_prefill.reference(inputs.exact())
    outputs.out[9] *= 2

    def error(rows):
        found = OPERATOR.figures(inputs, outputs, rows=rows)
        return found["rounding_error"]["relative_l2"]

    assert error(None) < 1e-6
    assert error(torch.tensor([9])) == pytest.approx(1.0, 1e-4)
    assert error(torch.tensor([1, 2])) < 1e-6


def test_lists_without_a_key_have_finite_limits_and_no_figure():
    inputs = make()
    inputs = replace(inputs, topk_indices=torch.full_like(inputs.topk_indices, -1))
    outputs = OPERATOR.reference(inputs)
    for check in OPERATOR.check(inputs, outputs):
        assert check.passed, check
        assert all(math.isfinite(limit) for limit in check.limits.values())
    rows = torch.arange(6)
    empty = replace(inputs.exact(), topk_indices=inputs.topk_indices)
    assert OPERATOR.figures(replace(inputs, exact=lambda: empty), outputs, rows=rows) == {}
