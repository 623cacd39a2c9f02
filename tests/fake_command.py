"""The command line in an empty folder, with fake operators, workers and reports."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_bench import cli, job, probe, registry
from dsa_bench.operator import Machine, UsageError
from tests import fake_worker
from tests.test_plan import offer
from tests.test_sweep import operator

WAYS = ("fine", "wrong", "exits", "failed")
ONE = ("--op", "fine", "--phase", "decode", "-L", "4k", "-k", "512")
Call = Callable[..., tuple[int, str, str]]


def fake_probe(device: str, *, with_ceilings: bool) -> probe.Probe:
    if device == "cuda":
        raise UsageError("torch sees no CUDA device (pass --device cpu)")
    facts = {"machine": {"device": "cpu", "name": "Test CPU"}, "versions": {}, "git": {}}
    ceilings = {"copy_bytes_per_second": 1e9} if with_ceilings else {}
    machine = Machine(device="cpu", name="Test CPU")
    return probe.Probe(machine=machine, header={**facts, "ceilings": ceilings})


def fake_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Call:
    """What runs a command in an empty folder, with fake operators, workers and reports."""
    catalogue = registry.Catalogue(
        operators={way: operator(way, "topk") for way in WAYS}
        | {"layer": operator("layer", "tensor_parallel", "inputs", "weights")}
        | {"batch": operator("batch", "batch_size", "lengths")},
        implementations={
            way: offer(reference=-1000, triton=1) for way in (*WAYS, "layer", "batch")
        },
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "catalogue", lambda: catalogue)
    monkeypatch.setattr(probe, "probe", fake_probe)
    start = functools.partial(job.execute, start=fake_worker.start_at)
    monkeypatch.setattr(job, "execute", start)
    monkeypatch.setattr(job, "write_all_reports", lambda run: {})
    monkeypatch.setattr("dsa_bench.cli.terminal.print_report", lambda runs: print("the report"))
    for name in ("DSA_BENCH_DEVICE", "DSA_BENCH_GPU_HOUR_USD"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsa-bench", *words])
        code = cli.call(words)
        out, err = capfd.readouterr()
        return code, out, err

    return run
