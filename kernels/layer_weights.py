"""Weights of one attention layer, as the layer multiplies with them, and made-up ones.

Products that share their input are one matrix, rows in this order:
    down  W_DQ | W^I_K | W_DKV      [q_lora_rank + 128 + 576, hidden_size]
    up    W_UQ | W^I_UQ             [num_heads · 192 + index_heads · 128, q_lora_rank]
    out   W_O                       [hidden_size, num_heads · 128]
A dense layer has neither W^I_K nor W^I_UQ. Each part begins at a multiple of 128 rows, so parts of
a matrix in e4m3 keep the scales of their 128 x 128 blocks.

Made-up weights let indexer and main attention look for the same keys, as training does. A hidden
state holds a content vector z (as a key) and y (as a query) of 64 components, h = E z + F y + 8 b
with orthonormal E, F, b. The latent is P Eᵀ h and the index key Eᵀ h, both z; the query latent is
R Fᵀ h and both kinds of queries take y out of it again. The heads of the indexer get positive
weights from b.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_bench.kernels.fp8 import E4M3_MAX, round_up_to_power_of_two
from dsa_bench.kernels.paging import HEAD_DIM_QK, HEAD_DIM_V, INDEX_DIM
from dsa_bench.preset import Preset

BLOCK = 128
CONTENT_WIDTH = 64
BIAS = 8.0
"""Share of b in a hidden state: as long as the content."""
SMALL = 0.02
"""Noise of a hidden state in each component, and length of a weight's row of noise."""
HEAD_NOISE = 0.5
"""What a head takes out of the query besides its content, against that."""
LOGIT_SPREAD = 4.0
"""Standard deviation of a head's attention logits over keys of random content."""
HIDDEN_CHUNK = 8192
"""Tokens whose noise is drawn at once: 235 MB in fp32."""
AMAX_FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight: bf16, fp32, or e4m3 with a scale of each 128 x 128 block."""

    values: Tensor
    """[out_features, in_features]."""
    scale: Tensor | None = None
    """[⌈out_features / 128⌉, ⌈in_features / 128⌉] fp32."""

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features]: value · scale of its block."""
        if self.scale is None:
            return self.values.to(dtype)
        scale = self.scale.repeat_interleave(BLOCK, 0)[: self.out_features]
        scale = scale.repeat_interleave(BLOCK, 1)[:, : self.in_features]
        return (self.values.float() * scale).to(dtype)

    def slice_rows(self, start: int, stop: int) -> "Matrix":
        """Rows start … stop - 1, as views; in e4m3 `start` must begin a block."""
        if self.scale is None:
            return Matrix(self.values[start:stop])
        if start % BLOCK:
            raise ValueError(f"rows of an e4m3 matrix are cut at multiples of {BLOCK}, got {start}")
        return Matrix(self.values[start:stop], self.scale[start // BLOCK : -(-stop // BLOCK)])


def quantize_blocks(values: Tensor) -> Matrix:
    """[out, in] -> e4m3 with power-of-two scales of 128 x 128 blocks."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    amax = blocks.abs().amax((1, 3)).clamp_min(AMAX_FLOOR)
    scale = round_up_to_power_of_two(amax / E4M3_MAX)
    scaled = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    whole = scaled.flatten(2).flatten(0, 1)[:rows, :columns]
    return Matrix(whole.to(torch.float8_e4m3fn).contiguous(), scale)


def join(parts: list[Matrix]) -> Matrix:
    """The rows of several matrices, one below the other."""
    for part in parts[:-1]:
        if part.scale is not None and part.out_features % BLOCK:
            raise ValueError(f"{part.out_features} rows do not fill blocks of {BLOCK}")
    scales = [part.scale for part in parts if part.scale is not None]
    values = [part.values for part in parts]
    if values[0].dtype == torch.float8_e4m3fn:
        joined = torch.cat([v.view(torch.uint8) for v in values]).view(torch.float8_e4m3fn)
        return Matrix(joined, torch.cat(scales))
    return Matrix(torch.cat(values))


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`num_heads` are those of this rank; the indexer is whole on every rank."""

    preset: Preset
    num_heads: int
    down: Matrix
    q_norm: Tensor
    """[q_lora_rank]."""
    kv_norm: Tensor
    """[512]."""
    up: Matrix
    w_uk: Tensor
    """[num_heads, 128, 512]: latents to the keys of each head."""
    w_uv: Tensor
    """[num_heads, 128, 512]: latents to the values of each head."""
    out: Matrix
    index_k_norm_weight: Tensor | None = None
    """[128] fp32."""
    index_k_norm_bias: Tensor | None = None
    """[128] fp32."""
    index_head_weights: Tensor | None = None
    """[index_heads, hidden_size]; None in a dense layer."""

    def without_index(self) -> "LayerWeights":
        """Of the dense layer, with matrices of its own."""
        first = self.preset.q_lora_rank
        queries = self.down.slice_rows(0, first)
        keys = self.down.slice_rows(first + INDEX_DIM, first + INDEX_DIM + HEAD_DIM_QK)
        heads = self.up.slice_rows(0, self.num_heads * self.preset.head_dim_qk_mha)
        return dataclasses.replace(
            self,
            down=join([queries, keys]),
            up=join([heads]),
            index_k_norm_weight=None,
            index_k_norm_bias=None,
            index_head_weights=None,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "LayerWeights":
        """The same weights with every tensor changed; values of a matrix and its scale each."""
        made: dict[str, Any] = {name: _map(change, getattr(self, name)) for name in TENSORS}
        return dataclasses.replace(self, **made)

    def to(self, dtype: torch.dtype) -> "LayerWeights":
        """Every matrix in this dtype, dequantised; norms and biases of the indexer stay fp32."""
        made = {name: getattr(self, name) for name in TENSORS}
        for name, part in made.items():
            if isinstance(part, Matrix):
                made[name] = Matrix(part.dequantize(dtype))
            elif part is not None and name not in FP32:
                made[name] = part.to(dtype)
        return dataclasses.replace(self, **made)

    def to_device(self, device: torch.device | str) -> "LayerWeights":
        """Every tensor on this device, in its dtype."""
        return self.map(lambda tensor: tensor.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name: `down.values`, `q_norm`, …"""
        found: dict[str, Tensor] = {}
        for name in TENSORS:
            part = getattr(self, name)
            if isinstance(part, Matrix):
                found |= {f"{name}.values": part.values}
                found |= {f"{name}.scale": part.scale} if part.scale is not None else {}
            elif part is not None:
                found[name] = part
        return found


FP32 = ("index_k_norm_weight", "index_k_norm_bias")
TENSORS = tuple(
    f.name for f in dataclasses.fields(LayerWeights) if f.name not in ("preset", "num_heads")
)


def _map(
    change: Callable[[Tensor], Tensor], part: Tensor | Matrix | None
) -> Tensor | Matrix | None:
    if isinstance(part, Matrix):
        scale = None if part.scale is None else change(part.scale)
        return Matrix(change(part.values), scale)
    return None if part is None else change(part)


class Embedding(NamedTuple):
    """Where a hidden state holds what it is about."""

    key: Tensor
    """E, [hidden_size, 64]."""
    query: Tensor
    """F, [hidden_size, 64]."""
    bias: Tensor
    """b, [hidden_size]."""


def embedding(preset: Preset, seed: int, device: torch.device | str) -> Embedding:
    """Orthonormal columns, the same for the same seed and device."""
    g = torch.Generator(device=device).manual_seed(seed)
    columns = torch.randn(preset.hidden_size, 2 * CONTENT_WIDTH + 1, generator=g, device=device)
    q = torch.linalg.qr(columns).Q
    return Embedding(q[:, :CONTENT_WIDTH], q[:, CONTENT_WIDTH:-1], q[:, -1])


def make_hidden(z: Tensor, y: Tensor, preset: Preset, *, seed: int, noise_seed: int) -> Tensor:
    """Hidden states [..., hidden_size] bf16 of rms about 1 from content z, y [..., 64].

    `seed` is that of the weights, which take z and y out again.
    """
    axes = embedding(preset, seed, z.device)
    g = torch.Generator(device=z.device).manual_seed(noise_seed)
    content = torch.cat([z, y], -1).float().flatten(0, -2)
    places = torch.cat([axes.key, axes.query], 1).T
    length = (2 * CONTENT_WIDTH + BIAS**2 + SMALL**2 * preset.hidden_size) ** 0.5
    made = torch.empty(len(content), preset.hidden_size, dtype=torch.bfloat16, device=z.device)
    for rows, out in zip(content.split(HIDDEN_CHUNK), made.split(HIDDEN_CHUNK), strict=True):
        h = torch.randn(out.shape, generator=g, device=z.device).mul_(SMALL)
        h.addmm_(rows, places).add_(axes.bias, alpha=BIAS)
        out.copy_(h.mul_(preset.hidden_size**0.5 / length))
    return made.view(*z.shape[:-1], preset.hidden_size)


def make_weights(
    preset: Preset,
    *,
    num_heads: int | None = None,
    precision: str = "bf16",
    seed: int,
    device: torch.device | str,
) -> LayerWeights:
    """Random weights with which the layer attends to what its indexer selects (see above).

    `precision` fp8: the three large matrices in e4m3 with block scales; bf16; or fp32.
    """
    heads = preset.num_heads if num_heads is None else num_heads
    hidden, value_dim = preset.hidden_size, preset.head_dim_v_mha
    axes = embedding(preset, seed, device)
    draw = _Draw(torch.Generator(device=device).manual_seed(seed + 1))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def matrix(values: Tensor) -> Matrix:
        return quantize_blocks(values) if precision == "fp8" else Matrix(values.to(dtype))

    latent_axes = draw.axes(HEAD_DIM_V)
    query_axes = draw.axes(preset.q_lora_rank)
    down = _make_down(preset, axes, latent_axes, query_axes, draw)
    up = _make_up(preset, heads, query_axes, draw)
    w_uk = _make_key_heads(preset, heads, latent_axes, draw)
    shares = draw.uniform(preset.index_heads, 1) + 0.5
    return LayerWeights(
        preset=preset,
        num_heads=heads,
        down=matrix(down),
        q_norm=torch.ones(preset.q_lora_rank, dtype=dtype, device=device),
        kv_norm=torch.ones(HEAD_DIM_V, dtype=dtype, device=device),
        up=matrix(up),
        w_uk=w_uk.to(dtype),
        w_uv=draw.rows(heads, value_dim, HEAD_DIM_V).to(dtype),
        out=matrix(draw.rows(hidden, heads * value_dim)),
        index_k_norm_weight=torch.ones(INDEX_DIM, device=device),
        index_k_norm_bias=torch.zeros(INDEX_DIM, device=device),
        index_head_weights=(
            # b is in every hidden state: weights around 0.5 … 1.5 times what there is of it
            shares * axes.bias + draw.rows(preset.index_heads, hidden, length=SMALL)
        ).to(dtype),
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """Random tensors, fp32, one after the other from one generator."""

    generator: torch.Generator

    def normal(self, *dims: int) -> Tensor:
        return torch.randn(*dims, generator=self.generator, device=self.generator.device)

    def uniform(self, *dims: int) -> Tensor:
        return torch.rand(*dims, generator=self.generator, device=self.generator.device)

    def rows(self, *dims: int, length: float = 1.0) -> Tensor:
        """Rows of about this length."""
        return self.normal(*dims).mul_(length * dims[-1] ** -0.5)

    def axes(self, rows: int) -> Tensor:
        """[rows, 64] with orthonormal columns."""
        q: Tensor = torch.linalg.qr(self.normal(rows, CONTENT_WIDTH)).Q
        return q


def _make_down(
    preset: Preset, axes: Embedding, latent_axes: Tensor, query_axes: Tensor, draw: _Draw
) -> Tensor:
    """y to the query latent, z to the last 64 of an index key and to the latent."""
    hidden, content = preset.hidden_size, CONTENT_WIDTH
    return torch.cat(
        [
            query_axes @ axes.query.T + draw.rows(preset.q_lora_rank, hidden, length=SMALL),
            draw.rows(INDEX_DIM - content, hidden, length=SMALL),
            axes.key.T + draw.rows(content, hidden, length=SMALL),
            latent_axes @ axes.key.T + draw.rows(HEAD_DIM_V, hidden, length=SMALL),
            draw.rows(HEAD_DIM_QK - HEAD_DIM_V, hidden, length=SMALL),
        ]
    )


def _make_up(preset: Preset, heads: int, query_axes: Tensor, draw: _Draw) -> Tensor:
    """y from the query latent to each head of the attention and of the indexer.

    The norms give c^Q and c^KV rms 1, so that along each of their 64 axes y and z come out
    √(rank / 64) and √(512 / 64) times as large; a sum of 64 products has the spread below.
    """
    rank, content = preset.q_lora_rank, CONTENT_WIDTH
    query_gain, key_gain = (rank / content) ** 0.5, (HEAD_DIM_V / content) ** 0.5
    of_heads = (content * (1 + HEAD_NOISE**2)) ** 0.5
    spread = preset.sm_scale * query_gain * key_gain * of_heads

    main = torch.empty(heads, preset.head_dim_qk_mha, rank, device=query_axes.device)
    main[:, :content] = _take_out(query_axes, heads, draw) * (LOGIT_SPREAD / spread)
    main[:, content:] = draw.rows(heads, main.shape[1] - content, rank, length=SMALL)
    index = torch.empty(preset.index_heads, INDEX_DIM, rank, device=query_axes.device)
    rope_rows = INDEX_DIM - content
    index[:, rope_rows:] = _take_out(query_axes, preset.index_heads, draw) / query_gain
    index[:, :rope_rows] = draw.rows(preset.index_heads, rope_rows, rank, length=SMALL)
    return torch.cat([main.flatten(0, 1), index.flatten(0, 1)])


def _take_out(query_axes: Tensor, heads: int, draw: _Draw) -> Tensor:
    """[heads, 64, q_lora_rank]: Rᵀ, mixed with noise of each head's own."""
    mixed = draw.rows(heads, CONTENT_WIDTH, CONTENT_WIDTH, length=HEAD_NOISE) @ query_axes.T
    return query_axes.T + mixed


def _make_key_heads(preset: Preset, heads: int, latent_axes: Tensor, draw: _Draw) -> Tensor:
    """[heads, 128, 512]: z from the latent to the first 64 of each head's key."""
    w_uk = draw.rows(heads, preset.head_dim_nope, HEAD_DIM_V, length=SMALL)
    w_uk[:, :CONTENT_WIDTH] += latent_axes.T
    return w_uk
