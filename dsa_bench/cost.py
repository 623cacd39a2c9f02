"""What a case costs at least in time, and what its time costs in money: plain arithmetic."""

from collections.abc import Mapping

SECONDS_PER_HOUR = 3600.0
COPY_CEILING = "copy_bytes_per_second"
L2_CEILING = "l2_bytes_per_second"
FLOPS_SUFFIX = "_flops_per_second"
SUSTAINED_PREFIX = "sustained_"
CACHED_MODES = ("warm", "sustained", "cpu")
"""Modes in which the inputs of a call may lie in a cache since the one before; nobody flushes those
of a CPU.
"""


def floor_seconds(
    cost: Mapping[str, float],
    ceilings: Mapping[str, float],
    precision: str = "bf16",
    mode: str = "cold",
) -> float | None:
    """max(flops / matmul rate, (bytes_read + bytes_written) / copy rate); None without ceilings.

    `cost` has the keys of `Record.cost`; `ceilings` those of `ceilings.measure_ceilings`, of which
    the burst rates count. So that the floor stays one, the matmul rate is that of `precision`
    where it was measured, else the highest there is; and in CACHED_MODES bytes go at the rate of
    L2, or at once where that was not measured.
    """
    copy_rate = ceilings.get(COPY_CEILING)
    rate = ceilings.get(precision + FLOPS_SUFFIX) or max(_burst_flops(ceilings), default=0.0)
    if not copy_rate or not rate:
        return None
    bandwidth = copy_rate
    if mode in CACHED_MODES:
        bandwidth = max(copy_rate, ceilings.get(L2_CEILING) or float("inf"))
    moved = cost["bytes_read"] + cost["bytes_written"]
    return max(cost["flops"] / rate, moved / bandwidth)


def _burst_flops(ceilings: Mapping[str, float]) -> list[float]:
    return [
        rate
        for name, rate in ceilings.items()
        if name.endswith(FLOPS_SUFFIX) and not name.startswith(SUSTAINED_PREFIX)
    ]


def usd_per_million_tokens(
    seconds_per_token: float, *, num_layers: int, gpu_hour_usd: float, num_gpus: int = 1
) -> float:
    """gpu_hour_usd / 3600 · GPUs · seconds per token and layer · layers · 10⁶."""
    return gpu_hour_usd / SECONDS_PER_HOUR * num_gpus * seconds_per_token * num_layers * 1e6


def all_reduce_seconds(num_bytes: float, *, ranks: int, bytes_per_second: float) -> float:
    """2 · (ranks - 1) / ranks · bytes / bandwidth: a ring's reduce-scatter and all-gather.

    Bandwidth is what one rank sends in one direction; latency of the steps is left out.
    """
    return 2 * (ranks - 1) / ranks * num_bytes / bytes_per_second
