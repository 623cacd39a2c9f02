"""Rows of logits that a top-k easily gets wrong, each made from Gaussian ones [rows, columns], and
pages in which their columns lie."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsa_bench.kernels.paging import Pages

NAN, INF = float("nan"), float("inf")


def adjacent(x: Tensor) -> Tensor:
    """Seven values, each the fp32 number behind the one before."""
    bits = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) % 7 + 0x3F800000
    return bits.view(torch.float32).expand_as(x).contiguous()


def special(x: Tensor) -> Tensor:
    """NaN everywhere, rows of nothing but NaN, -inf or +inf in a part of the row."""
    x = x.clone()
    x[:, ::3] = NAN
    x[1 % len(x)] = NAN
    x[2 % len(x), x.shape[1] // 9 :] = -INF
    x[3 % len(x), : x.shape[1] // 5] = INF
    return x


def infinities(x: Tensor) -> Tensor:
    """One of a hundred is +inf, and so many -inf and NaN."""
    x = x.clone()
    x[:, 5::97] = INF
    x[:, 7::101] = -INF
    x[:, 11::103] = NAN
    return x


def plateau(x: Tensor) -> Tensor:
    """Half of each row is exactly 0, as after a ReLU; of three rows one has 5 % above it, one 15 %,
    one 48 %."""
    rank = x.argsort(1).argsort(1)
    above = torch.tensor([0.05, 0.15, 0.48], device=x.device)[torch.arange(len(x)) % 3, None]
    is_zero = (rank < x.shape[1] * (1 - above)) & (rank >= x.shape[1] * (0.5 - above))
    far = torch.where(rank >= x.shape[1] * (1 - above), 5.0, -5.0)
    return torch.where(is_zero, 0.0, x + far)


def one_cluster(x: Tensor) -> Tensor:
    """The largest values lie side by side in the middle of the row."""
    x, fifth = x.clone(), x.shape[1] // 5
    x[:, 2 * fifth : 3 * fifth] += 20
    return x


def periodic(x: Tensor) -> Tensor:
    """Four of every 64 columns are larger: a sample at fixed distances sees all or none of them."""
    return x + 3 * (torch.arange(x.shape[1], device=x.device) % 64 < 4)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ties": lambda x: (x * 4).round() / 4,
    "signed-zeros": lambda x: torch.where(x > 1.5, x, torch.where(x > 0, 0.0, -0.0)),
    "constant": torch.ones_like,
    "two-valued": lambda x: (x > 0).float(),
    "special": special,
    "infinities": infinities,
    "ascending": lambda x: x.sort(1).values.contiguous(),
    "descending": lambda x: x.sort(1, descending=True).values.contiguous(),
    "adjacent": adjacent,
    "tiny": lambda x: x * 1e-42,
    "plateau": plateau,
    "one-cluster": one_cluster,
    "far": lambda x: 1000 + x,
    "huge-range": lambda x: torch.sign(x) * torch.exp(20 * x.abs()),
    "periodic": periodic,
    "bf16": lambda x: x.bfloat16(),
}


def wild_pages(kv_end: Tensor, num_cols: int, *, page_size: int = 17) -> Pages:
    """For rows that end at `kv_end`, up to three of a sequence: wild pages where no row reads, in a
    slice of a larger table, and none for the last columns."""
    num_rows, device = len(kv_end), kv_end.device
    seq_len_q = next(size for size in (3, 2, 1) if num_rows % size == 0)
    dims = num_rows // seq_len_q, max(1, num_cols // page_size - 1)
    g = torch.Generator(device=device).manual_seed(14)
    most = 2**31 // page_size
    table = torch.randint(0, most, dims, generator=g, device=device, dtype=torch.int32)
    used = -(-kv_end.clamp(0, num_cols).view(-1, seq_len_q).amax(1) // page_size)
    entry = torch.arange(dims[1], device=device)
    wild = torch.where(entry % 2 == 0, -(2**31), 2**31 - 1).to(torch.int32)
    table = torch.where(entry < used[:, None], table, wild)
    larger = torch.cat([table, torch.full_like(table[:, :1], -1)], 1)
    return Pages(larger[:, : dims[1]], page_size)
