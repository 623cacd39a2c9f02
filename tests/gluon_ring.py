"""Small Gluon kernels with the pieces of the big ones.

`ring_kernel`: out[64, 64] = Σ x · kv[rows of a tile]ᵀ. A producer partition gathers 64 rows at a
time by cp.async into a ring of two buffers; the default partition multiplies them by `x`, which it
has stored to shared memory itself.

`staging_kernel`: out[i] = 2 · x[i], tile after tile through one buffer, through which each result
goes too before the next tile may land.

`BUG` plants one error of the protocol by name.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

TILE: gl.constexpr = gl.constexpr(64)
NUM_BUFFERS: gl.constexpr = gl.constexpr(2)


@gluon.jit
def _gather(
    kv_ptr, index_ptr, num_rows, tiles, full, empty, NUM_TILES: gl.constexpr, BUG: gl.constexpr
):
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, row_layout))
    cols = gl.arange(0, TILE, gl.SliceLayout(0, row_layout))
    for i in range(NUM_TILES):
        buffer = i % NUM_BUFFERS
        phase = (i // NUM_BUFFERS) & 1
        index = gl.load(index_ptr + i * TILE + rows)
        valid = (index >= 0) & (index < num_rows)
        source = gl.where(valid, index, 0)[:, None] * TILE + cols[None, :]
        if BUG == "wrong_parity":
            mbarrier.wait(empty.index(buffer), phase)
        else:
            mbarrier.wait(empty.index(buffer), phase ^ 1)
        async_copy.async_copy_global_to_shared(
            tiles.index(buffer), kv_ptr + source, mask=valid[:, None]
        )
        async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _multiply(x_tile, out_ptr, tiles, full, empty, NUM_TILES: gl.constexpr, BUG: gl.constexpr):
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc = warpgroup_mma_init(gl.zeros([TILE, TILE], gl.float32, acc_layout))
    for i in range(NUM_TILES):
        buffer = i % NUM_BUFFERS
        if BUG != "missing_wait":
            mbarrier.wait(full.index(buffer), (i // NUM_BUFFERS) & 1)
        acc = warpgroup_mma(x_tile, tiles.index(buffer).permute((1, 0)), acc, is_async=True)
        if BUG == "early_free":
            mbarrier.arrive(empty.index(buffer), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        acc = warpgroup_mma_init(acc)
        if BUG != "early_free" and BUG != "missing_arrive":
            mbarrier.arrive(empty.index(buffer), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, acc_layout))
    cols = gl.arange(0, TILE, gl.SliceLayout(0, acc_layout))
    gl.store(out_ptr + rows[:, None] * TILE + cols[None, :], acc)


@gluon.jit
def ring_kernel(
    x_ptr, kv_ptr, index_ptr, out_ptr, num_rows, NUM_TILES: gl.constexpr, BUG: gl.constexpr
):
    """One program: all of it. index_ptr: NUM_TILES · 64 int32; out of range gives a row of 0."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x_tile = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], tile_layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [NUM_BUFFERS, TILE, TILE], tile_layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_BUFFERS):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    rows = gl.arange(0, TILE, gl.SliceLayout(1, load_layout))
    cols = gl.arange(0, TILE, gl.SliceLayout(0, load_layout))
    x_tile.store(gl.load(x_ptr + rows[:, None] * TILE + cols[None, :]))
    if BUG != "missing_fence":
        fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (x_tile, out_ptr, tiles, full, empty, NUM_TILES, BUG)),
            (_gather, (kv_ptr, index_ptr, num_rows, tiles, full, empty, NUM_TILES, BUG)),
        ],
        [4],
        [40],
    )


@gluon.jit
def _fill(x_ptr, tile, full, empty, NUM_TILES: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    cols = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    for i in range(NUM_TILES):
        mbarrier.wait(empty, (i & 1) ^ 1)
        source = x_ptr + (i * TILE + rows)[:, None] * TILE + cols[None, :]
        async_copy.async_copy_global_to_shared(tile, source)
        async_copy.mbarrier_arrive(full, increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _double(out_ptr, tile, full, empty, NUM_TILES: gl.constexpr, BUG: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    cols = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    for i in range(NUM_TILES):
        mbarrier.wait(full, i & 1)
        value = tile.load(layout)
        if BUG == "early_free":
            mbarrier.arrive(empty, count=1)
        tile.store(value + value)
        target = out_ptr + (i * TILE + rows)[:, None] * TILE + cols[None, :]
        gl.store(target, tile.load(layout))
        if BUG != "early_free":
            mbarrier.arrive(empty, count=1)


@gluon.jit
def staging_kernel(x_ptr, out_ptr, NUM_TILES: gl.constexpr, BUG: gl.constexpr):
    """One program. x, out: [NUM_TILES · 64, 64] bf16."""
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tile = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], tile_layout)
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full, empty = barriers.index(0), barriers.index(1)
    mbarrier.init(full, count=128)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (_double, (out_ptr, tile, full, empty, NUM_TILES, BUG)),
            (_fill, (x_ptr, tile, full, empty, NUM_TILES)),
        ],
        [4],
        [40],
    )
