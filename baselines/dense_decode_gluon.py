"""Dense decode for Hopper in Gluon: sparse attention over the list of all positions.

The schedule is `seesaw.py`'s, split over keys. Keys of a block are neighbours, so that its gather
reads whole lines; the list is 4 bytes a key beside 1152. It should be bound by tensor cores.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.baselines.dense_attention import DenseOutputs
from dsa_bench.baselines.dense_attention_arguments import HEAD_DIM_V, check_decode, num_sms
from dsa_bench.baselines.dense_decode_splits import allocate, choose_num_splits, combine
from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.seesaw import (
    Result,
    attend_left,
    attend_right,
)
from dsa_bench.kernels.seesaw_loader import (
    Query,
    load_bf16_list,
    load_query,
)
from dsa_bench.kernels.seesaw_tiles import (
    HALF_V,
    ROPE,
    KeyList,
    allocate_tiles,
)

HEADS, PAIR_KEYS = 64, 128
"""For the host: heads of a program; keys of two blocks, the step of the main loop."""
PAIR = gl.constexpr(PAIR_KEYS)
SPLIT_COST_PAIRS = 3
"""What a part costs beside its keys: query, epilogue, the merge of its fp32 result."""


# a 1 would be specialised to a constant, which KeyList refuses
@gluon.jit(do_not_specialize=["seq_len_q", "seq_len_kv", "num_heads"])
def _dense_decode_kernel(
    q_ptr, kv_ptr, positions_ptr, out_ptr, lse_ptr,
    seq_len_q, seq_len_kv, num_heads, qk_scale_log2,
    NUM_PAIRS: gl.constexpr, IS_PARTIAL: gl.constexpr, HEADS_MASKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: a query, 64 of its heads, NUM_PAIRS pairs of key blocks.

    Programs of one query and split stand side by side: its keys meet in L2. If IS_PARTIAL it writes
    fp32 and the lse in log2 units, [num_splits, batch_size, seq_len_q, num_heads, …].
    """
    head_tiles = (num_heads + 63) // 64
    row = gl.program_id(1)
    split = gl.program_id(0) // head_tiles
    first_head = (gl.program_id(0) % head_tiles) * 64
    batch = (row // seq_len_q).to(gl.int64)
    visible = seq_len_kv - seq_len_q + row % seq_len_q + 1
    first_key = split * (NUM_PAIRS * PAIR)
    keys = KeyList(positions_ptr + first_key, seq_len_kv, visible, NUM_PAIRS, False)
    first_row = (split * gl.num_programs(1) + row) * num_heads + first_head
    result = Result(
        out_ptr, lse_ptr, lse_ptr, lse_ptr, first_row, first_head, num_heads,
        IS_PARTIAL, False, False, HEADS_MASKED,
    )  # fmt: skip
    tiles = allocate_tiles(HAS_ROPE=True)
    WIDTH: gl.constexpr = 2 * HALF_V + ROPE
    query_ptr = q_ptr + (row.to(gl.int64) * num_heads + first_head) * WIDTH
    query = Query(query_ptr, gl.to_tensor(WIDTH), num_heads - first_head, HEADS_MASKED)
    load_query(query, tiles, 0)
    gl.warp_specialize(
        [
            (attend_left, (tiles, keys, result, qk_scale_log2, 0, 0)),
            (attend_right, (tiles, keys, result, qk_scale_log2, 0, 0)),
            (load_bf16_list, (kv_ptr + batch * seq_len_kv * WIDTH, WIDTH, keys, tiles)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """In how many parts the keys are cut; registers as in sparse prefill."""

    num_splits: int
    consumer_registers: int = 224
    loader_registers: int = 56


def choose_config(
    *, batch_size: int, seq_len_q: int, num_heads: int, seq_len_kv: int, num_sms: int
) -> DecodeConfig:
    tiles = batch_size * seq_len_q * triton.cdiv(num_heads, HEADS)
    steps = triton.cdiv(seq_len_kv, PAIR_KEYS)
    return DecodeConfig(
        num_splits=choose_num_splits(
            tiles=tiles, steps=steps, split_cost=SPLIT_COST_PAIRS, num_sms=num_sms
        )
    )


@lru_cache(maxsize=4)
def _positions(count: int, device: torch.device) -> Tensor:
    """0 … count - 1: the list of all keys, alike for all calls of a length."""
    return torch.arange(count, dtype=torch.int32, device=device)


def decode(
    q: Tensor, kv: Tensor, *, sm_scale: float, config: DecodeConfig | None = None
) -> DenseOutputs:
    """MQA form, causal to the end of the keys; contiguous tensors as in `dense_attention.py`."""
    check_decode(q, kv)
    (batch_size, seq_len_q, num_heads, _), seq_len_kv = q.shape, kv.shape[1]
    config = config or choose_config(
        batch_size=batch_size, seq_len_q=seq_len_q, num_heads=num_heads, seq_len_kv=seq_len_kv,
        num_sms=num_sms(q.device),
    )  # fmt: skip
    splits = config.num_splits
    results = allocate(q, HEAD_DIM_V, splits)
    if not q.numel():
        return results.outputs
    num_pairs = triton.cdiv(triton.cdiv(seq_len_kv, PAIR_KEYS), splits)
    _dense_decode_kernel[(splits * triton.cdiv(num_heads, HEADS), batch_size * seq_len_q)](
        q, kv, _positions(splits * num_pairs * PAIR_KEYS, q.device), results.part, results.part_lse,
        seq_len_q, seq_len_kv, num_heads, sm_scale * LOG2_E,
        NUM_PAIRS=num_pairs, IS_PARTIAL=splits > 1, HEADS_MASKED=num_heads % HEADS != 0,
        CONSUMER_REGISTERS=config.consumer_registers, LOADER_REGISTERS=config.loader_registers,
        num_warps=4,
    )  # fmt: skip
    return combine(results)


def compile_cases() -> list[CompileCase]:
    """The V3.2 shape, whole and in parts."""
    bf16, fp32 = "*bf16:16", "*fp32:16"
    config = DecodeConfig(num_splits=2)
    return [
        CompileCase(
            name=f"dense_decode_gluon[{'parts' if is_partial else 'whole'}]",
            kernel=_dense_decode_kernel,
            signature={
                "q_ptr": bf16, "kv_ptr": bf16, "positions_ptr": "*i32:16",
                "out_ptr": fp32 if is_partial else bf16, "lse_ptr": fp32,
                "seq_len_q": "i32", "seq_len_kv": "i32", "num_heads": "i32",
                "qk_scale_log2": "fp32",
            },
            constexprs={
                "NUM_PAIRS": 64, "IS_PARTIAL": is_partial, "HEADS_MASKED": False,
                "CONSUMER_REGISTERS": config.consumer_registers,
                "LOADER_REGISTERS": config.loader_registers,
            },
            options={"num_warps": 4},
            must_have={"HGMMA.64x256": 16, "HGMMA.64x64": 72, "LDGSTS": 108},
        )
        for is_partial in (False, True)
    ]  # fmt: skip
