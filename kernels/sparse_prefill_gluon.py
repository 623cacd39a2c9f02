"""Sparse prefill for Hopper in Gluon: programs walk over queries, 64 heads at a time.

A program is launched for each SM and takes one piece of work, 64 heads of one query, after the
other. Its three warpgroups follow `seesaw.py`'s schedule: K rows gathered by cp.async into shared
memory, O and half of P in registers, the other half of P through shared memory. The loader runs
ahead into the next piece: its query and half a block of rows come while the consumers store their
result. Programs that stand side by side work on one query, so that its rows are gathered once from
HBM and meet in L2. Tensor cores should bind it; measured, an H100 lowers its clock to stay at
700 W, and L2 gives 4.7 to 5.6 TB/s, not far from what it can. Supports any number of heads (64 at
a time, the rest of a tile is padding), queries and keys, rows of 576 and of 512. What was tried and
what it gave: `docs/kernels/sparse_prefill.md`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.core import _aggregate as aggregate

from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.head_pieces import count_pieces, piece_after
from dsa_bench.kernels.seesaw import (
    Result,
    attend_left,
    attend_right,
)
from dsa_bench.kernels.seesaw_loader import (
    Query,
    load_bf16_rows,
    load_query,
)
from dsa_bench.kernels.seesaw_tiles import (
    KeyList,
    allocate_tiles,
)
from dsa_bench.kernels.sparse_prefill import (
    SparsePrefillInputs,
    SparsePrefillOutputs,
    SparsePrefillShape,
    check_arguments,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "sparse_prefill"
BLOCK_H = 64
PAIR = 128
"""Keys of two blocks, the step of the main loop."""
HEAD_DIMS_QK, HEAD_DIM_V = (576, 512), 512


@aggregate
class Arguments:
    """What all programs share."""

    q_ptr: gl.tensor
    kv_ptr: gl.tensor
    indices_ptr: gl.tensor
    lens_ptr: gl.tensor
    sink_ptr: gl.tensor
    out_ptr: gl.tensor
    max_ptr: gl.tensor
    lse_ptr: gl.tensor
    num_pieces: gl.tensor
    num_keys: gl.tensor
    num_heads: gl.tensor
    topk: gl.tensor
    qk_scale_log2: gl.tensor
    stride_q_row: gl.tensor
    stride_q_head: gl.tensor
    stride_kv_row: gl.tensor
    stride_indices_row: gl.tensor
    NUM_PAIRS: gl.constexpr
    HAS_LENS: gl.constexpr
    HAS_SINK: gl.constexpr
    IS_RAGGED: gl.constexpr
    HEADS_MASKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
        num_pieces, num_keys, num_heads, topk, qk_scale_log2,
        stride_q_row, stride_q_head, stride_kv_row, stride_indices_row,
        NUM_PAIRS, HAS_LENS, HAS_SINK, IS_RAGGED, HEADS_MASKED,
    ):  # fmt: skip
        self.q_ptr = q_ptr
        self.kv_ptr = kv_ptr
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
        self.qk_scale_log2 = qk_scale_log2
        self.stride_q_row = stride_q_row
        self.stride_q_head = stride_q_head
        self.stride_kv_row = stride_kv_row
        self.stride_indices_row = stride_indices_row
        self.NUM_PAIRS = gl.constexpr(NUM_PAIRS)
        self.HAS_LENS = gl.constexpr(HAS_LENS)
        self.HAS_SINK = gl.constexpr(HAS_SINK)
        self.IS_RAGGED = gl.constexpr(IS_RAGGED)
        self.HEADS_MASKED = gl.constexpr(HEADS_MASKED)


@gluon.jit
def _keys_of(arguments, piece):
    length = arguments.topk
    if arguments.HAS_LENS:
        length = gl.minimum(gl.load(arguments.lens_ptr + piece.row), arguments.topk)
    return KeyList(
        arguments.indices_ptr + piece.row.to(gl.int64) * arguments.stride_indices_row,
        length, arguments.num_keys, arguments.NUM_PAIRS, arguments.IS_RAGGED,
    )  # fmt: skip


@gluon.jit
def _query_of(arguments, piece):
    start = piece.row.to(gl.int64) * arguments.stride_q_row
    start += piece.first_head * arguments.stride_q_head
    return Query(
        arguments.q_ptr + start, arguments.stride_q_head,
        arguments.num_heads - piece.first_head, arguments.HEADS_MASKED,
    )  # fmt: skip


@gluon.jit
def _result_of(arguments, piece):
    first_row = piece.row * arguments.num_heads + piece.first_head
    return Result(
        arguments.out_ptr, arguments.lse_ptr, arguments.max_ptr, arguments.sink_ptr,
        first_row, piece.first_head, arguments.num_heads,
        False, True, arguments.HAS_SINK, arguments.HEADS_MASKED,
    )  # fmt: skip


@gluon.jit
def _consume(arguments, tiles, ATTEND: gl.constexpr):
    """A consumer: `attend_left` or `attend_right`, piece after piece."""
    for done in range(count_pieces(arguments.num_pieces)):
        piece = piece_after(done, arguments.num_heads)
        ATTEND(
            tiles, _keys_of(arguments, piece), _result_of(arguments, piece),
            arguments.qk_scale_log2, done * arguments.NUM_PAIRS, done,
        )  # fmt: skip


@gluon.jit
def _load(arguments, tiles):
    for done in range(count_pieces(arguments.num_pieces)):
        piece = piece_after(done, arguments.num_heads)
        load_query(_query_of(arguments, piece), tiles, done)
        load_bf16_rows(
            arguments.kv_ptr, arguments.stride_kv_row, _keys_of(arguments, piece), tiles,
            done * arguments.NUM_PAIRS,
        )  # fmt: skip
    async_copy.wait_group(0)


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["num_pieces", "num_keys", "num_heads", "topk", "stride_indices_row"])
def _sparse_prefill_kernel(
    q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
    num_pieces, num_keys, num_heads, topk, qk_scale_log2,
    stride_q_row, stride_q_head, stride_kv_row, stride_indices_row,
    NUM_PAIRS: gl.constexpr, HAS_LENS: gl.constexpr, HAS_SINK: gl.constexpr,
    IS_RAGGED: gl.constexpr, HEADS_MASKED: gl.constexpr, HAS_ROPE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: a loader and two consumers, piece after piece."""
    arguments = Arguments(
        q_ptr, kv_ptr, indices_ptr, lens_ptr, sink_ptr, out_ptr, max_ptr, lse_ptr,
        num_pieces, num_keys, num_heads, topk, qk_scale_log2,
        stride_q_row, stride_q_head, stride_kv_row, stride_indices_row,
        NUM_PAIRS, HAS_LENS, HAS_SINK, IS_RAGGED, HEADS_MASKED,
    )  # fmt: skip
    tiles = allocate_tiles(HAS_ROPE)
    gl.warp_specialize(
        [
            (_consume, (arguments, tiles, gl.constexpr(attend_left))),
            (_consume, (arguments, tiles, gl.constexpr(attend_right))),
            (_load, (arguments, tiles)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsePrefillConfig:
    """Registers a thread: 4 · (2 consumers + loader) must not exceed 12 · 168."""

    consumer_registers: int = 216
    loader_registers: int = 72


def choose_config(num_heads: int, topk: int) -> SparsePrefillConfig:
    """One for all shapes: 216/72 compiles without spills for every flag; 224/56 spills 16 bytes
    with all flags, 232/40 48 bytes without any.

    H100, 128 heads, topk 2048, at 8K / 32K / 128K keys, times as fast as FlashMLA in the same run:
    216/72 1.03 / 1.08 / 1.03, and in another 224/56 and 208/88 both 1.03 / 1.01 / 1.01.
    """
    return SparsePrefillConfig()


def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    sm_scale: float,
    attn_sink: Tensor | None = None,
    topk_lens: Tensor | None = None,
) -> SparsePrefillOutputs:
    """Sparse multi-query attention of a prefill chunk; formula and conventions as in
    `sparse_prefill.py`.

    Args:
        q: [seq_len_q, num_heads, 576 or 512] bf16, strides multiples of 16 elements.
        kv: [seq_len_kv, 576 or 512] bf16, row stride a multiple of 16 elements.
        topk_indices: [seq_len_q, topk] int32.
        sm_scale: > 0.
        attn_sink: [num_heads] fp32.
        topk_lens: [seq_len_q] int32.
    Returns:
        out [seq_len_q, num_heads, 512] bf16, max_logits and lse [seq_len_q, num_heads] fp32.
    """
    check_arguments(q, kv, topk_indices, sm_scale, attn_sink, topk_lens, HEAD_DIMS_QK)
    (seq_len_q, num_heads, head_dim_qk), topk = q.shape, topk_indices.shape[1]
    out = torch.empty(seq_len_q, num_heads, HEAD_DIM_V, dtype=torch.bfloat16, device=q.device)
    max_logits = torch.empty(seq_len_q, num_heads, device=q.device)
    lse = torch.empty_like(max_logits)
    if out.numel() == 0 or topk == 0:
        return SparsePrefillOutputs(
            out.zero_(), max_logits.fill_(float("-inf")), lse.fill_(float("inf"))
        )
    config = choose_config(num_heads, topk)
    num_pieces = seq_len_q * -(-num_heads // BLOCK_H)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    _sparse_prefill_kernel[(min(num_pieces, num_sms),)](
        q, kv, topk_indices, topk_lens if topk_lens is not None else topk_indices,
        attn_sink if attn_sink is not None else lse, out, max_logits, lse,
        num_pieces, kv.shape[0], num_heads, topk, sm_scale * LOG2_E,
        q.stride(0), q.stride(1), kv.stride(0), topk_indices.stride(0),
        NUM_PAIRS=-(-topk // PAIR), HAS_LENS=topk_lens is not None, HAS_SINK=attn_sink is not None,
        IS_RAGGED=topk_lens is not None or topk % PAIR != 0, HEADS_MASKED=num_heads % BLOCK_H != 0,
        HAS_ROPE=head_dim_qk > HEAD_DIM_V,
        CONSUMER_REGISTERS=config.consumer_registers, LOADER_REGISTERS=config.loader_registers,
        num_warps=4,
    )  # fmt: skip
    return SparsePrefillOutputs(out, max_logits, lse)


def run(inputs: SparsePrefillInputs) -> SparsePrefillOutputs:
    return sparse_prefill(
        inputs.q,
        inputs.kv,
        inputs.topk_indices,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        topk_lens=inputs.topk_lens,
    )


def supports(shape: SparsePrefillShape, machine: Machine) -> str | None:
    if not machine.is_hopper:
        return (
            f"gluon sparse_prefill needs a Hopper GPU (sm_90), this is {machine.name} (use triton)"
        )
    if shape.head_dim_qk not in HEAD_DIMS_QK or shape.head_dim_v != HEAD_DIM_V:
        return (
            "gluon sparse_prefill needs head_dim 576/512 or 512/512,"
            f" this case has {shape.head_dim_qk}/{shape.head_dim_v}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape, the one with every flag set, and rows without rope columns."""
    bf16, fp32, int32, size = "*bf16:16", "*fp32:16", "*i32:16", "i32:16"
    signature = {
        "q_ptr": bf16, "kv_ptr": bf16, "indices_ptr": int32, "lens_ptr": int32, "sink_ptr": fp32,
        "out_ptr": bf16, "max_ptr": fp32, "lse_ptr": fp32,
        "num_pieces": "i32", "num_keys": "i32", "num_heads": "i32", "topk": "i32",
        "qk_scale_log2": "fp32",
        "stride_q_row": size, "stride_q_head": size, "stride_kv_row": size,
        "stride_indices_row": "i32",
    }  # fmt: skip
    config = choose_config(128, 2048)
    registers = {
        "CONSUMER_REGISTERS": config.consumer_registers,
        "LOADER_REGISTERS": config.loader_registers,
    }
    flags = ("HAS_LENS", "HAS_SINK", "IS_RAGGED", "HEADS_MASKED")
    return [
        CompileCase(
            name=f"sparse_prefill_gluon[{label}]",
            kernel=_sparse_prefill_kernel,
            signature=signature,
            constexprs={
                **dict.fromkeys(flags, value), **registers, "NUM_PAIRS": 16, "HAS_ROPE": has_rope
            },
            options={"num_warps": 4},
            must_have={
                "HGMMA.64x256": 16,
                "HGMMA.64x64": 72 if has_rope else 64,
                "LDGSTS": 108 if has_rope else 96,
            },
        )
        for label, value, has_rope in (
            ("plain", False, True), ("all-flags", True, True), ("no-rope", False, False),
        )
    ]  # fmt: skip
