"""What is told of the machine; NVML is a fake where it matters."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsa_bench
from dsa_bench import machine
from dsa_bench.operator import Machine, UsageError

GPU = Machine(device="cuda", name="H", capability=(9, 0), memory_bytes=80 * 2**30)


def test_detect_the_cpu() -> None:
    found = machine.detect("cpu")
    assert found.device == "cpu" and found.name and found.capability is None
    assert found.memory_bytes > 2**28
    assert 0 < machine.free_bytes(found) <= found.memory_bytes


def test_detect_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.detect("auto").device == "cpu"
    with pytest.raises(UsageError, match="sees no CUDA device"):
        machine.detect("cuda")
    with pytest.raises(UsageError, match="--device 'tpu' is unknown; known: auto, cuda, cpu"):
        machine.detect("tpu")


def test_describe_and_versions_have_what_a_reader_of_numbers_needs() -> None:
    told = machine.describe(machine.detect("cpu"))
    assert told["device"] == "cpu" and told["cpu_cores"] == len(os.sched_getaffinity(0))
    found = machine.versions()
    assert found["dsa_bench"] == dsa_bench.__version__
    assert found["torch"] == str(torch.__version__)
    assert "python" in found and "numpy" in found


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    assert machine.git_state(tmp_path) == {}
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    clean = machine.git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("x")
    assert machine.git_state(tmp_path) == clean | {"dirty": True}


def test_ceilings_of_the_cpu_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**24)
    monkeypatch.setitem(machine.MATMUL_SIZE, "cpu", 256)
    found = machine.measure_ceilings(machine.detect("cpu"))
    assert set(found) == {"copy_bytes_per_second", "fp32_flops_per_second"}
    assert 1e8 < found["copy_bytes_per_second"] < 1e13
    assert 1e8 < found["fp32_flops_per_second"] < 1e14


class FakeNvml:
    """The part of pynvml that is asked; the power limit cannot be read."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, pids: tuple[int, ...], throttle: int, busy: int) -> None:
        self.pids, self.throttle, self.busy = pids, throttle, busy

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: object) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int:
        return 1000 * kind

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return 900 * kind

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return 40

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return 70_000

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        return self.throttle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


def doctor(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> dict[str, dict[str, str]]:
    @contextmanager
    def fake() -> Iterator[tuple[Any, Any]]:
        yield nvml, object()

    monkeypatch.setattr(machine, "_nvml", fake)
    monkeypatch.setattr(machine, "free_bytes", lambda found: 79 * 2**30)
    return {row["item"]: row for row in machine.doctor_rows(GPU)}


def test_doctor_names_what_makes_times_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = doctor(monkeypatch, FakeNvml((os.getpid(), 17), throttle=0x1 | 0x20, busy=60))
    assert rows["other processes on the GPU"]["value"] == "1"
    assert "noisy" in rows["other processes on the GPU"]["hint"]
    assert "wait until it is idle" in rows["utilisation"]["hint"]
    assert rows["clock held down"]["value"] == "0x20" and rows["clock held down"]["hint"]
    assert rows["driver"]["value"] == "580.1" and "power_limit_w" not in rows
    assert rows["tilelang"]["value"] == "not installed"


def test_doctor_is_content_with_a_quiet_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = doctor(monkeypatch, FakeNvml((os.getpid(),), throttle=0x1, busy=0))
    quiet = ("other processes on the GPU", "utilisation", "clock held down", "memory free")
    assert [rows[item]["hint"] for item in quiet] == [""] * 4


def test_doctor_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install nvidia-ml-py" in doctor(monkeypatch, None)["nvml"]["hint"]


@pytest.mark.gpu
def test_gpu_is_described_and_has_ceilings() -> None:
    found = machine.detect("auto")
    assert found.device == "cuda" and found.l2_bytes > 2**20 and found.num_sms > 0
    assert machine.describe(found)["capability"] == list(found.capability or ())
    ceilings = machine.measure_ceilings(found)
    assert 1e11 < ceilings["copy_bytes_per_second"] < 2e13
    assert 1e13 < ceilings["bf16_flops_per_second"] < 1e16
