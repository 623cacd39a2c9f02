"""Which operators compute the same thing, sparse and dense, and so compete with each other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """Sparse operators, and the dense one that they are to beat."""

    name: str
    sparse: tuple[str, ...]
    """The first is the one that is spoken of where one stands for all."""
    dense: str
    beside: tuple[str, ...] = ()
    """Dense operators that are shown too, in other numbers than `dense` and so less exact: no
    headline counts on them. A run that names no operators takes them where a precision of theirs is
    asked for."""

    @property
    def operators(self) -> tuple[str, ...]:
        return (*self.sparse, self.dense, *self.beside)


ATTENTION = Contest(
    name="attention", sparse=("dsa",), dense="dense_attention", beside=("dense_attention_fp8",)
)
LAYER = Contest(name="layer", sparse=("dsa_layer", "masked_layer"), dense="dense_layer")
"""From hidden state to output; `masked_layer` is the MHA form, for prefill alone."""
CONTESTS = (ATTENTION, LAYER)
CONTEST_OF = {op: contest.name for contest in CONTESTS for op in contest.operators}
"""Operator -> name of its contest; operators that are parts of others are in none."""
SPARSE = frozenset(op for contest in CONTESTS for op in contest.sparse)
DENSE = frozenset(contest.dense for contest in CONTESTS)
BESIDE = frozenset(op for contest in CONTESTS for op in contest.beside)
