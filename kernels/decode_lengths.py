"""How long the sequences of a decode batch are: the axis `lengths`.

L tokens has the longest of B sequences, seq_len_q new ones counted in:

    equal     each has L
    spread    ⌈L · i / B⌉ for i = 1 … B, shuffled: no length prevails
    one-long  one of the middle half of the batch has L, the others ⌈L / 32⌉: the tail of a batch in
              which whoever shares out work by sequences waits for the one

but none fewer than seq_len_q. Order and place are drawn by a seed of their own, alike for every
seed of the inputs: whoever plans a step from its lengths, as engines and CUDA graphs do, keeps the
plan when the contents change.
"""

import random
from typing import Protocol

from dsa_bench.operator import Unsupported
from dsa_bench.record import EQUAL_LENGTHS, LENGTH_KINDS

SHORT_SHARE = 32
"""L over the length of the short ones of `one-long`."""
SEED = 4
"""One of those that leave 4 and 8 sequences in neither order."""


class DecodeBatch(Protocol):
    """A case, or the shape of an operator."""

    @property
    def lengths(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seq_len_kv(self) -> int: ...
    @property
    def seq_len_q(self) -> int: ...


def expect_lengths(batch: DecodeBatch) -> None:
    """Raise Unsupported for what is no kind, or is the same as equal lengths."""
    kind = batch.lengths
    if kind not in LENGTH_KINDS:
        raise Unsupported(f"lengths are {', '.join(LENGTH_KINDS)}, not {kind!r} (change --lengths)")
    if kind != EQUAL_LENGTHS and batch.batch_size < 2:
        raise Unsupported(
            f"lengths {kind} need a batch of 2 sequences or more, this case has {batch.batch_size}"
            f" (pass --batch, or --lengths {EQUAL_LENGTHS})"
        )


def decode_lengths(batch: DecodeBatch) -> tuple[int, ...]:
    """Tokens of each sequence, in the order of the batch."""
    size, longest = batch.batch_size, batch.seq_len_kv
    # random() alone gives the same numbers in every version of Python
    draw = random.Random(SEED).random
    if batch.lengths == "spread":
        counts = [-(-longest * (i + 1) // size) for i in range(size)]
        counts.sort(key=lambda _: draw())
    elif batch.lengths == "one-long":
        counts = [-(-longest // SHORT_SHARE)] * size
        quarter = size // 4
        counts[quarter + int(draw() * (size - 2 * quarter))] = longest
    else:
        counts = [longest] * size
    return tuple(max(count, batch.seq_len_q) for count in counts)


def longest_sequence(batch: DecodeBatch) -> tuple[int, ...]:
    """Its number in the batch, for `Operator.always_checked`; none where all are alike."""
    lengths = decode_lengths(batch)
    return (lengths.index(max(lengths)),) if batch.lengths != EQUAL_LENGTHS else ()


def pages_of(lengths: tuple[int, ...], page_size: int) -> tuple[int, ...]:
    """Pages that each sequence takes."""
    return tuple(-(-length // page_size) for length in lengths)
