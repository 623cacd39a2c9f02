"""FlashAttention-3 and -4, FlexAttention, torch's efficient kernel at the border; what each takes.

A fake computes the answer in torch from exactly what it was handed, by the library's own layout,
base of lse and alignment of the causal mask, so that a mistake of ours is a wrong number here.
FlexAttention is its own fake: uncompiled it runs on a CPU.
"""

import dataclasses
import types
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.baselines import flash_attn_3, flash_attn_4, flex_attention, sdpa
from dsa_bench.baselines.dense_attention import OPERATOR
from dsa_bench.library import Library
from dsa_bench.record import LENGTH_KINDS
from tests.dense_library_cases import (
    AMPERE,
    CPU,
    HOPPER,
    PREFILL_SIZES,
    attend,
    decode_shape,
    failed,
    module,
    on_this_gpu,
    prefill_shape,
    sharp_inputs,
)


def fake_flash_attn_func(q, k, v, *, softmax_scale, causal, return_lse):
    """[batch, rows, heads, width]; lse [batch, heads, rows], natural."""
    assert causal and return_lse
    parts = [attend(*one, softmax_scale, causal) for one in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts])


def fake_flash_attn_with_kvcache(
    q, k_cache, v_cache, *, qv, cache_seqlens, page_table, softmax_scale, causal, num_splits,
    return_softmax_lse,
):  # fmt: skip
    """Rope columns in q and k, the others in qv and v; lse [batch, heads, rows], natural."""
    assert causal and return_softmax_lse and num_splits == 0
    assert q.shape[-1] == k_cache.shape[-1] == 64 and qv.shape[-1] == v_cache.shape[-1] == 512
    parts = []
    for b, query in enumerate(torch.cat([qv, q], -1)):
        if page_table is None:
            assert cache_seqlens is None
            values, rope = v_cache[b], k_cache[b]
        else:
            assert page_table.dtype == cache_seqlens.dtype == torch.int32
            length = int(cache_seqlens[b])
            pages = page_table[b, : -(-length // v_cache.shape[1])].long()
            assert (pages >= 0).all()
            values, rope = (x[pages].flatten(0, 1)[:length] for x in (v_cache, k_cache))
        keys = torch.cat([values, rope], -1).expand(-1, q.shape[2], -1)
        parts.append(attend(query, keys, keys[..., :512], softmax_scale, causal))
    return torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts]), None


@pytest.mark.parametrize("kind", LENGTH_KINDS)
@pytest.mark.parametrize("seq_len_q", [1, 3])
def test_flash_attn_3_decode(monkeypatch, seq_len_q: int, kind: str) -> None:
    fake = types.SimpleNamespace(flash_attn_with_kvcache=fake_flash_attn_with_kvcache)
    monkeypatch.setattr(flash_attn_3, "load", lambda: fake)
    inputs = sharp_inputs(decode_shape(4, seq_len_q, 131, lengths=kind))
    assert not failed(OPERATOR.check(inputs, flash_attn_3.run(inputs)))


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_flash_attn_4_prefill(monkeypatch, seq_len_q: int, seq_len_kv: int) -> None:
    module(monkeypatch, "flash_attn.cute", flash_attn_func=fake_flash_attn_func)
    flash_attn_4.load.cache_clear()
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    assert not failed(OPERATOR.check(inputs, flash_attn_4.run(inputs)))
    flash_attn_4.load.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), [*PREFILL_SIZES, (200, 300), (256, 256)])
def test_flex_attention_prefill_uncompiled(monkeypatch, seq_len_q: int, seq_len_kv: int) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flex_attention.prepare.cache_clear()
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    assert not failed(OPERATOR.check(inputs, flex_attention.run(inputs)))
    flex_attention.prepare.cache_clear()


@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv"),
    [(1, 1), (1, 129), (1, 128), (128, 128), (128, 384), (130, 130), (300, 1000), (256, 257)],
)
def test_flex_attention_table_is_that_of_every_pair(seq_len_q: int, seq_len_kv: int) -> None:
    """A block that counts as full is not masked, one that is missing is not read."""
    mask = flex_attention.causal_block_mask(seq_len_q, seq_len_kv, "cpu")
    sees = torch.ones(seq_len_q, seq_len_kv, dtype=torch.bool).tril(seq_len_kv - seq_len_q)
    for row in range(mask.kv_num_blocks.shape[-1]):
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        rows = sees[row * 128 : row * 128 + 128]
        seen = [tile.any().item() for tile in rows.split(128, dim=1)]
        whole = [tile.all().item() and tile.shape[1] == 128 for tile in rows.split(128, dim=1)]
        assert full == [j for j, w in enumerate(whole) if w]
        assert partial == [j for j, (s, w) in enumerate(zip(seen, whole, strict=True)) if s > w]


def fake_efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, *rest, **named):
    """[batch, rows, heads, width]; lse [batch, heads, rows padded to 32], natural."""
    assert (bias, cu_q, cu_k, max_q, max_k, dropout) == (None, None, None, None, None, 0.0)
    assert mask_type == 2
    out, lse = attend(q[0], k[0], v[0], named["scale"], True)
    padding = -q.shape[1] % 32
    padded = torch.nn.functional.pad(lse.T[None], (0, padding), value=float("inf"))
    nothing = torch.empty((), dtype=torch.int64)
    return out[None], padded, nothing, nothing, q.shape[1], k.shape[1]


@pytest.mark.parametrize(("seq_len_q", "seq_len_kv"), PREFILL_SIZES)
def test_sdpa_efficient_prefill(seq_len_q: int, seq_len_kv: int) -> None:
    inputs = sharp_inputs(prefill_shape(seq_len_q, seq_len_kv))
    with torch.library._scoped_library("aten", "IMPL") as fakes:
        fakes.impl("_efficient_attention_forward", fake_efficient, "CPU")
        outputs = sdpa.run_efficient(inputs)
    assert not failed(OPERATOR.check(inputs, outputs))


@pytest.mark.parametrize(
    ("name", "shape", "machine", "says"),
    [
        ("flash_attn_4", prefill_shape(4, 8), HOPPER, None),
        ("flash_attn_4", prefill_shape(4, 8), AMPERE, "Hopper"),
        ("flash_attn_4", decode_shape(1, 1, 64), HOPPER, "up to 256"),
        ("flex_attention", prefill_shape(4, 8), AMPERE, None),
        ("flex_attention", prefill_shape(4, 8), CPU, "CUDA"),
        ("flex_attention", decode_shape(1, 1, 64), HOPPER, "power of 2"),
        ("flex_attention", prefill_shape(4, 2**31 // 192 // 128, 128), AMPERE, None),
        ("flex_attention", prefill_shape(4, 2**31 // 192 // 128 + 1, 128), AMPERE, "32 bits"),
        ("sdpa_efficient", prefill_shape(4, 2**31 // 192 // 128, 128), AMPERE, None),
        ("sdpa_efficient", prefill_shape(4, 2**31 // 192 // 128 + 1, 128), AMPERE, "32 bits"),
        ("sdpa_efficient", prefill_shape(4, 8), AMPERE, None),
        ("sdpa_efficient", prefill_shape(4, 8), CPU, "CUDA"),
        ("sdpa_efficient", decode_shape(1, 1, 64), HOPPER, "only its prefill"),
        ("flashinfer", prefill_shape(4, 8), HOPPER, None),
        ("flashinfer", decode_shape(2, 1, 65, num_heads=80), HOPPER, None),
        ("flashinfer", decode_shape(2, 2, 65, num_heads=80), HOPPER, "divides 128"),
        ("flashinfer", prefill_shape(4, 8), AMPERE, "Hopper"),
        ("flashinfer", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("flash_attn_3", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("triton", decode_shape(2, 1, 65, lengths="spread"), HOPPER, None),
        ("gluon", decode_shape(2, 1, 65), HOPPER, None),
        ("gluon", decode_shape(2, 1, 65, lengths="spread"), HOPPER, "sequences of one length"),
        ("sdpa", decode_shape(2, 1, 65, lengths="spread"), CPU, None),
    ],
)
def test_each_says_what_it_takes(monkeypatch, name: str, shape: Any, machine: Any, says) -> None:
    monkeypatch.setattr(Library, "obstacle", lambda self: None)
    reason = registry.implementation("dense_attention", name).supports(shape, machine)
    assert reason is None if says is None else says in str(reason)


def test_a_module_below_a_missing_package_is_missing() -> None:
    library = dataclasses.replace(flash_attn_4.LIBRARY, modules=("no_such_package.part",))
    assert "is not installed" in str(library.obstacle())


@pytest.mark.gpu
# torch's own compiler gives it, on its first use
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("seq_len_q", "seq_len_kv"), [(1, 1), (1, 300), (128, 128), (100, 1000), (513, 1025)]
)
@pytest.mark.parametrize("name", ["flash_attn_4", "flex_attention", "sdpa_efficient", "flashinfer"])
def test_prefill_on_a_gpu(name: str, seq_len_q: int, seq_len_kv: int) -> None:
    shape = prefill_shape(seq_len_q, seq_len_kv, num_heads=16)
    part = on_this_gpu("dense_attention", name, shape)
    inputs = sharp_inputs(shape, device="cuda")
    assert not failed(OPERATOR.check(inputs, part.run(inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["spread", "one-long"])
@pytest.mark.parametrize(("batch_size", "seq_len_q"), [(2, 1), (40, 1), (7, 3)])
@pytest.mark.parametrize("name", ["flash_attn_3", "flash_mla", "flashinfer", "triton"])
def test_decode_of_different_lengths_on_a_gpu(
    name: str, batch_size: int, seq_len_q: int, kind: str
) -> None:
    shape = decode_shape(batch_size, seq_len_q, 8200, 128, kind)
    part = on_this_gpu("dense_attention", name, shape)
    inputs = sharp_inputs(shape, device="cuda")
    assert not failed(OPERATOR.check(inputs, part.run(inputs)))
