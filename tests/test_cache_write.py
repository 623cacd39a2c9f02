"""Caching of new tokens: the reference, its check, and every implementation of it."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import cache_write_triton
from dsa_bench.kernels.cache_write import OPERATOR, CacheWriteShape
from dsa_bench.kernels.cache_write_triton import CacheWriteConfig, choose_config
from dsa_bench.kernels.paging import split_index_pages, unpack_index_pages, unpack_mla_rows
from dsa_bench.operator import Machine, Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile

PRECISIONS = ("fp8", "bf16", "fp32")


def shape_of(
    batch_size, seq_len_kv, seq_len_q=1, page_size=64, precision="fp8", with_index=True
):  # fmt: skip
    return CacheWriteShape(
        batch_size=batch_size, seq_len_kv=seq_len_kv, seq_len_q=seq_len_q, page_size=page_size,
        precision=precision, with_index=with_index,
    )  # fmt: skip


def small(precision="fp8", seed=0, page_size=7, tokens=21):
    """Tokens of three sequences."""
    shape = shape_of(3, 40, tokens // 3, page_size, precision)
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


def few(inputs, tokens):
    """The first tokens alone."""
    names = ("kv", "index_k", "positions", "slots")
    return replace(inputs, **{name: getattr(inputs, name)[:tokens] for name in names})


def poisoned(inputs, seed=3):
    """The same call on caches full of random bytes, NaN of every kind among them."""
    g = torch.Generator(device=inputs.slots.device).manual_seed(seed)
    caches = {}
    for name in ("kv_cache", "index_cache"):
        cache = getattr(inputs, name)
        if cache is not None:
            size = cache.view(torch.uint8).shape
            noise = torch.randint(0, 256, size, generator=g, device=cache.device)
            caches[name] = noise.to(torch.uint8).view(cache.dtype)
    return replace(inputs, **caches)


def wild(inputs):
    """Slots out of range whose tokens and positions are wild too; shuffled tokens, rows of zeros,
    huge and tiny ones."""
    tokens, device = inputs.slots.shape[0], inputs.slots.device
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).to(device)
    kv, slots, positions = (x[order] for x in (inputs.kv, inputs.slots, inputs.positions))
    num_slots = inputs.kv_cache.shape[0] * inputs.page_size
    index_k = torch.zeros(tokens, 128, device=device) if inputs.index_k is None else inputs.index_k
    index_k = index_k[order].to(kv.dtype)
    invalid = (-1, hostile.LEAST, num_slots, 2**31 - 1)
    for token, slot in zip(range(0, tokens - 4, 3), invalid, strict=False):
        slots[token], positions[token] = slot, 2**31 - 1
        kv[token], index_k[token] = hostile.NAN, hostile.INF
    for token, size in ((1, 0.0), (2, 1e12), (4, 1e-20)):
        kv[token % tokens] *= size
        index_k[token % tokens] *= size
    with_index = inputs.index_k is not None
    return replace(
        inputs, kv=kv, slots=slots, positions=positions, index_k=index_k if with_index else None
    )


MUTATIONS = {"plain": hostile.plain, "wild": wild}


def unwritten(inputs):
    """[num_pages, page_size] bool."""
    num_slots = inputs.kv_cache.shape[0] * inputs.page_size
    slots = inputs.slots[(inputs.slots >= 0) & (inputs.slots < num_slots)].long()
    left = torch.ones(num_slots, dtype=torch.bool, device=slots.device)
    left[slots] = False
    return left.view(-1, inputs.page_size)


def untouched_bytes(inputs):
    """All bytes of both caches that no token of this call may change."""
    left = unwritten(inputs)
    parts = [hostile.bits(inputs.kv_cache)[left]]
    if inputs.index_cache is not None:
        values, scale = split_index_pages(inputs.index_cache, inputs.page_size)
        parts += [values.view(torch.uint8)[left]] + ([] if scale is None else [scale[left]])
    return [hostile.bits(part) for part in parts]


def assert_writes(inputs, run):
    """`run` writes the right rows, in place, and no other byte of two poisoned caches."""
    inputs = poisoned(inputs)
    before = untouched_bytes(inputs)
    outputs = run(inputs)
    assert outputs.kv_cache is inputs.kv_cache and outputs.index_cache is inputs.index_cache
    for one, other in zip(before, untouched_bytes(inputs), strict=True):
        assert torch.equal(one, other)
    hostile.assert_right("cache_write", inputs, outputs)
    return outputs


def by_hand(inputs, token):
    """(latent and key, index key) of one token, in fp64 and element by element."""
    x, position = inputs.kv[token].double().tolist(), int(inputs.positions[token])
    table = inputs.rope_table[position].tolist()
    root = math.sqrt(sum(v * v for v in x[:512]) / 512 + inputs.eps)
    row = [v / root * w for v, w in zip(x[:512], inputs.kv_norm.tolist(), strict=True)]
    for i in range(32):
        a, b = x[512 + 2 * i : 514 + 2 * i]
        c, s = table[i], table[32 + i]
        row += [a * c - b * s, a * s + b * c]
    y = inputs.index_k[token].double()
    y = (y - y.mean()) / (y.var(correction=0) + inputs.eps).sqrt()
    y = (y * inputs.index_norm_weight + inputs.index_norm_bias).tolist()
    turned = list(y)
    for i in range(32):
        c, s = table[i], table[32 + i]
        turned[i] = y[i] * c - y[i + 32] * s
        turned[i + 32] = y[i] * s + y[i + 32] * c
    key = [
        sum(v * (-1) ** (i & j).bit_count() for j, v in enumerate(turned)) / math.sqrt(128)
        for i in range(128)
    ]
    return torch.tensor(row), torch.tensor(key)


@pytest.mark.parametrize(("precision", "limit"), [("fp8", 1 / 16), ("bf16", 0.01), ("fp32", 1e-5)])
def test_reference_by_hand(precision, limit):
    inputs = small(precision)
    if precision == "fp32":
        inputs = replace(inputs, kv=inputs.kv.float(), index_k=inputs.index_k.float())
    out = OPERATOR.reference(inputs)
    latents = unpack_mla_rows(out.kv_cache).flatten(0, 1)
    values, scale = unpack_index_pages(out.index_cache, 7)
    keys = (values * scale.unsqueeze(-1)).flatten(0, 1)
    for token in (0, 8, 20):
        row, key = by_hand(inputs, token)
        slot = int(inputs.slots[token])
        assert ((latents[slot] - row).abs() <= limit * (row.abs() + 0.1)).all()
        assert ((keys[slot] - key).abs() <= limit * (key.abs() + 1)).all()
        rope_limit = min(limit, 0.01)
        assert ((latents[slot] - row)[512:].abs() <= rope_limit * (row[512:].abs() + 0.1)).all()


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_writes_its_slots_and_no_other(precision, page_size, mutate):
    assert_writes(mutate(small(precision, page_size=page_size)), OPERATOR.reference)


def test_tokens_lie_where_the_block_table_of_their_sequence_says():
    """Positions 33 … 39 of each of three sequences, in pages of seven, none of them twice."""
    inputs = small()
    assert inputs.positions.tolist() == [*range(33, 40)] * 3
    assert len(set(inputs.slots.tolist())) == 21
    for token in range(1, 21):
        same_page = token % 7 >= 3 and token % 7 != 0  # 35 begins a page
        follows = int(inputs.slots[token]) == int(inputs.slots[token - 1]) + 1
        assert follows or not same_page
    assert (inputs.slots % 7 == inputs.positions % 7).all()


def test_fp32_is_not_rounded_before_it_is_quantised():
    """An fp8 cache of fp32 tensors differs from one of the same tensors in bf16, in few values."""
    inputs = small()
    exact = poisoned(replace(inputs, kv=inputs.kv.float(), index_k=inputs.index_k.float()))
    rows = [OPERATOR.reference(x).kv_cache.view(-1, 656)[inputs.slots] for x in (inputs, exact)]
    different = (rows[0][:, :512] != rows[1][:, :512]).float().mean()
    assert 0 < different < 0.1


def broken(change):
    """The reference on other tensors, in the same caches."""
    return lambda inputs: OPERATOR.reference(change(inputs))


WRONG = {
    "nothing-written": lambda inputs: inputs,
    "positions-one-off": broken(lambda x: replace(x, positions=(x.positions - 1))),
    "no-rotation": broken(lambda x: replace(x, rope_table=x.rope_table[:1].expand(40, 64))),
    "no-norm-weight": broken(lambda x: replace(x, kv_norm=torch.ones_like(x.kv_norm))),
    "no-bias": broken(lambda x: replace(x, index_norm_bias=0 * x.index_norm_bias)),
    "one-token-missing": broken(lambda x: few(x, 20)),
    "tokens-shifted": broken(lambda x: replace(x, kv=x.kv.roll(1, 0))),
    "keys-shifted": broken(lambda x: replace(x, index_k=x.index_k.roll(1, 0))),
    "slots-shifted": broken(lambda x: replace(x, slots=x.slots.roll(1, 0))),
}


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("name", WRONG)
def test_check_fails(name, precision):
    inputs = small(precision)
    wrong = WRONG[name](inputs)
    assert not hostile.passes(OPERATOR.check(inputs, wrong))
    assert hostile.passes(OPERATOR.check(inputs, OPERATOR.reference(inputs)))


def damage(part, precision="fp8"):
    """Outputs of the reference with one thing wrong in the row of token 5."""
    inputs = small(precision)
    out = OPERATOR.reference(inputs)
    page, offset = divmod(int(inputs.slots[5]), 7)
    part(out.kv_cache[page, offset], out.index_cache[page], offset)
    return inputs, out


DAMAGES = {
    "interleaved-as-half-split": lambda row, page, o: row[528:].copy_(row[528:].roll(64)),
    "latent-scale-doubled": lambda row, page, o: row.view(torch.float32)[129].mul_(2),
    "scale-not-least": lambda row, page, o: (
        row.view(torch.float32)[128].mul_(2),
        row.view(torch.float8_e4m3fn)[:128].copy_(row.view(torch.float8_e4m3fn)[:128].float() / 2),
    ),
    "index-scale-of-another": lambda row, page, o: page.view(torch.float32)[224 + o].mul_(0.5),
    "index-interleaved-by-token": lambda row, page, o: page[: 7 * 128].copy_(
        page[: 7 * 128].roll(-4)
    ),
    "one-large-value": lambda row, page, o: row[100].fill_(0x7E),
    "nan": lambda row, page, o: row[511].fill_(0xFF),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_check_sees_damage_in_one_row(name):
    inputs, out = damage(DAMAGES[name])
    assert not hostile.passes(OPERATOR.check(inputs, out))
    assert not hostile.passes(OPERATOR.check(inputs, out, rows=torch.tensor([2, 5])))


def test_check_looks_at_rows_alone_and_at_shapes():
    inputs, out = damage(DAMAGES["nan"])
    assert hostile.passes(OPERATOR.check(inputs, out, rows=torch.tensor([0, 20])))
    assert not hostile.passes(OPERATOR.check(inputs, out._replace(index_cache=None)))
    assert not hostile.passes(OPERATOR.check(inputs, out._replace(kv_cache=out.kv_cache[:, :1])))


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_cost_and_memory_counted_by_hand(precision, with_index):
    shape = shape_of(3, 40, 7, 16, precision, with_index)
    cost, memory = OPERATOR.cost(shape), OPERATOR.memory(shape)
    row, index_row = {"fp8": (656, 132), "bf16": (1152, 256)}[precision]
    assert cost.bytes_written == 21 * (row + index_row * with_index)
    read = 21 * (1152 + 8 + 256 * with_index) + 7 * 256 + 1024 + 1024 * with_index
    assert (cost.bytes_read, cost.flops) == (read, 0)
    inputs = OPERATOR.make_inputs(shape, seed=0, device="cpu")
    small_tensors = (inputs.kv_norm, inputs.index_norm_weight, inputs.index_norm_bias,
                     inputs.positions, inputs.slots, inputs.rope_table)  # fmt: skip
    caches = [inputs.kv_cache, *[inputs.index_cache] * with_index]
    held = sum(x.nbytes for x in (*small_tensors, *caches)) + inputs.kv.untyped_storage().nbytes()
    assert (memory.input_bytes, memory.output_bytes) == (held, 0)


def test_shapes_of_cases():
    case = Case(op="cache_write", impl="x", phase="prefill", seq_len_kv=999, seq_len_q=64)
    shape = OPERATOR.shape(case, PRESETS["v3.2"])
    assert (shape.num_tokens, shape.page_size, OPERATOR.num_rows(shape)) == (64, 64, 64)
    case = replace(case, phase="decode", seq_len_q=2, batch_size=5)
    assert OPERATOR.shape(case, PRESETS["v3.2"]).num_tokens == 10
    with pytest.raises(Unsupported, match="seq_len_q 1000 must be"):
        OPERATOR.shape(replace(case, seq_len_q=1000), PRESETS["v3.2"])


MISTAKES = [
    ("kv", lambda x: x.float(), TypeError, "kv must be bfloat16 .num_tokens, head_dim_qk=576"),
    ("kv", lambda x: x[:, :512], ValueError, "kv must be bfloat16 .num_tokens, head_dim_qk=576"),
    ("kv", lambda x: x.T.contiguous().T, ValueError, "kv must be contiguous in its last"),
    ("kv_norm", lambda x: x.float(), TypeError, "kv_norm must be bfloat16"),
    ("index_k", lambda x: x[:5], ValueError, "index_k must be bfloat16 .num_tokens=21"),
    ("index_k", lambda x: None, ValueError, "index_k and index_cache must both be given"),
    ("index_norm_bias", lambda x: x.bfloat16(), TypeError, "index_norm_bias must be float32"),
    ("positions", lambda x: x.long(), TypeError, "positions must be int32"),
    ("rope_table", lambda x: x[:, :32], ValueError, "rope_table must be float32 .num_positions, "),
    ("rope_table", lambda x: x[::2], ValueError, "rope_table must be contiguous and aligned"),
    ("slots", lambda x: x[:-1], ValueError, "slots must be int32 .num_tokens=21"),
    ("kv_cache", lambda x: x.int(), TypeError, "kv_cache must be uint8 or bfloat16"),
    ("kv_cache", lambda x: x[:, :5], ValueError, "kv_cache must be uint8 or .*page_size=7"),
    ("index_cache", lambda x: x[:2], ValueError, "index_cache must be uint8 .num_pages=18"),
    ("index_cache", lambda x: x[:, 4:], ValueError, "index_cache must be uint8 .*page_width=924"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "sentence"), MISTAKES, ids=hostile.slugs(MISTAKES)
)
def test_triton_refuses(name, change, kind, sentence):
    inputs = small()
    with pytest.raises(kind, match=sentence):
        cache_write_triton.run(replace(inputs, **{name: change(getattr(inputs, name))}))


@pytest.mark.parametrize(
    ("precision", "capability", "reason"),
    [
        ("fp8", None, "triton cache_write in fp8 needs sm_89 or newer, this is x"),
        ("fp8", (8, 0), "triton cache_write in fp8 needs sm_89 or newer, this is x"),
        ("bf16", (8, 0), None),
        ("fp32", (9, 0), "triton cache_write writes fp8 and bf16, this case is fp32"),
    ],
)
def test_triton_supports(precision, capability, reason):
    machine = Machine(device="cuda", name="x", capability=capability)
    assert cache_write_triton.supports(shape_of(1, 9, precision=precision), machine) == reason


@pytest.mark.parametrize("run", [OPERATOR.reference, cache_write_triton.run])
def test_no_tokens(run):
    assert_writes(few(small(), 0), run)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum of a token to be skipped
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_triton_interpreted(precision, page_size, mutate):
    inputs = mutate(small(precision, page_size=page_size))
    outputs = assert_writes(inputs, cache_write_triton.run)
    assert_writes(few(inputs, 1), cache_write_triton.run)
    bare = replace(inputs, index_k=None, index_cache=None)
    alone = assert_writes(bare, cache_write_triton.run)
    assert torch.equal(hostile.bits(alone.kv_cache), hostile.bits(outputs.kv_cache))


GRIDS = {
    "one-step": CacheWriteConfig(columns=3, index_parts=1, latent_parts=4, latent_t=4),
    "two-latents-a-warp": CacheWriteConfig(columns=3, index_parts=1, latent_parts=2, latent_t=8),
    "steps": CacheWriteConfig(columns=1, index_parts=1, latent_parts=2, latent_t=4),
    "steps-of-some": CacheWriteConfig(columns=2, index_parts=1, latent_parts=3, latent_t=4),
    "eight-warps": CacheWriteConfig(
        columns=1, index_parts=2, latent_parts=3, latent_t=8, num_warps=8
    ),
}


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_every_grid_writes_the_same_bytes(precision, config):
    """Of 39 tokens: the last step of some programs has none, or fewer than it could take."""
    inputs = wild(small(precision, tokens=39))
    usual, other = poisoned(inputs), poisoned(inputs)
    cache_write_triton.cache_write(usual)
    cache_write_triton.cache_write(other, config=config)
    assert torch.equal(hostile.bits(usual.kv_cache), hostile.bits(other.kv_cache))
    assert torch.equal(hostile.bits(usual.index_cache), hostile.bits(other.index_cache))


def in_odd_rows(x):
    """The same values in rows one element wider, from the second element on."""
    wide = torch.full((x.shape[0], x.shape[1] + 1), math.nan, dtype=x.dtype, device=x.device)
    wide[:, 1:] = x
    return wide[:, 1:]


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", [3, 39])
@pytest.mark.parametrize("config", [None, GRIDS["steps"]], ids=["one-step", "steps"])
def test_rows_of_odd_stride_are_written_as_others(config, tokens):
    inputs = small(tokens=tokens)
    odd = replace(inputs, kv=in_odd_rows(inputs.kv), index_k=in_odd_rows(inputs.index_k))
    usual, other = poisoned(inputs), poisoned(odd)
    cache_write_triton.cache_write(usual, config=config)
    cache_write_triton.cache_write(other, config=config)
    assert torch.equal(hostile.bits(usual.kv_cache), hostile.bits(other.kv_cache))
    assert torch.equal(hostile.bits(usual.index_cache), hostile.bits(other.index_cache))


@pytest.mark.parametrize(
    ("num_tokens", "grid"),
    [
        (1, (1, 1, 1)), (5, (1, 1, 2)), (16, (1, 1, 4)), (17, (2, 1, 4)), (2096, (131, 1, 4)),
        (2112, (132, 1, 4)), (2113, (132, 2, 4)), (16384, (132, 2, 4)),
    ],
)  # fmt: skip
def test_grids_follow_the_tokens(num_tokens, grid):
    """Few tokens in one step of as many programs as they need, many in steps of six an SM."""
    config = choose_config(num_tokens, 132)
    assert (config.columns, config.index_parts, config.latent_parts) == grid


@pytest.mark.interpret
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_triton_rounds_where_the_reference_does(precision):
    """Nearly all bytes are equal: of values 99.9 %, and every scale."""
    inputs = small(precision, tokens=39)
    mine = poisoned(inputs)
    right, found = OPERATOR.reference(inputs), cache_write_triton.run(mine)
    written = ~unwritten(inputs)
    equal = (hostile.bits(right.kv_cache) == hostile.bits(found.kv_cache))[written]
    assert equal.float().mean() > 0.999
    values = (split_index_pages(x.index_cache, 7)[0].contiguous() for x in (right, found))
    one, other = (hostile.bits(x)[written] for x in values)
    assert (one == other).float().mean() > 0.999
    if precision == "fp8":
        assert equal_scales(right, found, written)


def equal_scales(right, found, written):
    """Bytes 512 … 527 of latent rows, and the scales of index pages."""
    latents = (x.kv_cache[written][:, 512:528] for x in (right, found))
    keys = (split_index_pages(x.index_cache, 7)[1][written] for x in (right, found))
    return torch.equal(*latents) and torch.equal(*keys)


@pytest.mark.interpret
@pytest.mark.parametrize("largest", [448.0, 450.0, 446.0, 1.0, 1e-6, 3e-9, 0.0, 2.0**100])
def test_scale_at_the_edges(largest):
    """An index key with one element that is not 0, and its transform, of a known largest value."""
    inputs = few(small(tokens=3), 1)
    zeros = torch.zeros_like(inputs.index_norm_weight)
    bias = zeros.clone()
    bias[64] = largest * 128**0.5
    inputs = replace(inputs, index_norm_weight=zeros, index_norm_bias=bias)
    right, found = OPERATOR.reference(inputs), cache_write_triton.run(poisoned(inputs))
    written = ~unwritten(inputs)
    assert equal_scales(right, found, written)


SHAPES = [
    shape_of(1, 70, 70), shape_of(1, 5000, 3000), shape_of(40, 300, 2), shape_of(1, 1),
    shape_of(3, 700, 17, 17), shape_of(5, 99, 3, 1), shape_of(1, 20000, 16384),
    shape_of(7, 130, 5, precision="bf16"), shape_of(1, 5000, 3000, 7, "bf16"),
    shape_of(3, 200, 9, with_index=False), shape_of(3, 200, 9, 64, "bf16", False),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=hostile.label)
@pytest.mark.parametrize("name", hostile.names("cache_write"))
def test_cache_write_matches_reference(name, shape, mutate):
    implementation = hostile.runnable("cache_write", name, shape)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=1, device="cuda"))
    assert_writes(inputs, implementation.run)


@pytest.mark.gpu
def test_cache_write_reaches_beyond_two_gibibytes():
    """A slot whose bytes, counted from the cache's first, do not fit in 32 bits."""
    near = OPERATOR.make_inputs(shape_of(1, 64, 64), seed=1, device="cuda")
    first = 52000 * 64 - 64
    kv_cache = torch.zeros(52000, 64, 656, dtype=torch.uint8, device="cuda")
    index_cache = torch.zeros(52000, 64 * 132, dtype=torch.uint8, device="cuda")
    far = replace(near, kv_cache=kv_cache, index_cache=index_cache, slots=near.slots % 64 + first)
    hostile.assert_right("cache_write", far, cache_write_triton.run(far))
    assert not kv_cache[:-1].any() and not index_cache[:-1].any()
