"""The leaderboard: places, level times, what has no time, and geometric means, by hand."""

import math
from typing import Any

import pandas as pd
import pytest

from dsa_bench.reports import leaderboard, tables
from dsa_bench.reports.digest import digest
from tests.reports_runs import h100_run


def row(impl: str, seconds: float | None, **fields: Any) -> dict[str, Any]:
    """A case of topk; its interval is 1 % either way."""
    timed = seconds is not None
    return {
        "run": 0, "key": impl, "run_label": "a", "op": "topk", "impl": impl, "phase": "prefill",
        "seq_len_kv": 8192, "seq_len_q": 4096, "topk": 2048, "precision": "bf16", "batch_size": 1,
        "lengths": "equal", "num_heads": 128, "tensor_parallel": 1, "inputs": "random",
        "weights": "", "preset": "v3.2",
        "seed": 0, "asked_mode": "auto", "status": "ok" if timed else "failed", "doubt": "",
        "seconds": seconds, "seconds_low": seconds and seconds * 0.99,
        "seconds_high": seconds and seconds * 1.01, "floor_share": 0.5 if timed else None,
    } | fields  # fmt: skip


def ranked(*rows: dict[str, Any]) -> tuple[leaderboard.Ranking, ...]:
    return leaderboard.rankings(pd.DataFrame(rows))


def test_the_fastest_is_first_and_overlapping_intervals_are_level() -> None:
    (found,) = ranked(row("slow", 3e-3), row("second", 1.015e-3), row("first", 1e-3))
    assert [place.impl for place in found.places] == ["first", "second", "slow"]
    assert found.leaders == ("first", "second")
    assert found.others == ()


def test_shapes_modes_and_precisions_are_ranked_apart() -> None:
    found = ranked(
        row("a", 1.0), row("b", 2.0), row("a", 9.0, seq_len_kv=16384),
        row("b", 8.0, seq_len_kv=16384), row("a", 0.1, asked_mode="warm"),
        row("b", 0.1, precision="fp8"), row("c", 0.1, lengths="spread"),
    )  # fmt: skip
    assert [ranking.leaders for ranking in found] == [("a",), ("b",)]


def test_what_has_no_time_that_counts_takes_no_place() -> None:
    (found,) = ranked(
        row("a", 2.0), row("b", 3.0), row("broken", None), row("wrong", None, status="wrong"),
        row("cheat", 0.1, doubt="suspect"),
    )  # fmt: skip
    assert found.leaders == ("a",)
    assert found.others == ("broken (failed)", "wrong (wrong)", "cheat (suspect)")


def test_one_implementation_is_no_contest() -> None:
    assert ranked(row("a", 1.0), row("b", None)) == ()


def test_standings_are_geometric_means_over_the_shapes_that_each_took() -> None:
    found = ranked(
        row("a", 1.0), row("b", 2.0),
        row("a", 8.0, seq_len_kv=16384), row("b", 1.0, seq_len_kv=16384),
        row("c", 4.0, seq_len_kv=16384),
    )  # fmt: skip
    standings = leaderboard.standings(found)
    assert list(standings) == ["b", "a", "c"]
    assert standings["a"][:2] == (1, 2) and standings["c"][:2] == (0, 1)
    assert standings["a"][2] == pytest.approx(math.sqrt(8.0))
    assert standings["b"][2] == pytest.approx(math.sqrt(2.0))


def test_the_report_shows_who_wins() -> None:
    text = tables.markdown(digest([h100_run()]))
    assert "## Leaderboard: dense\\_attention" in text or "## Leaderboard: dense_attention" in text
    assert "flash" in text.split("Leaderboard: dense", 1)[1]
