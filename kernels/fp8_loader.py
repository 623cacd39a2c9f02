"""The loader of a program of `sparse_prefill_fp8_gluon.py`: queries and listed rows by cp.async."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from dsa_bench.kernels.fp8_tiles import STAGES, WIDTH, keys_of
from dsa_bench.kernels.head_pieces import count_pieces, piece_after
from dsa_bench.kernels.seesaw_loader import BYTES, HALVES, copy_rows
from dsa_bench.kernels.seesaw_tiles import BLOCK_H, BLOCK_KV, ROPE, is_key, load_key_block


@gluon.jit
def load(arguments, tiles):
    """Piece after piece, its query and then its rows."""
    ROWS: gl.constexpr = gl.SliceLayout(1, BYTES)
    LAST: gl.constexpr = arguments.NUM_BLOCKS - 1
    for done in range(count_pieces(arguments.num_pieces)):
        piece = piece_after(done, arguments.num_heads)
        mbarrier.wait(tiles.q_free, (done & 1) ^ 1)
        _load_query(arguments, piece, tiles)
        keys = keys_of(arguments, piece)
        following = load_key_block(keys, 0, ROWS)
        for i in range(arguments.NUM_BLOCKS):
            n = done * arguments.NUM_BLOCKS + i
            valid = is_key(following, keys.num_keys)
            rows = gl.where(valid, following, 0)
            # the entries of the next block travel while this one is gathered
            following = load_key_block(keys, gl.minimum(i + 1, LAST) * BLOCK_KV, ROWS)
            mbarrier.wait(tiles.k_free.index(n % STAGES), (n // STAGES & 1) ^ 1)
            _load_rows(arguments, rows, valid, tiles, n % STAGES)
    async_copy.wait_group(0)


@gluon.jit
def _load_rows(arguments, rows, valid, tiles, stage):
    """A block of keys; those that are none become 0."""
    copy_rows(tiles.k.index(stage), arguments.kv_ptr, WIDTH, rows, valid, 0, WIDTH, BYTES, 16)
    if arguments.HAS_ROPE:
        rows = gl.convert_layout(rows, gl.SliceLayout(1, HALVES), assert_trivial=True)
        valid = gl.convert_layout(valid, gl.SliceLayout(1, HALVES), assert_trivial=True)
        copy_rows(
            tiles.k_rope.index(stage), arguments.k_rope_ptr, ROPE, rows, valid, 0, ROPE, HALVES
        )
    async_copy.mbarrier_arrive(tiles.k_ready.index(stage), increment_count=False)


@gluon.jit
def _load_query(arguments, piece, tiles):
    """Its e4m3 part by cp.async; its rope part through registers, divided by the scales of the
    e4m3 parts, so that both products add up in one accumulator."""
    first_row = piece.row.to(gl.int64) * arguments.num_heads + piece.first_head
    num_heads = arguments.num_heads - piece.first_head
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, BYTES))
    ptr = arguments.q_ptr + first_row * WIDTH
    copy_rows(tiles.q.index(0), ptr, WIDTH, offs_h, offs_h < num_heads, 0, WIDTH, BYTES, 16)
    async_copy.mbarrier_arrive(tiles.q_ready, increment_count=False)
    if arguments.HAS_ROPE:
        kv_scale = gl.load(arguments.kv_scale_ptr)
        # a half at a time: the loader has 40 registers
        for half in gl.static_range(2):
            offs_h = half * 32 + gl.arange(0, 32, gl.SliceLayout(1, HALVES))
            exists = offs_h < num_heads
            offs = offs_h[:, None] * ROPE + gl.arange(0, ROPE, gl.SliceLayout(0, HALVES))[None, :]
            scale = gl.load(arguments.q_scale_ptr + first_row + offs_h, mask=exists, other=1.0)
            ptr = arguments.q_rope_ptr + first_row * ROPE
            rope = gl.load(ptr + offs, mask=exists[:, None], other=0.0).to(gl.float32)
            rope = rope / (scale * kv_scale)[:, None]
            tiles.q_rope.index(0).slice(half * 32, 32, 0).store(rope.to(gl.bfloat16))
        fence_async_shared()
    mbarrier.arrive(tiles.q_ready, count=1)
