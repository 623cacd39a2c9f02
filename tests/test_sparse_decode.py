"""Sparse decode: the reference, its check, and every implementation of it."""

import math
from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench import registry
from dsa_bench.kernels import attention, sparse_decode_gluon
from dsa_bench.kernels.paging import pack_mla_rows, unpack_mla_rows
from dsa_bench.kernels.sparse_decode import (
    OPERATOR,
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
)
from dsa_bench.kernels.sparse_prefill import SparsePrefillInputs, make_attention_tensor
from dsa_bench.kernels.sparse_prefill import reference as prefill_reference
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.gluon_emulator import emulated_gluon

INF = float("inf")
H100 = Machine(device="cuda", name="H100", capability=(9, 0), num_sms=132)
CPU = Machine(device="cpu", name="a CPU")
PRECISIONS = ("fp8", "bf16")


def small(precision="fp8", seed=0, seq_len_q=2, topk=12):
    shape = SparseDecodeShape(
        batch_size=3, seq_len_kv=40, topk=topk, seq_len_q=seq_len_q, num_heads=2, page_size=17,
        precision=precision,
    )  # fmt: skip
    inputs = OPERATOR.make_inputs(shape, seed=seed, device="cpu")
    return replace(inputs, q=inputs.q * 16)  # with weak scores every key counts alike


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def key_from_bytes(row):
    """576 values of one 656-byte row, by the layout's words."""
    data = bytes(row.tolist())
    e4m3 = torch.tensor(list(data[:512]), dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = torch.frombuffer(bytearray(data[512:528]), dtype=torch.float32)
    rope = torch.frombuffer(bytearray(data[528:]), dtype=torch.bfloat16)
    latent = [float(e4m3[d]) * float(scales[d // 128]) for d in range(512)]
    return torch.cat([torch.tensor(latent, dtype=torch.float64), rope.double()])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_matches_loops(precision):
    inputs = small(precision)
    cache = inputs.kv_cache.flatten(0, 1)
    actual = OPERATOR.reference(inputs)
    for b in range(3):
        for j in range(2):
            rows = [cache[s] for s in inputs.topk_slots[b, j].tolist()]
            k = [key_from_bytes(r) if precision == "fp8" else r.double() for r in rows]
            for h in range(2):
                scores = [inputs.sm_scale * float(inputs.q[b, j, h].double() @ x) for x in k]
                total = sum(math.exp(s) for s in scores)
                out = sum(math.exp(s) / total * x[:512] for s, x in zip(scores, k, strict=True))
                torch.testing.assert_close(actual.out[b, j, h].double(), out, rtol=2e-5, atol=2e-6)
                assert actual.lse[b, j, h].item() == pytest.approx(math.log(total), rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutate", [hostile.plain, hostile.sparse_decode_wild])
def test_decode_is_prefill_over_the_unpacked_cache(precision, mutate):
    inputs = mutate(small(precision))
    lens = None if inputs.topk_lens is None else inputs.topk_lens.flatten()
    keys = unpack_mla_rows(inputs.kv_cache.flatten(0, 1))
    prefill = SparsePrefillInputs(
        inputs.q.flatten(0, 1), keys, inputs.topk_slots.flatten(0, 1), inputs.sm_scale,
        attn_sink=inputs.attn_sink, topk_lens=lens,
    )  # fmt: skip
    expected = prefill_reference(prefill)
    actual = OPERATOR.reference(inputs)
    assert_equal((actual.out.flatten(0, 1), actual.lse.flatten(0, 1)), (expected.out, expected.lse))
    assert actual.out.isfinite().all()


def test_fp8_cache_costs_little_accuracy():
    keys = make_attention_tensor(120, 576, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(100, dtype=torch.int32).view(1, 1, 100)
    q = make_attention_tensor(1, 1, 4, 576, generator=torch.Generator().manual_seed(2))
    outs = [
        OPERATOR.reference(
            SparseDecodeInputs(q, pack_mla_rows(keys, p).unflatten(0, (12, 10)), slots, 0.1352338)
        ).out
        for p in PRECISIONS
    ]
    error = (outs[0] - outs[1]).norm() / outs[1].norm()
    assert 1e-4 < error < 0.03


def test_an_empty_query_gives_zero_and_infinity():
    inputs = small()
    slots = inputs.topk_slots.clone()
    slots[1, 0], slots[2, 1] = -1, 51 * 3
    outputs = OPERATOR.reference(replace(inputs, topk_slots=slots))
    for b, j in ((1, 0), (2, 1)):
        assert (outputs.out[b, j] == 0).all()
        assert (outputs.lse[b, j] == INF).all()
    assert outputs.lse[0].isfinite().all()


def test_reference_of_some_sequences_in_small_chunks(monkeypatch):
    inputs = hostile.sparse_decode_wild(small())
    whole = OPERATOR.reference(inputs)
    monkeypatch.setattr(attention, "REFERENCE_CHUNK_ELEMENTS", 1)
    rows = torch.tensor([2, 0])
    assert_equal(OPERATOR.reference(inputs, rows=rows), [x[rows] for x in whole])


def test_inputs_stay_inside_their_own_pages():
    inputs = small()
    per_sequence = 3 * 17  # 40 tokens take three pages of 17
    owner = inputs.topk_slots // per_sequence
    assert torch.equal(owner, torch.arange(3).view(3, 1, 1).expand_as(owner).to(torch.int32))
    assert (inputs.topk_slots % per_sequence < 40).all()
    assert all(len(set(row)) == 12 for row in inputs.topk_slots.flatten(0, 1).tolist())


def _one_wrong_column(inputs, right):
    out = right.out.clone()
    out[1, 1, 0, 7] += 0.02
    return right._replace(out=out)


def _next_page(inputs, right):
    cache = inputs.kv_cache.roll(1, 0)
    return OPERATOR.reference(replace(inputs, kv_cache=cache))


WRONG = {
    "zeros": lambda inputs, right: SparseDecodeOutputs(*map(torch.zeros_like, right)),
    "stale": lambda inputs, right: OPERATOR.reference(small(seed=9)),
    "mtp-queries-swapped": lambda inputs, right: SparseDecodeOutputs(*(x.flip(1) for x in right)),
    "heads-before-queries": lambda inputs, right: right._replace(lse=right.lse.mT.contiguous()),
    "log2": lambda inputs, right: right._replace(lse=right.lse / math.log(2)),
    "one-slot-short": lambda inputs, right: OPERATOR.reference(
        replace(inputs, topk_slots=inputs.topk_slots[..., 1:])
    ),
    "next-page": _next_page,
    "wrong-scale": lambda inputs, right: OPERATOR.reference(replace(inputs, sm_scale=576**-0.5)),
    "wrong-column": _one_wrong_column,
    "nan": lambda inputs, right: right._replace(lse=right.lse * float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    assert not hostile.passes(OPERATOR.check(inputs, WRONG[name](inputs, right)))


def test_check_of_rows_looks_at_those_alone():
    inputs = small()
    right = OPERATOR.reference(inputs)
    wrong = right._replace(lse=right.lse.clone())
    wrong.lse[1] += 1
    assert hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([0, 2])))
    assert not hostile.passes(OPERATOR.check(inputs, wrong, rows=torch.tensor([1])))


@pytest.mark.parametrize(("precision", "row_bytes"), [("fp8", 656), ("bf16", 1152)])
def test_cost_counted_by_hand(precision, row_bytes):
    shape = SparseDecodeShape(
        batch_size=2, seq_len_kv=9, topk=4, seq_len_q=3, num_heads=5, precision=precision
    )
    cost = OPERATOR.cost(shape)
    assert cost.flops == 2 * 5 * (576 + 512) * 4 * 6
    assert cost.bytes_read == 6 * 5 * 576 * 2 + 6 * 4 * (row_bytes + 4)
    assert cost.bytes_written == 6 * 5 * (512 * 2 + 4)


def test_flops_a_token_of_v32():
    assert OPERATOR.cost(SparseDecodeShape(batch_size=1, seq_len_kv=32768)).flops == 278_528 * 2048


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_what_the_tensors_take(precision):
    shape = SparseDecodeShape(
        batch_size=2, seq_len_kv=70, topk=8, seq_len_q=2, num_heads=3, precision=precision
    )
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    outputs = OPERATOR.reference(inputs)
    memory = OPERATOR.memory(shape)
    tensors = (inputs.q, inputs.kv_cache, inputs.topk_slots)
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == outputs.out.numel() * 2 + outputs.lse.nbytes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"topk": None}, "topk has no value"), ({"topk": 129}, "topk 129 is more than the 128 keys")],
    ids=["no-topk", "topk-129"],
)
def test_a_case_that_makes_no_sense(fields, sentence):
    known = {"seq_len_q": 1, "seq_len_kv": 128, "topk": 32, "phase": "decode"} | fields
    with pytest.raises(Unsupported, match=sentence):
        OPERATOR.shape(Case(op="sparse_decode", impl="reference", **known), PRESETS["v3.2"])


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


def splits(num_queries, topk=2048, num_heads=128, precision="fp8"):
    return sparse_decode_gluon.choose_config(
        num_queries, num_heads, topk, 132, precision
    ).num_splits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_few_queries_are_split_and_many_are_not(precision):
    assert splits(1, precision=precision) == 16
    assert splits(132, precision=precision) == 1
    assert splits(1, topk=128, precision=precision) == 1


@pytest.mark.parametrize("topk", [1, 64, 128, 129, 256, 257, 300, 512, 1000, 1024, 2048, 4096])
def test_splits_cover_all_keys_and_none_is_empty(topk):
    for num_queries in (1, 2, 5, 16, 33, 66, 128, 300, 5000):
        for num_heads in (8, 64, 96, 128):
            for precision in PRECISIONS:
                config = sparse_decode_gluon.choose_config(
                    num_queries, num_heads, topk, 132, precision
                )
                pairs = -(-topk // 128)
                pairs_a_split = -(-pairs // config.num_splits)
                assert config.num_splits * pairs_a_split >= pairs
                assert (config.num_splits - 1) * pairs_a_split < pairs
                if precision == "fp8":
                    assert pairs_a_split != 2  # ptxas spills there
                registers = 2 * config.consumer_registers + config.loader_registers
                assert 4 * registers <= 12 * 168


def emulate(seed, shape, mutate, num_sms=1):
    """With one multiprocessor nothing is gained by a split."""
    mangle_type(torch.zeros(1))  # its first call imports Gluon: the real one is wanted
    inputs = mutate(OPERATOR.make_inputs(shape, seed=seed, device="cpu"))
    with emulated_gluon(seed=seed, num_sms=num_sms) as emulated, hostile.poisoned_outputs():
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
    assert sparse_decode_gluon.choose_config(2, 16, 385, 132, precision).num_splits == 4
    hostile.assert_right("sparse_decode", *emulate(7, shape, mutate, num_sms=132))


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
