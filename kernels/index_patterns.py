"""Which keys the queries of made-up inputs list, where an operator is handed the lists.

Query i sees the keys 0 … num_visible[i] - 1 and lists min(num_visible[i], topk) of them, all
different and in random order, then -1.

    random      any of them, whatever the query before lists. Nothing is shared but by chance, so
                nearly every row is gathered anew: the hardest case.
    local       the first SINKS keys and the latest topk - SINKS: a sliding window with attention
                sinks. Queries side by side share all keys but one.
    overlap=R   a share R, 0 … 1, of a list stands in the list of the query before, less of it in
                those further back: windows of one random order of the keys that the first query
                sees. It takes a query before, and keys enough for what is new.

Trained indexers lie between: their selections overlap from query to query, and a kernel or a cache
may gain by it, which random lists hide.

Source: sliding window with sinks as in StreamingLLM.
"""

from functools import partial

import torch
from torch import Tensor

from dsa_bench.operator import Unsupported
from dsa_bench.record import OVERLAP, RANDOM_INPUTS, overlap_of

LOCAL = "local"
SINKS = 4
DRAWN_AT_ONCE = 2**25
"""Random numbers: 128 MB in fp32."""


def expect_pattern(pattern: str, *, first_visible: int, topk: int, num_queries: int) -> None:
    """Raise Unsupported for what is no pattern, or cannot be had from so few queries and keys."""
    overlap = overlap_of(pattern)
    if pattern not in (RANDOM_INPUTS, LOCAL) and overlap is None:
        raise Unsupported(
            f"keys are listed as {RANDOM_INPUTS}, {LOCAL} or {OVERLAP}R, not as {pattern!r}"
            " (change --inputs)"
        )
    if overlap is None:
        return
    if num_queries < 2:
        raise Unsupported(f"inputs {pattern} need two queries of a sequence (pass --seq-len-q)")
    wanted = topk + new_keys(overlap, topk)
    if wanted > first_visible:
        raise Unsupported(
            f"inputs {pattern} need a first query that sees {wanted} keys, it sees {first_visible}"
            " (pass a longer -L, or a shorter --seq-len-q)"
        )


def new_keys(overlap: float, topk: int) -> int:
    """Keys of a list that the list before does not hold."""
    return round((1.0 - overlap) * topk)


def listed_keys(
    pattern: str, *, first_visible: int, last_visible: int, topk: int, num_queries: int
) -> int:
    """Different keys that the lists of `local` or `overlap=R` hold together."""
    overlap = overlap_of(pattern)
    if overlap is None:
        slid = last_visible - first_visible if topk > SINKS else 0
        return min(last_visible, topk + slid)
    return min(first_visible, topk + (num_queries - 1) * new_keys(overlap, topk))


def make_indices(
    pattern: str, num_visible: Tensor, num_keys: int, topk: int, generator: torch.Generator
) -> Tensor:
    """[rows, topk] int32 of a pattern, for queries that see num_visible [rows] of num_keys."""
    if pattern == RANDOM_INPUTS:
        return random_indices(num_visible, num_keys, topk, generator)
    overlap, device = overlap_of(pattern), generator.device
    if overlap is None:
        lists = partial(_latest, num_visible, topk)
    else:
        order = torch.randperm(int(num_visible.min()), generator=generator, device=device)
        lists = partial(_windows, order, new_keys(overlap, topk), topk)
    rows = torch.arange(num_visible.shape[0], device=device)
    parts = rows.split(max(1, DRAWN_AT_ONCE // topk))
    return torch.cat([_shuffled(lists(part), generator) for part in parts])


def random_indices(
    num_visible: Tensor, num_keys: int, topk: int, generator: torch.Generator
) -> Tensor:
    """[rows, topk] int32: distinct random positions below num_visible[i], unordered, then -1."""
    rows = num_visible.shape[0]
    out = torch.empty(rows, topk, dtype=torch.int32, device=generator.device)
    columns = torch.arange(num_keys, device=generator.device)
    chunk = max(1, DRAWN_AT_ONCE // num_keys)
    for begin in range(0, rows, chunk):
        part = num_visible[begin : begin + chunk, None]
        draw = torch.rand(part.shape[0], num_keys, generator=generator, device=generator.device)
        draw = torch.where(columns < part, draw, -1.0)
        best = draw.topk(topk, dim=1, sorted=True)
        out[begin : begin + chunk] = torch.where(best.values >= 0, best.indices, -1).to(torch.int32)
    return out


def _latest(num_visible: Tensor, topk: int, rows: Tensor) -> Tensor:
    """Sinks and the latest keys of these queries, by position; -1 where one sees fewer."""
    entries = torch.arange(topk, device=rows.device)
    visible = num_visible[rows, None]
    skipped = (visible - topk).clamp(min=0)
    keys = torch.where(entries < SINKS, entries, skipped + entries)
    return torch.where(keys < visible, keys, -1)


def _windows(order: Tensor, step: int, topk: int, rows: Tensor) -> Tensor:
    """Windows of `order`, a step apart; from its end it goes on with its beginning."""
    entries = torch.arange(topk, device=rows.device)
    return order[(rows[:, None] * step + entries) % len(order)]


def _shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    """int32, each row in an order of its own, -1 last."""
    draw = torch.rand(indices.shape, generator=generator, device=generator.device)
    order = torch.where(indices < 0, 2.0, draw).argsort(dim=1)
    return indices.gather(1, order).to(torch.int32)
