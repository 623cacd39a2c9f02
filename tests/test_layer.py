"""The sparse and the dense layer in fp32 against a second implementation that shares no code."""

import functools

import pytest
import torch

from dsa_bench.baselines.dense_latent_attention import (
    DenseLatentAttention,
    HeadKeys,
    dense_cache,
)
from dsa_bench.kernels.layer import DeepSeekSparseAttention
from dsa_bench.kernels.layer_checkpoint import load_weights, save_weights
from tests.test_independent_layer import MISTAKES
from tests.tiny_layer import (
    EXACT,
    LENGTH,
    PRESET,
    TABLE,
    TOPK,
    agrees,
    feed,
    hidden_of,
    largest,
    make_cache,
    second,
    sets_of,
    sparse,
    weights,
)


@functools.cache
def whole_in_fp32(form):
    hidden = hidden_of("fp32")
    return hidden, *feed(sparse("fp32", form), hidden, make_cache("fp32"))


@pytest.mark.parametrize("form", ["mqa", "mha"])
def test_prefill_is_the_formula(form):
    hidden, out, sets = whole_in_fp32(form)
    assert agrees(out, sets, "fp32", hidden)
    # near-ties are few: nearly all sets are the same, key by key
    expected = second("fp32", hidden)
    clear = expected.margins() > 1e-5
    assert clear[TOPK:].double().mean() > 0.5
    assert all(sets[t] == expected.selected[t] for t in clear.nonzero().flatten().tolist())


def test_dense_prefill_and_decode_are_the_formula():
    hidden = hidden_of("fp32")
    layer = DenseLatentAttention(weights("fp32"), rope=TABLE)
    expected = second("fp32", hidden, topk=None).out
    for sizes, decode_from in ((None, None), ([7, 64], None), ([50], 50)):
        cache = dense_cache(1, LENGTH, "fp32", "cpu")
        out, _ = feed(layer, hidden, cache, sizes, decode_from)
        assert largest(out, expected) < EXACT
    cache = dense_cache(2, LENGTH, "fp32", "cpu")
    kept = HeadKeys.allocate(PRESET, PRESET.num_heads, LENGTH, torch.float32, "cpu")
    for part in (slice(0, 13), slice(13, 60), slice(60, LENGTH)):
        made = layer.prefill(hidden[part], cache, start=part.start, sequence=1, head_keys=kept)
        assert largest(made.out, expected[part]) < EXACT


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("form", ["mqa", "mha"])
def test_mistakes_are_seen(form, name):
    """The comparison above fails for a layer that differs from the formula in one thing."""
    hidden, out, sets = whole_in_fp32(form)
    assert not agrees(out, sets, "fp32", hidden, limit=1e-3, **MISTAKES[name])


@pytest.mark.parametrize("name", [name for name in MISTAKES if "index" not in name])
def test_mistakes_of_the_dense_layer_are_seen(name):
    hidden = hidden_of("fp32")
    layer = DenseLatentAttention(weights("fp32"), rope=TABLE)
    out, sets = feed(layer, hidden, dense_cache(1, LENGTH, "fp32", "cpu"))
    is_of_the_indexer = set(MISTAKES[name]) & {"key_norm_bias", "key_norm_centred"}
    same = agrees(out, sets, "fp32", hidden, limit=1e-3, topk=None, **MISTAKES[name])
    assert same == bool(is_of_the_indexer)


def test_forms_are_equal():
    _, mqa, sets = whole_in_fp32("mqa")
    _, mha, other = whole_in_fp32("mha")
    _, auto, third = whole_in_fp32("auto")
    assert sets == other == third  # the same arithmetic up to here
    assert largest(mha, mqa) < EXACT
    assert torch.equal(auto, mqa)  # more keys than topk
    short = hidden_of("fp32", length=TOPK)
    assert torch.equal(
        feed(sparse("fp32", "auto"), short, make_cache("fp32"))[0],
        feed(sparse("fp32", "mha"), short, make_cache("fp32"))[0],
    )


CHUNKS = {
    "ones": ([1], None),
    "sevens": ([7], None),
    "up-to-64": ([64], None),
    "uneven": ([3, 17, 1, 40, 2], None),
    "then-decode": ([TOPK + 6], TOPK + 6),
    "decode-alone-from-the-second": ([1], 1),
}


@pytest.mark.parametrize("form", ["mqa", "mha", "auto"])
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_and_decode_are_the_whole_prompt(name, form):
    hidden, whole, whole_sets = whole_in_fp32("mqa")
    out, sets = feed(sparse("fp32", form), hidden, make_cache("fp32", seed=3), *CHUNKS[name])
    assert agrees(out, sets, "fp32", hidden)
    same = [t for t in range(LENGTH) if sets[t] == whole_sets[t]]
    assert len(same) > 0.9 * LENGTH
    assert largest(out[same], whole[same]) < EXACT


# everything selected: the dense layer


@pytest.mark.parametrize("form", ["mqa", "mha", "auto"])
def test_enough_keys_make_it_the_dense_layer(form):
    hidden = hidden_of("fp32")
    dense = DenseLatentAttention(weights("fp32"), rope=TABLE)
    expected, _ = feed(dense, hidden, dense_cache(1, LENGTH, "fp32", "cpu"))
    for topk in (LENGTH, LENGTH + 30):
        out, sets = feed(sparse("fp32", form, topk=topk), hidden, make_cache("fp32"), [40], 80)
        assert sets == [set(range(t + 1)) for t in range(LENGTH)]
        assert largest(out, expected) < EXACT
    out, _ = feed(sparse("fp32", form), hidden, make_cache("fp32"))
    assert largest(out[:TOPK], expected[:TOPK]) < EXACT
    assert largest(out[TOPK:], expected[TOPK:]) > 0.1


@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_sequences_of_different_lengths_in_one_batch(seq_len_q):
    lengths = [seq_len_q, 33, 81]
    prompts = [hidden_of("fp32", seed=b, length=n) for b, n in enumerate(lengths)]
    layer, cache = sparse("fp32"), make_cache("fp32", batch_size=3, seed=5)
    for b, prompt in enumerate(prompts):
        if prompt.shape[0] > seq_len_q:
            layer.prefill(prompt[:-seq_len_q], cache, sequence=b)
    new = torch.stack([prompt[-seq_len_q:] for prompt in prompts])
    made = layer.decode(new, cache, torch.tensor(lengths))
    for b, prompt in enumerate(prompts):
        out, sets = feed(layer, prompt, make_cache("fp32"))
        out[-seq_len_q:] = made.out[b]
        sets[-seq_len_q:] = sets_of(made.topk_indices[b], lengths[b] - seq_len_q, seq_len_q)
        assert agrees(out, sets, "fp32", prompt)


def test_prompts_do_not_touch_each_other():
    prompts = [hidden_of("fp32", seed=b, length=40) for b in range(3)]
    layer, cache = sparse("fp32"), make_cache("fp32", batch_size=3, max_tokens=40, seed=1)
    for start in (0, 11):
        for b in (2, 0, 1):
            part = prompts[b][start : 11 if start == 0 else None]
            made = layer.prefill(part, cache, start=start, sequence=b)
            if start:
                alone, _ = feed(layer, prompts[b], make_cache("fp32", max_tokens=40))
                assert largest(made.out, alone[11:]) < EXACT


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("form", ["mqa", "mha"])
def test_ranks_add_up_to_the_whole(tmp_path, form, num_ranks):
    """Each rank reads its heads of a file; prefill, then decode."""
    save_weights(weights("fp32"), tmp_path / "layer.safetensors", layer=7)
    hidden, whole, whole_sets = whole_in_fp32(form)
    total = torch.zeros_like(whole)
    for rank in range(num_ranks):
        part = load_weights(
            tmp_path / "layer.safetensors", PRESET, layer=7, precision="fp32", rank=rank,
            num_ranks=num_ranks,
        )  # fmt: skip
        layer = DeepSeekSparseAttention(part, topk=TOPK, form=form, rope=TABLE)
        out, sets = feed(layer, hidden, make_cache("fp32"), decode_from=LENGTH - 4)
        assert sets == whole_sets  # every rank selects the same keys
        assert largest(out, whole) > 0.1
        total += out
    assert largest(total, whole) < EXACT


def test_ranks_of_the_dense_layer_add_up():
    hidden = hidden_of("fp32")
    whole = second("fp32", hidden, topk=None).out
    parts = [DenseLatentAttention(weights("fp32", rank, 2), rope=TABLE) for rank in range(2)]
    caches = [dense_cache(1, LENGTH, "fp32", "cpu") for _ in parts]
    outs = [feed(p, hidden, c, [50], 80)[0] for p, c in zip(parts, caches, strict=True)]
    assert largest(sum(outs), whole) < EXACT
