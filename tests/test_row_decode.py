"""The kernel of sparse decode over 656-byte rows: its configuration, emulated and on a GPU."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench.kernels import row_decode
from dsa_bench.kernels.sparse_decode import (
    MAX_SPLITS,
    OPERATOR,
    PARTIAL_ROWS,
    SparseDecodeOutputs,
    SparseDecodeShape,
)
from tests import hostile, hostile_cache
from tests.gluon_emulator import Deadlock, EmulationError, emulated_gluon
from tests.gluon_emulator.memory import SharedTile

KERNEL = "dsa_bench.kernels.row_decode"
NUM_SMS = 132


def choose(num_queries, num_heads=128, topk=2048):
    return row_decode.choose_config(num_queries, num_heads, topk, NUM_SMS)


@pytest.mark.parametrize("topk", [1, 63, 64, 65, 128, 129, 300, 512, 1000, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 17, 32, 33, 64, 96, 128, 130, 256])
def test_splits_cover_all_keys_and_none_is_empty(num_heads, topk):
    blocks = -(-topk // 64)
    for num_queries in (1, 2, 5, 16, 33, 66, 128, 133, 300, 5000):
        config = choose(num_queries, num_heads, topk)
        each = -(-blocks // config.num_splits)
        assert (config.num_splits - 1) * each < blocks <= config.num_splits * each
        assert config.num_splits <= MAX_SPLITS
        rows = config.num_splits * num_queries * num_heads
        assert config.num_splits == 1 or rows <= PARTIAL_ROWS
        assert config.block_h in (16, 32, 64)
        assert config.block_h == 16 or config.block_h < 2 * num_heads


def test_few_queries_are_split_and_many_are_not():
    assert choose(1).num_splits > 8
    assert choose(1, topk=64).num_splits == 1
    assert choose(NUM_SMS).num_splits == 1
    assert all(
        choose(few).num_splits >= choose(many).num_splits
        for few, many in pairwise((1, 8, 16, 32, 64, 128))
    )


@pytest.mark.parametrize("loader", row_decode.LOADER_REGISTERS.values())
def test_registers_of_the_four_warpgroups_fit(loader):
    outputs = row_decode.OUTPUT_REGISTERS
    scores = 512 - 2 * outputs - loader
    assert outputs % 8 == 0 and loader % 8 == 0 and scores % 8 == 0
    assert scores > loader


def merge_plainly(partial_out, partial_lse, num_splits, attn_sink, out, lse):
    """`combine_splits` in torch, for that is a Triton kernel, which its interpreter alone runs."""
    logs = partial_lse.view(num_splits, *lse.shape).double() / 1.4426950408889634
    total = logs.logsumexp(0)
    is_empty = total == -hostile.INF
    lse.copy_(total.masked_fill(is_empty, hostile.INF))
    if attn_sink is not None:
        total = torch.logaddexp(total, attn_sink.double())
    weights = torch.exp(logs - total).masked_fill(is_empty, 0.0)[..., None]
    out.copy_((weights * partial_out.view(num_splits, *out.shape)).sum(0))


def emulate(inputs, *, block_h=16, num_splits=1, num_sms=NUM_SMS, seed=0, changes=None):
    """Outputs of the emulated kernel, with `changes` to its modules."""
    out = torch.full((*inputs.q.shape[:3], 512), hostile.NAN).bfloat16()
    lse = torch.full(inputs.q.shape[:3], hostile.NAN)
    mangle_type(lse)  # its first call imports Gluon: the real one is wanted
    emulation = emulated_gluon(seed=seed, num_sms=num_sms)
    with emulation as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        kernel.combine_splits = merge_plainly
        emulated.change(changes or {})
        kernel.attend_fp8_rows(
            inputs.q, inputs.kv_cache, inputs.topk_slots, inputs.sm_scale, inputs.attn_sink,
            inputs.topk_lens, out, lse,
            config=kernel.Fp8DecodeConfig(block_h=block_h, num_splits=num_splits),
        )  # fmt: skip
    return SparseDecodeOutputs(out, lse)


def decode_shape(batch_size, topk, num_heads, *, seq_len_q=1, page_size=64):
    return SparseDecodeShape(
        batch_size=batch_size, seq_len_kv=topk + 30, topk=topk, seq_len_q=seq_len_q,
        num_heads=num_heads, page_size=page_size,
    )  # fmt: skip


def made(shape, seed=3):
    return OPERATOR.make_inputs(shape, seed=seed, device="cpu")


def late_keys(inputs):
    """Blocks without a key, then blocks with some; with a key in the last place alone; none."""
    slots = inputs.topk_slots.flatten(0, 1).clone()
    slots[0, :130] = -1
    slots[1, :-1] = 2**31 - 1
    slots[2] = -1
    slots[3, 64:-7] = -5
    return replace(inputs, topk_slots=slots.view_as(inputs.topk_slots))


def late_low_keys(inputs):
    """The first key of a query comes blocks late, and has a logit far below 0."""
    return late_keys(hostile_cache.LEVELS["far-below"](inputs))


def shortened(inputs):
    """Lengths at the edges of blocks and of int32, of lists that are valid throughout."""
    lens = torch.tensor([-(2**31), -1, 0, 1, 63, 64, 65, 128, 2**31 - 1], dtype=torch.int32)
    return replace(inputs, topk_lens=lens[: inputs.q.shape[0], None].contiguous())


def case(block_h, splits, num_sms, shape, mutate=hostile.sparse_decode_wild):
    name = f"{hostile.label(shape)}-{mutate.__name__}-{splits}of{block_h}-sms{num_sms}"
    return pytest.param(block_h, splits, num_sms, shape, mutate, id=name)


EMULATED = [
    case(16, 1, NUM_SMS, decode_shape(1, 128, 16), hostile.plain),
    case(32, 1, NUM_SMS, decode_shape(1, 64, 32), hostile.plain),
    case(64, 1, NUM_SMS, decode_shape(1, 192, 64), hostile.plain),
    case(16, 1, NUM_SMS, decode_shape(2, 1, 8, page_size=1)),
    # two tiles of heads, the second with some that do not exist
    case(32, 1, NUM_SMS, decode_shape(2, 130, 40, seq_len_q=2, page_size=17)),
    case(64, 1, NUM_SMS, decode_shape(3, 257, 72, page_size=7)),
    # several pieces a program: three blocks are as many as there are stages, with two or four
    # another stage comes first in each piece, with an odd number of entries another slot
    case(16, 1, 1, decode_shape(5, 192, 16)),
    case(16, 1, 1, decode_shape(7, 65, 5)),
    case(32, 1, 2, decode_shape(2, 250, 70, seq_len_q=2)),
    case(64, 1, 1, decode_shape(6, 1, 3, page_size=3)),
    case(16, 1, 1, decode_shape(4, 300, 8), late_keys),
    case(16, 1, 1, decode_shape(4, 300, 8), late_low_keys),
    case(16, 1, 2, decode_shape(9, 129, 8), shortened),
    # splits: each one block, some of them short, several pieces a program
    case(16, 5, NUM_SMS, decode_shape(1, 300, 20)),
    case(32, 3, 2, decode_shape(2, 260, 40, seq_len_q=2)),
    case(64, 2, 1, decode_shape(3, 200, 72, page_size=17)),
    case(16, 3, 1, decode_shape(4, 300, 8), late_keys),
    case(16, 3, 4, decode_shape(9, 129, 8), shortened),
    # more splits than blocks
    case(16, 4, NUM_SMS, decode_shape(1, 65, 8), hostile.plain),
]


@pytest.mark.parametrize(("block_h", "num_splits", "num_sms", "shape", "mutate"), EMULATED)
def test_emulated(block_h, num_splits, num_sms, shape, mutate):
    inputs = mutate(made(shape))
    outputs = emulate(inputs, block_h=block_h, num_splits=num_splits, num_sms=num_sms)
    hostile.assert_right("sparse_decode", inputs, outputs)


ways = pytest.mark.parametrize(
    ("block_h", "num_splits"), [(16, 1), (32, 2)], ids=["1of16", "2of32"]
)


@ways
@pytest.mark.parametrize("mutate", hostile_cache.FINITE.values(), ids=hostile_cache.FINITE)
def test_emulated_hard_numbers(mutate, block_h, num_splits):
    inputs = mutate(made(decode_shape(2, 150, 12)))
    outputs = emulate(inputs, block_h=block_h, num_splits=num_splits, num_sms=1)
    hostile.assert_right("sparse_decode", inputs, outputs)
    hostile_cache.assert_near_exact(inputs, outputs)


@ways
@pytest.mark.parametrize("mutate", hostile_cache.LEVELS.values(), ids=hostile_cache.LEVELS)
def test_emulated_reference_follows_the_logits(mutate, block_h, num_splits):
    inputs = mutate(made(decode_shape(2, 300, 12)))
    outputs = emulate(inputs, block_h=block_h, num_splits=num_splits, num_sms=1)
    hostile.assert_right("sparse_decode", inputs, outputs)
    hostile_cache.assert_near_exact(inputs, outputs)


@ways
@pytest.mark.parametrize("part", hostile_cache.NAN_PARTS)
def test_emulated_nan_of_a_listed_row_shows(part, block_h, num_splits):
    inputs = hostile_cache.nan_in_part(part, made(decode_shape(3, 80, 6, seq_len_q=2)))
    inputs.topk_slots[2, 1] = -1
    outputs = emulate(inputs, block_h=block_h, num_splits=num_splits, num_sms=1)
    hostile.assert_nan_shows("sparse_decode", inputs, outputs)


@ways
@pytest.mark.parametrize("mutate", [hostile.plain, late_keys], ids=["plain", "late-keys"])
def test_emulated_inf_and_nan_spoil_their_own_head(mutate, block_h, num_splits):
    inputs = hostile_cache.with_spoiled_heads(mutate(made(decode_shape(4, 150, 12))))
    outputs = emulate(inputs, block_h=block_h, num_splits=num_splits, num_sms=1)
    hostile_cache.assert_spoils_only_those_heads(inputs, outputs)


@pytest.mark.parametrize("seed", range(4))
def test_emulated_whatever_is_slow(seed):
    """Each seed makes other roles slow, and lets copies and products end at other moments."""
    inputs = hostile.sparse_decode_wild(made(decode_shape(3, 300, 6), seed))
    outputs = emulate(inputs, num_splits=1 + seed % 2, num_sms=1, seed=seed)
    hostile.assert_right("sparse_decode", inputs, outputs)


class NoneMoves:
    """Gluon whose maximum is 0: no reference seems to have moved."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def max(self, x, axis):
        return torch.zeros((), dtype=torch.int32)


def other_groups(real):
    """`seen_as` that gives the shares of the groups in another order."""

    def seen_as(tile, dtype, columns, layout, rows=64):
        seen = real(tile, dtype, columns, layout, rows)
        return seen if rows != 4 else SharedTile(seen.data.flip(0), seen.mark.flip(0))

    return seen_as


MISTAKES = {
    "stages-differ": {"decode_loader.STAGES": lambda stages: stages - 1},
    "ring-too-short": {"decode_outputs.RING": lambda ring: ring - 1},
    "outputs-not-rescaled": {"decode_outputs.gl": NoneMoves},
    "reference-never-moves": {"decode_scores._any_above": lambda _: lambda x, heads: False},
    "shares-in-another-order": {
        "decode_scores._of_groups": lambda real: lambda shares: real(shares)[::-1]
    },
    "shares-of-other-groups": {"decode_outputs.seen_as": other_groups},
    "logarithm-to-base-2": {"decode_scores.LN_2": lambda _: 1.0},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_found(mistake):
    levels = [0.0, 12.0, 30.0]
    inputs = hostile_cache.uneven_scales(made(decode_shape(2, 300, 6)))
    inputs = hostile_cache.with_levels(levels, inputs)

    def is_found(seed):
        try:
            outputs = emulate(inputs, num_sms=1, seed=seed, changes=MISTAKES[mistake])
        except (Deadlock, EmulationError):
            return True
        return not hostile.passes(OPERATOR.check(inputs, outputs))

    assert any(is_found(seed) for seed in range(4))


def gpu_shape(batch_size, *, topk=2048, num_heads=128):
    return SparseDecodeShape(batch_size=batch_size, seq_len_kv=4096, topk=topk, num_heads=num_heads)


WHOLE, SPLIT = gpu_shape(132, topk=300, num_heads=16), gpu_shape(4)
shapes = pytest.mark.parametrize("shape", [WHOLE, SPLIT], ids=["whole", "split"])
implementations = pytest.mark.parametrize("name", hostile.names("sparse_decode"))


def test_gpu_shapes_are_whole_and_split():
    for shape, is_split in ((WHOLE, False), (SPLIT, True)):
        config = choose(shape.batch_size, shape.num_heads, shape.topk)
        assert (config.num_splits > 1) == is_split


def run_on_gpu(name, shape, mutate):
    """Inputs on the GPU, and what the implementation makes of them, the same twice."""
    implementation = hostile.runnable("sparse_decode", name, shape)
    inputs = mutate(OPERATOR.make_inputs(shape, seed=5, device="cuda"))
    with hostile.poisoned_outputs():
        first, second = implementation.run(inputs), implementation.run(inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(hostile.bits(one), hostile.bits(other)), "two runs differ"
    return inputs, first


@pytest.mark.gpu
@implementations
@shapes
@pytest.mark.parametrize("mutate", hostile_cache.FINITE.values(), ids=hostile_cache.FINITE)
def test_hard_numbers(mutate, shape, name):
    inputs, outputs = run_on_gpu(name, shape, mutate)
    hostile.assert_right("sparse_decode", inputs, outputs)
    hostile_cache.assert_near_exact(inputs, outputs)


@pytest.mark.gpu
@implementations
@shapes
@pytest.mark.parametrize(
    "mutate",
    [*hostile_cache.LEVELS.values(), late_low_keys],
    ids=[*hostile_cache.LEVELS, "late-low-keys"],
)
def test_reference_follows_the_logits(mutate, shape, name):
    hostile.assert_right("sparse_decode", *run_on_gpu(name, shape, mutate))


@pytest.mark.gpu
@implementations
@shapes
@pytest.mark.parametrize("part", hostile_cache.NAN_PARTS)
def test_nan_of_a_listed_row_shows(part, shape, name):
    hostile.assert_nan_shows(
        "sparse_decode",
        *run_on_gpu(name, shape, lambda inputs: hostile_cache.nan_in_part(part, inputs)),
    )


@pytest.mark.gpu
@implementations
@shapes
@pytest.mark.parametrize("mutate", [hostile.plain, late_keys], ids=["plain", "late-keys"])
def test_inf_and_nan_spoil_their_own_head(mutate, shape, name):
    if (name, mutate) == ("triton", late_keys):
        pytest.skip("where one key's score is -inf, triton takes it for no key: 0 and not NaN")
    hostile_cache.assert_spoils_only_those_heads(
        *run_on_gpu(name, shape, lambda inputs: hostile_cache.with_spoiled_heads(mutate(inputs)))
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_h", "num_splits"), [(h, n) for h in (16, 32, 64) for n in (1, 3, 16)]
)
@pytest.mark.parametrize("num_heads", [8, 40, 128])
def test_every_configuration_is_right(num_heads, block_h, num_splits):
    shape = gpu_shape(5, topk=1030, num_heads=num_heads)
    hostile.runnable("sparse_decode", "gluon", shape)
    inputs = hostile.sparse_decode_wild(OPERATOR.make_inputs(shape, seed=6, device="cuda"))
    out = torch.full((*inputs.q.shape[:3], 512), hostile.NAN, device="cuda").bfloat16()
    lse = torch.full(inputs.q.shape[:3], hostile.NAN, device="cuda")
    config = row_decode.Fp8DecodeConfig(block_h=block_h, num_splits=num_splits)
    row_decode.attend_fp8_rows(
        inputs.q, inputs.kv_cache, inputs.topk_slots, inputs.sm_scale, inputs.attn_sink,
        inputs.topk_lens, out, lse, config=config,
    )  # fmt: skip
    hostile.assert_right("sparse_decode", inputs, SparseDecodeOutputs(out, lse))
