"""An output warpgroup of a program of `sparse_prefill_fp8_gluon.py`: Oᵀ of half the columns.

Hopper multiplies 8-bit operands only where the dimension that is summed over lies along the rows of
both. For the values, whose rows are keys, it does not; hence the transposed product Vᵀ · Pᵀ, whose
Vᵀ goes through registers: pairs of columns are loaded as 16-bit numbers by a transposing load, and
one byte permutation makes even and odd columns of two registers. Pᵀ is the tile of weights as it
is. So a warpgroup has accumulators of even and of odd columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.fp8_tiles import (
    OUTPUT,
    PAIRS_TILE,
    STAGES,
    TILE_PAIRS,
    WIDTH,
)
from dsa_bench.kernels.head_pieces import count_pieces, piece_after
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import BLOCK_H, BLOCK_KV, opaque_zero, seen_as
from dsa_bench.kernels.weight_ring import ALL_THREADS, ENTRY_FREE, READY_THREADS, RING

VALUES = gl.constexpr(gl.DotOperandLayout(0, OUTPUT, 4))
LOADED_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [8, 0], [0, 16], [0, 32]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
"""[pairs of columns, keys] as the transposing load gives them: registers, lanes, warps."""


@gluon.jit
def accumulate(arguments, tiles, FIRST: gl.constexpr, READY: gl.constexpr):
    """Piece after piece: 128 pairs of columns from FIRST on, in two tiles; READY is its barrier."""
    for done in range(count_pieces(arguments.num_pieces)):
        even0 = gl.zeros([TILE_PAIRS, BLOCK_H], gl.float32, OUTPUT)
        odd0 = gl.zeros([TILE_PAIRS, BLOCK_H], gl.float32, OUTPUT)
        even1 = gl.zeros([TILE_PAIRS, BLOCK_H], gl.float32, OUTPUT)
        odd1 = gl.zeros([TILE_PAIRS, BLOCK_H], gl.float32, OUTPUT)
        for i in range(arguments.NUM_BLOCKS):
            n = done * arguments.NUM_BLOCKS + i
            stage, slot = n % STAGES, (n + done) % RING
            wait_at(READY + slot, READY_THREADS)
            factor = tiles.factors.index(slot).load(gl.SliceLayout(0, OUTPUT))
            if gl.min(factor, 0) < 1.0:
                even0 = even0 * factor[None, :]
                odd0 = odd0 * factor[None, :]
                even1 = even1 * factor[None, :]
                odd1 = odd1 * factor[None, :]
            p = tiles.weights.index(slot).permute((1, 0))
            even0, odd0 = _add_values(tiles, stage, FIRST, p, even0, odd0)
            even1, odd1 = _add_values(tiles, stage, FIRST + TILE_PAIRS, p, even1, odd1)
            mbarrier.arrive(tiles.k_free.index(stage), count=1)
            arrive_at(ENTRY_FREE + slot, ALL_THREADS)
        slot = ((done + 1) * (arguments.NUM_BLOCKS + 1) - 1) % RING
        wait_at(READY + slot, READY_THREADS)
        factors = tiles.factors.index(slot)
        # worked out anew: kept through the loop, all that hangs on it is spilled
        num_heads = arguments.num_heads + opaque_zero()
        piece = piece_after(done, num_heads)
        ptr = arguments.out_ptr + piece.row.to(gl.int64) * num_heads * (WIDTH // 2)
        num_heads = num_heads if arguments.HEADS_MASKED else None
        _store_output(ptr, piece.first_head, num_heads, even0, odd0, factors, FIRST)
        _store_output(ptr, piece.first_head, num_heads, even1, odd1, factors, FIRST + TILE_PAIRS)
        arrive_at(ENTRY_FREE + slot, ALL_THREADS)


@gluon.jit
def _add_values(tiles, stage, FIRST: gl.constexpr, p, even, odd):
    """Vᵀ · Pᵀ of 64 pairs of columns, waited for: with the operands of all 128 in registers at
    once, the scores warpgroup would be left too few."""
    v_even, v_odd = _values(tiles, stage, FIRST)
    even = warpgroup_mma(v_even, p, even, is_async=True)
    odd = warpgroup_mma(v_odd, p, odd, is_async=True)
    even, odd = warpgroup_mma_wait(0, deps=[even, odd])
    _outlive(v_even)
    _outlive(v_odd)
    return even, odd


@gluon.jit
def _values(tiles, stage, FIRST: gl.constexpr):
    """Even and odd columns of 64 pairs from FIRST on, of a block: each [64, 64 keys] e4m3, operands
    in registers, keys in the order of `_as_loaded` of the weights."""
    pairs = seen_as(tiles.k.index(stage), gl.int16, WIDTH // 2, PAIRS_TILE)
    pairs = pairs.slice(FIRST, TILE_PAIRS, 1).permute((1, 0)).load(LOADED_PAIRS)
    even, odd = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
        "=r,=r,r,r",
        [pairs],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    return _as_operand(even), _as_operand(odd)


@gluon.jit
def _as_operand(values):
    """No instruction: four keys of a register are 2c, 2c + 1, 2c + 8, 2c + 9, and are called
    4c … 4c + 3."""
    values = gl.reshape(values, [TILE_PAIRS, BLOCK_KV // 16, 2, 4, 2])
    values = gl.reshape(gl.permute(values, [0, 1, 3, 2, 4]), [TILE_PAIRS, BLOCK_KV])
    values = values.to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(values, VALUES, assert_trivial=True)


@gluon.jit
def _outlive(values):
    """No instruction: registers that a product reads must not be used anew before it is waited for.
    A wait cannot take 8-bit tensors along, as it does bf16 ones."""
    gl.inline_asm_elementwise("// $0", "=r,0", [values], dtype=gl.float8e4nv, is_pure=False, pack=4)


@gluon.jit
def _store_output(ptr, first_head, num_heads, even, odd, factors, FIRST: gl.constexpr):
    """Pairs of columns as words of two bf16; eight lanes write 32 bytes of one head. num_heads is
    None where all 64 heads exist."""
    factor = factors.load(gl.SliceLayout(0, OUTPUT))
    words = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even * factor[None, :], odd * factor[None, :]],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    offs_h = first_head + gl.arange(0, BLOCK_H, gl.SliceLayout(0, OUTPUT))
    offs_d = FIRST + gl.arange(0, TILE_PAIRS, gl.SliceLayout(1, OUTPUT))
    ptrs = ptr + offs_h[None, :] * (WIDTH // 2) + offs_d[:, None]
    if num_heads is None:
        gl.store(ptrs, words)
    else:
        gl.store(ptrs, words, mask=(offs_h < num_heads)[None, :])
