"""Input sets: how many are made, and how one gets new contents."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsa_bench.input_sets import make_sets, refill


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    view: Tensor
    scale: float


def make(offset: int) -> Inputs:
    x = torch.full((4, 6), float(offset))
    # a view of the same storage, not contiguous, must not turn over twice
    return Inputs(x=x, view=x.t()[1:3], scale=2.0)


def contents(sets: list[Inputs]) -> list[float]:
    assert all(bool((s.x == s.x[0, 0]).all()) for s in sets)
    return [s.x[0, 0].item() for s in sets]


@pytest.mark.parametrize(
    ("wanted", "spare", "made"),
    [(3, 10**6, 3), (3, 4 * 96, 2), (3, 4 * 95, 1), (3, -5, 1), (1, 10**6, 1)],
)
def test_so_many_sets_as_memory_allows(wanted: int, spare: int, made: int) -> None:
    sets = make_sets(make, wanted=wanted, input_bytes=96, spare_bytes=spare)
    assert contents(sets) == [float(i) for i in range(made)]


def test_a_set_that_does_not_fit_is_done_without_but_the_first_is_needed() -> None:
    def only(limit: int, offset: int) -> Inputs:
        if offset >= limit:
            raise torch.OutOfMemoryError("full")
        return make(offset)

    sets = make_sets(lambda i: only(2, i), wanted=3, input_bytes=1, spare_bytes=10**6)
    assert len(sets) == 2
    with pytest.raises(torch.OutOfMemoryError):
        make_sets(lambda i: only(0, i), wanted=3, input_bytes=1, spare_bytes=10**6)


def test_refill_gives_new_contents_in_the_same_place() -> None:
    target, source = make(1), make(5)
    places = target.x.data_ptr(), target.view.data_ptr()
    refill(target, source)
    assert contents([target, source]) == [5.0, 5.0] and target.view[0, 0].item() == 5.0
    assert (target.x.data_ptr(), target.view.data_ptr()) == places
    assert source.x.data_ptr() != target.x.data_ptr()


def test_refill_refuses_another_shape() -> None:
    x = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        refill(make(1), Inputs(x=x, view=x, scale=2.0))
