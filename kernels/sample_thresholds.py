"""A threshold for each row of index logits, from a sample of its keys: for Hopper in Gluon.

The sample is the logits of every key_step-th key, in bf16. The threshold is the rank-th largest of
those that the row sees: topk of all its logits, and few more, should reach it. Nothing but time
rests on that.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.radix_select import SPARE_WORDS
from dsa_bench.kernels.ragged_logits import ragged_logits

SIGMAS = 4.5
"""How far a sample may be off before a row has to be done again: of random logits 1 in 10^5, by
the normal distribution."""
LEAST_KEY = gl.constexpr(-(2**15))
"""Below all of `_bf16_key`."""
LISTING_WARPS = 4
"""Of a consumer of the scan; each lists for itself."""
NUM_WARPS, CHUNK = 4, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    key_step: int
    rank: int
    """In the sample: how many of its logits reach the threshold."""
    capacity: int
    """Entries of a warp's list."""
    words: int
    """Of shared memory for all entries of a row."""


def choose_sampling(topk: int) -> Sampling:
    """A sample of n logits that reach a threshold is off by about √n: with more of them the lists
    are shorter, with fewer the sample is cheaper. Every 32nd key costs 3 % of all products."""
    key_step = min(32, 1 << max(3, (topk // 64).bit_length() - 1))
    expected = topk / key_step
    root = (SIGMAS + math.sqrt(SIGMAS**2 + 4 * expected)) / 2
    rank = math.ceil(root**2)
    most = (rank + SIGMAS * math.sqrt(rank)) * key_step
    each = most / LISTING_WARPS
    capacity = -(-int(each + SIGMAS * math.sqrt(each)) // 32) * 32
    words = max(4096, -(-(int(most) + int(SPARE_WORDS.value)) // 512) * 512)
    return Sampling(key_step=key_step, rank=rank, capacity=capacity, words=words)


@gluon.jit
def _threshold_kernel(
    sample_ptr, start_ptr, end_ptr, threshold_ptr, num_sampled, stride,
    RANK: gl.constexpr, KEY_STEP: gl.constexpr, CHUNK: gl.constexpr, IS_SHORT: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """One program: the RANK-th largest bf16 logit of a row's sample, -inf if there are fewer.

    Found bit by bit; IS_SHORT: rows of one chunk, which stay in registers.
    """
    row = gl.program_id(0)
    # bounded first, for int32
    start = gl.minimum(gl.maximum(gl.load(start_ptr + row), 0), num_sampled * KEY_STEP)
    end = gl.minimum(gl.maximum(gl.load(end_ptr + row), 0), num_sampled * KEY_STEP)
    start = (start + KEY_STEP - 1) // KEY_STEP
    end = (end + KEY_STEP - 1) // KEY_STEP
    row_ptr = sample_ptr + row.to(gl.int64) * stride
    found = gl.to_tensor(LEAST_KEY)
    keys = _sample_keys(row_ptr, 0, start, end, stride, CHUNK, NUM_WARPS)
    for i in range(16):
        candidate = gl.where(i == 0, 0, found + (1 << (15 - i)))
        reached = (keys >= candidate).to(gl.int32)
        if not IS_SHORT:
            for begin in range(CHUNK, end, CHUNK):
                more = _sample_keys(row_ptr, begin, start, end, stride, CHUNK, NUM_WARPS)
                reached += (more >= candidate).to(gl.int32)
        if gl.sum(reached, 0) >= RANK:
            found = candidate
    bits = (found ^ ((found >> 31) & 0x7FFF)) << 16
    value = bits.to(gl.float32, bitcast=True)
    # where there are too few, the least key is left, which is none's
    gl.store(threshold_ptr + row, gl.where(found == LEAST_KEY, -float("inf"), value))


@gluon.jit
def _sample_keys(row_ptr, begin, start, end, stride, CHUNK: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Keys of a chunk, LEAST_KEY outside of [start, end)."""
    offs = begin + gl.arange(0, CHUNK, gl.BlockedLayout([8], [32], [NUM_WARPS], [0]))
    # whole vectors, for rows end behind one: a thread loads 16 bytes
    x = gl.load(row_ptr + offs, mask=offs // 8 * 8 < stride, other=0.0)
    return gl.where((offs >= start) & (offs < end), _bf16_key(x), LEAST_KEY)


@gluon.jit
def _bf16_key(x):
    """bf16 -> int32 in the same order; NaN is -inf."""
    x = x.to(gl.float32)
    bits = gl.where(x == x, x, -float("inf")).to(gl.int32, bitcast=True) >> 16
    return bits ^ ((bits >> 31) & 0x7FFF)


def sample_thresholds(tensors: tuple[Tensor, ...], sampling: Sampling) -> Tensor:
    """[seq_len_q] fp32; `tensors` are the arguments of `ragged_logits`."""
    *_, kv_start, kv_end = tensors
    sample = ragged_logits(*tensors, logits_dtype=torch.bfloat16, key_step=sampling.key_step)
    num_queries, stride = sample.shape[0], sample.stride(0)
    # with what stands behind the last column of a row, so that it can be read in whole vectors
    rows = sample.as_strided((num_queries, stride), sample.stride())
    thresholds = torch.empty(num_queries, device=sample.device)
    _threshold_kernel[(num_queries,)](
        rows, kv_start, kv_end, thresholds, sample.shape[1], stride,
        RANK=sampling.rank, KEY_STEP=sampling.key_step, CHUNK=CHUNK, IS_SHORT=stride <= CHUNK,
        NUM_WARPS=NUM_WARPS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return thresholds


def compile_cases() -> list[CompileCase]:
    sampling = choose_sampling(2048)
    return [
        CompileCase(
            name="sample_thresholds",
            kernel=_threshold_kernel,
            signature={
                "sample_ptr": "*bf16:16", "start_ptr": "*i32:16", "end_ptr": "*i32:16",
                "threshold_ptr": "*fp32:16", "num_sampled": "i32:16", "stride": "i32:16",
            },
            constexprs={
                "RANK": sampling.rank, "KEY_STEP": sampling.key_step, "CHUNK": CHUNK,
                "IS_SHORT": True, "NUM_WARPS": NUM_WARPS,
            },
            options={"num_warps": NUM_WARPS},
            must_have={"LDG.E.128": 4},
        )
    ]  # fmt: skip
