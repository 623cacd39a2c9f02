"""How programs share the queries of a prefill chunk: device code.

A piece is one query with 64 of its heads; those of one query stand side by side, so that the
programs that work on them gather the same rows at the same time. A program takes pieces program_id,
program_id + num_programs, …
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate


@aggregate
class Piece:
    row: gl.tensor
    first_head: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row, first_head):
        self.row = row
        self.first_head = first_head


@gluon.jit
def count_pieces(num_pieces):
    """Pieces of this program."""
    return (num_pieces - 1 - gl.program_id(0)) // gl.num_programs(0) + 1


@gluon.jit
def piece_after(done, num_heads):
    """The piece that comes after `done` others of this program."""
    number = gl.program_id(0) + done * gl.num_programs(0)
    head_tiles = (num_heads + 63) // 64
    return Piece(number // head_tiles, number % head_tiles * 64)
