"""Indexer and top-k in one: its check, and every implementation, emulated and on a GPU."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import (
    candidate_list,
    indexer,
    indexer_topk_gluon,
    row_topk,
    sample_thresholds,
    topk,
)
from dsa_bench.kernels.indexer import IndexerShape
from dsa_bench.kernels.indexer_topk import (
    OPERATOR,
    IndexerTopkInputs,
    IndexerTopkOutputs,
    IndexerTopkShape,
)
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.gluon_emulator import emulated_gluon

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
KERNEL = "dsa_bench.kernels.indexer_topk_gluon"


def shape_of(queries, keys, topk_size, *, heads=64, precision="fp8", workspace=2**26):
    scores = IndexerShape(
        seq_len_q=queries, seq_len_kv=keys, index_heads=heads, precision=precision
    )
    return IndexerTopkShape(scores=scores, topk=topk_size, workspace_bytes=workspace)


def inputs_of(*sizes, mutate=hostile.plain, seed=0, device="cpu", **options):
    inputs = OPERATOR.make_inputs(shape_of(*sizes, **options), seed=seed, device=device)
    return replace(inputs, scores=mutate(inputs.scores))


def constant(scores):
    """All keys alike, so that every logit of a row is the same."""
    key, scale = scores.index_k[:1], scores.index_k_scale[:1]
    return replace(
        scores,
        index_k=key.expand_as(scores.index_k).contiguous(),
        index_k_scale=scale.expand_as(scores.index_k_scale).contiguous(),
    )


def periodic(scores):
    """Keys of large logits wherever the sample does not look, and nowhere else."""
    step = sample_thresholds.choose_sampling(64).key_step
    keys = torch.arange(len(scores.index_k_scale), device=scores.index_k_scale.device)
    scale = torch.where(keys % step == 0, 1e-3, 1.0) * scores.index_k_scale
    return replace(scores, index_k_scale=scale)


def far_ranges(scores):
    """Ends at the least and largest int32, which must not wrap where they are rounded."""
    far, none = 2**31 - 1, -(2**31)
    start, end = scores.kv_start.clone(), scores.kv_end.clone()
    start[1::5], end[1::5] = far, far
    start[2::5], end[2::5] = none, far
    start[3::5], end[3::5] = far, 7
    start[4::5], end[4::5] = 5, none
    return replace(scores, kv_start=start, kv_end=end)


def two_valued(scores):
    """Half of the keys are one key, half another."""
    keys = torch.arange(len(scores.index_k), device=scores.index_k.device) % 2
    return replace(scores, index_k=scores.index_k[keys], index_k_scale=scores.index_k_scale[keys])


def test_reference_is_that_of_the_parts():
    inputs = inputs_of(9, 120, 33, heads=8, mutate=hostile.indexer_ragged)
    scores = inputs.scores
    logits = indexer.reference(scores).index_logits
    expected = topk.reference(topk.TopkInputs(logits, scores.kv_start, scores.kv_end, 33))
    actual = OPERATOR.reference(inputs).topk_indices
    assert torch.equal(actual, expected.topk_indices)
    rows = torch.tensor([6, 0])
    assert torch.equal(OPERATOR.reference(inputs, rows=rows).topk_indices, actual[rows])


WRONG = {
    "zeros": torch.zeros_like,
    "a later key": lambda x: x + 1,
    "rows swapped": lambda x: x.flip(0),
    "one repeated": lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
    "too few columns": lambda x: x[:, :1],
    "one missing": lambda x: torch.cat([x[:, :-1], torch.full_like(x[:, :1], -1)], 1),
    "the first ones": lambda x: torch.arange(x.shape[1], dtype=torch.int32).expand_as(x),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = inputs_of(6, 300, 40, heads=8)
    right = OPERATOR.reference(inputs).topk_indices
    assert hostile.passes(OPERATOR.check(inputs, IndexerTopkOutputs(right)))
    rows = torch.tensor([4])
    wrong = IndexerTopkOutputs(WRONG[name](right))
    assert not hostile.passes(OPERATOR.check(inputs, wrong))
    assert hostile.passes(OPERATOR.check(inputs, IndexerTopkOutputs(right), rows=rows))


def test_cost_and_memory_have_no_logits():
    shape = shape_of(4096, 131072, 2048)
    parts = indexer.cost(shape.scores)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    assert (cost.flops, cost.bytes_read) == (parts.flops, parts.bytes_read)
    assert cost.bytes_written == 4 * 4096 * 2048
    assert memory.output_bytes == 32 * 2**20
    assert memory.workspace_bytes == 64 * 2**20


def test_more_than_there_are_keys_is_refused():
    case = Case(
        op="indexer_topk", impl="gluon", phase="prefill", seq_len_q=4, seq_len_kv=64, topk=65
    )
    with pytest.raises(Unsupported, match="topk 65 is more than the 64 keys there are"):
        OPERATOR.shape(case, PRESETS["v3.2"])


def emulate(inputs, *, seed=0, num_sms=3, changes=None):
    """(indices, indices of the separate kernels, rows that were done whole)."""
    with emulated_gluon(seed=seed, num_sms=num_sms) as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        emulated.change(changes or {})
        whole, rescue = [], kernel.rescue_rows

        def watched(tensors, failed, *rest, **options):
            whole.extend(failed.nonzero().flatten().tolist())
            rescue(tensors, failed, *rest, **options)

        kernel.rescue_rows = watched
        indices = kernel.run(inputs).topk_indices
        scores = inputs.scores
        logits = emulated.load("dsa_bench.kernels.ragged_logits").ragged_logits(
            *(getattr(scores, name) for name in scores.__slots__)
        )
    ranges = scores.kv_start, scores.kv_end
    pair = topk.reference(topk.TopkInputs(logits, *ranges, inputs.topk)).topk_indices
    return indices, pair, whole


def same_sets(a, b):
    return torch.equal(a.sort(1).values, b.sort(1).values)


EMULATED = [
    # (queries, keys, topk, heads, precision, workspace, SMs, scores): one chunk or several, rows
    # shared by two programs and by many
    (12, 1500, 40, 64, "fp8", 60_000, 3, hostile.plain),
    (17, 1300, 64, 64, "bf16", 60_000, 9, hostile.indexer_ragged),
    (9, 2500, 64, 64, "fp8", 60_000, 20, hostile.plain),
    (36, 900, 33, 16, "fp8", 120_000, 2, hostile.indexer_ragged),
]


@pytest.mark.parametrize(
    ("queries", "keys", "topk_size", "heads", "precision", "workspace", "num_sms", "mutate"),
    EMULATED,
)
def test_emulated_finds_what_the_separate_kernels_find(
    queries, keys, topk_size, heads, precision, workspace, num_sms, mutate
):
    inputs = inputs_of(
        queries, keys, topk_size, heads=heads, precision=precision, workspace=workspace,
        mutate=mutate, seed=keys,
    )  # fmt: skip
    indices, pair, whole = emulate(inputs, seed=queries, num_sms=num_sms)
    assert same_sets(indices, pair)
    assert not whole  # the sample was good enough
    assert hostile.passes(OPERATOR.check(inputs, IndexerTopkOutputs(indices)))


@pytest.mark.parametrize("mutate", [constant, two_valued, periodic, hostile.indexer_silent])
def test_emulated_rows_that_no_threshold_divides_are_done_whole(mutate):
    inputs = inputs_of(10, 1500, 64, workspace=50_000, mutate=mutate, seed=2)
    indices, pair, whole = emulate(inputs, seed=1)
    assert whole
    assert same_sets(indices, pair)


@pytest.mark.parametrize("workspace", [2**26, 30_000])
def test_emulated_chunks_of_logits_where_they_fit(workspace):
    inputs = inputs_of(14, 1000, 64, mutate=hostile.indexer_ragged, workspace=workspace)
    changes = {"indexer_topk_gluon.MANY_QUERIES": lambda _: 5}
    indices, pair, whole = emulate(inputs, changes=changes)
    assert same_sets(indices, pair)
    assert not whole


@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("mutate", [constant, hostile.plain])
def test_emulated_sorted_indices_ascend(mutate, capacity, monkeypatch):
    """Of rows that are done whole too, of which each program has several; with lists too short all
    are."""
    inputs = inputs_of(9, 1200, 64, workspace=40_000, mutate=mutate, seed=6)
    with emulated_gluon(seed=5, num_sms=2) as emulated, hostile.poisoned_outputs():
        tensors = [getattr(inputs.scores, name) for name in inputs.scores.__slots__]
        kernel = emulated.load(KERNEL)
        if capacity is not None:
            sampling = replace(kernel.choose_sampling(64), capacity=capacity)
            monkeypatch.setattr(kernel, "choose_sampling", lambda _: sampling)
        indices = kernel.indexer_topk(*tensors, 64, sorted_indices=True, workspace_bytes=40_000)
        pair = emulated.load("dsa_bench.kernels.ragged_logits").ragged_logits(*tensors)
    ranges = inputs.scores.kv_start, inputs.scores.kv_end
    expected = topk.reference(topk.TopkInputs(pair, *ranges, 64, sorted_indices=True))
    assert torch.equal(indices, expected.topk_indices)


@pytest.mark.parametrize("workspace", [2**26, 100_000])
def test_emulated_ranges_far_outside_of_the_keys(workspace):
    inputs = inputs_of(12, 2000, 64, workspace=workspace, mutate=far_ranges, seed=7)
    indices, pair, whole = emulate(inputs)
    assert same_sets(indices, pair)
    assert not whole


def test_nothing_to_select_from_gives_no_index():
    inputs = inputs_of(5, 12, 3)
    scores = inputs.scores
    no_keys = replace(scores, index_k=scores.index_k[:0], index_k_scale=scores.index_k_scale[:0])
    assert (indexer_topk_gluon.run(replace(inputs, scores=no_keys)).topk_indices == -1).all()
    names = ("index_q", "index_weights", "kv_start", "kv_end")
    no_queries = replace(scores, **{name: getattr(scores, name)[:0] for name in names})
    assert indexer_topk_gluon.run(replace(inputs, scores=no_queries)).topk_indices.shape == (0, 3)


def test_lists_that_need_the_selection_elsewhere_want_to_be_told():
    lists = candidate_list.empty_lists(2, 1, 64, torch.device("cpu"))
    ends = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="give the logits, or failed"):
        candidate_list.select_candidates(lists, ends, ends, 8, 100)


@pytest.mark.parametrize("room", [None, 2**26, 100_000])
def test_lists_of_few_rows_keep_to_their_room(room):
    config = row_topk.choose_config(32, 131072, 2048, 132, room)
    assert (config.parts > 1) is (room != 100_000)


BROKEN = {
    "a threshold too high": {
        "indexer_topk_gluon.choose_sampling": lambda f: lambda k: replace(f(k), rank=1)
    },
    "lists too short": {
        "indexer_topk_gluon.choose_sampling": lambda f: lambda k: replace(f(k), capacity=8)
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_emulated_a_bad_guess_costs_time_alone(name):
    """Whatever sampling says, the result is exact: rows are done whole."""
    inputs = inputs_of(9, 1500, 64, workspace=50_000, seed=3)
    indices, pair, whole = emulate(inputs, changes=BROKEN[name])
    assert len(whole) == 9
    assert same_sets(indices, pair)


@pytest.mark.parametrize("topk_size", [1, 64, 500, 2048, 4096])
def test_sampling_is_off_by_few_sigmas_at_most(topk_size):
    sampling = sample_thresholds.choose_sampling(topk_size)
    low = sampling.rank - sample_thresholds.SIGMAS * sampling.rank**0.5
    high = sampling.rank + sample_thresholds.SIGMAS * sampling.rank**0.5
    assert low * sampling.key_step >= topk_size - sampling.key_step
    assert high * sampling.key_step <= min(
        sampling.words, sample_thresholds.LISTING_WARPS * sampling.capacity
    )


@pytest.mark.parametrize("num_keys", [2**15, 2**17, 2**20])
@pytest.mark.parametrize("num_queries", [136, 700, 4096, 20000])
@pytest.mark.parametrize("topk_size", [512, 2048, 4096])
def test_chunks_fit_into_the_workspace(num_queries, num_keys, topk_size):
    sampling = sample_thresholds.choose_sampling(topk_size)
    chunk, regions = indexer_topk_gluon.choose_chunk(num_queries, num_keys, 8, 132, sampling, 2**26)
    assert chunk % 8 == 0 or chunk == num_queries
    assert chunk * indexer_topk_gluon.row_bytes(num_keys, regions, sampling) <= 2**26
    # of equal rows, a block is shared by so many programs at most
    assert regions >= min(16, -(-(-(-132 * 8 // chunk) + 1) // 2))


def test_refuses_in_a_sentence():
    inputs = inputs_of(5, 5000, 4097)
    with pytest.raises(ValueError, match="topk must be 1 … 4096, got 4097"):
        indexer_topk_gluon.run(inputs)
    supports = indexer_topk_gluon.supports
    assert supports(shape_of(64, 8192, 2048), H100) is None
    assert "takes topk up to 4096, this case has 4097" in supports(shape_of(64, 8192, 4097), H100)
    assert "gluon indexer_topk needs a Hopper GPU" in supports(shape_of(64, 8192, 64), A100)


GPU_SHAPES = [
    shape_of(1, 100_000, 2048),
    shape_of(129, 140_000, 2048, workspace=2**24),
    shape_of(1500, 20_000, 512, workspace=2**24),
    shape_of(700, 30_000, 4096, precision="bf16", workspace=2**25),
    shape_of(300, 50_001, 2048, heads=16, workspace=2**24),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mutate", [hostile.plain, hostile.indexer_ragged, hostile.indexer_silent, far_ranges]
)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu_is_right_and_the_same_each_time(shape, mutate):
    implementation = hostile.runnable("indexer_topk", "gluon", shape)
    inputs = OPERATOR.make_inputs(shape, seed=1, device="cuda")
    inputs = replace(inputs, scores=mutate(inputs.scores))
    with hostile.poisoned_outputs():
        first = implementation.run(inputs)
    hostile.assert_right("indexer_topk", inputs, first, None)
    for _ in range(5):
        assert same_sets(implementation.run(inputs).topk_indices, first.topk_indices)


@pytest.mark.gpu
@pytest.mark.parametrize("mutate", [constant, two_valued, periodic])
def test_gpu_rows_that_no_threshold_divides(mutate):
    shape = shape_of(300, 40_000, 2048, workspace=2**24)
    implementation = hostile.runnable("indexer_topk", "gluon", shape)
    inputs = OPERATOR.make_inputs(shape, seed=1, device="cuda")
    inputs = replace(inputs, scores=mutate(inputs.scores))
    hostile.assert_right("indexer_topk", inputs, implementation.run(inputs), None)


@pytest.mark.gpu
@pytest.mark.parametrize("num_keys", [131_072, 2**20])
def test_gpu_holds_no_more_than_its_workspace(num_keys):
    shape = shape_of(2048, num_keys, 2048)
    implementation = hostile.runnable("indexer_topk", "gluon", shape)
    inputs: IndexerTopkInputs = OPERATOR.make_inputs(shape, seed=0, device="cuda")
    implementation.run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    outputs = implementation.run(inputs)
    # of what is allocated up to 1 MiB a tensor is the allocator's, which leaves that much uncut
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - before - outputs.topk_indices.nbytes <= shape.workspace_bytes
