"""Models of inline assembly in which the lanes of a warp work together: `logit_scores.py` and
`candidate_scan.py`."""

import re
from typing import Any

import torch
from torch import Tensor

from tests.gluon_emulator.memory import store


def sum_quad(text: str, arguments: list[Any]) -> Tensor:
    """Four tensors [.., rows, 4 lanes, ..] -> lane i has the sum over the lanes of tensor i."""
    return torch.stack([x.sum(2) for x in arguments], 2)


def append_candidates(text: str, arguments: list[Any]) -> Tensor:
    """(logits, keys, take, list, count, end, values, columns): per 16 keys and query, in the order
    of lanes, what is taken goes behind the others of its list; returns the new counts."""
    *given, values, columns = arguments
    logits, keys, take, number, count, end = torch.broadcast_tensors(
        *(torch.as_tensor(x) for x in given)
    )
    capacity = int(re.search(r"setp.lt.u32 q, t, (\d+)", text)[1])
    counts = count.clone()
    for first in range(0, logits.shape[0], 16):
        # lanes of a query: two keys, 8 apart, and then the next two
        order = first + torch.arange(16).view(2, 8).T.flatten()
        chosen = (take[order] != 0).to(torch.int64)
        place = count[order] + chosen.cumsum(0) - chosen
        counts[first : first + 16] += chosen.sum(0).to(torch.int32)
        slot = torch.where(end[order] != 0, capacity - 1 - place, place)
        written = (chosen != 0) & (place < capacity)
        where = torch.where(written, number[order] * capacity + slot, 0)
        store(values + where, logits[order], written)
        store(columns + where, keys[order], written)
    return counts


LANES = {
    "shfl.sync.bfly.b32 s, s, 1": sum_quad,
    "vote.sync.ballot.b32 m, p": append_candidates,
}
