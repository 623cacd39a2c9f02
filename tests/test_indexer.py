"""Lightning indexer: the reference, its check, and every implementation of it."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import indexer, indexer_triton
from dsa_bench.kernels.indexer import OPERATOR, IndexerOutputs, IndexerShape
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

INF, NAN = float("inf"), float("nan")
H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
CPU = Machine(device="cpu", name="a CPU")
PRECISIONS = ("fp8", "bf16")


def shape_of(seq_len_q, seq_len_kv, precision="fp8", index_heads=64):
    return IndexerShape(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, index_heads=index_heads, precision=precision
    )


def small(precision="fp8", seed=0):
    return OPERATOR.make_inputs(shape_of(5, 12, precision, 8), seed=seed, device="cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutate", [hostile.plain, hostile.indexer_ragged, hostile.indexer_silent])
def test_reference_matches_loops(precision, mutate):
    inputs = mutate(small(precision))
    q, k, w = (x.double() for x in (inputs.index_q, inputs.index_k, inputs.index_weights))
    actual = OPERATOR.reference(inputs).index_logits
    for i in range(5):
        for n in range(12):
            if not int(inputs.kv_start[i]) <= n < int(inputs.kv_end[i]):
                assert actual[i, n] == -INF
                continue
            heads = [float(w[i, h]) * max(0.0, float(q[i, h] @ k[n])) for h in range(8)]
            expected = float(inputs.index_k_scale[n]) * sum(heads)
            assert actual[i, n].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_query_sees_its_own_key_and_no_later_one():
    logits = OPERATOR.reference(small()).index_logits
    for i in range(5):  # positions 7 … 11
        assert logits[i, : 7 + i + 1].isfinite().all()
        assert (logits[i, 7 + i + 1 :] == -INF).all()


def test_empty_ranges_give_rows_of_minus_infinity():
    inputs = small()
    start = torch.tensor([0, 5, 7, 12, 3], dtype=torch.int32)
    end = torch.tensor([0, 5, 2, 12, 4], dtype=torch.int32)
    logits = OPERATOR.reference(replace(inputs, kv_start=start, kv_end=end)).index_logits
    assert logits.isfinite().sum(1).tolist() == [0, 0, 0, 0, 1]


def test_fp8_stays_near_the_unquantised_formula():
    """DeepGEMM's measure for it: 1 - 2 Σ xy / Σ (x² + y²) below 1e-3."""
    shape = shape_of(16, 64)
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(16, 64, 128, generator=g), torch.randn(64, 128, generator=g)
    w = torch.randn(16, 64, generator=g) * indexer.weight_scale(shape)
    exact = indexer.weighted_relu_scores(q, k, w)
    (q8, q_scale), (k8, k_scale) = (indexer.make_index_vectors(x, "fp8") for x in (q, k))
    quantised = indexer.weighted_relu_scores(q8, k8, w * q_scale) * k_scale
    difference = 1 - 2 * (exact * quantised).sum() / (exact**2 + quantised**2).sum()
    assert 1e-5 < difference < 1e-3


def test_negative_weights_give_negative_logits():
    inputs = small()
    logits = OPERATOR.reference(replace(inputs, index_weights=-inputs.index_weights.abs()))
    assert (logits.index_logits[:, :8] < 0).all()


def test_reference_of_some_rows_in_small_chunks(monkeypatch):
    inputs = hostile.indexer_ragged(small())
    whole = OPERATOR.reference(inputs).index_logits
    monkeypatch.setattr(indexer, "REFERENCE_CHUNK_ELEMENTS", 1)
    rows = torch.tensor([4, 0])
    assert torch.allclose(OPERATOR.reference(inputs, rows=rows).index_logits, whole[rows])


def _earlier_end(inputs, right):
    return OPERATOR.reference(replace(inputs, kv_end=inputs.kv_end - 1)).index_logits


def _without_relu(inputs, right):
    scores = torch.einsum("qhd,nd->qhn", inputs.index_q.float(), inputs.index_k.float())
    return torch.einsum("qhn,qh->qn", scores, inputs.index_weights) * inputs.index_k_scale


def _without_scale(inputs, right):
    scale = torch.ones_like(inputs.index_k_scale)
    return OPERATOR.reference(replace(inputs, index_k_scale=scale)).index_logits


def _one_wrong(value):
    def change(inputs, right):
        right[4, 11] += value
        return right

    return change


WRONG = {
    "zeros": lambda inputs, right: torch.zeros_like(right),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)).index_logits,
    "diagonal-missing": _earlier_end,
    "columns-shifted": lambda inputs, right: right.roll(1, 1),
    "queries-swapped": lambda inputs, right: right.flip(0),
    "no-relu": _without_relu,
    "no-key-scale": _without_scale,
    "one-wrong": _one_wrong(0.1),
    "one-nan": _one_wrong(NAN),
    "one-infinite": _one_wrong(-INF),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs).index_logits
    assert hostile.passes(OPERATOR.check(inputs, IndexerOutputs(right)))
    wrong = WRONG[name](inputs, right.clone())
    assert not hostile.passes(OPERATOR.check(inputs, IndexerOutputs(wrong)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_budget_sees_a_row_that_the_tolerance_lets_through(precision):
    inputs = OPERATOR.make_inputs(shape_of(16, 1000, precision), seed=4, device="cpu")
    right = OPERATOR.reference(inputs).index_logits
    # fp8 products that keep 13 bits are off by this much
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(5)) * 2e-4 + 1
    assert hostile.passes(OPERATOR.check(inputs, IndexerOutputs(right * noise)))
    right[right.nan_to_num(neginf=0.0).norm(dim=1).argmax()] *= 1.0075
    fixed, budget = OPERATOR.check(inputs, IndexerOutputs(right))
    assert fixed.passed
    assert not budget.passed
    assert budget.figures["worst_vector"] == pytest.approx(0.0075, rel=1e-3)


def test_plain_rounds_everything_but_quantised_values(monkeypatch):
    inputs = hostile.indexer_ragged(small())
    exact, plain = OPERATOR.reference(inputs).index_logits, indexer.plain(inputs).index_logits
    seen = exact.isfinite()
    error = (plain - exact)[seen].norm() / exact[seen].norm()
    assert 5e-4 < error < 1e-2
    rows = torch.tensor([4, 0])
    monkeypatch.setattr(indexer, "REFERENCE_CHUNK_ELEMENTS", 1)
    some = indexer.plain(inputs, rows=rows).index_logits
    torch.testing.assert_close(some[seen[rows]], plain[rows][seen[rows]], rtol=2e-2, atol=1e-3)
    whole = replace(inputs, index_weights=torch.ones_like(inputs.index_weights))
    one = replace(whole, index_q=whole.index_q[:, :1], index_weights=whole.index_weights[:, :1])
    exact, plain = OPERATOR.reference(one).index_logits, indexer.plain(one).index_logits
    assert ((plain - exact).abs() <= exact.abs() / 256)[seen].all()  # one head: one rounding


def test_check_ignores_columns_outside_of_the_range():
    inputs = hostile.indexer_ragged(small())
    right = OPERATOR.reference(inputs).index_logits
    garbage = torch.where(right == -INF, torch.tensor([NAN, 7.0]).repeat(6), right)
    assert hostile.passes(OPERATOR.check(inputs, IndexerOutputs(garbage)))
    rows = torch.tensor([0])
    garbage[1:] = 5
    assert hostile.passes(OPERATOR.check(inputs, IndexerOutputs(garbage), rows=rows))


@pytest.mark.parametrize(("precision", "element"), [("fp8", 1), ("bf16", 2)])
def test_cost_counted_by_hand(precision, element):
    shape = shape_of(3, 5, precision, index_heads=8)  # they see 3, 4, 5 keys
    cost = OPERATOR.cost(shape)
    assert shape.pairs == 12
    assert cost.flops == 2 * 8 * 128 * 12
    assert cost.bytes_read == 3 * 8 * (128 * element + 4) + 5 * (128 * element + 4)
    assert cost.bytes_written == 4 * 12


def test_flops_and_bytes_of_v32():
    whole = shape_of(16384, 16384)
    cost = OPERATOR.cost(whole)
    assert cost.flops == 16_384 * 16384 * 16385 // 2  # 2.199 TFLOP
    assert cost.bytes_read == pytest.approx(140.6e6, rel=1e-3)
    assert cost.bytes_written == pytest.approx(0.537e9, rel=1e-3)
    assert indexer.weight_scale(whole) == pytest.approx(0.0110485, abs=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_what_the_tensors_take(precision):
    shape = shape_of(5, 12, precision, 8)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == sum(getattr(inputs, name).nbytes for name in inputs.__slots__)
    assert memory.output_bytes == OPERATOR.reference(inputs).index_logits.nbytes


@pytest.mark.parametrize("sizes", [(0, 5), (6, 5)])
def test_a_chunk_that_makes_no_sense(sizes):
    case = Case(
        op="indexer", impl="reference", phase="prefill", seq_len_q=sizes[0], seq_len_kv=sizes[1]
    )
    with pytest.raises(Unsupported, match=f"seq_len_q {sizes[0]} must be 1 … seq_len_kv 5"):
        OPERATOR.shape(case, PRESETS["v3.2"])


MISTAKES = [
    ("index_q", lambda x: x.float(), TypeError, "index_q must be float8_e4m3fn or bfloat16"),
    ("index_q", lambda x: x[0], ValueError, "index_q must be float8_e4m3fn or bfloat16 .seq_len_q"),
    ("index_q", lambda x: x[:, :5].contiguous(), ValueError, "index_weights must be float32"),
    ("index_k", lambda x: x.bfloat16(), TypeError, "index_k must be float8_e4m3fn"),
    ("index_k", lambda x: x[:, :64], ValueError, "index_k must be float8_e4m3fn .*index_dim=128"),
    ("index_k", lambda x: x[::2], ValueError, "index_k_scale must be float32 .seq_len_kv=6"),
    ("index_k_scale", lambda x: x[:-1], ValueError, "index_k_scale must be float32 .seq_len_kv=12"),
    ("index_weights", lambda x: x.bfloat16(), TypeError, "index_weights must be float32"),
    ("kv_start", lambda x: x.long(), TypeError, "kv_start must be int32 .seq_len_q=5"),
    ("kv_end", lambda x: x[1:], ValueError, "kv_end must be int32 .seq_len_q=5"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_triton_refuses(name, change, kind, sentence):
    inputs = small()
    with pytest.raises(kind, match=sentence):
        indexer_triton.run(replace(inputs, **{name: change(getattr(inputs, name))}))


def test_triton_refuses_gaps_and_odd_head_counts():
    inputs = small("bf16")
    gaps = inputs.index_q.repeat(2, 1, 1)[::2]
    with pytest.raises(ValueError, match="index_q must be contiguous, got strides"):
        indexer_triton.run(replace(inputs, index_q=gaps))
    six = OPERATOR.make_inputs(shape_of(5, 12, "bf16", 6), seed=0, device="cpu")
    with pytest.raises(ValueError, match="must be powers of two, got 6 and 128"):
        indexer_triton.run(six)


@pytest.mark.parametrize(
    ("machine", "precision", "heads", "sentence"),
    [
        (H100, "fp8", 64, None),
        (A100, "bf16", 64, None),
        (A100, "fp8", 64, "in fp8 needs sm_89 or newer, this is A100"),
        (CPU, "bf16", 64, "in bf16 needs sm_80 or newer, this is a CPU"),
        (H100, "fp8", 48, "a power of two of 8 or more heads, this case has 48"),
        (H100, "fp8", 4, "a power of two of 8 or more heads, this case has 4"),
    ],
)
def test_triton_supports_says_why_not(machine, precision, heads, sentence):
    reason = indexer_triton.supports(shape_of(64, 128, precision, heads), machine)
    assert reason is None if sentence is None else sentence in reason


def test_keys_are_divided_only_where_queries_do_not_fill_the_gpu():
    def config(num_queries, num_keys, heads=64):
        return indexer_triton.choose_config(num_queries, num_keys, heads, "fp8", 132)

    assert config(4096, 131072).num_spans == 1
    assert config(1, 1000).num_spans == 1
    assert config(1, 131072).num_spans >= 64
    for heads in (8, 16, 32, 64):
        assert config(64, 4096, heads).block_q * heads == 128


INTERPRETED = [
    (1, 1, 64, hostile.plain),
    (5, 300, 64, hostile.indexer_ragged),
    (33, 130, 8, hostile.indexer_ragged),
    (4, 9, 32, hostile.indexer_silent),
]


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("major", [8, 9], ids=["loads", "tma"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("num_queries", "num_keys", "heads", "mutate"), INTERPRETED)
def test_triton_interpreted(num_queries, num_keys, heads, mutate, precision, major, monkeypatch):
    hostile.pretend_gpu(monkeypatch, major)
    shape = shape_of(num_queries, num_keys, precision, heads)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=num_keys, device="cpu"))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("indexer", "triton").run(inputs)
    hostile.assert_right("indexer", inputs, outputs)


SHAPES = [
    shape
    for precision in PRECISIONS
    for shape in (
        shape_of(4096, 8192, precision),
        shape_of(333, 1000, precision),
        shape_of(1, 5000, precision, index_heads=32),
        shape_of(65, 65, precision, index_heads=8),
        shape_of(2, 20000, precision, index_heads=16),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("indexer", SHAPES))
def test_indexer_matches_reference(name, shape, mutate):
    hostile.assert_implementation("indexer", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("name", hostile.names("indexer"))
def test_indexer_writes_logits_beyond_2_31_elements(name):
    shape = shape_of(2**31 // 131072 + 40, 131072)
    implementation = hostile.runnable("indexer", name, shape)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cuda")
    outputs = implementation.run(inputs)
    rows = torch.arange(shape.seq_len_q - 20, shape.seq_len_q, device="cuda")
    hostile.assert_right("indexer", inputs, outputs, rows)
