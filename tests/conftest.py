"""Which tests run in this process: the interpreter's, those of a GPU, and all others."""

import os
from collections.abc import Iterator

import pytest

from dsa_bench import probe
from tests import triton_interpreter


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", 0):
        # of the workers, and of what they start: threads beside a worker on each core wait for
        # each other in loops, and small tensors take twice as long
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if triton_interpreter.is_interpreting():
        triton_interpreter.repair()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ceilings of these tests, and of the commands they start, stay out of the user's cache."""
    before = os.environ.get("DSA_BENCH_CACHE")
    os.environ["DSA_BENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DSA_BENCH_CACHE"]
    else:
        os.environ["DSA_BENCH_CACHE"] = before


@pytest.fixture(scope="session")
def cpu_probe() -> probe.Probe:
    return probe.probe("cpu", with_ceilings=True)


@pytest.fixture
def probed_once(monkeypatch: pytest.MonkeyPatch, cpu_probe: probe.Probe) -> None:
    """Commands on the CPU find what one probe has found: each takes a process of 2 s."""

    def known(device: str, *, with_ceilings: bool) -> probe.Probe:
        assert device == "cpu"
        return cpu_probe

    monkeypatch.setattr(probe, "probe", known)


@pytest.fixture(autouse=True)
def gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test held goes back to the GPU, which other workers share: 14 of them kept 80 GB."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreting = triton_interpreter.is_interpreting()
    foreign = [item for item in items if interpreting and not item.get_closest_marker("interpret")]
    if foreign:
        config.hook.pytest_deselected(items=foreign)
        items[:] = [item for item in items if item not in foreign]
    for item in items:
        reason = _skip_reason(item, interpreting)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _skip_reason(item: pytest.Item, interpreting: bool) -> str | None:
    if item.get_closest_marker("interpret") and not interpreting:
        return "needs TRITON_INTERPRET=1 (make test runs these first)"
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA GPU"
    return None
