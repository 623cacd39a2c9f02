"""Top-k of lists that another kernel has written."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import candidate_list
from dsa_bench.kernels.hostile_rows import wild_pages
from dsa_bench.kernels.topk import OPERATOR, TopkOutputs
from tests import hostile
from tests.gluon_emulator import emulated_gluon
from tests.topk_rows import assert_stable, full, slots_of


def lists_of(inputs, num_parts, capacity, threshold):
    """Lists as another kernel might write them: what reaches the threshold, in parts of the row."""
    rows, cols = inputs.index_logits.shape
    lists = candidate_list.empty_lists(rows, num_parts, capacity, torch.device("cpu"))
    lists.values.fill_(hostile.NAN)
    lists.columns.fill_(-7)
    each = -(-cols // num_parts)
    for row in range(rows):
        reaches = inputs.index_logits[row] >= threshold
        for part in range(num_parts):
            found = reaches.nonzero().flatten()
            found = found[found // each == part].flip(0)
            lists.counts[row, part] = len(found)
            kept = found[:capacity]
            lists.values[row, part, : len(kept)] = inputs.index_logits[row, kept]
            lists.columns[row, part, : len(kept)] = kept.int()
    return lists


@pytest.mark.parametrize("num_parts", [1, 2, 16, 128])
@pytest.mark.parametrize("has_logits", [True, False], ids=["logits", "no-logits"])
def test_lists_of_another_kernel(num_parts, has_logits):
    inputs = OPERATOR.make_inputs(full(3, 6000, 500), seed=9, device="cpu")
    inputs = hostile.topk_rows("ties")(inputs)
    inputs.kv_start[:], inputs.kv_end[:] = 0, torch.tensor([6000, 400, 6000])
    inputs.index_logits[2, 100:] -= 9
    failed = torch.full((3,), 77, dtype=torch.int32)
    lists = lists_of(inputs, num_parts, 1000, 1.25)
    pages, slots = wild_pages(inputs.kv_end, 6000), torch.full((3, 500), 77, dtype=torch.int32)
    with emulated_gluon(seed=9) as emulated, hostile.poisoned_outputs():
        select = emulated.load("dsa_bench.kernels.candidate_list").select_candidates
        out = select(
            lists, inputs.kv_start, inputs.kv_end, 500, 6000,
            logits=inputs.index_logits if has_logits else None, failed=failed,
            pages=pages, slots=slots,
        )  # fmt: skip
    expected = replace(inputs, sorted_indices=False)
    assert slots.tolist() == slots_of(out.tolist(), pages)
    if has_logits:
        assert_stable(expected, TopkOutputs(out))
        assert failed.tolist() == [77] * 3
        return
    # the third row lists fewer than topk, and has no logits to be selected from; the second needs
    # no list
    assert failed.tolist() == [0, 0, 1] and (out[2] == -1).all()
    first = replace(
        expected, index_logits=inputs.index_logits[:2], kv_start=inputs.kv_start[:2],
        kv_end=inputs.kv_end[:2],
    )  # fmt: skip
    assert_stable(first, TopkOutputs(out[:2]))


def test_a_list_that_names_a_column_twice_ends():
    inputs = OPERATOR.make_inputs(full(1, 3000, 100), seed=3, device="cpu")
    lists = lists_of(inputs, 2, 400, 1.0)
    lists.values[0, :, 0], lists.columns[0, :, 0] = inputs.index_logits.max() + 1, 7
    with emulated_gluon(seed=9) as emulated, hostile.poisoned_outputs():
        select = emulated.load("dsa_bench.kernels.candidate_list").select_candidates
        failed = torch.empty(1, dtype=torch.int32)
        # within its bounds, which the emulator watches
        select(lists, inputs.kv_start, inputs.kv_end, 1, 3000, failed=failed)
    assert failed.tolist() == [0]


def test_a_list_that_ran_over_has_failed():
    inputs = OPERATOR.make_inputs(full(2, 3000, 100), seed=3, device="cpu")
    lists = lists_of(inputs, 4, 150, 1.0)
    assert lists.counts.sum(1).min() >= 100
    lists.counts[1, 2] = 151
    failed = torch.empty(2, dtype=torch.int32)
    with emulated_gluon(seed=9) as emulated, hostile.poisoned_outputs():
        select = emulated.load("dsa_bench.kernels.candidate_list").select_candidates
        out = select(lists, inputs.kv_start, inputs.kv_end, 100, 3000, failed=failed)
    assert failed.tolist() == [0, 1]
    assert out[0].min() >= 0 and (out[1] == -1).all()
