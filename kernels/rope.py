"""Rotary embedding with YaRN in the two layouts of DeepSeek-V3.2, and the Hadamard matrix.

    f_i = theta^(-2i/64)                  i = 0 … 31
    ramp_i = clamp((i - low) / (high - low), 0, 1)
    f'_i = f_i · (1 - ramp_i) + f_i / factor · ramp_i
    low, high = ⌊ ⌋ and ⌈ ⌉ of 64 · ln(original_len / (beta · 2π)) / (2 ln theta), beta = 32 and 1

Position t turns pair i by the angle t · f'_i. Which two columns are pair i is where the two
branches differ: (2i, 2i + 1) in the main attention (interleaved), (i, i + 32) in the indexer
(half-split). One table serves both. YaRN is on at every position, and changes no length: cos and
sin are not scaled.

Angles are fp32 products of fp32 numbers, as in the published inference code: what a model was
trained with, though at position 10^5 the fastest pair is then off by up to 4e-3.

Source: DeepSeek-V3.2-Exp inference/model.py; its notice of 2025-11-17 on the indexer's layout.
"""

import math

import torch
from torch import Tensor

from dsa_bench.preset import Preset


def frequencies(preset: Preset) -> Tensor:
    """f'_i, [head_dim_rope / 2] fp32."""
    width = preset.head_dim_rope
    pairs = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / preset.rope_theta**pairs
    low = math.floor(_correction(preset.rope_beta_fast, preset))
    high = math.ceil(_correction(preset.rope_beta_slow, preset))
    index = torch.arange(width // 2, dtype=torch.float32)
    ramp = ((index - max(low, 0)) / (min(high, width - 1) - max(low, 0))).clamp(0, 1)
    # 1 - ramp, and 1 minus that: fp32 rounds as in the published code, to the last bit
    kept = 1 - ramp
    return plain / preset.rope_factor * (1 - kept) + plain * kept


def _correction(beta: float, preset: Preset) -> float:
    """The pair that turns `beta` times within the original length."""
    turns = preset.rope_original_len / (beta * 2 * math.pi)
    return preset.head_dim_rope * math.log(turns) / (2 * math.log(preset.rope_theta))


def rope_table(preset: Preset, num_positions: int, device: torch.device | str) -> Tensor:
    """[num_positions, head_dim_rope] fp32: cosines of all pairs, then their sines."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies(preset).to(device))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate_interleaved(x: Tensor, rows: Tensor) -> Tensor:
    """Turn pairs (2i, 2i + 1) of x [..., 64] by rows of the table, broadcast to x; fp32 inside."""
    cos, sin = rows.chunk(2, dim=-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_half_split(x: Tensor, rows: Tensor) -> Tensor:
    """Turn pairs (i, i + 32) of x [..., 64] by rows of the table, broadcast to x; fp32 inside."""
    cos, sin = rows.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat(turned, dim=-1).to(x.dtype)


def hadamard(size: int, device: torch.device | str) -> Tensor:
    """[size, size] fp32: the Sylvester-Hadamard matrix in natural order times size^-1/2."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, got {size}")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix * size**-0.5
    return scaled
