"""Calls of cache_write: small ones, wild ones, on poisoned caches; and whether one wrote the right
bytes and no others."""

from dataclasses import replace

import torch

from dsa_bench.kernels.cache_write import OPERATOR, CacheWriteShape
from dsa_bench.kernels.paging import split_index_pages
from tests import hostile


def shape_of(
    batch_size, seq_len_kv, seq_len_q=1, page_size=64, precision="fp8", with_index=True
):  # fmt: skip
    return CacheWriteShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, page_size=page_size,
        precision=precision, with_index=with_index,
    )  # fmt: skip


def small(precision="fp8", seed=0, page_size=7, tokens=21):
    """Tokens of three sequences."""
    shape = shape_of(3, 40, tokens // 3, page_size, precision)
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


def few(inputs, tokens):
    """The first tokens alone."""
    names = ("kv", "index_k", "positions", "slots")
    return replace(inputs, **{name: getattr(inputs, name)[:tokens] for name in names})


def poisoned(inputs, seed=3):
    """The same call on caches full of random bytes, NaN of every kind among them."""
    g = torch.Generator(device=inputs.slots.device).manual_seed(seed)
    caches = {}
    for name in ("kv_cache", "index_cache"):
        cache = getattr(inputs, name)
        if cache is not None:
            size = cache.view(torch.uint8).shape
            noise = torch.randint(0, 256, size, generator=g, device=cache.device)
            caches[name] = noise.to(torch.uint8).view(cache.dtype)
    return replace(inputs, **caches)


def wild(inputs):
    """Slots out of range whose tokens and positions are wild too; shuffled tokens, rows of zeros,
    huge and tiny ones."""
    tokens, device = inputs.slots.shape[0], inputs.slots.device
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).to(device)
    kv, slots, positions = (x[order] for x in (inputs.kv, inputs.slots, inputs.positions))
    num_slots = inputs.kv_cache.shape[0] * inputs.page_size
    index_k = torch.zeros(tokens, 128, device=device) if inputs.index_k is None else inputs.index_k
    index_k = index_k[order].to(kv.dtype)
    invalid = (-1, hostile.LEAST, num_slots, 2**31 - 1)
    for token, slot in zip(range(0, tokens - 4, 3), invalid, strict=False):
        slots[token], positions[token] = slot, 2**31 - 1
        kv[token], index_k[token] = hostile.NAN, hostile.INF
    for token, size in ((1, 0.0), (2, 1e12), (4, 1e-20)):
        kv[token % tokens] *= size
        index_k[token % tokens] *= size
    with_index = inputs.index_k is not None
    return replace(
        inputs, kv=kv, slots=slots, positions=positions, index_k=index_k if with_index else None
    )


MUTATIONS = {"plain": hostile.plain, "wild": wild}


def unwritten(inputs):
    """[num_pages, page_size] bool."""
    num_slots = inputs.kv_cache.shape[0] * inputs.page_size
    slots = inputs.slots[(inputs.slots >= 0) & (inputs.slots < num_slots)].long()
    left = torch.ones(num_slots, dtype=torch.bool, device=slots.device)
    left[slots] = False
    return left.view(-1, inputs.page_size)


def untouched_bytes(inputs):
    """All bytes of both caches that no token of this call may change."""
    left = unwritten(inputs)
    parts = [hostile.bits(inputs.kv_cache)[left]]
    if inputs.index_cache is not None:
        values, scale = split_index_pages(inputs.index_cache, inputs.page_size)
        parts += [values.view(torch.uint8)[left]] + ([] if scale is None else [scale[left]])
    return [hostile.bits(part) for part in parts]


def assert_writes(inputs, run):
    """`run` writes the right rows, in place, and no other byte of two poisoned caches."""
    inputs = poisoned(inputs)
    before = untouched_bytes(inputs)
    outputs = run(inputs)
    assert outputs.kv_cache is inputs.kv_cache and outputs.index_cache is inputs.index_cache
    for one, other in zip(before, untouched_bytes(inputs), strict=True):
        assert torch.equal(one, other)
    hostile.assert_right("cache_write", inputs, outputs)
    return outputs
