"""A layer's weights from and to safetensors files, under the names of the published checkpoint.

    model.layers.N.self_attn.  q_a_proj  q_a_layernorm  q_b_proj  kv_a_proj_with_mqa
                               kv_a_layernorm  kv_b_proj  o_proj
                      indexer. wq_b  wk  k_norm (weight and bias)  weights_proj

Each with `.weight`; a matrix in e4m3 has `.weight_scale_inv` beside it, fp32, one number for each
128 x 128 block, with which its values are *multiplied*.

Source: DeepSeek-V3.2-Exp, model.safetensors.index.json and inference/convert.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsa_bench.kernels.layer_weights import LayerWeights, Matrix, join, quantize_blocks
from dsa_bench.kernels.paging import HEAD_DIM_QK, HEAD_DIM_V, INDEX_DIM
from dsa_bench.operator import UsageError
from dsa_bench.preset import Preset

MARK = "self_attn."
SCALE_SUFFIX = "_scale_inv"
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Of everything that is no matrix in e4m3."""


def published_shapes(preset: Preset, num_heads: int) -> dict[str, tuple[int, ...]]:
    """Name behind `self_attn.` -> shape."""
    rank, hidden, heads = preset.q_lora_rank, preset.hidden_size, num_heads
    up = preset.head_dim_nope + preset.head_dim_v_mha
    return {
        "q_a_proj.weight": (rank, hidden),
        "q_a_layernorm.weight": (rank,),
        "q_b_proj.weight": (heads * preset.head_dim_qk_mha, rank),
        "kv_a_proj_with_mqa.weight": (HEAD_DIM_QK, hidden),
        "kv_a_layernorm.weight": (HEAD_DIM_V,),
        "kv_b_proj.weight": (heads * up, HEAD_DIM_V),
        "o_proj.weight": (hidden, heads * preset.head_dim_v_mha),
        "indexer.wq_b.weight": (preset.index_heads * INDEX_DIM, rank),
        "indexer.wk.weight": (INDEX_DIM, hidden),
        "indexer.k_norm.weight": (INDEX_DIM,),
        "indexer.k_norm.bias": (INDEX_DIM,),
        "indexer.weights_proj.weight": (preset.index_heads, hidden),
    }


def load_weights(
    path: str | Path,
    preset: Preset,
    *,
    layer: int | None = None,
    precision: str = "bf16",
    device: torch.device | str = "cpu",
    rank: int = 0,
    num_ranks: int = 1,
) -> LayerWeights:
    """One layer of a file, or of a folder with model.safetensors.index.json.

    Args:
        layer: its number; may be None where there is only one.
        precision: fp8 keeps matrices in e4m3 (others are quantised in blocks), bf16 and fp32
            dequantise them.
        rank: of `num_ranks` that share the heads equally; the indexer is whole on each.
    Raises:
        UsageError: a tensor is missing or has another shape than the preset says.
    """
    if preset.num_heads % num_ranks:
        raise UsageError(f"{preset.num_heads} heads do not divide among {num_ranks} ranks")
    files = _files_of_names(Path(path))
    prefix = _prefix(files, layer, path)
    read = _reader(files, prefix, device, path)
    tensors = {
        name: _expect_shape(name, read(name), shape, path)
        for name, shape in published_shapes(preset, preset.num_heads).items()
    }
    scales = {
        name: read(name + SCALE_SUFFIX)
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    }
    return from_published(
        tensors, scales, preset, precision=precision, rank=rank, num_ranks=num_ranks
    )


def _files_of_names(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    from safetensors import safe_open

    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if not index.is_file():
            raise UsageError(f"{path} has no model.safetensors.index.json; name a file instead")
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in names.items()}
    if not path.is_file():
        raise UsageError(f"weights {path} do not exist; name a .safetensors file or its folder")
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def _prefix(files: Mapping[str, Path], layer: int | None, path: str | Path) -> str:
    """What stands before `q_a_proj.weight` in the names of the layer."""
    found = {
        name.removesuffix("q_a_proj.weight") for name in files if name.endswith("q_a_proj.weight")
    }
    if layer is not None and len(found) != 1:
        found = {name for name in found if re.search(rf"layers\.{layer}\.{re.escape(MARK)}$", name)}
    if len(found) == 1:
        return found.pop()
    if not found:
        wanted = "" if layer is None else f" of layer {layer}"
        raise UsageError(f"{path} holds no attention weights{wanted} (…{MARK}q_a_proj.weight)")
    raise UsageError(f"{path} holds {len(found)} layers; say which, as in {path}:0")


def _reader(
    files: Mapping[str, Path], prefix: str, device: torch.device | str, path: str | Path
) -> Callable[[str], Tensor]:
    from safetensors import safe_open

    def read(name: str) -> Tensor:
        full = prefix + name
        if full not in files:
            raise UsageError(f"{path} lacks the tensor {full}")
        with safe_open(files[full], framework="pt", device=str(device)) as file:
            tensor: Tensor = file.get_tensor(full)
        return tensor

    return read


def _expect_shape(
    name: str, tensor: Tensor, shape: tuple[int, ...], path: str | Path
) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise UsageError(
            f"{name} of {path} must be {list(shape)} for this preset, got {list(tensor.shape)}"
        )
    return tensor


def from_published(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    preset: Preset,
    *,
    precision: str = "bf16",
    rank: int = 0,
    num_ranks: int = 1,
) -> LayerWeights:
    """Tensors by the name behind `self_attn.`, and scales of those in e4m3."""
    heads = preset.num_heads // num_ranks
    first = rank * heads
    dtype = DTYPES[precision]

    def exact(name: str) -> Tensor:
        return Matrix(tensors[name], scales.get(name)).dequantize(torch.float32)

    def matrix(name: str, part: slice = slice(None), *, columns: bool = False) -> Matrix:
        values = exact(name)
        values = values[:, part] if columns else values[part]
        if precision == "fp8":
            return quantize_blocks(values)
        return Matrix(values.to(dtype).contiguous())

    def head_rows(width: int) -> slice:
        return slice(first * width, (first + heads) * width)

    nope = preset.head_dim_nope
    kv_b = exact("kv_b_proj.weight")[head_rows(nope + preset.head_dim_v_mha)]
    kv_b = kv_b.unflatten(0, (heads, -1)).to(dtype)
    return LayerWeights(
        preset=preset,
        num_heads=heads,
        down=join(
            [
                matrix("q_a_proj.weight"),
                matrix("indexer.wk.weight"),
                matrix("kv_a_proj_with_mqa.weight"),
            ]
        ),
        q_norm=tensors["q_a_layernorm.weight"].to(dtype),
        kv_norm=tensors["kv_a_layernorm.weight"].to(dtype),
        up=join(
            [
                matrix("q_b_proj.weight", head_rows(preset.head_dim_qk_mha)),
                matrix("indexer.wq_b.weight"),
            ]
        ),
        w_uk=kv_b[:, :nope].contiguous(),
        w_uv=kv_b[:, nope:].contiguous(),
        out=matrix("o_proj.weight", head_rows(preset.head_dim_v_mha), columns=True),
        index_k_norm_weight=tensors["indexer.k_norm.weight"].float(),
        index_k_norm_bias=tensors["indexer.k_norm.bias"].float(),
        index_head_weights=tensors["indexer.weights_proj.weight"].to(dtype),
    )


def published_tensors(weights: LayerWeights) -> dict[str, Tensor]:
    """The tensors of a sparse layer by the name behind `self_attn.`, scales included."""
    preset, rank = weights.preset, weights.preset.q_lora_rank
    split = weights.num_heads * preset.head_dim_qk_mha
    down, up = weights.down, weights.up
    matrices = {
        "q_a_proj.weight": down.slice_rows(0, rank),
        "indexer.wk.weight": down.slice_rows(rank, rank + INDEX_DIM),
        "kv_a_proj_with_mqa.weight": down.slice_rows(rank + INDEX_DIM, down.out_features),
        "q_b_proj.weight": up.slice_rows(0, split),
        "indexer.wq_b.weight": up.slice_rows(split, up.out_features),
        "o_proj.weight": weights.out,
    }
    others = {
        "q_a_layernorm.weight": weights.q_norm,
        "kv_a_layernorm.weight": weights.kv_norm,
        "kv_b_proj.weight": torch.cat([weights.w_uk, weights.w_uv], 1).flatten(0, 1),
        "indexer.k_norm.weight": weights.index_k_norm_weight,
        "indexer.k_norm.bias": weights.index_k_norm_bias,
        "indexer.weights_proj.weight": weights.index_head_weights,
    }
    made = {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, part in matrices.items():
        made[name] = part.values
        if part.scale is not None:
            made[name + SCALE_SUFFIX] = part.scale
    return made


def save_weights(weights: LayerWeights, path: str | Path, layer: int = 0) -> None:
    """One layer under the published names."""
    from safetensors.torch import save_file

    prefix = f"model.layers.{layer}.{MARK}"
    tensors = published_tensors(weights)
    save_file({prefix + name: x.contiguous() for name, x in tensors.items()}, path)
