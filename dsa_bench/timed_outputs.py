"""Keeps what one timed call of a visit returned, for the gate to look at afterwards.

Which call it will be cannot be known before it is made. Just before it, its inputs get contents
that it has never met, and afterwards their own again: all other calls run on the same data in every
run. Its output is copied on the caller's stream as soon as the call is queued, so that work which
the caller's stream does not wait for is not in the copy.
"""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_unforeseen = random.SystemRandom().randrange


class Watch:
    """Chooses one call out of those that a visit is expected to make, or the one behind them."""

    def __init__(
        self,
        expected_calls: int,
        renew: Callable[[int], None],
        restore: Callable[[int], None],
        *,
        choose: Callable[[int], int] = _unforeseen,
    ) -> None:
        self._left = choose(max(1, expected_calls))
        self._renew, self._restore = renew, restore
        self.outputs: Any = None
        """A copy; None as long as no call was chosen, or where memory held none."""
        self.set_index: int | None = None
        """Which input set the call ran on; None as long as none was chosen."""

    @property
    def is_due(self) -> bool:
        """No call was chosen yet."""
        return self.set_index is None

    def chooses(self, set_index: int, *, is_last: bool = False) -> bool:
        """Whether the next call is the one; if so, its inputs are renewed."""
        self._left -= 1
        if not self.is_due or (self._left >= 0 and not is_last):
            return False
        self._renew(set_index)
        self.set_index = set_index
        return True

    def keep(self, outputs: Any) -> None:
        """Copy what the chosen call returned, where there is room for it."""
        with contextlib.suppress(torch.OutOfMemoryError):
            self.outputs = copy_of(outputs)

    def end(self) -> None:
        """The chosen call is over: its inputs get their own contents back."""
        assert self.set_index is not None
        self._restore(self.set_index)


def copy_of(outputs: Any) -> Any:
    """The same tuple with a copy of each tensor, made on the current stream."""
    copies = [item.clone() if isinstance(item, Tensor) else item for item in outputs]
    return type(outputs)(*copies) if hasattr(outputs, "_fields") else type(outputs)(copies)


def spoil(outputs: Any) -> None:
    """Overwrite what a graph wrote before: NaN, or the lowest integer."""
    for item in outputs:
        if isinstance(item, Tensor):
            low = torch.iinfo(item.dtype).min if not item.is_floating_point() else float("nan")
            item.fill_(low)
