"""Lists of keys by pattern: what they hold, what they share, what cost and gate make of them."""

import pytest
import torch

from dsa_bench.kernels import index_patterns, sparse_decode, sparse_prefill
from dsa_bench.kernels.index_patterns import make_indices
from dsa_bench.kernels.sparse_decode import SparseDecodeShape
from dsa_bench.kernels.sparse_prefill import SparsePrefillShape
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case, overlap_of

PATTERNS = ["random", "local", "overlap=0", "overlap=0.5", "overlap=0.9", "overlap=1"]


def made(pattern, *, first, rows, topk, seed=0):
    g = torch.Generator().manual_seed(seed)
    num_visible = torch.arange(first, first + rows)
    return make_indices(pattern, num_visible, first + rows - 1, topk, g)


def lists_of(indices):
    return [[n for n in row if n >= 0] for row in indices.tolist()]


def shared(indices, distance=1):
    """Share of a list that stands in the one so many before it; all lists are full."""
    sets = [set(row) for row in lists_of(indices)]
    width = indices.shape[1]
    return [len(a & b) / width for a, b in zip(sets, sets[distance:], strict=False)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("first", "rows", "topk"), [(300, 20, 64), (64, 30, 64), (90, 1, 7)])
def test_lists_hold_different_keys_that_the_query_sees(pattern, first, rows, topk):
    indices = made(pattern, first=first, rows=rows, topk=topk)
    assert indices.dtype == torch.int32 and indices.shape == (rows, topk)
    for i, keys in enumerate(lists_of(indices)):
        assert len(keys) == len(set(keys)) == topk
        assert max(keys) < first + i
    again, other = (made(pattern, first=first, rows=rows, topk=topk, seed=s) for s in (0, 1))
    assert torch.equal(indices, again) and not torch.equal(indices, other)


@pytest.mark.parametrize("pattern", ["random", "local"])
def test_short_lists_end_in_no_key(pattern):
    indices = made(pattern, first=1, rows=40, topk=25)
    for i, row in enumerate(indices.tolist()):
        count = min(i + 1, 25)
        assert all(n >= 0 for n in row[:count]) and row[count:] == [-1] * (25 - count)
        if i < 25:
            assert sorted(row[:count]) == list(range(i + 1))


def test_local_is_the_sinks_and_the_latest():
    for i, keys in enumerate(lists_of(made("local", first=200, rows=9, topk=50))):
        assert sorted(keys) == [0, 1, 2, 3, *range(200 + i - 46, 200 + i)]
        assert keys != sorted(keys)


@pytest.mark.parametrize("drawn_at_once", [2**25, 600])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_list_shares_what_was_asked_with_the_one_before(overlap, drawn_at_once, monkeypatch):
    monkeypatch.setattr(index_patterns, "DRAWN_AT_ONCE", drawn_at_once)  # 600: of three lists
    # so many keys that the windows do not come round
    indices = made(f"overlap={overlap}", first=20 * 200 + 200, rows=20, topk=200)
    assert shared(indices) == pytest.approx([overlap] * 19)
    further = max(0.0, 1 - 3 * (1 - overlap))
    assert shared(indices, distance=3) == pytest.approx([further] * 17)


def test_windows_come_round_where_keys_are_few():
    indices = made("overlap=0.5", first=100, rows=40, topk=64)
    assert {n for row in lists_of(indices) for n in row} == set(range(100))
    assert shared(indices) == pytest.approx([0.5] * 39)
    # windows of 64 in a circle of 100 that stand 64 apart meet at the far end
    assert shared(indices, distance=2) == pytest.approx([28 / 64] * 38)


@pytest.mark.parametrize("pattern", ["local", "overlap=0.5", "overlap=0.75", "overlap=1"])
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv", "topk"), [(20, 900, 64), (50, 200, 40), (20, 300, 4), (7, 60, 2)]
)
def test_listed_keys_are_counted(pattern, seq_len_q, seq_len_kv, topk):
    shape = SparsePrefillShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, topk=topk, num_heads=2, inputs=pattern
    )
    inputs = sparse_prefill.make_inputs(shape, seed=0, device="cpu")
    keys = {n for row in lists_of(inputs.topk_indices) for n in row}
    assert len(keys) == shape.listed_keys
    assert sum(len(row) for row in lists_of(inputs.topk_indices)) == shape.pairs
    by_hand = 2 * (seq_len_q * 2 * 576 + len(keys) * 576) + 4 * seq_len_q * topk
    assert sparse_prefill.cost(shape).bytes_read == by_hand


@pytest.mark.parametrize("pattern", ["local", "overlap=0.5"])
def test_decode_lists_rows_of_its_own_sequence(pattern):
    shape = SparseDecodeShape(
        batch_size=3, seq_len_kv=130, topk=32, seq_len_q=4, num_heads=2, inputs=pattern
    )
    inputs = sparse_decode.make_inputs(shape, seed=0, device="cpu")
    of_sequence = shape.pages[0] * shape.page_size
    listed = 0
    for b, slots in enumerate(inputs.topk_slots):
        positions = slots - b * of_sequence
        assert positions.min() >= 0 and positions.max() < 130
        listed += len(positions.unique())
    assert listed == shape.listed_keys
    found = sparse_decode.reference(inputs)
    assert all(c.passed for c in sparse_decode.check(inputs, found))


def test_what_is_no_pattern_is_refused_in_a_sentence():
    case = Case(op="sparse_prefill", impl="triton", phase="prefill", seq_len_kv=4096,
                seq_len_q=4096, topk=64)  # fmt: skip
    for inputs, why in [
        ("needle", "keys are listed as random, local or overlap=R, not as 'needle'"),
        ("overlap=2", "not as 'overlap=2'"),
        ("overlap=0.5", "need a first query that sees 96 keys, it sees 1 (pass a longer -L"),
    ]:
        fields = {**case.to_json(), "inputs": inputs}
        with pytest.raises(Unsupported, match=why.replace("(", r"\(")):
            sparse_prefill.shape_of(Case.from_json(fields), PRESETS["v3.2"])
    with pytest.raises(Unsupported, match="not as 'heavy'"):
        SparseDecodeShape(batch_size=1, seq_len_kv=100, topk=8, inputs="heavy")
    # the query before would be another sequence's
    with pytest.raises(Unsupported, match="need two queries of a sequence"):
        SparseDecodeShape(batch_size=4, seq_len_kv=100, topk=8, inputs="overlap=0.9")
    # the window would come round into itself and share more
    with pytest.raises(Unsupported, match="sees 2049 keys, it sees 2048"):
        SparsePrefillShape(seq_len_q=2, seq_len_kv=2049, topk=2048, inputs="overlap=0.9995")


def test_overlap_is_a_share():
    assert overlap_of("overlap=0.25") == 0.25 and overlap_of("overlap=1") == 1.0
    for text in ("overlap=", "overlap=x", "overlap=-0.1", "overlap=1.01", "overlap=nan", "local"):
        assert overlap_of(text) is None
