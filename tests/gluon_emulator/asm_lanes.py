"""Models of inline assembly in which lanes work together: `logit_scores.py`, `candidate_scan.py`
and `decode_scores.py`."""

import re
import struct
from typing import Any

import torch
from torch import Tensor

from tests.gluon_emulator.memory import store
from tests.gluon_emulator.program import WARP_SIZE, EmulationError, current


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


def set_predicate(text: str, arguments: list[Any]) -> Tensor:
    """(one fp32 element a thread): each thread of the partition keeps whether its own is above a
    bound, in a register that the text names. NaN is not. Returns 0."""
    found = re.search(r"setp\.gt\.f32 (\w+), \$1, 0f([0-9A-Fa-f]{8});", text)
    if found is None:
        raise EmulationError(f"predicate without a name and a bound: {text}")
    if arguments[0].numel() != WARP_SIZE * current.num_warps:
        # the register would be declared, and set, once for each element of a thread
        raise EmulationError(f"{arguments[0].numel()} elements for {current.num_warps} warps")
    (bound,) = struct.unpack(">f", bytes.fromhex(found[2]))
    current.predicates[found[1]] = arguments[0] > bound
    return torch.tensor(0)


def any_predicate(text: str, arguments: list[Any]) -> Tensor:
    """() -> 1 where the predicate that was set before holds in any thread of the partition."""
    found = re.search(r"bar\.red\.or\.pred p, \d+, (\d+), (\w+);", text)
    if found is None or int(found[1]) != WARP_SIZE * current.num_warps:
        raise EmulationError(f"a vote of others than this partition's {current.num_warps} warps")
    if found[2] not in current.predicates:
        raise EmulationError(f"{found[2]} is read before it is set, or twice")
    return current.predicates.pop(found[2]).any().to(torch.int32)


LANES = {
    "shfl.sync.bfly.b32 s, s, 1": sum_quad,
    "vote.sync.ballot.b32 m, p": append_candidates,
    "setp.gt.f32 is_above, $1,": set_predicate,
    "bar.red.or.pred p,": any_predicate,
}
