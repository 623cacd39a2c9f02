"""What sentences and labels call the operators that are compared, and the axes of a case."""

from collections.abc import Mapping
from typing import Any

from dsa_bench.contest import ATTENTION, CONTEST_OF, LAYER
from dsa_bench.record import AUTO_MODE, EQUAL_LENGTHS

OPERATORS = {
    "dsa": "DSA",
    "dsa_fp8": "DSA fp8 attention",
    "dense_attention": "dense",
    "dense_attention_fp8": "dense",
    "dsa_layer": "sparse layer",
    "masked_layer": "masked layer",
    "dense_layer": "dense layer",
}
DENSE = {ATTENTION.name: "dense attention", LAYER.name: "the dense layer"}
"""Contest -> the opponent, in a sentence."""
DENSE_BESIDE = {ATTENTION.name: "dense attention in FP8"}
"""Contest -> what is shown beside the opponent, in a sentence."""
SPARSE_BESIDE = {"dsa_fp8": "attention in FP8 too"}
"""Sparse operator that is shown beside the one of the headline -> what it has besides."""
UNSAID = {"lengths": EQUAL_LENGTHS}
"""Axis -> the value that goes without saying: another is named even where all cases have it."""
MAX_PARTS = 4
"""Stages of a composition that are all named."""


def contest_of(op: object) -> str:
    """Contest of an operator; of one that is in none, attention's."""
    return CONTEST_OF.get(str(op), ATTENTION.name)


def operator_text(op: object) -> str:
    """`DSA`, `sparse layer`; an operator that is in no contest has its own name."""
    return OPERATORS.get(str(op), str(op))


def sparse_text(op: object) -> str:
    """`DSA`, `the sparse layer`: the subject of a sentence."""
    name = operator_text(op)
    return f"the {name}" if contest_of(op) == LAYER.name else name


def impl_text(impl: str) -> str:
    """An implementation as people read it: of a long composition each name once, `torch+triton`."""
    parts = impl.split("+")
    return impl if len(parts) <= MAX_PARTS else "+".join(dict.fromkeys(parts))


def unusual(row: Mapping[str, Any]) -> list[str]:
    """The axes of a case whose value does not go without saying."""
    return [axis_text(axis, row[axis]) for axis, usual in UNSAID.items() if row[axis] != usual]


def axis_text(axis: str, value: Any) -> str:
    """What a label or a title says of the value of an axis; empty where there is none."""
    if value is None or value != value:
        return ""
    match axis:
        case "op":
            return operator_text(value)
        case "contest":
            return "layer" if value == LAYER.name else ""
        case "impl":
            return impl_text(str(value))
        case "topk":
            return f"k={value:.0f}"
        case "batch_size":
            return f"batch {value}"
        case "lengths":
            return f"{value} lengths"
        case "num_heads":
            return f"{value} heads"
        case "tensor_parallel":
            return f"tp {value}"
        case "chunk":
            queries = "query" if value == 1 else "queries"
            return f"{value} {queries}" if value else "whole prompts"
        case "inputs":
            return f"{value} inputs"
        case "weights":
            return f"weights {value}" if value else "random weights"
        case "seed":
            return f"seed {value}"
        case "asked_mode":
            return "default mode" if value == AUTO_MODE else str(value)
        case _:
            return str(value)
