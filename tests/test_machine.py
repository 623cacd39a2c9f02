"""What is told of the machine; NVML is a fake where it matters."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsa_bench
from dsa_bench import machine
from dsa_bench.nvml import Gpu
from dsa_bench.operator import Machine, UsageError
from tests.fake_nvml import FakeNvml

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


def fake_gpu(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    gpu = None if nvml is None else Gpu(nvml, object())
    monkeypatch.setattr(machine, "current_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "free_bytes", lambda found: 79 * 2**30)
    properties = SimpleNamespace(uuid="01234567-89ab-cdef")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def doctor(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> dict[str, dict[str, str]]:
    fake_gpu(monkeypatch, nvml)
    return {row["item"]: row for row in machine.doctor_rows(GPU, frozenset({17}))}


def test_a_gpu_is_described_but_not_named_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, FakeNvml(refused=("ecc",)))
    told = machine.describe(GPU)
    assert told["uuid"] == "01234567"
    assert told["persistence"] is True and told["mig"] is False and "ecc" not in told
    assert told["vbios"] == "96.00" and told["power_limit_w"] == 700.0


def test_doctor_names_what_makes_times_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml((23, 17), throttle=0x1 | 0x20, busy=60, refused=("power_limit",))
    rows = doctor(monkeypatch, nvml)
    assert rows["other processes on the GPU"]["value"] == "1"
    assert "noisy" in rows["other processes on the GPU"]["hint"]
    assert "wait until it is idle" in rows["utilisation"]["hint"]
    assert rows["clock held down"]["value"] == "0x20" and rows["clock held down"]["hint"]
    assert rows["driver"]["value"] == "580.1" and "power_limit_w" not in rows
    assert rows["flash-mla"]["value"] == "not installed"


def test_doctor_is_content_with_a_quiet_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = doctor(monkeypatch, FakeNvml((23,), throttle=0x1))
    quiet = ("other processes on the GPU", "utilisation", "clock held down", "persistence")
    assert [rows[item]["hint"] for item in (*quiet, "memory free")] == [""] * 5


def test_doctor_writes_out_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = doctor(monkeypatch, FakeNvml(persistence=0))
    assert rows["persistence"]["value"] == "off"
    assert rows["persistence"]["hint"].endswith("sudo nvidia-smi -i 3 -pm 1")
    # three quarters of 1980 MHz, in steps of 15
    assert "sudo nvidia-smi -i 3 -lgc 1485," in rows["clock"]["hint"]
    assert "undo: sudo nvidia-smi -i 3 -rgc" in rows["clock"]["hint"]


def test_doctor_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install nvidia-ml-py" in doctor(monkeypatch, None)["nvml"]["hint"]


@pytest.mark.parametrize(
    ("nvml", "hint"),
    [
        (FakeNvml((23,)), ""),
        (FakeNvml((17,)), "other processes hold the GPU: 1 (see nvidia-smi)"),
        (FakeNvml(busy=60), "the GPU is busy: 60 % used (wait until it is idle)"),
        (FakeNvml(busy=5, refused=("processes",)), ""),
        (None, ""),
    ],
)
def test_a_busy_gpu_is_told(
    nvml: FakeNvml | None, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu(monkeypatch, nvml)
    assert machine.busy_hint(GPU, frozenset({17})) == hint


def test_a_busy_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.detect("cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 9.0, 9.0))
    assert machine.busy_hint(found) == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0.0, 0.0))
    assert machine.busy_hint(found) == "other programs use the CPU: load 2.5 on 8 cores"


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    found = machine.detect("auto")
    assert found.device == "cuda" and found.l2_bytes > 2**20 and found.num_sms > 0
    told = machine.describe(found)
    assert told["capability"] == list(found.capability or ())
    assert len(told["uuid"]) == 8
