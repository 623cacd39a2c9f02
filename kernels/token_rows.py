"""What the two kinds of programs of `cache_write_triton.py` read of a token, in plain Triton.

Tensors of [lanes, tokens] hold one element a thread, the lane in dimension 0: of dimensions in
which nothing is contiguous the compiler lays the first along the lanes of a warp.
"""

import triton
import triton.language as tl


@triton.jit
def tokens_of_lanes(first_t, LANES: tl.constexpr, ROWS: tl.constexpr):
    """[LANES, ROWS] of first_t … first_t + ROWS - 1, each in all its lanes.

    By way of a remainder, or the compiler would see that they follow one another and lay them, not
    the lanes, along a warp.
    """
    return tl.reshape(first_t + tl.arange(0, LANES * ROWS) % ROWS, [LANES, ROWS])


@triton.jit
def read_place(positions_ptr, slots_ptr, token, num_tokens):
    """(position, slot); the slot is -1 beyond the last token."""
    exists = token < num_tokens
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    return position, tl.load(slots_ptr + token, mask=exists, other=-1)


@triton.jit
def is_slot(slot, num_slots):
    return (slot >= 0) & (slot < num_slots)


@triton.jit
def read_words(row, words, exists, IN_WORDS: tl.constexpr):
    """Pairs of bf16 in int32; `row` points to int32 if IN_WORDS, else to bf16 of any alignment.

    Pairs, because a loop that carries bf16 from one step to the next holds 16 bits a register, and
    waits for the load at the end of the step to part them.
    """
    if IN_WORDS:
        pairs = tl.load(row + words, mask=exists, other=0)
    else:
        low = tl.load(row + 2 * words, mask=exists, other=0.0).to(tl.int16, bitcast=True)
        high = tl.load(row + 2 * words + 1, mask=exists, other=0.0).to(tl.int16, bitcast=True)
        pairs = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return pairs


@triton.jit
def parts_of_pairs(pairs):
    """(first, second) of each pair, in fp32."""
    first, second = pairs << 16, pairs & -65536
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def quantize_in_fp32(y, inverse):
    """bf16 times `inverse`, a power of two in fp32, to e4m3, as `quantize_by` does: by way of fp32,
    for which the compiler's own way takes three instructions for two elements and this one two.
    `index_query` of few rows is 0.2 to 0.4 µs slower with it (H100)."""
    y = (y * inverse.to(tl.bfloat16)).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return y.to(tl.float32, bitcast=True).to(tl.float8e4nv)
