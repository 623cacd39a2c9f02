"""Positions to slots: the reference, its check, and every implementation of it."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import page_slots_triton
from dsa_bench.kernels.page_slots import (
    OPERATOR,
    PageSlotsInputs,
    PageSlotsOutputs,
    PageSlotsShape,
)
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile


def shape_of(batch_size, seq_len_kv, topk, seq_len_q=1, page_size=64):
    return PageSlotsShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, topk=topk, seq_len_q=seq_len_q,
        page_size=page_size,
    )  # fmt: skip


def small(seed=0):
    return OPERATOR.make_inputs(shape_of(3, 40, 12, 2, page_size=17), seed=seed, device="cpu")


def test_reference_by_hand():
    indices = torch.tensor([[[0, 3, 4, 11, 12, -1]], [[7, 8, -(2**31), 2**31 - 1, 5, 1]]]).int()
    table = torch.tensor([[5, 0, 2], [1, 9, 4]], dtype=torch.int32)
    slots = OPERATOR.reference(PageSlotsInputs(indices, table, 4)).topk_slots
    assert slots.tolist() == [[[20, 23, 0, 11, -1, -1]], [[39, 16, -1, -1, 37, 5]]]
    assert slots.dtype == torch.int32


def test_reference_matches_python_and_takes_rows():
    inputs = hostile.page_slots_wild(small())
    slots = OPERATOR.reference(inputs).topk_slots
    for b in range(3):
        for j in range(2):
            table = inputs.block_table[b].tolist()
            positions = inputs.topk_indices[b, j].tolist()
            assert slots[b, j].tolist() == [
                table[t // 17] * 17 + t % 17 if 0 <= t < 51 else -1 for t in positions
            ]
    rows = torch.tensor([2, 0])
    assert torch.equal(OPERATOR.reference(inputs, rows=rows).topk_slots, slots[rows])


WRONG = {
    "zeros": lambda inputs, right: torch.zeros_like(right),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)).topk_slots,
    "positions": lambda inputs, right: inputs.topk_indices,
    "reordered": lambda inputs, right: right.flip(2),
    "sequences-swapped": lambda inputs, right: right.flip(0),
    "one-off": lambda inputs, right: right + (torch.arange(12) == 11),
    "padding-unmarked": lambda inputs, right: right.clamp(min=0),
    "one-column-short": lambda inputs, right: right[..., :-1],
    "one-sequence-for-all": lambda inputs, right: right[:1],
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = hostile.page_slots_wild(small())
    right = OPERATOR.reference(inputs).topk_slots
    assert hostile.passes(OPERATOR.check(inputs, PageSlotsOutputs(right)))
    wrong = PageSlotsOutputs(WRONG[name](inputs, right.clone()).to(torch.int32))
    assert not hostile.passes(OPERATOR.check(inputs, wrong))
    good = right.clone()
    good[1] = 0
    rows = torch.tensor([0, 2])
    assert hostile.passes(OPERATOR.check(inputs, PageSlotsOutputs(good), rows=rows))


def test_cost_and_memory_counted_by_hand():
    shape = shape_of(2, 70, 8, 3)
    cost = OPERATOR.cost(shape)
    assert (cost.flops, cost.bytes_written) == (0, 4 * 2 * 3 * 8)
    assert cost.bytes_read == 4 * 2 * 3 * 8 + 4 * 2 * 2
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == inputs.topk_indices.nbytes + inputs.block_table.nbytes
    assert memory.output_bytes == OPERATOR.reference(inputs).topk_slots.nbytes


@pytest.mark.parametrize(
    ("topk", "sentence"), [(None, "topk has no value"), (65, "topk 65 is more than the 64 keys")]
)
def test_a_case_that_makes_no_sense(topk, sentence):
    case = Case(
        op="page_slots", impl="reference", phase="decode", seq_len_kv=64, seq_len_q=1, topk=topk
    )
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(case, PRESETS["v3.2"])


MISTAKES = [
    ("topk_indices", lambda x: x.long(), TypeError, "topk_indices must be int32"),
    ("topk_indices", lambda x: x[0], ValueError, "topk_indices must be int32 .batch_size, seq_len"),
    ("topk_indices", lambda x: x[:, :1], ValueError, "topk_indices must be contiguous, got stri"),
    ("block_table", lambda x: x.long(), TypeError, "block_table must be int32"),
    ("block_table", lambda x: x[:2], ValueError, "block_table must be int32 .batch_size=3"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_triton_refuses(name, change, kind, sentence):
    inputs = small()
    with pytest.raises(kind, match=sentence):
        page_slots_triton.run(replace(inputs, **{name: change(getattr(inputs, name))}))


def test_triton_supports_says_why_not():
    reason = page_slots_triton.supports(shape_of(1, 70, 8), Machine(device="cpu", name="a CPU"))
    assert reason == "triton page_slots needs a CUDA GPU, this is a CPU"


@pytest.mark.interpret
@pytest.mark.parametrize("page_size", [1, 17, 64])
@pytest.mark.parametrize("mutate", [hostile.plain, hostile.page_slots_wild])
def test_triton_interpreted(page_size, mutate):
    shape = shape_of(2, 1500, 1100, 2, page_size)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=page_size, device="cpu"))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("page_slots", "triton").run(inputs)
    hostile.assert_right("page_slots", inputs, outputs)


SHAPES = [
    shape_of(5, 700, 300, 2), shape_of(1, 5000, 2048), shape_of(200, 3000, 2048, 4),
    shape_of(3, 700, 257, 3, page_size=17), shape_of(2, 99, 1, page_size=32),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("page_slots", SHAPES))
def test_page_slots_matches_reference(name, shape, mutate):
    hostile.assert_implementation("page_slots", name, shape, mutate)
