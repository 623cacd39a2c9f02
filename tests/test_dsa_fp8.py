"""DSA with its attention in fp8: inputs, values by the formulas, check, figures, refusals."""

import dataclasses
import math
import weakref
from dataclasses import replace

import pytest
import torch

from dsa_bench import gate, registry
from dsa_bench.kernels import dsa, dsa_fp8, sparse_prefill_fp8
from dsa_bench.kernels.dsa_fp8 import OPERATOR, DsaFp8Outputs
from dsa_bench.memory_use import held_bytes, tensors_in
from dsa_bench.operator import Implementation, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import INPUT_KINDS, Case
from tests import hostile
from tests.dsa_cases import on_gpu, prefill_shape
from tests.fp8_prefill import online
from tests.sparse_prefill_loops import loops
from tests.test_dsa_inputs import captured
from tests.test_sparse_prefill_fp8 import in_fp64

INF, NAN = float("inf"), float("nan")
V32 = PRESETS["v3.2"]


def make(seed=0, **fields):
    return OPERATOR.make_inputs(prefill_shape(**fields), seed=seed, device="cpu")


def with_kernel(attend=online):
    """The composition with a fp8 kernel in torch for its attention."""
    stages = dsa_fp8.reference_stages()
    stages["sparse_prefill_fp8"] = Implementation(name="torch", run=attend)
    return OPERATOR.compose("prefill", stages)


def listing(inputs, indices):
    """What the right kernel makes of another selection."""
    attended = online(inputs.attend_to(indices))
    return DsaFp8Outputs(attended.out, attended.max_logits, attended.lse, indices)


def index_logits(scores):
    """[queries, keys] in fp64, -inf where not visible: the formula of the indexer, key by key."""
    q, k = scores.index_q.double(), scores.index_k.double() * scores.index_k_scale.double()[:, None]
    logits = torch.full((len(q), len(k)), -INF, dtype=torch.float64)
    for i in range(len(q)):
        for n in range(int(scores.kv_start[i]), int(scores.kv_end[i])):
            products = [max(0.0, float(q[i, h] @ k[n])) for h in range(q.shape[1])]
            logits[i, n] = sum(
                float(w) * p for w, p in zip(scores.index_weights[i], products, strict=True)
            )
    return logits


def best(logits, topk):
    """Positions of the topk largest of each row, as sets."""
    rows = []
    for row in logits.tolist():
        seen = [n for n, value in enumerate(row) if value > -INF]
        rows.append(set(sorted(seen, key=lambda n, row=row: -row[n])[:topk]))
    return rows


def assert_is_dsa_by_the_formulas(inputs, outputs):
    """Selection and attention in fp64 loops over the rounded tensors."""
    chosen = [[n for n in row if n != -1] for row in outputs.topk_indices.tolist()]
    assert [set(row) for row in chosen] == best(index_logits(inputs.scores), inputs.topk)
    assert [len(row) for row in chosen] == [len(set(row)) for row in chosen]
    attention = inputs.attend_to(outputs.topk_indices)
    expected = loops(*in_fp64(attention), attention)
    for name in ("out", "max_logits", "lse"):
        actual, wanted = getattr(outputs, name), getattr(expected, name)
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=4e-6)


SIZES = {"more-than-topk": {}, "fewer-than-topk": {"seq_len_q": 6, "seq_len_kv": 9, "topk": 8},
         "one-key": {"seq_len_q": 1, "seq_len_kv": 1, "topk": 1}}  # fmt: skip


@pytest.mark.parametrize("inputs", INPUT_KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_formulas(size, inputs):
    made = make(**SIZES[size], inputs=inputs)
    assert_is_dsa_by_the_formulas(made, OPERATOR.reference(made))


def ragged(inputs):
    """Ranges that begin anywhere, some of them empty or turned round; NaN in every key that nobody
    sees, of the indexer and of the attention."""
    scores = hostile.indexer_ragged(inputs.scores)
    columns = torch.arange(inputs.scores.index_k.shape[0])
    unseen = ~((columns >= scores.kv_start[:, None]) & (columns < scores.kv_end[:, None])).any(0)
    assert unseen.any()
    keys = {"kv": inputs.attention.kv.clone(), "k_rope": inputs.attention.k_rope.clone()}
    for x in keys.values():
        hostile._fill_nan(x, unseen)
    return replace(inputs, scores=scores, attention=replace(inputs.attention, **keys))


def test_empty_and_short_rows_and_nan_in_keys_that_nobody_sees():
    inputs = ragged(make(seq_len_q=12, seq_len_kv=60, topk=16))
    outputs = OPERATOR.reference(inputs)
    lens = (inputs.scores.kv_end - inputs.scores.kv_start).clamp(min=0)
    assert (lens == 0).any() and (lens > 16).any() and ((lens > 0) & (lens < 16)).any()
    assert_is_dsa_by_the_formulas(inputs, outputs)
    empty = lens == 0
    assert (outputs.out[empty] == 0).all()
    assert (outputs.lse[empty] == INF).all() and (outputs.max_logits[empty] == -INF).all()
    made = with_kernel()(inputs)
    for check in OPERATOR.check(inputs, made):
        assert check.passed, check
        assert all(map(math.isfinite, check.limits.values())), check
    made.out[empty] = made.out[~empty][0]
    assert not hostile.passes(OPERATOR.check(inputs, made))


def test_reference_and_check_of_some_rows():
    inputs, rows = make(), torch.tensor([3, 0, 2])
    whole, some = OPERATOR.reference(inputs), OPERATOR.reference(inputs, rows=rows)
    for one, other in zip(some, whole, strict=True):
        torch.testing.assert_close(one, other[rows], rtol=2e-5, atol=2e-6)
    wrong = with_kernel()(inputs)
    wrong.out[1] += 1
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=rows))
    assert not hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([1])))


def spied_stages():
    """(every stage by its reference, names of those that ran)."""
    ran = []

    def spied(name, part):
        def run(inputs):
            ran.append(name)
            return part.run(inputs)

        return replace(part, run=run)

    return {name: spied(name, part) for name, part in dsa_fp8.reference_stages().items()}, ran


def test_stages_run_in_order_and_once():
    inputs, (stages, ran) = make(), spied_stages()
    outputs = OPERATOR.compose("prefill", stages)(inputs)
    assert tuple(ran) == OPERATOR.stages("prefill")
    assert torch.equal(outputs.out, OPERATOR.reference(inputs).out)


def test_chunks_of_queries_give_what_one_chunk_gives():
    stages, ran = spied_stages()
    chunked = OPERATOR.compose("prefill", stages)(make(workspace_bytes=4 * 64 * 2))
    assert ran == ["indexer", "topk"] * 3 + ["sparse_prefill_fp8"]
    for one, other in zip(OPERATOR.reference(make()), chunked, strict=True):
        torch.testing.assert_close(one, other)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(hostile.bits(one), hostile.bits(other))


def assert_made_of(inputs, plain):
    """The tensors of `dsa`, those of the attention rounded."""
    scores = plain.indexer_inputs(slice(None))
    for field in dataclasses.fields(scores):
        assert same_bits(getattr(inputs.scores, field.name), getattr(scores, field.name))
    nothing = torch.empty(len(plain.q), 0, dtype=torch.int32)
    rounded = sparse_prefill_fp8.quantize(plain.attention_inputs(nothing))
    for field in dataclasses.fields(rounded):
        wanted = getattr(rounded, field.name)
        if torch.is_tensor(wanted):
            assert same_bits(getattr(inputs.attention, field.name), wanted)
    assert (inputs.attention.sm_scale, inputs.topk) == (plain.sm_scale, plain.topk)
    for field in dataclasses.fields(plain):
        if torch.is_tensor(getattr(plain, field.name)):
            again = getattr(inputs.exact(), field.name)
            assert same_bits(again, getattr(plain, field.name))


@pytest.mark.parametrize("inputs", INPUT_KINDS)
def test_inputs_are_those_of_dsa_rounded(inputs):
    shape = prefill_shape(inputs=inputs)
    assert_made_of(make(seed=5, inputs=inputs), dsa.make_inputs(shape, seed=5, device="cpu"))
    assert not torch.equal(make(seed=6, inputs=inputs).scores.index_k, make().scores.index_k)


def test_captured_inputs(tmp_path):
    path = str(tmp_path / "chunk.safetensors")
    captured(path)
    inputs = make(seed=3, inputs=path)
    assert_made_of(inputs, dsa.make_inputs(prefill_shape(inputs=path), seed=3, device="cpu"))
    outputs = with_kernel()(inputs)
    assert hostile.passes(OPERATOR.check(inputs, outputs))
    found = OPERATOR.figures(inputs, outputs)
    assert set(found) == {"dense_error", "rounding_error"}
    assert found["dense_error"]["recall"] > 0.8


def test_nothing_in_bf16_is_held_but_the_rope_columns(monkeypatch):
    made, make_plain = [], dsa.make_inputs

    def watched(*args, **options):
        plain = make_plain(*args, **options)
        made.extend(weakref.ref(x) for x in (plain.q, plain.kv))
        return plain

    monkeypatch.setattr(dsa, "make_inputs", watched)
    inputs = make()
    assert [x() for x in made] == [None, None]
    wide = [x for x in tensors_in(inputs) if x.dtype == torch.bfloat16]
    assert [x.shape[-1] for x in wide] == [64, 64]
    outputs = with_kernel()(inputs)
    memory = OPERATOR.memory(prefill_shape(workspace_bytes=4 * 40 * 2))
    assert memory.input_bytes == held_bytes(inputs)
    assert memory.output_bytes == held_bytes(outputs)
    assert memory.workspace_bytes == 4 * 40 * 2 + outputs.topk_indices.nbytes


def test_cost_is_the_sum_of_the_stages():
    shape = prefill_shape()
    stages = OPERATOR.stage_shapes(shape)
    assert tuple(stages) == OPERATOR.stages("prefill") == ("indexer", "topk", "sparse_prefill_fp8")
    costs = [registry.operator(name).cost(part) for name, (part,) in stages.items()]
    total = OPERATOR.cost(shape)
    for field in ("flops", "bytes_read", "bytes_written"):
        assert getattr(total, field) == sum(getattr(cost, field) for cost in costs)
    assert total.flops == dsa.cost(shape).flops
    assert total.bytes_read < dsa.cost(shape).bytes_read


@pytest.mark.parametrize("inputs", INPUT_KINDS)
def test_check_passes_a_kernel_that_rounds_its_weights(inputs):
    made = make(seq_len_kv=400, topk=130, inputs=inputs)
    checks = OPERATOR.check(made, with_kernel()(made))
    assert [check.name for check in checks] == [
        "topk_indices", "out", "out_budget", "max_logits", "max_logits_budget", "lse", "lse_budget"
    ]  # fmt: skip
    for check in checks:
        assert check.passed, check


def changed(change):
    """The right outputs of a selection that is changed."""

    def run(inputs, right):
        indices = right.topk_indices.clone()
        change(indices)
        return listing(inputs, indices)

    return run


def drop_one(indices):
    indices[3, 1] = -1


def repeat_one(indices):
    indices[3, 1] = indices[3, 0]


def take_the_future(indices):
    indices[0, 0] = 39


def unscaled(inputs, right):
    attended = online(replace(inputs.attend_to(right.topk_indices), q_scale=torch.ones(6, 2)))
    return DsaFp8Outputs(attended.out, attended.max_logits, attended.lse, right.topk_indices)


WRONG = {
    "zeros": ("out", lambda inputs, right: DsaFp8Outputs(*map(torch.zeros_like, right))),
    "one-dropped": ("topk_indices", changed(drop_one)),
    "one-repeated": ("topk_indices", changed(repeat_one)),
    "a-later-key": ("topk_indices", changed(take_the_future)),
    "out-of-another-row": ("out", lambda inputs, right: right._replace(out=right.out.flip(0))),
    "heads-swapped": ("out_budget", lambda inputs, right: right._replace(out=right.out.flip(1))),
    "largest-of-another-row": (
        "max_logits",
        lambda inputs, right: right._replace(max_logits=right.max_logits.flip(0)),
    ),
    "log2": ("lse_budget", lambda inputs, right: right._replace(lse=right.lse * 1.4427)),
    "without-scales": ("lse_budget", unscaled),
    "nan": ("out", lambda inputs, right: right._replace(out=right.out * NAN)),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails_what_is_wrong(name):
    seen, run = WRONG[name]
    inputs = make()
    right = with_kernel()(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    found = {check.name: check.passed for check in OPERATOR.check(inputs, run(inputs, right))}
    assert not found[seen]


def test_the_gate_takes_it_whole():
    """Checks, finite outputs and figures, as a case of a run meets them."""
    inputs = make()
    verdict = gate.check_outputs(
        OPERATOR, inputs, with_kernel()(inputs), num_rows=6, seed=0, device="cpu"
    )
    assert verdict.passed, verdict.reason
    assert {"dense_error", "rounding_error"} <= set(verdict.gate)


def attend_densely(plain, row):
    """(out, weights [heads, keys]) of one query over every key that it sees, in fp64."""
    q, kv = plain.q[row].double(), plain.kv[: int(plain.kv_end[row])].double()
    weights = (q @ kv.T * plain.sm_scale).softmax(1)
    return weights @ kv[:, :512], weights


def test_figures_by_the_formulas():
    """Both distances are from bf16 tensors; what is kept of the mass knows nothing of rounding."""
    inputs = make(seq_len_q=10, seq_len_kv=400, topk=40, seed=5)
    outputs = with_kernel()(inputs)
    rows = torch.tensor([7, 2])
    plain = inputs.exact()
    dense, kept = [], []
    for row in rows.tolist():
        out, weights = attend_densely(plain, row)
        dense.append(out)
        kept.append(weights[:, outputs.topk_indices[row].long()].sum(1))
    dense, actual = torch.stack(dense), outputs.out[rows].double()
    attention = plain.attention_inputs(outputs.topk_indices)
    wanted = loops(plain.q.double(), plain.kv.double(), sparse_prefill_fp8.quantize(attention)).out
    found = OPERATOR.figures(inputs, outputs, rows=rows)
    error = (actual - dense).norm() / dense.norm()
    assert found["dense_error"]["relative_l2"] == pytest.approx(error.item(), rel=1e-4)
    assert found["dense_error"]["mass_kept"] == pytest.approx(torch.stack(kept).mean().item(), 1e-5)
    error = (actual - wanted[rows]).norm() / wanted[rows].norm()
    assert found["rounding_error"]["relative_l2"] == pytest.approx(error.item(), rel=1e-4)
    assert 0.01 < error < 0.1


def test_figures_of_the_selection_are_those_of_dsa():
    shape = prefill_shape(seq_len_kv=400, topk=40)
    plain = dsa.make_inputs(shape, seed=2, device="cpu")
    whole = dsa.figures(plain, dsa.reference(plain))["dense_error"]
    inputs = make(seq_len_kv=400, topk=40, seed=2)
    found = OPERATOR.figures(inputs, OPERATOR.reference(inputs))["dense_error"]
    assert found["recall"] == whole["recall"]
    assert found["mass_kept"] == pytest.approx(whole["mass_kept"], rel=1e-5)
    assert found["relative_l2"] != pytest.approx(whole["relative_l2"], rel=1e-3)


def test_without_the_bf16_tensors_there_are_no_figures():
    inputs = make()
    outputs = OPERATOR.reference(inputs)
    assert OPERATOR.figures(inputs.select(torch.arange(6)), outputs) == {}


@pytest.mark.parametrize(
    ("fields", "dims", "sentence"),
    [
        ({"precision": "bf16"}, {}, "dsa_fp8 computes in fp8, got precision bf16 .*or take dsa"),
        ({"phase": "decode"}, {}, "in fp8 already .pass --op dsa --precision fp8"),
        ({"topk": None}, {}, "topk has no value"),
        ({"topk": 129}, {}, "topk 129 is more than the 128 keys there are"),
        ({"seq_len_q": 129}, {}, "seq_len_q 129"),
        ({"inputs": "neddle"}, {}, "unknown inputs 'neddle'; known: random, needle"),
        ({"inputs": "no.safetensors"}, {}, "there is no file no.safetensors"),
        ({}, {"head_dim_v": 256}, "512 latent columns and 64 or no .* has head_dim 320/256"),
    ],
)
def test_a_case_that_it_cannot_take(fields, dims, sentence):
    known = {"seq_len_q": 64, "seq_len_kv": 128, "topk": 32, "phase": "prefill",
             "precision": "fp8"} | fields  # fmt: skip
    with pytest.raises(Unsupported, match=sentence) as caught:
        OPERATOR.shape(Case(op="dsa_fp8", impl="reference", **known), replace(V32, **dims))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len_q", [4096, 16384])
@pytest.mark.parametrize("inputs", INPUT_KINDS)
def test_on_the_gpu_at_16k(inputs, seq_len_q):
    made, outputs = on_gpu("prefill", "fp8", 16384, seq_len_q, 1, op="dsa_fp8", inputs=inputs)
    rows = torch.tensor([0, seq_len_q - 1], device="cuda")
    assert OPERATOR.figures(made, outputs, rows=rows)["rounding_error"]["relative_l2"] < 0.1
