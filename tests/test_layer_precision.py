"""The layer in bf16 and in fp8: rounded where it should be, nowhere else, and no more than that.

`exact` rounds nothing, `plain` is the second implementation with a rounding at every place where
results of the layer are stored; it sums in another order, so a value at the border of two roundings
may fall to either side. What the layer may differ from `plain` is therefore a part of `rounding`,
the distance of plain from exact.
"""

import functools
from dataclasses import replace

import pytest
import torch

from dsa_bench.baselines.dense_latent_attention import DenseLatentAttention, dense_cache
from dsa_bench.kernels.layer import DeepSeekSparseAttention, reference_stages
from dsa_bench.kernels.paging import unpack_index_pages, unpack_mla_rows
from tests.tiny_layer import (
    ALL_FP8,
    LENGTH,
    PLAIN,
    PRESET,
    TABLE,
    TOPK,
    error,
    feed,
    hidden_of,
    is_selection,
    make_cache,
    second,
    sets_of,
    sparse,
    weights,
)

LOW = ["bf16", "fp8"]
FORMS = ["mqa", "mha"]
SCORES = 1e-3
"""Of the largest score: keys nearer than that may be ranked either way."""


def plain_of(precision, hidden, selected=None, **rules):
    return second(precision, hidden, selected, dtype=torch.float32, **{**PLAIN[precision], **rules})


@functools.cache
def whole(precision, form):
    hidden = hidden_of(precision)
    cache = make_cache(precision)
    out, sets = feed(sparse(precision, form), hidden, cache)
    return hidden, cache, out, sets


@functools.cache
def rounding(precision, form):
    hidden, _, _, sets = whole(precision, form)
    plain = plain_of(precision, hidden, sets, form=form)
    return error(plain.out, second(precision, hidden, sets).out)


def selects(sets, scores):
    return is_selection(sets, scores, SCORES * float(scores[scores.isfinite()].abs().max()))


def same_rows(sets, others):
    return [t for t in range(len(sets)) if sets[t] == others[t]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", LOW)
def test_prefill_is_rounded_as_the_formula_says(precision, form):
    hidden, _, out, sets = whole(precision, form)
    plain = plain_of(precision, hidden, sets, form=form)
    size = rounding(precision, form)
    assert {"bf16": 3e-3, "fp8": 3e-2}[precision] < size < {"bf16": 1e-2, "fp8": 1e-1}[precision]
    assert selects(sets, plain.scores)
    assert error(out, plain.out) < 0.2 * size
    assert error(out, second(precision, hidden, sets).out) < 1.1 * size


@pytest.mark.parametrize("left_out", ALL_FP8)
def test_a_rounding_left_out_is_seen(left_out):
    """The comparison above fails for a layer that does one of the roundings to e4m3 not."""
    hidden, _, out, sets = whole("fp8", "mqa")
    other = plain_of("fp8", hidden, sets, **{left_out: False})
    if left_out == "fp8_latent":
        assert error(out, other.out) > 0.2 * rounding("fp8", "mqa")
    else:
        assert not selects(sets, other.scores)


def cached_rows(cache):
    """What both caches hold of the first sequence, by position, as numbers."""
    positions = torch.arange(LENGTH, dtype=torch.int32)
    slots = cache.slots(torch.zeros_like(positions), positions).long()
    values, scale = unpack_index_pages(cache.index_cache, cache.page_size)
    index_k = (values * scale[..., None]).flatten(0, 1)
    return unpack_mla_rows(cache.kv_cache).flatten(0, 1)[slots], index_k[slots]


def steps_apart(actual, expected, bits, smallest):
    """Distance in steps of a float of so many bits behind the leading one."""
    largest = torch.maximum(actual.abs(), expected.abs()).clamp(min=smallest)
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1 - bits)
    return (actual - expected).abs() / step


@pytest.mark.parametrize("precision", LOW)
def test_caches_hold_the_formula(precision):
    """Nearly every number is the same, and the others are the next one of their kind."""
    hidden, cache, _, _ = whole(precision, "mqa")
    plain = plain_of(precision, hidden)
    kv, index_k = cached_rows(cache)
    is_fp8 = precision == "fp8"
    for actual, expected, bits, smallest, most in (
        (kv[:, :512], plain.kv[:, :512], 3 if is_fp8 else 7, 1e-3, 1e-3),
        (kv[:, 512:], plain.kv[:, 512:], 7, 2.0**-6, 1e-3),
        (index_k, plain.index_k, 3 if is_fp8 else 7, 2.0**-6, 1e-2),
    ):
        apart = steps_apart(actual, expected, bits, smallest)
        assert apart.max() <= 1
        assert (apart > 0).double().mean() < most
        assert actual.abs().mean() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_fp8_in_fp32_arithmetic(form):
    """With nothing rounded to bf16 only rare values fall to the other side: most rows are exact."""

    def read(inputs):
        outputs = stages["cache_read"].run(inputs)
        return outputs._replace(kv=outputs.kv.float())

    stages = reference_stages()
    own = stages | {"cache_read": replace(stages["cache_read"], run=read)}
    wide = weights("fp8").map(lambda x: x.float() if x.dtype == torch.bfloat16 else x)
    layer = DeepSeekSparseAttention(wide, topk=TOPK, form=form, rope=TABLE, stages=own)
    hidden = hidden_of("fp8").float()
    out, sets = feed(layer, hidden, make_cache("fp8"))
    expected = second("fp8", hidden, sets, form=form, **ALL_FP8)
    scores = expected.scores
    assert is_selection(sets, scores, 1e-5 * float(scores[scores.isfinite()].abs().max()))
    rows = (out - expected.out).norm(dim=1) / expected.out.norm(dim=1)
    assert rows.max() < 5e-3  # one step of e4m3 in 512 numbers or in one of four heads
    assert (rows < 1e-6).double().mean() > 0.8


@pytest.mark.parametrize(
    ("sizes", "decode_from"),
    [([1], None), ([7], None), ([64], None), ([3, 17, 1, 40, 2], None), ([TOPK + 6], TOPK + 6)],
    ids=["ones", "sevens", "up-to-64", "uneven", "then-decode"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", LOW)
def test_chunks_and_decode_are_the_whole_prompt(precision, form, sizes, decode_from):
    hidden, _, expected, expected_sets = whole(precision, form)
    cache = make_cache(precision, seed=3)
    out, sets = feed(sparse(precision, form), hidden, cache, sizes, decode_from)
    assert selects(sets, plain_of(precision, hidden).scores)
    same = same_rows(sets, expected_sets)
    assert len(same) > 0.9 * LENGTH
    size = rounding(precision, form)
    # decode takes the MQA form, which rounds elsewhere
    limit = 1.0 if form == "mha" and decode_from else 0.2
    assert error(out[same], expected[same]) < limit * size
    assert error(out, second(precision, hidden, sets).out) < 1.1 * size


@pytest.mark.parametrize("seq_len_q", [1, 3])
@pytest.mark.parametrize("precision", LOW)
def test_sequences_of_different_lengths_in_one_batch(precision, seq_len_q):
    """Rows of all sequences together: most are equal to the bit, and in one of a single query one
    value at the border of two roundings is half of all there is (0.56, by the CPU)."""
    lengths = [seq_len_q, 9, 20, 33, 48, 64, 77, 81]
    prompts = [hidden_of(precision, seed=b, length=n) for b, n in enumerate(lengths)]
    layer, cache = sparse(precision), make_cache(precision, batch_size=len(lengths), seed=5)
    for b, prompt in enumerate(prompts):
        if prompt.shape[0] > seq_len_q:
            layer.prefill(prompt[:-seq_len_q], cache, sequence=b)
    new = torch.stack([prompt[-seq_len_q:] for prompt in prompts])
    made = layer.decode(new, cache, torch.tensor(lengths))
    plain_rows, exact_rows = [], []
    for b, prompt in enumerate(prompts):
        sets = feed(layer, prompt, make_cache(precision))[1]
        sets[-seq_len_q:] = sets_of(made.topk_indices[b], lengths[b] - seq_len_q, seq_len_q)
        plain = plain_of(precision, prompt, sets)
        assert selects(sets, plain.scores)
        plain_rows.append(plain.out[-seq_len_q:])
        exact_rows.append(second(precision, prompt, sets).out[-seq_len_q:])
        assert error(made.out[b], plain_rows[b]) < error(plain_rows[b], exact_rows[b])
    plain_out, exact_out = torch.stack(plain_rows), torch.stack(exact_rows)
    assert error(made.out, plain_out) < 0.3 * error(plain_out, exact_out)


@pytest.mark.parametrize("form", FORMS)
def test_enough_keys_make_it_the_dense_layer(form):
    hidden = hidden_of("bf16")
    dense, _ = feed(
        DenseLatentAttention(weights("bf16"), rope=TABLE),
        hidden,
        dense_cache(1, LENGTH, "bf16", "cpu"),
    )
    out, _ = feed(sparse("bf16", form, topk=LENGTH), hidden, make_cache("bf16"))
    exact = second("bf16", hidden, topk=None).out
    size = error(plain_of("bf16", hidden, topk=None, form="mha").out, exact)
    assert error(dense, exact) < 1.1 * size
    assert error(out, exact) < 1.1 * size
    # in one form they are the same numbers, but for sums in another order
    assert error(out, dense) < (0.2 if form == "mha" else 1.2) * size


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("decode_from", [None, 60])
def test_dense_layer_is_rounded_as_the_formula_says(precision, decode_from):
    """Its cache is bf16 at both precisions."""
    hidden = hidden_of(precision)
    layer = DenseLatentAttention(weights(precision), rope=TABLE)
    out, _ = feed(layer, hidden, dense_cache(1, LENGTH, "bf16", "cpu"), [40], decode_from)
    exact = second(precision, hidden, topk=None).out
    rules = {"topk": None, "fp8_latent": False, "fp8_index": False}
    rows = slice(decode_from, None)
    form = "mqa" if decode_from else "mha"
    plain = plain_of(precision, hidden, form=form, **rules).out
    size = error(plain[rows], exact[rows])
    assert error(out[rows], plain[rows]) < 0.2 * size


@pytest.mark.parametrize("precision", LOW)
def test_ranks_add_up_to_the_whole(precision):
    hidden, _, expected, expected_sets = whole(precision, "mqa")
    total = torch.zeros(LENGTH, PRESET.hidden_size)
    for rank in range(2):
        layer = sparse(precision, rank=rank, num_ranks=2)
        out, sets = feed(layer, hidden, make_cache(precision))
        assert len(same_rows(sets, expected_sets)) > 0.9 * LENGTH
        total += torch.where(
            torch.tensor([a == b for a, b in zip(sets, expected_sets, strict=True)])[:, None],
            out.float(),
            torch.nan,
        )
    kept = total.isfinite().all(1)
    assert kept.double().mean() > 0.9
    # each rank rounds its share of the sum to bf16
    assert error(total[kept], expected[kept]) < 5e-3
