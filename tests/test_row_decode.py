"""The kernel of sparse decode over 656-byte rows: its configuration, emulated and on a GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import mangle_type

from dsa_bench.kernels import row_decode
from dsa_bench.kernels.decode_config import Fp8DecodeConfig, choose_config, divide
from dsa_bench.kernels.sparse_decode import OPERATOR, SparseDecodeOutputs, SparseDecodeShape
from tests import hostile, hostile_cache
from tests.gluon_emulator import Deadlock, EmulationError, emulated_gluon
from tests.gluon_emulator.memory import SharedTile

KERNEL = "dsa_bench.kernels.row_decode"
NUM_SMS = 132


@pytest.mark.parametrize("loader", row_decode.LOADER_REGISTERS.values())
def test_registers_of_the_four_warpgroups_fit(loader):
    outputs = row_decode.OUTPUT_REGISTERS
    scores = 512 - 2 * outputs - loader
    assert outputs % 8 == 0 and loader % 8 == 0 and scores % 8 == 0
    assert scores > loader


def merge_plainly(parts, attn_sink, out, lse):
    """`combine_parts` in torch, for that is a Triton kernel, which its interpreter alone runs."""
    outs, lses = out.flatten(0, 1), lse.flatten(0, 1)
    num_groups = parts.out.shape[0] // 2
    counts = []
    for query in range(lses.shape[0]):
        begin = query * (parts.piece_units + parts.num_blocks) + parts.piece_units
        groups = range(begin // parts.share, (begin + parts.num_blocks - 1) // parts.share + 1)
        counts.append(len(groups))
        if len(groups) == 1:
            continue
        places = [groups[0], *(num_groups + group for group in groups[1:])]
        logs = parts.lse[places].double() / 1.4426950408889634
        total = logs.logsumexp(0)
        is_empty = total == -hostile.INF
        lses[query] = total.masked_fill(is_empty, hostile.INF)
        if attn_sink is not None:
            total = torch.logaddexp(total, attn_sink.double())
        weights = torch.exp(logs - total).masked_fill(is_empty, 0.0)[..., None]
        outs[query] = (weights * parts.out[places]).sum(0)
    assert parts.most_parts == max(counts)


def emulate(inputs, config, *, seed=0, changes=None):
    """Outputs of the emulated kernel, with `changes` to its modules."""
    out = torch.full((*inputs.q.shape[:3], 512), hostile.NAN).bfloat16()
    lse = torch.full(inputs.q.shape[:3], hostile.NAN)
    mangle_type(lse)  # its first call imports Gluon: the real one is wanted
    with emulated_gluon(seed=seed) as emulated, hostile.poisoned_outputs():
        kernel = emulated.load(KERNEL)
        kernel.combine_parts = merge_plainly
        emulated.change(changes or {})
        kernel.attend_fp8_rows(
            inputs.q, inputs.kv_cache, inputs.topk_slots, inputs.sm_scale, inputs.attn_sink,
            inputs.topk_lens, out, lse, config=config,
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


def uneven(inputs):
    """A list that is as long as it may be, among some with a key or none: groups share it."""
    shape, device = inputs.topk_slots.shape[:2], inputs.q.device
    lens = torch.zeros(shape, dtype=torch.int32, device=device)
    lens.view(-1)[1::3] = 2**31 - 1
    lens.view(-1)[2::3] = 70
    return replace(inputs, topk_lens=lens)


def whole(block_h, num_groups):
    """A group takes whole lists alone."""
    return Fp8DecodeConfig(block_h=block_h, num_groups=num_groups, shares_lists=False)


def shared(block_h, num_groups, piece_units=0):
    return Fp8DecodeConfig(block_h=block_h, num_groups=num_groups, piece_units=piece_units)


def division(config, shape):
    return divide(shape.queries, -(-shape.topk // 64), config)


def case(config, shape, mutate=hostile.sparse_decode_wild):
    how = f"shared+{config.piece_units}" if config.shares_lists else "whole"
    way = f"{config.block_h}heads-{config.num_groups}{how}"
    name = f"{hostile.label(shape)}-{mutate.__name__}-{way}"
    return pytest.param(config, shape, mutate, id=name)


EMULATED = [
    case(whole(16, 1), decode_shape(1, 128, 16), hostile.plain),
    case(whole(32, 1), decode_shape(1, 64, 32), hostile.plain),
    case(whole(64, 1), decode_shape(1, 192, 64), hostile.plain),
    case(whole(16, 2), decode_shape(2, 1, 8, page_size=1)),
    # two tiles of heads, the second with some that do not exist
    case(whole(32, 4), decode_shape(2, 130, 40, seq_len_q=2, page_size=17)),
    case(whole(64, 3), decode_shape(3, 257, 72, page_size=7)),
    # several pieces a program: three blocks are as many as there are stages, with two or four
    # another stage comes first in each piece, with an odd number of entries another slot
    case(whole(16, 1), decode_shape(5, 192, 16)),
    case(whole(16, 1), decode_shape(7, 65, 5)),
    case(whole(32, 2), decode_shape(2, 250, 70, seq_len_q=2)),
    case(whole(64, 1), decode_shape(6, 1, 3, page_size=3)),
    case(whole(16, 1), decode_shape(4, 300, 8), late_keys),
    case(whole(16, 1), decode_shape(4, 300, 8), late_low_keys),
    # lengths: groups with more lists than others, with none
    case(whole(16, 2), decode_shape(9, 129, 8), shortened),
    case(whole(16, 3), decode_shape(7, 300, 8), uneven),
    # parts of lists: each one block, some of them short; each two, which the kernel is told
    case(shared(16, 5), decode_shape(1, 300, 20)),
    case(shared(64, 4), decode_shape(2, 200, 72, page_size=17)),
    case(shared(16, 2), decode_shape(1, 250, 8), hostile.plain),
    # parts and whole lists, several pieces a program
    case(shared(32, 3, 1), decode_shape(2, 260, 40, seq_len_q=2)),
    case(shared(16, 3), decode_shape(4, 300, 8), late_keys),
    case(shared(16, 4, 2), decode_shape(7, 190, 8)),
    case(shared(64, 3, 1), decode_shape(5, 130, 66)),
    # more groups than blocks
    case(shared(16, 4), decode_shape(1, 65, 8), hostile.plain),
    # and with lengths
    case(shared(16, 4), decode_shape(9, 129, 8), shortened),
    case(shared(16, 5, 2), decode_shape(7, 400, 8), uneven),
    case(shared(32, 20, 1), decode_shape(3, 300, 40), uneven),
    case(shared(64, 5), decode_shape(3, 200, 72, seq_len_q=2), uneven),
]


@pytest.mark.parametrize(("config", "shape", "mutate"), EMULATED)
def test_emulated(config, shape, mutate):
    assert (division(config, shape).num_partial > 0) == config.shares_lists
    inputs = mutate(made(shape))
    outputs = emulate(inputs, config)
    hostile.assert_right("sparse_decode", inputs, outputs)


def test_emulated_group_without_work():
    """Its stretch is no longer than what stands before a list for a piece's cost."""
    config, shape = shared(16, 4, 4), decode_shape(2, 120, 8)
    assert (0, 0) in division(config, shape).loads
    inputs = hostile.sparse_decode_wild(made(shape))
    hostile.assert_right("sparse_decode", inputs, emulate(inputs, config))


ways = pytest.mark.parametrize("config", [whole(16, 1), shared(32, 5, 2)], ids=["whole", "shared"])


def test_shared_way_shares_the_lists_of_all_shapes():
    for queries, topk in ((2, 150), (2, 300), (6, 80), (4, 150)):
        assert divide(queries, -(-topk // 64), shared(32, 5, 2)).num_partial > 0


@ways
@pytest.mark.parametrize("mutate", hostile_cache.FINITE.values(), ids=hostile_cache.FINITE)
def test_emulated_hard_numbers(mutate, config):
    inputs = mutate(made(decode_shape(2, 150, 12)))
    outputs = emulate(inputs, config)
    hostile.assert_right("sparse_decode", inputs, outputs)
    hostile_cache.assert_near_exact(inputs, outputs)


@ways
@pytest.mark.parametrize("mutate", hostile_cache.LEVELS.values(), ids=hostile_cache.LEVELS)
def test_emulated_reference_follows_the_logits(mutate, config):
    inputs = mutate(made(decode_shape(2, 300, 12)))
    outputs = emulate(inputs, config)
    hostile.assert_right("sparse_decode", inputs, outputs)
    hostile_cache.assert_near_exact(inputs, outputs)


@ways
@pytest.mark.parametrize("part", hostile_cache.NAN_PARTS)
def test_emulated_nan_of_a_listed_row_shows(part, config):
    inputs = hostile_cache.nan_in_part(part, made(decode_shape(3, 80, 6, seq_len_q=2)))
    inputs.topk_slots[2, 1] = -1
    outputs = emulate(inputs, config)
    hostile.assert_nan_shows("sparse_decode", inputs, outputs)


@ways
@pytest.mark.parametrize("mutate", [hostile.plain, late_keys], ids=["plain", "late-keys"])
def test_emulated_inf_and_nan_spoil_their_own_head(mutate, config):
    inputs = hostile_cache.with_spoiled_heads(mutate(made(decode_shape(4, 150, 12))))
    outputs = emulate(inputs, config)
    hostile_cache.assert_spoils_only_those_heads(inputs, outputs)


@pytest.mark.parametrize("seed", range(4))
def test_emulated_whatever_is_slow(seed):
    """Each seed makes other roles slow, and lets copies and products end at other moments."""
    inputs = hostile.sparse_decode_wild(made(decode_shape(3, 300, 6), seed))
    config = whole(16, 1) if seed % 2 else shared(16, 2)
    outputs = emulate(inputs, config, seed=seed)
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
            outputs = emulate(inputs, whole(16, 1), seed=seed, changes=MISTAKES[mistake])
        except (Deadlock, EmulationError):
            return True
        return not hostile.passes(OPERATOR.check(inputs, outputs))

    assert any(is_found(seed) for seed in range(4))


def with_place(place):
    """`piece_of` whose partial results go there."""

    def change(real):
        def piece_of(arguments, row):
            piece = copy.copy(real(arguments, row))
            piece.place = place(piece.place)
            return piece

        return piece_of

    return change


MISTAKES_OF_PIECES = {
    "parts-at-one-place": {"decode_outputs.piece_of": with_place(lambda place: place.clamp(max=1))},
    "sums-at-one-place": {"decode_scores.piece_of": with_place(lambda place: place.clamp(max=1))},
    "a-part-taken-for-whole": {"decode_scores.WHOLE": lambda _: 0},
    "a-block-too-many": {
        "decode_outputs.steps_of": lambda _: lambda arguments, piece: piece.num_blocks + 1
    },
    "nothing-has-no-block": {
        "decode_loader.steps_of": lambda _: lambda arguments, piece: piece.num_blocks
    },
    "lists-left-out": {"decode_loader.has_piece": lambda _: lambda arguments, row: row < 2},
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_PIECES)
def test_planted_mistake_of_pieces_is_found(mistake):
    config, shape = shared(16, 3, 1), decode_shape(5, 300, 6)
    found = division(config, shape)
    assert found.num_partial > 0 and found.num_whole > 0
    inputs = uneven(hostile.sparse_decode_wild(made(shape)))
    try:
        outputs = emulate(inputs, config, changes=MISTAKES_OF_PIECES[mistake])
    except (Deadlock, EmulationError):
        return
    assert not hostile.passes(OPERATOR.check(inputs, outputs))


def gpu_shape(batch_size, *, topk=2048, num_heads=128):
    return SparseDecodeShape(batch_size=batch_size, seq_len_kv=4096, topk=topk, num_heads=num_heads)


GPU_SHAPES = {
    "whole": gpu_shape(132, topk=300, num_heads=16),
    "split": gpu_shape(4),
    "mixed": gpu_shape(140, topk=300, num_heads=16),
}
shapes = pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
implementations = pytest.mark.parametrize("name", hostile.names("sparse_decode"))


def test_gpu_shapes_are_what_they_are_called():
    for name, shape in GPU_SHAPES.items():
        config = choose_config(shape.queries, shape.num_heads, shape.topk, NUM_SMS)
        found = division(config, shape)
        assert (found.num_partial > 0) == (name != "whole")
        assert (found.num_whole > 0) == (name != "split")
        assert found.is_one_piece == (name != "mixed")


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
@pytest.mark.parametrize("lengths", [hostile.plain, uneven], ids=["full", "uneven"])
@pytest.mark.parametrize("block_h", [16, 32, 64])
@pytest.mark.parametrize("sharing", [(1, 0, False), (3, 0, False), (3, 2, True), (13, 0, True)])
@pytest.mark.parametrize("num_heads", [8, 40, 128])
def test_every_configuration_is_right(num_heads, sharing, block_h, lengths):
    shape = gpu_shape(7, topk=1030, num_heads=num_heads)
    hostile.runnable("sparse_decode", "gluon", shape)
    inputs = hostile.sparse_decode_wild(OPERATOR.make_inputs(shape, seed=6, device="cuda"))
    inputs = lengths(inputs)
    out = torch.full((*inputs.q.shape[:3], 512), hostile.NAN, device="cuda").bfloat16()
    lse = torch.full(inputs.q.shape[:3], hostile.NAN, device="cuda")
    num_groups, piece_units, shares_lists = sharing
    config = Fp8DecodeConfig(
        block_h=block_h, num_groups=num_groups, piece_units=piece_units, shares_lists=shares_lists
    )
    row_decode.attend_fp8_rows(
        inputs.q, inputs.kv_cache, inputs.topk_slots, inputs.sm_scale, inputs.attn_sink,
        inputs.topk_lens, out, lse, config=config,
    )  # fmt: skip
    hostile.assert_right("sparse_decode", inputs, SparseDecodeOutputs(out, lse))
