"""Caching of new tokens: every implementation, interpreted and on a GPU."""

import math
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels import cache_write_triton
from dsa_bench.kernels.cache_write import OPERATOR
from dsa_bench.kernels.cache_write_triton import CacheWriteConfig, choose_config
from dsa_bench.kernels.paging import split_index_pages
from dsa_bench.operator import Machine
from tests import hostile
from tests.cache_write_cases import (
    MUTATIONS,
    assert_writes,
    few,
    poisoned,
    shape_of,
    small,
    unwritten,
    wild,
)

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
