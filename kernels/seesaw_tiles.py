"""What the three roles of a program of `seesaw.py` share: tiles, barriers, the list of keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

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
    # [2, BLOCK_KV, ROPE]; block 0's also takes P0, for K0's is dead by then
    k_rope: gl.shared_memory_descriptor
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
class KeyList:
    """The keys of one program: int32 row numbers, of which those outside 0 … num_keys - 1 are
    skipped."""

    ptr: gl.tensor
    length: gl.tensor  # entries that count; only looked at where IS_RAGGED
    num_keys: gl.tensor
    # of the walk: pairs of blocks in `seesaw.py`, blocks in `fp8_scores.py`; a count known at run
    # time alone makes ptxas spill
    STEPS: gl.constexpr
    IS_RAGGED: gl.constexpr  # length is not that of whole steps, or differs by row

    @gluon.constexpr_function
    def __init__(self, ptr, length, num_keys, STEPS, IS_RAGGED):
        self.ptr = ptr
        self.length = length
        self.num_keys = num_keys
        self.STEPS = gl.constexpr(STEPS)
        self.IS_RAGGED = gl.constexpr(IS_RAGGED)


# triton 3.9 made it public
HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def seen_as(
    tile, DTYPE: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
    ROWS: gl.constexpr = BLOCK_KV,
):  # fmt: skip
    """The bytes of a tile as numbers of another type: [ROWS, COLUMNS]."""
    if HAS_REINTERPRET:
        return tile.reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)
    else:
        return tile._reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def opaque_zero():
    """0, which the compiler cannot see; `seesaw.py` says why."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def allocate_tiles(HAS_ROPE: gl.constexpr):
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
        mbarrier.init(sums.index(j), count=1)
    for j in gl.static_range(4):
        mbarrier.init(ready.index(j), count=LOADER_THREADS)
        mbarrier.init(free.index(j), count=1)
    return Tiles(
        q_left, q_right, q_rope, k_left, k_right, k_rope, p_right,
        max_left, max_right, sum_left, sum_right, ready, free, sums, query, HAS_ROPE,
    )  # fmt: skip


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
