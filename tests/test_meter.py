"""The meters: what they count and what they notice; clock and CUDA are fakes."""

import time

import pytest
import torch

from dsa_bench import meter, nvml
from dsa_bench.meter import CudaMeter, Flush, HostMeter, SustainedMeter
from tests.fake_cuda import FakeClock, FakeCuda

LAUNCH = 5e-6


def cuda_meter() -> tuple[CudaMeter, FakeCuda, list[float]]:
    cuda = FakeCuda(FakeClock())
    flushes: list[float] = []

    def flush() -> None:
        flushes.append(cuda.clock.now)
        cuda.launch(30e-6, LAUNCH)

    return CudaMeter(Flush(run=flush, num_bytes=7), cuda=cuda, clock=cuda.clock), cuda, flushes


def test_cuda_meter_hides_the_launches_behind_the_spin() -> None:
    timer, cuda, flushes = cuda_meter()

    def call() -> None:
        for _ in range(10):  # launched more slowly than it runs
            cuda.launch(5e-6, 20e-6)

    samples = [timer.sample(call) for _ in range(5)]
    assert [s.seconds for s in samples] == pytest.approx([50e-6] * 5)
    assert not any(s.overtaken for s in samples)
    assert len(flushes) == 5 and timer.flush_bytes == 7
    # from the second call on a multiple of its queueing time, and a margin
    wanted = meter.SPIN_FACTOR * 200e-6 + meter.SPIN_MARGIN_SECONDS
    assert cuda.slept[-1] == pytest.approx(wanted, abs=1e-8)
    # of the first call nothing is known
    assert max(cuda.slept[2:]) == meter.SPIN_LIMIT_SECONDS


def test_cuda_meter_sees_that_a_waiting_callee_is_overtaken() -> None:
    timer, cuda, _ = cuda_meter()

    def call() -> None:
        cuda.launch(5e-6, LAUNCH)
        cuda.synchronize()
        cuda.launch(5e-6, LAUNCH)

    samples = [timer.sample(call) for _ in range(5)]
    assert all(s.overtaken for s in samples)
    assert max(cuda.slept[3:]) <= meter.SPIN_LIMIT_SECONDS


def test_a_short_wait_of_a_long_call_is_harmless() -> None:
    timer, cuda, _ = cuda_meter()

    def call() -> None:
        cuda.synchronize()
        cuda.launch(10.0, LAUNCH)

    assert not timer.sample(call).overtaken


def test_work_of_another_stream_is_seen_behind_the_end() -> None:
    timer, cuda, _ = cuda_meter()

    def cheat() -> None:
        cuda.launch(1e-6, LAUNCH)
        cuda.other_stream = cuda.gpu_time + 400e-6

    sample = timer.sample(cheat)
    assert sample.seconds == pytest.approx(1e-6)
    assert sample.hidden_seconds == pytest.approx(400e-6)
    assert timer.sample(lambda: cuda.launch(1e-6, LAUNCH)).hidden_seconds == 0.0


def test_what_is_kept_is_taken_before_the_device_is_waited_for() -> None:
    timer, cuda, _ = cuda_meter()
    seen: list[tuple[str, bool]] = []

    def keep(outputs: str) -> None:
        seen.append((outputs, cuda.clock.now < cuda.gpu_time))
        cuda.launch(90e-6, LAUNCH)  # a copy

    def call() -> str:
        cuda.launch(50e-6, LAUNCH)
        return "result"

    sample = timer.sample(call, keep)
    assert seen == [("result", True)]
    # neither in the time nor taken for hidden work
    assert sample.seconds == pytest.approx(50e-6) and sample.hidden_seconds == 0.0


def test_event_overhead_is_measured_between_empty_pairs() -> None:
    cuda = FakeCuda(FakeClock())
    plain = cuda.Event

    def event(enable_timing: bool) -> object:
        made = plain(enable_timing)
        record = made.record

        def costly() -> None:
            cuda.launch(2e-6, 1e-6)
            record()

        made.record = costly  # type: ignore[method-assign]
        return made

    cuda.Event = event  # type: ignore[assignment]
    timer = CudaMeter(Flush(run=lambda: None, num_bytes=0), cuda=cuda, clock=cuda.clock)
    assert timer.event_overhead == pytest.approx(2e-6)


def test_sustained_batches_join_on_without_a_gap() -> None:
    cuda = FakeCuda(FakeClock())
    timer = SustainedMeter(rounds=10, calls_per_round=3, cuda=cuda)
    launched = []

    def one_round() -> str:
        for _ in range(3):
            cuda.launch(100e-6, LAUNCH)
        launched.append(1)
        return "last"

    kept: list[str] = []
    samples = [timer.sample(one_round, kept.append) for _ in range(4)]
    # the launch of the very first call is counted in
    assert [s.seconds for s in samples] == pytest.approx([100e-6] * 4, rel=0.01)
    assert not any(s.overtaken for s in samples)
    # a batch is always queued beyond the one that is waited for
    assert len(launched) == 10 * 5 and kept == ["last"] * 4
    assert timer.calls_per_sample == 30
    timer.pause()
    cuda.clock.now += 5.0
    again = timer.sample(one_round)
    assert again.seconds == pytest.approx(100e-6, rel=0.01)


def test_sustained_marks_a_host_that_cannot_keep_up() -> None:
    cuda = FakeCuda(FakeClock())
    timer = SustainedMeter(rounds=4, calls_per_round=1, cuda=cuda)
    samples = [timer.sample(lambda: cuda.launch(5e-6, 50e-6)) for _ in range(3)]
    assert all(s.overtaken for s in samples)
    assert [s.seconds for s in samples[1:]] == pytest.approx([50e-6] * 2)


def test_host_meter_times_the_call_and_not_the_keeping() -> None:
    clock = FakeClock()

    def call() -> str:
        clock.now += 2.0
        return "result"

    def keep(outputs: str) -> None:
        assert outputs == "result"
        clock.now += 50.0

    assert HostMeter(clock=clock).sample(call, keep).seconds == 2.0


def test_a_patched_timer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = HostMeter()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    assert timer.sample(lambda: time.sleep(0.01)).seconds > 0.005
    assert HostMeter().sample(lambda: time.sleep(0.01)).seconds > 0.005


@pytest.mark.gpu
def test_gpu_patched_events_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = CudaMeter(meter.NO_FLUSH)
    x = torch.zeros(2**26, device="cuda")
    # the first is cold, and on a GPU that others use one alone can be five times too long
    honest = min(timer.sample(x.zero_).seconds for _ in range(5))
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda self, end: 1e-6)
    assert timer.sample(x.zero_).seconds > honest / 3
    assert CudaMeter(meter.NO_FLUSH).sample(x.zero_).seconds > honest / 3


@pytest.mark.gpu
def test_gpu_spin_covers_the_launch_of_a_short_call() -> None:
    from dsa_bench.machine import detect

    if len(nvml.processes_before()) > 1:
        pytest.skip("needs a core for itself: another test takes it between spin and launch")
    timer = CudaMeter(meter.l2_flush(detect("cuda")))
    x = torch.zeros(2**18, device="cuda")
    samples = [timer.sample(x.zero_) for _ in range(200)]
    assert sum(sample.overtaken for sample in samples) == 0
    assert 0.0 < timer.event_overhead < 10e-6
