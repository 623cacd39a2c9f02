"""YaRN frequencies, the two rotations, and the Hadamard matrix, against their closed formulas."""

import math

import pytest
import torch

from dsa_bench.kernels.rope import (
    frequencies,
    hadamard,
    rope_table,
    rotate_half_split,
    rotate_interleaved,
)
from dsa_bench.preset import PRESETS

V3_2 = PRESETS["v3.2"]


def turned(pairs, angles):
    """Complex numbers times e^(j angle), in fp64."""
    return pairs * torch.polar(torch.ones_like(angles), angles)


def random_case(seed=0):
    """x [5, 3, 64], positions of its rows, and the angles of its pairs in fp64."""
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor([0, 1, 7, 250, 999])
    angles = positions[:, None] * frequencies(V3_2).double()
    return x, positions, angles[:, None].expand(-1, 3, -1)


def test_frequencies_by_hand():
    made = frequencies(V3_2).double()
    plain = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert made.shape == (32,) and frequencies(V3_2).dtype == torch.float32
    torch.testing.assert_close(made[:11], plain[:11], rtol=1e-6, atol=0)
    torch.testing.assert_close(made[23:], plain[23:] / 40, rtol=1e-6, atol=0)
    for i in range(11, 23):
        ramp = (i - 10) / 13
        expected = float(plain[i]) * (1 - ramp + ramp / 40)
        assert float(made[i]) == pytest.approx(expected, rel=1e-6)


def test_table_holds_angles_made_in_fp32():
    table = rope_table(V3_2, 4100, "cpu")
    assert table.shape == (4100, 64) and table.dtype == torch.float32
    assert torch.equal(table[0], torch.tensor([1.0] * 32 + [0.0] * 32))
    for position in (1, 37, 4096, 4099):  # YaRN is on before and after the original length
        # the product is rounded to fp32 before cosine and sine
        angles = torch.tensor(float(position)) * frequencies(V3_2)
        expected = torch.cat([angles.double().cos(), angles.double().sin()])
        torch.testing.assert_close(table[position].double(), expected, rtol=0, atol=2e-7)


def test_interleaved_is_complex_multiplication_of_neighbours():
    x, positions, angles = random_case()
    made = rotate_interleaved(x, rope_table(V3_2, 1000, "cpu")[positions, None])
    expected = torch.view_as_real(
        turned(torch.view_as_complex(x.double().view(5, 3, 32, 2)), angles)
    )
    torch.testing.assert_close(made.double(), expected.flatten(2), rtol=0, atol=3e-4)
    assert torch.equal(made[0], x[0])  # position 0


def test_half_split_is_complex_multiplication_of_halves():
    x, positions, angles = random_case(seed=1)
    made = rotate_half_split(x, rope_table(V3_2, 1000, "cpu")[positions, None])
    wide = x.double()
    expected = turned(torch.complex(wide[..., :32], wide[..., 32:]), angles)
    expected = torch.cat([expected.real, expected.imag], dim=-1)
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=3e-4)
    assert torch.equal(made[0], x[0])


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_products_know_distances_alone(rotate):
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    table = rope_table(V3_2, 700, "cpu")
    products = [rotate(q, table[i + 30]) @ rotate(k, table[i]) for i in (0, 5, 600)]
    torch.testing.assert_close(products[1:], products[:1] * 2, rtol=0, atol=2e-3)
    assert abs(products[0] - q @ k) > 0.1


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half_split])
def test_bf16_is_rounded_once(rotate):
    x, positions, _ = random_case(seed=3)
    rows = rope_table(V3_2, 1000, "cpu")[positions, None]
    made = rotate(x.bfloat16(), rows)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, rotate(x.bfloat16().float(), rows).bfloat16())


@pytest.mark.parametrize("size", [1, 2, 128])
def test_hadamard_is_orthogonal_in_natural_order(size):
    made = hadamard(size, "cpu")
    assert made.dtype == torch.float32
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    torch.testing.assert_close(made, torch.tensor(signs) / math.sqrt(size), rtol=0, atol=1e-7)
    torch.testing.assert_close(made @ made.T, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [0, 96])
def test_hadamard_of_other_sizes_is_refused(size):
    with pytest.raises(ValueError, match=f"size must be a power of two, got {size}"):
        hadamard(size, "cpu")
