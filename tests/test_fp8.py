"""Scales that are powers of two, and e4m3 values under them."""

import math

import pytest
import torch

from dsa_bench.kernels.fp8 import (
    quantize,
    quantize_index_vectors,
    round_up_to_power_of_two,
)


@pytest.mark.parametrize("exponent", [-126, -30, -1, 0, 1, 64, 126])
def test_a_power_of_two_stays_and_what_is_above_doubles(exponent):
    power = 2.0**exponent
    x = torch.tensor([power, power * (1 + 2**-23), power * 1.5, power * (2 - 2**-23), 2 * power])
    assert round_up_to_power_of_two(x).tolist() == [power, *[2 * power] * 4]


def test_rounding_up_at_the_ends_of_fp32():
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    x = torch.tensor([tiny, tiny / 2, huge, math.inf])
    # a denormal becomes the smallest normal number, the largest number overflows
    assert round_up_to_power_of_two(x).tolist() == [tiny, tiny, math.inf, math.inf]


def test_rounding_up_matches_logarithms_where_those_are_exact_enough():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100 + 1e-3
    expected = [2.0 ** math.ceil(math.log2(value)) for value in x.tolist()]
    assert round_up_to_power_of_two(x).tolist() == expected


def test_quantised_vector_by_hand():
    x = torch.zeros(2, 128)
    x[0, :3] = torch.tensor([448.0, -1.0, 0.3])
    x[1, :2] = torch.tensor([449.0, 18.0])
    values, scale = quantize_index_vectors(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.tolist() == [1.0, 2.0]
    # steps of e4m3: 1/32 in 0.25 … 0.5, 16 in 128 … 256
    assert values[0, :3].float().tolist() == [448.0, -1.0, 0.3125]
    assert values[1, :2].float().tolist() == [224.0, 9.0]


def test_an_all_zero_vector_has_the_floor_as_scale():
    values, scale = quantize_index_vectors(torch.zeros(1, 128))
    assert scale.item() == 2.0**-22  # 1e-4 / 448 rounded up
    assert (values.float() == 0).all()
    values, scale = quantize(torch.zeros(1, 256), 128, 1e-4)
    assert scale.tolist() == [[2.0**-13] * 2]


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
def test_groups_are_scaled_on_their_own_and_lose_little(size):
    g = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1.0, 8.0, 64.0, 512.0]).repeat_interleave(128) * size
    x = torch.randn(5, 512, generator=g) * sizes
    values, scale = quantize(x, 128, 1e-20)
    assert scale.shape == (5, 4)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    amax = x.unflatten(-1, (4, 128)).abs().amax(-1)
    assert (amax / scale <= 448).all()
    assert (amax / scale > 224).all()
    back = (values.float().unflatten(-1, (4, 128)) * scale.unsqueeze(-1)).flatten(-2)
    # half a unit of 3 mantissa bits, or half of the smallest step
    limit = x.abs() / 16 + scale.repeat_interleave(128, -1) * 2**-10
    assert ((back - x).abs() <= limit).all()
