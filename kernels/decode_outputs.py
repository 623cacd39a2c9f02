"""The two output warpgroups of a program of `row_decode.py`: Oᵀ, which fills their registers.

The transposed product Vᵀ · P takes Vᵀ from registers. Pairs of columns are loaded as 16-bit numbers
by a transposing load, so that a register has two columns of two keys; turned to f16 they are the
even column of both and the odd column of both, each an operand of its own. So there are
accumulators of even and of odd columns. A product has 128 pairs of columns, two groups of a scale,
one for each warpgroup.

Both are one role of eight warps and not two of four, for the loops of all roles are to stay in the
instruction cache: with two the same code was there twice, 6.5 KB of 35.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.decode_pieces import WHOLE, first_list, has_piece, piece_of, steps_of
from dsa_bench.kernels.decode_query import prepare_columns
from dsa_bench.kernels.decode_tiles import (
    GROUP_PAIRS,
    GROUPS,
    OUTPUT_WARPS,
    PAIRS_TILE,
    SHARES_TILE,
    STAGES,
    WIDTH,
    products,
)
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import BLOCK_KV, opaque_zero, seen_as
from dsa_bench.kernels.weight_ring import ALL_THREADS, ENTRY_FREE, READY, RING

HALF_PAIRS = gl.constexpr(128)
"""Pairs of columns of one product: two groups, one for each of its warpgroups."""
STEP_KEYS = gl.constexpr(16)
"""Keys that one product sums over."""
FLAG = gl.constexpr(gl.BlockedLayout([1], [32], [OUTPUT_WARPS.value], [0]))
VALUE_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]],
        [],
        [128, 16],
    )
)
"""[pairs of columns, keys] as the transposing load gives them: registers, lanes, warps."""


@gluon.jit
def accumulate(arguments, tiles):
    """Piece after piece, all columns."""
    row = first_list(arguments)
    done = opaque_zero()
    n = opaque_zero()
    if arguments.IS_ONE_PIECE:
        _accumulate_piece(arguments, tiles, row, done, n)
    else:
        while has_piece(arguments, row):
            n = _accumulate_piece(arguments, tiles, row, done, n)
            row = row + 1
            done = done + 1


@gluon.jit
def _accumulate_piece(arguments, tiles, row, done, n):
    """Piece `done`, whose first block is the program's n-th; the number of the block behind it."""
    BLOCK_H: gl.constexpr = arguments.BLOCK_H
    OUTPUT: gl.constexpr = products(BLOCK_H, OUTPUT_WARPS)
    mbarrier.wait(tiles.q_ready, done & 1)
    behind = n + steps_of(arguments, piece_of(arguments, row))
    prepare_columns(tiles, BLOCK_H)
    even0 = gl.zeros([HALF_PAIRS, BLOCK_H], gl.float32, OUTPUT)
    odd0 = gl.zeros([HALF_PAIRS, BLOCK_H], gl.float32, OUTPUT)
    even1 = gl.zeros([HALF_PAIRS, BLOCK_H], gl.float32, OUTPUT)
    odd1 = gl.zeros([HALF_PAIRS, BLOCK_H], gl.float32, OUTPUT)
    for block in range(n, behind):
        stage, slot = block % STAGES, (block + done) % RING
        wait_at(READY + slot, ALL_THREADS)
        if gl.max(tiles.moves.index(slot).load(FLAG), 0) != 0:
            factor = tiles.factors.index(slot).load(gl.SliceLayout(0, OUTPUT))
            even0 = even0 * factor[None, :]
            odd0 = odd0 * factor[None, :]
            even1 = even1 * factor[None, :]
            odd1 = odd1 * factor[None, :]
        p = tiles.weights.index(slot)
        even0, odd0, even1, odd1 = _add_block(
            tiles, stage, slot, p, even0, odd0, even1, odd1, OUTPUT
        )
        mbarrier.arrive(tiles.k_free.index(stage), count=1)
        arrive_at(ENTRY_FREE + slot, ALL_THREADS)
    slot = (behind + done) % RING
    wait_at(READY + slot, ALL_THREADS)
    factor = tiles.factors.index(slot).load(gl.SliceLayout(0, OUTPUT))
    # worked out anew: kept through the loop, all that hangs on it is spilled
    _store_output(arguments, row + opaque_zero(), factor, even0, odd0, even1, odd1)
    arrive_at(ENTRY_FREE + slot, ALL_THREADS)
    return behind


@gluon.jit
def _add_block(tiles, stage, slot, p, even0, odd0, even1, odd1, OUTPUT: gl.constexpr):
    """Vᵀ · P of both halves. While one product runs, the operands of the next are made."""
    v0_even, v0_odd = _values(tiles, stage, slot, 0, 0, OUTPUT)
    for i in gl.static_range(BLOCK_KV // STEP_KEYS):
        part = p.slice(i * STEP_KEYS, STEP_KEYS, 0)
        even0 = warpgroup_mma(v0_even, part, even0, is_async=True)
        odd0 = warpgroup_mma(v0_odd, part, odd0, is_async=True)
        v1_even, v1_odd = _values(tiles, stage, slot, 1, i * STEP_KEYS, OUTPUT)
        even0, odd0, v0_even, v0_odd = warpgroup_mma_wait(0, deps=[even0, odd0, v0_even, v0_odd])
        even1 = warpgroup_mma(v1_even, part, even1, is_async=True)
        odd1 = warpgroup_mma(v1_odd, part, odd1, is_async=True)
        if i < BLOCK_KV // STEP_KEYS - 1:
            v0_even, v0_odd = _values(tiles, stage, slot, 0, (i + 1) * STEP_KEYS, OUTPUT)
        even1, odd1, v1_even, v1_odd = warpgroup_mma_wait(0, deps=[even1, odd1, v1_even, v1_odd])
    return even0, odd0, even1, odd1


@gluon.jit
def _values(tiles, stage, slot, HALF: gl.constexpr, KEY: gl.constexpr, OUTPUT: gl.constexpr):
    """Even and odd columns of two groups, of 16 keys: each [128, 16] f16, operands in registers."""
    pairs = seen_as(tiles.k.index(stage), gl.int16, WIDTH // 2, PAIRS_TILE)
    pairs = pairs.slice(HALF * HALF_PAIRS, HALF_PAIRS, 1).slice(KEY, STEP_KEYS, 0)
    pairs = pairs.permute((1, 0)).load(VALUE_PAIRS)
    pairs = gl.reshape(pairs, [2, GROUP_PAIRS, STEP_KEYS])
    shares = seen_as(tiles.shares.index(slot), gl.float16, BLOCK_KV, SHARES_TILE, GROUPS)
    shares = shares.slice(2 * HALF, 2, 0).slice(KEY, STEP_KEYS, 1)
    shares = shares.load(gl.SliceLayout(1, pairs.type.layout))
    shares, pairs = gl.broadcast(gl.expand_dims(shares, 1), pairs)
    even, odd = gl.inline_asm_elementwise(
        """{ .reg .b16 a, b; .reg .b32 w, h0, h1;
        prmt.b32 w, $2, $2, 0x3120; mov.b32 {a, b}, w;
        cvt.rn.f16x2.e4m3x2 h0, a; cvt.rn.f16x2.e4m3x2 h1, b;
        mul.f16x2 $0, h0, $3; mul.f16x2 $1, h1, $3; }""",
        "=r,=r,r,r",
        [pairs, shares],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )
    even = gl.reshape(even, [HALF_PAIRS, STEP_KEYS])
    odd = gl.reshape(odd, [HALF_PAIRS, STEP_KEYS])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    even = gl.convert_layout(even, OPERAND, assert_trivial=True)
    return even, gl.convert_layout(odd, OPERAND, assert_trivial=True)


@gluon.jit
def _store_output(arguments, row, factor, even0, odd0, even1, odd1):
    """All columns times the factor, of a whole list or of a part of one."""
    place = piece_of(arguments, row).place
    if arguments.HAS_PARTS and arguments.HAS_WHOLE:
        if place == WHOLE:
            _store_columns(arguments, row, factor, even0, odd0, even1, odd1, IS_PART=False)
        else:
            _store_columns(arguments, place, factor, even0, odd0, even1, odd1, IS_PART=True)
    elif arguments.HAS_PARTS:
        _store_columns(arguments, place, factor, even0, odd0, even1, odd1, IS_PART=True)
    else:
        _store_columns(arguments, row, factor, even0, odd0, even1, odd1, IS_PART=False)


@gluon.jit
def _store_columns(arguments, row, factor, even0, odd0, even1, odd1, IS_PART: gl.constexpr):
    """Both halves; `row` is a place where it is a part."""
    _store_pairs(arguments, row, even0 * factor[None, :], odd0 * factor[None, :], 0, IS_PART)
    _store_pairs(
        arguments, row, even1 * factor[None, :], odd1 * factor[None, :], HALF_PAIRS, IS_PART
    )


@gluon.jit
def _store_pairs(arguments, row, even, odd, FIRST: gl.constexpr, IS_PART: gl.constexpr):
    """[pairs of a half, heads], of two fp32 if it is a part, else of two bf16, -> rows of
    [num_heads, 256] pairs; eight lanes write one head."""
    if IS_PART:
        ptr = arguments.partial_out_ptr
        words = gl.inline_asm_elementwise(
            "mov.b64 $0, {$1, $2};", "=l,f,f", [even, odd], dtype=gl.int64, is_pure=True, pack=1
        )
    else:
        ptr = arguments.out_ptr
        words = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    OUTPUT: gl.constexpr = products(arguments.BLOCK_H, OUTPUT_WARPS)
    offs_h = gl.arange(0, arguments.BLOCK_H, gl.SliceLayout(0, OUTPUT))
    offs_d = FIRST + gl.arange(0, HALF_PAIRS, gl.SliceLayout(1, OUTPUT))
    offs = offs_h[None, :] * (WIDTH // 2) + offs_d[:, None]
    first_head = gl.program_id(0) * arguments.BLOCK_H
    first = (row.to(gl.int64) * arguments.num_heads + first_head) * (WIDTH // 2)
    exists = offs >= 0
    if arguments.HEADS_MASKED:
        exists = offs < (arguments.num_heads - first_head) * (WIDTH // 2)
    gl.store(ptr + first + offs, words, mask=exists)
