"""The scores warpgroup of a program of `row_decode.py`: products of keys and queries,
softmax, weights in f16.

Scores are [keys, heads]: a product takes its first operand from registers, so that keys are turned
from e4m3 to f16 on their way from shared memory to the tensor cores, and never stored again. This
warpgroup is what the kernel waits for: while one product runs, it makes the operand of the next.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.decode_pieces import WHOLE, first_list, has_piece, piece_of, steps_of
from dsa_bench.kernels.decode_query import QUERY_PARTS, prepare_rope
from dsa_bench.kernels.decode_tiles import (
    GROUPS,
    PAIRS_TILE,
    PRODUCTS,
    SHARE,
    SHARES_TILE,
    STAGES,
    TILE_COLUMNS,
    VOTE,
    WIDTH,
    products,
    query_columns,
)
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import (
    BLOCK_KV,
    LN_2,
    LOG2_E,
    opaque_zero,
    seen_as,
)
from dsa_bench.kernels.weight_ring import ALL_THREADS, ENTRY_FREE, READY, RING

SHIFT = gl.constexpr(6.0)
"""Weights are multiplied by 2^6, so that small ones are not lost in f16, ..."""
SLACK = 8.0
"""... whose largest is 2^16: a head's largest weight may grow by 2^8, to 2^14, before its reference
is set anew, and the outputs with it."""
IS_ABOVE_ASM = gl.constexpr(
    ".reg .pred is_above; setp.gt.f32 is_above, $1,"
    f" 0f{struct.pack('>f', SHIFT.value + SLACK).hex()}; mov.b32 $0, 0;"
)
"""Declares the predicate outside of braces, so that the assembly of `vote_asm` sees it."""
LEAST_SCALE = gl.constexpr(2.0**-40)
"""Rows of smaller scales count as if their largest were this: its inverse is to be finite."""
FLAG = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
KEY_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 16]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 32],
    )
)
"""[keys, pairs of columns] as `ldmatrix` gives them: registers, lanes, warps."""
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 4], [1, 0]))
"""[32, heads] of `lane_sums`, reduced by two shuffles: as they lie it takes three for each of 16
heads, and two trips through shared memory behind them, 2 µs a piece."""
# the four lanes that share a row have all scales of it
KEY_SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 4],
    )
)


@gluon.constexpr_function
def lane_sums(heads):
    """What a thread has of the columns of scores, added up: [32 threads of a column, heads]."""
    columns = [[0, 8 << i] for i in range((heads // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], *columns], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [],
        [32, heads],
    )  # fmt: skip


@gluon.jit
def score(arguments, tiles):
    """Piece after piece: a block's weights and factor -> ring; at the end the last factor, and the
    logarithm of the sum to memory."""
    row = first_list(arguments)
    done = opaque_zero()
    n = opaque_zero()
    if arguments.IS_ONE_PIECE:
        _score_piece(arguments, tiles, row, done, n)
        _await_outputs()
    else:
        while has_piece(arguments, row):
            n = _score_piece(arguments, tiles, row, done, n)
            row = row + 1
            done = done + 1
        if done > 0:
            _await_outputs()


@gluon.jit
def _await_outputs():
    """What they say last, so that barriers are left as they were found; each entry was used."""
    for slot in gl.static_range(RING):
        wait_at(ENTRY_FREE + slot, ALL_THREADS)


@gluon.jit
def _score_piece(arguments, tiles, row, done, n):
    """Piece `done`, whose first block is the program's n-th; the number of the block behind it."""
    BLOCK_H: gl.constexpr = arguments.BLOCK_H
    HEADS: gl.constexpr = gl.SliceLayout(0, products(BLOCK_H))
    is_set = opaque_zero()
    sums = gl.zeros([32, BLOCK_H], gl.float32, lane_sums(BLOCK_H))
    mbarrier.wait(tiles.q_ready, done & 1)
    behind = n + steps_of(arguments, piece_of(arguments, row))
    prepare_rope(tiles, arguments.sm_scale_log2)
    tiles.references.index(0).store(gl.zeros([BLOCK_H], gl.float32, HEADS))
    wait_at(QUERY_PARTS, ALL_THREADS)
    for block in range(n, behind):
        s, key_columns, head_columns = _multiply(arguments, tiles, block, block + done)
        mbarrier.arrive(tiles.k_free.index(block % STAGES), count=1)
        is_set, sums = _weigh(
            arguments, s, key_columns, head_columns, is_set, sums, tiles, block + done
        )
    mbarrier.arrive(tiles.q_free, count=1)
    reference = tiles.references.index(0).load(HEADS)
    total = gl.convert_layout(gl.sum(gl.convert_layout(sums, COLUMNS), 0), HEADS)
    # worked out anew: kept through the loop, all that hangs on it is spilled
    _finish(arguments, tiles, row + opaque_zero(), behind + done, reference, total)
    return behind


@gluon.jit
def _query_part(tiles, z, PART: gl.constexpr, BLOCK_H: gl.constexpr):
    """64 columns of the query in f16, part PART, transposed: [64, heads]."""
    COLUMNS: gl.constexpr = query_columns(BLOCK_H)
    first: gl.constexpr = PART * TILE_COLUMNS
    tile = seen_as(tiles.q.index(z + first // COLUMNS), gl.float16, COLUMNS, PAIRS_TILE, BLOCK_H)
    return tile.slice(first % COLUMNS, TILE_COLUMNS, 1).permute((1, 0))


@gluon.jit
def _multiply(arguments, tiles, n, entry):
    """K · Qᵀ of block n in units of each row's largest scale; (that scale, 0 or -inf) of the keys,
    (unit, reference) of the heads. The rows' shares -> ring, once the entry is free."""
    BLOCK_H: gl.constexpr = arguments.BLOCK_H
    SCORES: gl.constexpr = products(BLOCK_H)
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    HEADS: gl.constexpr = gl.SliceLayout(0, SCORES)
    stage, slot = n % STAGES, entry % RING
    z = opaque_zero()
    mbarrier.wait(tiles.k_ready.index(stage), n // STAGES & 1)
    scales = tiles.scales.index(stage).load(KEY_SCALES)
    # the next power of two
    largest = gl.maximum(gl.max(scales, 1), LEAST_SCALE).to(gl.int32, bitcast=True)
    largest = ((largest + 0x7FFFFF) & 0x7F800000).to(gl.float32, bitcast=True)
    inverse = SHARE / largest
    shares = (scales * inverse[:, None]).to(gl.float16)
    inverse = gl.convert_layout(inverse, KEYS, assert_trivial=True)
    largest = gl.convert_layout(largest, KEYS, assert_trivial=True)
    if entry >= RING:
        wait_at(ENTRY_FREE + slot, ALL_THREADS)
    parts = _of_groups(shares)
    pairs = seen_as(tiles.k.index(stage), gl.int16, WIDTH // 2, PAIRS_TILE)
    words = load_pairs(pairs, 0)
    rope = _rope_operand(tiles.k_rope.index(stage), inverse, SCORES)
    none = gl.zeros([BLOCK_KV, BLOCK_H], gl.float32, SCORES)
    s = warpgroup_mma(
        rope, tiles.q_rope.index(z).permute((1, 0)), none, use_acc=False, is_async=True
    )
    operand = key_operand(words, parts[0], SCORES)
    words = load_pairs(pairs, 1)
    shares_tile = seen_as(tiles.shares.index(slot), gl.float16, BLOCK_KV, SHARES_TILE, GROUPS)
    shares_tile.permute((1, 0)).store(shares)
    s = warpgroup_mma(operand, _query_part(tiles, z, 0, BLOCK_H), s, is_async=True)
    s, rope = warpgroup_mma_wait(1, deps=[s, rope])
    for i in gl.static_range(1, PRODUCTS):
        # while a product runs, the operand of the next is made, and the words behind it travel
        following = key_operand(words, parts[i // 2], SCORES)
        if i < PRODUCTS - 1:
            words = load_pairs(pairs, i + 1)
        s = warpgroup_mma(following, _query_part(tiles, z, i, BLOCK_H), s, is_async=True)
        s, operand = warpgroup_mma_wait(1, deps=[s, operand])
        operand = following
    # asked for before the wait, not behind it
    bias = tiles.biases.index(stage).load(KEYS)
    unit = tiles.units.index(0).load(HEADS)
    reference = tiles.references.index(0).load(HEADS)
    s, operand = warpgroup_mma_wait(0, deps=[s, operand])
    return s, (largest, bias), (unit, reference)


@gluon.jit
def _of_groups(shares):
    """[keys, 4] -> four times [keys]."""
    even, odd = gl.split(gl.reshape(shares, [BLOCK_KV, 2, 2]))
    share0, share2 = gl.split(even)
    share1, share3 = gl.split(odd)
    return share0, share1, share2, share3


@gluon.jit
def _rope_operand(tile, inverse, SCORES: gl.constexpr):
    """[64 keys, 64] bf16 times a power of two a row, in registers."""
    k = tile.load(gl.DotOperandLayout(0, SCORES, 2))
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, SCORES, 2))
    inverse = gl.convert_layout(inverse, ROWS, assert_trivial=True)
    inverse, k = gl.broadcast(inverse.to(gl.bfloat16)[:, None], k)
    return gl.inline_asm_elementwise(
        "mul.bf16x2 $0, $1, $2;", "=r,r,r", [k, inverse], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def load_pairs(pairs, PART: gl.constexpr):
    """64 columns of the keys, as pairs."""
    return pairs.slice(32 * PART, 32, 1).load(KEY_PAIRS)


@gluon.jit
def key_operand(pairs, share, SCORES: gl.constexpr):
    """64 columns: [64 keys, 64] f16, in registers, in the order of the query's."""
    share = gl.convert_layout(share, gl.SliceLayout(1, KEY_PAIRS), assert_trivial=True)
    share, pairs = gl.broadcast(share[:, None], pairs)
    # of four columns the first two, and the last two
    low, high = gl.inline_asm_elementwise(
        """{ .reg .b16 a, b; .reg .b32 h0, h1; mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 h0, a; cvt.rn.f16x2.e4m3x2 h1, b;
        mul.f16x2 $0, h0, $3; mul.f16x2 $1, h1, $3; }""",
        "=r,=r,r,r",
        [pairs, share],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )
    k = gl.reshape(gl.join(low, high), [BLOCK_KV, 4, 8, 2])
    k = gl.reshape(gl.permute(k, [0, 1, 3, 2]), [BLOCK_KV, 64])
    return gl.convert_layout(k, gl.DotOperandLayout(0, SCORES, 2), assert_trivial=True)


@gluon.jit
def _weigh(arguments, s, key_columns, head_columns, is_set, sums, tiles, entry):
    """P · (the row's largest scale) = 2^(logit + log2 of that scale - reference) -> ring; returns
    whether the reference is set, and Σ P.

    A piece's first keys set the reference, so that the largest weight is 2^SHIFT; later ones raise
    it once one is 2^SLACK times that, and all weights and sums so far shrink by the factor.
    """
    HEADS: gl.constexpr = gl.SliceLayout(0, products(arguments.BLOCK_H))
    SUMS: gl.constexpr = lane_sums(arguments.BLOCK_H)
    largest, bias = key_columns
    unit, reference = head_columns
    slot = entry % RING
    log2_largest = ((largest.to(gl.int32, bitcast=True) >> 23) - 127).to(gl.float32)
    s = s * (largest[:, None] * unit[None, :]) + (log2_largest + bias)[:, None]
    s = s - reference[None, :]
    moves = _any_above(s, arguments.BLOCK_H) | (is_set ^ 1)
    tiles.moves.index(slot).store(gl.full([1], moves, gl.int32, FLAG))
    if moves != 0:
        best = gl.max(gl.convert_layout(_lane_maxima(s, arguments.BLOCK_H), COLUMNS), 0)
        best = gl.convert_layout(best, HEADS)
        step = gl.where((best > SHIFT) | (is_set == 0), best - SHIFT, 0.0)
        # of no key yet
        step = gl.where(best == -float("inf"), 0.0, step)
        is_set = (gl.max(best, 0) != -float("inf")).to(gl.int32)
        s = s - step[None, :]
        tiles.references.index(0).store(reference + step)
        # where it is set, sums and outputs are 0: they must not become NaN
        factor = gl.exp2(-gl.maximum(step, 0.0))
        sums = sums * gl.convert_layout(factor, gl.SliceLayout(0, SUMS))[None, :]
        tiles.factors.index(slot).store(factor)
    p = gl.exp2(s)
    tiles.weights.index(slot).store(p.to(gl.float16))
    # between the stores and the fence that waits for them
    sums = sums + _lane_sums(p * (1.0 / largest)[:, None], arguments.BLOCK_H, SUMS)
    fence_async_shared()
    arrive_at(READY + slot, ALL_THREADS)
    return is_set, sums


@gluon.jit
def _lane_sums(p, BLOCK_H: gl.constexpr, SUMS: gl.constexpr):
    """[32, heads]: what each thread has of a column. The 32 are added up at the end of a piece."""
    p = gl.sum(gl.reshape(p, [4, 2, 8, BLOCK_H]), 1)
    return gl.convert_layout(gl.reshape(p, [32, BLOCK_H]), SUMS, assert_trivial=True)


@gluon.jit
def _lane_maxima(x, BLOCK_H: gl.constexpr):
    """[32, heads]: the larger of the two that each thread has of a column."""
    return gl.reshape(gl.max(gl.reshape(x, [4, 2, 8, BLOCK_H]), 1), [32, BLOCK_H])


@gluon.constexpr_function
def vote_asm(barrier):
    return f"{{ .reg .pred p; bar.red.or.pred p, {barrier}, 128, is_above; selp.b32 $0, 1, 0, p; }}"


@gluon.jit
def _any_above(x, BLOCK_H: gl.constexpr):
    """Whether an element is above SHIFT + SLACK: each thread looks at its own, then all meet at a
    barrier that ors. A reduction by shuffles and shared memory takes 800 cycles, which all wait
    for.

    A predicate of the assembly carries each thread's answer from one piece to the next, for an
    answer that the compiler takes for the same in all threads may not depend on a tensor.
    """
    x = _lane_maxima(x, BLOCK_H)
    x = gl.max(gl.max(gl.reshape(x, [32, BLOCK_H // 8, 4, 2]), 3), 1)
    gl.inline_asm_elementwise(IS_ABOVE_ASM, "=r,f", [x], dtype=gl.int32, is_pure=False, pack=1)
    found = gl.inline_asm_elementwise(
        vote_asm(VOTE), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return found != 0


@gluon.jit
def _finish(arguments, tiles, row, entry, reference, total):
    """1 / Σ is the last factor; the logarithm goes out. The sink joins the Σ of a whole list."""
    place = piece_of(arguments, row).place
    SCORES: gl.constexpr = products(arguments.BLOCK_H)
    first_head = gl.program_id(0) * arguments.BLOCK_H
    offs_h = first_head + gl.arange(0, arguments.BLOCK_H, gl.SliceLayout(0, SCORES))
    exists = offs_h < arguments.num_heads
    denominator = total
    if arguments.HAS_SINK and arguments.HAS_WHOLE:
        sink = gl.load(arguments.sink_ptr + offs_h, mask=exists, other=0.0)
        share = gl.exp2(sink * LOG2_E - reference)
        denominator = total + gl.where(place == WHOLE, share, 0.0)
    slot = entry % RING
    if entry >= RING:
        wait_at(ENTRY_FREE + slot, ALL_THREADS)
    # == 0 and not > 0: NaN of a key must show
    tiles.factors.index(slot).store(gl.where(total == 0, 0.0, 1.0 / (SHARE * denominator)))
    arrive_at(READY + slot, ALL_THREADS)
    log2_sum = reference + gl.log2(total)
    if arguments.HAS_PARTS:
        lse = gl.where(total == 0, -float("inf"), log2_sum)
        offs = place * arguments.num_heads + offs_h
        gl.store(arguments.partial_lse_ptr + offs, lse, mask=exists & (place != WHOLE))
    if arguments.HAS_WHOLE:
        lse = gl.where(total == 0, float("inf"), log2_sum * LN_2)
        offs = row * arguments.num_heads + offs_h
        gl.store(arguments.lse_ptr + offs, lse, mask=exists & (place == WHOLE))
