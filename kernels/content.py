"""What keys and queries are about: Gaussian vectors whose products decide where attention goes.

Every key has a vector z, every query a vector y, both of variance 1 in each component; query i
stands at position p = num_keys - num_queries + i and sees the keys 0 … p. ε is noise of variance 1.

    random   z, y independent. Scores are Gaussian and know no position: the hardest case, in which
             the mass is spread over many keys.
    needle   z independent; NEEDLES keys of every NEEDLE_SPAN are needles, one in each equal part.
                 y = MATCH · (z_a + z_b) / √2 + √(1 - MATCH²) · ε
             for two random needles a, b that the query sees (one where it sees one, else y = ε).
             Imitates a needle in a haystack: few keys, anywhere, hold nearly all of the mass.
    local    z_p = DECAY · z_{p-1} + √(1 - DECAY²) · ε_p,  y = NEAR · z_p + √(1 - NEAR²) · ε.
             The expected product of a query with a key d positions before it falls as DECAY^d.
             Imitates what a sliding window is made for.
    heavy    HEAVY_HITTERS random keys and the first SINKS are z = POPULAR · u + √(1 - POPULAR²) · ε
             for one u of length √width, the others ε; y = LIKING · u + √(1 - LIKING²) · ε.
             Imitates attention sinks and heavy hitters, which every query scores high.

Source: attention sinks as in StreamingLLM, heavy hitters as in H2O.
"""

import torch
from torch import Tensor

from dsa_bench.record import INPUT_KINDS

NEEDLES, NEEDLE_SPAN = 16, 4096
MATCH = 0.92
DECAY = 0.99
NEAR = 0.5
SINKS, HEAVY_HITTERS = 4, 32
POPULAR, LIKING = 0.75, 0.6
BLOCK = 256
"""Positions that one matrix product of `walk` goes along."""


def make_content(
    kind: str, *, num_keys: int, num_queries: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """z [num_keys, width] and y [num_queries, width], fp32, on the device of the generator."""
    if kind not in INPUT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(INPUT_KINDS)}, got {kind!r}")
    if not 0 < num_queries <= num_keys:
        raise ValueError(f"num_queries must be 1 … {num_keys} (the keys), got {num_queries}")
    device = generator.device
    z = torch.randn(num_keys, width, generator=generator, device=device)
    y = torch.randn(num_queries, width, generator=generator, device=device)
    if kind == "needle":
        return z, _mix(y, _needles_of_queries(z, num_queries, generator), MATCH)
    if kind == "local":
        z = walk(z)
        return z, _mix(y, z[num_keys - num_queries :], NEAR)
    if kind == "heavy":
        u = torch.randn(width, generator=generator, device=device)
        u = u * (width**0.5 / u.norm())
        positions = heavy_positions(num_keys, generator)
        z[positions] = _mix(z[positions], u, POPULAR)
        return z, _mix(y, u, LIKING)
    return z, y


def _mix(noise: Tensor, signal: Tensor, share: float) -> Tensor:
    rest: float = (1 - share**2) ** 0.5
    return share * signal + rest * noise


def needle_positions(num_keys: int, generator: torch.Generator) -> Tensor:
    """[needles] int64, ascending: one random position in each part of NEEDLE_SPAN / NEEDLES."""
    part = NEEDLE_SPAN // NEEDLES
    begins = torch.arange(0, num_keys, part, device=generator.device)
    sizes = (num_keys - begins).clamp(max=part)
    draws = torch.rand(begins.shape, generator=generator, device=generator.device)
    return begins + (draws * sizes).long().clamp(max=sizes - 1)


def _needles_of_queries(z: Tensor, num_queries: int, generator: torch.Generator) -> Tensor:
    """[num_queries, width]: of two needles that the query sees the sum, of variance 1.

    A query without a needle gets noise, one with a single needle that needle.
    """
    num_keys, width = z.shape
    needles = needle_positions(num_keys, generator)
    positions = torch.arange(num_keys - num_queries, num_keys, device=z.device)
    seen = torch.searchsorted(needles, positions, right=True)
    draws = torch.rand(2, num_queries, generator=generator, device=z.device)
    first = (draws[0] * seen).long().clamp(max=(seen - 1).clamp(min=0))
    # the second is another one: a step of 1 … seen - 1 around the ring of those it sees
    steps = 1 + (draws[1] * (seen - 1)).long().clamp(min=0).clamp(max=(seen - 2).clamp(min=0))
    second = (first + steps) % seen.clamp(min=1)
    chosen = z[needles]
    pair = (chosen[first] + chosen[second]) / 2**0.5
    found = torch.where((seen > 1)[:, None], pair, chosen[first])
    noise = torch.randn(num_queries, width, generator=generator, device=z.device)
    return torch.where((seen > 0)[:, None], found, noise)


def heavy_positions(num_keys: int, generator: torch.Generator) -> Tensor:
    """[up to SINKS + HEAVY_HITTERS] int64: the first positions, and random ones of the others."""
    device = generator.device
    sinks = torch.arange(min(SINKS, num_keys), device=device)
    others = torch.randperm(num_keys - len(sinks), generator=generator, device=device)
    return torch.cat([sinks, len(sinks) + others[:HEAVY_HITTERS]])


def walk(noise: Tensor) -> Tensor:
    """z_p = DECAY · z_{p-1} + √(1 - DECAY²) · noise_p along the first dimension; z_0 = noise_0.

    Within blocks, then from block to block: both are products with the powers of DECAY below the
    diagonal, so that nothing goes position by position.
    """
    steps = noise * (1 - DECAY**2) ** 0.5
    steps[0] = noise[0]
    length, width = noise.shape
    num_blocks = -(-length // BLOCK)
    padded = torch.nn.functional.pad(steps, (0, 0, 0, num_blocks * BLOCK - length))
    within = _powers(DECAY, BLOCK, noise) @ padded.view(num_blocks, BLOCK, width)
    ends = _powers(DECAY**BLOCK, num_blocks, noise) @ within[:, -1]
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    along = DECAY ** torch.arange(1, BLOCK + 1, device=noise.device, dtype=noise.dtype)
    z: Tensor = within + along[:, None] * before[:, None]
    return z.flatten(0, 1)[:length]


def _powers(base: float, size: int, like: Tensor) -> Tensor:
    """[size, size]: base^(i - j) for j <= i, else 0."""
    i = torch.arange(size, device=like.device, dtype=like.dtype)
    return (base ** (i[:, None] - i).clamp(min=0)).tril()
