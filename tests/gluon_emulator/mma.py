"""Asynchronous warpgroup_mma: run in issue order, each at a random moment before its wait."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tests.gluon_emulator.memory import SharedTile
from tests.gluon_emulator.program import EmulationError, current, pause


class Unfinished:
    """An accumulator that no arithmetic may touch before a warpgroup_mma_wait that covers it."""

    def __init__(self, work: Callable[[], Tensor] | None, value: Tensor | None = None) -> None:
        self.work, self.value = work, value
        self.waited_for = work is None

    def run(self) -> None:
        if self.work is not None:
            pause(8)  # long enough for a copy to land in a tile that was freed too early
            self.value, self.work = self.work(), None


def _operand(x: Any) -> Tensor:
    value = x.read_by_async_proxy() if isinstance(x, SharedTile) else x
    return value.float()


def warpgroup_mma(
    a: Any, b: SharedTile, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
) -> Any:
    """acc + a · b in fp32; `use_acc=False` starts from zero."""
    (m, k), (k_b, n) = a.shape, b.shape
    if k != k_b:
        raise EmulationError(f"warpgroup_mma of [{m}, {k}] and [{k_b}, {n}]")
    if a.dtype != b.dtype:
        raise EmulationError(f"warpgroup_mma of {a.dtype} and {b.dtype}")
    adds = bool(use_acc)

    def work() -> Tensor:
        product = _operand(a) @ _operand(b)
        start = acc.value if isinstance(acc, Unfinished) else acc
        if adds and start.shape != product.shape:
            raise EmulationError(f"warpgroup_mma adds {list(product.shape)} to {list(start.shape)}")
        return start + product if adds else product

    result = Unfinished(work)
    current.mma_queue.append(result)
    if not is_async:
        return warpgroup_mma_wait(0, [result])
    for mma in current.mma_queue:
        if mma.work is not None and current.dice.random() < 0.5:
            break
        mma.run()
    return result


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """Finish all but the newest `num_outstanding`; finished dependencies become tensors."""
    while len(current.mma_queue) > num_outstanding:
        mma = current.mma_queue.pop(0)
        mma.run()
        mma.waited_for = True
    results = tuple(_resolve(dep) for dep in deps)
    return results[0] if len(results) == 1 else results


def _resolve(dep: Any) -> Any:
    return dep.value if isinstance(dep, Unfinished) and dep.waited_for else dep


def warpgroup_mma_init(value: Tensor) -> Unfinished:
    return Unfinished(None, value)
