"""Index logits over a paged cache on Hopper: what loader and consumers share, and the loader.

A program goes through pieces: the new tokens of one sequence and a run of its key tiles, each 64
keys of one page. The four consumers are `groups` · `ways`: a group has its own columns, queries ×
heads, of every tile that its way takes, and of `ways` tiles in a row each way takes one.

A page of 132-byte rows is `page_size` rows of 128 bytes and, behind them, the scales: page_size/32
rows more. So a cache is rows of 128 bytes throughout, which TMA fetches 64 at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.dependent_launch import wait_for_launch
from dsa_bench.kernels.logit_tiles import (
    CONSUMERS,
    allocate_barriers,
    choose_columns,
    init_barriers,
)
from dsa_bench.kernels.paging import INDEX_DIM
from dsa_bench.kernels.seesaw_loader import copy_to_shared
from dsa_bench.kernels.tma_tiles import copy_tile, tile_layout
from dsa_bench.kernels.visible_tiles import share_of_program, visible_tiles

TILE_KEYS = 64
"""For the host: keys of a tile, the M of a product."""
MAX_SEQ_LEN_Q = 8
SHARED_BYTES = 216 * 2**10
"""What queries, keys and scales may take."""
MAX_STAGES = 8
"""66 KB of keys in flight are enough: 205.9 µs at batch 128, 32K keys, as with 12 (206.6) and 20
(207.7), whose barriers take longer to initialise (batch 1: 8.7, 8.8 and 9.6 µs; H100)."""
PAIRS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
"""The scales of a tile, 8 bytes a thread of the loader."""
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
"""One number, in all lanes of the loader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the columns of a sequence's new tokens are laid out, and what fits into shared memory."""

    columns: int
    """Queries · heads of a consumer, the N of its product."""
    groups: int
    q_slots: int
    stages: int


def plan_tiles(seq_len_q: int, heads: int, dtype: torch.dtype) -> Plan:
    """One query: its heads. More: as many as a consumer has registers for.

    `stages` is a multiple of the ways, so that a stage belongs to one of them for good: else the
    next one would take the phase before for its own.
    """
    columns = heads if seq_len_q == 1 else choose_columns(heads)
    groups = 1
    while groups * columns < seq_len_q * heads:
        groups *= 2
    row = INDEX_DIM * dtype.itemsize
    q_bytes = groups * columns * row
    q_slots = 2 if 4 * q_bytes <= SHARED_BYTES else 1
    ways = CONSUMERS.value // groups
    tile = TILE_KEYS * (row + (4 if dtype.itemsize == 1 else 0))
    stages = min(MAX_STAGES, (SHARED_BYTES - q_slots * q_bytes) // tile)
    return Plan(columns=columns, groups=groups, q_slots=q_slots, stages=stages // ways * ways)


def page_descriptors(
    index_q: Tensor, index_cache: Tensor, plan: Plan
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Queries as [batch_size · seq_len_q · index_heads, index_dim], and the cache in such rows."""
    layout = tile_layout(index_q.dtype)
    return tuple(
        TensorDescriptor.from_tensor(rows, [count, INDEX_DIM], layout)
        for rows, count in (
            (index_q.view(-1, INDEX_DIM), plan.columns),
            (index_cache.view(index_q.dtype).view(-1, INDEX_DIM), TILE_KEYS),
        )
    )


@aggregate
class PagedKeys:
    """Where the keys of a sequence lie."""

    table_ptr: gl.tensor
    scales_ptr: gl.tensor
    max_pages: gl.tensor
    PAGE_SIZE: gl.constexpr
    HAS_SCALE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, table_ptr, scales_ptr, max_pages, PAGE_SIZE, HAS_SCALE):
        self.table_ptr = table_ptr
        self.scales_ptr = scales_ptr
        self.max_pages = max_pages
        self.PAGE_SIZE = gl.constexpr(PAGE_SIZE)
        self.HAS_SCALE = gl.constexpr(HAS_SCALE)


@aggregate
class PageTiles:
    """Shared memory of one program, and its barriers."""

    q: gl.shared_memory_descriptor  # [Q_SLOTS · GROUPS, COLUMNS, index_dim]
    k: gl.shared_memory_descriptor  # [STAGES, TILE_KEYS, index_dim]
    scales: gl.shared_memory_descriptor  # [STAGES, TILE_KEYS] fp32
    q_ready: gl.shared_memory_descriptor  # mbarriers: of Q_SLOTS, filled and free
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor  # of STAGES
    k_free: gl.shared_memory_descriptor
    share: gl.shared_memory_descriptor  # [3, 1] int32: block, skipped and visits of the program
    share_ready: gl.shared_memory_descriptor  # one mbarrier each
    warmed: gl.shared_memory_descriptor
    GROUPS: gl.constexpr
    Q_SLOTS: gl.constexpr
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q, k, scales, q_ready, q_free, k_ready, k_free, share, share_ready, warmed,
        GROUPS, Q_SLOTS, STAGES,
    ):  # fmt: skip
        self.q = q
        self.k = k
        self.scales = scales
        self.q_ready = q_ready
        self.q_free = q_free
        self.k_ready = k_ready
        self.k_free = k_free
        self.share = share
        self.share_ready = share_ready
        self.warmed = warmed
        self.GROUPS = gl.constexpr(GROUPS)
        self.Q_SLOTS = gl.constexpr(Q_SLOTS)
        self.STAGES = gl.constexpr(STAGES)


@gluon.jit
def allocate_page_tiles(
    q_desc, k_desc, GROUPS: gl.constexpr, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = q_desc.block_type.shape[0]
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # a loader that copies scales arrives with each of its threads beside TMA
    ARRIVALS: gl.constexpr = 33 if HAS_SCALE else 1
    SCALES: gl.constexpr = STAGES if HAS_SCALE else 1
    q_ready = allocate_barriers(Q_SLOTS)
    q_free = allocate_barriers(Q_SLOTS)
    k_ready = allocate_barriers(STAGES)
    k_free = allocate_barriers(STAGES)
    init_barriers(q_ready, q_free, k_ready, k_free, Q_SLOTS, STAGES, ARRIVALS, GROUPS)
    share_ready = allocate_barriers(1)
    warmed = allocate_barriers(1)
    mbarrier.init(share_ready.index(0), count=1)
    mbarrier.init(warmed.index(0), count=1)
    return PageTiles(
        gl.allocate_shared_memory(q_desc.dtype, [Q_SLOTS * GROUPS, COLUMNS, DIM], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout),
        gl.allocate_shared_memory(gl.float32, [SCALES, KEYS], PLAIN),
        q_ready, q_free, k_ready, k_free,
        gl.allocate_shared_memory(gl.int32, [3, 1], PLAIN), share_ready, warmed,
        GROUPS, Q_SLOTS, STAGES,
    )  # fmt: skip


@gluon.jit
def load_pages(q_desc, k_desc, pages, ranges, tiles, HEADS: gl.constexpr):
    """Piece after piece, its queries and then its keys with their scales."""
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    PAGE_TILES: gl.constexpr = pages.PAGE_SIZE // KEYS
    QUERY_ROWS: gl.constexpr = ranges.BLOCK_Q * HEADS
    # what consumers read or write hangs on what is loaded here
    wait_for_launch()
    _warm_descriptors(q_desc, k_desc, tiles)
    share = share_of_program(ranges, 1)
    _tell_share(tiles, share)
    block = share.block
    skipped = share.skipped
    visits = share.visits
    n = 0
    piece = 0
    mbarrier.wait(tiles.warmed.index(0), 0)
    while visits > 0:
        first, end = visible_tiles(ranges, block)
        first = first + skipped
        end = gl.minimum(end, first + visits)
        if first < end:
            table_ptr = pages.table_ptr + block.to(gl.int64) * pages.max_pages
            page = gl.load(table_ptr + first // PAGE_TILES)
            _load_queries(q_desc, block * QUERY_ROWS, tiles, piece)
            for tile in range(first, end):
                # the number of the next tile's page travels while this one is asked for
                following = gl.load(table_ptr + gl.minimum(tile + 1, end - 1) // PAGE_TILES)
                stage = n % tiles.STAGES
                mbarrier.wait(tiles.k_free.index(stage), (n // tiles.STAGES & 1) ^ 1)
                _load_tile(k_desc, pages, page, tile % PAGE_TILES * KEYS, tiles, stage)
                page = following
                n += 1
            piece += 1
        visits = visits - (end - first)
        skipped = 0
        block = block + 1
    async_copy.wait_group(0)


@gluon.jit
def _warm_descriptors(q_desc, k_desc, tiles):
    """Fetch any tile of both: the descriptors travel while the lengths do, and no tile then waits
    for them."""
    warmed = tiles.warmed.index(0)
    mbarrier.expect(warmed, q_desc.block_type.nbytes + k_desc.block_type.nbytes)
    copy_tile(q_desc, [0, 0], warmed, tiles.q.index(0))
    copy_tile(k_desc, [0, 0], warmed, tiles.k.index(0))


@gluon.jit
def _tell_share(tiles, share):
    """To the consumers: one warp works out what all need."""
    tiles.share.index(0).store(gl.full([1], share.block, gl.int32, SCALAR))
    tiles.share.index(1).store(gl.full([1], share.skipped, gl.int32, SCALAR))
    tiles.share.index(2).store(gl.full([1], share.visits, gl.int32, SCALAR))
    mbarrier.arrive(tiles.share_ready.index(0), count=1)


@gluon.jit
def wait_for_share(tiles):
    """(block, skipped, visits), for a consumer."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(tiles.share_ready.index(0), 0)
    block = gl.max(tiles.share.index(0).load(LAYOUT), 0)
    skipped = gl.max(tiles.share.index(1).load(LAYOUT), 0)
    return block, skipped, gl.max(tiles.share.index(2).load(LAYOUT), 0)


@gluon.jit
def _load_queries(q_desc, first_row, tiles, piece):
    """Rows behind the last query are the next sequence's or 0; nothing of them is stored."""
    COLUMNS: gl.constexpr = q_desc.block_type.shape[0]
    slot = piece % tiles.Q_SLOTS
    mbarrier.wait(tiles.q_free.index(slot), (piece // tiles.Q_SLOTS & 1) ^ 1)
    ready = tiles.q_ready.index(slot)
    mbarrier.expect(ready, tiles.GROUPS * q_desc.block_type.nbytes)
    for group in gl.static_range(tiles.GROUPS):
        place = tiles.q.index(slot * tiles.GROUPS + group)
        copy_tile(q_desc, [first_row + group * COLUMNS, 0], ready, place)


@gluon.jit
def _load_tile(k_desc, pages, page, first_key, tiles, stage):
    """64 keys of a page from `first_key` on."""
    PAGE_ROWS: gl.constexpr = pages.PAGE_SIZE * 33 // 32 if pages.HAS_SCALE else pages.PAGE_SIZE
    ready = tiles.k_ready.index(stage)
    mbarrier.expect(ready, k_desc.block_type.nbytes)
    copy_tile(k_desc, [page * PAGE_ROWS + first_key, 0], ready, tiles.k.index(stage))
    if pages.HAS_SCALE:
        # of a page's 33 words a key, those behind the 32 of the values
        ptr = pages.scales_ptr + page.to(gl.int64) * (pages.PAGE_SIZE * 33)
        offs = pages.PAGE_SIZE * 32 + first_key + gl.arange(0, tiles.scales.shape[1], PAIRS)
        copy_to_shared(tiles.scales.index(stage), ptr + offs)
        async_copy.mbarrier_arrive(ready, increment_count=False)
