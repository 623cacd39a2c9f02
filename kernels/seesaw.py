"""Two warpgroups attend to one list of keys: device code of sparse prefill and decode on Hopper.

One piece of work: one query, 64 of its heads, the whole key list in pairs of 64-key blocks. Three
roles:

    left    4 warps   scores block 0 of a pair, owns output columns   0..255
    right   4 warps   scores block 1 of a pair, owns output columns 256..511
    loader  4 warps   brings the query and the listed rows into shared memory

    per pair   left                                   right
               S0 = Q·K0ᵀ, m0 = max → max_left        S1 = Q·K1ᵀ, wait for m0, m1 = max → max_right
               O_L += P0·V0[left]   (P0 in registers) O_R += P1·V1[right]   (P1 in registers)
               P0 rescaled to m1 → over K0's rope     P1 → p_right
               O_L += P1·V1[left]                     O_R += P0·V0[right]

So each warpgroup holds half of O (64 × 256 fp32 = 128 registers a thread) and the score work is
split evenly; the scheme is the one that FlashMLA's documentation describes as "seesaw". Buffers
are freed by halves, therefore two blocks behave like four. Shared memory: Q 72 KB, two blocks of
K 144 KB, P1 8 KB: 225 of 227 KB.

A program may take several pieces: `queries_before` and `pairs_before` count what it has done, for
the parity of its barriers. The query tiles are free once the last scores are made, and the result
leaves through block 1's tiles: so the loader brings the next query and block 0's left half
meanwhile, and then waits for block 1's right half (a piece of one pair takes 10.0 µs on an H100,
and 12.3 µs in a program of its own).

What the compiler (Triton 3.6) makes necessary:
* Shared-memory buffers are indexed by `opaque_zero()` inside loops. With constant addresses LLVM
  hoists all 72 wgmma descriptors out of the loop, and they are spilled (1,064 bytes).
* The handshakes between the warpgroups are hardware named barriers: every mbarrier operation
  costs a bar.sync of the whole partition, a named barrier needs none because all 256 threads
  take part.
* The new maximum is read back from shared memory after its barrier; otherwise ptxas moves 250
  instructions of exponentials in front of the arrival that the other warpgroup waits for (607 →
  631 TFLOP/s, H100, 8K keys).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

# triton 3.9 renamed the copy
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

BLOCK_H = gl.constexpr(64)
"""Heads of a program: the M of one wgmma."""
BLOCK_KV = gl.constexpr(64)
HALF_V = gl.constexpr(256)
ROPE = gl.constexpr(64)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
INT_MIN = gl.constexpr(-(2**31))
NO_MAXIMUM = gl.constexpr(-1e30)
"""Running maximum of a row without a key; finite, so that differences of two of them are 0 and
not NaN."""

# 0 and 1 and one for each worker are the compiler's
MAX_LEFT_SET = gl.constexpr(8)
MAX_RIGHT_SET = gl.constexpr(9)
P_LEFT_SET = gl.constexpr(10)
P_RIGHT_SET = gl.constexpr(11)

# mbarriers of the four half blocks
K0_LEFT = gl.constexpr(0)
K0_RIGHT = gl.constexpr(1)
K1_LEFT = gl.constexpr(2)
K1_RIGHT = gl.constexpr(3)
# and of the query
QUERY_READY = gl.constexpr(0)
QUERY_FREE = gl.constexpr(1)

LOADER_THREADS = gl.constexpr(128)

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
"""Accumulator layouts of one warpgroup: 64 × 64 scores, 64 × 256 outputs."""


@aggregate
class Tiles:
    """Shared memory of one program, and its barriers."""

    q_left: gl.shared_memory_descriptor  # [1, BLOCK_H, HALF_V]
    q_right: gl.shared_memory_descriptor
    q_rope: gl.shared_memory_descriptor  # [1, BLOCK_H, ROPE]
    k_left: gl.shared_memory_descriptor  # [2, BLOCK_KV, HALF_V]
    k_right: gl.shared_memory_descriptor
    k_rope: (
        gl.shared_memory_descriptor
    )  # [2, BLOCK_KV, ROPE]; block 0's also takes P0, for K0's is dead by then
    p_right: gl.shared_memory_descriptor  # [1, BLOCK_H, BLOCK_KV]
    max_left: gl.shared_memory_descriptor  # [BLOCK_H] fp32, as the next three
    max_right: gl.shared_memory_descriptor
    sum_left: gl.shared_memory_descriptor
    sum_right: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor  # mbarriers K0_LEFT … K1_RIGHT: the half block is filled
    free: gl.shared_memory_descriptor  # the same: its readers are done
    sums: gl.shared_memory_descriptor  # mbarriers: sum_left is set, sum_right is set
    query: gl.shared_memory_descriptor  # mbarriers: the query is there, its readers are done
    HAS_ROPE: gl.constexpr  # keys of 576 columns, not of 512

    @gluon.constexpr_function
    def __init__(
        self, q_left, q_right, q_rope, k_left, k_right, k_rope, p_right,
        max_left, max_right, sum_left, sum_right, ready, free, sums, query, HAS_ROPE,
    ):  # fmt: skip
        self.q_left = q_left
        self.q_right = q_right
        self.q_rope = q_rope
        self.k_left = k_left
        self.k_right = k_right
        self.k_rope = k_rope
        self.p_right = p_right
        self.max_left = max_left
        self.max_right = max_right
        self.sum_left = sum_left
        self.sum_right = sum_right
        self.ready = ready
        self.free = free
        self.sums = sums
        self.query = query
        self.HAS_ROPE = gl.constexpr(HAS_ROPE)


@aggregate
class Query:
    """64 heads of one query."""

    ptr: gl.tensor  # [heads, 576 or 512] bf16, at the program's first head
    stride_head: gl.tensor
    num_heads: gl.tensor  # from the first head on; only looked at where HEADS_MASKED
    HEADS_MASKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, stride_head, num_heads, HEADS_MASKED):
        self.ptr = ptr
        self.stride_head = stride_head
        self.num_heads = num_heads
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)


@aggregate
class KeyList:
    """The keys of one program: int32 row numbers, of which those outside 0 … num_keys - 1 are
    skipped."""

    ptr: gl.tensor
    length: gl.tensor  # entries that count; only looked at where IS_RAGGED
    num_keys: gl.tensor
    NUM_PAIRS: (
        gl.constexpr
    )  # pairs of blocks to walk; a trip count known at run time alone makes ptxas spill
    IS_RAGGED: gl.constexpr  # length is not a multiple of 128, or differs by row

    @gluon.constexpr_function
    def __init__(self, ptr, length, num_keys, NUM_PAIRS, IS_RAGGED):
        self.ptr = ptr
        self.length = length
        self.num_keys = num_keys
        self.NUM_PAIRS = gl.constexpr(NUM_PAIRS)
        self.IS_RAGGED = gl.constexpr(IS_RAGGED)


@aggregate
class Result:
    """Where one program writes. Offsets are added at the end: a 64-bit pointer kept through the
    loop is spilled."""

    out_ptr: (
        gl.tensor
    )  # [rows, 512] bf16 without gaps, or fp32 if IS_PARTIAL; a row is a head of a query
    lse_ptr: gl.tensor  # [rows] fp32
    max_ptr: gl.tensor  # [rows] fp32, used if HAS_MAX
    sink_ptr: gl.tensor  # [num_heads] fp32, used if HAS_SINK
    first_row: gl.tensor
    first_head: gl.tensor
    num_heads: gl.tensor  # only looked at where HEADS_MASKED
    IS_PARTIAL: gl.constexpr  # a split: fp32 output, lse in log2 units and -inf when empty, no sink
    HAS_MAX: gl.constexpr
    HAS_SINK: gl.constexpr
    HEADS_MASKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, out_ptr, lse_ptr, max_ptr, sink_ptr, first_row, first_head, num_heads,
        IS_PARTIAL, HAS_MAX, HAS_SINK, HEADS_MASKED,
    ):  # fmt: skip
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.max_ptr = max_ptr
        self.sink_ptr = sink_ptr
        self.first_row = first_row
        self.first_head = first_head
        self.num_heads = num_heads
        self.IS_PARTIAL = gl.constexpr(IS_PARTIAL)
        self.HAS_MAX = gl.constexpr(HAS_MAX)
        self.HAS_SINK = gl.constexpr(HAS_SINK)
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)


@gluon.constexpr_function
def barrier_asm(kind, number):
    """Both warpgroups take part: 256 threads. An asm must have a result, hence the mov."""
    return f"bar.{kind} {number}, 256; mov.b32 $0, 0;"


@gluon.jit
def arrive_at(BARRIER: gl.constexpr):
    """Tell the other warpgroup, without waiting for it."""
    gl.inline_asm_elementwise(
        barrier_asm("arrive", BARRIER), "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_at(BARRIER: gl.constexpr):
    """Wait until the other warpgroup has arrived."""
    gl.inline_asm_elementwise(
        barrier_asm("sync", BARRIER), "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def opaque_zero():
    """0, which the compiler cannot see; the module docstring says why."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def allocate_tiles(
    LOADER_ARRIVALS: gl.constexpr, ROPE_ARRIVALS: gl.constexpr, HAS_ROPE: gl.constexpr
):
    """Shared memory with barriers that expect these arrivals at a left half, and at a right half
    with rope."""
    q_left = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, HALF_V], TILE)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, HALF_V], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, ROPE], TILE)
    k_left = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_KV, HALF_V], TILE)
    k_right = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_KV, HALF_V], TILE)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_KV, ROPE], TILE)
    p_right = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, BLOCK_KV], TILE)
    max_left = gl.allocate_shared_memory(gl.float32, [BLOCK_H], VECTOR)
    max_right = gl.allocate_shared_memory(gl.float32, [BLOCK_H], VECTOR)
    sum_left = gl.allocate_shared_memory(gl.float32, [BLOCK_H], VECTOR)
    sum_right = gl.allocate_shared_memory(gl.float32, [BLOCK_H], VECTOR)
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    sums = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(query.index(QUERY_READY), count=LOADER_THREADS)
    mbarrier.init(query.index(QUERY_FREE), count=2)
    for j in gl.static_range(2):
        mbarrier.init(ready.index(2 * j), count=LOADER_ARRIVALS)
        mbarrier.init(ready.index(2 * j + 1), count=ROPE_ARRIVALS)
        mbarrier.init(sums.index(j), count=1)
    for j in gl.static_range(4):
        mbarrier.init(free.index(j), count=1)
    return Tiles(
        q_left, q_right, q_rope, k_left, k_right, k_rope, p_right,
        max_left, max_right, sum_left, sum_right, ready, free, sums, query, HAS_ROPE,
    )  # fmt: skip


@gluon.jit
def load_query(query, tiles, queries_before):
    """The query tiles by cp.async, by four warps; heads that do not exist become 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(tiles.query.index(QUERY_FREE), (queries_before & 1) ^ 1)
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))
    exists = offs_h >= 0
    if query.HEADS_MASKED:
        exists = offs_h < query.num_heads
    ptr, stride = query.ptr, query.stride_head
    copy_rows(tiles.q_left.index(0), ptr, stride, offs_h, exists, 0, HALF_V, LAYOUT)
    copy_rows(tiles.q_right.index(0), ptr, stride, offs_h, exists, HALF_V, HALF_V, LAYOUT)
    if tiles.HAS_ROPE:
        copy_rows(tiles.q_rope.index(0), ptr, stride, offs_h, exists, 2 * HALF_V, ROPE, LAYOUT)
    async_copy.mbarrier_arrive(tiles.query.index(QUERY_READY), increment_count=False)


@gluon.jit
def load_key_block(keys, first, LAYOUT: gl.constexpr):
    """Entries first … first + 63 of the list; -1 behind its end."""
    offs = first + gl.arange(0, BLOCK_KV, LAYOUT)
    if keys.IS_RAGGED:
        return gl.load(keys.ptr + offs, mask=offs < keys.length, other=-1)
    else:
        return gl.load(keys.ptr + offs)


@gluon.jit
def is_key(rows, num_keys):
    """0 <= rows < num_keys, by one comparison of unsigned numbers."""
    return (rows ^ INT_MIN) < (num_keys ^ INT_MIN)


@gluon.jit
def copy_rows(
    tile,
    kv_ptr,
    stride_row,
    rows,
    valid,
    FIRST: gl.constexpr,
    WIDTH: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Columns FIRST … of the rows -> tile [64, WIDTH], by cp.async of 16 bytes a thread; 0 where
    not valid."""
    offs_d = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    offs_d = gl.max_contiguous(gl.multiple_of(offs_d, 8), 8)
    ptrs = kv_ptr + (rows.to(gl.int64) * stride_row)[:, None] + offs_d[None, :]
    copy_to_shared(tile, ptrs, mask=valid[:, None])


@gluon.jit
def load_bf16_rows(kv_ptr, stride_row, keys, tiles, pairs_before):
    """The loader for bf16 rows: half blocks in the order in which the consumers touch them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    next0 = load_key_block(keys, 0, ROWS)
    next1 = load_key_block(keys, BLOCK_KV, ROWS)
    for i in range(keys.NUM_PAIRS):
        phase = ((pairs_before + i) & 1) ^ 1
        valid0 = is_key(next0, keys.num_keys)
        valid1 = is_key(next1, keys.num_keys)
        rows0 = gl.where(valid0, next0, 0)
        rows1 = gl.where(valid1, next1, 0)
        # the indices of the next pair travel while this one is gathered
        following = gl.minimum(i + 1, keys.NUM_PAIRS - 1) * (2 * BLOCK_KV)
        next0 = load_key_block(keys, following, ROWS)
        next1 = load_key_block(keys, following + BLOCK_KV, ROWS)
        _load_left(kv_ptr, stride_row, rows0, valid0, tiles, phase, 0, K0_LEFT)
        _load_right(kv_ptr, stride_row, rows1, valid1, tiles, phase, 1, K1_RIGHT)
        _load_right(kv_ptr, stride_row, rows0, valid0, tiles, phase, 0, K0_RIGHT)
        _load_left(kv_ptr, stride_row, rows1, valid1, tiles, phase, 1, K1_LEFT)


@gluon.jit
def _load_left(
    kv_ptr, stride_row, rows, valid, tiles, phase, BLOCK: gl.constexpr, BARRIER: gl.constexpr
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(tiles.free.index(BARRIER), phase)
    copy_rows(tiles.k_left.index(BLOCK), kv_ptr, stride_row, rows, valid, 0, HALF_V, LAYOUT)
    async_copy.mbarrier_arrive(tiles.ready.index(BARRIER), increment_count=False)


@gluon.jit
def _load_right(
    kv_ptr, stride_row, rows, valid, tiles, phase, BLOCK: gl.constexpr, BARRIER: gl.constexpr
):
    """With the rope columns."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(tiles.free.index(BARRIER), phase)
    copy_rows(tiles.k_right.index(BLOCK), kv_ptr, stride_row, rows, valid, HALF_V, HALF_V, LAYOUT)
    if tiles.HAS_ROPE:
        copy_rows(
            tiles.k_rope.index(BLOCK), kv_ptr, stride_row, rows, valid, 2 * HALF_V, ROPE, LAYOUT
        )
    async_copy.mbarrier_arrive(tiles.ready.index(BARRIER), increment_count=False)


@gluon.jit
def attend_left(tiles, keys, result, qk_scale_log2, pairs_before, queries_before):
    """Scores block 0 of each pair; output columns 0..255."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    row_max = gl.full([BLOCK_H], NO_MAXIMUM, gl.float32, ROW)
    row_sum = gl.zeros([BLOCK_H], gl.float32, ROW)
    acc = gl.zeros([BLOCK_H, HALF_V], gl.float32, OUTPUT)
    no_scores = gl.zeros([BLOCK_H, BLOCK_KV], gl.float32, SCORES)
    rows = load_key_block(keys, 0, COLUMN)

    z = opaque_zero()
    mbarrier.wait(tiles.query.index(QUERY_READY), queries_before & 1)
    mbarrier.wait(tiles.ready.index(K0_LEFT), pairs_before & 1)
    s = warpgroup_mma(
        tiles.q_left.index(z),
        tiles.k_left.index(z).permute((1, 0)),
        no_scores,
        use_acc=False,
        is_async=True,
    )
    mbarrier.wait(tiles.ready.index(K0_RIGHT), pairs_before & 1)
    s = warpgroup_mma(
        tiles.q_right.index(z), tiles.k_right.index(z).permute((1, 0)), s, is_async=True
    )
    if tiles.HAS_ROPE:
        s = warpgroup_mma(
            tiles.q_rope.index(z), tiles.k_rope.index(z).permute((1, 0)), s, is_async=True
        )
    s = warpgroup_mma_wait(0, deps=[s])
    for i in range(keys.NUM_PAIRS):
        phase = (pairs_before + i) & 1
        z = opaque_zero()
        s = gl.where(is_key(rows, keys.num_keys)[None, :], s, -float("inf"))
        own_max = gl.maximum(row_max, gl.max(s, 1) * qk_scale_log2)
        tiles.max_left.store(own_max)
        arrive_at(MAX_LEFT_SET)
        own_max = tiles.max_left.load(ROW)
        alpha = gl.exp2(row_max - own_max)
        p = gl.exp2(s * qk_scale_log2 - own_max[:, None])
        acc = acc * gl.convert_layout(alpha, OUT_ROW, assert_trivial=True)[:, None]
        p_operand = gl.convert_layout(p.to(gl.bfloat16), P_OPERAND, assert_trivial=True)
        acc_token = warpgroup_mma(p_operand, tiles.k_left.index(z), acc, is_async=True)
        row_sum = row_sum * alpha + gl.sum(p, 1)

        wait_at(MAX_RIGHT_SET)
        row_max = tiles.max_right.load(ROW)
        beta = gl.exp2(own_max - row_max)
        tiles.k_rope.index(0).store((p * beta[:, None]).to(gl.bfloat16))
        fence_async_shared()
        arrive_at(P_LEFT_SET)
        # behind the last use of p: 16 registers less at the peak
        rows = load_key_block(keys, gl.minimum(i + 1, keys.NUM_PAIRS - 1) * (2 * BLOCK_KV), COLUMN)
        row_sum = row_sum * beta
        # a register operand must outlive its product, so it passes through the wait
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc_token, p_operand])
        mbarrier.arrive(tiles.free.index(K0_LEFT), count=1)
        acc = acc * gl.convert_layout(beta, OUT_ROW, assert_trivial=True)[:, None]
        wait_at(P_RIGHT_SET)
        acc_token = warpgroup_mma(
            tiles.p_right.index(z), tiles.k_left.index(z + 1), acc, is_async=True
        )
        if i + 1 < keys.NUM_PAIRS:
            mbarrier.wait(tiles.ready.index(K0_LEFT), phase ^ 1)
            s_token = warpgroup_mma(
                tiles.q_left.index(z), tiles.k_left.index(z).permute((1, 0)), no_scores,
                use_acc=False, is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=[acc_token])
            mbarrier.arrive(tiles.free.index(K1_LEFT), count=1)
            mbarrier.wait(tiles.ready.index(K0_RIGHT), phase ^ 1)
            s_token = warpgroup_mma(
                tiles.q_right.index(z),
                tiles.k_right.index(z).permute((1, 0)),
                s_token,
                is_async=True,
            )
            if tiles.HAS_ROPE:
                s_token = warpgroup_mma(
                    tiles.q_rope.index(z),
                    tiles.k_rope.index(z).permute((1, 0)),
                    s_token,
                    is_async=True,
                )
            s = warpgroup_mma_wait(0, deps=[s_token])
        else:
            mbarrier.arrive(tiles.query.index(QUERY_FREE), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
    tiles.sum_left.store(row_sum)
    mbarrier.arrive(tiles.sums.index(0), count=1)
    mbarrier.wait(tiles.sums.index(1), queries_before & 1)
    row_sum = row_sum + tiles.sum_right.load(ROW)
    _store_output(result, acc, row_max, row_sum, tiles.k_left.index(1), 0)
    mbarrier.arrive(tiles.free.index(K1_LEFT), count=1)


@gluon.jit
def attend_right(tiles, keys, result, qk_scale_log2, pairs_before, queries_before):
    """Scores block 1 of each pair; output columns 256..511; writes lse and maximum."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    row_max = gl.full([BLOCK_H], NO_MAXIMUM, gl.float32, ROW)
    row_sum = gl.zeros([BLOCK_H], gl.float32, ROW)
    acc = gl.zeros([BLOCK_H, HALF_V], gl.float32, OUTPUT)
    no_scores = gl.zeros([BLOCK_H, BLOCK_KV], gl.float32, SCORES)
    mbarrier.wait(tiles.query.index(QUERY_READY), queries_before & 1)
    for i in range(keys.NUM_PAIRS):
        phase = (pairs_before + i) & 1
        z = opaque_zero()
        rows = load_key_block(keys, i * (2 * BLOCK_KV) + BLOCK_KV, COLUMN)
        mbarrier.wait(tiles.ready.index(K1_RIGHT), phase)
        s = warpgroup_mma(
            tiles.q_right.index(z), tiles.k_right.index(z + 1).permute((1, 0)), no_scores,
            use_acc=False, is_async=True,
        )  # fmt: skip
        if tiles.HAS_ROPE:
            s = warpgroup_mma(
                tiles.q_rope.index(z), tiles.k_rope.index(z + 1).permute((1, 0)), s, is_async=True
            )
        mbarrier.wait(tiles.ready.index(K1_LEFT), phase)
        s = warpgroup_mma(
            tiles.q_left.index(z), tiles.k_left.index(z + 1).permute((1, 0)), s, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where(is_key(rows, keys.num_keys)[None, :], s, -float("inf"))
        own_max = gl.max(s, 1) * qk_scale_log2

        wait_at(MAX_LEFT_SET)
        tiles.max_right.store(gl.maximum(tiles.max_left.load(ROW), own_max))
        arrive_at(MAX_RIGHT_SET)
        new_max = tiles.max_right.load(ROW)
        alpha = gl.exp2(row_max - new_max)
        row_max = new_max
        p = gl.exp2(s * qk_scale_log2 - row_max[:, None])
        p_bf16 = p.to(gl.bfloat16)
        p_operand = gl.convert_layout(p_bf16, P_OPERAND, assert_trivial=True)
        acc = acc * gl.convert_layout(alpha, OUT_ROW, assert_trivial=True)[:, None]
        acc = warpgroup_mma(p_operand, tiles.k_right.index(z + 1), acc, is_async=True)
        row_sum = row_sum * alpha + gl.sum(p, 1)
        tiles.p_right.index(0).store(p_bf16)
        fence_async_shared()
        arrive_at(P_RIGHT_SET)

        wait_at(P_LEFT_SET)
        acc = warpgroup_mma(tiles.k_rope.index(z), tiles.k_right.index(z), acc, is_async=True)
        acc, p_operand = warpgroup_mma_wait(1, deps=[acc, p_operand])
        if i + 1 < keys.NUM_PAIRS:
            mbarrier.arrive(tiles.free.index(K1_RIGHT), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(tiles.free.index(K0_RIGHT), count=1)
    mbarrier.arrive(tiles.query.index(QUERY_FREE), count=1)
    tiles.sum_right.store(row_sum)
    mbarrier.arrive(tiles.sums.index(1), count=1)
    mbarrier.wait(tiles.sums.index(0), queries_before & 1)
    row_sum = row_sum + tiles.sum_left.load(ROW)
    _store_output(result, acc, row_max, row_sum, tiles.k_right.index(1), HALF_V)
    mbarrier.arrive(tiles.free.index(K1_RIGHT), count=1)
    _store_statistics(result, row_max, row_sum)


@gluon.jit
def _store_output(result, acc, row_max, row_sum, staging, FIRST: gl.constexpr):
    """acc / Σ -> columns FIRST … of the output; the sink joins the denominator."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    denominator = row_sum
    if result.HAS_SINK:
        offs_h = result.first_head + gl.arange(0, BLOCK_H, ROW)
        sink = gl.load(result.sink_ptr + offs_h, mask=offs_h < result.num_heads, other=0.0)
        denominator = row_sum + gl.exp2(sink * LOG2_E - row_max)
    # == 0 and not > 0, here and below: NaN of a key must show
    factor = gl.where(row_sum == 0, 0.0, 1.0 / denominator)
    acc = acc * gl.convert_layout(factor, OUT_ROW)[:, None]
    if result.IS_PARTIAL:
        _store_rows(result, acc, OUTPUT, FIRST)
    else:
        # through a key tile that is dead until its barrier says free, so that a thread stores
        # 16 bytes
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        staging.store(acc.to(gl.bfloat16))
        # before the next gather into it is multiplied
        fence_async_shared()
        _store_rows(result, staging.load(LAYOUT), LAYOUT, FIRST)


@gluon.jit
def _store_rows(result, values, LAYOUT: gl.constexpr, FIRST: gl.constexpr):
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, LAYOUT))
    offs_d = FIRST + gl.arange(0, HALF_V, gl.SliceLayout(0, LAYOUT))
    out_ptr = result.out_ptr + result.first_row.to(gl.int64) * (2 * HALF_V)
    ptrs = out_ptr + offs_h[:, None] * (2 * HALF_V) + offs_d[None, :]
    if result.HEADS_MASKED:
        gl.store(ptrs, values, mask=(result.first_head + offs_h < result.num_heads)[:, None])
    else:
        gl.store(ptrs, values)


@gluon.jit
def _store_statistics(result, row_max, row_sum):
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, SCORES))
    exists = result.first_head + offs_h < result.num_heads
    offs_row = result.first_row + offs_h
    log2_sum = row_max + gl.log2(row_sum)
    if result.IS_PARTIAL:
        lse = gl.where(row_sum == 0, -float("inf"), log2_sum)
    else:
        lse = gl.where(row_sum == 0, float("inf"), log2_sum * LN_2)
    gl.store(result.lse_ptr + offs_row, lse, mask=exists)
    if result.HAS_MAX:
        # log2 of no sum is -inf, of NaN it is NaN
        max_logits = gl.where(row_sum > 0, row_max * LN_2, log2_sum)
        gl.store(result.max_ptr + offs_row, max_logits, mask=exists)
