"""What the tests of weights share: a small preset, random numbers, a scale for each element."""

import torch

from dsa_bench.preset import Preset

TINY = Preset(name="tiny", hidden_size=256, q_lora_rank=128, num_heads=4, index_heads=2)
E4M3 = torch.float8_e4m3fn


def randn(*dims, seed=0):
    return torch.randn(*dims, generator=torch.Generator().manual_seed(seed))


def expand(scale, shape):
    """A scale for each element, block by block."""
    whole = torch.empty(shape, dtype=torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            whole[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = scale[i, j]
    return whole
