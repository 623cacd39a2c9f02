"""How sparse decode over 656-byte rows shares its work: the host's rule against one written out
unit by unit, the device's against the host's, and what is chosen."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench.kernels.decode_config import (
    BLOCK_KV,
    MAX_SPLITS,
    PARTIAL_ROWS,
    Fp8DecodeConfig,
    choose_config,
    divide,
)
from tests.gluon_emulator import emulated_gluon

NUM_SMS = 132


def choose(num_queries, num_heads=128, topk=2048):
    return choose_config(num_queries, num_heads, topk, NUM_SMS)


def pieces_of_groups(num_queries, blocks, config):
    """[{list: its blocks} of each group], every unit of the line handed out by itself."""
    units, share = config.piece_units + blocks, divide(num_queries, blocks, config).share
    groups = [{} for _ in range(divide(num_queries, blocks, config).num_groups)]
    for unit in range(num_queries * units):
        row, block = unit // units, unit % units - config.piece_units
        if block >= 0:
            groups[unit // share].setdefault(row, []).append(block)
    return groups


SHAPES = [(1, 1), (1, 32), (3, 5), (7, 4), (24, 32), (96, 32)]
WAYS = [
    *((groups, units, True) for groups in (1, 2, 3, 16, 66) for units in (0, 1, 5)),
    *((groups, 0, False) for groups in (1, 2, 7, 66)),
]


@pytest.mark.parametrize(("num_groups", "piece_units", "shares_lists"), WAYS)
@pytest.mark.parametrize(("num_queries", "blocks"), SHAPES)
def test_division_counts_the_pieces(num_queries, blocks, num_groups, piece_units, shares_lists):
    config = Fp8DecodeConfig(
        block_h=16, num_groups=num_groups, piece_units=piece_units, shares_lists=shares_lists
    )
    division = divide(num_queries, blocks, config)
    groups = pieces_of_groups(num_queries, blocks, config)
    sizes = [[len(piece) for piece in group.values()] for group in groups]
    parts = [sum(row in group for group in groups) for row in range(num_queries)]
    assert division.num_groups <= num_groups
    assert division.loads == {(sum(group), len(group)) for group in sizes}
    assert division.most_parts == max(parts)
    assert division.num_whole == sum(group.count(blocks) for group in sizes)
    assert division.num_partial == sum(map(len, sizes)) - division.num_whole
    assert shares_lists or division.num_partial == 0


def device_pieces(num_queries, topk, config, lens=None):
    """[{list: (first block, blocks, place)} of each group], as `decode_pieces.py` has them."""
    mangle_type(torch.zeros(1))  # its first call imports Gluon: the real one is wanted
    blocks = -(-topk // BLOCK_KV)
    division = divide(num_queries, blocks, config)
    found = [{} for _ in range(division.num_groups)]
    with emulated_gluon() as emulated:
        pieces = emulated.load("dsa_bench.kernels.decode_pieces")

        def kernel(lens_ptr):
            arguments = SimpleNamespace(
                lens_ptr=lens_ptr, num_queries=num_queries, topk=topk, share=division.share,
                NUM_BLOCKS=blocks, PIECE_UNITS=config.piece_units, HAS_LENS=lens is not None,
                HAS_PARTS=division.num_partial > 0, HAS_WHOLE=division.num_whole > 0,
            )  # fmt: skip
            row = torch.as_tensor(pieces.first_list(arguments))
            while pieces.has_piece(arguments, row):
                piece = pieces.piece_of(arguments, row)
                group = found[int(pieces.gl.program_id(1))]
                group[int(row)] = (
                    int(piece.first_block), int(piece.num_blocks), int(piece.place),
                )  # fmt: skip
                row = row + 1

        launch = pieces.gluon.jit(kernel)[1, division.num_groups]
        launch(torch.full((num_queries,), topk, dtype=torch.int32) if lens is None else lens)
    return found


@pytest.mark.parametrize(("num_groups", "piece_units", "shares_lists"), WAYS)
@pytest.mark.parametrize(("num_queries", "blocks"), SHAPES[:-1])
def test_device_has_the_same_pieces(num_queries, blocks, num_groups, piece_units, shares_lists):
    config = Fp8DecodeConfig(
        block_h=16, num_groups=num_groups, piece_units=piece_units, shares_lists=shares_lists
    )
    wanted = pieces_of_groups(num_queries, blocks, config)
    found = device_pieces(num_queries, blocks * BLOCK_KV, config)
    for group, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        assert actual.keys() == expected.keys()
        for row, (first, count, place) in actual.items():
            assert list(range(first, first + count)) == expected[row]
            here = group if first == 0 else len(found) + group
            assert place == (-1 if count == blocks else here)


@pytest.mark.parametrize(("num_groups", "piece_units", "shares_lists"), WAYS)
def test_a_shorter_list_is_shared_in_the_same_proportions(num_groups, piece_units, shares_lists):
    """Each of its blocks once, by groups that would have a part of it if it were full."""
    config = Fp8DecodeConfig(
        block_h=16, num_groups=num_groups, piece_units=piece_units, shares_lists=shares_lists
    )
    lens = torch.tensor([0, 1, 64, 65, 700, 1024, 2**31 - 1, -(2**31), 64 * 15])
    found = device_pieces(len(lens), 1000, config, lens.to(torch.int32))
    full = device_pieces(len(lens), 1000, config)
    assert [group.keys() for group in found] == [group.keys() for group in full]
    for row, length in enumerate(lens.clamp(0, 1000).tolist()):
        parts = [
            (group[row], other[row])
            for group, other in zip(found, full, strict=True)
            if row in group
        ]
        listed = [range(first, first + count) for (first, count, _), _ in parts]
        assert list(itertools.chain(*listed)) == list(range(-(-length // BLOCK_KV)))
        for (first, count, place), (full_first, full_count, full_place) in parts:
            assert place == full_place
            blocks = -(-length // BLOCK_KV)
            assert first == full_first * blocks // 16
            assert first + count == (full_first + full_count) * blocks // 16


@pytest.mark.parametrize("topk", [1, 63, 64, 65, 300, 1000, 2048, 4096, 8192, 32768])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 17, 32, 33, 64, 96, 128, 130, 256])
def test_choice_keeps_to_its_limits(num_heads, topk):
    for num_queries in (1, 2, 5, 16, 33, 66, 128, 133, 300, 5000):
        config = choose(num_queries, num_heads, topk)
        division = divide(num_queries, -(-topk // BLOCK_KV), config)
        programs = division.num_groups * -(-num_heads // config.block_h)
        assert programs <= NUM_SMS or division.num_groups == 1
        assert division.most_parts <= MAX_SPLITS
        # from which memory is predicted
        rows = 2 * division.num_groups * num_heads
        most = min(PARTIAL_ROWS, 2 * MAX_SPLITS * num_queries * num_heads)
        assert division.num_partial == 0 or rows <= most
        assert config.block_h in (16, 32, 64)
        assert config.block_h == 16 or config.block_h < 2 * num_heads


def test_lists_are_shared_where_it_pays():
    """By what was measured on an H100: docs/kernels/sparse_decode.md."""
    assert divide(1, 32, choose(1)).most_parts == 16
    assert divide(32, 32, choose(32)).most_parts == 2
    # one or two whole lists a group are as good, for they fill nearly all SMs
    assert not any(choose(queries).shares_lists for queries in (64, 128, 256))
    # 80 and 96 would take two rounds as 128 do, in which many SMs have nothing left
    for queries in (80, 96, 160):
        division = divide(queries, 32, choose(queries))
        assert division.num_whole > 0 and division.num_partial > 0
    assert not choose(1, topk=64).shares_lists


def test_even_parts_are_known_for_what_they_are():
    even = divide(2, 32, Fp8DecodeConfig(block_h=16, num_groups=8))
    assert even.is_one_piece and even.even_blocks == 8
    uneven = divide(2, 33, Fp8DecodeConfig(block_h=16, num_groups=8))
    assert not uneven.is_one_piece and uneven.even_blocks == 0
    # one piece each, not of as many blocks
    last_shorter = divide(1, 5, Fp8DecodeConfig(block_h=16, num_groups=2))
    assert last_shorter.is_one_piece and last_shorter.even_blocks == 0
    several = divide(4, 5, Fp8DecodeConfig(block_h=16, num_groups=2, shares_lists=False))
    assert several.loads == {(10, 2)} and several.even_blocks == 0
