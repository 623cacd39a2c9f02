"""The loader of a program of `row_decode.py`: queries by TMA, listed cache rows by cp.async."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dsa_bench.kernels.decode_pieces import first_list, has_piece, keys_of, piece_of, steps_of
from dsa_bench.kernels.decode_tiles import GROUPS, STAGES, WIDTH, query_columns
from dsa_bench.kernels.dependent_launch import let_next_launch, wait_for_launch
from dsa_bench.kernels.prefetch_l2 import prefetch_l2
from dsa_bench.kernels.seesaw_loader import BYTES, HALVES, copy_rows
from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_KV,
    LOADER_THREADS,
    ROPE,
    is_key,
    load_key_block,
    opaque_zero,
)
from dsa_bench.kernels.tma_tiles import copy_tile

ROW_BYTES = gl.constexpr(656)
"""512 e4m3, 4 scales in fp32, 64 rope columns in bf16."""
SCALES = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0]))
"""All scales of a row a thread; two warps' copies are those of the other two."""


@gluon.jit
def load(arguments, q_desc, rope_desc, tiles):
    """Piece after piece, its query and then its rows."""
    row = first_list(arguments)
    done = opaque_zero()
    n = opaque_zero()
    # what others read or write hangs on what is loaded here
    wait_for_launch()
    if arguments.IS_ONE_PIECE:
        _load_piece(arguments, row, done, n, q_desc, rope_desc, tiles)
    else:
        while has_piece(arguments, row):
            n = _load_piece(arguments, row, done, n, q_desc, rope_desc, tiles)
            row = row + 1
            done = done + 1
    if arguments.LETS_NEXT:
        let_next_launch()
    async_copy.wait_group(0)


@gluon.jit
def _load_piece(arguments, row, done, n, q_desc, rope_desc, tiles):
    """Piece `done`, whose first block is the program's n-th; the number of the block behind it."""
    ROWS: gl.constexpr = gl.SliceLayout(1, BYTES)
    piece = piece_of(arguments, row)
    keys = keys_of(arguments, row, piece)
    following = load_key_block(keys, 0, ROWS)
    mbarrier.wait(tiles.q_free, (done & 1) ^ 1)
    _load_query(arguments, row, q_desc, rope_desc, tiles)
    steps = steps_of(arguments, piece)
    for i in range(steps):
        if not arguments.IS_ONE_PIECE and i == steps // 2:
            _prefetch_query(arguments, row + 1)
        valid = is_key(following, keys.num_keys)
        rows = gl.where(valid, following, 0)
        # the entries of the next block travel while this one is gathered
        following = load_key_block(keys, gl.minimum(i + 1, steps - 1) * BLOCK_KV, ROWS)
        mbarrier.wait(tiles.k_free.index(n % STAGES), (n // STAGES & 1) ^ 1)
        _load_rows(arguments, rows, valid, tiles, n % STAGES)
        n = n + 1
    return n


@gluon.jit
def _load_rows(arguments, rows, valid, tiles, stage):
    """A block of keys; those that are none become 0, their scales too."""
    copy_rows(
        tiles.k.index(stage), arguments.cache_ptr, ROW_BYTES, rows, valid, 0, WIDTH, BYTES, 16
    )
    rows = gl.convert_layout(rows, gl.SliceLayout(1, HALVES), assert_trivial=True)
    valid = gl.convert_layout(valid, gl.SliceLayout(1, HALVES), assert_trivial=True)
    copy_rows(
        tiles.k_rope.index(stage), arguments.halves_ptr, ROW_BYTES // 2, rows, valid,
        WIDTH // 2 + 2 * GROUPS, ROPE, HALVES,
    )  # fmt: skip
    rows = gl.convert_layout(rows, gl.SliceLayout(1, SCALES))
    valid = gl.convert_layout(valid, gl.SliceLayout(1, SCALES))
    copy_rows(
        tiles.scales.index(stage), arguments.scales_ptr, ROW_BYTES // 4, rows, valid,
        WIDTH // 4, GROUPS, SCALES, 4,
    )  # fmt: skip
    async_copy.mbarrier_arrive(tiles.k_ready.index(stage), increment_count=False)
    tiles.biases.index(stage).store(gl.where(valid, 0.0, -float("inf")))
    mbarrier.arrive(tiles.k_ready.index(stage), count=1)


@gluon.jit
def _load_query(arguments, row, q_desc, rope_desc, tiles):
    """BLOCK_H rows of [queries · num_heads, 576]. Where the query has fewer heads left, the others
    are the next query's, or 0 behind the last: their results are not stored."""
    first_row = row * arguments.num_heads + gl.program_id(0) * arguments.BLOCK_H
    COLUMNS: gl.constexpr = query_columns(arguments.BLOCK_H)
    TILES: gl.constexpr = WIDTH // COLUMNS
    mbarrier.expect(tiles.q_ready, TILES * q_desc.block_type.nbytes + rope_desc.block_type.nbytes)
    for i in gl.static_range(TILES):
        copy_tile(q_desc, [first_row, i * COLUMNS], tiles.q_ready, tiles.q.index(i))
    copy_tile(rope_desc, [first_row, WIDTH], tiles.q_ready, tiles.q_rope.index(0))


@gluon.jit
def _prefetch_query(arguments, row):
    """The lines of the next piece's query, if there is one, to L2, ahead of time: when a piece
    begins, all SMs ask for up to 72 KB at once. H100, 128 heads, batch 128: 354 µs become 347 with
    two queries a sequence."""
    LINE: gl.constexpr = 64
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    head_dim: gl.constexpr = WIDTH + ROPE
    if has_piece(arguments, row):
        first_head = gl.program_id(0) * arguments.BLOCK_H
        first_row = row.to(gl.int64) * arguments.num_heads + first_head
        heads = gl.minimum(arguments.num_heads - first_head, arguments.BLOCK_H)
        for first in range(opaque_zero(), heads * head_dim, LOADER_THREADS * LINE):
            offs = first + gl.arange(0, LOADER_THREADS, THREADS) * LINE
            offs = gl.minimum(offs, heads * head_dim - 1)
            prefetch_l2(arguments.q_ptr + first_row * head_dim + offs)
