"""Weights of a layer: blocks of e4m3, the published files, and what the made-up ones look for."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_bench.kernels.layer_checkpoint import load_weights, published_shapes, save_weights
from dsa_bench.kernels.layer_weights import (
    Matrix,
    embedding,
    join,
    make_hidden,
    make_weights,
    quantize_blocks,
)
from dsa_bench.operator import UsageError
from dsa_bench.preset import PRESETS, Preset

TINY = Preset(name="tiny", hidden_size=256, q_lora_rank=128, num_heads=4, index_heads=2)
CPU = PRESETS["v3.2-cpu"]
E4M3 = torch.float8_e4m3fn
ROWS = (256, 128, 576)
"""Rows of q_a, indexer.wk and kv_a in v3.2-cpu."""
MATRICES = (
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b",
    "indexer.wk",
)  # fmt: skip


def randn(*dims, seed=0):
    return torch.randn(*dims, generator=torch.Generator().manual_seed(seed))


def expand(scale, shape):
    """A scale for each element, block by block."""
    whole = torch.empty(shape, dtype=torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            whole[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = scale[i, j]
    return whole


# matrices


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


# the published files


def published(preset=TINY, *, dtype=torch.float32, in_e4m3=False, layer=0, seed=0):
    """Names -> tensors of one layer as in the published checkpoint; scales are no powers of two."""
    tensors, prefix = {}, f"model.layers.{layer}.self_attn."
    for i, (name, shape) in enumerate(published_shapes(preset, preset.num_heads).items()):
        tensor = randn(*shape, seed=100 * seed + i)
        if name.startswith("indexer.k_norm"):
            tensors[prefix + name] = tensor  # fp32 in every file
        elif in_e4m3 and name.removesuffix(".weight") in MATRICES:
            blocks = [-(-size // 128) for size in shape]
            tensors[prefix + name] = tensor.to(E4M3)
            tensors[prefix + name + "_scale_inv"] = 0.01 + randn(*blocks, seed=i).abs()
        else:
            tensors[prefix + name] = tensor.to(dtype)
    return tensors


def exact(tensors, name, layer=0):
    """A tensor in fp32: value times the scale of its block."""
    full = f"model.layers.{layer}.self_attn.{name}"
    scale = tensors.get(full + "_scale_inv")
    values = tensors[full].float()
    return values if scale is None else values * expand(scale, values.shape)


def test_names_and_shapes_of_the_published_model():
    """As listed in model.safetensors.index.json of DeepSeek-V3.2-Exp and in its shards."""
    shapes = published_shapes(PRESETS["v3.2"], 128)
    assert shapes == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
        "indexer.wq_b.weight": (8192, 1536),
        "indexer.wk.weight": (128, 7168),
        "indexer.k_norm.weight": (128,),
        "indexer.k_norm.bias": (128,),
        "indexer.weights_proj.weight": (64, 7168),
    }


@pytest.fixture
def fp8_file(tmp_path):
    tensors = published(dtype=torch.bfloat16, in_e4m3=True)
    save_file(tensors, tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors", tensors


def expect_parts(weights, tensors, heads, *, approximately=0.0):
    """Every field against the file, for heads first … last of four."""
    first, last = heads
    low = functools.partial(exact, tensors)
    kv_b = low("kv_b_proj.weight").view(4, 256, 512)[first:last]
    down = [low(f"{n}.weight") for n in ("q_a_proj", "indexer.wk", "kv_a_proj_with_mqa")]
    up = [low("q_b_proj.weight")[192 * first : 192 * last], low("indexer.wq_b.weight")]
    expected = {
        "down": torch.cat(down),
        "q_norm": low("q_a_layernorm.weight"),
        "kv_norm": low("kv_a_layernorm.weight"),
        "up": torch.cat(up),
        "w_uk": kv_b[:, :128],
        "w_uv": kv_b[:, 128:],
        "out": low("o_proj.weight")[:, 128 * first : 128 * last],
        "index_k_norm_weight": low("indexer.k_norm.weight"),
        "index_k_norm_bias": low("indexer.k_norm.bias"),
        "index_head_weights": low("indexer.weights_proj.weight"),
    }
    assert weights.num_heads == last - first
    for name, wanted in expected.items():
        part = getattr(weights, name)
        part = part.dequantize(torch.float32) if isinstance(part, Matrix) else part.float()
        assert part.shape == wanted.shape, name
        error = (part - wanted).norm() / wanted.norm()
        assert float(error) <= approximately, name


@pytest.mark.parametrize(
    ("precision", "dtype", "loss"), [("fp32", torch.float32, 0), ("bf16", torch.bfloat16, 2e-3)]
)
def test_block_scaled_file_is_dequantised(fp8_file, precision, dtype, loss):
    path, tensors = fp8_file
    weights = load_weights(path, TINY, precision=precision)
    expect_parts(weights, tensors, (0, 4), approximately=loss)
    assert weights.down.scale is None and weights.up.values.dtype == dtype
    assert {weights.w_uk.dtype, weights.q_norm.dtype, weights.index_head_weights.dtype} == {dtype}
    assert weights.index_k_norm_weight.dtype == weights.index_k_norm_bias.dtype == torch.float32


def test_e4m3_is_kept_bit_by_bit(fp8_file):
    """Scales that are no powers of two would not survive another quantisation."""
    path, tensors = fp8_file
    weights = load_weights(path, TINY, precision="fp8")
    for part in (weights.down, weights.up, weights.out):
        assert part.values.dtype == E4M3 and part.scale.dtype == torch.float32
    wk = weights.down.slice_rows(128, 256)
    stored = tensors["model.layers.0.self_attn.indexer.wk.weight"]
    assert torch.equal(wk.values.view(torch.uint8), stored.view(torch.uint8))
    expect_parts(weights, tensors, (0, 4), approximately=2e-3)
    fp32 = load_weights(path, TINY, precision="fp32")
    for name in ("down", "up", "out"):
        kept = getattr(weights, name).dequantize(torch.float32)
        assert torch.equal(kept, getattr(fp32, name).values), name
    assert weights.w_uk.dtype == torch.bfloat16


def test_bf16_file_is_quantised_in_blocks(tmp_path):
    tensors = published(dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "layer.safetensors")
    weights = load_weights(tmp_path / "layer.safetensors", TINY, precision="fp8")
    expect_parts(weights, tensors, (0, 4), approximately=0.04)
    expected = quantize_blocks(exact(tensors, "o_proj.weight"))
    assert torch.equal(weights.out.scale, expected.scale)
    assert torch.equal(weights.out.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("precision", "loss"), [("fp32", 0), ("bf16", 2e-3), ("fp8", 2e-3)])
def test_ranks_get_their_heads(fp8_file, precision, loss, num_ranks):
    path, tensors = fp8_file
    heads = 4 // num_ranks
    for rank in range(num_ranks):
        part = load_weights(path, TINY, precision=precision, rank=rank, num_ranks=num_ranks)
        expect_parts(part, tensors, (rank * heads, (rank + 1) * heads), approximately=loss)


def test_heads_that_end_inside_a_block(tmp_path):
    """Two ranks of six heads: 3 · 192 rows end in the middle of a block, so fp8 refuses them."""
    preset = replace(TINY, num_heads=6)
    save_file(published(preset, in_e4m3=True), tmp_path / "layer.safetensors")
    path = tmp_path / "layer.safetensors"
    with pytest.raises(UsageError, match="fp8 needs an even number of heads on each rank, got 3"):
        load_weights(path, preset, precision="fp8", num_ranks=2)
    assert load_weights(path, preset, precision="bf16", num_ranks=2).num_heads == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_saved_weights_come_back(tmp_path, precision):
    path = tmp_path / "layer.safetensors"
    saved = make_weights(TINY, precision=precision, seed=1, device="cpu")
    save_weights(saved, path, layer=5)
    loaded = load_weights(path, TINY, layer=5, precision=precision)
    assert loaded.tensors().keys() == saved.tensors().keys()
    for name, tensor in saved.tensors().items():
        assert loaded.tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.tensors()[name].float(), tensor.float()), name
    names = set(load_file(path))
    with_scales = {n for n in published(layer=5, in_e4m3=True) if "kv_b_proj.weight_" not in n}
    assert names == (with_scales if precision == "fp8" else set(published(layer=5)))
    with pytest.raises(ValueError, match="are those of a sparse layer"):
        save_weights(saved.without_index(), path)


@pytest.fixture
def folder(tmp_path):
    """Layers 3 and 12 in two files each, with an index; one of them is in e4m3."""
    layers = {
        3: published(layer=3, seed=3, dtype=torch.bfloat16),
        12: published(layer=12, seed=12, in_e4m3=True),
    }
    weight_map = {"model.embed_tokens.weight": "model-9.safetensors"}  # not downloaded
    for layer, tensors in layers.items():
        for half in range(2):
            part = dict(list(tensors.items())[half::2])
            save_file(part, tmp_path / f"model-{layer}-{half}.safetensors")
            weight_map |= dict.fromkeys(part, f"model-{layer}-{half}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, layers


def test_folder_with_an_index(folder):
    path, layers = folder
    for layer, tensors in layers.items():
        made = load_weights(path, TINY, layer=layer, precision="fp32")
        name = "indexer.weights_proj.weight"
        assert torch.equal(made.index_head_weights, exact(tensors, name, layer))
        o_proj = exact(tensors, "o_proj.weight", layer)
        assert torch.equal(made.out.values, o_proj)


def expect_refusal(match, path, preset=TINY, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        load_weights(path, preset, **arguments)
    assert "\n" not in str(caught.value)


def test_layers_that_are_not_clear(folder):
    path, _ = folder
    expect_refusal(r"holds layer 3, 12; say which, as in \S+:3$", path)
    expect_refusal("holds layer 3, 12, not 1;", path, layer=1)  # nor is 12 taken for 1 or 2
    expect_refusal("holds layer 3, 12, not 2;", path, layer=2)
    # one layer alone is not given for another one
    expect_refusal("holds layer 3, not 12;", path / "model-3-0.safetensors", layer=12)


def test_a_single_layer_without_number(tmp_path):
    tensors = {name.split("layers.0.")[1]: tensor for name, tensor in published().items()}
    save_file(tensors, tmp_path / "layer.safetensors")
    for layer in (None, 7):
        made = load_weights(tmp_path / "layer.safetensors", TINY, layer=layer, precision="fp32")
        assert torch.equal(made.q_norm, tensors["self_attn.q_a_layernorm.weight"])


def test_every_missing_tensor_is_named(tmp_path):
    path = tmp_path / "layer.safetensors"
    whole = published(in_e4m3=True)
    for name in whole:
        save_file({n: tensor for n, tensor in whole.items() if n != name}, path)
        # the first name is what a layer is found by
        missing = r"no attention weights" if name.endswith("q_a_proj.weight") else re.escape(name)
        expect_refusal(missing + r"\b", path)


def test_every_wrong_shape_is_named(tmp_path):
    path = tmp_path / "layer.safetensors"
    whole = published(in_e4m3=True)
    for name, tensor in whole.items():
        save_file(whole | {name: tensor[1:].clone()}, path)
        got = re.escape(f"{list(tensor.shape)} for this preset, got {list(tensor[1:].shape)}")
        expect_refusal(re.escape(name) + " of .* must be " + got, path)


def test_files_that_are_none(tmp_path, folder):
    path = tmp_path / "layer.safetensors"
    expect_refusal("there is no file .*layer.safetensors; name", path)
    path.write_bytes(b"no tensors")
    expect_refusal("cannot be read as safetensors", path)
    save_file({"x": torch.ones(1)}, path)
    expect_refusal("holds no attention weights", path)
    (tmp_path / "empty").mkdir()
    expect_refusal(r"has no model.safetensors.index.json; name a", tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("[]")
    expect_refusal("has no weight_map", tmp_path / "empty")
    (tmp_path / "model-3-1.safetensors").unlink()
    expect_refusal(r"there is no file .*model-3-1.safetensors", tmp_path, layer=3)
    save_file({"x": torch.ones(1)}, tmp_path / "model-3-1.safetensors")
    expect_refusal("which the index says", tmp_path, layer=3)


def test_other_arguments(fp8_file):
    path, _ = fp8_file
    expect_refusal("4 heads do not divide among 3 ranks", path, num_ranks=3)
    with pytest.raises(ValueError, match="rank must be 0 … 1, got 2"):
        load_weights(path, TINY, rank=2, num_ranks=2)
    with pytest.raises(ValueError, match="precision must be one of bf16, fp8, fp32, got 'fp4'"):
        load_weights(path, TINY, precision="fp4")
    integers = {name: tensor.to(torch.int32) for name, tensor in published().items()}
    save_file(integers, path)
    expect_refusal("must be bf16, fp16, fp32 or e4m3, got torch.int32", path)


# made-up weights


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
