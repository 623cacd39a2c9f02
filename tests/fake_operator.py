"""Small operators for tests: `double` (out = 2 x), `shift` (out = x + 1), `affine` (both in turn).

Each fault that the gate must see is an implementation of `double`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dsa_bench import registry
from dsa_bench.accuracy import Check, Tolerance, compare_tensors
from dsa_bench.operator import (
    Cost,
    Implementation,
    Machine,
    Memory,
    Operator,
    Run,
    Unsupported,
)
from dsa_bench.preset import Preset
from dsa_bench.record import Case

CPU = Machine(device="cpu", name="test")
NUM_COLS = 16


@dataclass(frozen=True, kw_only=True)
class FakeShape:
    num_rows: int
    workspace_bytes: int = 0


@dataclass(frozen=True)
class FakeInputs:
    x: Tensor


class FakeOutputs(NamedTuple):
    out: Tensor


def case(impl: str | Mapping[str, str] = "good", **values: Any) -> Case:
    """A case of `double` with 200 rows; seq_len_kv is the number of rows."""
    base: dict[str, Any] = {"op": "double", "phase": "prefill", "seq_len_kv": 200, "seq_len_q": 1}
    return Case(impl=impl, **(base | values))


def shape_of(case: Case, preset: Preset) -> FakeShape:
    if case.seq_len_q > case.seq_len_kv:
        raise Unsupported("more queries than keys")
    if case.seq_len_kv == 13:
        raise ValueError("seq_len_kv must be positive")
    return FakeShape(num_rows=case.seq_len_kv)


def make_inputs(shape: FakeShape, *, seed: int, device: str) -> FakeInputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    return FakeInputs(torch.randn(shape.num_rows, NUM_COLS, generator=generator, device=device))


def make_operator(name: str, formula: Callable[[Tensor], Tensor], **fields: Any) -> Operator:
    """An operator on rows, each independent of the others."""

    def reference(inputs: FakeInputs, *, rows: Tensor | None = None) -> FakeOutputs:
        return FakeOutputs(formula(inputs.x if rows is None else inputs.x[rows]))

    def check(
        inputs: FakeInputs, outputs: FakeOutputs, *, rows: Tensor | None = None
    ) -> tuple[Check, ...]:
        actual = outputs.out if rows is None else outputs.out[rows]
        expected = reference(inputs, rows=rows).out
        return (compare_tensors("out", actual, expected, Tolerance(abs=1e-3, rel=1e-2, cos=1e-5)),)

    values: dict[str, Any] = {
        "summary": f"{name} of each element",
        "phases": ("prefill", "decode"),
        "axes": frozenset(),
        "shape": shape_of,
        "make_inputs": make_inputs,
        "cost": lambda shape: Cost(
            flops=16 * shape.num_rows,
            bytes_read=64 * shape.num_rows,
            bytes_written=64 * shape.num_rows,
        ),
        "memory": lambda shape: Memory(
            input_bytes=64 * shape.num_rows, output_bytes=64 * shape.num_rows
        ),
        "num_rows": lambda shape: shape.num_rows,
    }
    return Operator(name=name, reference=reference, check=check, **(values | fields))


def compose(phase: str, stages: Mapping[str, Implementation]) -> Run:
    def run(inputs: FakeInputs) -> FakeOutputs:
        for stage in ("double", "shift"):
            with record_function(f"stage:{stage}"):
                inputs = FakeInputs(stages[stage].run(inputs).out)
        return FakeOutputs(inputs.x)

    return run


DOUBLE = make_operator("double", lambda x: 2 * x)
SHIFT = make_operator("shift", lambda x: x + 1)
AFFINE = make_operator(
    "affine",
    lambda x: 2 * x + 1,
    stages=lambda phase: ("double", "shift"),
    compose=compose,
    stage_shapes=lambda shape: {"double": (shape,), "shift": (shape,)},
)


def good(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(inputs.x + inputs.x)


def zeros(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(torch.zeros_like(inputs.x))


def first_row_only(inputs: FakeInputs, /) -> FakeOutputs:
    """Leaves NaN in the last row."""
    out = 2 * inputs.x
    out[-1, 3] = float("nan")
    return FakeOutputs(out)


def off_by_one(inputs: FakeInputs, /) -> FakeOutputs:
    """Each row gets the result of the row before it."""
    return FakeOutputs(2 * inputs.x.roll(1, dims=0))


def wrong_shape(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(2 * inputs.x[:, :-1])


def raising(error: Exception) -> Run:
    def run(inputs: FakeInputs, /) -> FakeOutputs:
        raise error

    return run


def stale() -> Run:
    """Hands out the result of its first call for ever."""
    kept: list[FakeOutputs] = []

    def run(inputs: FakeInputs, /) -> FakeOutputs:
        kept.append(good(inputs))
        return kept[0]

    return run


def needs_gpu(shape: Any, machine: Machine) -> str | None:
    return None if machine.device == "cuda" else "needs a CUDA GPU"


def catalogue() -> registry.Catalogue:
    """What the registry would find; stateful implementations are made anew."""
    runs: dict[str, Run] = {
        "good": good,
        "zeros": zeros,
        "nan": first_row_only,
        "off_by_one": off_by_one,
        "wrong_shape": wrong_shape,
        "stale": stale(),
        "broken": raising(RuntimeError("boom\nsecond line")),
        "lost": raising(RuntimeError("CUDA error: an illegal memory access was encountered")),
        "greedy": raising(torch.OutOfMemoryError("tried to allocate 20.00 GiB")),
        "unable": raising(Unsupported("cannot do that")),
    }
    faulty = tuple(Implementation(name=name, run=run, priority=-1) for name, run in runs.items())
    gpu = Implementation(
        name="gpu", run=good, supports=needs_gpu, install="pip install gpu", priority=10
    )
    best = Implementation(name="best", run=good, priority=5)
    shift = Implementation(name="best", run=lambda inputs: FakeOutputs(inputs.x + 1), priority=5)
    return registry.collect(
        {
            "double": module(OPERATOR=DOUBLE),
            "shift": module(OPERATOR=SHIFT),
            "affine": module(OPERATOR=AFFINE),
            "double_faulty": module(IMPLEMENTS="double", IMPLEMENTATIONS=faulty),
            "library": module(IMPLEMENTATIONS={"double": (gpu, best), "shift": (shift,)}),
        },
        {"double_triton": ModuleNotFoundError("No module named 'triton'", name="triton")},
    )


def module(**names: Any) -> Any:
    return type("FakeModule", (), names)
