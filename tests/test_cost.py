"""Floor time and money against cases worked by hand."""

import pytest

from dsa_bench.cost import floor_seconds, usd_per_million_tokens

CEILINGS = {
    "copy_bytes_per_second": 3e12,
    "bf16_flops_per_second": 700e12,
    "fp8_flops_per_second": 1400e12,
}


@pytest.mark.parametrize(
    ("flops", "read", "written", "precision", "expected"),
    [
        (7e12, 1e9, 1e9, "bf16", 0.01),
        (7e12, 1e9, 1e9, "fp8", 0.005),
        (7e9, 2e12, 1e12, "bf16", 1.0),
        # a precision that was not measured: the highest rate, so that the floor stays a floor
        (14e12, 0.0, 0.0, "fp4", 0.01),
        (0.0, 3e9, 0.0, "bf16", 0.001),
    ],
)
def test_floor_is_the_longer_of_the_two_times(
    flops: float, read: float, written: float, precision: str, expected: float
) -> None:
    cost = {"flops": flops, "bytes_read": read, "bytes_written": written}
    assert floor_seconds(cost, CEILINGS, precision) == pytest.approx(expected)


def test_floor_is_unknown_without_ceilings() -> None:
    cost = {"flops": 1.0, "bytes_read": 1.0, "bytes_written": 1.0}
    assert floor_seconds(cost, {}) is None
    assert floor_seconds(cost, {"copy_bytes_per_second": 1.0}) is None


def test_usd_per_million_tokens_by_hand() -> None:
    # 2 $/h, 1 µs a token and layer, 61 layers: 61 s of GPU time for a million tokens
    usd = usd_per_million_tokens(1e-6, num_layers=61, gpu_hour_usd=2.0)
    assert usd == pytest.approx(61 * 2 / 3600)
