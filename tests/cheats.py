"""Implementations of `double` that are faster than the work, or only look so: each must be caught.

`CHEATS` names for each what catches it: the status of its case, and the flag of a suspect time.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_bench import registry
from dsa_bench.operator import Implementation
from tests import fake_operator
from tests.fake_operator import FakeInputs, FakeOutputs


@dataclass(frozen=True)
class Caught:
    """How a cheat must end."""

    status: str
    flag: str = ""


CHEATS = {
    "zeros": Caught("wrong"),
    "identity": Caught("wrong"),
    "first_half": Caught("wrong"),
    "one_row_unwritten": Caught("wrong"),
    "off_by_one_row": Caught("wrong"),
    "first_result_for_ever": Caught("wrong"),
    "same_buffer": Caught("wrong"),
    "right_when_checked": Caught("wrong", "output_differs"),
    "cached_by_address": Caught("wrong", "output_differs"),
    "cached_by_object": Caught("wrong", "output_differs"),
    "cached_by_content": Caught("ok", "fresh_slower"),
    "later_in_a_thread": Caught("wrong"),
    "lazy_tensor": Caught("wrong"),
    "patched_clock": Caught("ok"),
}
"""`ok` without a flag: the cheat does nothing to the time."""
GPU_CHEATS = CHEATS | {
    "other_stream": Caught("wrong", "output_differs"),
    "patched_events": Caught("ok"),
}


def work(inputs: FakeInputs) -> FakeOutputs:
    """The honest computation, slow enough that leaving it out shows."""
    out = 2 * inputs.x
    for _ in range(200):
        out = (out + 2 * inputs.x) / 2
    return FakeOutputs(out)


def identity(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(inputs.x)


def first_half(inputs: FakeInputs, /) -> FakeOutputs:
    """Leaves early: the second half of the rows is never computed."""
    out = torch.zeros_like(inputs.x)
    half = out.shape[0] // 2
    out[:half] = 2 * inputs.x[:half]
    return FakeOutputs(out)


def one_row_unwritten(inputs: FakeInputs, /) -> FakeOutputs:
    """One row, which no sample need hit, holds whatever the memory held."""
    out = 2 * inputs.x
    out[out.shape[0] // 2 + 1] = float("nan")
    return FakeOutputs(out)


def off_by_one_row(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(2 * inputs.x.roll(1, dims=0))


class FirstResultForEver:
    def __init__(self) -> None:
        self.kept: FakeOutputs | None = None

    def __call__(self, inputs: FakeInputs, /) -> FakeOutputs:
        self.kept = self.kept or work(inputs)
        return self.kept


class SameBuffer:
    """Hands out one buffer, and writes it for the next call only after the check."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def __call__(self, inputs: FakeInputs, /) -> FakeOutputs:
        before = self.buffer
        self.buffer = work(inputs).out
        return FakeOutputs(self.buffer if before is None else before)


class RightWhenChecked:
    """Works for its first calls, which the gate looks at, and does nothing for the many behind."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: FakeInputs, /) -> FakeOutputs:
        self.calls += 1
        return work(inputs) if self.calls <= 2 else FakeOutputs(torch.empty_like(inputs.x))


class Cached:
    """Keeps results under what `key` makes of the inputs."""

    def __init__(self, key: Any) -> None:
        self.key, self.kept = key, dict[Any, FakeOutputs]()

    def __call__(self, inputs: FakeInputs, /) -> FakeOutputs:
        key = self.key(inputs)
        if key not in self.kept:
            self.kept[key] = work(inputs)
        return self.kept[key]


def later_in_a_thread(inputs: FakeInputs, /) -> FakeOutputs:
    """Returns at once; the result follows while nobody holds a stopwatch."""
    out = torch.full_like(inputs.x, float("nan"))

    def finish() -> None:
        time.sleep(0.02)
        out.copy_(2 * inputs.x)

    threading.Thread(target=finish, daemon=True).start()
    return FakeOutputs(out)


class LazyTensor(torch.Tensor):
    """Would compute when somebody looks at it."""


def lazy_tensor(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs((2 * inputs.x).as_subclass(LazyTensor))


def patched_clock(inputs: FakeInputs, /) -> FakeOutputs:
    """Slows the clocks of the process down a thousandfold."""
    if time.perf_counter.__name__ != "patched":
        plain = time.perf_counter

        def patched() -> float:
            return plain() / 1000

        time.perf_counter = patched
    return work(inputs)


def other_stream(inputs: FakeInputs, /) -> FakeOutputs:
    """Works where the timer of the caller's stream does not look."""
    out = torch.full_like(inputs.x, float("nan"))
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out.copy_(work(inputs).out)
    return FakeOutputs(out)


def patched_events(inputs: FakeInputs, /) -> FakeOutputs:
    torch.cuda.Event.elapsed_time = lambda self, end: 1e-3  # type: ignore[method-assign]
    return work(inputs)


def catalogue() -> registry.Catalogue:
    """`double` with every cheat as an implementation, each made anew."""
    runs: dict[str, Any] = {
        "honest": work,
        "zeros": fake_operator.zeros,
        "identity": identity,
        "first_half": first_half,
        "one_row_unwritten": one_row_unwritten,
        "off_by_one_row": off_by_one_row,
        "first_result_for_ever": FirstResultForEver(),
        "same_buffer": SameBuffer(),
        "right_when_checked": RightWhenChecked(),
        "cached_by_address": Cached(lambda inputs: inputs.x.data_ptr()),
        "cached_by_object": Cached(lambda inputs: id(inputs)),
        "cached_by_content": Cached(lambda inputs: (inputs.x.data_ptr(), inputs.x[3, 3].item())),
        "later_in_a_thread": later_in_a_thread,
        "lazy_tensor": lazy_tensor,
        "patched_clock": patched_clock,
        "other_stream": other_stream,
        "patched_events": patched_events,
    }
    double = fake_operator.make_operator("double", lambda x: 2 * x, finite=("out",))
    cheats = tuple(Implementation(name=name, run=run, priority=-1) for name, run in runs.items())
    return registry.collect(
        {
            "double": fake_operator.module(OPERATOR=double),
            "double_cheats": fake_operator.module(IMPLEMENTS="double", IMPLEMENTATIONS=cheats),
        }
    )
