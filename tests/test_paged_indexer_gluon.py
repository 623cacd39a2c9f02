"""The paged indexer for Hopper: emulated, how programs share the pages, what it refuses."""

from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import page_tiles, paged_indexer_gluon
from dsa_bench.kernels.paged_indexer import OPERATOR, PagedIndexerOutputs, PagedIndexerShape
from dsa_bench.operator import Machine
from tests import hostile
from tests.gluon_emulator import Deadlock, EmulationError, emulated_gluon
from tests.program_shares import recorded

H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
A100 = Machine(device="cuda", name="A100", capability=(8, 0), num_sms=108)
KERNEL = "dsa_bench.kernels.paged_logits"
NAN_BYTE = 255
"""NaN of e4m3, and four of them of fp32."""
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def shape_of(batch_size, seq_len_kv, seq_len_q=1, heads=64, precision="fp8", page_size=64):
    return PagedIndexerShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, index_heads=heads,
        precision=precision, page_size=page_size,
    )  # fmt: skip


def inputs_of(shape, mutate=hostile.plain, seed=0):
    return mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))


def emulate(inputs, *, seed=0, num_sms=3, changes=None):
    """Logits of the emulated kernel, with `changes` to its modules."""
    with emulated_gluon(seed=seed, num_sms=num_sms) as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        emulated.change(changes or {})
        return PagedIndexerOutputs(
            kernel.paged_logits(
                inputs.index_q, inputs.index_cache, inputs.index_weights, inputs.seq_lens,
                inputs.block_table, page_size=inputs.page_size,
            )
        )  # fmt: skip


EMULATED = [
    (shape_of(1, 1), hostile.plain),
    (shape_of(1, 900), hostile.plain),
    (shape_of(5, 400), hostile.paged_indexer_ragged),
    (shape_of(3, 300, seq_len_q=2), hostile.paged_indexer_ragged),
    (shape_of(2, 300, seq_len_q=3), hostile.paged_indexer_ragged),
    (shape_of(3, 200, seq_len_q=5, page_size=128), hostile.paged_indexer_ragged),
    (shape_of(2, 260, seq_len_q=8), hostile.paged_indexer_ragged),
    (shape_of(4, 300, heads=8, page_size=192), hostile.paged_indexer_ragged),
    (shape_of(2, 200, seq_len_q=7, heads=8), hostile.paged_indexer_ragged),
    (shape_of(2, 200, seq_len_q=3, heads=16), hostile.paged_indexer_ragged),
    (shape_of(2, 200, seq_len_q=8, heads=32), hostile.paged_indexer_ragged),
    (shape_of(3, 400, precision="bf16"), hostile.paged_indexer_ragged),
    (shape_of(2, 400, seq_len_q=4, precision="bf16", page_size=128), hostile.paged_indexer_ragged),
    (shape_of(2, 130, seq_len_q=8, precision="bf16"), hostile.plain),
]


@pytest.mark.parametrize("num_sms", [1, 5])
@pytest.mark.parametrize(("shape", "mutate"), EMULATED, ids=[hostile.label(s) for s, _ in EMULATED])
def test_emulated(shape, mutate, num_sms):
    inputs = inputs_of(shape, mutate, seed=shape.seq_len_kv)
    outputs = emulate(inputs, seed=shape.batch_size, num_sms=num_sms)
    hostile.assert_right("paged_indexer", inputs, outputs)


def one_long_among_short(inputs):
    """Sequence 2 has all its keys, the others from none to a page and a key; the table names no
    page of theirs behind that."""
    lens = torch.full_like(inputs.seq_lens, 65)
    lens[0], lens[1], lens[2] = 0, -7, 10**9
    lens[3, 1:] = 0
    table = inputs.block_table.clone()
    table[:2], table[3:, 2:] = -(2**31), 2**31 - 1
    inputs.index_cache[inputs.block_table[:2].long()] = NAN_BYTE
    return replace(inputs, seq_lens=lens, block_table=table)


@pytest.mark.parametrize("seq_len_q", [1, 2])
@pytest.mark.parametrize("num_sms", [1, 4, 50])
def test_emulated_one_long_among_short(num_sms, seq_len_q):
    inputs = inputs_of(shape_of(6, 700, seq_len_q), one_long_among_short)
    logits = emulate(inputs, num_sms=num_sms).index_logits
    expected = OPERATOR.reference(
        replace(inputs, seq_lens=inputs.seq_lens.clamp(0, 704))
    ).index_logits
    seen = torch.arange(704) < inputs.seq_lens.clamp(max=704)[..., None]
    assert seen.sum() > 704 and expected[seen].isfinite().all()
    torch.testing.assert_close(logits[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_emulated_whatever_is_slow(seed):
    """Each seed makes other roles slow, and lets copies and products end at other moments."""
    inputs = inputs_of(shape_of(3, 1500, 1 + seed), hostile.paged_indexer_ragged, seed=seed)
    outputs = emulate(inputs, seed=seed, num_sms=1)
    hostile.assert_right("paged_indexer", inputs, outputs)


@pytest.mark.parametrize("num_sms", [1, 2, 7, 50])
def test_programs_share_all_pages_equally(num_sms):
    inputs = inputs_of(shape_of(6, 700), one_long_among_short)
    runs = []
    emulate(inputs, num_sms=num_sms, changes={"page_tiles.share_of_program": recorded(runs)})
    pages = [-(-max(0, min(n, 704)) // 64) for n in inputs.seq_lens[:, 0].tolist()]
    tiles = [(sequence, tile) for sequence, n in enumerate(pages) for tile in range(n)]
    visited = []
    for block, skipped, visits in runs:
        begin = next((i for i, x in enumerate(tiles) if x == (block, skipped)), len(tiles))
        visited += range(begin, begin + visits)
    assert sorted(visited) == list(range(len(tiles)))
    assert max(visits for *_, visits in runs) == -(-len(tiles) // num_sms)


def _squared(load_scale):
    return lambda *arguments: load_scale(*arguments) ** 2


def _of_the_next_page(load_tile):
    def wrong(k_desc, pages, page, first_key, tiles, stage):
        return load_tile(k_desc, pages, (page + 1) % 3, first_key, tiles, stage)

    return wrong


def _of_the_next_query(load_queries):
    return lambda q_desc, row, *arguments: load_queries(q_desc, row + 64, *arguments)


MISTAKES = {
    "another scale": {"paged_logits._load_scale": _squared},
    "another page": {"page_tiles._load_tile": _of_the_next_page},
    "another query": {"page_tiles._load_queries": _of_the_next_query},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_found(mistake):
    inputs = inputs_of(shape_of(3, 1500))

    def is_found(seed):
        try:
            outputs = emulate(inputs, seed=seed, num_sms=1, changes=MISTAKES[mistake])
        except (Deadlock, EmulationError):
            return True
        return not hostile.passes(OPERATOR.check(inputs, outputs))

    assert any(is_found(seed) for seed in range(4))


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
@pytest.mark.parametrize("seq_len_q", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_plan_holds_all_columns_and_fits(dtype, seq_len_q, heads):
    plan = page_tiles.plan_tiles(seq_len_q, heads, dtype)
    ways = 4 // plan.groups
    assert plan.groups in (1, 2, 4)
    assert plan.groups * plan.columns >= seq_len_q * heads
    assert plan.stages >= 4 and plan.stages % ways == 0
    row = 128 * dtype.itemsize
    q_bytes = plan.q_slots * plan.groups * plan.columns * row
    assert q_bytes + plan.stages * 64 * (row + 4) <= 227 * 2**10 - 1024


def test_refuses_what_it_cannot_take():
    def reason(machine=H100, **fields):
        return paged_indexer_gluon.supports(replace(shape_of(2, 640), **fields), machine)

    assert reason() is None
    assert reason(seq_len_q=8, page_size=128, precision="bf16") is None
    assert "Hopper" in reason(machine=A100)
    assert "8 new tokens" in reason(seq_len_q=9)
    assert "multiple of 64" in reason(page_size=32)
    assert "heads" in reason(index_heads=4)


@pytest.mark.parametrize(
    "wrong", [{"seq_len_q": 9}, {"page_size": 32}, {"heads": 4}], ids=lambda x: next(iter(x))
)
def test_kernel_refuses_in_a_sentence(wrong):
    inputs = inputs_of(shape_of(2, 640, **wrong))
    with pytest.raises(ValueError, match="multiple of 64, got"):
        emulate(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len_q", [1, 2, 5, 8])
@pytest.mark.parametrize("precision", DTYPES)
def test_gpu_one_long_among_short_is_right_and_repeats(precision, seq_len_q):
    shape = shape_of(300, 20_000, seq_len_q, precision=precision)
    implementation = hostile.runnable("paged_indexer", "gluon", shape)
    inputs = OPERATOR.make_inputs(shape, seed=seq_len_q, device="cuda")
    lens = torch.randint(0, 300, inputs.seq_lens.shape, dtype=torch.int32, device="cuda")
    lens[150, -1] = 20_000
    inputs = replace(inputs, seq_lens=lens)
    with hostile.poisoned_outputs():
        first, second = implementation.run(inputs), implementation.run(inputs)
    hostile.assert_right("paged_indexer", inputs, first)
    seen = torch.arange(first.index_logits.shape[-1], device="cuda") < lens[..., None]
    one, other = (hostile.bits(x.index_logits[seen]) for x in (first, second))
    assert torch.equal(one, other)
