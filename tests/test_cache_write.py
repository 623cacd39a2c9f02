"""Caching of new tokens: the reference and its check."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels.cache_write import OPERATOR
from dsa_bench.kernels.paging import unpack_index_pages, unpack_mla_rows
from dsa_bench.operator import Unsupported
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile
from tests.cache_write_cases import MUTATIONS, assert_writes, few, poisoned, shape_of, small

PRECISIONS = ("fp8", "bf16", "fp32")


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
