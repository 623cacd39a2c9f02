"""Sparse decode: every implementation, emulated, interpreted and on a GPU."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench import registry
from dsa_bench.kernels import decode_config, seesaw_decode, sparse_decode_gluon
from dsa_bench.kernels.paging import pack_mla_rows
from dsa_bench.kernels.sparse_decode import (
    MAX_SPLITS,
    OPERATOR,
    PARTIAL_ROWS,
    SparseDecodeInputs,
    SparseDecodeShape,
)
from dsa_bench.kernels.sparse_prefill import make_attention_tensor
from dsa_bench.operator import Machine
from tests import hostile
from tests.gluon_emulator import emulated_gluon

NUM_SMS = 132
H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=NUM_SMS)
CPU = Machine(device="cpu", name="a CPU")
PRECISIONS = ("fp8", "bf16")


def small():
    shape = SparseDecodeShape(
        batch_size=3, seq_len_kv=40, topk=12, seq_len_q=2, num_heads=2, page_size=17
    )
    return OPERATOR.make_inputs(shape, seed=0, device="cpu")


MISTAKES = [
    ("q", lambda x: x.float(), TypeError, "q must be bfloat16"),
    ("q", lambda x: x[:, 0], ValueError, "q must be bfloat16 .batch_size, seq_len_q, num_heads"),
    ("q", lambda x: x[:, :, ::2], ValueError, "q must be contiguous"),
    ("kv_cache", lambda x: x.float(), TypeError, "kv_cache must be uint8 or bfloat16"),
    ("kv_cache", lambda x: x[..., :655], ValueError, "kv_cache must be uint8 .*row=656"),
    ("topk_slots", lambda x: x.long(), TypeError, "topk_slots must be int32"),
    ("topk_slots", lambda x: x[:2], ValueError, "topk_slots must be int32 .batch_size=3"),
    ("topk_lens", lambda x: torch.ones(3, 1).int(), ValueError, "topk_lens must be int32"),
    ("attn_sink", lambda x: torch.ones(3), ValueError, "attn_sink must be float32 .num_heads=2"),
    ("sm_scale", lambda x: -1.0, ValueError, "sm_scale must be > 0, got -1.0"),
]


@pytest.mark.parametrize("kernels", hostile.names("sparse_decode"))
@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_kernels_refuse(name, change, kind, sentence, kernels):
    inputs = small()
    wrong = replace(inputs, **{name: change(getattr(inputs, name))})
    with pytest.raises(kind, match=sentence):
        registry.implementation("sparse_decode", kernels).run(wrong)


def test_gluon_supports_says_why_not():
    shape = SparseDecodeShape(batch_size=1, seq_len_kv=4096)
    assert sparse_decode_gluon.supports(shape, H100) is None
    assert "needs a Hopper GPU (sm_90), this is a CPU" in sparse_decode_gluon.supports(shape, CPU)


def test_few_queries_over_bf16_rows_are_split_and_many_are_not():
    assert seesaw_decode.choose_splits(1, 128, 2048, NUM_SMS) == 16
    assert seesaw_decode.choose_splits(132, 128, 2048, NUM_SMS) == 1
    assert seesaw_decode.choose_splits(1, 128, 128, NUM_SMS) == 1


@pytest.mark.parametrize("topk", [1, 64, 128, 129, 256, 257, 300, 512, 1000, 1024, 2048, 4096])
def test_splits_of_bf16_rows_cover_all_keys_and_none_is_empty(topk):
    pairs = -(-topk // seesaw_decode.PAIR)
    for num_queries in (1, 2, 5, 16, 33, 66, 128, 300, 5000):
        for num_heads in (1, 8, 64, 96, 128, 130):
            num_splits = seesaw_decode.choose_splits(num_queries, num_heads, topk, NUM_SMS)
            pairs_a_split = -(-pairs // num_splits)
            assert (num_splits - 1) * pairs_a_split < pairs <= num_splits * pairs_a_split
            assert num_splits <= MAX_SPLITS
            # from which memory is predicted
            assert num_splits == 1 or num_splits * num_queries * num_heads <= PARTIAL_ROWS


def test_registers_of_the_bf16_kernel_fit():
    consumer = seesaw_decode.CONSUMER_REGISTERS
    assert 4 * (2 * consumer + seesaw_decode.LOADER_REGISTERS) <= 12 * 168


def is_split(inputs):
    """Whether the kernel for this cache splits the keys of so many queries."""
    queries, heads = inputs.q.shape[0] * inputs.q.shape[1], inputs.q.shape[2]
    sizes = (queries, heads, inputs.topk_slots.shape[2], NUM_SMS)
    if inputs.kv_cache.dtype == torch.uint8:
        config = decode_config.choose_config(*sizes)
        return decode_config.divide(queries, -(-sizes[2] // 64), config).num_partial > 0
    return seesaw_decode.choose_splits(*sizes) > 1


def emulate(seed, shape, mutate, num_sms=1):
    """With one multiprocessor nothing is gained by a split; `test_row_decode.py` has more of
    the kernel for fp8."""
    mangle_type(torch.zeros(1))  # its first call imports Gluon: the real one is wanted
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    assert is_split(inputs) or num_sms == 1
    with (
        emulated_gluon(seed=seed, num_sms=num_sms) as emulated,
        hostile.poisoned_outputs(),
    ):
        module = emulated.load("dsa_bench.kernels.sparse_decode_gluon")
        outputs = module.run(inputs)
    return inputs, outputs


def decode_shape(batch_size, seq_len_q, topk, num_heads, precision, page_size=64):
    return SparseDecodeShape(
        batch_size=batch_size, seq_len_kv=topk + 30, topk=topk, seq_len_q=seq_len_q,
        num_heads=num_heads, precision=precision, page_size=page_size,
    )  # fmt: skip


EMULATED = [
    (0, decode_shape(1, 1, 128, 64, "fp8"), hostile.plain),
    (1, decode_shape(1, 2, 300, 16, "fp8", page_size=17), hostile.sparse_decode_wild),
    (2, decode_shape(3, 1, 257, 72, "fp8"), hostile.sparse_decode_wild),
    (3, decode_shape(1, 1, 128, 64, "bf16"), hostile.plain),
    (4, decode_shape(2, 2, 300, 16, "bf16", page_size=17), hostile.sparse_decode_wild),
    (5, decode_shape(1, 1, 1, 8, "fp8"), hostile.plain),
]


@pytest.mark.parametrize(
    ("seed", "shape", "mutate"),
    EMULATED,
    ids=[f"{hostile.label(shape)}-{mutate.__name__}" for _, shape, mutate in EMULATED],
)
def test_gluon_emulated(seed, shape, mutate):
    hostile.assert_right("sparse_decode", *emulate(seed, shape, mutate))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gluon_emulated_peaked_is_as_exact_as_bf16(precision):
    inputs, outputs = emulate(6, decode_shape(1, 1, 384, 64, precision), hostile.peaked)
    hostile.assert_as_exact_as_bf16(inputs, outputs.out)


@pytest.mark.interpret  # the merge of the splits is a Triton kernel
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutate", [hostile.plain, hostile.sparse_decode_wild])
def test_gluon_emulated_in_splits(precision, mutate):
    shape = decode_shape(1, 2, 385, 16, precision)
    hostile.assert_right("sparse_decode", *emulate(7, shape, mutate, num_sms=NUM_SMS))


def nan_in_one_query(inputs):
    """Of query 1; query 2 has no key at all."""
    inputs = hostile.nan_in_query(1, inputs)
    inputs.topk_slots[1, 0] = -1
    return inputs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gluon_emulated_nan_of_a_listed_row_shows(precision):
    outputs = emulate(8, decode_shape(2, 2, 257, 16, precision), nan_in_one_query)
    hostile.assert_nan_shows("sparse_decode", *outputs)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gluon_emulated_nan_shows_in_splits(precision):
    """The split with NaN must not be taken for one without a key."""
    shape = decode_shape(2, 2, 385, 16, precision)
    hostile.assert_nan_shows("sparse_decode", *emulate(9, shape, nan_in_one_query, num_sms=NUM_SMS))


@pytest.mark.interpret
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gluon_emulated_splits_behind_the_length_are_empty(precision):
    def shorten(inputs):
        lens = torch.tensor([[-(2**31), 1], [129, 2**31 - 1]], dtype=torch.int32)
        return replace(inputs, topk_lens=lens)

    shape = decode_shape(2, 2, 385, 16, precision)
    inputs, outputs = emulate(10, shape, shorten, num_sms=NUM_SMS)
    hostile.assert_right("sparse_decode", inputs, outputs)
    assert not outputs.out[0, 0].any()
    assert (outputs.lse[0, 0] == hostile.INF).all()


INTERPRETED = [
    (0, decode_shape(1, 1, 1, 3, "fp8"), hostile.plain),
    (1, decode_shape(3, 2, 130, 20, "fp8", page_size=17), hostile.sparse_decode_wild),
    (2, decode_shape(2, 1, 150, 70, "bf16"), hostile.sparse_decode_wild),
]


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("name", [n for n in hostile.names("sparse_decode") if n == "triton"])
@pytest.mark.parametrize(("seed", "shape", "mutate"), INTERPRETED)
def test_triton_interpreted(seed, shape, mutate, name):
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    with hostile.poisoned_outputs():
        outputs = registry.implementation("sparse_decode", name).run(inputs)
    hostile.assert_right("sparse_decode", inputs, outputs)


def _decode(batch_size, seq_len_kv, precision, **sizes):
    return SparseDecodeShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, precision=precision, **sizes
    )


SHAPES = [
    shape
    for precision in PRECISIONS
    for shape in (
        _decode(1, 8192, precision),
        _decode(4, 4096, precision, seq_len_q=4),
        _decode(128, 2500, precision, num_heads=64, seq_len_q=2),
        _decode(5, 700, precision, topk=300, num_heads=16, page_size=32),
        _decode(3, 700, precision, topk=257, num_heads=48, page_size=17, seq_len_q=3),
        _decode(7, 1100, precision, topk=1024, num_heads=32),
        _decode(2, 600, precision, topk=512, num_heads=8),
        _decode(6, 100, precision, topk=1, num_heads=8),
        _decode(160, 2048, precision),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "mutate"), hostile.cases("sparse_decode", SHAPES))
def test_sparse_decode_matches_reference(name, shape, mutate):
    hostile.assert_implementation("sparse_decode", name, shape, mutate)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [3, 160], ids=["split", "whole"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", hostile.names("sparse_decode"))
def test_sparse_decode_nan_of_a_listed_row_shows(name, precision, batch_size):
    shape = _decode(batch_size, 4096, precision)
    implementation = hostile.runnable("sparse_decode", name, shape)
    inputs = hostile.nan_in_query(1, OPERATOR.make_inputs(shape, seed=4, device="cuda"))
    hostile.assert_nan_shows("sparse_decode", inputs, implementation.run(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", hostile.names("sparse_decode"))
def test_sparse_decode_peaked_is_as_exact_as_bf16(name, precision):
    shape = _decode(8, 4096, precision)
    implementation = hostile.runnable("sparse_decode", name, shape)
    inputs = hostile.peaked(OPERATOR.make_inputs(shape, seed=3, device="cuda"))
    hostile.assert_as_exact_as_bf16(inputs, implementation.run(inputs).out)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "num_pages"),
    # beyond 2^31 words of 4 bytes, and beyond 2^31 bf16
    [("fp8", 2**31 // 164 // 64 + 64), ("bf16", 2**31 // 576 // 64 + 64)],
    ids=PRECISIONS,
)
@pytest.mark.parametrize("name", hostile.names("sparse_decode"))
def test_sparse_decode_reads_slots_beyond_2_31_elements(name, precision, num_pages):
    shape = _decode(2, num_pages * 64, precision, topk=512)
    implementation = hostile.runnable("sparse_decode", name, shape)
    g = torch.Generator(device="cuda").manual_seed(0)
    last = pack_mla_rows(make_attention_tensor(40, 64, 576, generator=g), precision)
    cache = torch.zeros(num_pages, *last.shape[1:], dtype=last.dtype, device="cuda")
    cache[-40:] = last
    slots = torch.randint(0, 40 * 64, (2, 1, 512), generator=g, device="cuda", dtype=torch.int32)
    q = make_attention_tensor(2, 1, 128, 576, generator=g)
    inputs = SparseDecodeInputs(q, cache, slots + (num_pages - 40) * 64, shape.sm_scale)
    hostile.assert_right("sparse_decode", inputs, implementation.run(inputs))
