"""Hostile inputs: mutations that turn what an operator makes into something harder to get right.

Each is deterministic, works on any device, and leaves a valid call: the reference has an answer.
`dsa-bench check --hostile` and the tests run implementations over them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_bench.kernels.hostile_rows import ROWS, wild_pages

NAN, INF = float("nan"), float("inf")
LEAST = -(2**31)
INVALID_INDICES = (LEAST, -123456, -1, 2147480000, 2**31 - 1)

Mutation = Callable[[Any], Any]


def plain(inputs: Any) -> Any:
    return inputs


def _ints(low: int, high: int, dims: Sequence[int], device: torch.device, seed: int) -> Tensor:
    """int32 in low … high - 1."""
    g = torch.Generator(device=device).manual_seed(seed)
    return torch.randint(low, high, tuple(dims), generator=g, device=device, dtype=torch.int32)


def _sink(num_heads: int, device: torch.device) -> Tensor:
    """A third each of +inf, -inf and finite."""
    sink = torch.linspace(-2, 8, num_heads, device=device)
    sink[::3], sink[1::3] = INF, -INF
    return sink


def _spoil(indices: Tensor, num_keys: int) -> Tensor:
    """Row 0 empty, wild values in row 1, row 2 without its first half, row 3 gappy."""
    out = indices.clone()
    rows, topk = out.shape
    wild = torch.tensor((*INVALID_INDICES, num_keys), dtype=torch.int32, device=out.device)[:topk]
    out[0] = -1
    out[1 % rows, : len(wild)] = wild
    out[2 % rows, : topk // 2] = INVALID_INDICES[1]
    out[3 % rows, ::2] = -1
    return out


def _is_listed(indices: Tensor, lens: Tensor, num_keys: int) -> Tensor:
    """[num_keys] bool: a valid entry names the key."""
    topk = indices.shape[1]
    counted = torch.arange(topk, device=indices.device) < lens[:, None]
    valid = counted & (indices >= 0) & (indices < num_keys)
    listed = torch.zeros(num_keys, dtype=torch.bool, device=indices.device)
    listed[indices[valid].long()] = True
    return listed


def sparse_prefill_wild(inputs: Any) -> Any:
    """Invalid indices of every kind, lengths from below 0 to above topk, infinite sinks, NaN in
    every key that no valid entry names."""
    kv, device = inputs.kv.clone(), inputs.kv.device
    indices = _spoil(inputs.topk_indices, kv.shape[0])
    rows, topk = indices.shape
    lens = _ints(-1, topk + 2, (rows,), device, 5)
    lens[1 % rows], lens[2 % rows], lens[4 % rows] = topk, topk + 9, 0
    lens[5:6] = LEAST
    _fill_nan(kv, ~_is_listed(indices, lens, kv.shape[0]))
    return dataclasses.replace(
        inputs, kv=kv, topk_indices=indices, topk_lens=lens,
        attn_sink=_sink(inputs.q.shape[1], device),
    )  # fmt: skip


def sparse_prefill_fp8_wild(inputs: Any) -> Any:
    """As sparse_prefill_wild; unread keys have NaN in their rope columns too."""
    inputs = sparse_prefill_wild(inputs)
    if inputs.k_rope is None:
        return inputs
    k_rope = inputs.k_rope.clone()
    _fill_nan(k_rope, ~_is_listed(inputs.topk_indices, inputs.topk_lens, k_rope.shape[0]))
    return dataclasses.replace(inputs, k_rope=k_rope)


def sparse_prefill_fp8_sharp(inputs: Any) -> Any:
    """Queries sixteen times larger, their heads more and more: maxima move from block to block."""
    factor = 16 * torch.linspace(0.25, 2, inputs.q.shape[1], device=inputs.q.device)
    rope = inputs.q_rope
    return dataclasses.replace(
        inputs, q_scale=inputs.q_scale * factor,
        q_rope=None if rope is None else (rope * factor[:, None]).to(rope.dtype),
    )  # fmt: skip


def _inside_larger(x: Tensor, *extra: int) -> Tensor:
    """The same values as a slice of a larger tensor; floats around it are NaN, integers 0."""
    filler = NAN if x.is_floating_point() else 0
    large = x.new_full([a + b for a, b in zip(x.shape, extra, strict=True)], filler)
    view = large[tuple(slice(n) for n in x.shape)]
    view.copy_(x)
    return view


def sparse_prefill_strided(inputs: Any) -> Any:
    """Slices of larger tensors; one index repeated through a whole row."""
    indices = inputs.topk_indices.clone()
    indices[-1] = indices[-1, 0].clone()
    return dataclasses.replace(
        inputs,
        q=_inside_larger(inputs.q, 1, 3, 64),
        kv=_inside_larger(inputs.kv, 2, 16),
        topk_indices=_inside_larger(indices, 1, 7),
    )


def sparse_prefill_paged(inputs: Any) -> Any:
    """The keys as rows of a paged cache: pages in any order, those of others and the end of the
    last one NaN."""
    (num_keys, width), page_size = inputs.kv.shape, 64
    num_pages = -(-num_keys // page_size)
    g = torch.Generator().manual_seed(9)
    table = torch.randperm(2 * num_pages + 1, generator=g)[:num_pages].to(inputs.kv.device)
    rows = inputs.kv.new_full([(2 * num_pages + 1) * page_size, width], NAN)
    keys = torch.arange(num_keys, device=rows.device)
    slots = table[keys // page_size] * page_size + keys % page_size
    rows[slots] = inputs.kv
    indices = inputs.topk_indices
    valid = (indices >= 0) & (indices < num_keys)
    listed = torch.where(valid, slots[torch.where(valid, indices, 0).long()], -1)
    return dataclasses.replace(inputs, kv=rows, topk_indices=listed.to(torch.int32))


def peaked(inputs: Any) -> Any:
    """Queries ten times larger: the softmax is nearly one-hot."""
    return dataclasses.replace(inputs, q=inputs.q * 10)


def loud(exponent: int) -> Mutation:
    """Queries of one head 2^exponent times larger. From logits of 2^31 on half a unit of the last
    place of a scaled one is an exponent that fp32 does not have; of 2^100 some are below -1e30."""

    def mutate(inputs: Any) -> Any:
        q = inputs.q.clone()
        q[..., 1 % q.shape[-2], :] *= 2.0**exponent
        return dataclasses.replace(inputs, q=q)

    return mutate


def sparse_decode_wild(inputs: Any) -> Any:
    """As sparse_prefill_wild; unread cache rows are NaN in values, scales and rope."""
    slots, cache = inputs.topk_slots, inputs.kv_cache.clone()
    rows_of_cache = cache.flatten(0, 1)
    (batch_size, seq_len_q, topk), device = slots.shape, slots.device
    indices = _spoil(slots.flatten(0, 1), rows_of_cache.shape[0])
    lens = _ints(-1, topk + 2, (batch_size * seq_len_q,), device, 6)
    rows = len(lens)
    lens[1 % rows], lens[2 % rows], lens[4 % rows] = topk, topk + 9, 0
    lens[5:6] = LEAST
    unread = ~_is_listed(indices, lens, rows_of_cache.shape[0])
    rows_of_cache[unread] = 0xFF if cache.dtype == torch.uint8 else NAN
    return dataclasses.replace(
        inputs, kv_cache=cache, topk_slots=indices.view_as(slots),
        topk_lens=lens.view(batch_size, seq_len_q), attn_sink=_sink(inputs.q.shape[2], device),
    )  # fmt: skip


def _listed(inputs: Any) -> tuple[str, str, Tensor, Tensor]:
    """Of sparse_prefill or sparse_decode: names of indices and keys, and copies of both, as
    [queries, topk] and [keys, bytes or elements]."""
    names = ("topk_indices", "kv") if hasattr(inputs, "kv") else ("topk_slots", "kv_cache")
    indices, keys = (getattr(inputs, name).clone() for name in names)
    return *names, indices.view(-1, indices.shape[-1]), keys.view(-1, keys.shape[-1])


def _with_indices(change: Callable[[Tensor, int], object]) -> Mutation:
    """`change` writes to [queries, topk] indices in place; it is told the number of keys."""

    def mutate(inputs: Any) -> Any:
        name, _, indices, keys = _listed(inputs)
        change(indices, keys.shape[0])
        return dataclasses.replace(inputs, **{name: indices.view_as(getattr(inputs, name))})

    return mutate


def sparse_short(inputs: Any) -> Any:
    """topk_lens from 0 to topk, the first 0, the second topk."""
    name, _, indices, _ = _listed(inputs)
    rows, topk = indices.shape
    lens = _ints(0, topk + 1, (rows,), indices.device, 13)
    lens[0], lens[1 % rows] = 0, topk
    return dataclasses.replace(inputs, topk_lens=lens.view(getattr(inputs, name).shape[:-1]))


def sparse_sink(inputs: Any) -> Any:
    return dataclasses.replace(inputs, attn_sink=_sink(inputs.q.shape[-2], inputs.q.device))


def sparse_unread(inputs: Any) -> Any:
    """NaN in every key that no entry names."""
    _, name, indices, keys = _listed(inputs)
    lens = torch.full_like(indices[:, 0], indices.shape[1])
    _fill_nan(keys, ~_is_listed(indices, lens, keys.shape[0]))
    return dataclasses.replace(inputs, **{name: keys.view_as(getattr(inputs, name))})


def nan_in_query(query: int, inputs: Any) -> Any:
    """NaN in a key of sparse_prefill or sparse_decode that this query lists, and no other."""
    indices_name, keys_name, indices, keys = _listed(inputs)
    wrong = indices[query, 3 % indices.shape[1]].clone()
    is_other = torch.arange(len(indices), device=indices.device) != query
    indices[is_other[:, None] & (indices == wrong)] = -1
    _fill_nan(keys, wrong.long()[None])
    changed = {indices_name: indices, keys_name: keys}
    return dataclasses.replace(
        inputs, **{name: x.view_as(getattr(inputs, name)) for name, x in changed.items()}
    )


def _fill_nan(rows: Tensor, where: Tensor) -> None:
    """NaN in the rows of a bf16, e4m3 or packed tensor; 0xFF is a NaN of e4m3, fp32 and bf16."""
    rows.view(torch.uint8)[where] = 0xFF


def indexer_ragged(inputs: Any) -> Any:
    """Ranges that begin anywhere, some empty or turned round; NaN in keys that no query sees."""
    num_queries, num_keys = inputs.index_q.shape[0], inputs.index_k.shape[0]
    device, margin = inputs.index_q.device, num_keys // 8
    start = _ints(margin, num_keys, (num_queries,), device, 7)
    end = _ints(0, num_keys + 1 - margin, (num_queries,), device, 8)
    start[0], end[0] = margin, num_keys - margin
    end[1 % num_queries] = start[1 % num_queries]
    columns = torch.arange(num_keys, device=device)
    unseen = ~((columns >= start[:, None]) & (columns < end[:, None])).any(0)
    index_k, scale = inputs.index_k.clone(), inputs.index_k_scale.clone()
    _fill_nan(index_k, unseen)
    scale[unseen] = NAN
    return dataclasses.replace(
        inputs, index_k=index_k, index_k_scale=scale, kv_start=start, kv_end=end
    )


def indexer_silent(inputs: Any) -> Any:
    """Every other query scores no key: all its products are negative, its logits exactly 0."""
    index_q, index_k = inputs.index_q.float().abs(), inputs.index_k.float().abs()
    index_q[::2] *= -1
    dtype = inputs.index_q.dtype
    return dataclasses.replace(inputs, index_q=index_q.to(dtype), index_k=index_k.to(dtype))


def _scores(mutate: Mutation) -> Mutation:
    """Of the indexer, for indexer and top-k in one."""
    return lambda inputs: dataclasses.replace(inputs, scores=mutate(inputs.scores))


def paged_indexer_ragged(inputs: Any) -> Any:
    """Lengths that differ by query, some 0; wild pages behind the last, NaN in unread keys."""
    lens, table = inputs.seq_lens, inputs.block_table.clone()
    lens = _ints(0, int(lens.max()) + 1, lens.shape, lens.device, 9)
    lens[0] = 0
    used = -(-lens.amax(1) // inputs.page_size)
    behind = torch.arange(table.shape[1], device=table.device) >= used[:, None]
    cache = inputs.index_cache.clone()
    unread = torch.ones(cache.shape[0], dtype=torch.bool, device=cache.device)
    unread[table[~behind].long()] = False
    _fill_nan(cache, unread)
    table[behind] = 2**31 - 1
    return dataclasses.replace(inputs, index_cache=cache, seq_lens=lens, block_table=table)


def page_slots_wild(inputs: Any) -> Any:
    """Positions outside of the table's pages; the table is a slice of a larger one."""
    limit = inputs.block_table.shape[1] * inputs.page_size
    indices = _spoil(inputs.topk_indices.flatten(0, 1), limit).view_as(inputs.topk_indices)
    return dataclasses.replace(
        inputs, topk_indices=indices, block_table=_inside_larger(inputs.block_table, 1, 3)
    )


TOPK_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    **ROWS,
    "odd-stride": lambda x: _inside_larger(x, 1, 3),
}


def topk_rows(kind: str) -> Mutation:
    """Rows of that kind, with ranges of every alignment and length, some empty or just full."""

    def mutate(inputs: Any) -> Any:
        logits = TOPK_ROWS[kind](inputs.index_logits)
        (rows, cols), device, topk = logits.shape, logits.device, inputs.topk
        start = _ints(0, cols // 2, (rows,), device, 10)
        end = _ints(cols // 3, cols + 1, (rows,), device, 11)
        most = min(cols, topk + 4)
        edges = ((0, cols), (10, 10), (0, topk), (3, most), (9, LEAST), (1, cols - 1))
        for i, (first, last) in enumerate(edges[:rows]):
            start[i], end[i] = first, last
        return dataclasses.replace(inputs, index_logits=logits, kv_start=start, kv_end=end)

    return mutate


def topk_sorted(inputs: Any) -> Any:
    """Rows full of ties, their columns wanted in ascending order."""
    return dataclasses.replace(topk_rows("ties")(inputs), sorted_indices=True)


def topk_paged(inputs: Any) -> Any:
    """Rows full of ties, of sequences whose pages lie anywhere: slots are wanted too."""
    inputs = topk_rows("ties")(inputs)
    pages = wild_pages(inputs.kv_end, inputs.index_logits.shape[1])
    return dataclasses.replace(inputs, pages=pages)


def linear_uneven(inputs: Any) -> Any:
    """Scales from 2^-20 to 2^12 in x and weight, rows of zeros, values at both ends of e4m3."""
    if inputs.x_scale is None:
        x = inputs.x.clone()
        x[:, ::7] *= 1000
        x[1::3] *= 1e-3
        return dataclasses.replace(inputs, x=x)
    weight, device = inputs.weight, inputs.x.device
    x, w = inputs.x.float(), weight.values.float()
    x[:, 5::11], x[:, 7::13], w[::9, 3::5], w[1::4, ::6] = 448, -448, -448, 448
    x[3::4] = 0
    powers = [
        2.0 ** _ints(-8, 4, y.shape, device, 12).float() for y in (inputs.x_scale, weight.scale)
    ]
    powers[0][0] *= 2.0**8
    powers[1][-1] *= 2.0**-12
    e4m3 = inputs.x.dtype
    return dataclasses.replace(
        inputs, x=x.to(e4m3), x_scale=(inputs.x_scale * powers[0]).T.contiguous().T,
        weight=type(weight)(w.to(e4m3), weight.scale * powers[1]),
    )  # fmt: skip


def linear_strided(inputs: Any) -> Any:
    """Slices of wider tensors, NaN around them; scales of x row by row."""
    scale, weight = inputs.x_scale, inputs.weight
    values = _inside_wider(weight.values)
    return dataclasses.replace(
        inputs, x=_inside_wider(inputs.x), x_scale=None if scale is None else scale.contiguous(),
        weight=type(weight)(values, weight.scale),
    )  # fmt: skip


def _inside_wider(x: Tensor) -> Tensor:
    """The same rows from the 16th column on of longer ones; all bits around them are set (NaN)."""
    wide = x.new_empty(x.shape[0] + 2, x.shape[1] + 48)
    wide.view(torch.uint8).fill_(0xFF)
    view = wide[: x.shape[0], 16 : 16 + x.shape[1]]
    view.copy_(x)
    return view


def head_linear_strided(inputs: Any) -> Any:
    """x and out in wider rows full of NaN, the weight turned round in memory."""
    x, weight = inputs.x, inputs.weight
    out = x.new_empty(*x.shape[:2], weight.shape[2]) if inputs.out is None else inputs.out
    return dataclasses.replace(
        inputs, x=_inside_larger(x, 1, 0, 64), weight=weight.mT.contiguous().mT,
        out=_inside_larger(out, 0, 0, 64),
    )  # fmt: skip


def head_linear_shared(inputs: Any) -> Any:
    """All heads read the rows of the first."""
    return dataclasses.replace(inputs, x=inputs.x[:, :1].expand_as(inputs.x))


MUTATIONS: dict[str, dict[str, Mutation]] = {
    "head_linear": {"strided": head_linear_strided, "shared": head_linear_shared},
    "linear": {"uneven": linear_uneven, "strided": linear_strided},
    "sparse_prefill": {
        "wild": sparse_prefill_wild,
        "strided": sparse_prefill_strided,
        "paged": sparse_prefill_paged,
    },
    "sparse_prefill_fp8": {"wild": sparse_prefill_fp8_wild, "sharp": sparse_prefill_fp8_sharp},
    "sparse_decode": {"wild": sparse_decode_wild},
    "indexer": {"ragged": indexer_ragged, "silent": indexer_silent},
    "indexer_topk": {"ragged": _scores(indexer_ragged), "silent": _scores(indexer_silent)},
    "paged_indexer": {"ragged": paged_indexer_ragged},
    "page_slots": {"wild": page_slots_wild},
    "topk": {
        **{kind: topk_rows(kind) for kind in TOPK_ROWS},
        "sorted": topk_sorted,
        "paged": topk_paged,
    },
}

SPARSE_SINGLE: dict[str, Mutation] = {
    "repeated": _with_indices(lambda x, _: x[:, 1::2].copy_(x[:, : x.shape[1] // 2 * 2 : 2])),
    "empty-rows": _with_indices(lambda x, _: x[::3].fill_(-1)),
    "gaps": _with_indices(lambda x, _: x[:, ::2].fill_(-1)),
    "short": sparse_short,
    "sink": sparse_sink,
    "unread-nan": sparse_unread,
    "invalid": _with_indices(lambda x, num_keys: x.copy_(_spoil(x, num_keys))),
}
"""One hostility at a time, the mildest first: what an implementation lacks then hides no other."""

SINGLE: dict[str, dict[str, Mutation]] = {
    "sparse_prefill": SPARSE_SINGLE,
    "sparse_prefill_fp8": SPARSE_SINGLE,
    "sparse_decode": SPARSE_SINGLE,
}
