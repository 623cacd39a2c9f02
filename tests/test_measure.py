"""Stopping rule, visits and modes; clocks and meters are fakes."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsa_bench import measure, nvml
from dsa_bench.measure import EFFORTS, VISITS, Effort, Sampler
from dsa_bench.meter import Call, Keep, Sample
from dsa_bench.operator import Machine
from dsa_bench.timed_outputs import Watch
from tests import fake_operator
from tests.fake_cuda import FakeClock
from tests.fake_operator import CPU, FakeInputs, FakeShape

GPU = Machine(device="cuda", name="test")


@dataclass
class FakeMeter:
    """Each call lasts as long as the next of `durations` says."""

    clock: FakeClock
    durations: Iterator[float]
    overtaken: Callable[[int], bool] = lambda index: False
    taken: int = 0
    flush_bytes: int = 5
    event_overhead: float = 1e-6
    spin_seconds: float = 2e-4

    def sample(self, call: Call, keep: Keep | None = None) -> Sample:
        outputs = call()
        if keep is not None:
            keep(outputs)
        seconds = next(self.durations)
        self.clock.now += seconds
        self.taken += 1
        return Sample(
            seconds=seconds, overtaken=self.overtaken(self.taken), hidden_seconds=seconds / 10
        )


def endless(*values: float) -> Iterator[float]:
    while True:
        yield from values


def sampler(*durations: float, effort: str = "quick", mode: str = "cold", **fields: Any) -> Sampler:
    clock = FakeClock()
    meter = FakeMeter(clock, endless(*durations))
    values = {"calls": [lambda: None], "effort": EFFORTS[effort], "mode": mode} | fields
    values.setdefault("num_sets", len(values["calls"]))
    return Sampler(meter=meter, clock=clock, **values)


def visited(taken: Sampler) -> Sampler:
    for number in range(VISITS):
        taken.visit(number)
    return taken


def test_steady_calls_settle_at_the_fewest_samples() -> None:
    taken = visited(sampler(0.001))
    timing = taken.timing
    assert (timing.stop, timing.mode) == ("settled", "cold")
    assert timing.seconds == (0.001,) * measure.MIN_SAMPLES
    assert timing.blocks == (measure.MIN_SAMPLES // 2,) * 2
    # warm-up, at least 0.05 s before each visit, is not in the samples
    assert timing.warmup_calls == 100
    assert (timing.flush_bytes, timing.event_overhead_seconds) == (5, 1e-6)
    assert (timing.spin_seconds, timing.hidden_seconds) == (2e-4, 1e-4)


def test_long_calls_stop_by_time_after_few_samples() -> None:
    timing = visited(sampler(0.4)).timing
    assert timing.stop == "max_seconds" and timing.blocks == (3, 2)
    assert timing.warmup_calls == VISITS


def test_noise_is_sampled_until_the_time_is_up() -> None:
    timing = visited(sampler(0.01, 0.02, 0.02, 0.01)).timing
    assert timing.stop == "max_seconds"
    assert sum(timing.seconds) == pytest.approx(1.0, abs=0.05)
    halves = [sum(timing.seconds[: timing.blocks[0]]), sum(timing.seconds[timing.blocks[0] :])]
    assert halves == pytest.approx([0.5, 0.5], abs=0.05)


def test_more_effort_asks_for_a_narrower_interval() -> None:
    durations = [0.00100, 0.00102, 0.00101, 0.00103, 0.00100, 0.00103, 0.00102]
    quick = visited(sampler(*durations)).timing
    precise = visited(sampler(*durations, effort="precise")).timing
    assert quick.stop == "settled" and len(quick.seconds) == measure.MIN_SAMPLES
    assert len(precise.seconds) > 100


def test_two_visits_that_differ_do_not_settle() -> None:
    taken = sampler(0.01)
    taken.visit(0)
    assert taken.stop == "settled"
    taken.meter.durations = endless(0.011)  # type: ignore[attr-defined]
    taken.visit(1)
    assert taken.stop == "max_seconds"


def test_samples_are_bounded_in_number() -> None:
    draw = random.Random(0)
    wild = [draw.lognormvariate(-13, 2.0) for _ in range(10_000)]
    timing = visited(sampler(*wild)).timing
    assert timing.stop == "max_samples"
    assert timing.blocks == (measure.MAX_SAMPLES // 2,) * 2


def test_sustained_runs_for_its_seconds_however_steady() -> None:
    timing = visited(sampler(0.02, mode="sustained")).timing
    assert timing.stop == "settled"
    assert sum(timing.seconds) == pytest.approx(VISITS * measure.SUSTAINED_SECONDS, abs=0.05)
    warm = VISITS * measure.SUSTAINED_WARMUP_SECONDS / 0.02
    assert timing.warmup_calls == pytest.approx(warm, abs=2)


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


def test_a_host_that_is_late_is_flagged_and_its_samples_are_marked() -> None:
    late = sampler(0.01)
    late.meter.overtaken = lambda taken: True  # type: ignore[attr-defined]
    visited(late)
    assert late.all_flags == ("launch_bound",)
    assert late.timing.overtaken == tuple(range(measure.MIN_SAMPLES))
    in_time = visited(sampler(0.01, flags=("no_graph",)))
    assert in_time.all_flags == ("no_graph",) and in_time.timing.overtaken == ()


def test_calls_rotate_from_the_first_set_in_each_visit() -> None:
    seen: list[str] = []
    calls = [lambda name=name: seen.append(name) for name in "abc"]
    taken = visited(sampler(0.4, calls=calls))
    assert "".join(seen) == "a" + "abc" + "a" + "ab"
    assert taken.timing.input_sets == 3


def keeping(expected: int, chosen: int) -> tuple[Watch, list[int]]:
    """A watch, and the sets that it renewed (n) and restored (-n - 1)."""
    changed: list[int] = []
    watch = Watch(
        expected,
        changed.append,
        lambda index: changed.append(-index - 1),
        choose=lambda calls: chosen,
    )
    return watch, changed


def test_a_watched_visit_keeps_one_output_and_its_time() -> None:
    calls = [lambda: [torch.zeros(1)], lambda: [torch.ones(1)]]
    taken = sampler(*[0.01] * 12, 0.07, *[0.01] * 99, calls=calls)
    assert taken.expected_samples == measure.MIN_SAMPLES / VISITS
    watch, prepared = keeping(10, 7)
    taken.visit(0, watch)  # behind 5 calls of warm-up
    assert prepared == [1, -2] and watch.set_index == 1 and watch.outputs[0].item() == 1.0
    assert taken.timing.fresh_seconds == (0.07,) and taken.timing.seconds[7] == 0.07
    assert taken.expected_samples == len(taken.samples)


def test_a_visit_that_settles_early_still_watches_its_last_call() -> None:
    taken = sampler(0.01, calls=[lambda: [torch.zeros(1)]])
    watch, prepared = keeping(1000, 999)
    taken.visit(0, watch)
    assert prepared == [0, -1] and len(taken.samples) == measure.MIN_SAMPLES / VISITS + 1
    assert taken.stop == "settled" and len(taken.fresh) == 1


def test_making_new_inputs_is_not_the_time_of_the_samples() -> None:
    taken = sampler(0.01, calls=[lambda: [torch.zeros(1)]])

    def slowly(index: int) -> None:
        taken.clock.now += 50.0  # type: ignore[attr-defined]

    for number in range(VISITS):
        taken.visit(number, Watch(1, slowly, slowly, choose=lambda calls: 0))
    assert taken.stop == "settled" and len(taken.samples) == measure.MIN_SAMPLES
    assert taken.elapsed == pytest.approx(0.01 * (measure.MIN_SAMPLES - VISITS))


def test_sustained_watches_a_call_behind_the_train() -> None:
    taken = sampler(0.02, mode="sustained", calls=[lambda: [torch.zeros(1)]], num_sets=3)
    watch, prepared = keeping(10, 3)
    taken.visit(0, watch)
    assert prepared == [2, -3] and watch.outputs is not None and taken.timing.fresh_seconds == ()


def test_telemetry_watches_samples_but_not_the_warm_up() -> None:
    clocks: list[int] = []
    taken = sampler(0.4)

    @contextlib.contextmanager
    def watching() -> Iterator[None]:
        clocks.append(taken.meter.taken)  # type: ignore[attr-defined]
        yield
        clocks.append(taken.meter.taken)  # type: ignore[attr-defined]

    taken.watching = watching
    visited(taken)
    assert clocks == [1, 4, 5, 7]


def test_default_modes() -> None:
    modes = [(p, m, measure.default_mode(p, m)) for p in ("prefill", "decode") for m in (CPU, GPU)]
    assert [mode for *_, mode in modes] == ["cpu", "cold", "cpu", "graph"]


@pytest.mark.parametrize(
    ("mode", "device", "reason"),
    [
        ("auto", "cpu", ""),
        ("auto", "cuda", ""),
        ("cpu", "cpu", ""),
        ("graph", "cuda", ""),
        ("cold", "cpu", "mode cold needs a CUDA GPU"),
        ("cpu", "cuda", "mode cpu times on the host"),
    ],
)
def test_modes_that_a_device_lacks_are_told(mode: str, device: str, reason: str) -> None:
    said = measure.unsuited(mode, device)
    assert said.startswith(reason) and bool(said) == bool(reason)


def open_on(machine: Machine, mode: str, run: Any, sets: list[Any]) -> Sampler:
    effort = Effort(half_width=math.inf, max_seconds=0.01)
    return measure.open_sampler(run, sets, mode=mode, effort=effort, machine=machine)


def test_measure_on_the_cpu_rotates_real_inputs() -> None:
    sets = [fake_operator.make_inputs(FakeShape(num_rows=4), seed=s, device="cpu") for s in (0, 1)]
    seen: list[FakeInputs] = []
    timing = visited(open_on(CPU, "cpu", seen.append, sets)).timing
    assert timing.mode == "cpu" and len(timing.seconds) == measure.MIN_SAMPLES
    assert all(seconds > 0 for seconds in timing.seconds)
    assert seen[-1] is not seen[-2] and seen[-1] is seen[-3]


def test_memory_that_runs_out_in_a_capture_is_no_failed_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(*_: object) -> list[Any]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(measure, "_capture", capture)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        open_on(GPU, "graph", fake_operator.good, [])


@pytest.fixture
def gpu() -> Machine:
    from dsa_bench.machine import detect

    return detect("cuda")


def gpu_sets(num_rows: int = 2**18) -> list[FakeInputs]:
    shape = FakeShape(num_rows=num_rows)
    return [fake_operator.make_inputs(shape, seed=s, device="cuda") for s in (0, 1)]


def measured(run: Any, sets: list[FakeInputs], mode: str, machine: Machine) -> Sampler:
    taken = measure.open_sampler(run, sets, mode=mode, effort=EFFORTS["quick"], machine=machine)
    return visited(taken)


def median_of(taken: Sampler) -> float:
    return sorted(taken.timing.seconds)[len(taken.timing.seconds) // 2]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cold", "warm", "graph", "sustained"])
def test_gpu_time_of_a_copy_is_near_its_bandwidth(mode: str, gpu: Machine) -> None:
    sets = gpu_sets(2**21)  # 128 MiB in, as much out
    taken = measured(fake_operator.good, sets, mode, gpu)
    assert taken.timing.mode == mode and taken.all_flags == ()
    assert 0.5e12 < 2**28 / median_of(taken) < 10e12
    assert taken.timing.flush_bytes == (2 * gpu.l2_bytes if mode in ("cold", "graph") else 0)


@pytest.mark.gpu
def test_gpu_inputs_in_l2_are_faster_than_flushed_ones(gpu: Machine) -> None:
    if len(nvml.processes_before()) > 1:
        pytest.skip("needs the GPU for itself: another process empties L2 too")
    sets = gpu_sets(2**17)  # 8 MiB in, as much out
    warm, cold = (median_of(measured(fake_operator.good, sets, m, gpu)) for m in ("warm", "cold"))
    print(f"warm {1e6 * warm:.2f} us, cold {1e6 * cold:.2f} us")
    assert warm < 0.9 * cold


@pytest.mark.gpu
def test_gpu_call_that_waits_is_measured_without_a_graph(gpu: Machine) -> None:
    def run(inputs: FakeInputs) -> Any:
        return fake_operator.good(FakeInputs(inputs.x + inputs.x.sum().item()))

    before = torch.cuda.current_stream()
    taken = measured(run, gpu_sets(), "graph", gpu)
    assert taken.timing.mode == "cold" and taken.all_flags == ("no_graph", "launch_bound")
    assert torch.cuda.current_stream() == before
    # the process must be well afterwards
    again = measured(fake_operator.good, gpu_sets(), "graph", gpu)
    assert again.timing.mode == "graph" and again.all_flags == ()
