"""Dense attention by libraries: shapes, inputs, the answer in torch, a module that is faked."""

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch

from dsa_bench import registry
from dsa_bench.accuracy import Check
from dsa_bench.baselines.dense_attention import OPERATOR, DenseAttentionShape
from dsa_bench.operator import Machine

HOPPER = Machine(device="cuda", name="H100", capability=(9, 0))
AMPERE = Machine(device="cuda", name="A100", capability=(8, 0))
CPU = Machine(device="cpu", name="CPU")
PREFILL_SIZES = [(1, 1), (5, 5), (1, 40), (7, 40), (39, 40), (40, 300)]


def prefill_shape(seq_len_q: int, seq_len_kv: int, num_heads: int = 3) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="prefill",
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_heads,
        head_dim_qk=192,
        head_dim_v=128,
    )


def decode_shape(
    batch_size: int, seq_len_q: int, seq_len_kv: int, num_heads: int = 4, lengths: str = "equal"
) -> DenseAttentionShape:
    return DenseAttentionShape(
        phase="decode",
        batch_size=batch_size,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_heads,
        head_dim_qk=576,
        head_dim_v=512,
        lengths=lengths,
    )


def sharp_inputs(shape: DenseAttentionShape, seed: int = 0, device: str = "cpu") -> Any:
    """Queries 30 times larger: with weak scores every key counts alike."""
    inputs = OPERATOR.make_inputs(shape, seed=seed, device=device)
    return dataclasses.replace(inputs, q=(inputs.q.float() * 30).bfloat16())


def failed(checks: tuple[Check, ...]) -> list[Check]:
    return [c for c in checks if not c.passed]


def attend(q: Any, k: Any, v: Any, scale: float, causal: bool) -> tuple[Any, Any]:
    """[rows, heads, width] -> out, natural lse [rows, heads]; causal to the last key."""
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:
        sees = torch.ones(logits.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        logits = logits.masked_fill(~sees, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.float())
    return out.bfloat16(), logits.logsumexp(-1).T


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    fake = types.ModuleType(name)
    fake.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, fake)


def on_this_gpu(op: str, name: str, shape: Any) -> Any:
    """The implementation, or the test is skipped with its reason."""
    part = registry.implementation(op, name)
    machine = Machine(device="cuda", name="this one", capability=torch.cuda.get_device_capability())
    reason = part.supports(shape, machine)
    if reason is not None:
        pytest.skip(reason)
    return part
