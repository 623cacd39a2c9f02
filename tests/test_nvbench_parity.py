"""`cold` against NVBench's cold measurement of the same calls, in turns in one process.

Before each call NVBench fills as many bytes as L2 holds and leaves them there as dirty lines, which
the call then has to write back; `cold` reads twice as many bytes besides, so that the lines are
written back before. A call that moves much memory in a short time shows the difference. So the
calls are timed behind both flushes: behind NVBench's the clocks must agree, and behind our own
too where the flush cannot matter.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.kernels.paged_indexer import PagedIndexerShape
from dsa_bench.machine import detect
from dsa_bench.meter import CudaMeter, Flush, l2_flush
from dsa_bench.operator import Machine
from dsa_bench.stats import median

Call = Callable[[], object]
Rounds = dict[str, list[list[float]]]
"""Who timed it -> seconds of each sample of each round."""

LIMIT = 0.01
ROUNDS = 5
SAMPLES = 60
WARMUP_CALLS = 10


def add(megabytes: int) -> Call:
    """Reads and writes that many bytes each."""
    x = torch.randn(megabytes * 2**20 // 4, device="cuda")
    return functools.partial(torch.add, x, 1.0, out=torch.empty_like(x))


def matmul(m: int, n: int, k: int) -> Call:
    a, b = (torch.randn(*dims, device="cuda").bfloat16() for dims in ((m, k), (k, n)))
    return functools.partial(torch.mm, a, b, out=a.new_empty(m, n))


def paged_indexer(batch_size: int) -> Call:
    shape = PagedIndexerShape(batch_size=batch_size, seq_len_kv=32768)
    operator = registry.operator("paged_indexer")
    inputs = operator.make_inputs(shape, seed=0, device="cuda")
    return functools.partial(registry.implementation("paged_indexer", "triton").run, inputs)


KERNELS: dict[str, Callable[[], Call]] = {
    "paged-indexer-10us": functools.partial(paged_indexer, 1),
    "add-10us": functools.partial(add, 12),
    "add-300us": functools.partial(add, 400),
    "matmul-300us": functools.partial(matmul, 4096, 8192, 3584),
    "add-5ms": functools.partial(add, 7000),
}
"""None draws so much power that the clock falls: NVBench leaves out samples below 75 % of it."""
FLUSH_CANNOT_MATTER = ("matmul-300us", "add-5ms")


def nvbench_flush(machine: Machine) -> Flush:
    """What NVBench does before a call: fill one size of L2, and wait."""
    from cuda.bindings import runtime

    buffer = torch.empty(machine.l2_bytes, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        stream = torch.cuda.current_stream()
        (error,) = runtime.cudaMemsetAsync(buffer.data_ptr(), 0, buffer.numel(), stream.cuda_stream)
        assert error == runtime.cudaError_t.cudaSuccess
        stream.synchronize()

    return Flush(run=flush, num_bytes=buffer.numel())


def cold_seconds(call: Call, flush: Flush, count: int) -> list[float]:
    meter = CudaMeter(flush)
    for _ in range(WARMUP_CALLS):
        meter.sample(call)
    return [meter.sample(call).seconds for _ in range(count)]


class StreamHandle:
    """A torch stream as NVBench takes it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def nvbench_seconds(state: Any) -> list[float]:
    """Samples of one state of NVBench's results."""
    assert not state.is_skipped, state.skip_reason
    return list(state.samples)


def time_by_both(calls: Mapping[str, Call], path: Path) -> dict[str, Rounds]:
    """Name -> rounds of `own`, `same_flush` (our clock behind NVBench's flush) and `nvbench`.

    NVBench runs its benchmarks once in a process, so it is given all of them, and ours run inside.
    `path`: where it writes its results.
    """
    import cuda.bench as nvbench
    from cuda.bench.results import BenchmarkResult

    machine, stream = detect("cuda"), torch.cuda.Stream()
    flushes = {"own": l2_flush(machine), "same_flush": nvbench_flush(machine)}
    rounds: dict[str, Rounds] = {name: {kind: [] for kind in flushes} for name in calls}
    torch.cuda.synchronize()

    def benchmark_of(name: str, call: Call) -> Callable[[Any], None]:
        def launch(_: Any) -> None:
            call()

        def benchmark(state: Any) -> None:
            state.set_stream(StreamHandle(stream))
            with torch.cuda.stream(stream):
                for kind, flush in flushes.items():
                    rounds[name][kind].append(cold_seconds(call, flush, SAMPLES))
                state.exec(launch, batched=False)

        return benchmark

    for name, call in calls.items():
        benchmark = nvbench.register(benchmark_of(name, call)).set_name(name)
        benchmark.add_int64_axis("round", list(range(ROUNDS))).set_min_samples(SAMPLES)
        benchmark.set_stopping_criterion("sample-count")
        benchmark.set_criterion_param_int64("target-samples", SAMPLES)
    nvbench.run_all_benchmarks(["nvbench", "--quiet", "--devices", "0", "--jsonbin", str(path)])
    results = BenchmarkResult.from_json(path)
    for name in calls:
        rounds[name]["nvbench"] = [nvbench_seconds(state) for state in results[name]]
    return rounds


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Median over the rounds of the ratio of medians: a drift of the machine cancels."""
    return median([median(a) / median(b) for a, b in zip(ours, theirs, strict=True)])


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rounds]]:
    pytest.importorskip("cuda.bench", reason="needs NVBench: pip install cuda-bench[cu13]")
    calls = {name: make() for name, make in KERNELS.items()}
    yield time_by_both(calls, tmp_path_factory.mktemp("nvbench") / "results.json")
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_cold_agrees_with_nvbench(
    name: str, timed: dict[str, Rounds], record_property: Callable[[str, object], None]
) -> None:
    rounds = timed[name]
    figures = {kind: ratio(rounds[kind], rounds["nvbench"]) for kind in ("own", "same_flush")}
    figures["nvbench_us"] = 1e6 * median([median(samples) for samples in rounds["nvbench"]])
    record_property(name, figures)
    print(name, figures)
    assert abs(figures["same_flush"] - 1) < LIMIT, figures
    if name in FLUSH_CANNOT_MATTER:
        assert abs(figures["own"] - 1) < LIMIT, figures


def test_a_ratio_is_taken_round_by_round() -> None:
    """The second round ran on a machine twice as slow."""
    assert ratio([[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]], [[1.0], [2.0]]) == 1.0
