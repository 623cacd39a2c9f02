"""Inputs by kind of content and from files, and the recall that rests on what was quantised."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dsa_bench.kernels import dsa_figures, indexer, paged_indexer
from dsa_bench.kernels.dsa import OPERATOR
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import INPUT_KINDS, Case
from tests import hostile
from tests.dsa_cases import INF, decode_shape, in_bf16, make_inputs, prefill_shape


def exact_index_logits(inputs, rows):
    """Of each query of these rows over all keys, from what was never quantised."""
    return [
        torch.stack([
            dsa_figures.exact_scores(type(v)(v.q[j], v.weights[j], v.k)) for j in range(len(v.q))
        ])
        for v in inputs.exact(rows)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_exact_vectors_are_those_that_were_quantised(precision, kind):
    """Made again for two rows, they score as the indexer's own inputs do, to its rounding."""
    rows, error = torch.tensor([4, 1]), 0.06 if precision == "fp8" else 0.01
    inputs = make_inputs(prefill_shape(precision=precision, inputs=kind), seed=3)
    logits = indexer.reference(inputs.indexer_inputs(slice(None)), rows=rows).index_logits
    for exact, actual in zip(exact_index_logits(inputs, rows), logits, strict=True):
        seen = actual.isfinite()
        difference = (exact[0] - actual)[seen].norm() / actual[seen].norm()
        assert 0 < difference < error
    rows = torch.tensor([2, 0])
    inputs = make_inputs(decode_shape(precision=precision, inputs=kind), seed=3)
    logits = paged_indexer.reference(inputs.indexer_inputs(), rows=rows).index_logits
    for exact, actual in zip(exact_index_logits(inputs, rows), logits, strict=True):
        seen = actual.isfinite()
        difference = (exact[:, : actual.shape[1]] - actual)[seen].norm() / actual[seen].norm()
        assert 0 < difference < error


def test_recall_counts_the_exact_best():
    inputs = make_inputs(prefill_shape(seq_len_kv=400, topk=40), seed=5)
    outputs = OPERATOR.reference(inputs)
    rows = torch.tensor([5, 2])
    exact = torch.cat(exact_index_logits(inputs, torch.arange(6)))
    hidden = torch.arange(400) >= inputs.kv_end[:, None]
    best = exact.masked_fill(hidden, -INF).topk(40).indices.to(torch.int32)

    def recall(indices, rows=None):
        chosen = outputs._replace(topk_indices=indices)
        return OPERATOR.figures(inputs, chosen, rows=rows)["dense_error"]["recall"]

    assert recall(best) == recall(best, rows) == 1.0
    halved = best.clone()
    halved[:, :20] = -1
    assert recall(halved) == pytest.approx(0.5)
    halved[2] = best[2]
    assert recall(halved, rows) == pytest.approx(0.75)
    assert 0.9 < recall(outputs.topk_indices) < 1.0
    assert recall(torch.full_like(best, -1)) == 0.0


def test_recall_where_fewer_keys_are_seen_than_selected():
    inputs = make_inputs(prefill_shape(seq_len_q=8, seq_len_kv=8, topk=8))
    outputs = OPERATOR.reference(inputs)
    assert OPERATOR.figures(inputs, outputs)["dense_error"]["recall"] == 1.0
    unknown = replace(inputs, exact=None)
    assert "recall" not in OPERATOR.figures(unknown, outputs)["dense_error"]


def test_recall_of_decode_in_fp8_is_below_that_of_bf16():
    found = {}
    for precision in ("fp8", "bf16"):
        shape = decode_shape(seq_len_kv=2000, topk=200, precision=precision)
        inputs = make_inputs(shape, seed=2)
        figures = OPERATOR.figures(inputs, OPERATOR.reference(inputs), rows=torch.tensor([2, 0]))
        found[precision] = figures["dense_error"]["recall"]
    assert 0.9 < found["fp8"] < found["bf16"] <= 1.0


@pytest.mark.parametrize("kind", ["needle", "local", "heavy"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_content_with_a_pattern_keeps_more_of_the_mass(phase, kind):
    """Positions go on from page to page though pages are permuted."""
    make = prefill_shape if phase == "prefill" else decode_shape
    shape = make(seq_len_kv=1000, topk=50)
    kept = {}
    for each in ("random", kind):
        inputs = make_inputs(replace(shape, inputs=each), seed=1)
        outputs = OPERATOR.reference(inputs)
        assert hostile.passes(OPERATOR.check(inputs, in_bf16(outputs)))
        kept[each] = OPERATOR.figures(inputs, outputs)["dense_error"]["mass_kept"]
        if each == "local":
            last = outputs.topk_indices.flatten(0, -2)[-1]
            assert (last > 800).float().mean() > 0.5
    assert kept[kind] > 0.91 > kept["random"]


def test_sequences_and_seeds_share_no_content():
    shape = decode_shape(precision="bf16")
    keys = []
    for seed in (0, 1):
        inputs = make_inputs(shape, seed=seed)
        keys += [v.k for v in inputs.exact(torch.arange(3))]
    for i, k in enumerate(keys):
        for other in keys[:i]:
            assert (k == other).float().mean() < 0.01
    page = make_inputs(shape, seed=0)
    first = page.index_cache[page.block_table[1, 0].long()].view(-1, 128)
    assert torch.equal(first, keys[1][: len(first)].bfloat16())


def captured(path, seq_len_q=6, seq_len_kv=40, **changed):
    """A file of what prefill_shape() asks for; in bf16 but for the weights."""
    g = torch.Generator().manual_seed(7)
    sizes = {"index_q": (seq_len_q, 4, 128), "index_k": (seq_len_kv, 128),
             "q": (seq_len_q, 2, 576), "kv": (seq_len_kv, 576)}  # fmt: skip
    tensors = {name: torch.randn(size, generator=g).bfloat16() for name, size in sizes.items()}
    tensors["index_weights"] = torch.rand(seq_len_q, 4, generator=g)
    tensors |= changed
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    return tensors


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_captured_inputs(tmp_path, precision):
    path = str(tmp_path / "chunk.safetensors")
    tensors = captured(path)
    shape = prefill_shape(precision=precision, inputs=path)
    inputs, other = make_inputs(shape, seed=0), make_inputs(shape, seed=1)
    assert torch.equal(inputs.kv, tensors["kv"])
    for given in (inputs, other):
        heads = [[torch.equal(given.q[:, i], tensors["q"][:, j]) for j in range(2)]
                 for i in range(2)]  # fmt: skip
        assert sorted(row.index(True) for row in heads) == [0, 1]
    scores = (tensors["index_q"].float() @ tensors["index_k"].float().T).clamp(min=0)
    expected = (tensors["index_weights"][:, :, None] * scores).sum(1)
    logits = indexer.reference(inputs.indexer_inputs(slice(None))).index_logits
    seen = logits.isfinite()
    error = (logits - expected)[seen].norm() / expected[seen].norm()
    assert error < (0.06 if precision == "fp8" else 1e-5)
    exact = torch.cat(exact_index_logits(inputs, torch.arange(6)))
    torch.testing.assert_close(exact, expected)
    outputs, another = OPERATOR.reference(inputs), OPERATOR.reference(other)
    assert hostile.passes(OPERATOR.check(inputs, in_bf16(outputs)))
    assert torch.equal(outputs.topk_indices.sort().values, another.topk_indices.sort().values)
    assert OPERATOR.figures(inputs, outputs)["dense_error"]["recall"] > 0.8


def test_another_seed_gives_captured_heads_another_order(tmp_path):
    path = str(tmp_path / "chunk.safetensors")
    captured(path)
    made = [make_inputs(prefill_shape(inputs=path), seed=seed) for seed in range(8)]
    assert len({tuple(inputs.q[0, :, 0].tolist()) for inputs in made}) == 2


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"kv": None}, "has no tensor kv"),
        ({"kv": torch.zeros(41, 576)}, r"kv must be \[40, 576\] as the case asks, got \[41, 576\]"),
        ({"index_q": torch.zeros(6, 8, 128)}, r"index_q must be \[6, 4, 128\].*got \[6, 8, 128\]"),
        ({"q": torch.zeros(6, 2, 576, dtype=torch.int16)}, "q must be one of F16, .*, got I16"),
    ],
    ids=["missing", "longer", "heads", "integers"],
)
def test_captured_inputs_of_another_case(tmp_path, changed, sentence):
    path = str(tmp_path / "chunk.safetensors")
    captured(path, **changed)
    with pytest.raises(Unsupported, match=sentence) as caught:
        prefill_shape(inputs=path)
    assert "\n" not in str(caught.value)


def test_captured_inputs_that_cannot_be_read(tmp_path):
    path = tmp_path / "chunk.safetensors"
    with pytest.raises(Unsupported, match="there is no file"):
        prefill_shape(inputs=str(path))
    path.write_bytes(b"not a header")
    with pytest.raises(Unsupported, match=r"no \.safetensors file that can be read"):
        prefill_shape(inputs=str(path))
    captured(path, kv=torch.full((40, 576), float("nan")))
    with pytest.raises(Unsupported, match="kv must be finite"):
        make_inputs(prefill_shape(inputs=str(path)))
    with pytest.raises(Unsupported, match="captured inputs are a chunk of prefill"):
        decode_shape(inputs=str(path))
    with pytest.raises(Unsupported, match="unknown inputs 'neddle'; known: random, needle"):
        decode_shape(inputs="neddle")


def test_a_case_carries_its_inputs():
    case = Case(op="dsa", impl="reference", phase="prefill", seq_len_kv=4096, seq_len_q=64,
                topk=512, inputs="needle")  # fmt: skip
    assert OPERATOR.shape(case, PRESETS["v3.2"]).inputs == "needle"
    assert "inputs" in OPERATOR.axes
