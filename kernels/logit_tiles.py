"""Index logits of a block of queries on Hopper: what loader and consumers share, and the loader.

A program goes through pieces: a block of queries and a run of key tiles. Each consumer has its own
queries of the block, all take the same tiles of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.tma_tiles import copy_tile, tile_layout, tile_type
from dsa_bench.kernels.visible_tiles import Ranges, visible_tiles
from dsa_bench.operator import Machine

BLOCK_KV, INDEX_DIM = 128, 128
"""For the host: keys of a tile, their width."""
CONSUMERS = gl.constexpr(4)
CONSUMER_REGISTERS, LOADER_REGISTERS = gl.constexpr(112), gl.constexpr(32)
"""A thread; 4 · (4 consumers + loader) must not exceed 20 · 96."""
HEADS_TAKEN = (8, 16, 32, 64)


def refusal(title: str, index_heads: int, index_dim: int, machine: Machine) -> str | None:
    """Why these kernels cannot take a case, for `supports`."""
    if not machine.is_hopper:
        return f"{title} needs a Hopper GPU (sm_90), this is {machine.name}"
    if index_heads not in HEADS_TAKEN:
        return f"{title} takes 8, 16, 32 or 64 heads, this case has {index_heads}"
    if index_dim != INDEX_DIM:
        return f"{title} takes heads of 128 columns, this case has {index_dim}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """What fits into 227 KB of shared memory: a block of queries takes 64 KB in fp8, a tile of
    keys 16 KB; twice that in bf16."""

    q_slots: int
    stages: int


def choose_ring(dtype: torch.dtype) -> Ring:
    return Ring(q_slots=2, stages=5) if dtype.itemsize == 1 else Ring(q_slots=1, stages=3)


def choose_columns(heads: int) -> int:
    """Queries · heads of a consumer, the N of a product. With few heads a thread has logits of
    many queries, and registers for half as many columns."""
    return 128 if heads >= 32 else 64


def tile_descriptors(index_q: Tensor, index_k: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Queries as [seq_len_q · index_heads, index_dim], and keys."""
    layout = tile_layout(index_q.dtype)
    rows = index_q.view(-1, INDEX_DIM)
    return (
        TensorDescriptor.from_tensor(rows, [choose_columns(index_q.shape[1]), INDEX_DIM], layout),
        TensorDescriptor.from_tensor(index_k, [BLOCK_KV, INDEX_DIM], layout),
    )


def tile_types(dtype: torch.dtype, heads: int) -> dict[str, str]:
    """The types of the descriptors, for a compile case."""
    return descriptor_types(dtype, choose_columns(heads), BLOCK_KV)


def descriptor_types(dtype: torch.dtype, q_rows: int, k_rows: int) -> dict[str, str]:
    """Of descriptors that fetch so many rows of queries and of keys."""
    return {
        "q_desc": tile_type(dtype, q_rows, INDEX_DIM),
        "k_desc": tile_type(dtype, k_rows, INDEX_DIM),
    }


@aggregate
class Tiles:
    """Shared memory of one program, and its barriers."""

    q: gl.shared_memory_descriptor  # [Q_SLOTS · CONSUMERS, COLUMNS, index_dim]
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, index_dim]
    q_ready: gl.shared_memory_descriptor  # mbarriers: of Q_SLOTS, filled and free
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor  # of STAGES
    k_free: gl.shared_memory_descriptor
    Q_SLOTS: gl.constexpr
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, q, k, q_ready, q_free, k_ready, k_free, Q_SLOTS, STAGES):
        self.q = q
        self.k = k
        self.q_ready = q_ready
        self.q_free = q_free
        self.k_ready = k_ready
        self.k_free = k_free
        self.Q_SLOTS = gl.constexpr(Q_SLOTS)
        self.STAGES = gl.constexpr(STAGES)


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())


@gluon.jit
def init_barriers(
    q_ready, q_free, k_ready, k_free, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr, READERS: gl.constexpr,
):  # fmt: skip
    """`ready` of queries gets one arrival, of keys ARRIVALS, `free` CONSUMERS and READERS.

    One of each in turn: between two of one allocation the compiler has all warps wait, and an
    init takes 120 cycles on an H100.
    """
    for j in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(j), count=ARRIVALS)
        mbarrier.init(k_free.index(j), count=READERS)
        if j < Q_SLOTS:
            mbarrier.init(q_ready.index(j), count=1)
            mbarrier.init(q_free.index(j), count=CONSUMERS)


@gluon.jit
def allocate_tiles(q_desc, k_desc, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr):
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    q_ready = allocate_barriers(Q_SLOTS)
    q_free = allocate_barriers(Q_SLOTS)
    k_ready = allocate_barriers(STAGES)
    k_free = allocate_barriers(STAGES)
    init_barriers(q_ready, q_free, k_ready, k_free, Q_SLOTS, STAGES, 1, CONSUMERS)
    return Tiles(
        gl.allocate_shared_memory(q_desc.dtype, [Q_SLOTS * CONSUMERS, ROWS, DIM], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, DIM], k_desc.layout),
        q_ready, q_free, k_ready, k_free, Q_SLOTS, STAGES,
    )  # fmt: skip


@gluon.jit
def ranges_of(
    start_ptr, end_ptr, num_queries, num_keys, q_desc, k_desc,
    HEADS: gl.constexpr, KEY_STEP: gl.constexpr,
):  # fmt: skip
    """The ranges, in the blocks and tiles that the descriptors fetch."""
    BLOCK_Q: gl.constexpr = CONSUMERS * q_desc.block_type.shape[0] // HEADS
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    return Ranges(start_ptr, end_ptr, num_queries, num_keys, BLOCK_Q, KEYS, KEY_STEP, False)


@gluon.jit
def load(q_desc, k_desc, share, tiles):
    """Piece after piece, its queries and then its keys, by TMA."""
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    KEYS: gl.constexpr = k_desc.block_type.shape[0]
    block = share.block
    skipped = share.skipped
    visits = share.visits
    n = 0
    piece = 0
    while visits > 0:
        first, end = visible_tiles(share.ranges, block)
        first = first + skipped
        end = gl.minimum(end, first + visits)
        if first < end:
            slot = piece % tiles.Q_SLOTS
            mbarrier.wait(tiles.q_free.index(slot), (piece // tiles.Q_SLOTS & 1) ^ 1)
            ready = tiles.q_ready.index(slot)
            mbarrier.expect(ready, CONSUMERS * q_desc.block_type.nbytes)
            for who in gl.static_range(CONSUMERS):
                row = (block * CONSUMERS + who) * ROWS
                copy_tile(q_desc, [row, 0], ready, tiles.q.index(slot * CONSUMERS + who))
            for tile in range(first, end):
                stage = n % tiles.STAGES
                mbarrier.wait(tiles.k_free.index(stage), (n // tiles.STAGES & 1) ^ 1)
                ready = tiles.k_ready.index(stage)
                mbarrier.expect(ready, k_desc.block_type.nbytes)
                copy_tile(k_desc, [tile * KEYS, 0], ready, tiles.k.index(stage))
                n += 1
            piece += 1
        visits = visits - (end - first)
        skipped = 0
        block = block + 1
