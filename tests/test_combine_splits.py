"""Merging splits of attention rows, interpreted on the CPU, against torch in fp64."""

import math

import pytest
import torch

from dsa_bench.kernels.combine_splits import MAX_SPLITS, choose_tile, combine_splits

pytestmark = pytest.mark.interpret


def expected(partial_out, partial_lse, attn_sink):
    """The formula; `partial_lse` in log2 units."""
    lse = partial_lse.double() * math.log(2)
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - total).nan_to_num(0.0)
    out = (weights.unsqueeze(-1) * partial_out.double()).sum(0)
    if attn_sink is not None:
        out = out * torch.sigmoid(total - attn_sink.double()).unsqueeze(-1)
    return out, total.masked_fill(total == float("-inf"), float("inf"))


@pytest.mark.parametrize("has_sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("num_splits", [1, 3, 16, 17, 64])
def test_combine_matches_torch(num_splits, has_sink):
    rows, heads = 5, 2
    g = torch.Generator().manual_seed(num_splits)
    partial_out = torch.randn(num_splits, rows, heads, 512, generator=g)
    partial_lse = torch.randn(num_splits, rows, heads, generator=g) * 4
    # row 1 has no key at all, row 2 none in the last split, whose output nobody wrote
    partial_lse[:, 1] = float("-inf")
    partial_lse[-1, 2], partial_out[-1, 2] = float("-inf"), float("nan")
    attn_sink = torch.tensor([1.0, -2.0]) if has_sink else None
    out = torch.full((rows, heads, 512), float("nan")).bfloat16()
    lse = torch.full((rows, heads), float("nan"))
    combine_splits(partial_out, partial_lse, num_splits, attn_sink, out, lse)
    wanted_out, wanted_lse = expected(partial_out.nan_to_num(0.0), partial_lse, attn_sink)
    torch.testing.assert_close(out.double(), wanted_out, rtol=1 / 128, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_of_a_split_shows(num_splits):
    partial_out, partial_lse = torch.ones(num_splits, 2, 1, 512), torch.zeros(num_splits, 2, 1)
    partial_out[-1, 1], partial_lse[-1, 1] = float("nan"), float("nan")
    out, lse = torch.empty(2, 1, 512).bfloat16(), torch.empty(2, 1)
    combine_splits(partial_out, partial_lse, num_splits, None, out, lse)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert (out[0] == 1).all()


def test_the_number_of_splits_is_checked():
    out, lse = torch.empty(1, 1, 512).bfloat16(), torch.empty(1, 1)
    with pytest.raises(ValueError, match="num_splits must be 1 … 64, got 65"):
        combine_splits(torch.empty(65, 512), torch.empty(65), 65, None, out, lse)


@pytest.mark.parametrize("num_rows", [1, 16, 100, 128, 256, 4096])
def test_a_tile_holds_all_splits_and_fits(num_rows):
    for num_splits in range(1, MAX_SPLITS + 1):
        block_splits, block_d = choose_tile(num_splits, 512, num_rows)
        assert block_splits >= num_splits
        assert block_splits * block_d <= 8192
        assert 512 % block_d == 0
        # a GPU's worth of programs, where there are so many lines of 256 bytes
        assert num_rows * 512 // block_d >= min(256, 8 * num_rows)
