"""How programs share the keys that queries see: device code.

Queries are taken in blocks, keys in tiles: a chunk of queries of one sequence, or the new tokens of
many sequences, a block each. A block visits every tile that one of its queries sees.
All visits, block after block, are divided among the programs by number: each takes an equal run of
them, which may begin and end within a block. So no program is left over at the end, however long
the ranges are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

COUNTED = gl.constexpr(128)
"""Blocks whose visits a warp counts at a time."""


@aggregate
class Ranges:
    """What each query sees: keys kv_start[i] … kv_end[i] - 1."""

    start_ptr: gl.tensor
    end_ptr: gl.tensor
    num_queries: gl.tensor
    num_keys: gl.tensor
    BLOCK_Q: gl.constexpr
    BLOCK_KV: gl.constexpr
    KEY_STEP: gl.constexpr  # keys are every KEY_STEP-th of those that the ranges count
    FROM_ZERO: gl.constexpr  # every range begins at 0, and start_ptr is not read

    @gluon.constexpr_function
    def __init__(
        self, start_ptr, end_ptr, num_queries, num_keys, BLOCK_Q, BLOCK_KV, KEY_STEP, FROM_ZERO
    ):
        self.start_ptr = start_ptr
        self.end_ptr = end_ptr
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.BLOCK_Q = gl.constexpr(BLOCK_Q)
        self.BLOCK_KV = gl.constexpr(BLOCK_KV)
        self.KEY_STEP = gl.constexpr(KEY_STEP)
        self.FROM_ZERO = gl.constexpr(FROM_ZERO)


@aggregate
class Share:
    """The visits of one program: from tile `skipped` of what `block` sees on, `visits` in all."""

    ranges: Ranges
    block: gl.tensor
    skipped: gl.tensor
    visits: gl.tensor
    part: gl.tensor  # programs before this one that share `block`

    @gluon.constexpr_function
    def __init__(self, ranges, block, skipped, visits, part):
        self.ranges = ranges
        self.block = block
        self.skipped = skipped
        self.visits = visits
        self.part = part


@gluon.jit
def visible_tiles(ranges, block):
    """[first, end) of the tiles that a query of the block sees; of one block or of a vector."""
    first = block * 0 + ranges.num_keys
    end = block * 0
    # a few at a time: what is loaded at once is in registers at once
    STEP: gl.constexpr = 8 if ranges.BLOCK_Q > 8 else ranges.BLOCK_Q
    for step in range(0, ranges.BLOCK_Q, STEP):
        for j in gl.static_range(STEP):
            query = block * ranges.BLOCK_Q + step + j
            exists = query < ranges.num_queries
            start = query * 0
            if not ranges.FROM_ZERO:
                start = gl.maximum(gl.load(ranges.start_ptr + query, mask=exists, other=0), 0)
            stop = gl.load(ranges.end_ptr + query, mask=exists, other=0)
            # bounded first, for int32
            start = gl.minimum(start, ranges.num_keys * ranges.KEY_STEP)
            stop = gl.minimum(stop, ranges.num_keys * ranges.KEY_STEP)
            if ranges.KEY_STEP > 1:
                start = (start + ranges.KEY_STEP - 1) // ranges.KEY_STEP
                stop = (stop + ranges.KEY_STEP - 1) // ranges.KEY_STEP
            is_empty = start >= stop
            first = gl.minimum(first, gl.where(is_empty, ranges.num_keys, start))
            end = gl.maximum(end, gl.where(is_empty, 0, stop))
    first = first // ranges.BLOCK_KV
    return first, gl.maximum((end + ranges.BLOCK_KV - 1) // ranges.BLOCK_KV, first)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _count_visits(ranges, first_block, num_blocks):
    LAYOUT: gl.constexpr = gl.BlockedLayout([COUNTED // 32], [32], [gl.num_warps()], [0])
    blocks = first_block + gl.arange(0, gl.num_warps() * COUNTED, LAYOUT)
    first, end = visible_tiles(ranges, blocks)
    return gl.where(blocks < num_blocks, end - first, 0)


@gluon.jit
def share_of_program(ranges, least_share):
    """An equal run of all visits, or `least_share` of them as long as there are any."""
    STEP: gl.constexpr = gl.num_warps() * COUNTED
    num_blocks = (ranges.num_queries + ranges.BLOCK_Q - 1) // ranges.BLOCK_Q
    visits = _count_visits(ranges, 0, num_blocks)
    total = gl.sum(visits, 0)
    for first_block in range(STEP, num_blocks, STEP):
        total += gl.sum(_count_visits(ranges, first_block, num_blocks), 0)
    share = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    share = gl.maximum(gl.maximum(share, least_share), 1)
    begin = gl.program_id(0) * share
    block = 0
    before = 0
    counted = 0
    for first_block in range(0, num_blocks, STEP):
        if first_block > 0:
            visits = _count_visits(ranges, first_block, num_blocks)
        ends = counted + gl.associative_scan(visits, 0, _add)
        is_before = ends <= begin
        block += gl.sum(is_before.to(gl.int32), 0)
        before = gl.maximum(before, gl.max(gl.where(is_before, ends, 0), 0))
        counted += gl.sum(visits, 0)
    run = gl.maximum(gl.minimum(share, total - begin), 0)
    return Share(ranges, block, begin - before, run, gl.program_id(0) - before // share)
