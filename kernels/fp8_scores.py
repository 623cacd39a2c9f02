"""The scores warpgroup of a program of `sparse_prefill_fp8_gluon.py`: products of queries and keys,
softmax, weights in e4m3.

It starts the product of the next block before it makes the weights of this one, so that the tensor
cores have that to do meanwhile. What it takes a block binds the kernel: exponentials, and the
latency from the last of them to the outputs, which wait an eighth of the time.

A row whose largest score, scaled and in base 2, is beyond 2^24 may have weights above 448, which
e4m3 cuts off and their sum does not: its maximum is a rounded product, which a fused one is
subtracted from in the exponent (`online_softmax.py` takes the difference first).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.fp8_tiles import (
    ROPE_SCORES,
    SCORES,
    STAGES,
    keys_of,
)
from dsa_bench.kernels.head_pieces import count_pieces, piece_after
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_H,
    BLOCK_KV,
    LN_2,
    LOG2_E,
    NO_MAXIMUM,
    is_key,
    load_key_block,
    opaque_zero,
)
from dsa_bench.kernels.weight_ring import (
    ALL_THREADS,
    ENTRY_FREE,
    LEFT_READY,
    READY_THREADS,
    RIGHT_READY,
    RING,
)

WEIGHT_SHIFT = gl.constexpr(4.0)
"""Weights are multiplied by 2^4, so that small ones are not lost in e4m3, ..."""
SLACK = gl.constexpr(4.0)
"""... whose largest is 448: a maximum may be passed by a factor of 2^4 before it is set anew, and
the outputs with it. So they are rescaled once or twice a piece instead of at nearly each block."""
MANY = gl.constexpr(4)
"""Groups of products that a wait for nothing leaves unfinished: more than there are."""
LANE_SUMS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)
"""What a thread has of the rows of SCORES, added up: [heads, the four threads of a row]."""


@gluon.jit
def score(arguments, tiles):
    """Piece after piece: a block's weights and factor -> ring; at the end the last factor, and
    maximum and logarithm to memory."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    LAST: gl.constexpr = arguments.NUM_BLOCKS - 1
    kv_scale = gl.load(arguments.kv_scale_ptr)
    for done in range(count_pieces(arguments.num_pieces)):
        piece = piece_after(done, arguments.num_heads)
        keys = keys_of(arguments, piece)
        offs_h = piece.first_head + gl.arange(0, BLOCK_H, ROW)
        offs_row = piece.row * arguments.num_heads + offs_h
        exists = offs_h < arguments.num_heads
        scale = gl.load(arguments.q_scale_ptr + offs_row, mask=exists, other=1.0)
        scale = scale * kv_scale * arguments.sm_scale_log2
        largest = gl.full([BLOCK_H], NO_MAXIMUM, gl.float32, ROW)
        reference = largest
        sums = gl.zeros([BLOCK_H, 4], gl.float32, LANE_SUMS)
        all_valid = _are_all_keys(keys)
        first = done * arguments.NUM_BLOCKS
        entry = first + done
        mbarrier.wait(tiles.q_ready, done & 1)
        s = warpgroup_mma_wait(0, deps=[_start_scores(arguments, tiles, first)])
        for i in range(LAST):
            if not all_valid:
                s = _hide_invalid(keys, i * BLOCK_KV, s)
            mbarrier.arrive(tiles.k_free.index((first + i) % STAGES), count=1)
            following = _start_scores(arguments, tiles, first + i + 1)
            largest, reference, sums = _weigh(s, scale, largest, reference, sums, tiles, entry + i)
            s = warpgroup_mma_wait(0, deps=[following])
        if not all_valid:
            s = _hide_invalid(keys, LAST * BLOCK_KV, s)
        mbarrier.arrive(tiles.k_free.index((first + LAST) % STAGES), count=1)
        mbarrier.arrive(tiles.q_free, count=1)
        largest, reference, sums = _weigh(s, scale, largest, reference, sums, tiles, entry + LAST)
        row_sum = gl.convert_layout(gl.sum(sums, 1), ROW)
        # worked out anew: kept through the loop, row and offsets are spilled
        piece = piece_after(done + opaque_zero(), arguments.num_heads)
        _finish(arguments, tiles, entry + LAST + 1, largest, reference, row_sum, kv_scale, piece)
    for slot in gl.static_range(RING):
        wait_at(ENTRY_FREE + slot, ALL_THREADS)


@gluon.jit
def _start_scores(arguments, tiles, n):
    """Q · Kᵀ of block n, not waited for."""
    stage = n % STAGES
    z = opaque_zero()
    k = tiles.k.index(stage).permute((1, 0))
    mbarrier.wait(tiles.k_ready.index(stage), n // STAGES & 1)
    if arguments.HAS_ROPE:
        none = gl.zeros([BLOCK_H, BLOCK_KV], gl.float32, ROPE_SCORES)
        k_rope = tiles.k_rope.index(stage).permute((1, 0))
        s = warpgroup_mma(tiles.q_rope.index(z), k_rope, none, use_acc=False, is_async=True)
        # waits for nothing: it makes the token a tensor, whose layout may be called another
        s = gl.convert_layout(warpgroup_mma_wait(MANY, deps=[s]), SCORES, assert_trivial=True)
        return warpgroup_mma(tiles.q.index(z), k, s, is_async=True)
    else:
        none = gl.zeros([BLOCK_H, BLOCK_KV], gl.float32, SCORES)
        return warpgroup_mma(tiles.q.index(z), k, none, use_acc=False, is_async=True)


@gluon.jit
def _weigh(s, scale, largest, reference, sums, tiles, entry):
    """P = 2^(scale · S - reference + WEIGHT_SHIFT) -> ring.

    Returns the largest score so far, the reference, which follows it by steps of SLACK and more,
    and Σ P.
    """
    largest = gl.maximum(largest, gl.max(s, 1) * scale)
    new_reference = gl.where(largest > reference + SLACK, largest, reference)
    factor = gl.exp2(reference - new_reference)
    p = gl.exp2(s * scale[:, None] - (new_reference - WEIGHT_SHIFT)[:, None])
    slot = entry % RING
    if entry >= RING:
        wait_at(ENTRY_FREE + slot, ALL_THREADS)
    tiles.factors.index(slot).store(factor)
    tiles.weights.index(slot).store(_as_loaded(p.to(gl.float8e4nv)))
    # between the stores and the fence that waits for them
    lane_factor = gl.convert_layout(factor, gl.SliceLayout(1, LANE_SUMS), assert_trivial=True)
    sums = sums * lane_factor[:, None] + _lane_sums(p)
    fence_async_shared()
    arrive_at(LEFT_READY + slot, READY_THREADS)
    arrive_at(RIGHT_READY + slot, READY_THREADS)
    return largest, new_reference, sums


@gluon.jit
def _as_loaded(p):
    """Keys in the order in which the values have them, of each 16: 0 1 8 9 2 3 10 11 …"""
    p = gl.reshape(p, [BLOCK_H, BLOCK_KV // 16, 2, 4, 2])
    return gl.reshape(gl.permute(p, [0, 1, 3, 2, 4]), [BLOCK_H, BLOCK_KV])


@gluon.jit
def _lane_sums(p):
    """[64, 4]: what each thread has of a row. The four are added up at the end of a piece alone,
    for that takes two shuffles and their latency."""
    p = gl.reshape(p, [BLOCK_H, BLOCK_KV // 8, 4, 2])
    return gl.convert_layout(gl.sum(gl.sum(p, 3), 1), LANE_SUMS, assert_trivial=True)


@gluon.jit
def _are_all_keys(keys):
    """Whether every entry names a key, as in most lists: then no score has to be hidden."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    valid = gl.full([BLOCK_KV], 1, gl.int32, FLAT)
    for i in range(keys.STEPS):
        entries = load_key_block(keys, i * BLOCK_KV, FLAT)
        valid = valid & is_key(entries, keys.num_keys).to(gl.int32)
    return gl.min(valid, 0) != 0


@gluon.jit
def _hide_invalid(keys, first, s):
    """-inf in the columns of entries that name no key."""
    rows = load_key_block(keys, first, gl.SliceLayout(0, SCORES))
    return gl.where(is_key(rows, keys.num_keys)[None, :], s, -float("inf"))


@gluon.jit
def _finish(arguments, tiles, entry, largest, reference, row_sum, kv_scale, piece):
    """kv_scale / Σ is the last factor; maximum and logarithm go out. The sink joins Σ."""
    offs_h = piece.first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(1, SCORES))
    offs_row = piece.row * arguments.num_heads + offs_h
    exists = offs_h < arguments.num_heads
    denominator = row_sum
    if arguments.HAS_SINK:
        sink = gl.load(arguments.sink_ptr + offs_h, mask=exists, other=0.0)
        denominator = row_sum + gl.exp2(sink * LOG2_E - (reference - WEIGHT_SHIFT))
    slot = entry % RING
    if entry >= RING:
        wait_at(ENTRY_FREE + slot, ALL_THREADS)
    # == 0 and not > 0, here and below: NaN of a key must show
    tiles.factors.index(slot).store(gl.where(row_sum == 0, 0.0, kv_scale / denominator))
    arrive_at(LEFT_READY + slot, READY_THREADS)
    arrive_at(RIGHT_READY + slot, READY_THREADS)
    log2_sum = reference - WEIGHT_SHIFT + gl.log2(row_sum)
    lse = gl.where(row_sum == 0, float("inf"), log2_sum * LN_2)
    # log2 of no sum is -inf, of NaN it is NaN
    max_logits = gl.where(row_sum > 0, largest * LN_2, log2_sum)
    gl.store(arguments.lse_ptr + offs_row, lse, mask=exists)
    gl.store(arguments.max_ptr + offs_row, max_logits, mask=exists)
