"""Which operators compute the same thing, sparse and dense, and so compete with each other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """Sparse operators, and the dense one that they are to beat."""

    name: str
    sparse: tuple[str, ...]
    """The first is the one that is spoken of where one stands for all."""
    dense: str
    sparse_beside: tuple[str, ...] = ()
    """Sparse operators that are shown too, in other numbers than `sparse` and so less exact: each
    is held against `dense`, and no headline counts on it."""
    dense_beside: tuple[str, ...] = ()
    """Dense operators likewise: no speed-up is over them but one that is told apart."""

    @property
    def beside(self) -> tuple[str, ...]:
        """A run that names no operators takes these where a precision of theirs is asked for."""
        return (*self.sparse_beside, *self.dense_beside)

    @property
    def operators(self) -> tuple[str, ...]:
        return (*self.sparse, self.dense, *self.beside)


ATTENTION = Contest(
    name="attention",
    sparse=("dsa",),
    dense="dense_attention",
    sparse_beside=("dsa_fp8",),
    dense_beside=("dense_attention_fp8",),
)
LAYER = Contest(name="layer", sparse=("dsa_layer", "masked_layer"), dense="dense_layer")
"""From hidden state to output; `masked_layer` is the MHA form, for prefill alone."""
CONTESTS = (ATTENTION, LAYER)
CONTEST_OF = {op: contest.name for contest in CONTESTS for op in contest.operators}
"""Operator -> name of its contest; operators that are parts of others are in none."""
SPARSE_BESIDE = frozenset(op for contest in CONTESTS for op in contest.sparse_beside)
DENSE_BESIDE = frozenset(op for contest in CONTESTS for op in contest.dense_beside)
BESIDE = SPARSE_BESIDE | DENSE_BESIDE
SPARSE = frozenset(op for contest in CONTESTS for op in contest.sparse) | SPARSE_BESIDE
"""Whatever has a speed-up over dense."""
DENSE = frozenset(contest.dense for contest in CONTESTS)
"""Opponents, over whose fastest that speed-up is."""
