"""Dense prefill for Hopper in Gluon, warp-specialised: a loader by TMA and two consumers.

One program: a head, 128 queries, all keys they see, from the diagonal back to key 0.

    loader     1 warp    K and V blocks of 128 keys by TMA into two buffers each
    consumers  4 warps   two of them, 64 queries each: scores and output in registers

    per block  S = Q·K(i)ᵀ and O += P·V(i - 1) are issued together
               S done: K(i) is freed, the softmax of S runs beside the product with V(i - 1)
               O done: V(i - 1) is freed, O rescaled, P rounded to bf16

A consumer hides its softmax behind its own product with V and behind the other consumer's products;
`PING_PONG` makes them take turns at the tensor cores. It should be bound by tensor cores. Shared
memory: Q 48 KB, K 96 KB, V 64 KB: 208 of 227 KB. The scheme is the one that FlashAttention-3's
paper describes (arXiv 2407.08608, section 3). A row whose largest score, scaled and in base 2, is
beyond 2^30 may end in NaN: its maximum is a rounded product, which a fused one is subtracted from
in the exponent (`online_softmax.py`, where the difference comes first, for an instruction more a
score).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from dsa_bench.baselines.dense_attention import DenseOutputs
from dsa_bench.baselines.dense_attention_arguments import (
    HEAD_DIM_V_MHA,
    NOPE,
    ROPE,
    check_prefill,
    num_sms,
)
from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.named_barrier import arrive_at, wait_at
from dsa_bench.kernels.seesaw_tiles import LN_2, NO_MAXIMUM, TILE, opaque_zero

# triton 3.9 renamed the copies
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

QUERIES, KEYS = 64, 128
"""For the host: queries of a consumer, keys of a block."""
SWIZZLED = gl.NVMMASharedLayout(128, 16, 2)
"""seesaw's TILE, for the host."""
BLOCK_Q = gl.constexpr(2 * QUERIES)
ROWS = gl.constexpr(QUERIES)
"""Queries of a consumer: the M of one wgmma."""
BLOCK_KV = gl.constexpr(KEYS)
BUFFERS = gl.constexpr(2)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Accumulators of one consumer, 64 by 128: scores and outputs alike."""
P_OPERAND = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES))
TURN = gl.constexpr(8)
"""Named barriers 8 and 9: consumer 0 and 1 may issue its products."""


@aggregate
class Tiles:
    """Shared memory of one program, and its barriers."""

    q_nope: gl.shared_memory_descriptor  # [2, ROWS, 128]; in the end takes the output
    q_rope: gl.shared_memory_descriptor  # [2, ROWS, 64]
    k_nope: gl.shared_memory_descriptor  # [BUFFERS, BLOCK_KV, 128]
    k_rope: gl.shared_memory_descriptor  # [BUFFERS, BLOCK_KV, 64]
    v: gl.shared_memory_descriptor  # [BUFFERS, BLOCK_KV, 128]
    q_ready: gl.shared_memory_descriptor  # mbarriers; of one the next, of BUFFERS the others
    k_ready: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q_nope, q_rope, k_nope, k_rope, v, q_ready, k_ready, v_ready, k_free, v_free
    ):
        self.q_nope = q_nope
        self.q_rope = q_rope
        self.k_nope = k_nope
        self.k_rope = k_rope
        self.v = v
        self.q_ready = q_ready
        self.k_ready = k_ready
        self.v_ready = v_ready
        self.k_free = k_free
        self.v_free = v_free


@aggregate
class Work:
    """The work of one program: BLOCK_Q queries of one head, blocks of keys 0 … end - 1."""

    head: gl.tensor
    q_begin: gl.tensor
    before: gl.tensor  # keys before the first query of the call
    end: gl.tensor
    first_masked: gl.tensor  # blocks from here on have a key that some query must not see

    @gluon.constexpr_function
    def __init__(self, head, q_begin, before, end, first_masked):
        self.head = head
        self.q_begin = q_begin
        self.before = before
        self.end = end
        self.first_masked = first_masked


@gluon.jit
def _barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(j), count=COUNT)
    return barriers


@gluon.jit
def _load_keys(k_nope_desc, k_rope_desc, tiles, work, i):
    """Block end - 1 - i of the keys into its buffer."""
    NOPE: gl.constexpr = k_nope_desc.block_type.shape[1]
    ROPE: gl.constexpr = k_rope_desc.block_type.shape[1]
    buffer, phase = i % BUFFERS, (i // BUFFERS) & 1
    row, column = (work.end - 1 - i) * BLOCK_KV, work.head * (NOPE + ROPE)
    ready = tiles.k_ready.index(buffer)
    mbarrier.wait(tiles.k_free.index(buffer), phase ^ 1)
    mbarrier.expect(ready, k_nope_desc.block_type.nbytes + k_rope_desc.block_type.nbytes)
    copy_tile(k_nope_desc, [row, column], ready, tiles.k_nope.index(buffer))
    copy_tile(k_rope_desc, [row, column + NOPE], ready, tiles.k_rope.index(buffer))


@gluon.jit
def _load_values(v_desc, tiles, work, i):
    buffer, phase = i % BUFFERS, (i // BUFFERS) & 1
    ready = tiles.v_ready.index(buffer)
    mbarrier.wait(tiles.v_free.index(buffer), phase ^ 1)
    mbarrier.expect(ready, v_desc.block_type.nbytes)
    row, column = (work.end - 1 - i) * BLOCK_KV, work.head * v_desc.block_type.shape[1]
    copy_tile(v_desc, [row, column], ready, tiles.v.index(buffer))


@gluon.jit
def _load(q_nope_desc, q_rope_desc, k_nope_desc, k_rope_desc, v_desc, tiles, work):
    """The loader, in the order in which the consumers touch the tiles: K(i + 1) before V(i)."""
    NOPE: gl.constexpr = q_nope_desc.block_type.shape[1]
    ROPE: gl.constexpr = q_rope_desc.block_type.shape[1]
    column = work.head * (NOPE + ROPE)
    ready = tiles.q_ready.index(0)
    mbarrier.expect(ready, 2 * (q_nope_desc.block_type.nbytes + q_rope_desc.block_type.nbytes))
    for j in gl.static_range(2):
        row = work.q_begin + j * ROWS
        copy_tile(q_nope_desc, [row, column], ready, tiles.q_nope.index(j))
        copy_tile(q_rope_desc, [row, column + NOPE], ready, tiles.q_rope.index(j))
    _load_keys(k_nope_desc, k_rope_desc, tiles, work, 0)
    for i in range(work.end):
        if i + 1 < work.end:
            _load_keys(k_nope_desc, k_rope_desc, tiles, work, i + 1)
        _load_values(v_desc, tiles, work, i)


@gluon.jit
def _issue_scores(tiles, buffer, WHO: gl.constexpr):
    """Q · Kᵀ of a block, unfinished."""
    # constant addresses would be hoisted out of the loop and spilled: see seesaw.py
    who = opaque_zero() + WHO
    scores = gl.zeros([ROWS, BLOCK_KV], gl.float32, SCORES)
    k_nope, k_rope = tiles.k_nope.index(buffer), tiles.k_rope.index(buffer)
    scores = warpgroup_mma(
        tiles.q_nope.index(who), k_nope.permute((1, 0)), scores, use_acc=False, is_async=True
    )
    return warpgroup_mma(tiles.q_rope.index(who), k_rope.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _mask(scores, block, last_visible):
    offs_kv = block * BLOCK_KV + gl.arange(0, BLOCK_KV, COLUMN)
    return gl.where(offs_kv[None, :] <= last_visible[:, None], scores, -float("inf"))


@gluon.jit
def _softmax_step(scores, row_max, row_sum, qk_scale_log2):
    """Weights exp2(scores · scale - maximum), and what the sums so far are to be multiplied by."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * qk_scale_log2)
    rescale = gl.exp2(row_max - new_max)
    weights = gl.exp2(scores * qk_scale_log2 - new_max[:, None])
    return weights, rescale, new_max, row_sum * rescale + gl.sum(weights, 1)


@gluon.jit
def _attend(
    out_desc, lse_ptr, seq_len_q, num_heads, tiles, work, qk_scale_log2,
    WHO: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """Consumer WHO: queries q_begin + 64 · WHO …"""
    offs_q = work.q_begin + WHO * ROWS + gl.arange(0, ROWS, ROW)
    last_visible = work.before + offs_q
    row_max = gl.full([ROWS], NO_MAXIMUM, gl.float32, ROW)
    row_sum = gl.zeros([ROWS], gl.float32, ROW)
    acc = gl.zeros([ROWS, BLOCK_KV], gl.float32, SCORES)

    mbarrier.wait(tiles.q_ready.index(0), 0)
    mbarrier.wait(tiles.k_ready.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_issue_scores(tiles, 0, WHO)])
    mbarrier.arrive(tiles.k_free.index(0), count=1)
    scores = _mask(scores, work.end - 1, last_visible)
    weights, rescale, row_max, row_sum = _softmax_step(scores, row_max, row_sum, qk_scale_log2)
    p = gl.convert_layout(weights.to(gl.bfloat16), P_OPERAND, assert_trivial=True)
    if PING_PONG and WHO == 1:
        arrive_at(TURN)

    masked = work.end - work.first_masked
    for part in gl.static_range(2):
        first = 1 if part == 0 else gl.maximum(masked, 1)
        last = masked if part == 0 else work.end
        for i in range(first, last):
            buffer, phase = i % BUFFERS, (i // BUFFERS) & 1
            mbarrier.wait(tiles.k_ready.index(buffer), phase)
            if PING_PONG:
                wait_at(TURN + WHO)
            scores_token = _issue_scores(tiles, buffer, WHO)
            before, before_phase = (i - 1) % BUFFERS, ((i - 1) // BUFFERS) & 1
            mbarrier.wait(tiles.v_ready.index(before), before_phase)
            acc_token = warpgroup_mma(p, tiles.v.index(before), acc, is_async=True)
            if PING_PONG:
                arrive_at(TURN + 1 - WHO)
            scores = warpgroup_mma_wait(1, deps=[scores_token])
            mbarrier.arrive(tiles.k_free.index(buffer), count=1)
            if part == 0:
                scores = _mask(scores, work.end - 1 - i, last_visible)
            weights, rescale, row_max, row_sum = _softmax_step(
                scores, row_max, row_sum, qk_scale_log2
            )
            # a register operand must outlive its product, so it passes through the wait
            acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
            mbarrier.arrive(tiles.v_free.index(before), count=1)
            acc = acc * rescale[:, None]
            p = gl.convert_layout(weights.to(gl.bfloat16), P_OPERAND, assert_trivial=True)
    if PING_PONG and WHO == 0:
        wait_at(TURN)

    buffer, phase = (work.end - 1) % BUFFERS, ((work.end - 1) // BUFFERS) & 1
    mbarrier.wait(tiles.v_ready.index(buffer), phase)
    acc_token = warpgroup_mma(p, tiles.v.index(buffer), acc, is_async=True)
    lse = (row_max + gl.log2(row_sum)) * LN_2
    gl.store(lse_ptr + offs_q.to(gl.int64) * num_heads + work.head, lse, mask=offs_q < seq_len_q)
    acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
    # its own queries are dead
    staging = tiles.q_nope.index(WHO)
    staging.store((acc * (1.0 / row_sum)[:, None]).to(gl.bfloat16))
    fence_async_shared()
    store_tile(out_desc, [work.q_begin + WHO * ROWS, work.head * BLOCK_KV], staging)
    tma.store_wait(0)


# a 1 would be specialised to a constant, which Work refuses
@gluon.jit(do_not_specialize=["seq_len_q", "seq_len_kv", "num_heads"])
def _dense_prefill_kernel(
    q_nope_desc, q_rope_desc, k_nope_desc, k_rope_desc, v_desc, out_desc, lse_ptr,
    seq_len_q, seq_len_kv, num_heads, qk_scale_log2,
    HEADS_TOGETHER: gl.constexpr, PING_PONG: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors see [tokens, num_heads · width]. HEADS_TOGETHER heads run side by side, so that
    their keys stay in L2; of each the queries that see most come first."""
    num_blocks_q = (seq_len_q + BLOCK_Q - 1) // BLOCK_Q
    group = gl.program_id(0) // (num_blocks_q * HEADS_TOGETHER)
    heads_here = gl.minimum(num_heads - group * HEADS_TOGETHER, HEADS_TOGETHER)
    place = gl.program_id(0) % (num_blocks_q * HEADS_TOGETHER)
    head = group * HEADS_TOGETHER + place % heads_here
    q_begin = (num_blocks_q - 1 - place // heads_here) * BLOCK_Q
    before = seq_len_kv - seq_len_q
    visible = gl.minimum(seq_len_kv, before + q_begin + BLOCK_Q)
    end = (visible + BLOCK_KV - 1) // BLOCK_KV
    work = Work(head, q_begin, before, end, (before + q_begin + 1) // BLOCK_KV)

    tiles = Tiles(
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, q_nope_desc.block_type.shape[1]], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, q_rope_desc.block_type.shape[1]], TILE),
        gl.allocate_shared_memory(
            gl.bfloat16, [BUFFERS, BLOCK_KV, k_nope_desc.block_type.shape[1]], TILE
        ),
        gl.allocate_shared_memory(
            gl.bfloat16, [BUFFERS, BLOCK_KV, k_rope_desc.block_type.shape[1]], TILE
        ),
        gl.allocate_shared_memory(
            gl.bfloat16, [BUFFERS, BLOCK_KV, v_desc.block_type.shape[1]], TILE
        ),
        _barriers(1, 1), _barriers(BUFFERS, 1), _barriers(BUFFERS, 1),
        _barriers(BUFFERS, 2), _barriers(BUFFERS, 2),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                out_desc, lse_ptr, seq_len_q, num_heads, tiles, work, qk_scale_log2, 0, PING_PONG,
            )),
            (_attend, (
                out_desc, lse_ptr, seq_len_q, num_heads, tiles, work, qk_scale_log2, 1, PING_PONG,
            )),
            (_load, (
                q_nope_desc, q_rope_desc, k_nope_desc, k_rope_desc, v_desc, tiles, work,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """Registers a thread: 4 · (2 consumers + loader) must not exceed 12 · 168."""

    heads_together: int
    """Heads whose queries run side by side."""
    ping_pong: bool = True
    consumer_registers: int = 240
    loader_registers: int = 24


def choose_prefill_config(*, seq_len_q: int, num_sms: int) -> PrefillConfig:
    """As many heads as fill the SMs with all their queries.

    The programs of a head then walk its keys in step, and each block comes from HBM once: at 32K
    keys a head's are 21 MB, and those of 8 heads do not fit into the L2 of 50 MB.
    """
    return PrefillConfig(heads_together=max(1, num_sms // triton.cdiv(seq_len_q, 2 * QUERIES)))


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float, config: PrefillConfig | None = None
) -> DenseOutputs:
    """MHA form, causal to the end of the keys; contiguous tensors as in `dense_attention.py`."""
    check_prefill(q, k, v)
    (seq_len_q, num_heads, _), seq_len_kv = q.shape, k.shape[0]
    config = config or choose_prefill_config(seq_len_q=seq_len_q, num_sms=num_sms(q.device))
    out = q.new_empty(seq_len_q, num_heads, HEAD_DIM_V_MHA)
    lse = torch.empty(seq_len_q, num_heads, device=q.device)
    if not q.numel():
        return DenseOutputs(out, lse)

    def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [rows, columns], SWIZZLED)

    rows, keys = QUERIES, KEYS
    _dense_prefill_kernel[(triton.cdiv(seq_len_q, 2 * QUERIES) * num_heads,)](
        tiles(q, rows, NOPE), tiles(q, rows, ROPE), tiles(k, keys, NOPE), tiles(k, keys, ROPE),
        tiles(v, keys, HEAD_DIM_V_MHA), tiles(out, rows, HEAD_DIM_V_MHA),
        lse, seq_len_q, seq_len_kv, num_heads, sm_scale * LOG2_E,
        HEADS_TOGETHER=config.heads_together, PING_PONG=config.ping_pong,
        CONSUMER_REGISTERS=config.consumer_registers, LOADER_REGISTERS=config.loader_registers,
        num_warps=4,
    )  # fmt: skip
    return DenseOutputs(out, lse)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape."""

    def tile(*block: int) -> str:
        return f"tensordesc<bf16{list(block)},{SWIZZLED!r}>"

    launch = PrefillConfig(heads_together=4)
    case = CompileCase(
        name="dense_prefill_gluon",
        kernel=_dense_prefill_kernel,
        signature={
            "q_nope_desc": tile(QUERIES, NOPE), "q_rope_desc": tile(QUERIES, ROPE),
            "k_nope_desc": tile(KEYS, NOPE), "k_rope_desc": tile(KEYS, ROPE),
            "v_desc": tile(KEYS, HEAD_DIM_V_MHA), "out_desc": tile(QUERIES, HEAD_DIM_V_MHA),
            "lse_ptr": "*fp32:16", "seq_len_q": "i32", "seq_len_kv": "i32", "num_heads": "i32",
            "qk_scale_log2": "fp32",
        },
        constexprs={
            "HEADS_TOGETHER": launch.heads_together, "PING_PONG": launch.ping_pong,
            "CONSUMER_REGISTERS": launch.consumer_registers,
            "LOADER_REGISTERS": launch.loader_registers,
        },
        options={"num_warps": 4},
        must_have={"HGMMA.64x128x16": 120, "UTMALDG": 14, "UTMASTG": 2},
    )  # fmt: skip
    return [case]
