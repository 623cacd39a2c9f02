"""A case: its key, which never changes, its later fields, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from dsa_bench.record import LATER_FIELDS, Case, split_weights
from dsa_bench.untrusted import Refused

CASE = Case(
    op="dsa", impl={"indexer": "triton", "topk": "gluon"}, phase="prefill", seq_len_kv=8192,
    seq_len_q=4096, topk=2048, precision="fp8",
)  # fmt: skip
LATER: dict[str, Any] = {
    "mode": "warm", "tensor_parallel": 8, "inputs": "needle", "weights": "w.safetensors:3",
    "lengths": "one-long",
}  # fmt: skip


def test_a_key_is_what_it_was_before_a_field_came() -> None:
    assert CASE.key == "30c9291447339cc0"
    assert replace(CASE, mode="warm").key == "dbca1636211d6bef"
    assert set(LATER_FIELDS) == set(LATER)


def test_every_later_field_counts_where_it_is_not_at_its_default() -> None:
    changed = [replace(CASE, **{name: value}) for name, value in LATER.items()]
    assert len({case.key for case in (CASE, *changed)}) == 1 + len(LATER)
    for case in changed:
        assert Case.from_json(case.to_json()) == case


def test_a_case_of_an_older_version_has_the_defaults() -> None:
    old = {name: value for name, value in CASE.to_json().items() if name not in LATER}
    assert Case.from_json(old) == CASE


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("tensor_parallel", 0, "case.tensor_parallel must be from 1"),
        ("tensor_parallel", 3, "case.tensor_parallel must divide the 128 heads, got 3"),
        ("tensor_parallel", "2", "case.tensor_parallel must be a whole number"),
        ("inputs", None, "case.inputs must be a text"),
        ("inputs", "x" * 4097, "case.inputs must have at most 4096 characters"),
        ("weights", "x" * 4097, "case.weights must have at most 4096 characters"),
        ("lengths", 3, "case.lengths must be a text"),
        ("lengths", "x" * 101, "case.lengths must have at most 100 characters"),
    ],
)
def test_a_wrong_later_field_is_refused(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Case.from_json(CASE.to_json() | {field: value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w.safetensors", ("w.safetensors", None)),
        ("a/w.safetensors:12", ("a/w.safetensors", 12)),
        ("a:b/w.safetensors", ("a:b/w.safetensors", None)),
        ("w.safetensors:", ("w.safetensors:", None)),
        ("w.safetensors:-1", ("w.safetensors:-1", None)),
        (":3", (":3", None)),
    ],
)
def test_split_weights(text: str, expected: tuple[str, int | None]) -> None:
    assert split_weights(text) == expected
