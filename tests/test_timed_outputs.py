"""Which timed call is kept, and that the copy is one."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsa_bench import timed_outputs
from dsa_bench.timed_outputs import Watch, copy_of, spoil


class Outputs(NamedTuple):
    out: Tensor
    count: Tensor
    nothing: None = None


def nothing(index: int) -> None:
    """The inputs may stay as they are."""


def test_every_call_is_chosen_equally_often() -> None:
    calls, rounds = 20, 4000
    kept: Counter[int] = Counter()
    for _ in range(rounds):
        watch = Watch(calls, nothing, nothing)
        kept[[watch.chooses(0) for _ in range(calls)].index(True)] += 1
    assert set(kept) == set(range(calls))
    # 200 of each, standard deviation 14
    assert all(120 < kept[index] < 280 for index in range(calls))


def test_inputs_are_renewed_before_the_chosen_call_and_only_once() -> None:
    order: list[object] = []
    watch = Watch(
        10,
        lambda index: order.append(("renew", index)),
        lambda index: order.append(("restore", index)),
        choose=lambda calls: 1,
    )
    assert watch.is_due and not watch.chooses(0)
    assert watch.chooses(2) and not watch.is_due
    order.append("call")
    watch.keep(Outputs(torch.ones(2), torch.tensor([1])))
    watch.end()
    assert not watch.chooses(0) and not watch.chooses(1, is_last=True)
    assert order == [("renew", 2), "call", ("restore", 2)] and watch.set_index == 2


def test_last_call_is_chosen_if_no_other_was() -> None:
    watch = Watch(10, nothing, nothing, choose=lambda calls: 9)
    assert not watch.chooses(0) and watch.chooses(1, is_last=True)


def test_an_output_without_room_for_a_copy_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(outputs: object) -> object:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(timed_outputs, "copy_of", full)
    watch = Watch(1, nothing, nothing)
    assert watch.chooses(0)
    watch.keep(Outputs(torch.ones(2), torch.tensor([1])))
    assert watch.outputs is None and watch.set_index == 0


def test_copy_is_no_view_and_keeps_its_kind() -> None:
    outputs = Outputs(torch.ones(2), torch.tensor([1]))
    copy = copy_of(outputs)
    spoil(outputs)
    assert isinstance(copy, Outputs) and copy.nothing is None
    assert copy.out.tolist() == [1.0, 1.0] and copy.count.tolist() == [1]
    assert outputs.out.isnan().all() and outputs.count.item() == torch.iinfo(torch.int64).min
    assert copy_of([torch.zeros(1)])[0].item() == 0.0
