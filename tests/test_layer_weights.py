"""Weights of a layer: blocks of e4m3, and what the made-up ones look for."""

import functools
from dataclasses import replace

import pytest
import torch

from dsa_bench.kernels.layer_weights import (
    Matrix,
    embedding,
    join,
    make_hidden,
    make_weights,
    quantize_blocks,
)
from dsa_bench.preset import PRESETS
from tests.layer_blocks import E4M3, TINY, expand, randn

CPU = PRESETS["v3.2-cpu"]
ROWS = (256, 128, 576)
"""Rows of q_a, indexer.wk and kv_a in v3.2-cpu."""


def test_dequantize_multiplies_each_block_by_its_scale():
    values = torch.full((300, 200), 2.0).to(E4M3)
    made = Matrix(values, torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.3, 11.0]]))
    wide = made.dequantize(torch.float32)
    corners = [(0, 0), (127, 128), (128, 127), (255, 199), (256, 0), (299, 128)]
    expected = torch.tensor([2.0, 6.0, 10.0, 14.0, 0.6, 22.0])
    assert torch.equal(torch.stack([wide[at] for at in corners]), expected)
    assert (made.out_features, made.in_features) == (300, 200)
    assert made.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_blocks_are_quantised_alone_by_powers_of_two():
    values = randn(200, 300) * expand(
        torch.tensor([[1.0, 100.0, 0.0], [1e-3, 7.0, 1e4]]), (200, 300)
    )
    made = quantize_blocks(values)
    assert made.values.dtype == E4M3 and made.scale.shape == (2, 3)
    assert torch.equal(torch.frexp(made.scale).mantissa, torch.full((2, 3), 0.5))
    for i in range(2):
        for j in range(3):
            block = values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            amax = max(float(block.abs().max()), 1e-4)
            # the smallest power of two that brings the block within ±448
            assert amax / 448 <= float(made.scale[i, j]) < 2 * amax / 448
    # half a step of three bits, or of the smallest numbers
    limit = values.abs() / 16 + expand(made.scale, values.shape) * 2**-10
    assert bool(((made.dequantize(torch.float32) - values).abs() <= limit * 1.0001).all())


def test_rows_keep_the_scales_of_their_blocks():
    whole = quantize_blocks(randn(384, 256) * expand(torch.tensor([[1.0, 9.0]] * 3), (384, 256)))
    for start, stop in ((0, 384), (128, 300), (256, 384)):
        part = whole.slice_rows(start, stop)
        expected = whole.dequantize(torch.float32)[start:stop]
        assert torch.equal(part.dequantize(torch.float32), expected)
    with pytest.raises(ValueError, match="cut at multiples of 128, got 64"):
        whole.slice_rows(64, 256)
    plain = Matrix(randn(10, 3))
    assert torch.equal(plain.slice_rows(3, 7).values, plain.values[3:7])


def test_join_puts_blocks_below_each_other():
    parts = [quantize_blocks(randn(rows, 256, seed=rows) * rows) for rows in (128, 256, 70)]
    expected = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert torch.equal(join(parts).dequantize(torch.float32), expected)
    with pytest.raises(ValueError, match="70 rows do not fill blocks of 128"):
        join(parts[::-1])


@functools.cache
def made(precision="fp32", seed=4):
    return make_weights(CPU, precision=precision, seed=seed, device="cpu")


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_without_index_leaves_the_other_rows(precision):
    weights = made(precision)
    dense = weights.without_index()
    whole, up = weights.down.dequantize(torch.float32), weights.up.dequantize(torch.float32)
    q_a, _, kv_a = whole.split(ROWS)
    assert torch.equal(dense.down.dequantize(torch.float32), torch.cat([q_a, kv_a]))
    assert torch.equal(dense.up.dequantize(torch.float32), up[: 16 * 192])
    assert dense.index_k_norm_weight is None and dense.index_k_norm_bias is None
    assert dense.index_head_weights is None
    assert dense.down.values.is_contiguous()
    assert not any("index" in name for name in dense.tensors())


def test_query_latents_that_fill_no_blocks_are_refused():
    uneven = replace(TINY, q_lora_rank=192)
    with pytest.raises(ValueError, match="cut at multiples of 128, got 320"):
        make_weights(uneven, precision="fp8", seed=0, device="cpu").without_index()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_to_changes_the_dtype(dtype):
    weights = made("fp8")
    plain = weights.to(dtype)
    assert plain.down.scale is None
    assert torch.equal(plain.out.values, weights.out.dequantize(dtype))
    of_indexer = ("index_k_norm_weight", "index_k_norm_bias")
    for name, tensor in plain.tensors().items():
        assert tensor.dtype == (torch.float32 if name in of_indexer else dtype), name


def test_to_device_moves_every_tensor():
    weights = made("fp8")
    moved = weights.to_device("meta").tensors()
    assert moved.keys() == weights.tensors().keys()
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert [t.dtype for t in moved.values()] == [t.dtype for t in weights.tensors().values()]


def test_embedding_is_orthonormal_and_of_the_seed():
    axes = embedding(CPU, 4, "cpu")
    columns = torch.cat([axes.key, axes.query, axes.bias[:, None]], 1)
    torch.testing.assert_close(columns.T @ columns, torch.eye(129), rtol=0, atol=1e-5)
    assert torch.equal(axes.key, embedding(CPU, 4, "cpu").key)
    assert not torch.allclose(axes.key, embedding(CPU, 5, "cpu").key)


def test_hidden_states_hold_their_content():
    z, y = randn(2, 30, 64, seed=1), randn(2, 30, 64, seed=2)
    h = make_hidden(z, y, CPU, seed=4, noise_seed=9)
    assert h.shape == (2, 30, 1024) and h.dtype == torch.bfloat16
    assert float(h.float().square().mean().sqrt()) == pytest.approx(1, abs=0.1)
    axes = embedding(CPU, 4, "cpu")
    for content, place in ((z, axes.key), (y, axes.query)):
        found = h.float() @ place
        scale = float((found * content).sum() / content.square().sum())
        assert float((found - scale * content).norm() / found.norm()) < 0.05
    share = h.float() @ axes.bias
    assert float(share.std() / share.mean()) < 0.02
    assert torch.equal(h, make_hidden(z, y, CPU, seed=4, noise_seed=9))
    assert not torch.equal(h, make_hidden(z, y, CPU, seed=4, noise_seed=10))


def test_chunks_of_noise_differ(monkeypatch):
    monkeypatch.setattr("dsa_bench.kernels.layer_weights.HIDDEN_CHUNK", 8)
    z = torch.zeros(20, 64)
    h = make_hidden(z, z, CPU, seed=4, noise_seed=9).float()
    noise = h - h.mean(0)
    close = torch.nn.functional.cosine_similarity(noise[:, None], noise[None], dim=-1)
    assert float((close - close.diag().diag()).abs().max()) < 0.5


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CPU.norm_eps)


def scores(precision, queries=48, length=2048):
    """Attention logits [queries, heads, length] and index scores [queries, length], by formula.

    Without rotation: the rows that it turns hold noise alone, which the test below bounds.
    """
    weights = made(precision).to(torch.float32)
    z, y = randn(length, 64, seed=20), randn(length, 64, seed=21)
    h = make_hidden(z, y, CPU, seed=4, noise_seed=22).float()
    q_a, index_k, kv = (h @ weights.down.values.T).split(ROWS, dim=1)
    latent = rms_norm(kv[:, :512])
    up = rms_norm(q_a[-queries:]) @ weights.up.values.T
    main = up[:, : 16 * 192].view(queries, 16, 192)
    index = up[:, 16 * 192 :].view(queries, 8, 128)
    keys = torch.einsum("hnr,sr->hsn", weights.w_uk, latent)
    logits = torch.einsum("thn,hsn->ths", main[..., :128], keys)
    logits = CPU.sm_scale * (logits + main[..., 128:] @ kv[:, 512:].T)
    index_k = torch.nn.functional.layer_norm(index_k, (128,), eps=CPU.norm_eps)
    share = h[-queries:] @ weights.index_head_weights.T
    products = torch.einsum("thd,sd->ths", index, index_k).relu()
    return logits, torch.einsum("th,ths->ts", share, products), share


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_indexer_and_attention_look_for_the_same_keys(precision):
    logits, index, share = scores(precision)
    spread = logits.std(-1)
    assert 3 < float(spread.mean()) < 5
    assert float(share.gt(0).float().mean()) > 0.99
    future = torch.arange(2048) > torch.arange(2048 - 48, 2048)[:, None]
    mass = logits.masked_fill(future[:, None], -torch.inf).softmax(-1).mean(1)
    top = index.masked_fill(future, -torch.inf).topk(128).indices
    kept = mass.gather(1, top).sum(1)
    assert float(kept.mean()) > 0.8  # 0.06 by chance
    assert float(kept.min()) > 0.5


def test_rotated_parts_are_small():
    weights = made("fp32")
    key_rows = weights.down.values[ROWS[0] + ROWS[1] + 512 :]
    main = weights.up.values[: 16 * 192].view(16, 192, -1)
    index = weights.up.values[16 * 192 :].view(8, 128, -1)
    assert float(key_rows.norm(dim=1).max()) < 0.05
    assert (
        float(main[:, 128:].norm(dim=-1).max())
        < 0.05
        < 0.3
        < float(main[:, :64].norm(dim=-1).min())
    )
    assert (
        float(index[:, :64].norm(dim=-1).max())
        < 0.05
        < 0.3
        < float(index[:, 64:].norm(dim=-1).min())
    )


def test_weights_are_of_the_seed_and_of_the_heads():
    again = make_weights(CPU, precision="fp32", seed=4, device="cpu").tensors()
    other = make_weights(CPU, precision="fp32", seed=5, device="cpu").tensors()
    for name, tensor in made().tensors().items():
        assert torch.equal(tensor, again[name]), name
        if "norm" not in name:
            assert not torch.allclose(tensor, other[name]), name
    part = make_weights(CPU, num_heads=2, precision="bf16", seed=4, device="cpu")
    assert part.num_heads == 2 and part.up.values.shape == (2 * 192 + 8 * 128, 256)
    assert part.out.values.shape == (1024, 256) and part.w_uv.shape == (2, 128, 512)
