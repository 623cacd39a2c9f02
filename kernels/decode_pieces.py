"""Which pieces a program of `row_decode.py` does: the device's side of `decode_config.py`.

The division is that of full lists, for the host does not know the lengths; a list that is shorter
is shared in the same proportions. So each role works out by itself what comes next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.seesaw_tiles import BLOCK_KV, KeyList

WHOLE = gl.constexpr(-1)
"""Instead of a place among partial results: the piece is a whole list, and its result final."""


@aggregate
class Piece:
    """Some blocks of a list."""

    first_block: gl.tensor
    num_blocks: gl.tensor  # 0 for a part of a list that has fewer blocks than parts
    place: gl.tensor  # where its partial result goes, or WHOLE

    @gluon.constexpr_function
    def __init__(self, first_block, num_blocks, place):
        self.first_block = first_block
        self.num_blocks = num_blocks
        self.place = place


@gluon.jit
def first_list(arguments):
    """Of this program's group."""
    return gl.program_id(1) * arguments.share // (arguments.PIECE_UNITS + arguments.NUM_BLOCKS)


@gluon.jit
def has_piece(arguments, row):
    """Whether the group has keys of the list, which is not before its first."""
    units: gl.constexpr = arguments.PIECE_UNITS + arguments.NUM_BLOCKS
    first_key = row * units + arguments.PIECE_UNITS
    end = (gl.program_id(1) + 1) * arguments.share
    return (row < arguments.num_queries) & (first_key < end)


@gluon.jit
def list_length(arguments, row):
    """Entries that count. Only when the launch before has ended."""
    length = arguments.topk
    if arguments.HAS_LENS:
        length = gl.maximum(gl.minimum(gl.load(arguments.lens_ptr + row), arguments.topk), 0)
    return length


@gluon.jit
def piece_of(arguments, row):
    """The group's piece of a list. Only when the launch before has ended.

    A group has at most two pieces that are not whole: one that does not begin its list, which has
    the group's place behind all groups', and one that does, which has the group's own. So the parts
    of a list are at its first group's place and behind, at those of the groups that follow.
    """
    first = row * 0
    end = first + arguments.NUM_BLOCKS
    place = first + WHOLE
    if arguments.HAS_PARTS:
        group = gl.program_id(1)
        units: gl.constexpr = arguments.PIECE_UNITS + arguments.NUM_BLOCKS
        before = group * arguments.share - (row * units + arguments.PIECE_UNITS)
        first = gl.maximum(before, 0)
        end = gl.minimum(before + arguments.share, arguments.NUM_BLOCKS)
        place = gl.where(first == 0, group, gl.num_programs(1) + group)
        if arguments.HAS_WHOLE:
            place = gl.where(end - first == arguments.NUM_BLOCKS, WHOLE, place)
    if arguments.HAS_LENS:
        blocks = (list_length(arguments, row) + (BLOCK_KV - 1)) // BLOCK_KV
        first = first * blocks // arguments.NUM_BLOCKS
        end = end * blocks // arguments.NUM_BLOCKS
    return Piece(first, end - first, place)


@gluon.jit
def steps_of(arguments, piece):
    """Blocks that are gone through: one at least, for a query that is not finite gives NaN without
    a key too. Known when the kernel is compiled, two blocks take 0.1 µs of 14.2 less (H100)."""
    if arguments.EVEN_BLOCKS > 0:
        return arguments.EVEN_BLOCKS
    elif arguments.HAS_LENS:
        return gl.maximum(piece.num_blocks, 1)
    else:
        return piece.num_blocks


@gluon.jit
def keys_of(arguments, row, piece):
    begin = piece.first_block * BLOCK_KV
    length = list_length(arguments, row) - begin
    if arguments.HAS_LENS:
        length = gl.where(piece.num_blocks > 0, length, 0)
    # how many steps there are, `steps_of` says
    return KeyList(
        arguments.slots_ptr + row.to(gl.int64) * arguments.topk + begin,
        length, arguments.num_slots, 0, arguments.IS_RAGGED,
    )  # fmt: skip
