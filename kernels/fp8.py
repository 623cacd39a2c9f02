"""e4m3 quantisation with power-of-two (ue8m0) scales, as DeepSeek-V3.2 writes its caches.

    scale = 2^ceil(log2(max(amax / 448, floor)))        value = e4m3(clamp(x / scale, ±448))

One scale covers one group of the last dimension. A power of two makes scaling exact in bf16, which
is what FlashMLA's kernels assume. The floor is where writers differ: the indexer clamps amax to
1e-4 before the division by 448, the writer of the latent cache clamps amax / 448 to 1e-4
(dequantised values are equal but for vectors smaller than that).
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
INDEX_AMAX_FLOOR = 1e-4
LATENT_SCALE_FLOOR = 1e-4


def round_up_to_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive fp32, by exponent bits: exact, where log2 would round."""
    bits = x.float().contiguous().view(torch.int32)
    mantissa = bits & 0x007FFFFF
    return (bits - mantissa + (mantissa > 0).to(torch.int32) * 0x00800000).view(torch.float32)


def quantize(x: Tensor, group_size: int, scale_floor: float) -> tuple[Tensor, Tensor]:
    """Quantise groups of `group_size` along the last dimension.

    Args:
        x: [..., width], width a multiple of group_size.
        scale_floor: smallest amax / 448 that is used.
    Returns:
        values [..., width] e4m3, scales [..., width / group_size] fp32, each a power of two.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = round_up_to_power_of_two((groups.abs().amax(-1) / E4M3_MAX).clamp_min(scale_floor))
    scaled = (groups / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).flatten(-2), scale


def quantize_index_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indexer queries or keys [..., index_dim] -> e4m3 values and one fp32 scale a vector [...]."""
    values, scale = quantize(x, x.shape[-1], INDEX_AMAX_FLOOR / E4M3_MAX)
    return values, scale.squeeze(-1)
