"""The query of a piece of `row_decode.py`, made ready by the scores, which multiply by it, and by
the outputs, which have nothing else to do yet.

Queries become f16, each head multiplied by a power of two that makes its largest number 2^13 to
2^14, for f16 has little range; the head's unit takes it back. Infinity and NaN spoil their head
alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from dsa_bench.kernels.decode_tiles import (
    OUTPUT_WARPS,
    PAIRS_TILE,
    SHARE,
    WIDTH,
    query_columns,
)
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import opaque_zero, seen_as
from dsa_bench.kernels.weight_ring import ALL_THREADS

QUERY_PARTS = gl.constexpr(15)
"""Named barrier at which both tell each other: first the largest numbers, then that all is done."""
ROWS = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))
LARGER_ASM = gl.constexpr(
    "{ .reg .b32 bits; and.b32 bits, $2, 0x7fff7fff; max.u16x2 $0, $1, bits; }"
)
"""Of two bf16 at a time: without their signs they are ordered as their bits are, NaN last."""
TO_F16_ASM = gl.constexpr(
    """{ .reg .b32 x, low, high; mul.bf16x2 x, $1, $2; shl.b32 low, x, 16;
    and.b32 high, x, 0xffff0000; cvt.rn.f16x2.f32 $0, high, low; }"""
)


@gluon.constexpr_function
def rows_of_tile(heads):
    """A query's tile, by the outputs' warps: 32 numbers a thread."""
    warps = OUTPUT_WARPS.value
    return gl.BlockedLayout([1, 16], [8, 4], [heads // 8, 8 * warps // heads], [1, 0])


@gluon.jit
def prepare_columns(tiles, BLOCK_H: gl.constexpr):
    """The outputs' part, of a query that is there: the columns that become f16, in place."""
    COLUMNS: gl.constexpr = query_columns(BLOCK_H)
    LAYOUT: gl.constexpr = rows_of_tile(BLOCK_H)
    largest = gl.zeros([BLOCK_H, COLUMNS], gl.int16, LAYOUT)
    for i in range(opaque_zero(), WIDTH // COLUMNS):
        largest = _larger(largest, tiles.q.index(i).load(LAYOUT))
    exponent = _share_largest(tiles, largest, 0, LAYOUT)
    factor = ((exponent << 23).to(gl.float32, bitcast=True)).to(gl.bfloat16)
    for i in range(opaque_zero(), WIDTH // COLUMNS):
        tile = tiles.q.index(i)
        x = tile.load(LAYOUT)
        factors, x = gl.broadcast(factor[:, None], x)
        x = gl.inline_asm_elementwise(
            TO_F16_ASM, "=r,r,r", [x, factors], dtype=gl.float16, is_pure=True, pack=2
        )
        x = _as_keys(x, BLOCK_H, COLUMNS)
        seen_as(tile, gl.float16, COLUMNS, PAIRS_TILE, BLOCK_H).store(x)
    fence_async_shared()
    arrive_at(QUERY_PARTS, ALL_THREADS)


@gluon.jit
def prepare_rope(tiles, sm_scale_log2):
    """The scores' part: the rope columns, which stay bf16, and the units of all heads. What follows
    must wait for the others at QUERY_PARTS."""
    tile = tiles.q_rope.index(0)
    rope = tile.load(ROWS)
    largest = _larger(gl.zeros_like(rope).to(gl.int16, bitcast=True), rope)
    exponent = _share_largest(tiles, largest, 1, ROWS)
    factor = (exponent << 23).to(gl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    tiles.units.index(0).store(inverse * (sm_scale_log2 / SHARE))
    tile.store(rope * factor.to(gl.bfloat16)[:, None])
    fence_async_shared()


@gluon.jit
def _larger(largest, x):
    """Elementwise the larger of the bits in `largest` and those of |x|."""
    return gl.inline_asm_elementwise(
        LARGER_ASM, "=r,r,r", [largest, x], dtype=gl.int16, is_pure=True, pack=2
    )


@gluon.jit
def _share_largest(tiles, largest, PART: gl.constexpr, LAYOUT: gl.constexpr):
    """A head's power of two, plus 127, from the largest numbers of both parts: [BLOCK_H]."""
    tiles.largest.index(PART).store(gl.max(largest.to(gl.int32), 1))
    wait_at(QUERY_PARTS, ALL_THREADS)
    HEADS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    bits = gl.maximum(tiles.largest.index(0).load(HEADS), tiles.largest.index(1).load(HEADS))
    # not above 2^126, whose inverse is still a normal number
    return gl.minimum(267 - (bits >> 7), 253)


@gluon.jit
def _as_keys(x, BLOCK_H: gl.constexpr, COLUMNS: gl.constexpr):
    """The columns of each 16 in the order in which a product gets those of a key.

    `ldmatrix` gives a thread four bytes of 16 columns, 4c … 4c + 3, where a product wants the
    columns 2c, 2c + 1, 2c + 8, 2c + 9 of it: they are called so, and the query's follow.
    """
    x = gl.permute(gl.reshape(x, [BLOCK_H, COLUMNS // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
    return gl.reshape(x, [BLOCK_H, COLUMNS])
