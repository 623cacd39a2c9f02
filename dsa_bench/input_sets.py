"""Several sets of inputs for one case, so that no call can live on what an earlier one left.

Each set has storage of its own, and while a case is timed some get new contents in place: a result
that is kept by address, or by the identity of a tensor, is then the wrong one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsa_bench.memory_use import tensors_in

MAX_SETS = 3
SPARE_SHARE = 0.25
"""Share of the free memory that further input sets may take."""


def make_sets(
    make: Callable[[int], Any], *, wanted: int, input_bytes: int, spare_bytes: int
) -> list[Any]:
    """Up to `wanted` sets, by offset of the seed; one is enough where memory is short."""
    affordable = int(max(0.0, spare_bytes * SPARE_SHARE) // max(1, input_bytes))
    sets: list[Any] = []
    for offset in range(1 + min(wanted - 1, affordable)):
        try:
            sets.append(make(offset))
        except torch.OutOfMemoryError:
            # making inputs may need more than they hold
            if not sets:
                raise
            break
    return sets


def refill(target: Any, source: Any) -> None:
    """Give a set the contents of another one of the same shape, in place."""
    for old, new in zip(_storages(target), _storages(source), strict=True):
        old.copy_(new)


def _storages(value: Any) -> list[Tensor]:
    """The bytes under a value's tensors; of a storage that several share, once."""
    found: dict[int, Tensor] = {}
    for tensor in tensors_in(value):
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        found.setdefault(storage.data_ptr(), whole)
    return list(found.values())
