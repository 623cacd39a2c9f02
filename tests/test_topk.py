"""Top-k: the reference, its check, and every implementation of it."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import topk_gluon
from dsa_bench.kernels.topk import OPERATOR, TopkInputs, TopkOutputs, TopkShape
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.gluon_emulator import emulated_gluon
from tests.gluon_emulator.asm import list_append, ticket_counter, word_read

INF, NAN = float("inf"), float("nan")
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
CPU = Machine(device="cpu", name="a CPU")
ATOMICS = {
    "[a + 16260]": ticket_counter(4065),
    "[a + 16264]": ticket_counter(4066),
    "ld.volatile.shared": word_read(4064),
    "st.shared.b32": list_append(4064, 4064, (0, 4096)),
}


def full(num_rows, num_cols, topk):
    return TopkShape(num_rows=num_rows, num_cols=num_cols, topk=topk, valid=num_rows * num_cols)


def rows_of(*rows, topk, start=None, end=None):
    logits = torch.tensor(rows, dtype=torch.float32)
    start = [0] * len(rows) if start is None else start
    end = [logits.shape[1]] * len(rows) if end is None else end
    return TopkInputs(logits, torch.tensor(start).int(), torch.tensor(end).int(), topk)


def selected(inputs):
    return OPERATOR.reference(inputs).topk_indices.tolist()


def values_of(row, columns):
    """Values at the columns, largest first; NaN as -inf, None where there is no column."""
    row = [-INF if x != x else x for x in row]
    found = sorted((row[n] for n in columns if n >= 0), reverse=True)
    return found + [None] * (len(columns) - len(found))


def by_python(inputs):
    """The definition by Python's sort: of each row the columns of its largest values."""
    out = []
    for i, row in enumerate(inputs.index_logits.tolist()):
        first, end = max(0, int(inputs.kv_start[i])), min(len(row), int(inputs.kv_end[i]))
        value = [-INF if x != x else x for x in row]
        best = sorted(range(first, end), key=lambda n: -value[n])[: inputs.topk]
        out.append(best + [-1] * (inputs.topk - len(best)))
    return out


@pytest.mark.parametrize("kind", ["plain", *hostile.TOPK_ROWS])
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


MISTAKES = [
    ("index_logits", lambda x: x.half(), TypeError, "index_logits must be float32"),
    ("index_logits", lambda x: x[0], ValueError, "index_logits must be float32 .num_rows"),
    ("index_logits", lambda x: x[:, ::2], ValueError, "index_logits must be contiguous in its la"),
    ("kv_start", lambda x: x.long(), TypeError, "kv_start must be int32"),
    ("kv_end", lambda x: x[:2], ValueError, "kv_end must be int32 .num_rows=3"),
    ("topk", lambda x: 0, ValueError, "topk must be 1 … 3584, got 0"),
    ("topk", lambda x: 3585, ValueError, "topk must be 1 … 3584, got 3585"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_gluon_refuses(name, change, kind, sentence):
    inputs = OPERATOR.make_inputs(full(3, 40, 4), seed=0, device="cpu")
    with pytest.raises(kind, match=sentence):
        topk_gluon.run(replace(inputs, **{name: change(getattr(inputs, name))}))


def test_gluon_supports_says_why_not():
    assert topk_gluon.supports(full(1, 4096, 2048), A100) is None
    assert "sm_80 or newer, this is a CPU" in topk_gluon.supports(full(1, 4096, 2048), CPU)
    reason = topk_gluon.supports(full(1, 8192, 4096), A100)
    assert reason == "gluon topk takes topk up to 3584, this case has 4096"


def emulate(inputs, seed):
    with emulated_gluon(seed=seed, asm=ATOMICS) as emulated, hostile.poisoned_outputs():
        return emulated.load("dsa_bench.kernels.topk_gluon").run(inputs)


@pytest.mark.parametrize("kind", ["plain", *hostile.TOPK_ROWS])
@pytest.mark.parametrize(
    ("seed", "num_cols", "topk"), [(0, 9000, 512), (1, 5003, 2048)], ids=["9000-k512", "5003-k2048"]
)
def test_gluon_emulated(seed, num_cols, topk, kind):
    """Both the pass by a threshold and, for rows of equal values, the exact search."""
    mutate = hostile.MUTATIONS["topk"].get(kind, hostile.plain)
    inputs = mutate(OPERATOR.make_inputs(full(6, num_cols, topk), seed=seed, device="cpu"))
    hostile.assert_right("topk", inputs, emulate(inputs, seed))


@pytest.mark.parametrize("topk", [1, 3, 257, 3584])
def test_gluon_emulated_for_any_topk(topk):
    inputs = OPERATOR.make_inputs(full(2, 4300, topk), seed=topk, device="cpu")
    hostile.assert_right("topk", inputs, emulate(inputs, topk))


def test_gluon_emulated_looks_at_nothing_outside_the_range():
    inputs = OPERATOR.make_inputs(full(8, 6000, 300), seed=4, device="cpu")
    start = torch.tensor([1, 2, 3, 5, 6, 7, 1001, 999], dtype=torch.int32)
    end = start + torch.tensor([4990, 4064, 4065, 4096, 4097, 301, 300, 299], dtype=torch.int32)
    columns = torch.arange(6000)
    outside = (columns < start[:, None]) | (columns >= end[:, None])
    for filler in (NAN, INF):
        logits = inputs.index_logits.masked_fill(outside, filler)
        spoiled = replace(inputs, index_logits=logits, kv_start=start, kv_end=end)
        hostile.assert_right("topk", spoiled, emulate(spoiled, 5))


def test_gluon_emulated_clamps_the_range():
    inputs = OPERATOR.make_inputs(full(5, 700, 300), seed=6, device="cpu")
    start = torch.tensor([-5, -(2**31), 650, 7, 2**31 - 1], dtype=torch.int32)
    end = torch.tensor([701, 2**31 - 1, 9999, -(2**31), -(2**31)], dtype=torch.int32)
    wild = replace(inputs, kv_start=start, kv_end=end)
    hostile.assert_right("topk", wild, emulate(wild, 7))


SHAPES = [
    full(16, 8192, 2048), full(16, 20000, 512), full(16, 131072, 2048), full(16, 4100, 2048),
    full(9, 300000, 1024), full(64, 5000, 1), full(7, 4999, 257), full(33, 2048, 2048),
    full(5, 65537, 3584), full(5, 9000, 300),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("topk", SHAPES))
def test_topk_matches_reference(name, shape, mutate):
    hostile.assert_implementation("topk", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("topk"))
def test_topk_selects_the_same_twice(name):
    inputs = OPERATOR.make_inputs(SHAPES[2], seed=2, device="cuda")
    run = hostile.runnable("topk", name, SHAPES[2]).run
    first, second = (run(inputs).topk_indices.sort(1).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("topk"))
def test_topk_of_a_causal_chunk(name):
    case = Case(op="topk", impl=name, phase="prefill", seq_len_kv=8192, seq_len_q=4096, topk=2048)
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    hostile.assert_implementation("topk", name, shape, hostile.plain)


# torch's own copies of so large a tensor leave no room for tests that run beside this one
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in hostile.names("topk") if name != "torch"])
def test_topk_reads_logits_beyond_2_31_elements(name):
    shape = full(2**31 // 131072 + 20, 131072, 2048)
    implementation = hostile.runnable("topk", name, shape)
    logits = torch.zeros(shape.num_rows, shape.num_cols, device="cuda")
    logits[-20:].normal_(generator=torch.Generator(device="cuda").manual_seed(0))
    end = torch.full((shape.num_rows,), shape.num_cols, dtype=torch.int32, device="cuda")
    end[:-20] = 0
    inputs = TopkInputs(logits, torch.zeros_like(end), end, shape.topk)
    rows = torch.arange(shape.num_rows - 30, shape.num_rows, device="cuda")
    hostile.assert_right("topk", inputs, implementation.run(inputs), rows)
