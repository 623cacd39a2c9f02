"""Weights of a layer from the published files, and back: names, blocks of e4m3, ranks, refusals."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_bench.kernels.layer_checkpoint import load_weights, published_shapes, save_weights
from dsa_bench.kernels.layer_weights import Matrix, make_weights, quantize_blocks
from dsa_bench.operator import UsageError
from dsa_bench.preset import PRESETS
from tests.layer_blocks import E4M3, TINY, expand, randn

MATRICES = (
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b",
    "indexer.wk",
)  # fmt: skip


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
