"""Measured rates, and that they are kept for the machine they belong to."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsa_bench import ceilings, machine, probe, show
from dsa_bench.operator import Machine
from tests.triton_interpreter import is_interpreting

CPU = Machine(device="cpu", name="C")
RATES = {
    "copy_bytes_per_second": 1e10,
    "bf16_flops_per_second": 2e11,
    "fp32_flops_per_second": 1e11,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache file, in a folder that does not exist yet; measuring takes no time."""
    monkeypatch.setenv("DSA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda found: dict(RATES))
    return tmp_path / "cache" / "ceilings.json"


def test_ceilings_of_the_cpu_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**24)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 256)
    found = ceilings.measure_ceilings(machine.detect("cpu"))
    assert set(found) == set(RATES)
    assert 1e8 < found["copy_bytes_per_second"] < 1e13
    # a bf16 case may be computed in fp32 there
    assert 1e8 < found["fp32_flops_per_second"] <= found["bf16_flops_per_second"] < 1e14


def test_rates_are_kept_with_their_time(cache: Path) -> None:
    assert ceilings.known_ceilings(CPU) == ceilings.Ceilings()
    fresh = ceilings.fresh_ceilings(CPU)
    assert fresh.rates == RATES and fresh.note == "" and fresh.measured.endswith("+00:00")
    assert ceilings.known_ceilings(CPU) == fresh
    assert [path.name for path in cache.parent.iterdir()] == ["ceilings.json"]


def test_machines_do_not_share_rates(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings.fresh_ceilings(CPU)
    other = replace(CPU, name="D")
    assert ceilings.known_ceilings(other).rates == {}
    ceilings.fresh_ceilings(other)
    assert ceilings.known_ceilings(CPU).rates == ceilings.known_ceilings(other).rates == RATES
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert ceilings.known_ceilings(CPU).rates == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        '{"schema": "dsa-bench/ceilings@1", "entries": 3}',
        '{"schema": "dsa-bench/ceilings@9", "entries": {}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_cache_is_as_none(cache: Path, text: str | bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert ceilings.known_ceilings(CPU) == ceilings.Ceilings()
    fresh = ceilings.fresh_ceilings(CPU)
    assert ceilings.known_ceilings(CPU) == fresh


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"measured": "2026-01-01", "rates": {}},
        {"measured": "2026-01-01", "rates": {"copy_bytes_per_second": "fast"}},
        {"measured": "2026-01-01", "rates": {"copy_bytes_per_second": float("nan")}},
        {"measured": "2026-01-01", "rates": {"copy_bytes_per_second": 0.0}},
        {"rates": RATES},
    ],
)
def test_a_damaged_entry_is_as_none(cache: Path, entry: object) -> None:
    ceilings.fresh_ceilings(CPU)
    whole = json.loads(cache.read_text())
    whole["entries"][ceilings.cache_key(CPU)] = entry
    cache.write_text(json.dumps(whole))
    assert ceilings.known_ceilings(CPU) == ceilings.Ceilings()


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    fresh = ceilings.fresh_ceilings(CPU)
    assert fresh.rates == RATES
    assert "not kept" in fresh.note and "DSA_BENCH_CACHE" in fresh.note


def test_rates_of_a_busy_machine_are_not_kept(cache: Path) -> None:
    fresh = ceilings.fresh_ceilings(CPU, busy="other programs use the CPU")
    assert fresh.rates == RATES and "other programs use the CPU" in fresh.note
    assert not cache.exists()


def test_doctor_shows_what_is_kept_and_measures_when_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "busy_hint", lambda found, before: "")
    table = show.diagnosis_tables(show.diagnosis("cpu"))[1]
    assert table.rows == ()
    assert table.notes == ("not measured yet: dsa-bench doctor --measure",)
    found = show.diagnosis("cpu", measure=True)
    assert found["ceilings"] == RATES and found["ceilings_note"] == ""
    assert show.diagnosis("cpu") | {"rows": []} == found | {"rows": []}
    table = show.diagnosis_tables(found)[1]
    assert table.rows == (
        ("copy bytes", "10.0 GB/s", ""),
        ("bf16 flops", "200 GFLOP/s", ""),
        ("fp32 flops", "100 GFLOP/s", ""),
    )
    assert table.notes == (f"measured {found['ceilings_measured']}",)


def test_burst_and_sustained_share_a_row() -> None:
    rates = {"copy_bytes_per_second": 3e12, "sustained_copy_bytes_per_second": 2e12}
    found = {"rows": [], "ceilings": rates, "ceilings_measured": "t", "ceilings_note": "n"}
    table = show.diagnosis_tables(found)[1]
    assert table.rows == (("copy bytes", "3.00 TB/s", "2.00 TB/s"),)
    assert table.notes == ("measured t", "n")


def test_a_run_takes_the_rates_that_are_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "busy_hint", lambda found, before: "")

    def answer(*words: str) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", ["probe", "--device", "cpu", *words])
        assert probe.main() == 0
        header: dict[str, object] = json.loads(capsys.readouterr().out)["header"]
        return header

    assert answer()["ceilings"] == {} and not cache.exists()
    first = answer("--ceilings")
    assert first["ceilings"] == RATES and isinstance(first["load"], float)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda found: pytest.fail("measured again"))
    again = answer("--ceilings")
    assert again["ceilings"] == RATES
    assert again["ceilings_measured"] == first["ceilings_measured"]


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("DSA_BENCH_CACHE", "/own")
    assert ceilings.cache_file() == Path("/own/ceilings.json")
    monkeypatch.delenv("DSA_BENCH_CACHE")
    assert ceilings.cache_file() == Path("/x/dsa-bench/ceilings.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/h")
    assert ceilings.cache_file() == Path("/home/h/.cache/dsa-bench/ceilings.json")


def test_the_tail_is_the_last_second() -> None:
    # a burst at first, then throttled
    assert ceilings.tail_mean([0.1] * 10 + [0.25] * 4, 1.0) == 0.25
    assert ceilings.tail_mean([0.1] * 10 + [0.25] * 3, 1.0) == pytest.approx(1.05 / 6)
    assert ceilings.tail_mean([0.2, 0.4], 1.0) == pytest.approx(0.3)


@pytest.mark.interpret
@pytest.mark.parametrize(("num_blocks", "programs"), [(1, 2), (8, 1), (8, 5)])
def test_every_program_reads_the_whole_buffer(num_blocks: int, programs: int) -> None:
    assert is_interpreting()
    from dsa_bench.kernels.l2_read_triton import BLOCK, l2_read

    x = torch.arange(num_blocks * BLOCK, dtype=torch.int32)
    sums = torch.zeros(programs, dtype=torch.int32)
    l2_read(x, sums)
    assert sums.tolist() == [int(x.sum(dtype=torch.int32))] * programs


@pytest.mark.parametrize("size", [0, 100, 3 * 4096])
def test_l2_read_takes_a_power_of_two_of_blocks(size: int) -> None:
    from dsa_bench.kernels.l2_read_triton import l2_read

    with pytest.raises(ValueError, match=rf"4096 · 2\^n elements, got {size}"):
        l2_read(torch.zeros(size, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))


@pytest.mark.gpu
def test_ceilings_of_a_gpu_are_plausible() -> None:
    found = machine.detect("auto")
    rates = ceilings.measure_ceilings(found)
    lasting = {name for name in rates if name.startswith("sustained_")}
    bursts = {f"sustained_{name}" for name in rates if name not in lasting}
    assert bursts - lasting == {"sustained_l2_bytes_per_second"}
    assert 1e11 < rates["copy_bytes_per_second"] < 2e13
    assert rates["copy_bytes_per_second"] < rates["l2_bytes_per_second"] < 1e14
    assert 1e13 < rates["bf16_flops_per_second"] < 1e16
    for name in ("copy_bytes_per_second", "bf16_flops_per_second"):
        assert 0.3 * rates[name] < rates[f"sustained_{name}"] <= 1.02 * rates[name]
