"""The ring that runs every implementation over the hostile inputs of `kernels/hostile.py` on a GPU.

Tests take those inputs from here too.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dsa_bench import gate, machine, registry
from dsa_bench.accuracy import Check
from dsa_bench.kernels.hostile import (  # noqa: F401 - tests take them from here
    INF,
    INVALID_INDICES,
    LEAST,
    MUTATIONS,
    NAN,
    TOPK_ROWS,
    Mutation,
    _fill_nan,
    _inside_larger,
    _inside_wider,
    _ints,
    _is_listed,
    _sink,
    _spoil,
    head_linear_shared,
    head_linear_strided,
    indexer_ragged,
    indexer_silent,
    linear_strided,
    linear_uneven,
    loud,
    nan_in_query,
    page_slots_wild,
    paged_indexer_ragged,
    peaked,
    plain,
    sparse_decode_wild,
    sparse_prefill_fp8_sharp,
    sparse_prefill_fp8_wild,
    sparse_prefill_paged,
    sparse_prefill_strided,
    sparse_prefill_wild,
    topk_paged,
    topk_rows,
    topk_sorted,
)
from dsa_bench.kernels.paging import HEAD_DIM_V, unpack_mla_rows
from dsa_bench.operator import Implementation

SHORT = {
    "batch_size": "b", "seq_len_q": "q", "seq_len_kv": "kv", "topk": "k", "num_heads": "h",
    "index_heads": "h", "page_size": "p", "num_rows": "rows", "num_cols": "cols",
}  # fmt: skip


def label(shape: Any) -> str:
    """`b3-q2-kv700-k300-fp8`: an id that can be typed."""
    parts = [
        f"{SHORT[field.name]}{getattr(shape, field.name)}"
        for field in dataclasses.fields(shape)
        if field.name in SHORT
    ]
    return "-".join([*parts, getattr(shape, "precision", "")]).strip("-")


def slugs(mistakes: Sequence[tuple[Any, ...]]) -> list[str]:
    """Ids of rows that end in a sentence: its words."""
    return [re.sub(r"[^a-z0-9_]+", "-", row[-1].lower()).strip("-") for row in mistakes]


def passes(checks: Sequence[Check]) -> bool:
    return all(check.passed for check in checks)


def assert_right(operator: str, inputs: Any, outputs: Any, rows: Tensor | None = None) -> None:
    """Every check of the operator passes; a failing one shows its figures."""
    for check in registry.operator(operator).check(inputs, outputs, rows=rows):
        assert check.passed, check


def assert_nan_shows(operator: str, inputs: Any, outputs: Any) -> None:
    """NaN exactly where the reference has it, in every output; rows without any are right."""
    wanted = registry.operator(operator).reference(inputs)
    for output, expected in zip(outputs, wanted, strict=True):
        assert torch.equal(output.isnan(), expected.isnan())
    has_nan = wanted.lse.isnan().flatten(1).any(1)
    assert has_nan.any()
    assert_right(operator, inputs, outputs, rows=(~has_nan).nonzero().flatten())


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """What torch.empty gives is full of NaN, or of a large number where it holds integers."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(NAN)
            return x.fill_(0x6E if x.element_size() == 1 else 0x3EEEEEEE)

        return call

    with (
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
    ):
        yield


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Host code that asks for the device sees one of that capability, with 4 multiprocessors."""
    device = SimpleNamespace(multi_processor_count=4, major=major, minor=0, name="pretended")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: device)


def bf16_attention_error(
    q: Tensor, k: Tensor, valid: Tensor, sm_scale: float
) -> tuple[Tensor, float]:
    """(out in fp64 [rows, heads, 512], largest error of plain bf16 torch against it).

    Plain: products summed in fp32, softmax in fp32, its weights and the output rounded to bf16.
    """
    k = torch.where(valid.unsqueeze(-1), k.float(), 0.0)
    exact = attend_fp64(q, k, valid, sm_scale)
    logits = torch.einsum("qhd,qkd->qhk", q.float(), k) * sm_scale
    weights = logits.masked_fill(~valid.unsqueeze(1), -INF).softmax(-1).nan_to_num(0.0).bfloat16()
    v = k[..., :HEAD_DIM_V]
    simple = torch.einsum("qhk,qkd->qhd", weights.float(), v).bfloat16()
    return exact, (simple.double() - exact).abs().max().item()


def attend_fp64(q: Tensor, k: Tensor, valid: Tensor, sm_scale: float) -> Tensor:
    """Attention of each row over its own keys, without a sink; 0 for rows without a key."""
    k = torch.where(valid.unsqueeze(-1), k, 0.0).double()
    logits = torch.einsum("qhd,qkd->qhk", q.double(), k) * sm_scale
    weights = logits.masked_fill(~valid.unsqueeze(1), -INF).softmax(-1).nan_to_num(0.0)
    return torch.einsum("qhk,qkd->qhd", weights, k[..., :HEAD_DIM_V])


def gathered(inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, valid) with one row a query, of sparse_prefill or sparse_decode inputs."""
    if hasattr(inputs, "kv"):
        q, keys, listed = inputs.q, inputs.kv, inputs.topk_indices
    else:
        q, keys = inputs.q.flatten(0, 1), inputs.kv_cache.flatten(0, 1)
        listed = inputs.topk_slots.flatten(0, 1)
    valid = (listed >= 0) & (listed < keys.shape[0])
    k = keys[torch.where(valid, listed, 0).long()]
    return q, (k if hasattr(inputs, "kv") else unpack_mla_rows(k)), valid


def assert_as_exact_as_bf16(inputs: Any, out: Tensor) -> None:
    """`out` errs at most twice as much as plain bf16 torch, plus half a unit of the last place."""
    q, k, valid = gathered(inputs)
    exact, simple_error = bf16_attention_error(q, k, valid, inputs.sm_scale)
    error = (out.reshape(exact.shape).double() - exact).abs().max().item()
    assert error <= 2 * (simple_error + exact.abs().max().item() * 2**-9)


def names(operator: str) -> list[str]:
    """Every implementation but the reference, and but those of foreign libraries: what they refuse
    or read wildly ends processes, so `dsa-bench check --hostile` runs each in one of its own."""
    return [
        name
        for name, part in registry.implementations(operator).items()
        if name != registry.REFERENCE and part.library is None
    ]


def cases(operator: str, shapes: Sequence[Any]) -> list[Any]:
    """(implementation, shape, mutation): every implementation, plain and through the menagerie."""
    mutations = {"plain": plain, **MUTATIONS[operator]}
    return [
        pytest.param(name, shape, mutate, id=f"{name}-{label(shape)}-{kind}")
        for name in names(operator)
        for shape in shapes
        for kind, mutate in mutations.items()
    ]


def runnable(operator: str, name: str, shape: Any) -> Implementation:
    """The implementation; a shape that it cannot take on this GPU skips the test."""
    implementation = registry.implementation(operator, name)
    reason = implementation.supports(shape, machine.detect("cuda"))
    if reason:
        pytest.skip(reason)
    return implementation


def assert_implementation(operator: str, name: str, shape: Any, mutate: Mutation) -> None:
    """On the GPU: right on sampled rows, and the same bits twice."""
    implementation = runnable(operator, name, shape)
    inputs = mutate(registry.operator(operator).make_inputs(shape, seed=1, device="cuda"))
    with poisoned_outputs():
        first, second = implementation.run(inputs), implementation.run(inputs)
    rows = gate.sample_rows(registry.operator(operator).num_rows(shape), seed=2, device="cuda")
    assert_right(operator, inputs, first, rows)
    if operator == "topk":  # unsorted, and free to take any of several equal values
        assert_right(operator, inputs, second, rows)
        return
    for one, other in zip(first, second, strict=True):
        assert torch.equal(bits(one), bits(other)), "two runs differ"


def bits(x: Tensor) -> Tensor:
    """Bytes, so that NaN equals itself."""
    return x.contiguous().view(torch.uint8)
