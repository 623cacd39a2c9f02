"""Two warpgroups attend to one list of keys: device code of sparse prefill and decode on Hopper.

The consumers are here; `seesaw_tiles.py` has what the roles share, `seesaw_loader.py` the loader
for bf16 rows.

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

A row whose largest score, scaled and in base 2, is beyond 2^30 may end in NaN: its maximum is a
rounded product, which a fused one is subtracted from in the exponent (`online_softmax.py`, where
the difference comes first, for an instruction more a score).

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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_H,
    BLOCK_KV,
    HALF_V,
    K0_LEFT,
    K0_RIGHT,
    K1_LEFT,
    K1_RIGHT,
    LN_2,
    LOG2_E,
    MAX_LEFT_SET,
    MAX_RIGHT_SET,
    NO_MAXIMUM,
    OUTPUT,
    P_LEFT_SET,
    P_RIGHT_SET,
    QUERY_FREE,
    QUERY_READY,
    SCORES,
    is_key,
    load_key_block,
    opaque_zero,
)


@aggregate
class Result:
    """Where one program writes. Offsets are added at the end: a 64-bit pointer kept through the
    loop is spilled."""

    # [rows, 512] bf16 without gaps, or fp32 if IS_PARTIAL; a row is a head of a query
    out_ptr: gl.tensor
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
    for i in range(keys.STEPS):
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
        rows = load_key_block(keys, gl.minimum(i + 1, keys.STEPS - 1) * (2 * BLOCK_KV), COLUMN)
        row_sum = row_sum * beta
        # a register operand must outlive its product, so it passes through the wait
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc_token, p_operand])
        mbarrier.arrive(tiles.free.index(K0_LEFT), count=1)
        acc = acc * gl.convert_layout(beta, OUT_ROW, assert_trivial=True)[:, None]
        wait_at(P_RIGHT_SET)
        acc_token = warpgroup_mma(
            tiles.p_right.index(z), tiles.k_left.index(z + 1), acc, is_async=True
        )
        if i + 1 < keys.STEPS:
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
    for i in range(keys.STEPS):
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
        if i + 1 < keys.STEPS:
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
