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


def test_what_lasts_is_no_ceiling() -> None:
    cost = {"flops": 14e12, "bytes_read": 0.0, "bytes_written": 0.0}
    lasting = {"sustained_fp8_flops_per_second": 9000e12, "sustained_copy_bytes_per_second": 1.0}
    assert floor_seconds(cost, CEILINGS | lasting, "fp4") == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("mode", "l2", "expected"),
    [
        ("cold", 6e12, 1.0),
        ("graph", 6e12, 1.0),
        # the caches of a CPU are not flushed
        ("cpu", None, 0.01),
        ("warm", 6e12, 0.5),
        ("sustained", 6e12, 0.5),
        # not measured: only the products hold it back
        ("warm", None, 0.01),
        # an L2 that was measured slower than memory, which it cannot be
        ("warm", 1e12, 1.0),
    ],
)
def test_inputs_that_may_lie_in_l2_come_at_its_rate(
    mode: str, l2: float | None, expected: float
) -> None:
    cost = {"flops": 7e12, "bytes_read": 2e12, "bytes_written": 1e12}
    ceilings = CEILINGS | ({} if l2 is None else {"l2_bytes_per_second": l2})
    assert floor_seconds(cost, ceilings, mode=mode) == pytest.approx(expected)


def test_floor_is_unknown_without_ceilings() -> None:
    cost = {"flops": 1.0, "bytes_read": 1.0, "bytes_written": 1.0}
    assert floor_seconds(cost, {}) is None
    assert floor_seconds(cost, {"copy_bytes_per_second": 1.0}) is None


def test_usd_per_million_tokens_by_hand() -> None:
    # 2 $/h, 1 µs a token and layer, 61 layers: 61 s of GPU time for a million tokens
    usd = usd_per_million_tokens(1e-6, num_layers=61, gpu_hour_usd=2.0)
    assert usd == pytest.approx(61 * 2 / 3600)
