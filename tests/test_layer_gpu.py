"""The layers with their kernels, at the sizes of V3.2 and a short prompt, on a GPU.

`own` runs the kernels that are chosen on this machine. `exact` are the torch references on fp32
tensors (e4m3 weights, activations and caches belong to the layer and stay), `plain` the references
on bf16 tensors. All attend to the keys that `own` selected, so that errors are of arithmetic alone;
selections are compared apart.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch

from dsa_bench import layers, machine, registry
from dsa_bench.accuracy import BUDGET_FACTOR, compare_to_budget
from dsa_bench.baselines.dense_latent_attention import DenseLatentAttention, dense_cache
from dsa_bench.kernels.layer import DeepSeekSparseAttention
from dsa_bench.kernels.layer_cache import LayerCache
from dsa_bench.kernels.layer_checkpoint import from_published
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from tests import hostile, independent_layer

LENGTH, TOPK = 2304, 2048
"""Selection matters for the last 256 tokens."""


@dataclass(frozen=True)
class Setting:
    """What a test computes; the sizes are those of a preset."""

    precision: str
    preset: str = "v3.2"
    device: str = "cuda"
    length: int = LENGTH
    topk: int = TOPK
    num_ranks: int = 1
    form: str = "mqa"

    @property
    def hidden(self):
        size = PRESETS[self.preset].hidden_size
        return independent_layer.random_hidden(self.length, size).to(self.device).bfloat16()

    @property
    def weights(self):
        return make_weights(self.preset, self.precision, self.num_ranks, self.device)

    def cache(self, batch_size=1):
        """Pages in any order, NaN wherever nothing has been written."""
        preset = PRESETS[self.preset]
        made = LayerCache.allocate(preset, batch_size, self.length, self.precision, self.device)
        for tensor in (made.kv_cache, made.index_cache):
            tensor.fill_(255 if self.precision == "fp8" else torch.nan)
        g = torch.Generator().manual_seed(batch_size)
        pages = torch.randperm(made.block_table.numel(), generator=g).int().to(self.device)
        return replace(made, block_table=pages.view_as(made.block_table))

    def wide_cache(self, batch_size=1):
        made = self.cache(batch_size)
        if self.precision == "fp8":
            return made
        return replace(made, kv_cache=made.kv_cache.float(), index_cache=made.index_cache.float())


@functools.cache
def random_tensors(preset):
    """Under the names behind `self_attn.`, on the CPU."""
    sizes = PRESETS[preset]
    named = independent_layer.random_weights(
        hidden_size=sizes.hidden_size,
        q_lora_rank=sizes.q_lora_rank,
        num_heads=sizes.num_heads,
        index_heads=sizes.index_heads,
    )
    return {name.removeprefix("self_attn."): x for name, x in named.items()}


@functools.cache
def make_weights(preset, precision, num_ranks, device):
    """Of the first of so many ranks."""
    tensors = {name: x.to(device) for name, x in random_tensors(preset).items()}
    return from_published(tensors, {}, PRESETS[preset], precision=precision, num_ranks=num_ranks)


def wide(weights):
    """The same values in fp32, but for e4m3."""
    return weights.map(lambda x: x.float() if x.dtype == torch.bfloat16 else x)


def three(setting):
    """own, plain and exact."""
    weights, topk = setting.weights, setting.topk
    stages = layers.choose_stages(weights, topk, setting.precision, setting.device)
    return (
        DeepSeekSparseAttention(weights, topk=topk, form=setting.form, stages=stages),
        DeepSeekSparseAttention(weights, topk=topk, form=setting.form),
        DeepSeekSparseAttention(wide(weights), topk=topk, form="mqa"),
    )


def assert_within_budget(name, actual, plain, exact):
    """At most twice as far from exact as plain bf16 is."""
    check = compare_to_budget(name, actual, exact, plain)
    assert check.passed, check


@torch.inference_mode()
def prefill_all(setting, sizes):
    """Chunks of a prompt through all three; returns the caches, outputs checked."""
    own, plain, exact = three(setting)
    caches = setting.cache(), setting.cache(), setting.wide_cache()
    hidden, start = setting.hidden, 0
    for size in sizes:
        part = hidden[start : start + size]
        with hostile.poisoned_outputs():
            made = own.prefill(part, caches[0], start=start)
        simple, best = (
            layer.prefill_tokens(
                layer.chunk(x, cache, start, 0), cache, topk_indices=made.topk_indices
            )
            for layer, cache, x in ((plain, caches[1], part), (exact, caches[2], part.float()))
        )
        assert_within_budget(f"tokens from {start}", made.out, simple.out, best.out)
        start += size
    assert start == setting.length


def check_decode(setting, lengths, seq_len_q):
    """New tokens of sequences of different lengths, behind prompts that each prefilled itself."""
    own, plain, exact = three(setting)
    count, hidden = len(lengths), setting.hidden
    lens = torch.tensor(lengths, device=setting.device)
    caches = setting.cache(count), setting.cache(count), setting.wide_cache(count)
    for layer, cache in zip((own, plain, exact), caches, strict=True):
        x = hidden.float() if layer is exact else hidden
        for b, length in enumerate(lengths):
            if length > seq_len_q:
                layer.prefill(x[: length - seq_len_q], cache, sequence=b)
    new = torch.stack([hidden[length - seq_len_q : length] for length in lengths])
    with hostile.poisoned_outputs():
        made = own.decode(new, caches[0], lens)
    with torch.inference_mode():
        simple, best = (
            layer.decode_tokens(layer.batch(x, cache, lens), cache, topk_indices=made.topk_indices)
            for layer, cache, x in ((plain, caches[1], new), (exact, caches[2], new.float()))
        )
    assert_within_budget("decode", made.out, simple.out, best.out)
    visible = lens[:, None] - torch.arange(seq_len_q - 1, -1, -1, device=setting.device)
    listed = (made.topk_indices >= 0).sum(2)
    assert torch.equal(listed, visible.clamp(max=setting.topk))


def check_selection(setting):
    """As many keys differ from those of the exact scores as twice those that plain's differ by."""
    hidden = setting.hidden
    made = []
    for layer, cache, x in zip(
        three(setting),
        (setting.cache(), setting.cache(), setting.wide_cache()),
        (hidden, hidden, hidden.float()),
        strict=True,
    ):
        chosen = layer.prefill(x, cache).topk_indices[setting.topk :].long()
        assert (chosen >= 0).all()
        mask = torch.zeros(chosen.shape[0], setting.length, dtype=torch.bool, device=x.device)
        made.append(mask.scatter_(1, chosen, True))
    own, plain, exact = made
    assert (own.sum(1) == setting.topk).all()
    limit = BUDGET_FACTOR * int((plain ^ exact).sum()) + 2 * own.shape[0]
    assert int((own ^ exact).sum()) <= limit
    assert limit < 0.1 * own.sum()


PRECISIONS = ["bf16", "fp8"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["mqa", "mha"])
@pytest.mark.parametrize("sizes", [(2304,), (1, 63, 64, 1000, 1176)], ids=["whole", "chunks"])
def test_prefill(precision, form, sizes):
    prefill_all(Setting(precision, form=form), sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_prefill_of_a_rank(precision):
    prefill_all(Setting(precision, num_ranks=8), (LENGTH,))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("lengths", "seq_len_q"), [((1, 65, 2100, 2304), 1), ((2304, 3, 700), 3)])
def test_decode(precision, lengths, seq_len_q):
    check_decode(Setting(precision), lengths, seq_len_q)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_selection(precision):
    check_selection(Setting(precision))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forms_and_chunks_select_the_same(precision):
    """Caches are written by one kernel from one product, so only sums may differ in their order."""
    setting = Setting(precision)
    whole, parts = [], []
    for form, sizes, rows in (("mqa", (LENGTH,), whole), ("mha", (1100, LENGTH - 1100), parts)):
        layer, cache, start = three(replace(setting, form=form))[0], setting.cache(), 0
        for size in sizes:
            made = layer.prefill(setting.hidden[start : start + size], cache, start=start)
            rows.append(made.topk_indices)
            start += size
    tail = LENGTH - TOPK
    a, b = (rows[-1][-tail:].sort(1).values for rows in (whole, parts))
    shared = torch.tensor(
        [len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    assert shared.double().mean() > 0.99 * TOPK


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_dense_layer(phase, precision):
    check_dense(Setting(precision), phase)


def check_dense(setting, phase):
    case = Case(
        op="dense_layer", impl="auto", phase=phase, seq_len_kv=setting.length,
        seq_len_q=setting.length if phase == "prefill" else 1, precision=setting.precision,
        num_heads=setting.weights.num_heads, preset=setting.preset,
    )  # fmt: skip
    here, preset = machine.detect(setting.device), PRESETS[setting.preset]
    names = registry.choose("dense_layer", case, preset, here)
    stages = {stage: registry.implementation(stage, name) for stage, name in names.items()}
    hidden, made = setting.hidden, []
    for weights, chosen, dtype in (
        (setting.weights, stages, "bf16"),
        (setting.weights, None, "bf16"),
        (wide(setting.weights), None, "fp32"),
    ):
        layer = DenseLatentAttention(weights, stages=chosen)
        x = hidden.float() if dtype == "fp32" else hidden
        cache = dense_cache(2, setting.length, dtype, setting.device)
        if phase == "prefill":
            made.append(layer.prefill(x, cache, sequence=1).out)
            continue
        plain = DenseLatentAttention(weights)  # the prompt itself is not what is compared
        for b in range(2):
            plain.prefill(x[:-1], cache, sequence=b)
        lens = torch.full((2,), setting.length, device=setting.device)
        made.append(layer.decode(x[-1:].expand(2, 1, -1), cache, lens).out)
    assert_within_budget(phase, *made)
