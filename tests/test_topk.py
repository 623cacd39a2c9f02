"""Top-k: the reference and its check, and torch's on a CPU."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import topk_torch
from dsa_bench.kernels.paging import Pages
from dsa_bench.kernels.topk import OPERATOR, TopkInputs, TopkOutputs, refuse_options
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.topk_rows import KINDS, by_python, full, slots_of, values_of

INF, NAN = float("inf"), float("nan")


def rows_of(*rows, topk, start=None, end=None):
    logits = torch.tensor(rows, dtype=torch.float32)
    start = [0] * len(rows) if start is None else start
    end = [logits.shape[1]] * len(rows) if end is None else end
    return TopkInputs(logits, torch.tensor(start).int(), torch.tensor(end).int(), topk)


def selected(inputs):
    return OPERATOR.reference(inputs).topk_indices.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_reference_matches_python(kind):
    mutate = hostile.MUTATIONS["topk"].get(kind, hostile.plain)
    inputs = mutate(OPERATOR.make_inputs(full(9, 120, 33), seed=0, device="cpu"))
    expected = by_python(inputs)
    for i, actual in enumerate(selected(inputs)):
        row = inputs.index_logits[i].tolist()
        assert values_of(row, actual) == values_of(row, expected[i])
        assert actual.count(-1) == expected[i].count(-1)
        used = [n for n in actual if n >= 0]
        assert actual[: len(used)] == used
        assert set(used) == {n for n in expected[i] if n >= 0}
        assert used == sorted(used) or not inputs.sorted_indices
        assert len(set(used)) == len(used)
        assert all(int(inputs.kv_start[i]) <= n < int(inputs.kv_end[i]) for n in used)


def test_ends_are_exclusive_and_short_rows_are_padded():
    row = [5.0, 4.0, 3.0, 2.0, 1.0, 9.0]
    inputs = rows_of(row, row, row, row, topk=3, start=[0, 1, 4, 3], end=[5, 6, 6, 3])
    assert selected(inputs) == [[0, 1, 2], [5, 1, 2], [5, 4, -1], [-1, -1, -1]]


def test_nan_counts_as_minus_infinity_which_is_a_value():
    inputs = rows_of([NAN, 1.0, -INF, 2.0], [NAN, -INF, NAN, NAN], topk=3)
    assert selected(inputs)[0][:2] == [3, 1]
    assert set(selected(inputs)[0][2:]) <= {0, 2}
    assert len(set(selected(inputs)[1])) == 3
    assert min(selected(inputs)[1]) >= 0


def test_zeros_of_both_signs_are_equal():
    inputs = rows_of([-0.0, 0.0, -0.0, -1.0], topk=2)
    assert set(selected(inputs)[0]) < {0, 1, 2}
    for columns in ([0, 2], [1, 2], [2, 0]):
        outputs = TopkOutputs(torch.tensor([columns], dtype=torch.int32))
        assert hostile.passes(OPERATOR.check(inputs, outputs))


def test_sorted_indices_ascend_and_padding_stays_behind():
    inputs = rows_of([1.0, 9.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0], topk=3, end=[4, 2])
    assert selected(inputs) == [[1, 3, 2], [1, 0, -1]]
    inputs = replace(inputs, sorted_indices=True)
    assert selected(inputs) == [[1, 2, 3], [0, 1, -1]]
    unsorted = TopkOutputs(torch.tensor([[1, 3, 2], [0, 1, -1]], dtype=torch.int32))
    assert not hostile.passes(OPERATOR.check(inputs, unsorted))
    assert hostile.passes(OPERATOR.check(replace(inputs, sorted_indices=False), unsorted))


def test_bf16_logits_are_their_values():
    shape = replace(full(3, 40, 5), logits="bf16")
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    assert inputs.index_logits.dtype == torch.bfloat16
    same = replace(inputs, index_logits=inputs.index_logits.float())
    assert selected(inputs) == selected(same)
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(same)))
    assert OPERATOR.cost(shape).bytes_read == 2 * 3 * 40
    assert OPERATOR.memory(shape).input_bytes == 2 * 3 * 40 + 2 * 4 * 3


def test_options_are_refused_with_a_sentence():
    inputs = OPERATOR.make_inputs(full(2, 8, 2), seed=0, device="cpu")
    refuse_options(inputs, "it")
    with pytest.raises(Unsupported, match="it does not sort its indices"):
        refuse_options(replace(inputs, sorted_indices=True), "it")
    with pytest.raises(Unsupported, match="it, as it is called here, takes float32 logits, not bf"):
        refuse_options(replace(inputs, index_logits=inputs.index_logits.bfloat16()), "it")


@pytest.mark.parametrize("kind", KINDS)
def test_torch_topk_takes_every_option(kind):
    mutate = hostile.MUTATIONS["topk"].get(kind, hostile.plain)
    inputs = mutate(OPERATOR.make_inputs(full(9, 120, 33), seed=5, device="cpu"))
    hostile.assert_right("topk", inputs, topk_torch.run(inputs))


def test_topk_beyond_the_columns_is_padded():
    inputs = rows_of([1.0, 2.0], topk=4)
    assert selected(inputs) == [[1, 0, -1, -1]]
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(inputs)))


def test_reference_of_some_rows():
    inputs = hostile.topk_rows("ties")(OPERATOR.make_inputs(full(9, 50, 7), seed=1, device="cpu"))
    rows = torch.tensor([6, 0])
    assert torch.equal(
        OPERATOR.reference(inputs, rows=rows).topk_indices,
        OPERATOR.reference(inputs).topk_indices[rows],
    )


def paged(num_rows=6):
    return hostile.topk_paged(OPERATOR.make_inputs(full(num_rows, 120, 33), seed=4, device="cpu"))


def with_slots(inputs):
    """What a top-k with slots returns."""
    indices = OPERATOR.reference(inputs).topk_indices
    return TopkOutputs(indices, torch.tensor(slots_of(indices.tolist(), inputs.pages)).int())


def test_slots_are_left_to_page_slots_or_checked():
    inputs = paged()
    assert inputs.pages.seq_len_q(6) == 3
    assert OPERATOR.reference(inputs).topk_slots is None
    assert topk_torch.run(inputs).topk_slots is None
    outputs = with_slots(inputs)
    listed = outputs.topk_indices >= 0
    # of the columns a few lie behind the last page
    assert 0 < (listed & (outputs.topk_slots < 0)).sum() < listed.sum() / 4
    for rows in (None, torch.tensor([4, 1, 2])):
        names = [check.name for check in OPERATOR.check(inputs, outputs, rows=rows)]
        assert names == ["topk_indices", "topk_slots"]
        assert hostile.passes(OPERATOR.check(inputs, outputs, rows=rows))
    (only,) = OPERATOR.check(replace(inputs, pages=None), outputs)
    assert only.name == "topk_indices"


def test_each_row_is_of_its_own_sequence():
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    inputs = replace(rows_of(*[[2.0, 1.0, 9.0, 7.0]] * 4, topk=2), pages=Pages(table, 2))
    slots = torch.tensor([[2, 3], [2, 3], [4, 5], [4, 5]], dtype=torch.int32)
    outputs = TopkOutputs(torch.tensor([[2, 3]] * 4).int(), slots)
    assert hostile.passes(OPERATOR.check(inputs, outputs))
    for wrong in (slots.flip(0), slots[[0, 2, 0, 2]], slots[:3], slots[:, :1]):
        assert not hostile.passes(OPERATOR.check(inputs, outputs._replace(topk_slots=wrong)))
    rows = torch.tensor([0, 3])
    half = torch.where(torch.tensor([[True], [False], [False], [True]]), slots, 77)
    assert hostile.passes(OPERATOR.check(inputs, outputs._replace(topk_slots=half), rows=rows))


WRONG_SLOTS = {
    "zeros": lambda inputs, right: torch.zeros_like(right.topk_slots),
    "positions": lambda inputs, right: right.topk_indices,
    "another-order": lambda inputs, right: right.topk_slots.flip(1),
    "sequences-swapped": lambda inputs, right: right.topk_slots.roll(3, 0),
    "padding-unmarked": lambda inputs, right: right.topk_slots.clamp(min=0),
    "one-off": lambda inputs, right: right.topk_slots + (torch.arange(33) == 0),
    "of-another-page-size": lambda inputs, right: torch.where(
        right.topk_slots < 0, -1, right.topk_slots // 17 * 16 + right.topk_indices % 17
    ),
}


@pytest.mark.parametrize("name", WRONG_SLOTS)
def test_check_fails_for_wrong_slots(name):
    inputs = paged()
    right = with_slots(inputs)
    wrong = right._replace(topk_slots=WRONG_SLOTS[name](inputs, right).int())
    passed = {check.name: check.passed for check in OPERATOR.check(inputs, wrong)}
    assert passed == {"topk_indices": True, "topk_slots": False}


def _set(column, value):
    def change(indices):
        indices[2, column] = value(indices) if callable(value) else value
        return indices

    return change


WRONG = {
    "zeros": torch.zeros_like,
    "ascending-instead": lambda x: torch.arange(x.shape[1], dtype=torch.int32).expand_as(x),
    "rows-swapped": lambda x: x.flip(0),
    "shifted-by-one": lambda x: x - 1,
    "one-repeated": _set(3, lambda x: x[2, 4]),
    "one-missing": _set(3, -1),
    "one-too-low": _set(0, 0),
    "behind-the-end": _set(0, 99),
    "outside-of-the-row": _set(0, 2**31 - 1),
    "padding-not-minus-one": lambda x: torch.where(x < 0, 0, x),
    "padding-first": lambda x: x.flip(1),
    "one-column-short": lambda x: x[:, :-1],
    "one-row-short": lambda x: x[:-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = OPERATOR.make_inputs(full(4, 100, 16), seed=3, device="cpu")
    inputs.index_logits[2, 0] = -9.0
    inputs.kv_end[:] = torch.tensor([100, 5, 98, 0])
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    wrong = TopkOutputs(WRONG[name](right.topk_indices.clone()))
    assert not hostile.passes(OPERATOR.check(inputs, wrong))


def test_check_takes_any_order_and_any_of_equal_values():
    inputs = rows_of([1.0, 3.0, 1.0, 2.0, 1.0], topk=3)
    for columns in ([1, 3, 0], [4, 1, 3], [2, 3, 1]):
        outputs = TopkOutputs(torch.tensor([columns], dtype=torch.int32))
        assert hostile.passes(OPERATOR.check(inputs, outputs))
    twice = TopkOutputs(torch.tensor([[1, 3, 3]], dtype=torch.int32))
    assert not hostile.passes(OPERATOR.check(inputs, twice))


def test_cost_and_memory_counted_by_hand():
    # a causal chunk of 3 rows that ends at 5: they see 3, 4, 5 columns
    case = Case(op="topk", impl="reference", phase="prefill", seq_len_kv=5, seq_len_q=3, topk=2)
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    assert shape.valid == 12
    cost = OPERATOR.cost(shape)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (0, 4 * 12, 4 * 3 * 2)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    assert inputs.kv_end.tolist() == [3, 4, 5]
    memory = OPERATOR.memory(shape)
    tensors = (inputs.index_logits, inputs.kv_start, inputs.kv_end)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == OPERATOR.reference(inputs).topk_indices.nbytes
    decode = replace(case, phase="decode", batch_size=4)
    assert OPERATOR.shape(decode, PRESETS["v3.2"]).valid == 4 * 3 * 5


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"topk": None}, "topk has no value"),
        ({"topk": 129}, "topk 129 is more than the 128 keys there are"),
        ({"seq_len_q": 129}, "seq_len_q 129 is more than L 128"),
    ],
    ids=["no-topk", "topk-129", "q-129"],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    known = {"seq_len_q": 64, "seq_len_kv": 128, "topk": 32, "phase": "prefill"} | fields
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(Case(op="topk", impl="reference", **known), PRESETS["v3.2"])


def test_logits_of_another_type_are_no_case():
    with pytest.raises(Unsupported, match="logits are fp32 or bf16, not fp16"):
        replace(full(3, 40, 5), logits="fp16")
