"""One row of logits that a program holds in its registers, all of it asked for at once: for exact
selection from few rows, in Gluon.

The row is cut into cells, one for every LANES threads: each thread has the vectors of 16 bytes at
its place in every run of LANES vectors of its cell. So the first vectors of all threads are a
sample of the row, LANES vectors out of each cell, and the threshold that they give is chosen while
the others are on their way. Positions count as in `row_scan.py`; vectors that reach over an end of
the range, two at most, are loaded element by element by two threads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.radix_select import LISTED, SLACK_WORDS, sort_key
from dsa_bench.kernels.row_scan import (
    append_entries,
    choose_threshold,
    count_sample,
    value_of_depth,
)
from dsa_bench.kernels.shared_words import reserve

LANES = gl.constexpr(4)
"""Neighbours that load 64 bytes: a warp's load touches 8 lines, and a row of 32768 has 128 cells,
each with 16 of its 256 logits in the sample."""


@gluon.jit
def held_tile(VECTORS: gl.constexpr, VECTOR: gl.constexpr, NUM_WARPS: gl.constexpr):
    """(thread [threads, 1], its first vector [threads, 1], element [1, VECTOR])."""
    TILE: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32, 1], [NUM_WARPS, 1], [1, 0])
    thread = gl.arange(0, NUM_WARPS * 32, gl.SliceLayout(1, TILE))[:, None]
    element = gl.arange(0, VECTOR, gl.SliceLayout(0, TILE))[None, :]
    return thread, thread // LANES * (LANES * VECTORS) + thread % LANES, element


@gluon.jit
def is_whole(vector, first, limit, VECTOR: gl.constexpr):
    """Whether a vector lies in the range."""
    return (vector * VECTOR >= first) & (vector * VECTOR + VECTOR <= limit)


@gluon.jit
def load_held(
    row_ptr, first, limit, VECTORS: gl.constexpr, VECTOR: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """VECTORS vectors a thread, [threads, VECTOR] each; NaN where they do not lie in the range."""
    _, vector, element = held_tile(VECTORS, VECTOR, NUM_WARPS)
    held = ()
    for i in gl.static_range(VECTORS):
        at = vector + i * LANES
        # a mask of vectors, not of elements: 16 bytes by one load
        is_there = is_whole(at, first, limit, VECTOR)
        x = gl.load(row_ptr + at * VECTOR + element, mask=is_there, other=float("nan"))
        held += (x,)  # type: ignore[assignment]
    return held


@gluon.jit
def load_ends(
    row_ptr, first, limit, VECTORS: gl.constexpr, VECTOR: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """(logits, positions) [threads, VECTOR] of the vectors that reach over an end of the range."""
    thread, _, element = held_tile(VECTORS, VECTOR, NUM_WARPS)
    position = gl.where(thread == 0, 0, limit // VECTOR * VECTOR) + element
    is_end = ((thread == 0) & (first > 0)) | (thread == 1)
    is_end = is_end & (position >= first) & (position < limit)
    return gl.load(row_ptr + position, mask=is_end, other=float("nan")), position


@gluon.constexpr_function
def reaching_asm(vector, capacity, words):
    """Operands: results, places, logits, columns and thresholds, `vector` of each."""
    place, x, column, least = (n * vector for n in range(1, 5))
    stores = "".join(
        f"""setp.ge.f32 p, ${x + i}, ${least}; @p st.shared.f32 [a], ${x + i};
        @p st.shared.u32 [a + {4 * words}], c; @p add.u32 a, a, 4; add.u32 c, c, 1; """
        for i in range(vector)
    )
    results = "".join(f"mov.b32 ${i}, n; " for i in range(vector))
    return f"""{{ .reg .pred p; .reg .u32 a, c, n, s; mov.u32 n, ${place}; mov.u32 c, ${column};
        min.u32 n, n, {capacity}; mov.u32 s, global_smem; mad.lo.u32 a, n, 4, s;
        {stores} sub.u32 n, a, s; shr.u32 n, n, 2; {results} }}"""


@gluon.constexpr_function
def reaching_constraints(vector):
    kinds = ("=r", "r", "f", "r", "f")
    return ",".join(kind for kind in kinds for _ in range(vector)) + ",~{memory}"


@gluon.jit
def store_reaching(
    place, x, column, least,
    CAPACITY: gl.constexpr, WORDS: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """Store those elements of each thread's vector that are at least `least`, and their columns, as
    entries of the list from `place` on; gives the place behind them. Those at CAPACITY and behind
    it overwrite each other.

    In one piece: a comparison, two stores and two sums an element, where `store_entry` after a scan
    of the thread's elements takes about twelve instructions.
    """
    return gl.inline_asm_elementwise(
        reaching_asm(VECTOR, CAPACITY, WORDS),
        reaching_constraints(VECTOR),
        [place, x, column, least],
        dtype=gl.int32,
        is_pure=False,
        pack=VECTOR,
    )


@gluon.jit
def append_held(
    held, base, threshold,
    CAPACITY: gl.constexpr, WORDS: gl.constexpr, VECTORS: gl.constexpr, VECTOR: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Append what has at most the depth `threshold`, which is above -inf; beyond CAPACITY entries
    are only counted. Gives [threads, VECTOR]: the largest of what a thread has at each place of its
    vectors, NaN where it has nothing else."""
    _, vector, element = held_tile(VECTORS, VECTOR, NUM_WARPS)
    least = value_of_depth(threshold)
    largest = held[0].to(gl.float32)
    count = gl.sum((largest >= least).to(gl.int32), 1)
    for i in gl.static_range(1, VECTORS):
        x = held[i].to(gl.float32)
        count += gl.sum((x >= least).to(gl.int32), 1)
        largest = gl.maximum(largest, x)
    place = reserve(2 * WORDS - SLACK_WORDS + LISTED, count)[:, None] + 0 * element
    leasts = gl.full_like(largest, 0.0) + least
    for i in gl.static_range(VECTORS):
        x = held[i].to(gl.float32)
        column = base + (vector + i * LANES) * VECTOR + element
        place = store_reaching(place, x, column, leasts, CAPACITY, WORDS, VECTOR)
    return largest


@gluon.jit
def list_held_row(
    bins, row_ptr, base, first, limit,
    TOPK: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr, VECTORS: gl.constexpr,
    VECTOR: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """What `list_row` of `row_scan.py` does, for a row of at most VECTORS vectors a thread; and the
    largest key."""
    held = load_held(row_ptr, first, limit, VECTORS, VECTOR, NUM_WARPS)
    _, vector, element = held_tile(VECTORS, VECTOR, NUM_WARPS)
    is_sampled = is_whole(vector + 0 * element, first, limit, VECTOR)
    depths = count_sample(held[0].to(gl.float32), WORDS, is_sampled)
    threshold, is_likely = choose_threshold(
        bins, depths, 1 / VECTORS, TOPK, CAPACITY, WORDS, NUM_WARPS, is_sampled
    )
    best = 0
    if is_likely == 1:
        largest = append_held(held, base, threshold, CAPACITY, WORDS, VECTORS, VECTOR, NUM_WARPS)
        if (first > 0) | (limit % VECTOR > 0):
            x, position = load_ends(row_ptr, first, limit, VECTORS, VECTOR, NUM_WARPS)
            x = x.to(gl.float32)
            take = x >= value_of_depth(threshold)
            append_entries(x, base + position, take, row_ptr, row_ptr, False, CAPACITY, WORDS)
            largest = gl.maximum(largest, x)
        best = gl.max(gl.max(sort_key(largest), 1), 0)
    return threshold, is_likely, best
