"""The whole: its reference, the composition of its stages, cost and memory."""

import dataclasses
import weakref
from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.accuracy import compare_tensors
from dsa_bench.baselines.dense_attention import OPERATOR as DENSE
from dsa_bench.baselines.dense_attention import DenseDecodeInputs
from dsa_bench.kernels import dsa, indexer, page_slots, paged_indexer, topk
from dsa_bench.kernels.attention import DECODE_LSE_TOLERANCE, DECODE_OUT_TOLERANCE
from dsa_bench.kernels.dsa import OPERATOR, DsaOutputs
from dsa_bench.kernels.dsa_inputs import DsaDecodeInputs
from dsa_bench.kernels.paging import pack_index_pages, pack_mla_rows, unpack_mla_rows
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.dsa_cases import SHAPES, decode_shape, in_bf16, make_inputs, prefill_shape
from tests.gluon_emulator import emulated_gluon


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_of_some_rows(shape):
    inputs = make_inputs(shape)
    rows = torch.tensor([2, 0])
    whole, some = OPERATOR.reference(inputs), OPERATOR.reference(inputs, rows=rows)
    assert torch.equal(some.topk_indices, whole.topk_indices[rows])
    torch.testing.assert_close(some.out, whole.out[rows], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(some.lse, whole.lse[rows], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("workspace_bytes", [1, 4 * 40, 4 * 40 * 4 + 3])
def test_chunks_of_queries_give_what_one_chunk_gives(workspace_bytes):
    whole = make_inputs(prefill_shape())
    chunked = make_inputs(prefill_shape(workspace_bytes=workspace_bytes))
    parts = dsa.query_chunks(6, 40, workspace_bytes)
    assert len(dsa.query_chunks(6, 40, whole.workspace_bytes)) == 1
    assert [i for part in parts for i in range(6)[part]] == list(range(6))
    assert all(part.stop - part.start <= max(1, workspace_bytes // 160) for part in parts)
    expected, actual = OPERATOR.reference(whole), OPERATOR.reference(chunked)
    assert torch.equal(actual.topk_indices, expected.topk_indices)
    torch.testing.assert_close(actual.out, expected.out)


def test_only_one_chunk_of_logits_is_alive_at_a_time():
    inputs = make_inputs(prefill_shape(workspace_bytes=1))
    stages = dsa.reference_stages("prefill")
    made: list[weakref.ref[torch.Tensor]] = []

    def score(part):
        assert all(logits() is None for logits in made)
        outputs = indexer.reference(part)
        made.append(weakref.ref(outputs.index_logits))
        return outputs

    def attend(part):
        assert all(logits() is None for logits in made)
        return stages["sparse_prefill"].run(part)

    watched = {
        "indexer": replace(stages["indexer"], run=score),
        "sparse_prefill": replace(stages["sparse_prefill"], run=attend),
    }
    dsa.run_prefill(inputs, stages | watched)
    assert len(made) == 6


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_few_keys_are_dense_attention_in_prefill(precision):
    inputs = make_inputs(prefill_shape(seq_len_q=8, seq_len_kv=8, topk=8, precision=precision))
    outputs = OPERATOR.reference(inputs)
    for i in range(8):
        dense = DENSE.reference(
            DenseDecodeInputs(inputs.q[None, i : i + 1], inputs.kv[None, : i + 1], inputs.sm_scale)
        )
        torch.testing.assert_close(outputs.out[i], dense.out[0, 0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(outputs.lse[i], dense.lse[0, 0], rtol=2e-5, atol=2e-6)
        assert sorted(outputs.topk_indices[i].tolist()) == [-1] * (7 - i) + list(range(i + 1))
    figures = OPERATOR.figures(inputs, outputs)["dense_error"]
    assert figures["relative_l2"] < 1e-5
    assert figures["mass_kept"] == pytest.approx(1, abs=1e-5)


def test_few_keys_are_dense_attention_in_decode():
    inputs = make_inputs(decode_shape(seq_len_kv=8, topk=8))
    outputs = OPERATOR.reference(inputs)
    for b in range(3):
        pages = inputs.kv_cache[inputs.block_table[b].long()]
        kv = unpack_mla_rows(pages).flatten(0, 1)[None, :8]
        dense = DENSE.reference(DenseDecodeInputs(inputs.q[b : b + 1], kv, inputs.sm_scale))
        torch.testing.assert_close(outputs.out[b], dense.out[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(outputs.lse[b], dense.lse[0], rtol=2e-5, atol=2e-6)


def last_token_decoded(inputs, pages):
    """The same sequence as paged bf16 caches, its last token as the query; `pages` of 8 tokens."""
    num_keys = inputs.kv.shape[0]
    index_cache = torch.zeros(len(pages), 8 * 128).bfloat16()
    kv_cache = torch.zeros(len(pages), 8, 576).bfloat16()
    index_cache[pages] = pack_index_pages(inputs.index_k.view(-1, 8, 128), "bf16")
    kv_cache[pages] = pack_mla_rows(inputs.kv.view(-1, 8, 576), "bf16")
    return DsaDecodeInputs(
        index_q=inputs.index_q[None, -1:], index_cache=index_cache,
        index_weights=inputs.index_weights[None, -1:],
        seq_lens=torch.tensor([[num_keys]], dtype=torch.int32),
        block_table=pages[None].to(torch.int32), q=inputs.q[None, -1:], kv_cache=kv_cache,
        no_start=torch.zeros(1, dtype=torch.int32), sm_scale=inputs.sm_scale, topk=inputs.topk,
        page_size=8,
    )  # fmt: skip


def test_decode_of_the_last_token_is_the_last_row_of_prefill():
    inputs = make_inputs(prefill_shape(seq_len_kv=40, topk=12, precision="bf16"))
    prefill = OPERATOR.reference(inputs)
    decode = OPERATOR.reference(last_token_decoded(inputs, torch.tensor([3, 0, 4, 1, 2])))
    actual, expected = (set(x.flatten().tolist()) for x in (
        decode.topk_indices, prefill.topk_indices[-1]
    ))  # fmt: skip
    assert actual == expected
    out = compare_tensors("out", decode.out[0, 0], prefill.out[-1], DECODE_OUT_TOLERANCE)
    lse = compare_tensors("lse", decode.lse[0, 0], prefill.lse[-1], DECODE_LSE_TOLERANCE)
    assert out.passed, out
    assert lse.passed, lse


@pytest.mark.parametrize("seq_len_q", [1, 3])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_attention_of_decode_is_told_how_many_keys_are_listed(name, seq_len_q):
    """Sequences of 400, and of fewer tokens than topk; of a single query it is not told."""
    shape = decode_shape(
        batch_size=4, seq_len_q=seq_len_q, seq_len_kv=400, topk=40, lengths="one-long"
    )
    stages = dsa.reference_stages("decode")
    if name == "torch":
        stages["topk"] = registry.implementation("topk", name)
    inputs = make_inputs(shape)
    listed = dsa.select_decode(inputs, stages).topk_indices >= 0
    attention = inputs.attention_inputs(torch.empty(0))
    lens = attention.topk_lens.clamp(max=40)
    assert lens.min() < 40 and lens.max() == 40
    assert torch.equal(listed, torch.arange(40) < lens[..., None])
    assert attention.is_padded and attention.needed_lens is None
    one = make_inputs(decode_shape(batch_size=1, seq_len_q=1))
    assert one.attention_inputs(torch.empty(0)).topk_lens is None


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_make_the_indexer_look_where_attention_looks(shape):
    """Twice the mass that as many random keys would keep."""
    inputs = make_inputs(replace(shape, seq_len_kv=400, topk=40), seed=5)
    kept = OPERATOR.figures(inputs, OPERATOR.reference(inputs))["dense_error"]["mass_kept"]
    assert 0.5 < kept < 0.999


def test_figures_of_a_selection_at_random_are_worse():
    inputs = make_inputs(prefill_shape(seq_len_kv=400, topk=40), seed=5)
    best = OPERATOR.reference(inputs)
    indices = torch.arange(40, dtype=torch.int32).expand(6, 40).contiguous()
    run = dsa.reference_stages("prefill")["sparse_prefill"].run
    other = run(inputs.attention_inputs(indices))
    worse = OPERATOR.figures(inputs, DsaOutputs(other.out, other.lse, indices))["dense_error"]
    assert worse["mass_kept"] < OPERATOR.figures(inputs, best)["dense_error"]["mass_kept"] / 2
    assert worse["relative_l2"] > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_is_the_sum_of_the_stages(shape):
    stages = OPERATOR.stage_shapes(shape)
    assert tuple(stages) == OPERATOR.stages(shape.phase)
    costs = [registry.operator(name).cost(part) for name, (part,) in stages.items()]
    total = OPERATOR.cost(shape)
    for field in ("flops", "bytes_read", "bytes_written"):
        assert getattr(total, field) == sum(getattr(cost, field) for cost in costs)


@pytest.mark.parametrize(
    ("seq_len_kv", "mflop"), [(4096, 637.5), (16384, 838.9), (32768, 1107.3), (131072, 2717.9)]
)
def test_flops_a_token_of_v32(seq_len_kv, mflop):
    """Indexer and sparse attention at position L, as counted for V3.2 by hand."""
    for phase in ("prefill", "decode"):
        case = Case(
            op="dsa", impl="reference", phase=phase, seq_len_kv=seq_len_kv, seq_len_q=1, topk=2048
        )
        cost = OPERATOR.cost(OPERATOR.shape(case, PRESETS["v3.2"]))
        assert cost.flops / 1e6 == pytest.approx(mflop, abs=0.06)


def test_prefill_memory_is_what_the_tensors_take():
    shape = prefill_shape(workspace_bytes=4 * 40 * 2)
    inputs = make_inputs(shape)
    outputs = OPERATOR.reference(inputs)
    tensors = (getattr(inputs, f.name) for f in dataclasses.fields(inputs))
    memory = OPERATOR.memory(shape)
    assert memory.input_bytes == sum(x.nbytes for x in tensors if torch.is_tensor(x))
    selection = outputs.topk_indices.nbytes
    # the attention's max_logits are counted too
    heads = outputs.lse.numel()
    assert memory.output_bytes == heads * (2 * 512 + 4 + 4) + selection
    assert memory.workspace_bytes == 4 * 40 * 2 + selection


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"topk": None}, "topk has no value"),
        ({"topk": 129}, "topk 129 is more than the 128 keys there are"),
        ({"seq_len_q": 129}, "seq_len_q 129"),
    ],
    ids=["no-topk", "topk-129", "q-129"],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    known = {"seq_len_q": 64, "seq_len_kv": 128, "topk": 32, "phase": "prefill"} | fields
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(Case(op="dsa", impl="reference", **known), PRESETS["v3.2"])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_composition_runs_the_implementations_that_are_named(phase):
    """Each stage once, in order, with the outputs of the one before."""
    shape = prefill_shape() if phase == "prefill" else decode_shape()
    ran = []

    def spied(name, part):
        def run(inputs):
            ran.append(name)
            return part.run(inputs)

        return replace(part, run=run)

    stages = {name: spied(name, part) for name, part in dsa.reference_stages(phase).items()}
    inputs = make_inputs(shape)
    outputs = OPERATOR.compose(phase, stages)(inputs)
    assert tuple(ran) == OPERATOR.stages(phase)
    assert torch.equal(outputs.out, OPERATOR.reference(inputs).out)


def topk_with_slots(inputs):
    """The reference, with slots of its own, as the Gluon kernel has them."""
    indices = topk.reference(inputs).topk_indices
    batch_size = inputs.pages.block_table.shape[0]
    batched = page_slots.PageSlotsInputs(
        indices.view(batch_size, -1, inputs.topk), inputs.pages.block_table, inputs.pages.page_size
    )
    return topk.TopkOutputs(indices, page_slots.reference(batched).topk_slots.flatten(0, 1))


def decode_stages(ran, **others):
    """References that note that they run."""

    def noted(name, run):
        return lambda inputs: (ran.append(name), run(inputs))[1]

    return {
        name: replace(part, run=noted(name, others.get(name, part.run)))
        for name, part in dsa.reference_stages("decode").items()
    }


def test_slots_that_top_k_gives_take_the_place_of_page_slots():
    inputs, ran = make_inputs(decode_shape()), []
    outputs = OPERATOR.compose("decode", decode_stages(ran, topk=topk_with_slots))(inputs)
    assert ran == ["paged_indexer", "topk", "sparse_decode"]
    for actual, expected in zip(outputs, OPERATOR.reference(inputs), strict=True):
        assert torch.equal(actual, expected)
    # they are what is attended to
    wrong = decode_stages(
        ran, topk=lambda x: topk_with_slots(x)._replace(topk_slots=torch.zeros(6, 8).int())
    )
    assert not torch.equal(OPERATOR.compose("decode", wrong)(inputs).out, outputs.out)


def test_a_selection_that_is_given_goes_through_page_slots():
    inputs, ran = make_inputs(decode_shape()), []
    expected = OPERATOR.reference(inputs)
    stages = decode_stages(ran, topk=topk_with_slots)
    outputs = dsa.run_decode(inputs, stages, topk_indices=expected.topk_indices)
    assert ran == ["page_slots", "sparse_decode"]
    assert torch.equal(outputs.out, expected.out)


def test_emulated_top_k_gives_decode_its_slots():
    inputs, ran = make_inputs(decode_shape()), []
    with emulated_gluon(seed=1) as emulated, hostile.poisoned_outputs():
        run = emulated.load("dsa_bench.kernels.topk_gluon").run
        outputs = OPERATOR.compose("decode", decode_stages(ran, topk=run))(inputs)
    assert ran == ["paged_indexer", "topk", "sparse_decode"]
    assert hostile.passes(OPERATOR.check(inputs, in_bf16(outputs)))


def test_logits_of_both_phases_agree():
    inputs = make_inputs(prefill_shape(seq_len_kv=40, precision="bf16"))
    decode = last_token_decoded(inputs, torch.tensor([3, 0, 4, 1, 2]))
    logits = indexer.reference(inputs.indexer_inputs(slice(None))).index_logits[-1]
    paged = paged_indexer.reference(decode.indexer_inputs()).index_logits[0, 0]
    torch.testing.assert_close(paged, logits, rtol=1e-5, atol=1e-6)
    assert topk.OPERATOR.name in OPERATOR.stages("decode")
