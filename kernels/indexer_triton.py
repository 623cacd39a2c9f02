"""Lightning indexer in plain Triton: one program scores a few queries against a span of keys.

Keys are the rows of the product, heads × queries its columns, so that the sum over heads runs
inside a thread and its quad: no change of layout, no shared memory. A tile of keys comes by TMA
on Hopper (pipelined), by plain loads elsewhere; queries and weights stay in shared memory and
registers for the whole span. Only tiles that one of the queries may see are visited. Bound by the
fp8 tensor cores where the two CUDA-core operations a score (max, multiply-add) overlap with them.
Supports fp8 and bf16, any lengths and visible ranges, head counts that are powers of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.index_arguments import check_arguments
from dsa_bench.kernels.indexer import IndexerInputs, IndexerOutputs, IndexerShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "indexer"
ROW_ALIGNMENT = 64
"""Logits rows begin at multiples of 256 bytes, so that their readers load 16 bytes at a time."""


@triton.jit
def _load_keys(
    k_src, first, num_keys, BLOCK_KV: tl.constexpr, DIM: tl.constexpr, USE_TMA: tl.constexpr
):
    """[BLOCK_KV, DIM]; 0 behind the last key."""
    if USE_TMA:
        return k_src.load([first, 0])
    else:
        offs_kv = first + tl.arange(0, BLOCK_KV)
        offs_d = tl.arange(0, DIM)
        ptrs = k_src + offs_kv.to(tl.int64)[:, None] * DIM + offs_d[None, :]
        return tl.load(ptrs, mask=(offs_kv < num_keys)[:, None], other=0.0)


@triton.jit
def _indexer_kernel(
    q_src, k_src, scale_ptr, weights_ptr, start_ptr, end_ptr, logits_ptr,
    num_queries, num_keys, stride_logits_row, span,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    NUM_STAGES: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries, `span` keys."""
    # the last queries see most keys: they go first, so that no long program is left over at the end
    first_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    offs_q = first_q + tl.arange(0, BLOCK_Q)
    is_query = offs_q < num_queries
    # read here and not in the loop: Triton does not hoist a load past the loop's stores
    start = tl.load(start_ptr + offs_q, mask=is_query, other=num_keys)
    end = tl.load(end_ptr + offs_q, mask=is_query, other=0)
    # the union of what the queries see, by scalar loads: bounds reduced from a tensor would not
    # be uniform
    first_seen = num_keys
    last_seen = 0
    for j in tl.static_range(BLOCK_Q):
        query = tl.minimum(first_q + j, num_queries - 1)
        first_seen = tl.minimum(first_seen, tl.load(start_ptr + query))
        last_seen = tl.maximum(last_seen, tl.load(end_ptr + query))
    first_kv = tl.maximum(tl.program_id(1) * span, first_seen // BLOCK_KV * BLOCK_KV)
    last_kv = tl.minimum(tl.minimum(tl.program_id(1) * span + span, num_keys), last_seen)
    offs_row = first_q * HEADS + tl.arange(0, BLOCK_Q * HEADS)
    is_row = offs_row < num_queries * HEADS
    if USE_TMA:
        q = q_src.load([first_q * HEADS, 0])
    else:
        offs_d = tl.arange(0, DIM)
        ptrs = q_src + offs_row.to(tl.int64)[:, None] * DIM + offs_d[None, :]
        q = tl.load(ptrs, mask=is_row[:, None], other=0.0)
    weights = tl.load(weights_ptr + offs_row, mask=is_row, other=0.0)
    logits_ptrs = logits_ptr + offs_q.to(tl.int64)[None, :] * stride_logits_row
    for kv in tl.range(first_kv, last_kv, BLOCK_KV, num_stages=NUM_STAGES):
        offs_kv = kv + tl.arange(0, BLOCK_KV)
        is_key = offs_kv < num_keys
        scale = tl.load(scale_ptr + offs_kv, mask=is_key, other=0.0)
        k = _load_keys(k_src, kv, num_keys, BLOCK_KV, DIM, USE_TMA)
        scores = tl.dot(k, tl.trans(q))  # [BLOCK_KV, BLOCK_Q * HEADS]
        scores = tl.maximum(scores, 0.0) * weights[None, :]
        logits = tl.sum(tl.reshape(scores, [BLOCK_KV, BLOCK_Q, HEADS]), 2) * scale[:, None]
        visible = (offs_kv[:, None] >= start[None, :]) & (offs_kv[:, None] < end[None, :])
        logits = tl.where(visible, logits, -float("inf"))
        tl.store(logits_ptrs + offs_kv[:, None], logits, mask=is_key[:, None] & is_query[None, :])


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerConfig:
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    num_spans: int
    """Programs that share the keys of one block of queries."""


def choose_config(
    num_queries: int, num_keys: int, heads: int, precision: str, num_sms: int
) -> IndexerConfig:
    """128 columns (heads × queries) a tile; keys are divided only where the queries do not fill
    the GPU.

    H100, 4096 × 16384, 64 heads, fp8, TFLOP/s: 2 queries × 128 keys with 4 warps 1039, its keys in
    4 spans 1006; in a run in which that tile gave 977, with 8 warps 712, 4 queries × 64 keys 929.
    """
    block_q = max(1, 128 // heads)
    blocks = -(-num_queries // block_q)
    num_spans = 1
    while blocks * num_spans < 4 * num_sms and num_keys // num_spans > 1024:
        num_spans *= 2
    stages = 4 if precision == "fp8" else 3
    return IndexerConfig(
        block_q=block_q, block_kv=128, num_warps=4, num_stages=stages, num_spans=num_spans
    )


def indexer(
    index_q: Tensor,
    index_k: Tensor,
    index_k_scale: Tensor,
    index_weights: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
) -> Tensor:
    """Index logits; formula and conventions as in `indexer.py`.

    Args:
        index_q: [seq_len_q, index_heads, index_dim] e4m3 or bf16, contiguous.
        index_k: [seq_len_kv, index_dim], the same dtype, contiguous.
        index_k_scale: [seq_len_kv] fp32.
        index_weights: [seq_len_q, index_heads] fp32, contiguous.
        kv_start, kv_end: [seq_len_q] int32.
    Returns:
        [seq_len_q, seq_len_kv] fp32; the row stride is a multiple of 64. Outside [kv_start,
        kv_end) it is undefined.
    """
    check_arguments(index_q, index_k, index_k_scale, index_weights, kv_start, kv_end)
    (num_queries, heads, dim), num_keys = index_q.shape, index_k.shape[0]
    stride = -(-num_keys // ROW_ALIGNMENT) * ROW_ALIGNMENT
    logits = torch.empty(num_queries, stride, device=index_q.device)[:, :num_keys]
    if logits.numel() == 0:
        return logits
    properties = torch.cuda.get_device_properties(index_q.device)
    precision = "bf16" if index_q.dtype == torch.bfloat16 else "fp8"
    config = choose_config(
        num_queries, num_keys, heads, precision, properties.multi_processor_count
    )
    span = -(-num_keys // (config.num_spans * config.block_kv)) * config.block_kv
    use_tma = properties.major >= 9
    q_src, k_src = index_q, index_k
    if use_tma:
        q_src = TensorDescriptor.from_tensor(index_q.view(-1, dim), [config.block_q * heads, dim])
        k_src = TensorDescriptor.from_tensor(index_k, [config.block_kv, dim])
    _indexer_kernel[(-(-num_queries // config.block_q), -(-num_keys // span))](
        q_src, k_src, index_k_scale, index_weights, kv_start, kv_end, logits,
        num_queries, num_keys, stride, span,
        HEADS=heads, DIM=dim, BLOCK_Q=config.block_q, BLOCK_KV=config.block_kv,
        NUM_STAGES=config.num_stages, USE_TMA=use_tma,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return logits


def run(inputs: IndexerInputs) -> IndexerOutputs:
    return IndexerOutputs(
        indexer(
            inputs.index_q,
            inputs.index_k,
            inputs.index_k_scale,
            inputs.index_weights,
            inputs.kv_start,
            inputs.kv_end,
        )
    )


def supports(shape: IndexerShape, machine: Machine) -> str | None:
    needed = (8, 9) if shape.precision == "fp8" else (8, 0)
    if machine.capability is None or machine.capability < needed:
        return (
            f"triton indexer in {shape.precision} needs sm_{needed[0]}{needed[1]} or newer,"
            f" this is {machine.name}"
        )
    if shape.index_heads & (shape.index_heads - 1) or shape.index_heads < 8:
        return (
            "triton indexer needs a power of two of 8 or more heads,"
            f" this case has {shape.index_heads}"
        )
    return None


IMPLEMENTATIONS = (Implementation(name="triton", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    cases = []
    for precision, dtype, instruction in (("fp8", "fp8e4nv", "QGMMA"), ("bf16", "bf16", "HGMMA")):
        config = choose_config(4096, 16384, 64, precision, 132)
        signature = {
            "q_src": f"tensordesc<{dtype}[{config.block_q * 64}, 128]>",
            "k_src": f"tensordesc<{dtype}[{config.block_kv}, 128]>",
            "scale_ptr": "*fp32:16", "weights_ptr": "*fp32:16",
            "start_ptr": "*i32:16", "end_ptr": "*i32:16",
            "logits_ptr": "*fp32:16", "num_queries": "i32:16", "num_keys": "i32:16",
            "stride_logits_row": "i32:16", "span": "i32:16",
        }  # fmt: skip
        cases.append(
            CompileCase(
                name=f"indexer_triton[{precision}]",
                kernel=_indexer_kernel,
                signature=signature,
                constexprs={
                    "HEADS": 64,
                    "DIM": 128,
                    "BLOCK_Q": config.block_q,
                    "BLOCK_KV": config.block_kv,
                    "NUM_STAGES": config.num_stages,
                    "USE_TMA": True,
                },
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
                must_have={instruction: 4, "UTMALDG": 2},
            )
        )
    return cases
