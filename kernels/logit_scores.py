"""Index logits of a block of queries on Hopper: a consumer.

Keys are the rows of a product, queries × heads its columns, so that the sum over heads runs inside
a thread and the three beside it. A tile of keys is taken in halves of 64, the M of one wgmma. Of
the 178 instructions that a warp needs for a half, 128 are the maximum and the multiply-add of each
score; each of the others costs as much.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsa_bench.kernels.logit_tiles import CONSUMERS
from dsa_bench.kernels.visible_tiles import visible_tiles

HALF = gl.constexpr(64)
"""Keys of one product."""


@gluon.constexpr_function
def score_layout(columns, k):
    """Accumulators [HALF keys, columns = queries · heads]; k: 32 in fp8, 16 in bf16."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, k])


@gluon.constexpr_function
def logit_layout(queries):
    """[HALF keys, queries] as `sum_heads` leaves them: the four threads of a quad, which have the
    same rows of `score_layout`, share two keys by two queries."""
    registers = []
    bit = 2
    while bit < queries:
        registers.append([0, bit])
        bit *= 2
    lanes = [[0, 1], [8, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, queries])


@gluon.jit
def score(
    weights_ptr, scale_ptr, sink, share, tiles,
    BEGIN: gl.constexpr, TAKE: gl.constexpr, END: gl.constexpr,
    HEADS: gl.constexpr, WHO: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Piece after piece the logits of consumer WHO, half a tile of keys at a time.

    What becomes of them is said by three functions:
        state = BEGIN(sink, ranges, query, part, QUERIES, LOGITS)
                                                             the first of QUERIES queries, and how
                                                             many programs share them before this
        state = TAKE(sink, state, logits, kv, LOGITS)        kv: the first key of the half
        END(sink, state)
    """
    ROWS: gl.constexpr = tiles.q.shape[1]
    LOGITS: gl.constexpr = logit_layout(ROWS // HEADS)
    ranges = share.ranges
    block = share.block
    skipped = share.skipped
    visits = share.visits
    part = share.part
    offs_c = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
    n = 0
    piece = 0
    while visits > 0:
        first, end = visible_tiles(ranges, block)
        first = first + skipped
        end = gl.minimum(end, first + visits)
        if first < end:
            query = block * ranges.BLOCK_Q + WHO * (ROWS // HEADS)
            exists = query + offs_c // HEADS < ranges.num_queries
            weights = gl.load(weights_ptr + query * HEADS + offs_c, mask=exists, other=0.0)
            state = BEGIN(sink, ranges, query, part, ROWS // HEADS, LOGITS)
            slot = piece % tiles.Q_SLOTS
            q = tiles.q.index(slot * CONSUMERS + WHO).permute((1, 0))
            mbarrier.wait(tiles.q_ready.index(slot), piece // tiles.Q_SLOTS & 1)
            for tile in range(first, end):
                stage = n % tiles.STAGES
                mbarrier.wait(tiles.k_ready.index(stage), n // tiles.STAGES & 1)
                for half in gl.static_range(2):
                    kv = tile * ranges.BLOCK_KV + half * HALF
                    token = _multiply(tiles, stage, half * HALF, q, SCORES)
                    # travels meanwhile
                    scale = _load_scale(scale_ptr, kv, ranges, LOGITS)
                    scores = warpgroup_mma_wait(0, deps=[token])
                    if half == 1:
                        mbarrier.arrive(tiles.k_free.index(stage), count=1)
                    logits = sum_heads(scores, weights, scale, HEADS, LOGITS)
                    state = TAKE(sink, state, logits, kv, LOGITS)
                n += 1
            mbarrier.arrive(tiles.q_free.index(slot), count=1)
            END(sink, state)
            piece += 1
        visits = visits - (end - first)
        skipped = 0
        part = 0
        block = block + 1


@gluon.jit
def _multiply(tiles, stage, FIRST: gl.constexpr, q, SCORES: gl.constexpr):
    """Half a tile of keys · queries, not waited for."""
    COLUMNS: gl.constexpr = q.shape[1]
    none = gl.zeros([HALF, COLUMNS], gl.float32, SCORES)
    k = tiles.k.index(stage).slice(FIRST, HALF, 0)
    return warpgroup_mma(k, q, none, use_acc=False, is_async=True)


@gluon.jit
def _load_scale(scale_ptr, kv, ranges, LOGITS: gl.constexpr):
    """Of HALF keys from kv on; behind the last key it does not matter."""
    offs_kv = kv + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
    offs_kv = gl.where(offs_kv < ranges.num_keys, offs_kv, 0)
    return gl.load(scale_ptr + offs_kv * ranges.KEY_STEP)[:, None]


@gluon.jit
def sum_heads(scores, weights, scale, HEADS: gl.constexpr, LOGITS: gl.constexpr):
    """index_k_scale · Σ_h weights · max(0, scores): [HALF, queries]."""
    OWN: gl.constexpr = scores.shape[1] // HEADS
    scores = gl.maximum(scores, 0.0) * weights[None, :]
    # what a thread has of a row: two of every eight heads, which are summed up one after the other
    scores = gl.reshape(scores, [HALF, OWN, HEADS // 8, 4, 2])
    scores = gl.reshape(gl.permute(scores, [0, 1, 3, 2, 4]), [HALF, OWN, 4, HEADS // 4])
    # [warp, row + 8, row, queries, query + 1, lane of the quad]
    sums = gl.reshape(gl.sum(scores, 3), [HALF // 16, 2, 8, OWN // 2, 2, 4])
    upper, lower = gl.split(gl.permute(sums, [0, 2, 5, 3, 4, 1]))
    a, b = gl.split(upper)
    c, d = gl.split(lower)
    logits = _sum_quad(a, b, c, d)
    # lane 2 i + j of the quad now has row + 8 i of query + j
    logits = gl.reshape(logits, [HALF // 16, 8, 2, 2, OWN // 2])
    logits = gl.reshape(gl.permute(logits, [0, 2, 1, 4, 3]), [HALF, OWN])
    return gl.convert_layout(logits, LOGITS, assert_trivial=True) * scale


@gluon.jit
def _sum_quad(a, b, c, d):
    """Sums over the four lanes of a quad: that of a to the first, of b to the second, and so on.

    Three shuffles, where sums that all lanes have take eight.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .b32 l; .reg .f32 s, t, u, v;
        mov.u32 l, %laneid; and.b32 l, l, 1; setp.ne.u32 p, l, 0;
        mov.u32 l, %laneid; and.b32 l, l, 2; setp.ne.u32 q, l, 0;
        selp.f32 s, $1, $2, p; selp.f32 t, $2, $1, p; shfl.sync.bfly.b32 s, s, 1, 31, -1;
        add.f32 t, t, s;
        selp.f32 u, $3, $4, p; selp.f32 v, $4, $3, p; shfl.sync.bfly.b32 u, u, 1, 31, -1;
        add.f32 v, v, u;
        selp.f32 s, t, v, q; selp.f32 u, v, t, q; shfl.sync.bfly.b32 s, s, 2, 31, -1;
        add.f32 $0, u, s; }""",
        "=f,f,f,f,f", [a, b, c, d], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
