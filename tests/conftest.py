"""Which tests run in this process: the interpreter's, those of a GPU, and all others."""

import pytest

from tests import triton_interpreter


def pytest_configure(config: pytest.Config) -> None:
    if triton_interpreter.is_interpreting():
        triton_interpreter.repair()


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
