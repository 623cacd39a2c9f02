"""Reading of one sequence out of the paged caches: the reference, its check, the kernels."""

from dataclasses import replace

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels import cache_read_triton
from dsa_bench.kernels.cache_read import OPERATOR, CacheReadOutputs, CacheReadShape
from dsa_bench.kernels.paging import pack_index_pages, pack_mla_rows, unpack_mla_rows
from dsa_bench.operator import Machine
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

PRECISIONS = ("fp8", "bf16", "fp32")
NAN_BYTE = 0xFF


def wild(inputs):
    """NaN in slots that are not read and in one that is, a scale that is no power of two, wild
    pages behind the last; the table is a slice of a larger one."""
    kv_cache, cache = inputs.kv_cache.clone(), inputs.index_cache
    page, offset = inputs.block_table[-1].long(), inputs.num_tokens % inputs.page_size
    by_byte = kv_cache.view(torch.uint8)
    if offset:
        by_byte[page, offset:] = NAN_BYTE
    first = inputs.block_table[0].long()
    by_byte[first, 0] = NAN_BYTE
    if kv_cache.dtype == torch.uint8:
        third = inputs.block_table[3 % len(inputs.block_table)].long()
        kv_cache.view(torch.float32)[third, 0, 128] = 0.3
    if cache is not None:
        cache = cache.clone()
        cache.view(torch.uint8)[first, :128] = NAN_BYTE
    behind = torch.full((5,), 2**31 - 1, dtype=torch.int32, device=kv_cache.device)
    table = torch.cat([inputs.block_table, behind])[:-2]
    return replace(inputs, kv_cache=kv_cache, index_cache=cache, block_table=table)


MUTATIONS = {"plain": hostile.plain, "wild": wild}


def shape_of(num_tokens, page_size=64, precision="fp8", with_index=True):
    return CacheReadShape(
        num_tokens=num_tokens, page_size=page_size, precision=precision, with_index=with_index
    )


def small(precision="fp8", seed=0, num_tokens=45, page_size=7):
    shape = shape_of(num_tokens, page_size, precision)
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_gives_back_what_was_packed(precision):
    """Tokens 0 … 9 in pages 2, 0 and 3 of 4, three on each page."""
    g = torch.Generator().manual_seed(0)
    kv, k = torch.randn(12, 576, generator=g), torch.randn(12, 128, generator=g)
    table = torch.tensor([2, 0, 3, 2**31 - 1], dtype=torch.int32)
    inputs = replace(
        small(precision, num_tokens=12, page_size=3), block_table=table, num_tokens=8,
        kv_cache=pack_mla_rows(kv, precision).view(4, 3, -1),
        index_cache=pack_index_pages(k.view(4, 3, 128), precision),
    )  # fmt: skip
    out = OPERATOR.reference(inputs)
    places = [6, 7, 8, 0, 1, 2, 9, 10]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert out.kv.dtype == dtype
    assert torch.equal(out.kv.float(), unpack_mla_rows(pack_mla_rows(kv[places], precision)))
    error = {"fp8": 1 / 16, "bf16": 2**-8, "fp32": 0.0}[precision]
    back = out.index_k.float() * out.index_k_scale[:, None]
    assert ((back - k[places]).abs() <= k[places].abs() * error + 0.01 * (error > 0.01)).all()
    is_fp8 = precision == "fp8"
    assert out.index_k.dtype == (torch.float8_e4m3fn if is_fp8 else dtype)
    assert is_fp8 or (out.index_k_scale == 1).all()


def test_reference_takes_rows_and_no_index_cache():
    inputs = small()
    out, rows = OPERATOR.reference(inputs), torch.tensor([44, 3])
    few = OPERATOR.reference(inputs, rows=rows)
    for whole, part in zip(out, few, strict=True):
        assert torch.equal(hostile.bits(whole).view(45, -1)[rows], hostile.bits(part).view(2, -1))
    bare = OPERATOR.reference(replace(inputs, index_cache=None))
    assert torch.equal(bare.kv, out.kv) and bare[1:] == (None, None)


WRONG = {
    "zeros": lambda out: out._replace(kv=torch.zeros_like(out.kv)),
    "one-element": lambda out: out._replace(kv=out.kv.index_fill(1, torch.tensor(575), 0.25)),
    "index-shifted": lambda out: out._replace(
        index_k=out.index_k.view(torch.uint8).roll(1, 0).view(out.index_k.dtype)
    ),
    "scale-shifted": lambda out: out._replace(index_k_scale=out.index_k_scale * 2),
    "one-row-short": lambda out: CacheReadOutputs(*(x[:-1] for x in out)),
    "no-index": lambda out: CacheReadOutputs(out.kv, None, None),
    "wider": lambda out: out._replace(kv=out.kv.float()),
    "nan": lambda out: out._replace(kv=out.kv.index_fill(0, torch.tensor(0), float("nan"))),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name):
    inputs = small()
    right = OPERATOR.reference(inputs)
    assert hostile.passes(OPERATOR.check(inputs, right))
    wrong = WRONG[name](right)
    assert not hostile.passes(OPERATOR.check(inputs, wrong))


def test_check_looks_at_rows_alone():
    inputs = small()
    right = OPERATOR.reference(inputs)
    right.kv[7] = 9.0
    assert hostile.passes(OPERATOR.check(inputs, right, rows=torch.tensor([0, 44])))
    assert not hostile.passes(OPERATOR.check(inputs, right, rows=torch.tensor([0, 7])))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("with_index", [True, False])
def test_cost_and_memory_counted_by_hand(precision, with_index):
    shape = shape_of(20, 8, precision, with_index)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    outputs = OPERATOR.reference(inputs)
    tensors = [inputs.kv_cache, inputs.block_table, *[inputs.index_cache] * with_index]
    assert memory.input_bytes == sum(x.nbytes for x in tensors)
    assert memory.output_bytes == sum(x.nbytes for x in outputs if x is not None)
    assert cost.bytes_written == memory.output_bytes
    row = {"fp8": 656 + 132 * with_index, "bf16": 1152 + 256 * with_index}
    assert cost.bytes_read == 20 * row.get(precision, 2304 + 512 * with_index) + 12
    assert cost.flops == 0


def test_shape_of_a_case():
    case = Case(op="cache_read", impl="x", phase="prefill", seq_len_kv=999, seq_len_q=64)
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    assert (shape.num_tokens, shape.page_size, shape.max_pages) == (999, 64, 16)


MISTAKES = [
    ("kv_cache", lambda x: x.float(), TypeError, "kv_cache must be uint8 or bfloat16"),
    ("kv_cache", lambda x: x[:, :-1], ValueError, "kv_cache must be uint8 or .*page_size=7"),
    ("kv_cache", lambda x: x[::2], ValueError, "index_cache must be uint8 .num_pages=4"),
    ("index_cache", lambda x: x[:, :-4], ValueError, "index_cache must be uint8 .*page_width=924"),
    ("block_table", lambda x: x.long(), TypeError, "block_table must be int32"),
    ("block_table", lambda x: x[:2], ValueError, "num_tokens must be 0 … max_pages"),
    ("num_tokens", lambda x: -1, ValueError, "num_tokens must be 0 … .*got -1"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_triton_refuses(name, change, kind, sentence):
    inputs = small()
    with pytest.raises(kind, match=sentence):
        cache_read_triton.run(replace(inputs, **{name: change(getattr(inputs, name))}))


def test_triton_refuses_caches_with_gaps():
    inputs = small()
    wide = torch.zeros(7, 8, 656, dtype=torch.uint8)[:, :7]
    with pytest.raises(ValueError, match="kv_cache must be contiguous and aligned"):
        cache_read_triton.run(replace(inputs, kv_cache=wide))


def test_nothing_to_read():
    inputs = replace(small(), num_tokens=0, block_table=torch.zeros(0, dtype=torch.int32))
    out = cache_read_triton.run(inputs)
    assert [tuple(x.shape) for x in out] == [(0, 576), (0, 128), (0,)]
    assert hostile.passes(OPERATOR.check(inputs, out))


@pytest.mark.parametrize(
    ("precision", "capability", "reason"),
    [
        ("fp8", None, "triton cache_read in fp8 needs sm_89 or newer, this is x"),
        ("fp8", (8, 0), "triton cache_read in fp8 needs sm_89 or newer, this is x"),
        ("bf16", (8, 0), None),
        ("fp32", (9, 0), "triton cache_read reads fp8 and bf16, this case is fp32"),
    ],
)
def test_triton_supports(precision, capability, reason):
    machine = Machine(device="cuda", name="x", capability=capability)
    assert cache_read_triton.supports(shape_of(9, precision=precision), machine) == reason


@pytest.mark.interpret
@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_triton_interpreted(precision, page_size, mutate):
    inputs = mutate(small(precision, page_size, 75, page_size))
    with hostile.poisoned_outputs():
        outputs = cache_read_triton.run(inputs)
        bare = cache_read_triton.run(replace(inputs, index_cache=None))
    hostile.assert_right("cache_read", inputs, outputs)
    assert torch.equal(hostile.bits(bare.kv), hostile.bits(outputs.kv))
    assert bare[1:] == (None, None)


SHAPES = [
    shape_of(1), shape_of(3000), shape_of(777, 17), shape_of(70, 1), shape_of(40000),
    shape_of(3000, precision="bf16"), shape_of(777, 7, "bf16"),
    shape_of(500, with_index=False), shape_of(500, precision="bf16", with_index=False),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", hostile.names("cache_read"))
def test_cache_read_matches_reference(name, shape, mutate):
    implementation = hostile.runnable("cache_read", name, shape)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=1, device="cuda"))
    with hostile.poisoned_outputs():
        outputs = implementation.run(inputs)
    hostile.assert_right("cache_read", inputs, outputs)


@pytest.mark.gpu
def test_cache_read_reaches_beyond_two_gibibytes():
    """A row whose first byte, counted from the cache's, does not fit in 32 bits."""
    cache = torch.zeros(52000, 64, 656, dtype=torch.uint8, device="cuda")
    cache[-1] = small(num_tokens=64, page_size=64).kv_cache[0].cuda()
    table = torch.tensor([cache.shape[0] - 1], dtype=torch.int32, device="cuda")
    out = cache_read_triton.cache_read(cache, None, table, 64, page_size=64)
    assert torch.equal(out.kv, unpack_mla_rows(cache[-1]).bfloat16())
    assert registry.implementation("cache_read", "triton").run is cache_read_triton.run
