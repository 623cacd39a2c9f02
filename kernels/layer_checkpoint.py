"""A layer's weights from and to safetensors files, under the names of the published checkpoint.

    model.layers.N.self_attn.  q_a_proj  q_a_layernorm  q_b_proj  kv_a_proj_with_mqa
                               kv_a_layernorm  kv_b_proj  o_proj
                      indexer. wq_b  wk  k_norm (weight and bias)  weights_proj

Each with `.weight`; a matrix in e4m3 has `.weight_scale_inv` beside it, fp32, one number for each
128 x 128 block, with which its values are *multiplied*. `kv_b_proj` holds, for each head, 128 rows
W_UK and then 128 rows W_UV. A layer's attention is found by what stands before `q_a_proj.weight`.

Source: DeepSeek-V3.2-Exp, model.safetensors.index.json and inference/convert.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_bench.kernels.layer_weights import BLOCK, LayerWeights, Matrix, join, quantize_blocks
from dsa_bench.kernels.paging import HEAD_DIM_QK, HEAD_DIM_V, INDEX_DIM
from dsa_bench.operator import UsageError
from dsa_bench.preset import Preset

if TYPE_CHECKING:
    from safetensors import safe_open

MARK = "self_attn."
FIRST = "q_a_proj.weight"
SCALE_SUFFIX = "_scale_inv"
E4M3 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Of everything that is no matrix in e4m3."""
STORED = (torch.bfloat16, torch.float16, torch.float32, E4M3)


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
        precision: fp8 keeps matrices that are in e4m3, with their scales, and quantises others in
            blocks; bf16 and fp32 dequantise them.
        rank: of `num_ranks` that share the heads equally; the indexer is whole on each.
    Raises:
        UsageError: a file, the layer or a tensor is missing, or a tensor has another shape than
            the preset says.
    """
    if preset.num_heads % num_ranks:
        raise UsageError(f"{preset.num_heads} heads do not divide among {num_ranks} ranks")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be 0 … {num_ranks - 1}, got {rank}")
    files = _files_of_names(Path(path))
    prefix = _prefix(files, layer, path)
    read = _reader(files, prefix, device, path)
    shapes = published_shapes(preset, preset.num_heads)
    tensors = {name: read(name, shape) for name, shape in shapes.items()}
    scales = {
        name: read(name + SCALE_SUFFIX, tuple(-(-size // BLOCK) for size in shapes[name])).float()
        for name, tensor in tensors.items()
        if tensor.dtype == E4M3
    }
    return from_published(
        tensors, scales, preset, precision=precision, rank=rank, num_ranks=num_ranks
    )


def _files_of_names(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if not path.is_dir():
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    index = path / "model.safetensors.index.json"
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise UsageError(
            f"{path} has no model.safetensors.index.json; name a .safetensors file in it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{index} has no weight_map; download it again") from None
    return {name: path / file for name, file in names.items()}


def _opened(path: Path, device: torch.device | str = "cpu") -> "safe_open":
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"there is no file {path}; name a .safetensors file or its folder")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as error:
        raise UsageError(f"{path} cannot be read as safetensors ({error}); get it again") from None


def _prefix(files: Mapping[str, Path], layer: int | None, path: str | Path) -> str:
    """What stands before `q_a_proj.weight` in the names of the layer."""
    numbers = {
        name.removesuffix(FIRST): _layer_number(name) for name in files if name.endswith(FIRST)
    }
    # names without a number are those of one layer, whichever is asked for
    fits = [prefix for prefix, n in numbers.items() if layer is None or n in (layer, None)]
    if len(fits) == 1:
        return fits[0]
    known = sorted(n for n in numbers.values() if n is not None)
    if not numbers:
        raise UsageError(f"{path} holds no attention weights (…{FIRST}); name another file")
    held = f"{path} holds layer {', '.join(map(str, known))}"
    if not fits:
        raise UsageError(f"{held}, not {layer}; say one of them or name another file")
    raise UsageError(f"{held}; say which, as in {path}:{known[0] if known else 0}")


def _layer_number(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _reader(
    files: Mapping[str, Path], prefix: str, device: torch.device | str, path: str | Path
) -> Callable[[str, tuple[int, ...]], Tensor]:
    """(name behind the prefix, shape) -> the tensor, on the device."""

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        full = prefix + name
        if full not in files:
            raise UsageError(f"{path} lacks the tensor {full}; name the folder of the whole model")
        with _opened(files[full], device) as file:
            if full not in file.keys():  # noqa: SIM118 - the file is no mapping
                raise UsageError(f"{files[full]} lacks {full}, which the index says; get it again")
            tensor: Tensor = file.get_tensor(full)
        if tuple(tensor.shape) != shape:
            raise UsageError(
                f"{full} of {path} must be {list(shape)} for this preset,"
                f" got {list(tensor.shape)}; use the preset of this model"
            )
        if tensor.dtype not in STORED:
            raise UsageError(
                f"{full} of {path} must be bf16, fp16, fp32 or e4m3, got {tensor.dtype};"
                " use the published checkpoint"
            )
        return tensor

    return read


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
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    heads = preset.num_heads // num_ranks
    if precision == "fp8" and heads * preset.head_dim_qk_mha % BLOCK:
        raise UsageError(f"fp8 needs an even number of heads on each rank, got {heads}")

    def matrix(name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Matrix:
        return _cut(Matrix(tensors[name], scales.get(name)), precision, rows, columns)

    def of_heads(width: int) -> slice:
        return slice(rank * heads * width, (rank + 1) * heads * width)

    dtype, nope, value = DTYPES[precision], preset.head_dim_nope, preset.head_dim_v_mha
    kv_b = Matrix(tensors["kv_b_proj.weight"], scales.get("kv_b_proj.weight"))
    kv_b_heads = kv_b.dequantize(torch.float32)[of_heads(nope + value)].unflatten(0, (heads, -1))
    down = ("q_a_proj.weight", "indexer.wk.weight", "kv_a_proj_with_mqa.weight")
    queries = matrix("q_b_proj.weight", of_heads(preset.head_dim_qk_mha))
    return LayerWeights(
        preset=preset,
        num_heads=heads,
        down=join([matrix(name) for name in down]),
        q_norm=tensors["q_a_layernorm.weight"].to(dtype),
        kv_norm=tensors["kv_a_layernorm.weight"].to(dtype),
        up=join([queries, matrix("indexer.wq_b.weight")]),
        w_uk=kv_b_heads[:, :nope].to(dtype).contiguous(),
        w_uv=kv_b_heads[:, nope:].to(dtype).contiguous(),
        out=matrix("o_proj.weight", columns=of_heads(value)),
        index_k_norm_weight=tensors["indexer.k_norm.weight"].float(),
        index_k_norm_bias=tensors["indexer.k_norm.bias"].float(),
        index_head_weights=tensors["indexer.weights_proj.weight"].to(dtype),
    )


def _cut(stored: Matrix, precision: str, rows: slice, columns: slice) -> Matrix:
    """Part of a stored matrix; in e4m3 with its own scales where the part is whole blocks."""
    if precision == "fp8" and stored.scale is not None and _is_whole_blocks(rows, columns):
        scale = stored.scale[_blocks(rows), _blocks(columns)].contiguous()
        return Matrix(stored.values[rows, columns].contiguous(), scale)
    values = stored.dequantize(torch.float32)[rows, columns]
    if precision == "fp8":
        return quantize_blocks(values)
    return Matrix(values.to(DTYPES[precision]).contiguous())


def _is_whole_blocks(*parts: slice) -> bool:
    """Whether parts of a matrix in e4m3 can keep its scales."""
    return all(not (part.start or 0) % BLOCK and not (part.stop or 0) % BLOCK for part in parts)


def _blocks(part: slice) -> slice:
    """Of whole blocks: those of the scale."""
    return part if part.stop is None else slice(part.start // BLOCK, part.stop // BLOCK)


def published_tensors(weights: LayerWeights) -> dict[str, Tensor]:
    """The tensors of a sparse layer by the name behind `self_attn.`, scales included."""
    if weights.index_head_weights is None:
        raise ValueError("the published names are those of a sparse layer (save it with its index)")
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
