"""Indexer and top-k in one for Hopper, in Gluon: logits are compared as they are made, not kept.

Queries are taken in chunks, so that the lists of one chunk fit into the workspace. For each:

    thresholds  for each query, from a sample of its keys                `sample_thresholds.py`
    scan        all keys; those that reach the threshold are listed      `candidate_scan.py`
    select      the topk largest of the list, exactly                    `candidate_list.py`

At last the rows whose lists were not complete are done whole (`rescued_rows.py`). Nothing waits for
the host.

Where the logits of MANY_QUERIES, or of all, fit into the workspace, chunks of logits are made and
top-k takes them: up to 32K keys that is faster.
"""

import torch
from torch import Tensor

from dsa_bench.kernels.candidate_list import SelectConfig, select_candidates
from dsa_bench.kernels.candidate_scan import list_candidates
from dsa_bench.kernels.index_arguments import check_arguments
from dsa_bench.kernels.indexer_topk import (
    WORKSPACE_BYTES,
    IndexerTopkInputs,
    IndexerTopkOutputs,
    IndexerTopkShape,
)
from dsa_bench.kernels.logit_tiles import BLOCK_KV, CONSUMERS, choose_columns, refusal
from dsa_bench.kernels.ragged_logits import ragged_logits
from dsa_bench.kernels.rescued_rows import rescue_rows
from dsa_bench.kernels.row_topk import MAX_TOPK, topk
from dsa_bench.kernels.sample_thresholds import (
    LISTING_WARPS,
    Sampling,
    choose_sampling,
    sample_thresholds,
)
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "indexer_topk"
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of `ragged_logits`: index_q, index_k, index_k_scale, index_weights, kv_start, kv_end."""
MANY_QUERIES = 512
"""As many fill the GPU. H100, 4096 queries, 64 MiB, chunks of logits / lists, ms: 32K keys 2.11 /
2.21, 64K 6.7 / 4.2."""
MAX_REGIONS = 16
SELECTION = SelectConfig(num_warps=16)
"""H100, 4096 × 131072, ms in all: 16 warps 8.20, 8 warps 8.27, 4 warps 8.55; with every 64th key in
the sample 8.38, with every 16th 8.69."""


def choose_regions(num_queries: int, block_q: int, num_sms: int) -> int:
    """Lists of a row, each shared by two programs: a block of queries is shared by more programs
    than lie within its part of all visits, and two more where they are cut unevenly."""
    programs = -(-num_sms * block_q // num_queries) + 1
    regions = 1 << max(0, (-(-programs // 2) - 1).bit_length())
    return min(regions, MAX_REGIONS)


def row_bytes(num_keys: int, regions: int, sampling: Sampling) -> int:
    """Workspace of a query: its lists and its sample."""
    lists = regions * LISTING_WARPS * (8 * sampling.capacity + 8)
    return lists + 2 * _aligned(-(-num_keys // sampling.key_step)) + 4


def choose_chunk(
    num_queries: int, num_keys: int, block_q: int, num_sms: int, sampling: Sampling,
    workspace_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    """(queries of a chunk, regions): as many queries as fit, whole blocks of them."""
    regions = choose_regions(num_queries, block_q, num_sms)
    while True:
        fitting = workspace_bytes // row_bytes(num_keys, regions, sampling)
        chunk = min(num_queries, max(block_q, fitting // block_q * block_q))
        needed = choose_regions(chunk, block_q, num_sms)
        if needed <= regions:
            return chunk, regions
        regions = needed


def _aligned(num_keys: int) -> int:
    return -(-num_keys // BLOCK_KV) * BLOCK_KV


def indexer_topk(
    index_q: Tensor,
    index_k: Tensor,
    index_k_scale: Tensor,
    index_weights: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    topk_size: int,
    *,
    sorted_indices: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """Positions of the `topk_size` largest logits of each query; formula as in `indexer_topk.py`.

    Args:
        index_q … kv_end: as in `ragged_logits`.
        topk_size: 1 … 4096.
        sorted_indices: ascending positions.
        workspace_bytes: what may be held beside inputs and outputs; at least one block of queries
            is done at a time, whose sample and lists may need more.
    Returns:
        [seq_len_q, topk_size] int32, -1 behind the last one.
    """
    tensors = index_q, index_k, index_k_scale, index_weights, kv_start, kv_end
    check_arguments(*tensors)
    if not 0 < topk_size <= MAX_TOPK:
        raise ValueError(f"topk must be 1 … {MAX_TOPK}, got {topk_size}")
    num_queries, num_keys = index_q.shape[0], index_k.shape[0]
    out = torch.empty(num_queries, topk_size, dtype=torch.int32, device=index_q.device)
    if num_queries == 0 or num_keys == 0:
        return out.fill_(-1)
    row_of_logits = 4 * _aligned(num_keys)
    fitting = workspace_bytes // row_of_logits
    if fitting < min(num_queries, MANY_QUERIES):
        _select_from_lists(tensors, out, sorted_indices, workspace_bytes)
        return out
    for first in range(0, num_queries, fitting):
        part = slice(first, first + fitting)
        logits = ragged_logits(*_queries(tensors, part))
        topk(
            logits, kv_start[part], kv_end[part], topk_size, sorted_indices=sorted_indices,
            out=out[part], list_room=workspace_bytes - len(logits) * row_of_logits,
        )  # fmt: skip
        # before the next chunk's are made
        del logits
    return out


def _queries(tensors: Arguments, part: slice) -> Arguments:
    """The arguments for some of the queries."""
    index_q, index_k, index_k_scale, index_weights, kv_start, kv_end = tensors
    return index_q[part], index_k, index_k_scale, index_weights[part], kv_start[part], kv_end[part]


def _select_from_lists(
    tensors: Arguments, out: Tensor, sorted_indices: bool, workspace_bytes: int
) -> None:
    index_q, index_k, *_ = tensors
    (num_queries, heads, _), num_keys = index_q.shape, index_k.shape[0]
    sampling = choose_sampling(out.shape[1])
    block_q = int(CONSUMERS.value) * choose_columns(heads) // heads
    num_sms = torch.cuda.get_device_properties(index_q.device).multi_processor_count
    failed = torch.empty(num_queries, dtype=torch.int32, device=index_q.device)
    workspace_bytes -= failed.nbytes
    first = 0
    while first < num_queries:
        size, regions = choose_chunk(
            num_queries - first, num_keys, block_q, num_sms, sampling, workspace_bytes
        )
        part = slice(first, first + size)
        own = _queries(tensors, part)
        thresholds = sample_thresholds(own, sampling)
        lists = list_candidates(own, thresholds, regions, sampling.capacity)
        *_, start, end = own
        select_candidates(
            lists, start, end, out.shape[1], num_keys, failed=failed[part], out=out[part],
            sorted_indices=sorted_indices, words=sampling.words, config=SELECTION,
        )  # fmt: skip
        # before those of the next chunk are made
        del lists, thresholds
        first += size
    rescue_rows(
        tensors, failed, out, sorted_indices=sorted_indices, workspace_bytes=workspace_bytes
    )


def run(inputs: IndexerTopkInputs) -> IndexerTopkOutputs:
    scores = inputs.scores
    return IndexerTopkOutputs(
        indexer_topk(
            scores.index_q, scores.index_k, scores.index_k_scale, scores.index_weights,
            scores.kv_start, scores.kv_end, inputs.topk, workspace_bytes=inputs.workspace_bytes,
        )
    )  # fmt: skip


def supports(shape: IndexerTopkShape, machine: Machine) -> str | None:
    if shape.topk > MAX_TOPK:
        return f"gluon indexer_topk takes topk up to {MAX_TOPK}, this case has {shape.topk}"
    return refusal("gluon indexer_topk", shape.scores.index_heads, shape.scores.index_dim, machine)


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)
