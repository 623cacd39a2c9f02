"""The warp-specialised indexer: emulated, how it shares work out, what it refuses."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import indexer_gluon, logit_tiles, ragged_logits
from dsa_bench.kernels.indexer import OPERATOR, IndexerOutputs, IndexerShape
from dsa_bench.operator import Machine
from tests import hostile
from tests.gluon_emulator import Deadlock, emulated_gluon
from tests.program_shares import recorded

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
KERNEL = "dsa_bench.kernels.ragged_logits"


def inputs_of(queries, keys, heads=64, precision="fp8", mutate=hostile.plain, seed=0):
    shape = IndexerShape(seq_len_q=queries, seq_len_kv=keys, index_heads=heads, precision=precision)
    return mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))


def emulate(inputs, *, seed=0, num_sms=3, changes=None, **options):
    """Logits of the emulated kernel, with `changes` to its modules."""
    with emulated_gluon(seed=seed, num_sms=num_sms) as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        emulated.change(changes or {})
        return kernel.ragged_logits(
            inputs.index_q, inputs.index_k, inputs.index_k_scale, inputs.index_weights,
            inputs.kv_start, inputs.kv_end, **options,
        )  # fmt: skip


EMULATED = [
    (1, 1, 64, "fp8", hostile.plain),
    (5, 700, 64, "fp8", hostile.plain),
    (9, 260, 64, "fp8", hostile.indexer_ragged),
    (7, 130, 32, "bf16", hostile.indexer_silent),
    (35, 300, 16, "fp8", hostile.indexer_ragged),
    (70, 150, 8, "bf16", hostile.indexer_ragged),
]


@pytest.mark.parametrize("num_sms", [1, 5])
@pytest.mark.parametrize(("queries", "keys", "heads", "precision", "mutate"), EMULATED)
def test_emulated(queries, keys, heads, precision, mutate, num_sms):
    inputs = inputs_of(queries, keys, heads, precision, mutate, seed=keys)
    logits = emulate(inputs, seed=queries, num_sms=num_sms)
    hostile.assert_right("indexer", inputs, IndexerOutputs(logits))


def test_emulated_bf16_logits_are_the_rounded_ones():
    inputs = inputs_of(9, 260, mutate=hostile.indexer_ragged)
    seen = OPERATOR.reference(inputs).index_logits.isfinite()
    fp32, bf16 = (emulate(inputs, logits_dtype=x) for x in (torch.float32, torch.bfloat16))
    assert bf16.dtype == torch.bfloat16
    assert torch.equal(fp32.bfloat16()[seen], bf16[seen])


@pytest.mark.parametrize("step", [2, 7, 32])
def test_emulated_key_step_scores_every_so_many_keys(step):
    inputs = inputs_of(9, 1500, mutate=hostile.indexer_ragged, seed=step)
    expected = OPERATOR.reference(inputs).index_logits[:, ::step]
    logits = emulate(inputs, key_step=step)
    assert logits.shape == expected.shape
    seen = expected.isfinite()
    assert seen.any()
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_sms", [1, 2, 3, 7, 50])
def test_programs_share_all_visits_equally(num_sms):
    """Every tile that a query of a block sees is visited once, by runs that differ by the last."""
    inputs = inputs_of(33, 1300, mutate=hostile.indexer_ragged, seed=1)
    runs = []
    emulate(inputs, num_sms=num_sms, changes={"ragged_logits.share_of_program": recorded(runs)})
    tiles = []
    for block in range(0, 33, 8):
        part = slice(block, block + 8)
        start, end = inputs.kv_start[part].clamp(min=0), inputs.kv_end[part].clamp(max=1300)
        seen = start < end
        first, last = (
            (start[seen].min() // 128, -(-end[seen].max() // 128)) if seen.any() else (0, 0)
        )
        tiles += [(block // 8, int(t)) for t in range(int(last - first))]
    visited = []
    for block, skipped, visits in runs:
        begin = next((i for i, x in enumerate(tiles) if x == (block, skipped)), len(tiles))
        visited += range(begin, begin + visits)
    assert sorted(visited) == list(range(len(tiles)))
    share = -(-len(tiles) // num_sms)
    full, rest = divmod(len(tiles), share)
    counts = sorted((visits for *_, visits in runs), reverse=True)
    assert counts == ([share] * full + [rest] * (rest > 0) + [0] * num_sms)[:num_sms]


WRONG = {
    "a tile of keys too few": {"visible_tiles.visible_tiles": lambda f: _one_less(f)},
    "heads of another query": {"logit_scores.sum_heads": lambda f: _without_weights(f)},
}


def _one_less(visible):
    def shorter(*arguments):
        first, end = visible(*arguments)
        return first, torch.maximum(end - 1, first)

    return shorter


def _without_weights(sum_heads):
    return lambda scores, weights, *rest: sum_heads(scores, weights.flip(0), *rest)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(name):
    inputs = inputs_of(9, 700, seed=4)
    try:
        logits = emulate(inputs, changes=WRONG[name])
    except Deadlock:
        return
    assert not hostile.passes(OPERATOR.check(inputs, IndexerOutputs(logits)))


def test_refuses_what_it_cannot_take():
    six = inputs_of(5, 12, heads=6, precision="bf16")
    with pytest.raises(ValueError, match="must be powers of two, got 6"):
        indexer_gluon.run(six)
    four = inputs_of(5, 12, heads=4)
    with pytest.raises(ValueError, match=r"index_heads must be in \(8, 16, 32, 64\)"):
        indexer_gluon.run(four)
    inputs = inputs_of(5, 12)
    with pytest.raises(TypeError, match="logits_dtype must be float32 or bfloat16"):
        ragged_logits.ragged_logits(
            *(getattr(inputs, name) for name in inputs.__slots__), logits_dtype=torch.float16
        )


def test_no_queries_and_no_keys_give_empty_logits():
    inputs = inputs_of(5, 12)
    none = replace(
        inputs,
        **{n: getattr(inputs, n)[:0] for n in ("index_q", "index_weights", "kv_start", "kv_end")},
    )
    assert indexer_gluon.run(none).index_logits.shape == (0, 12)


@pytest.mark.parametrize(
    ("machine", "heads", "sentence"),
    [
        (H100, 64, None),
        (H100, 8, None),
        (A100, 64, "needs a Hopper GPU"),
        (H100, 4, "takes 8, 16, 32 or 64 heads, this case has 4"),
    ],
)
def test_supports_says_why_not(machine, heads, sentence):
    shape = IndexerShape(seq_len_q=64, seq_len_kv=128, index_heads=heads)
    reason = indexer_gluon.supports(shape, machine)
    assert reason is None if sentence is None else sentence in reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("heads", logit_tiles.HEADS_TAKEN)
def test_tiles_fit_into_shared_memory(dtype, heads):
    ring = logit_tiles.choose_ring(dtype)
    consumers = int(logit_tiles.CONSUMERS.value)
    rows = ring.q_slots * consumers * logit_tiles.choose_columns(heads)
    keys = ring.stages * logit_tiles.BLOCK_KV
    assert (rows + keys) * 128 * dtype.itemsize + 512 <= 232448


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_gpu_results_are_the_same_each_time(precision):
    shape = IndexerShape(seq_len_q=513, seq_len_kv=9000, precision=precision)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cuda")
    seen = inputs.kv_end[:, None] > torch.arange(9000, device="cuda")
    first = indexer_gluon.run(inputs).index_logits.masked_fill(~seen, 0)
    for _ in range(20):
        again = indexer_gluon.run(inputs).index_logits.masked_fill(~seen, 0)
        assert torch.equal(first, again)
