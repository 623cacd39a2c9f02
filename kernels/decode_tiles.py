"""What the three roles of a program of `row_decode.py` share: its arguments, shared memory,
barriers and layouts."""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.paging import HEAD_DIM_ROPE
from dsa_bench.kernels.seesaw_tiles import BLOCK_KV, LOADER_THREADS, ROPE, TILE, VECTOR
from dsa_bench.kernels.tma_tiles import tile_layout, tile_type
from dsa_bench.kernels.weight_ring import RING

WIDTH = gl.constexpr(512)
"""Columns of the values, the e4m3 part of a row."""
TILE_COLUMNS = gl.constexpr(64)
PRODUCTS = gl.constexpr(8)
"""Of TILE_COLUMNS each: the scores of a block, but for its rope columns."""
GROUPS = gl.constexpr(4)
"""Scales of a row, one for 128 columns."""
GROUP_PAIRS = gl.constexpr(64)
"""Pairs of columns that share a scale; and the M of one product of the outputs."""
STAGES = gl.constexpr(3)
"""Blocks of keys in shared memory."""
OUTPUT_WARPS = gl.constexpr(8)
VOTE = gl.constexpr(14)
"""Named barrier at which the scores' threads ask each other."""

SHARE = gl.constexpr(64.0)
"""What the largest scale of a row becomes, for the others are to be f16 too: in full precision down
to 2^-20 of it."""

BYTES_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
PAIRS_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""The bytes of a BYTES_TILE seen as pairs of columns."""
SCALES_TILE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SHARES_TILE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
"""[GROUPS, BLOCK_KV]: an entry's shares as they are stored."""


QUERY_TILE = 8192
"""Numbers in a tile of a query, 16 KB."""


@gluon.constexpr_function
def query_columns(heads):
    """Of a query's tile, which has 16 KB, so that loops can run over tiles: unrolled, the code that
    turns 64 heads to f16 was 30 KB, which take 15 µs to arrive where a program runs it once."""
    return QUERY_TILE // heads


def query_descriptors(q: Tensor, heads: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of a program's part of all heads [.., 576]: a tile of its first 512 columns, and the rope
    columns."""
    rows, layout = q.view(-1, q.shape[-1]), tile_layout(q.dtype)
    return (
        TensorDescriptor.from_tensor(rows, [heads, QUERY_TILE // heads], layout),
        TensorDescriptor.from_tensor(rows, [heads, HEAD_DIM_ROPE], layout),
    )


def query_types(heads: int) -> dict[str, str]:
    """Their types, for a compile case."""
    return {
        "q_desc": tile_type(torch.bfloat16, heads, QUERY_TILE // heads),
        "rope_desc": tile_type(torch.bfloat16, heads, HEAD_DIM_ROPE),
    }


@gluon.constexpr_function
def weights_tile(heads):
    return gl.NVMMASharedLayout(2 * heads, 16, 2)


@gluon.constexpr_function
def products(heads, warps=4):
    """Accumulators: [64 keys, heads] of scores, [128 pairs, heads] of outputs."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, heads, 16])


@aggregate
class Arguments:
    """What all programs share; names as in `sparse_decode.py`, and those of `decode_config.py`."""

    q_ptr: gl.tensor
    cache_ptr: gl.tensor  # the same bytes as int8, bf16 and fp32
    halves_ptr: gl.tensor
    scales_ptr: gl.tensor
    slots_ptr: gl.tensor
    lens_ptr: gl.tensor
    sink_ptr: gl.tensor
    out_ptr: gl.tensor  # as int32, pairs of bf16
    lse_ptr: gl.tensor
    partial_out_ptr: gl.tensor  # [2 · groups, num_heads, 256] int64, pairs of fp32
    partial_lse_ptr: gl.tensor  # [2 · groups, num_heads] fp32, to base 2
    num_queries: gl.tensor
    num_slots: gl.tensor
    num_heads: gl.tensor
    topk: gl.tensor
    share: gl.tensor  # of each group
    sm_scale_log2: gl.tensor
    NUM_BLOCKS: gl.constexpr  # of a full list
    PIECE_UNITS: gl.constexpr
    BLOCK_H: gl.constexpr
    HAS_LENS: gl.constexpr
    HAS_SINK: gl.constexpr
    IS_RAGGED: gl.constexpr
    HEADS_MASKED: gl.constexpr
    HAS_PARTS: gl.constexpr  # some pieces may be parts of a list
    HAS_WHOLE: gl.constexpr  # some may be whole lists
    IS_ONE_PIECE: gl.constexpr  # each program has one
    EVEN_BLOCKS: gl.constexpr  # and it has so many blocks, without lengths; 0: they differ
    LETS_NEXT: gl.constexpr  # merging may be launched early

    @gluon.constexpr_function
    def __init__(
        self, q_ptr, cache_ptr, halves_ptr, scales_ptr, slots_ptr, lens_ptr, sink_ptr, out_ptr,
        lse_ptr, partial_out_ptr, partial_lse_ptr, num_queries, num_slots, num_heads, topk, share,
        sm_scale_log2, NUM_BLOCKS, PIECE_UNITS, BLOCK_H, HAS_LENS, HAS_SINK, IS_RAGGED,
        HEADS_MASKED, HAS_PARTS, HAS_WHOLE, IS_ONE_PIECE, EVEN_BLOCKS, LETS_NEXT,
    ):  # fmt: skip
        self.q_ptr = q_ptr
        self.cache_ptr = cache_ptr
        self.halves_ptr = halves_ptr
        self.scales_ptr = scales_ptr
        self.slots_ptr = slots_ptr
        self.lens_ptr = lens_ptr
        self.sink_ptr = sink_ptr
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.partial_out_ptr = partial_out_ptr
        self.partial_lse_ptr = partial_lse_ptr
        self.num_queries = num_queries
        self.num_slots = num_slots
        self.num_heads = num_heads
        self.topk = topk
        self.share = share
        self.sm_scale_log2 = sm_scale_log2
        self.NUM_BLOCKS = gl.constexpr(NUM_BLOCKS)
        self.PIECE_UNITS = gl.constexpr(PIECE_UNITS)
        self.BLOCK_H = gl.constexpr(BLOCK_H)
        self.HAS_LENS = gl.constexpr(HAS_LENS)
        self.HAS_SINK = gl.constexpr(HAS_SINK)
        self.IS_RAGGED = gl.constexpr(IS_RAGGED)
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)
        self.HAS_PARTS = gl.constexpr(HAS_PARTS)
        self.HAS_WHOLE = gl.constexpr(HAS_WHOLE)
        self.IS_ONE_PIECE = gl.constexpr(IS_ONE_PIECE)
        self.EVEN_BLOCKS = gl.constexpr(EVEN_BLOCKS)
        self.LETS_NEXT = gl.constexpr(LETS_NEXT)


@aggregate
class Tiles:
    """Shared memory of one program, and its mbarriers."""

    q: gl.shared_memory_descriptor  # [.., BLOCK_H, query_columns] bf16, later f16
    q_rope: gl.shared_memory_descriptor  # [1, BLOCK_H, ROPE] bf16
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, WIDTH] e4m3 as int8
    k_rope: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, ROPE] bf16
    scales: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, GROUPS] fp32
    biases: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV] fp32: 0, or -inf where there is no key
    weights: gl.shared_memory_descriptor  # [RING, BLOCK_KV, BLOCK_H] f16
    shares: gl.shared_memory_descriptor  # [RING, GROUPS · BLOCK_KV] f16: scale / largest of the row
    largest: gl.shared_memory_descriptor  # [2, BLOCK_H] int32: bits of a head's largest, by parts
    units: gl.shared_memory_descriptor  # [1, BLOCK_H] fp32: what a head's scores are multiplied by
    references: gl.shared_memory_descriptor  # [1, BLOCK_H] fp32: what weights are relative to
    factors: gl.shared_memory_descriptor  # [RING, BLOCK_H] fp32: outputs are multiplied by it ...
    moves: gl.shared_memory_descriptor  # [RING, 1] int32: ... first, where this is not 0
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor  # [STAGES], as k_free
    k_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q, q_rope, k, k_rope, scales, biases, weights, shares, largest, units, references,
        factors, moves, q_ready, q_free, k_ready, k_free,
    ):  # fmt: skip
        self.q = q
        self.q_rope = q_rope
        self.k = k
        self.k_rope = k_rope
        self.scales = scales
        self.biases = biases
        self.weights = weights
        self.shares = shares
        self.largest = largest
        self.units = units
        self.references = references
        self.factors = factors
        self.moves = moves
        self.q_ready = q_ready
        self.q_free = q_free
        self.k_ready = k_ready
        self.k_free = k_free


@gluon.jit
def allocate_tiles(BLOCK_H: gl.constexpr):
    COLUMNS: gl.constexpr = query_columns(BLOCK_H)
    q = gl.allocate_shared_memory(gl.bfloat16, [WIDTH // COLUMNS, BLOCK_H, COLUMNS], TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, ROPE], TILE)
    k = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_KV, WIDTH], BYTES_TILE)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_KV, ROPE], TILE)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_KV, GROUPS], SCALES_TILE)
    biases = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_KV], VECTOR)
    shares = gl.allocate_shared_memory(gl.float16, [RING, GROUPS * BLOCK_KV], VECTOR)
    weights = gl.allocate_shared_memory(
        gl.float16, [RING, BLOCK_KV, BLOCK_H], weights_tile(BLOCK_H)
    )
    largest = gl.allocate_shared_memory(gl.int32, [2, BLOCK_H], VECTOR)
    units = gl.allocate_shared_memory(gl.float32, [1, BLOCK_H], VECTOR)
    references = gl.allocate_shared_memory(gl.float32, [1, BLOCK_H], VECTOR)
    factors = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_H], VECTOR)
    moves = gl.allocate_shared_memory(gl.int32, [RING, 1], VECTOR)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=1)
    for j in gl.static_range(STAGES):
        # each thread for its copies, and one for the biases, which are stored
        mbarrier.init(k_ready.index(j), count=LOADER_THREADS + 1)
        # the scores and the outputs
        mbarrier.init(k_free.index(j), count=2)
    return Tiles(
        q, q_rope, k, k_rope, scales, biases, weights, shares, largest, units, references,
        factors, moves, q_ready, q_free, k_ready, k_free,
    )  # fmt: skip
