"""Attention of a tile of heads to a list of rows, block by block: shared by the portable kernels.

    per block   S = Q · Kᵀ, -inf where an entry names no row
                P, f and l' from S by `online_softmax.py`      O' = O · f + P · V

An entry that names no row loads zeros, because 0 × NaN is NaN. The entries of a block are read one
block ahead by hand: then nothing but an address lies between the loop and the loads of rows, and
the compiler makes them asynchronous copies, two blocks in flight.

bf16 rows are held in two halves of 256 columns and a tail of 64, for one accumulator of 512 columns
was 6 % slower (271 against 290 TFLOP/s, H100, 8K keys, without masked loads). On Hopper the loop
takes 255 registers; what is said below of spills was seen with Triton 3.6.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dsa_bench.kernels import attention
from dsa_bench.kernels.online_softmax import NO_MAXIMUM, softmax_step

LOG2_E = tl.constexpr(attention.LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
HALF_V = tl.constexpr(256)
ROPE = tl.constexpr(64)

SMALLEST_BLOCK_H = 16
HAVE_64_HEADS = ((8, 0), (8, 7), (9, 0))
"""Compute capabilities whose programs take 64 heads; others take 32."""
ASSUMED_CAPABILITY, ASSUMED_SMS = (9, 0), 132
"""An H100, where there is no GPU to ask: the interpreter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Heads and keys of a tile, and how it is run."""

    block_h: int
    block_kv: int
    num_warps: int = 8
    num_stages: int = 2


def choose_tiling(num_heads: int, capability: tuple[int, int]) -> Tiling:
    """The largest tile that fits into shared memory and 255 registers without spills.

    Hopper (227 KB): 64 heads × 64 keys take 221 KB. Others 32 keys: 64 heads take 115 KB (sm_80
    has 163), 32 heads 76 KB (sm_86, sm_89 and sm_120 have 99). For sm_100 Triton 3.6 puts tiles of
    64 heads into tensor memory and emits no code for them. Four warps spill even at 16 × 64.
    Without masked loads, H100, prefill of 4096 × 8192, 128 heads: 64 keys in two stages
    290 TFLOP/s, in one stage 200, 32 keys 190 to 212.
    """
    largest = 64 if capability in HAVE_64_HEADS else 32
    block_h = min(largest, max(SMALLEST_BLOCK_H, triton.next_power_of_2(num_heads)))
    return Tiling(block_h=block_h, block_kv=64 if capability[0] == 9 else 32)


def ask_device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of SMs."""
    if device.type != "cuda":
        return ASSUMED_CAPABILITY, ASSUMED_SMS
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


@triton.jit
def load_entries(list_ptr, first, end, BLOCK_KV: tl.constexpr):
    """Entries of the block that begins at `first`; -1 from `end` on."""
    offs = first + tl.arange(0, BLOCK_KV)
    return tl.load(list_ptr + offs, mask=offs < end, other=-1)


@triton.jit
def find_rows(entries, num_rows):
    """Row numbers, and which of them there are: the others may only be read under a mask.

    Putting 0 in their place takes registers that the loop does not have.
    """
    return entries.to(tl.int64), (entries >= 0) & (entries < num_rows)


@triton.jit
def load_halves(row_ptrs, mask, HAS_ROPE: tl.constexpr):
    """Left half, right half and tail of bf16 rows, 0 where masked; without a tail left again."""
    offs_d = tl.arange(0, HALF_V)
    left = tl.load(row_ptrs + offs_d[None, :], mask=mask, other=0.0)
    right = tl.load(row_ptrs + HALF_V + offs_d[None, :], mask=mask, other=0.0)
    rope = left
    if HAS_ROPE:
        offs_rope = 2 * HALF_V + tl.arange(0, ROPE)
        rope = tl.load(row_ptrs + offs_rope[None, :], mask=mask, other=0.0)
    return left, right, rope


@triton.jit
def attend_bf16_rows(
    q_ptrs, is_head, rows_ptr, stride_row, num_rows, list_ptr, end, qk_scale_log2,
    HAS_ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """(left and right half of the unnormalised output, maximum as a power of 2, sum).

    The row stride is an argument even where it is a constant: a constant makes ptxas spill.
    """
    q_left, q_right, q_rope = load_halves(q_ptrs, is_head[:, None], HAS_ROPE)
    row_max = tl.full([BLOCK_H], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc_left = tl.zeros([BLOCK_H, HALF_V], tl.float32)
    acc_right = tl.zeros([BLOCK_H, HALF_V], tl.float32)
    entries = load_entries(list_ptr, 0, end, BLOCK_KV)
    for first in tl.range(0, end, BLOCK_KV, num_stages=NUM_STAGES):
        rows, valid = find_rows(entries, num_rows)
        entries = load_entries(list_ptr, first + BLOCK_KV, end, BLOCK_KV)
        k_ptrs = rows_ptr + rows[:, None] * stride_row
        k_left, k_right, k_rope = load_halves(k_ptrs, valid[:, None], HAS_ROPE)
        scores = tl.dot(q_left, tl.trans(k_left))  # [BLOCK_H, BLOCK_KV]
        scores = tl.dot(q_right, tl.trans(k_right), scores)
        if HAS_ROPE:
            scores = tl.dot(q_rope, tl.trans(k_rope), scores)
        scores = tl.where(valid[None, :], scores, -float("inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, qk_scale_log2)
        weights = weights.to(k_left.dtype)
        acc_left = tl.dot(weights, k_left, acc_left * rescale[:, None])
        acc_right = tl.dot(weights, k_right, acc_right * rescale[:, None])
    return acc_left, acc_right, row_max * qk_scale_log2, row_sum


@triton.jit
def output_factor(row_max, row_sum, sink_ptr, offs_h, is_head, HAS_SINK: tl.constexpr):
    """1 / (row_sum + the sink's part), what the accumulators are multiplied by; 0 without a key."""
    denominator = row_sum
    if HAS_SINK:
        sink = tl.load(sink_ptr + offs_h, mask=is_head, other=0.0)
        denominator += tl.exp2(sink * LOG2_E - row_max)
    return tl.where(row_sum == 0, 0.0, 1.0 / denominator)


@triton.jit
def log2_sum(row_max, row_sum):
    """log2 Σ 2^score; -inf without a key."""
    return tl.where(row_sum == 0, -float("inf"), row_max + tl.log2(row_sum))


@triton.jit
def natural_sum(row_max, row_sum):
    """ln Σ e^logit; +inf without a key."""
    # == 0 and not > 0: a sum of NaN stays one
    return tl.where(row_sum == 0, float("inf"), (row_max + tl.log2(row_sum)) * LN_2)


@triton.jit
def store_columns(out_ptr, offs_h, acc, factor, is_head, HEAD_DIM_V: tl.constexpr):
    """The columns from `out_ptr` on, in its type, of rows of HEAD_DIM_V contiguous columns."""
    offs_d = tl.arange(0, acc.shape[1])
    ptrs = out_ptr + offs_h[:, None] * HEAD_DIM_V + offs_d[None, :]
    tl.store(ptrs, (acc * factor[:, None]).to(out_ptr.dtype.element_ty), mask=is_head[:, None])
