"""What the four roles of a program of `sparse_prefill_fp8_gluon.py` share: its arguments, shared
memory, barriers and layouts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.seesaw_tiles import BLOCK_H, BLOCK_KV, LOADER_THREADS, ROPE, VECTOR, KeyList
from dsa_bench.kernels.weight_ring import RING

WIDTH = gl.constexpr(512)
"""Columns of the values, the e4m3 part of a key."""
TILE_PAIRS = gl.constexpr(64)
"""Pairs of columns that one wgmma of the outputs makes: its M."""
STAGES = gl.constexpr(4)
"""Blocks of keys in shared memory. With 3, and a second query in the place of the fourth, the
scores wait for keys a sixth of the time."""

E4M3_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
PAIRS_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""The bytes of an E4M3_TILE seen as pairs of columns; and the layout of bf16 tiles."""
WEIGHTS_TILE = gl.constexpr(gl.NVMMASharedLayout(64, 8, 2))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
ROPE_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""The same accumulator where the product that adds to it is one of bf16."""
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
"""[pairs of columns, heads]"""


@aggregate
class Arguments:
    """What all programs share; names as in `sparse_prefill_fp8.py`."""

    q_ptr: gl.tensor
    q_rope_ptr: gl.tensor
    q_scale_ptr: gl.tensor
    kv_ptr: gl.tensor
    k_rope_ptr: gl.tensor
    kv_scale_ptr: gl.tensor
    indices_ptr: gl.tensor
    lens_ptr: gl.tensor
    sink_ptr: gl.tensor
    out_ptr: gl.tensor  # words of two bf16
    max_ptr: gl.tensor
    lse_ptr: gl.tensor
    num_pieces: gl.tensor
    num_keys: gl.tensor
    num_heads: gl.tensor
    topk: gl.tensor
    sm_scale_log2: gl.tensor
    NUM_BLOCKS: gl.constexpr
    HAS_LENS: gl.constexpr
    HAS_SINK: gl.constexpr
    IS_RAGGED: gl.constexpr
    HEADS_MASKED: gl.constexpr
    HAS_ROPE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_ptr, q_rope_ptr, q_scale_ptr, kv_ptr, k_rope_ptr, kv_scale_ptr,
        indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
        num_pieces, num_keys, num_heads, topk, sm_scale_log2,
        NUM_BLOCKS, HAS_LENS, HAS_SINK, IS_RAGGED, HEADS_MASKED, HAS_ROPE,
    ):  # fmt: skip
        self.q_ptr = q_ptr
        self.q_rope_ptr = q_rope_ptr
        self.q_scale_ptr = q_scale_ptr
        self.kv_ptr = kv_ptr
        self.k_rope_ptr = k_rope_ptr
        self.kv_scale_ptr = kv_scale_ptr
        self.indices_ptr = indices_ptr
        self.lens_ptr = lens_ptr
        self.sink_ptr = sink_ptr
        self.out_ptr = out_ptr
        self.max_ptr = max_ptr
        self.lse_ptr = lse_ptr
        self.num_pieces = num_pieces
        self.num_keys = num_keys
        self.num_heads = num_heads
        self.topk = topk
        self.sm_scale_log2 = sm_scale_log2
        self.NUM_BLOCKS = gl.constexpr(NUM_BLOCKS)
        self.HAS_LENS = gl.constexpr(HAS_LENS)
        self.HAS_SINK = gl.constexpr(HAS_SINK)
        self.IS_RAGGED = gl.constexpr(IS_RAGGED)
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)
        self.HAS_ROPE = gl.constexpr(HAS_ROPE)


@aggregate
class Tiles:
    """Shared memory of one program, and its mbarriers."""

    q: gl.shared_memory_descriptor  # [1, BLOCK_H, WIDTH] e4m3
    q_rope: gl.shared_memory_descriptor  # [1, BLOCK_H, ROPE] bf16
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, WIDTH] e4m3
    k_rope: gl.shared_memory_descriptor  # [STAGES, BLOCK_KV, ROPE] bf16
    weights: gl.shared_memory_descriptor  # [RING, BLOCK_H, BLOCK_KV] e4m3
    factors: gl.shared_memory_descriptor  # [RING, BLOCK_H] fp32: outputs are multiplied by it first
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor  # [STAGES], as k_free
    k_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, q_rope, k, k_rope, weights, factors, q_ready, q_free, k_ready, k_free):
        self.q = q
        self.q_rope = q_rope
        self.k = k
        self.k_rope = k_rope
        self.weights = weights
        self.factors = factors
        self.q_ready = q_ready
        self.q_free = q_free
        self.k_ready = k_ready
        self.k_free = k_free


@gluon.jit
def allocate_tiles():
    q = gl.allocate_shared_memory(gl.float8e4nv, [1, BLOCK_H, WIDTH], E4M3_TILE)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK_H, ROPE], PAIRS_TILE)
    k = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_KV, WIDTH], E4M3_TILE)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_KV, ROPE], PAIRS_TILE)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [RING, BLOCK_H, BLOCK_KV], WEIGHTS_TILE)
    factors = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_H], VECTOR)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # each thread for its copies of the e4m3 part, and one for the rope part, which is stored
    mbarrier.init(q_ready, count=LOADER_THREADS + 1)
    mbarrier.init(q_free, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(j), count=LOADER_THREADS)
        # the scores and both outputs
        mbarrier.init(k_free.index(j), count=3)
    return Tiles(q, q_rope, k, k_rope, weights, factors, q_ready, q_free, k_ready, k_free)


@gluon.jit
def keys_of(arguments, piece):
    length = arguments.topk
    if arguments.HAS_LENS:
        length = gl.minimum(gl.load(arguments.lens_ptr + piece.row), arguments.topk)
    return KeyList(
        arguments.indices_ptr + piece.row.to(gl.int64) * arguments.topk,
        length, arguments.num_keys, arguments.NUM_BLOCKS, arguments.IS_RAGGED,
    )  # fmt: skip
