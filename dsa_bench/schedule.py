"""In which order cases are taken: competitors together, repeats in fresh processes, shuffled."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dsa_bench.contest import CONTEST_OF
from dsa_bench.record import Case
from dsa_bench.sweep import Planned

MAX_GROUP = 9
"""More cases than this are not held ready beside each other. So many has the prefill of v3.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Cases that one request takes to a worker: they compete, and are timed in turn."""

    replicate: int
    items: tuple[Planned, ...]


def groups(
    planned: Sequence[Planned], *, replicates: int = 1, seed: int = 0, together: bool = True
) -> tuple[Group, ...]:
    """All groups of a run in order, one replicate after the other.

    One replicate keeps the order of the plan, in which L ascends, so that a run that is cut short
    still compares. Of several each is shuffled, groups and the cases within, by `seed`: what a
    place in the order does to a time then differs between them. `together` False: each case by
    itself.
    """
    generator = random.Random(seed)
    made = []
    for replicate in range(replicates):
        parts = _compete(planned) if together else [[item] for item in planned]
        if replicates > 1:
            generator.shuffle(parts)
            for part in parts:
                generator.shuffle(part)
        made += [Group(replicate=replicate, items=tuple(part)) for part in parts]
    return tuple(made)


def _compete(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Cases of equal rivalry, in the order of their first; cases to skip stand by themselves."""
    found: dict[object, list[Planned]] = {}
    for item in planned:
        found.setdefault(item.case.key if item.reason else _rivalry(item.case), []).append(item)
    return [
        items[start : start + MAX_GROUP]
        for items in found.values()
        for start in range(0, len(items), MAX_GROUP)
    ]


def _rivalry(case: Case) -> tuple[object, ...]:
    """What competitors have in common: shape, inputs, mode, and the operator or the contest."""
    op = CONTEST_OF.get(case.op, case.op)
    return (
        *(op, case.phase, case.seq_len_kv, case.seq_len_q, case.batch_size, case.lengths),
        *(case.num_heads, case.tensor_parallel, case.inputs, case.weights),
        *(case.preset, case.seed, case.mode),
    )
