"""A layer small enough for exact tests: its weights, its caches, and the second implementation."""

import functools
from dataclasses import replace

import torch

from dsa_bench.kernels.layer import DeepSeekSparseAttention
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_checkpoint import from_published, published_tensors
from dsa_bench.kernels.rope import rope_table
from dsa_bench.preset import Preset
from tests import independent_layer
from tests.independent_layer import Rules

PRESET = Preset(
    name="tiny", hidden_size=256, q_lora_rank=128, num_heads=4, index_heads=6, page_size=16
)
LENGTH, TOPK = 90, 24
TABLE = rope_table(PRESET, 256, "cpu")
EXACT = 1e-5
"""Of the largest output: what fp32 may lose against fp64."""
ALL_FP8 = {"fp8_index": True, "fp8_latent": True, "fp8_products": True}
PLAIN = {"bf16": {"stored": torch.bfloat16}, "fp8": {"stored": torch.bfloat16, **ALL_FP8}}
"""Rules of the second layer, computing in fp32, for each precision of the first."""


@functools.cache
def weights(precision, rank=0, num_ranks=1):
    named = independent_layer.random_weights(num_heads=4, index_heads=6)
    named = {name.removeprefix("self_attn."): tensor for name, tensor in named.items()}
    return from_published(named, {}, PRESET, precision=precision, rank=rank, num_ranks=num_ranks)


@functools.cache
def published(precision):
    """What `weights` holds, as fp64 under the published names; e4m3 blocks times their scales."""
    tensors = published_tensors(weights(precision))
    named = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        named[f"self_attn.{name}"] = tensor.double()
        if name + "_scale_inv" in tensors:
            scale = tensors[name + "_scale_inv"].double()
            blocks = torch.kron(scale, torch.ones(128, 128, dtype=torch.float64))
            named[f"self_attn.{name}"] *= blocks[: tensor.shape[0], : tensor.shape[1]]
    return named


def hidden_of(precision, seed=0, length=LENGTH):
    hidden = independent_layer.random_hidden(length, PRESET.hidden_size, seed=seed)
    return hidden if precision == "fp32" else hidden.bfloat16()


def sparse(precision, form="mqa", topk=TOPK, **others):
    return DeepSeekSparseAttention(weights(precision, **others), topk=topk, form=form, rope=TABLE)


def make_cache(precision, batch_size=1, max_tokens=LENGTH, seed=0):
    """Pages in any order, and NaN wherever nothing has been written."""
    cache = LayerCache.allocate(PRESET, batch_size, max_tokens, precision, "cpu")
    for tensor in (cache.kv_cache, cache.index_cache):
        tensor.fill_(255 if precision == "fp8" else torch.nan)
    g = torch.Generator().manual_seed(seed)
    pages = torch.randperm(cache.block_table.numel(), generator=g).int()
    return replace(cache, block_table=pages.view_as(cache.block_table))


def sets_of(topk_indices, start, count):
    """The keys of each query; every earlier one where nothing was selected."""
    if topk_indices is None:
        return [set(range(start + i + 1)) for i in range(count)]
    rows = [[s for s in row if s >= 0] for row in topk_indices.flatten(0, -2).tolist()]
    assert all(len(row) == len(set(row)) for row in rows)
    return [set(row) for row in rows]


def feed(layer, hidden, cache, sizes=None, decode_from=None, sequence=0):
    """The prompt in chunks of these sizes, then token by token: outputs and sets of all tokens."""
    end = hidden.shape[0] if decode_from is None else decode_from
    sizes = [end] if sizes is None else sizes
    outs, sets, start = [], [], 0
    while start < end:
        size = min(sizes[min(len(outs), len(sizes) - 1)], end - start)
        part = layer.prefill(hidden[start : start + size], cache, start=start, sequence=sequence)
        outs.append(part.out)
        sets += sets_of(part.topk_indices, start, size)
        start += size
    for t in range(end, hidden.shape[0]):
        part = layer.decode(hidden[None, t : t + 1], cache, torch.tensor([t + 1]))
        outs.append(part.out[0])
        sets += sets_of(part.topk_indices, t, 1)
    return torch.cat(outs), sets


def second(precision, hidden, selected=None, topk=TOPK, dtype=torch.float64, **rules):
    """The independent layer on the same values; exact unless the rules say what to round."""
    named = published(precision)
    return independent_layer.run(
        named, hidden.to(dtype), Rules(topk=topk, **rules), selected=selected
    )


def largest(actual, expected):
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def is_selection(sets, scores, tolerance, topk=TOPK):
    """Each set holds the largest scores; within the tolerance any of two may be the larger."""
    for t, keys in enumerate(sets):
        outside = sorted(set(range(t + 1)) - keys)
        if len(keys) != min(t + 1, topk) or not keys <= set(range(t + 1)):
            return False
        if outside and scores[t, sorted(keys)].min() < scores[t, outside].max() - tolerance:
            return False
    return True


def agrees(out, sets, precision, hidden, limit=EXACT, topk=TOPK, **rules):
    """Whether outputs and selections are those of the independent layer under these rules."""
    expected = second(precision, hidden, selected=sets, topk=topk, **rules)
    if topk is not None:
        scores = expected.scores
        tolerance = limit * float(scores[scores.isfinite()].abs().max())
        if not is_selection(sets, scores, tolerance, topk):
            return False
    return largest(out, expected.out) < limit
