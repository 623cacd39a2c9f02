"""Attention of a tile of heads to a list of rows, block by block: what the portable sparse kernels share.

    per block   S = Q · Kᵀ, -inf where an entry names no row      m' = max(m, scale · max S)
                P = 2^(scale · S - m')                             l' = l · 2^(m - m') + Σ P
                O' = O · 2^(m - m') + P · V

Scores are counted in log2 units, scale = sm_scale · log2 e. Queries, keys and outputs lie in two halves of 256 columns
and a rotated tail of 64: one accumulator of 512 columns is 6 % slower (271 against 290 TFLOP/s, H100, 8K keys). Entries
that name no row load zeros, because 0 × NaN is NaN. The entries of a block are read one block ahead by hand; the row
loads then are of the first level of indirection, and the compiler copies them asynchronously.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HALF_V = tl.constexpr(256)
ROPE = tl.constexpr(64)
NO_MAXIMUM = tl.constexpr(-1e30)
"""Running maximum of a row without a key; finite, so that differences of two of them are 0 and not NaN."""

SMALLEST_BLOCK_H, LARGEST_BLOCK_H, LARGEST_BLOCK_H_IN_100_KB = 16, 64, 32
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

    Hopper (227 KB) 64 heads × 64 keys: 221 KB. Others 32 keys: with 64 heads 115 KB (sm_80 has 163), with 32 heads
    76 KB (sm_86, sm_89 and sm_120 have 99). Four warps spill from 16 × 64 and 32 × 32 on.
    H100, prefill of 4096 × 8192, 128 heads: 64 keys in two stages gave 290 TFLOP/s, in one 200, 32 keys 190 to 212.
    """
    has_100_kb = capability in ((8, 6), (8, 9)) or capability[0] >= 12
    largest = LARGEST_BLOCK_H_IN_100_KB if has_100_kb else LARGEST_BLOCK_H
    block_h = min(largest, max(SMALLEST_BLOCK_H, triton.next_power_of_2(num_heads)))
    return Tiling(block_h=block_h, block_kv=64 if capability[0] == 9 else 32)


def ask_device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of SMs."""
    if device.type != "cuda":
        return ASSUMED_CAPABILITY, ASSUMED_SMS
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


@triton.jit
def load_halves(row_ptrs, mask, HAS_ROPE: tl.constexpr):
    """Left half, right half and tail of bf16 rows; 0 where `mask` [rows, 1] is false. Without a tail: left again."""
    offs_d = tl.arange(0, HALF_V)
    left = tl.load(row_ptrs + offs_d[None, :], mask=mask, other=0.0)
    right = tl.load(row_ptrs + HALF_V + offs_d[None, :], mask=mask, other=0.0)
    rope = left
    if HAS_ROPE:
        offs_rope = 2 * HALF_V + tl.arange(0, ROPE)
        rope = tl.load(row_ptrs + offs_rope[None, :], mask=mask, other=0.0)
    return left, right, rope


@triton.jit
def load_entries(list_ptr, first, end, BLOCK_KV: tl.constexpr):
    """Entries of the block that begins at `first`; -1 from `end` on."""
    offs = first + tl.arange(0, BLOCK_KV)
    return tl.load(list_ptr + offs, mask=offs < end, other=-1)


@triton.jit
def find_rows(entries, num_rows):
    """Row numbers, and which of them there are: the others must only be read under a mask.

    To put 0 in their place costs the registers that then spill.
    """
    return entries.to(tl.int64), (entries >= 0) & (entries < num_rows)


@triton.jit
def begin_rows(BLOCK_H: tl.constexpr):
    """Both halves of the output, running maximum and running sum before the first key."""
    acc = tl.zeros([BLOCK_H, HALF_V], tl.float32)
    row_max = tl.full([BLOCK_H], NO_MAXIMUM, tl.float32)
    return acc, acc, row_max, tl.zeros([BLOCK_H], tl.float32)


@triton.jit
def attend_block(
    q_left, q_right, q_rope, k_left, k_right, k_rope, valid,
    acc_left, acc_right, row_max, row_sum, qk_scale_log2, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """The running state after one more block of keys."""
    scores = tl.dot(q_left, tl.trans(k_left))  # [BLOCK_H, BLOCK_KV]
    scores = tl.dot(q_right, tl.trans(k_right), scores)
    if HAS_ROPE:
        scores = tl.dot(q_rope, tl.trans(k_rope), scores)
    scores = tl.where(valid[None, :], scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale_log2)
    rescale = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores * qk_scale_log2 - new_max[:, None])
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    weights = weights.to(k_left.dtype)
    acc_left = tl.dot(weights, k_left, acc_left * rescale[:, None])
    acc_right = tl.dot(weights, k_right, acc_right * rescale[:, None])
    return acc_left, acc_right, new_max, row_sum


@triton.jit
def output_factor(row_max, row_sum, sink_ptr, offs_h, is_head, HAS_SINK: tl.constexpr):
    """What the accumulators are multiplied by: 1 / (row_sum + the sink's part), 0 for a row without a key."""
    denominator = row_sum
    if HAS_SINK:
        sink = tl.load(sink_ptr + offs_h, mask=is_head, other=0.0)
        denominator += tl.exp2(sink * LOG2_E - row_max)
    # == and not >: a sum of NaN must show in the output
    return tl.where(row_sum == 0, 0.0, 1.0 / denominator)


@triton.jit
def log2_sum(row_max, row_sum):
    """log2 Σ 2^score; -inf for a row without a key."""
    return tl.where(row_sum == 0, -float("inf"), row_max + tl.log2(row_sum))


@triton.jit
def store_halves(out_ptr, rows, acc_left, acc_right, factor, mask):
    """Rows of 512 contiguous columns, in the type of `out_ptr`."""
    ptrs = out_ptr + rows[:, None] * (2 * HALF_V) + tl.arange(0, HALF_V)[None, :]
    left, right = acc_left * factor[:, None], acc_right * factor[:, None]
    tl.store(ptrs, left.to(out_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(ptrs + HALF_V, right.to(out_ptr.dtype.element_ty), mask=mask[:, None])
