"""Stopping rule, meters and memory; clocks and CUDA are fakes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dsa_bench import measure
from dsa_bench.measure import EFFORTS, CudaMeter, Effort, Sample
from dsa_bench.operator import Machine, Memory
from tests import fake_operator
from tests.fake_operator import CPU, FakeInputs, FakeShape

GPU = Machine(device="cuda", name="test")


class FakeClock:
    """Time that passes only when somebody lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeMeter:
    """Each call lasts as long as the next of `durations` says."""

    clock: FakeClock
    durations: Iterator[float]
    overtaken: Callable[[int], bool] = lambda index: False
    taken: int = 0

    def sample(self, call: measure.Call) -> Sample:
        call()
        seconds = next(self.durations)
        self.clock.now += seconds
        self.taken += 1
        return Sample(seconds=seconds, overtaken=self.overtaken(self.taken))


def endless(*values: float) -> Iterator[float]:
    while True:
        yield from values


def sample(meter: FakeMeter, effort: str = "quick", calls: Any = None) -> measure.Measurement:
    return measure.sample_until(
        calls or [lambda: None], meter, EFFORTS[effort], mode="cold", clock=meter.clock
    )


def test_steady_calls_settle_at_the_fewest_samples() -> None:
    meter = FakeMeter(FakeClock(), endless(0.001))
    taken = sample(meter)
    assert taken.timing.stop == "settled" and taken.timing.mode == "cold"
    assert taken.timing.seconds == (0.001,) * measure.MIN_SAMPLES
    # warm-up is not in the samples: at least 0.05 s
    assert meter.taken == measure.MIN_SAMPLES + 50


def test_warm_up_of_long_calls_ends_after_a_quarter_of_the_time() -> None:
    meter = FakeMeter(FakeClock(), endless(0.4))
    taken = sample(meter)
    assert taken.timing.stop == "max_seconds"
    assert len(taken.timing.seconds) == measure.MIN_SAMPLES_SLOW
    assert meter.taken == measure.MIN_SAMPLES_SLOW + 1


def test_noise_is_sampled_until_the_time_is_up() -> None:
    taken = sample(FakeMeter(FakeClock(), endless(0.01, 0.02)))
    assert taken.timing.stop == "max_seconds"
    assert sum(taken.timing.seconds) == pytest.approx(1.0, abs=0.03)


def test_more_effort_asks_for_a_narrower_interval() -> None:
    durations = [0.00100, 0.00101, 0.00102, 0.00103]
    quick = sample(FakeMeter(FakeClock(), endless(*durations)), "quick")
    precise = sample(FakeMeter(FakeClock(), endless(*durations)), "precise")
    assert quick.timing.stop == "settled"
    assert len(quick.timing.seconds) == measure.MIN_SAMPLES
    assert len(precise.timing.seconds) > 100


def test_samples_are_bounded_in_number() -> None:
    taken = sample(FakeMeter(FakeClock(), endless(1e-6, 3e-6)))
    assert taken.timing.stop == "max_samples"
    assert len(taken.timing.seconds) == measure.MAX_SAMPLES


@pytest.mark.parametrize(
    ("overtaken", "slower", "expected"),
    [
        pytest.param(0, 2.0, False, id="none"),
        pytest.param(1, 2.0, False, id="one-of-forty"),
        pytest.param(4, 2.0, False, id="few-do-not-move-the-median"),
        pytest.param(36, 1.2, True, id="most-and-slower"),
        pytest.param(30, 1.0, False, id="most-but-no-slower"),
        pytest.param(38, 1.0, True, id="too-few-untouched-to-tell"),
    ],
)
def test_launch_bound_is_what_the_host_shows_in_the_median(
    overtaken: int, slower: float, expected: bool
) -> None:
    samples = [Sample(seconds=0.001)] * (40 - overtaken)
    samples += [Sample(seconds=0.001 * slower, overtaken=True)] * overtaken
    assert measure.is_launch_bound(samples, EFFORTS["quick"]) is expected


def test_a_host_that_is_always_late_is_flagged() -> None:
    late = FakeMeter(FakeClock(), endless(0.01), overtaken=lambda i: True)
    in_time = FakeMeter(FakeClock(), endless(0.01), overtaken=lambda i: False)
    assert sample(late).flags == ("launch_bound",)
    assert sample(in_time).flags == ()


def test_calls_rotate() -> None:
    seen: list[str] = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b"), lambda: seen.append("c")]
    sample(FakeMeter(FakeClock(), endless(0.4)), calls=calls)
    assert seen == ["a", *"abcab"]


@dataclass
class FakeCuda:
    """A GPU with a time line of its own: work is queued by the host and runs in order."""

    clock: FakeClock
    gpu_time: float = 0.0
    cycles_per_second: float = 1e9
    slept: list[float] = field(default_factory=list)

    def launch(self, seconds: float, queueing: float) -> None:
        """The host needs `queueing` to launch work that takes the GPU `seconds`."""
        self.clock.now += queueing
        self.gpu_time = max(self.gpu_time, self.clock.now) + seconds

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.cycles_per_second)
        self.launch(cycles / self.cycles_per_second, 0.0)

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.gpu_time)

    def Event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


@dataclass
class FakeEvent:
    cuda: FakeCuda
    at: float = math.nan

    def record(self) -> None:
        self.at = max(self.cuda.gpu_time, self.cuda.clock.now)

    def query(self) -> bool:
        return self.at <= self.cuda.clock.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.at - self.at) * 1000


def cuda_meter() -> tuple[CudaMeter, FakeCuda, list[float]]:
    cuda = FakeCuda(FakeClock())
    flushes: list[float] = []

    def flush() -> None:
        flushes.append(cuda.clock.now)
        cuda.launch(30e-6, 5e-6)

    return CudaMeter(flush, cuda=cuda, clock=cuda.clock), cuda, flushes


def test_cuda_meter_hides_the_launches_behind_the_spin() -> None:
    meter, cuda, flushes = cuda_meter()

    def call() -> None:
        for _ in range(10):  # launched more slowly than it runs
            cuda.launch(5e-6, 20e-6)

    samples = [meter.sample(call) for _ in range(5)]
    assert [s.seconds for s in samples] == pytest.approx([50e-6] * 5)
    assert not any(s.overtaken for s in samples)
    assert len(flushes) == 5
    # from the second call on a multiple of its queueing time, and a margin
    wanted = measure.SPIN_FACTOR * 200e-6 + measure.SPIN_MARGIN_SECONDS
    assert cuda.slept[-1] == pytest.approx(wanted, abs=1e-8)


def test_cuda_meter_sees_that_a_waiting_callee_is_overtaken() -> None:
    meter, cuda, _ = cuda_meter()

    def call() -> None:
        cuda.launch(5e-6, 5e-6)
        cuda.synchronize()
        cuda.launch(5e-6, 5e-6)

    samples = [meter.sample(call) for _ in range(5)]
    assert all(s.overtaken for s in samples)
    assert max(cuda.slept[3:]) <= measure.SPIN_LIMIT_SECONDS


def test_default_modes() -> None:
    modes = [(p, m, measure.default_mode(p, m)) for p in ("prefill", "decode") for m in (CPU, GPU)]
    assert [mode for *_, mode in modes] == ["cpu", "cold", "cpu", "graph"]


def test_measure_on_the_cpu_rotates_real_inputs() -> None:
    sets = [fake_operator.make_inputs(FakeShape(num_rows=4), seed=s, device="cpu") for s in (0, 1)]
    seen: list[FakeInputs] = []
    effort = Effort(half_width=math.inf, max_seconds=0.01)
    taken = measure.measure(seen.append, sets, mode="cpu", effort=effort, machine=CPU)
    assert taken.timing.mode == "cpu" and len(taken.timing.seconds) == measure.MIN_SAMPLES
    assert all(seconds > 0 for seconds in taken.timing.seconds)
    assert seen[-1] is not seen[-2] and seen[-1] is seen[-3]


def test_held_bytes_counts_a_shared_storage_once() -> None:
    x = torch.zeros(100, 4)
    assert measure.held_bytes({"a": x, "b": (x[:10], [x.view(-1)]), "n": 3}) == 1600
    inputs = FakeInputs(torch.zeros(8, 4, dtype=torch.bfloat16))
    assert measure.held_bytes((inputs, x)) == 64 + 1600


def test_memory_of_a_call_on_the_cpu() -> None:
    def run(inputs: FakeInputs) -> fake_operator.FakeOutputs:
        workspace = inputs.x.repeat(8, 1)  # 8 inputs
        return fake_operator.FakeOutputs(workspace[: inputs.x.shape[0]] + inputs.x)

    inputs = fake_operator.make_inputs(FakeShape(num_rows=1024), seed=0, device="cpu")
    size = 1024 * fake_operator.NUM_COLS * 4
    predicted = Memory(input_bytes=size, output_bytes=size, workspace_bytes=7)
    use = measure.measure_memory(run, inputs, predicted=predicted, machine=CPU)
    assert use.input_bytes == size and use.output_bytes == size
    assert use.workspace_bytes == 8 * size and use.peak_bytes == 10 * size
    assert use.predicted_bytes == 2 * size + 7


def test_shortage_says_what_is_needed_and_what_is_free() -> None:
    gib = 2**30
    memory = Memory(input_bytes=90 * gib, output_bytes=2 * gib, workspace_bytes=gib // 2)
    assert measure.shortage(memory, int(78.3 * gib)) == (
        "needs 92.5 GiB, 78.3 GiB free (inputs 90.0, outputs 2.0, workspace 0.5)"
    )
    assert measure.shortage(memory, memory.total_bytes) == ""


@pytest.fixture
def gpu() -> Machine:
    from dsa_bench.machine import detect

    return detect("cuda")


def test_memory_that_runs_out_in_a_capture_is_no_failed_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(*_: object) -> list[Any]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(measure, "_graph_rotation", capture)
    machine = Machine(device="cuda", name="fake")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        measure.measure(
            fake_operator.good, [], mode="graph", effort=EFFORTS["quick"], machine=machine
        )


def gpu_sets(num_rows: int = 2**18) -> list[FakeInputs]:
    shape = FakeShape(num_rows=num_rows)
    return [fake_operator.make_inputs(shape, seed=s, device="cuda") for s in (0, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cold", "graph"])
def test_gpu_time_of_a_copy_is_near_its_bandwidth(mode: str, gpu: Machine) -> None:
    sets = gpu_sets(2**21)  # 128 MiB in, as much out
    taken = measure.measure(
        fake_operator.good, sets, mode=mode, effort=EFFORTS["quick"], machine=gpu
    )
    assert taken.timing.mode == mode and taken.flags == ()
    seconds = sorted(taken.timing.seconds)[len(taken.timing.seconds) // 2]
    assert 0.5e12 < 2**28 / seconds < 10e12


@pytest.mark.gpu
def test_gpu_call_that_waits_is_measured_without_a_graph(gpu: Machine) -> None:
    def run(inputs: FakeInputs) -> Any:
        return fake_operator.good(FakeInputs(inputs.x + inputs.x.sum().item()))

    before = torch.cuda.current_stream()
    taken = measure.measure(run, gpu_sets(), mode="graph", effort=EFFORTS["quick"], machine=gpu)
    assert taken.timing.mode == "cold" and taken.flags == ("no_graph", "launch_bound")
    assert torch.cuda.current_stream() == before
    # the process must be well afterwards
    again = measure.measure(
        fake_operator.good, gpu_sets(), mode="graph", effort=EFFORTS["quick"], machine=gpu
    )
    assert again.timing.mode == "graph" and again.flags == ()


@pytest.mark.gpu
def test_gpu_memory_of_a_call(gpu: Machine) -> None:
    def run(inputs: FakeInputs) -> fake_operator.FakeOutputs:
        workspace = inputs.x.repeat(8, 1)
        return fake_operator.FakeOutputs(workspace[: inputs.x.shape[0]] + inputs.x)

    inputs = gpu_sets()[0]
    size = inputs.x.nbytes
    predicted = Memory(input_bytes=size, output_bytes=size)
    use = measure.measure_memory(run, inputs, predicted=predicted, machine=gpu)
    assert (use.input_bytes, use.output_bytes) == (size, size)
    assert use.workspace_bytes == 8 * size and use.peak_bytes == 10 * size
