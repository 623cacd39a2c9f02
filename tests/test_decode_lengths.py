"""Lengths of a decode batch: their definition, and what the operators that have them make of it."""

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels.decode_lengths import decode_lengths, pages_of
from dsa_bench.kernels.paging import make_ragged_block_table, unpack_index_pages
from dsa_bench.memory_use import held_bytes
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import LENGTH_KINDS, Case
from tests import hostile
from tests.dsa_cases import on_gpu

RAGGED = [kind for kind in LENGTH_KINDS if kind != "equal"]
HAVE_LENGTHS = (
    *("paged_indexer", "topk", "page_slots", "sparse_decode", "dsa"),
    *("dense_attention", "dense_attention_fp8"),
)
BATCH, LENGTH, QUERIES, TOPK = 5, 330, 2, 80
LENS = {"spread": [66, 132, 198, 264, 330], "one-long": [11, 11, 11, 11, 330]}
"""Of BATCH sequences, in ascending order; three of them have fewer keys than TOPK in `one-long`,
and those of `spread` end within a page of 64."""


def batch_of(kind: str, batch_size: int, seq_len_kv: int, seq_len_q: int = 1) -> Case:
    return Case(
        op="dsa", impl="reference", phase="decode", seq_len_kv=seq_len_kv, seq_len_q=seq_len_q,
        batch_size=batch_size, lengths=kind,
    )  # fmt: skip


def case_of(op: str, lengths: str, **changed: Any) -> Case:
    axes = registry.operator(op).axes
    known = {
        "phase": "decode", "seq_len_kv": LENGTH, "seq_len_q": QUERIES, "batch_size": BATCH,
        "topk": TOPK if "topk" in axes else None, "num_heads": 4, "preset": "v3.2-cpu",
        "precision": "bf16" if op == "dense_attention" else "fp8", "lengths": lengths,
    }  # fmt: skip
    return Case(op=op, impl="reference", **(known | changed))


def make(op: str, lengths: str, **changed: Any) -> tuple[Any, Any, Any]:
    """Operator, shape and inputs of a case on the CPU."""
    operator, case = registry.operator(op), case_of(op, lengths, **changed)
    shape = operator.shape(case, PRESETS[case.preset])
    return operator, shape, operator.make_inputs(shape, seed=3, device="cpu")


def lens_of(lengths: str, **changed: Any) -> tuple[int, ...]:
    return decode_lengths(case_of("dsa", lengths, **changed))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 32, 128])
@pytest.mark.parametrize(("seq_len_kv", "seq_len_q"), [(1, 1), (7, 3), (1000, 4), (131072, 1)])
def test_each_kind_is_what_its_formula_says(
    batch_size: int, seq_len_kv: int, seq_len_q: int
) -> None:
    for kind in LENGTH_KINDS:
        found = decode_lengths(batch_of(kind, batch_size, seq_len_kv, seq_len_q))
        assert len(found) == batch_size and max(found) == seq_len_kv and min(found) >= seq_len_q
        expected = {
            "equal": [seq_len_kv] * batch_size,
            "spread": [-(-seq_len_kv * i // batch_size) for i in range(1, batch_size + 1)],
            "one-long": [-(-seq_len_kv // 32)] * (batch_size - 1) + [seq_len_kv],
        }[kind]
        assert sorted(found) == sorted(max(n, seq_len_q) for n in expected)


def test_the_long_one_is_in_the_middle_and_a_spread_batch_is_shuffled() -> None:
    for batch_size in (4, 8, 32, 128, 256):
        found = decode_lengths(batch_of("one-long", batch_size, 4096))
        place = found.index(4096)
        assert batch_size // 4 <= place < batch_size - batch_size // 4
        spread = decode_lengths(batch_of("spread", batch_size, 4096))
        assert list(spread) not in (sorted(spread), sorted(spread, reverse=True))


def test_order_and_place_stay_what_they_are() -> None:
    """Times of two versions are of the same batch; `random` promises no more than its numbers."""
    assert decode_lengths(batch_of("spread", 8, 1000)) == (625, 250, 500, 125, 375, 750, 1000, 875)
    assert decode_lengths(batch_of("one-long", 128, 4096)).index(4096) == 47
    # no other axis changes them
    case = batch_of("spread", 8, 1000)
    assert decode_lengths(replace(case, seed=7, topk=4, num_heads=1)) == decode_lengths(case)


def test_pages_of_a_batch() -> None:
    assert pages_of((1, 64, 65, 200), 64) == (1, 1, 2, 4)
    table = make_ragged_block_table((2, 1, 4), torch.Generator().manual_seed(0))
    assert table.dtype == torch.int32 and table.shape == (3, 4)
    assert [(row >= 0).tolist() for row in table] == [
        [True, True, False, False], [True, False, False, False], [True] * 4
    ]  # fmt: skip
    assert (table[table < 0] == -1).all()
    assert sorted(table[table >= 0].tolist()) == list(range(7))


def test_operators_that_have_them_have_a_batch() -> None:
    found = {name for name in registry.operators() if "lengths" in registry.operator(name).axes}
    assert found == set(HAVE_LENGTHS)
    for name in found:
        assert "batch_size" in registry.operator(name).axes


@pytest.mark.parametrize("op", HAVE_LENGTHS)
@pytest.mark.parametrize("kind", RAGGED)
def test_a_batch_of_one_is_refused_in_a_sentence(op: str, kind: str) -> None:
    operator = registry.operator(op)
    with pytest.raises(Unsupported, match=f"^lengths {kind} need a batch of 2 sequences or more,"):
        operator.shape(case_of(op, kind, batch_size=1), PRESETS["v3.2-cpu"])
    with pytest.raises(Unsupported, match=r"^lengths are .*, one-long, not 'odd' \(cha"):
        operator.shape(case_of(op, "odd"), PRESETS["v3.2-cpu"])
    if "prefill" in operator.phases:
        with pytest.raises(Unsupported, match="need a batch of 2"):
            operator.shape(case_of(op, kind, batch_size=1, phase="prefill"), PRESETS["v3.2-cpu"])


@pytest.mark.parametrize("op", HAVE_LENGTHS)
@pytest.mark.parametrize("kind", RAGGED)
def test_lengths_of_all_operators_are_one_batch(op: str, kind: str) -> None:
    """Sorted they are those by hand, and each operator has them in the same order."""
    lens = list(lens_of(kind))
    assert sorted(lens) == LENS[kind]
    _, shape, inputs = make(op, kind)
    if op == "topk":
        assert inputs.kv_end.view(BATCH, QUERIES).tolist() == [[n, n] for n in lens]
    elif op in ("paged_indexer", "dsa"):
        assert inputs.seq_lens.tolist() == [[n - 1, n] for n in lens]
    elif op.startswith("dense"):
        assert list(inputs.pages.lengths) == inputs.pages.seq_lens.tolist() == lens
    else:
        assert list(shape.seq_lens) == lens


@pytest.mark.parametrize("op", HAVE_LENGTHS)
@pytest.mark.parametrize("kind", RAGGED)
def test_every_implementation_that_runs_here_passes_the_check(op: str, kind: str) -> None:
    operator, shape, inputs = make(op, kind)
    names = ["reference", "sdpa"] if op == "dense_attention" else ["reference"]
    for name in names:
        run = operator.reference if name == "reference" else registry.implementation(op, name).run
        outputs = run(inputs)
        if op == "dsa":
            outputs = outputs._replace(out=outputs.out.bfloat16())
        hostile.assert_right(op, inputs, outputs)
        assert operator.num_rows(shape) == len(outputs[0])
        rows = torch.tensor([BATCH - 1, 0])
        assert hostile.passes(operator.check(inputs, outputs, rows=rows))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("kind", RAGGED)
def test_each_sequence_is_alone_what_it_is_in_the_batch(kind: str, precision: str) -> None:
    """dsa of one sequence, cut out of both caches with its own pages."""
    operator, _, inputs = make("dsa", kind, precision=precision)
    whole = operator.reference(inputs)
    for b, length in enumerate(lens_of(kind)):
        own = inputs.block_table[b, : -(-length // 64)].long()
        alone = replace(
            inputs.select(torch.tensor([b])),
            index_cache=inputs.index_cache[own],
            kv_cache=inputs.kv_cache[own],
            block_table=torch.arange(len(own), dtype=torch.int32)[None],
        )
        found = operator.reference(alone)
        assert torch.equal(found.topk_indices[0].sort().values, whole.topk_indices[b].sort().values)
        torch.testing.assert_close(found.out[0], whole.out[b], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(found.lse[0], whole.lse[b], rtol=2e-5, atol=2e-6)


def test_a_short_sequence_selects_all_its_keys() -> None:
    _, _, inputs = make("dsa", "one-long")
    indices = registry.operator("dsa").reference(inputs).topk_indices
    for b, length in enumerate(lens_of("one-long")):
        for j, row in enumerate(indices[b].tolist()):
            seen = length - QUERIES + j + 1
            used = [n for n in row if n >= 0]
            assert len(set(used)) == len(used) == min(seen, TOPK) and max(used) < seen
            assert row[len(used) :] == [-1] * (TOPK - len(used))


@pytest.mark.parametrize("pattern", ["random", "local"])
@pytest.mark.parametrize("kind", RAGGED)
def test_lists_of_sparse_decode_stay_in_their_own_sequence(kind: str, pattern: str) -> None:
    _, shape, inputs = make("sparse_decode", kind, inputs=pattern)
    first, pairs = 0, 0
    for slots, length in zip(inputs.topk_slots, lens_of(kind), strict=True):
        for row in slots.tolist():
            used = [n - first for n in row if n >= 0]
            assert row[len(used) :] == [-1] * (TOPK - len(used))
            assert len(set(used)) == len(used) == min(length, TOPK)
            assert min(used) >= 0 and max(used) < length
            if length <= TOPK:
                assert sorted(used) == list(range(length))
            pairs += len(used)
        first += -(-length // 64) * 64
    assert inputs.kv_cache.shape[:2] == (first // 64, 64)
    assert shape.pairs == pairs
    counted = sum(len({n for row in b.tolist() for n in row if n >= 0}) for b in inputs.topk_slots)
    assert shape.listed_keys == pytest.approx(counted, rel=0.0 if pattern == "local" else 0.1)


def test_an_overlap_is_drawn_over_the_keys_of_each_sequence() -> None:
    changed = {"seq_len_q": 3, "topk": 40, "inputs": "overlap=0.5"}
    _, shape, inputs = make("sparse_decode", "spread", **changed)
    listed = 0
    for slots in inputs.topk_slots:
        sets = [set(row) for row in slots.tolist()]
        listed += len(set.union(*sets))
        assert all(len(a & b) == 20 for a, b in itertools.pairwise(sets))
    assert shape.listed_keys == listed
    assert int(inputs.topk_slots.max()) > 64 * sum(shape.pages[:-1])
    with pytest.raises(Unsupported, match="need a first query that sees 60 keys, it sees 11"):
        make("sparse_decode", "one-long", **changed)


@pytest.mark.parametrize("kind", RAGGED)
def test_slots_are_pages_of_their_own_sequence(kind: str) -> None:
    operator, _, inputs = make("page_slots", kind)
    owner = {int(p): b for b, row in enumerate(inputs.block_table) for p in row if p >= 0}
    assert len(owner) == sum(pages_of(lens_of(kind), 64))
    slots = operator.reference(inputs).topk_slots
    for b, length in enumerate(lens_of(kind)):
        for row, positions in zip(slots[b].tolist(), inputs.topk_indices[b].tolist(), strict=True):
            used = [slot for slot in row if slot >= 0]
            assert len(used) == min(length, TOPK)
            assert {owner[slot // 64] for slot in used} == {b}
            assert all((s < 0) == (t < 0) for s, t in zip(row, positions, strict=True))


@pytest.mark.parametrize("op", ["paged_indexer", "dsa"])
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("wild", [-(2**31), 2**31 - 1])
def test_what_stands_behind_the_last_page_is_not_read(op: str, kind: str, wild: int) -> None:
    """Any entry of the table; and NaN in the keys behind the end of each sequence."""
    operator, _, inputs = make(op, kind)
    expected = operator.reference(inputs)
    assert (inputs.block_table[inputs.block_table < 0] == -1).all()
    table = inputs.block_table.masked_fill(inputs.block_table < 0, wild)
    spoiled = {"index_cache": inputs.index_cache.clone()}
    if op == "dsa":
        spoiled["kv_cache"] = inputs.kv_cache.clone()
    for row, length in zip(inputs.block_table, lens_of(kind), strict=True):
        page, used = int(row[(length - 1) // 64]), (length - 1) % 64 + 1
        spoiled["index_cache"][page, 128 * used : 128 * 64] = 0xFF
        if op == "dsa":
            spoiled["kv_cache"][page, used:] = 0xFF
    found = operator.reference(replace(inputs, block_table=table, **spoiled))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    if op == "dsa":
        figures = operator.figures(replace(inputs, block_table=table), found)["dense_error"]
        assert 0.5 < figures["recall"] <= 1.0 and 0.1 < figures["mass_kept"] <= 1.0


@pytest.mark.parametrize("op", ["dense_attention", "dense_attention_fp8"])
@pytest.mark.parametrize("kind", RAGGED)
def test_dense_attention_is_that_of_each_sequence_alone(op: str, kind: str) -> None:
    """Keys cut out by hand; NaN in all rows behind the ends."""
    operator, _, inputs = make(op, kind)
    spoiled, first, own = inputs.kv.clone(), 0, []
    for length in lens_of(kind):
        own.append(inputs.kv.flatten(0, 1)[first : first + length])
        room = -length % 64
        spoiled.flatten(0, 1).view(torch.uint8)[first + length : first + length + room] = 0xFF
        first += length + room
    assert first == 64 * len(inputs.kv)
    whole = operator.reference(replace(inputs, kv=spoiled))
    for b, kv in enumerate(own):
        alone = replace(inputs, q=inputs.q[b : b + 1], kv=kv[None], pages=None)
        out, lse = operator.reference(alone)
        torch.testing.assert_close(out[0], whole.out[b], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(lse[0], whole.lse[b], rtol=2e-5, atol=2e-6)


def test_exact_vectors_are_those_of_the_own_length() -> None:
    _, _, inputs = make("dsa", "spread", precision="bf16")
    vectors = list(inputs.exact(torch.arange(BATCH)))
    for b, length in enumerate(lens_of("spread")):
        pages = inputs.block_table[b, : -(-length // 64)].long()
        keys, _ = unpack_index_pages(inputs.index_cache[pages], 64)
        assert torch.equal(keys.flatten(0, 1), vectors[b].k.bfloat16().float())


@pytest.mark.parametrize("op", HAVE_LENGTHS)
@pytest.mark.parametrize("kind", LENGTH_KINDS)
def test_memory_is_what_the_tensors_take(op: str, kind: str) -> None:
    operator, shape, inputs = make(op, kind)
    memory = operator.memory(shape)
    if op == "dsa":
        # block table, lengths, starts of rows: the sum over stages has no place for the last
        assert memory.input_bytes == held_bytes(inputs) - inputs.no_start.nbytes
        return
    assert memory.input_bytes == held_bytes(inputs)
    outputs = operator.reference(inputs)
    element = {"out": 2}
    assert memory.output_bytes == sum(
        x.numel() * element.get(name, 4)
        for name, x in zip(outputs._fields, outputs, strict=True)
        if x is not None
    )


@pytest.mark.parametrize("kind", RAGGED)
def test_costs_are_those_of_the_sequences_one_by_one(kind: str) -> None:
    for op in HAVE_LENGTHS:
        operator, shape, _ = make(op, kind)
        whole = operator.cost(shape)
        parts = []
        for length in lens_of(kind):
            one = {"batch_size": 1, "seq_len_kv": length}
            if "topk" in operator.axes:
                one["topk"] = min(TOPK, length)
            case = case_of(op, "equal", **one)
            parts.append(operator.cost(operator.shape(case, PRESETS[case.preset])))
        missing = QUERIES * sum(max(0, TOPK - n) for n in lens_of(kind))
        lists = {"sparse_decode": (1, 0), "topk": (0, 1), "page_slots": (1, 1), "dsa": (2, 2)}
        read, written = lists.get(op, (0, 0))
        scales = 4.0 * 2 * (BATCH - 1) if op == "dense_attention_fp8" else 0.0
        assert whole.flops == pytest.approx(sum(p.flops for p in parts))
        expected = sum(p.bytes_read for p in parts) + 4 * missing * read - scales
        assert whole.bytes_read == pytest.approx(expected), op
        expected = sum(p.bytes_written for p in parts) + 4 * missing * written
        assert whole.bytes_written == pytest.approx(expected), op


def test_a_long_sequence_among_short_ones_costs_little_more_than_itself() -> None:
    """At batch 128 and 128K: 651,264 keys instead of 16,777,216."""
    changed = {"batch_size": 128, "seq_len_kv": 131072, "seq_len_q": 1, "preset": "v3.2"}
    for op in ("dense_attention", "paged_indexer"):
        operator = registry.operator(op)
        ragged, equal = (
            operator.shape(case_of(op, kind, **changed), PRESETS["v3.2"])
            for kind in ("one-long", "equal")
        )
        assert ragged.pairs == 131072 + 127 * 4096 == 651_264
        assert equal.pairs == 128 * 131072
        share = operator.memory(ragged).input_bytes / operator.memory(equal).input_bytes
        assert share == pytest.approx(651_264 / equal.pairs, rel=0.05)


@pytest.mark.parametrize("op", HAVE_LENGTHS)
def test_the_longest_sequence_is_in_every_sample(op: str) -> None:
    """A batch of 128 has more rows than the gate looks at."""
    operator = registry.operator(op)
    for kind in LENGTH_KINDS:
        case = case_of(op, kind, batch_size=128, seq_len_kv=4096)
        place = decode_lengths(case).index(4096)
        found = operator.always_checked(operator.shape(case, PRESETS["v3.2-cpu"]))
        rows = (2 * place, 2 * place + 1) if op == "topk" else (place,)
        assert found == (() if kind == "equal" else rows)
    if "prefill" in operator.phases:
        case = case_of(op, "equal", phase="prefill", batch_size=1)
        assert operator.always_checked(operator.shape(case, PRESETS["v3.2-cpu"])) == ()


def test_shapes_say_what_their_lengths_are() -> None:
    for op in set(HAVE_LENGTHS) - {"topk"}:
        _, shape, _ = make(op, "spread")
        assert "lengths" in {field.name for field in fields(shape)} and shape.lengths == "spread"


@pytest.mark.interpret
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize("op", ["paged_indexer", "page_slots", "sparse_decode"])
def test_triton_interpreted(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.pretend_gpu(monkeypatch, 9)
    _, _, inputs = make(op, kind)
    with hostile.poisoned_outputs():
        outputs = registry.implementation(op, "triton").run(inputs)
    hostile.assert_right(op, inputs, outputs)


ON_GPU = [
    pytest.param(op, name, kind, seq_len_q, id=f"{op}-{name}-{kind}-q{seq_len_q}")
    for op in ("paged_indexer", "topk", "page_slots", "sparse_decode")
    for name in hostile.names(op)
    for kind in RAGGED
    for seq_len_q in (1, 3)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name", "kind", "seq_len_q"), ON_GPU)
def test_on_a_gpu(op: str, name: str, kind: str, seq_len_q: int) -> None:
    """At 40,000 keys the short ones of `one-long` have 1250, fewer than topk."""
    case = case_of(
        op, kind, batch_size=33, seq_len_kv=40_000, seq_len_q=seq_len_q, num_heads=128,
        preset="v3.2", topk=2048 if "topk" in registry.operator(op).axes else None,
    )  # fmt: skip
    shape = registry.operator(op).shape(case, PRESETS["v3.2"])
    hostile.assert_implementation(op, name, shape, hostile.plain)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("kind", RAGGED)
@pytest.mark.parametrize(("seq_len_q", "batch_size"), [(1, 33), (3, 5)])
def test_dsa_on_a_gpu(kind: str, precision: str, seq_len_q: int, batch_size: int) -> None:
    on_gpu("decode", precision, 40_000, seq_len_q, batch_size, lengths=kind)
