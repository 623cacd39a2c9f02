"""The repaired interpreter computes what a GPU would."""

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl

from tests.triton_interpreter import fused_products

pytestmark = pytest.mark.interpret


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)
    tile = rows[:, None] * N + rows[None, :]
    product = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.store(out_ptr + tile, product)


@triton.jit
def _convert_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _multiply_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) * tl.load(y_ptr + offs) + 1.5)


@triton.jit
def _residue_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    product = tl.load(x_ptr + offs) * tl.load(y_ptr + offs)
    largest = tl.max(product, 0)
    tl.store(out_ptr + offs, product - largest)
    tl.store(out_ptr + N + offs, largest - product)
    tl.store(out_ptr + 2 * N + offs, product + product)


@triton.jit
def _count_kernel(n_ptr, out_ptr):
    total = 0
    for i in range(0, tl.load(n_ptr)):
        total += i
    tl.store(out_ptr, total)


def test_bf16_dot_matches_torch():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.full((16, 16), float("nan"))
    _dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_conversion_rounds_to_nearest_even(dtype):
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)) * 30
    x[:6] = torch.tensor([0.0, -0.0, 7.91, 1e-3, 2.0**-9, 1.0625])
    out = torch.empty(256, dtype=dtype)
    _convert_kernel[(1,)](x, out, N=256)
    assert torch.equal(out.float(), x.to(dtype).float())
    back = torch.empty(256)
    _convert_kernel[(1,)](out, back, N=256)
    assert torch.equal(back, out.float())


def test_e4m3_saturates():
    out = torch.empty(4, dtype=torch.float8_e4m3fn)
    _convert_kernel[(1,)](torch.tensor([500.0, -1e9, 448.0, 465.0]), out, N=4)
    assert out.float().tolist() == [448.0, -448.0, 448.0, 448.0]


def test_bf16_arithmetic_matches_torch():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(64, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(64, dtype=torch.bfloat16)
    _multiply_kernel[(1,)](x, y, out, N=64)
    assert torch.equal(out, x * y + 1.5)


def test_loop_bound_may_be_loaded():
    out = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](torch.tensor([10], dtype=torch.int32), out)
    assert out.item() == 45


def test_a_fused_product_is_not_rounded():
    """(1 + 2^-20)² is 1 + 2^-19 + 2^-40, of which fp32 has no last term."""
    x = torch.full((8,), 1 + 2.0**-20)
    whole, rest = 1 + 2.0**-19, 2.0**-40
    for fused, residue in ((nullcontext(), 0.0), (fused_products(), rest)):
        out = torch.empty(24)
        with fused:
            _residue_kernel[(1,)](x, x, out, N=8)
        expected = torch.tensor([residue, -residue, 2 * whole]).repeat_interleave(8)
        assert torch.equal(out, expected)


@triton.jit
def _twice_and(a, b):
    return 2 * a + b


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, NUM_OUT: tl.constexpr):
    tile = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    result = tl.reduce(tl.load(x_ptr + tile), AXIS, _twice_and, keep_dims=KEEP)
    if NUM_OUT == 1:
        tl.store(out_ptr + tl.zeros_like(result).to(tl.int32), result)
    else:
        tl.store(out_ptr + tl.arange(0, NUM_OUT), tl.reshape(result, [NUM_OUT]))


@pytest.mark.parametrize("keep_dims", [False, True])
@pytest.mark.parametrize(("axis", "num_out"), [(0, 8), (1, 4), (None, 1)])
def test_a_function_of_ours_reduces_from_first_to_last(axis, num_out, keep_dims):
    x = torch.randint(0, 9, (4, 8), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    out = torch.full((num_out,), -1, dtype=torch.int64)
    _reduce_kernel[(1,)](x, out, AXIS=axis, KEEP=keep_dims, NUM_OUT=num_out)
    rows = x.flatten()[None] if axis is None else x.movedim(axis, -1)
    places = 2 ** torch.arange(rows.shape[-1] - 1, -1, -1)
    assert torch.equal(out, (rows * places).sum(-1))
