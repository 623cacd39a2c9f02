"""Lists of the keys whose index logits reach a threshold, without the logits: for Hopper in Gluon.

Keys are scored as in `ragged_logits.py`, and what reaches the row's threshold is listed as it falls
out of the sum over heads, in lists as `candidate_list.py` reads them, paired: two programs that
share a row fill one from its two ends. Each warp has a list of its own and counts in registers, so
nothing is atomic and the lists are the same every time.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.candidate_list import CandidateLists
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.logit_scores import HALF, score, score_layout
from dsa_bench.kernels.logit_tiles import (
    BLOCK_KV,
    CONSUMER_REGISTERS,
    LOADER_REGISTERS,
    allocate_tiles,
    choose_ring,
    load,
    ranges_of,
    tile_descriptors,
    tile_types,
)
from dsa_bench.kernels.sample_thresholds import LISTING_WARPS, choose_sampling
from dsa_bench.kernels.visible_tiles import share_of_program

WARPS = gl.constexpr(LISTING_WARPS)


@aggregate
class Lists:
    """[queries, regions, LISTING_WARPS, capacity]; counts: 2 in place of it, for both ends."""

    threshold_ptr: gl.tensor
    values_ptr: gl.tensor
    columns_ptr: gl.tensor
    counts_ptr: gl.tensor
    REGIONS: gl.constexpr
    CAPACITY: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, threshold_ptr, values_ptr, columns_ptr, counts_ptr, REGIONS, CAPACITY):
        self.threshold_ptr = threshold_ptr
        self.values_ptr = values_ptr
        self.columns_ptr = columns_ptr
        self.counts_ptr = counts_ptr
        self.REGIONS = gl.constexpr(REGIONS)
        self.CAPACITY = gl.constexpr(CAPACITY)


@aggregate
class Listing:
    """What a thread knows of its query's list."""

    threshold: gl.tensor  # [1, QUERIES]
    start: gl.tensor
    length: gl.tensor
    number: gl.tensor  # [HALF, QUERIES]: of the list
    count: gl.tensor  # as many as its warp has listed
    end: gl.tensor  # 0 or 1: from which end of the list

    @gluon.constexpr_function
    def __init__(self, threshold, start, length, number, count, end):
        self.threshold = threshold
        self.start = start
        self.length = length
        self.number = number
        self.count = count
        self.end = end


@gluon.jit
def _begin_lists(lists, ranges, query, part, QUERIES: gl.constexpr, LOGITS: gl.constexpr):
    offs_q = query + gl.arange(0, QUERIES, gl.SliceLayout(0, LOGITS))
    exists = offs_q < ranges.num_queries
    start = gl.maximum(gl.load(ranges.start_ptr + offs_q, mask=exists, other=0), 0)
    stop = gl.maximum(gl.load(ranges.end_ptr + offs_q, mask=exists, other=0), 0)
    length = gl.maximum(gl.minimum(stop, ranges.num_keys) - start, 0)
    threshold = gl.load(lists.threshold_ptr + offs_q, mask=exists, other=0.0)
    offs_kv = gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
    # a warp has 16 keys of each half tile
    region = offs_q * lists.REGIONS + part // 2
    number = region[None, :] * WARPS + (offs_kv // (HALF // WARPS))[:, None]
    return Listing(
        threshold[None, :], start[None, :], length[None, :], number, number * 0, part & 1
    )


@gluon.jit
def _list_candidates(lists, listing, logits, kv, LOGITS: gl.constexpr):
    offs_kv = kv + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))[:, None]
    # unsigned: one comparison for both ends
    inside = (offs_kv - listing.start).to(gl.uint32, bitcast=True) < listing.length.to(
        gl.uint32, bitcast=True
    )
    take = inside & (logits >= listing.threshold)
    count = _append(lists, logits, offs_kv, take, listing.number, listing.count, listing.end)
    return Listing(
        listing.threshold, listing.start, listing.length, listing.number, count, listing.end
    )


@gluon.jit
def _append(lists, logits, offs_kv, take, number, count, end):
    """Write (logit, key) where `take` is not 0, one behind the other; returns the new counts.

    Lanes of one query, every other one of a warp, have the same count.
    """
    return gl.inline_asm_elementwise(
        append_asm(lists.CAPACITY), "=r,f,r,r,r,r,r,l,l,~{memory}",
        [logits, offs_kv, take.to(gl.int32), number, count, end,
         lists.values_ptr.to(gl.int64), lists.columns_ptr.to(gl.int64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def append_asm(capacity):
    return f"""{{ .reg .pred p, q; .reg .b32 m, s, t; .reg .b64 a, b;
        setp.ne.s32 p, $3, 0; vote.sync.ballot.b32 m, p, -1; mov.u32 $0, $5;
        setp.eq.u32 q, m, 0; @q bra DONE;
        mov.u32 s, %laneid; and.b32 s, s, 1; mov.u32 t, 0x55555555; shl.b32 t, t, s;
        and.b32 m, m, t; mov.u32 t, %lanemask_lt; and.b32 t, t, m; popc.b32 t, t;
        popc.b32 m, m; add.u32 t, t, $5; add.u32 $0, $5, m;
        setp.lt.u32 q, t, {capacity}; and.pred p, p, q;
        sub.u32 s, {capacity - 1}, t; setp.ne.s32 q, $6, 0; selp.b32 t, s, t, q;
        mad.lo.u32 t, $4, {capacity}, t; mul.wide.u32 a, t, 4; add.u64 b, a, $8; add.u64 a, a, $7;
        @p st.global.f32 [a], $1; @p st.global.u32 [b], $2;
        DONE: }}"""


@gluon.jit
def _end_lists(lists, listing):
    """All lanes of a query in a warp write the same; a query that does not exist sees nothing."""
    ptrs = lists.counts_ptr + listing.number * 2 + listing.end
    gl.store(ptrs, listing.count, mask=listing.length > 0)


@gluon.jit
def _list(
    weights_ptr, scale_ptr, lists, share, tiles,
    HEADS: gl.constexpr, WHO: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    score(
        weights_ptr, scale_ptr, lists, share, tiles, _begin_lists, _list_candidates, _end_lists,
        HEADS, WHO, SCORES,
    )  # fmt: skip


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["num_queries", "num_keys", "least_share"])
def _candidates_kernel(
    q_desc, k_desc, scale_ptr, weights_ptr, start_ptr, end_ptr, threshold_ptr,
    values_ptr, columns_ptr, counts_ptr, num_queries, num_keys, least_share,
    REGIONS: gl.constexpr, CAPACITY: gl.constexpr,
    HEADS: gl.constexpr, DEPTH: gl.constexpr, Q_SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `_logits_kernel`. A block of queries is shared by 2 · REGIONS programs at most, if
    least_share is a (2 · REGIONS - 1)-th of all tiles."""
    SCORES: gl.constexpr = score_layout(q_desc.block_type.shape[0], DEPTH)
    ranges = ranges_of(start_ptr, end_ptr, num_queries, num_keys, q_desc, k_desc, HEADS, 1)
    share = share_of_program(ranges, least_share)
    tiles = allocate_tiles(q_desc, k_desc, Q_SLOTS, STAGES)
    fence_async_shared()
    lists = Lists(threshold_ptr, values_ptr, columns_ptr, counts_ptr, REGIONS, CAPACITY)
    gl.warp_specialize(
        [
            (_list, (weights_ptr, scale_ptr, lists, share, tiles, HEADS, 0, SCORES)),
            (_list, (weights_ptr, scale_ptr, lists, share, tiles, HEADS, 1, SCORES)),
            (_list, (weights_ptr, scale_ptr, lists, share, tiles, HEADS, 2, SCORES)),
            (_list, (weights_ptr, scale_ptr, lists, share, tiles, HEADS, 3, SCORES)),
            (load, (q_desc, k_desc, share, tiles)),
        ],
        [4, 4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


def list_candidates(
    tensors: tuple[Tensor, ...], thresholds: Tensor, regions: int, capacity: int
) -> CandidateLists:
    """What reaches the thresholds; a warp's lists hold `capacity` entries.

    Args:
        tensors: the arguments of `ragged_logits`.
        regions: lists of a row and warp; 2 · regions programs may share a row.
    """
    index_q, index_k, index_k_scale, index_weights, kv_start, kv_end = tensors
    (num_queries, heads, _), num_keys = index_q.shape, index_k.shape[0]
    device, parts = index_q.device, regions * LISTING_WARPS
    lists = CandidateLists(
        torch.empty(num_queries, parts, capacity, device=device),
        torch.empty(num_queries, parts, capacity, dtype=torch.int32, device=device),
        # of programs that have no share in a row nobody writes the count
        torch.zeros(num_queries, parts, 2, dtype=torch.int32, device=device),
    )
    ring = choose_ring(index_q.dtype)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    _candidates_kernel[(num_sms,)](
        *tile_descriptors(index_q, index_k), index_k_scale, index_weights, kv_start, kv_end,
        thresholds, lists.values, lists.columns, lists.counts, num_queries, num_keys,
        -(-num_keys // BLOCK_KV // (2 * regions - 1)) + 1,
        REGIONS=regions, CAPACITY=capacity, HEADS=heads, DEPTH=32 // index_q.itemsize,
        Q_SLOTS=ring.q_slots, STAGES=ring.stages, num_warps=4,
    )  # fmt: skip
    return lists


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape."""
    dtype, heads = torch.float8_e4m3fn, 64
    ring = choose_ring(dtype)
    fp32, int32 = "*fp32:16", "*i32:16"
    return [
        CompileCase(
            name="candidate_scan",
            kernel=_candidates_kernel,
            signature={
                **tile_types(dtype, heads), "scale_ptr": fp32, "weights_ptr": fp32,
                "start_ptr": int32, "end_ptr": int32, "threshold_ptr": fp32, "values_ptr": fp32,
                "columns_ptr": int32, "counts_ptr": int32,
                "num_queries": "i32", "num_keys": "i32", "least_share": "i32",
            },
            constexprs={
                "REGIONS": 1, "CAPACITY": choose_sampling(2048).capacity, "HEADS": heads,
                "DEPTH": 32 // dtype.itemsize, "Q_SLOTS": ring.q_slots, "STAGES": ring.stages,
            },
            options={"num_warps": 4},
            must_have={"QGMMA.64x128x32": 32, "UTMALDG": 5, "VOTE": 8},
            # as in `ragged_logits.py`
            max_spill_bytes=64,
        )
    ]  # fmt: skip
