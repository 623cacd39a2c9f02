"""The gate must pass what is right and name what is wrong."""

import re
from typing import Any

import pytest
import torch

from dsa_bench import gate
from dsa_bench.accuracy import Check
from dsa_bench.operator import Memory, Run
from tests import fake_operator
from tests.fake_operator import DOUBLE, FakeShape


def judge(run: Run, *, num_rows: int = 200, earlier_seed: int | None = None) -> gate.Verdict:
    shape = FakeShape(num_rows=num_rows)
    if earlier_seed is not None:
        run(fake_operator.make_inputs(shape, seed=earlier_seed, device="cpu"))
    inputs = fake_operator.make_inputs(shape, seed=0, device="cpu")
    return gate.check_outputs(DOUBLE, inputs, run(inputs), num_rows=num_rows, seed=0, device="cpu")


@pytest.mark.parametrize(("num_rows", "checked"), [(1, 1), (64, 64), (65, 64), (5000, 64)])
def test_right_output_passes_and_says_how_many_rows_were_held(num_rows: int, checked: int) -> None:
    verdict = judge(fake_operator.good, num_rows=num_rows)
    assert verdict.passed and verdict.reason == ""
    assert verdict.gate["rows"] == num_rows and verdict.gate["rows_checked"] == checked
    assert [c["name"] for c in verdict.gate["checks"]] == ["out"]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            fake_operator.zeros,
            r"^out: cos 1, limit 1e-05, \d+ elements outside abs 0.001 and rel 0.01",
        ),
        (fake_operator.first_row_only, "^out: 1 elements where only one of both is NaN"),
        (fake_operator.off_by_one, r"^out: cos .*, \d+ elements outside .*worst"),
        (fake_operator.wrong_shape, "^out: the output has another shape than the reference$"),
    ],
    ids=["zeros", "nan_in_the_last_row", "off_by_one", "wrong_shape"],
)
def test_wrong_output_fails_with_a_sentence(run: Run, reason: str) -> None:
    verdict = judge(run)
    assert not verdict.passed
    assert re.search(reason, verdict.reason)


def test_output_of_an_earlier_input_fails() -> None:
    assert not judge(fake_operator.stale(), earlier_seed=1).passed
    # without an earlier call there is nothing stale to hand out
    assert judge(fake_operator.stale()).passed


def test_sampled_rows_hold_those_that_are_always_checked() -> None:
    plain = gate.sample_rows(1000, seed=3, device="cpu")
    assert plain is not None
    missing = next(i for i in range(1000) if i not in plain.tolist())
    for always in ((missing,), (missing, int(plain[5])), (0, missing, 999)):
        rows = gate.sample_rows(1000, seed=3, device="cpu", always=always)
        assert rows is not None and rows.tolist() == sorted([*plain.tolist(), missing])
    assert gate.sample_rows(64, seed=0, device="cpu", always=(3,)) is None


def test_a_wrong_row_that_is_always_checked_fails() -> None:
    inputs = fake_operator.make_inputs(FakeShape(num_rows=500), seed=0, device="cpu")
    rows = gate.sample_rows(500, seed=0, device="cpu")
    assert rows is not None
    missing = next(i for i in range(500) if i not in rows.tolist())
    outputs = fake_operator.good(inputs)
    outputs.out[missing] += 1
    how: Any = {"num_rows": 500, "seed": 0, "device": "cpu"}
    assert gate.check_outputs(DOUBLE, inputs, outputs, **how).passed
    assert not gate.check_outputs(DOUBLE, inputs, outputs, **how, always=(missing,)).passed


def test_sampled_rows_hold_both_ends_once_and_repeat_with_the_seed() -> None:
    rows = gate.sample_rows(1000, seed=3, device="cpu")
    assert rows is not None
    values = rows.tolist()
    assert values == sorted(set(values)) and len(values) == gate.SAMPLED_ROWS
    assert values[0] == 0 and values[-1] == 999
    again = gate.sample_rows(1000, seed=3, device="cpu")
    other = gate.sample_rows(1000, seed=4, device="cpu")
    assert again is not None and values == again.tolist()
    assert other is not None and values != other.tolist()
    assert gate.sample_rows(64, seed=0, device="cpu") is None


def test_informative_figures_join_the_gate_and_decide_nothing() -> None:
    asked = []

    def figures(inputs: object, outputs: object, *, rows: torch.Tensor | None) -> dict[str, Any]:
        asked.append(rows)
        return {"dense_error": 0.7, "rounding_error": {"relative_l2": 0.04}}

    operator = fake_operator.make_operator("double", lambda x: 2 * x, figures=figures)
    inputs = fake_operator.make_inputs(FakeShape(num_rows=100), seed=0, device="cpu")
    verdict = gate.check_outputs(
        operator, inputs, fake_operator.good(inputs), num_rows=100, seed=0, device="cpu"
    )
    assert verdict.passed and verdict.gate["dense_error"] == 0.7
    assert verdict.gate["rounding_error"] == {"relative_l2": 0.04}
    assert asked[0] is not None and len(asked[0]) == gate.FIGURE_ROWS


def test_explain_names_only_what_is_over_its_limit() -> None:
    checks = (
        Check(name="a", passed=True, figures={"bad": 0.0}, limits={"bad": 0.0}),
        Check(
            name="b",
            passed=False,
            figures={"recall_loss": 0.2, "fine": 0.1, "unlimited": 9.0, "count": 3.0},
            limits={"recall_loss": 0.01, "fine": 0.5, "count": 0.0},
        ),
    )
    assert gate.explain(checks) == "b: recall_loss 0.2, limit 0.01, count 3, limit 0"
    assert gate.explain(checks[:1]) == ""


def test_memory_is_not_poisoned_on_a_cpu() -> None:
    # would fail by its size
    gate.poison_memory(Memory(input_bytes=0, output_bytes=2**60), "cpu", free=2**62)


@pytest.mark.gpu
def test_poisoned_memory_is_what_the_next_output_gets() -> None:
    torch.cuda.empty_cache()
    gate.poison_memory(Memory(input_bytes=0, output_bytes=2**26), "cuda", free=2**40)
    assert torch.empty(2**24, device="cuda").isnan().all().item()
