"""Merging parts of lists, interpreted on the CPU, against torch in fp64."""

import math

import pytest
import torch

from dsa_bench.kernels.combine_parts import Parts, combine_parts, may_overlap
from dsa_bench.kernels.decode_config import Fp8DecodeConfig, divide

pytestmark = pytest.mark.interpret
NAN = float("nan")
HEADS = 3


def made(num_queries, num_blocks, num_groups, piece_units):
    """Partial results of all groups, NaN where no piece leaves any; (queries' places)."""
    config = Fp8DecodeConfig(block_h=16, num_groups=num_groups, piece_units=piece_units)
    division = divide(num_queries, num_blocks, config)
    units, groups = piece_units + num_blocks, division.num_groups
    g = torch.Generator().manual_seed(num_groups)
    out = torch.full((2 * groups, HEADS, 512), NAN)
    lse = torch.full((2 * groups, HEADS), NAN)
    places = []
    for query in range(num_queries):
        begin = query * units + piece_units
        first, last = begin // division.share, (begin + num_blocks - 1) // division.share
        places.append([first, *(groups + group for group in range(first + 1, last + 1))])
        if first < last:
            out[places[-1]] = torch.randn(last - first + 1, HEADS, 512, generator=g)
            lse[places[-1]] = torch.randn(last - first + 1, HEADS, generator=g) * 4
    parts = Parts(out, lse, division.share, piece_units, num_blocks, division.most_parts)
    return parts, places


def merged(parts, num_queries, attn_sink=None):
    out = torch.full((num_queries, 1, HEADS, 512), NAN).bfloat16()
    lse = torch.full((num_queries, 1, HEADS), NAN)
    combine_parts(parts, attn_sink, out, lse)
    return out[:, 0], lse[:, 0]


# even cuts, uneven ones, whole lists between them, more parts than a power of two
@pytest.mark.parametrize(
    "sizes",
    [(3, 8, 6, 0), (1, 32, 16, 0), (5, 8, 3, 0), (7, 4, 5, 2), (2, 7, 6, 1), (2, 32, 24, 4)],
)
@pytest.mark.parametrize("has_sink", [False, True], ids=["plain", "sink"])
def test_parts_are_merged_and_whole_lists_left(sizes, has_sink):
    parts, places = made(*sizes)
    # a part without a key, whose output nobody wrote; a list without any
    shared = [place for place in places if len(place) > 1]
    parts.lse[shared[0][-1], 0], parts.out[shared[0][-1], 0] = -math.inf, NAN
    parts.lse[shared[-1], 1] = -math.inf
    attn_sink = torch.tensor([1.0, -2.0, 0.5]) if has_sink else None
    out, lse = merged(parts, sizes[0], attn_sink)
    for query, place in enumerate(places):
        if len(place) == 1:
            assert out[query].isnan().all() and lse[query].isnan().all()
            continue
        logs = parts.lse[place].double() * math.log(2)
        total = logs.logsumexp(0)
        weights = torch.exp(logs - total).nan_to_num(0.0)
        wanted = (weights.unsqueeze(-1) * parts.out[place].nan_to_num(0.0).double()).sum(0)
        if attn_sink is not None:
            wanted *= torch.sigmoid(total - attn_sink.double()).unsqueeze(-1)
        torch.testing.assert_close(out[query].double(), wanted, rtol=1 / 128, atol=1e-6)
        wanted_lse = total.masked_fill(total == -math.inf, math.inf)
        torch.testing.assert_close(lse[query].double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
def test_nan_of_a_part_shows_in_its_list_alone():
    parts, places = made(3, 8, 6, 0)
    parts.out[places[1][1], 2], parts.lse[places[1][1], 2] = NAN, NAN
    out, lse = merged(parts, 3)
    is_nan = torch.zeros(3, HEADS, dtype=torch.bool)
    is_nan[1, 2] = True
    assert torch.equal(lse.isnan(), is_nan)
    assert torch.equal(out.isnan().all(-1), is_nan) and torch.equal(out.isnan().any(-1), is_nan)


def test_even_cuts_are_known():
    assert made(3, 8, 6, 0)[0].is_even
    assert not made(5, 8, 3, 0)[0].is_even
    # eleven parts in twelve stretches, of which the first has no key
    uneven = made(2, 32, 24, 4)[0]
    assert uneven.most_parts * uneven.share < 36 and not uneven.is_even


def test_merging_is_launched_early_where_it_fills_the_gpu_or_is_little():
    assert [may_overlap(rows) for rows in (16, 128, 1024, 4096)] == [True, False, False, True]
