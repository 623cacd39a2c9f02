"""What a case costs at least in time, and what its time costs in money: plain arithmetic."""

from collections.abc import Mapping

SECONDS_PER_HOUR = 3600.0
BYTES_CEILING = "copy_bytes_per_second"
FLOPS_CEILING = "{precision}_flops_per_second"


def floor_seconds(
    cost: Mapping[str, float], ceilings: Mapping[str, float], precision: str = "bf16"
) -> float | None:
    """max(flops / matmul rate, (bytes_read + bytes_written) / copy rate); None without ceilings.

    `cost` has the keys of `Record.cost`; `ceilings` those of `machine.measure_ceilings`. The matmul
    rate is that of `precision` where it was measured, else the highest there is, so that the floor
    stays one.
    """
    bandwidth = ceilings.get(BYTES_CEILING)
    rates = [v for k, v in ceilings.items() if k.endswith("_flops_per_second")]
    rate = ceilings.get(FLOPS_CEILING.format(precision=precision)) or max(rates, default=0.0)
    if not bandwidth or not rate:
        return None
    moved = cost["bytes_read"] + cost["bytes_written"]
    return max(cost["flops"] / rate, moved / bandwidth)


def usd_per_million_tokens(
    seconds_per_token: float, *, num_layers: int, gpu_hour_usd: float
) -> float:
    """gpu_hour_usd / 3600 · seconds per token and layer · layers · 10⁶; attention only."""
    return gpu_hour_usd / SECONDS_PER_HOUR * seconds_per_token * num_layers * 1e6
