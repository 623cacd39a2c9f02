"""Exact selection of the largest entries of a list in shared memory, for kernels in Gluon.

A list has `2 · WORDS + BINS` words of shared memory (`shared_words`): values as fp32 bits from word
0, columns as int32 from word WORDS, the histogram behind them; its capacity is a little less than
WORDS because the counters stand at the end of the columns.

Values are compared as integers, `depth`: how far the value's key lies below that of the best.
A round of `select_entries` counts a digit of 10 bits of the depths in a histogram and finds the bin
that the last wanted entry is in; two rounds leave one entry there nearly always, and then the rest
of the bits need not be looked at. If equal values are left, rounds over the bits of their columns
follow: the lowest columns are taken, so that the set depends on nothing but the values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.row_slots import load_pages, store_slots
from dsa_bench.kernels.shared_words import (
    block_barrier,
    count_bits,
    count_bits_below,
    load_word,
    reserve,
    set_bit,
    store_word,
)

DIGIT_BITS = gl.constexpr(10)
BINS = gl.constexpr(1024)
SPARE_WORDS = gl.constexpr(64)
"""capacity = WORDS - SPARE_WORDS: a thread that finds room for its first entry writes all it has,
up to SLACK_WORDS; counters stand in the rest."""
SLACK_WORDS = gl.constexpr(32)
LISTED = gl.constexpr(0)
"""Counters behind the columns, by number: how many entries were appended."""
WRITTEN = gl.constexpr(1)
MAILBOX = gl.constexpr(4)
"""Three words in which one thread tells all others what it has found."""
TOP = gl.constexpr(0x7FFFFFFF)
LEAST_KEY = gl.constexpr(-(2**31))
LIST_UNROLL = gl.constexpr(4)
WINDOW_WORDS = gl.constexpr(4096)
"""Words of the bitmap that sorts columns: of 131072 columns at a time."""


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def sort_key(x):
    """fp32 -> int32 in the same order; NaN counts as -inf, -0 as +0."""
    bits = gl.where(x == x, x, -float("inf")).to(gl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return gl.where(key == -1, 0, key)


@gluon.jit
def unsigned(x):
    return gl.to_tensor(x).to(gl.uint32, bitcast=True)


@gluon.jit
def first_shift(span, LEAST: gl.constexpr):
    """Where the first digit begins, so that BINS bins hold all that is at most `span`."""
    exponent = (unsigned(span).to(gl.float32).to(gl.int32, bitcast=True) >> 23) - 127
    return gl.maximum(exponent - (DIGIT_BITS - 1), LEAST)


@gluon.constexpr_function
def count_asm(bins, words):
    return f"""{{ .reg .pred p, q; .reg .u32 a, d; mov.u32 a, global_smem;
        sub.u32 d, $1, $2; shr.u32 d, d, $3; setp.ne.s32 q, $4, 0;
        setp.lt.and.u32 p, d, {bins}, q; mad.lo.u32 a, d, 4, a;
        @p red.shared.add.u32 [a + {8 * words}], 1; mov.b32 $0, 0; }}"""


@gluon.jit
def count_digits(depth, low, shift, take, WORDS: gl.constexpr):
    """Count those of `depth` that lie in the BINS bins of 2^shift that begin at `low`.

    In one piece of assembly with its arithmetic: else the addresses of all elements are computed
    first and held in registers.
    """
    gl.inline_asm_elementwise(
        count_asm(BINS, WORDS),
        "=r,r,r,r,r,~{memory}",
        [depth, gl.to_tensor(low), gl.to_tensor(shift), take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def find_bin(bins, rank, WORDS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """(bin of the rank-th entry, entries before that bin, entries up to its end); leaves the
    histogram cleared."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    block_barrier()
    counts = bins.load(LAYOUT)
    bins.store(gl.zeros([BINS], gl.int32, LAYOUT))
    reached = gl.associative_scan(counts, 0, add)
    number = gl.arange(0, BINS, LAYOUT)
    is_bin = (reached >= rank) & (reached - counts < rank)
    found: gl.constexpr = 2 * WORDS - SLACK_WORDS + MAILBOX
    place = gl.full([BINS], found, gl.int32, LAYOUT)
    store_word(place, number, is_bin)
    store_word(place + 1, reached - counts, is_bin)
    store_word(place + 2, reached, is_bin)
    block_barrier()
    return load_word(found), load_word(found + 1), load_word(found + 2)


@gluon.jit
def list_slots(NUM_WARPS: gl.constexpr):
    """[threads, LIST_UNROLL] entries that the program reads at a time: neighbouring threads read
    neighbouring words."""
    TILE: gl.constexpr = gl.BlockedLayout([1, LIST_UNROLL], [32, 1], [NUM_WARPS, 1], [1, 0])
    thread = gl.arange(0, NUM_WARPS * 32, gl.SliceLayout(1, TILE))
    step = gl.arange(0, LIST_UNROLL, gl.SliceLayout(0, TILE))
    return thread[:, None] + step[None, :] * (NUM_WARPS * 32)


@gluon.constexpr_function
def entry_asm(words):
    return f"""{{ .reg .pred p; .reg .u32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;
        setp.ne.s32 p, $4, 0; @p st.shared.b32 [a], $2; @p st.shared.b32 [a + {4 * words}], $3;
        mov.b32 $0, 0; }}"""


@gluon.jit
def store_entry(place, x, column, take, WORDS: gl.constexpr):
    """Store value and column of the list's entry `place` where `take` is not 0."""
    gl.inline_asm_elementwise(
        entry_asm(WORDS),
        "=r,r,r,r,r,~{memory}",
        [place, x.to(gl.int32, bitcast=True), column, take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_keys(slot):
    return sort_key(load_word(slot).to(gl.float32, bitcast=True))


@gluon.jit
def reserve_each(counter, take):
    """A number of its own, counted from 0, for each element of [threads, elements] to take."""
    ones = take.to(gl.int32)
    first = reserve(counter, gl.sum(ones, 1))
    return first[:, None] + gl.associative_scan(ones, 1, add) - ones


@gluon.jit
def best_of_list(length, NUM_WARPS: gl.constexpr):
    """The largest key."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * LIST_UNROLL
    slots = list_slots(NUM_WARPS)
    key = gl.full_like(slots, LEAST_KEY)
    for begin in range(0, length, CHUNK):
        slot = begin + slots
        key = gl.maximum(key, gl.where(slot < length, load_keys(slot), LEAST_KEY))
    return gl.max(gl.max(key, 1), 0)


@gluon.jit
def select_entries(
    bins, length, least_key, best, span,
    TOPK: gl.constexpr, WORDS: gl.constexpr, LEAST_SHIFT: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """(last, tied, tied_shift) that `is_selected` wants, for a list of TOPK or more.

    No key is below `least_key` or above `best`, no column as large as `span`.
    """
    CHUNK: gl.constexpr = NUM_WARPS * 32 * LIST_UNROLL
    # what is read behind the columns is the histogram, and no further
    gl.static_assert((WORDS + CHUNK - 1) // CHUNK * CHUNK <= WORDS + BINS)
    slots = list_slots(NUM_WARPS)
    shift = first_shift(best - least_key, LEAST_SHIFT)
    low = 0
    last = -1
    tied = 0
    tied_shift = -1
    want = TOPK
    population = length
    while population != want:
        for begin in range(0, length, CHUNK):
            slot = begin + slots
            depth = best - load_keys(slot)
            exists = slot < length
            if tied_shift >= 0:
                exists = exists & ((unsigned(depth - tied) >> tied_shift) == 0)
                depth = load_word(WORDS + slot)
            count_digits(depth, low, shift, exists, WORDS)
        number, before, reached = find_bin(bins, want, WORDS, NUM_WARPS)
        population = reached - before
        want -= before
        low += number << shift
        last = low + (1 << shift) - 1
        if population != want:
            if (tied_shift < 0) & (shift <= LEAST_SHIFT):
                # equal values are left: go on with the bits of their columns
                tied = low
                tied_shift = shift
                low = 0
                shift = first_shift(span, 0)
            else:
                # a column that is listed twice, against the contract: leave it out, and end
                if (tied_shift >= 0) & (shift == 0):
                    population = want
                    last = low - 1
                shift = gl.maximum(shift - DIGIT_BITS, gl.where(tied_shift < 0, LEAST_SHIFT, 0))
    return last, tied, tied_shift


@gluon.jit
def is_selected(depth, column, last, tied, tied_shift):
    """Whether an entry is among the largest, or equals the least of them in a low enough column."""
    if tied_shift < 0:
        chosen = unsigned(depth) <= unsigned(last)
    else:
        equal = (unsigned(depth - tied) >> tied_shift) == 0
        chosen = (unsigned(depth) < unsigned(tied)) | (equal & (column <= last))
    return chosen


@gluon.jit
def write_columns(
    bins, length, out_ptr, base, limit, best, last, tied, tied_shift,
    WORDS: gl.constexpr, SORTED: gl.constexpr, NUM_WARPS: gl.constexpr, pages=None,
):  # fmt: skip
    """Write the selected columns, base <= column < base + limit, ascending if SORTED; with `pages`
    their slots too."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * LIST_UNROLL
    COUNTERS: gl.constexpr = 2 * WORDS - SLACK_WORDS
    slots = list_slots(NUM_WARPS)
    for begin in range(0, length, CHUNK):
        slot = begin + slots
        column = load_word(WORDS + slot)
        chosen = is_selected(best - load_keys(slot), column, last, tied, tied_shift)
        chosen = chosen & (slot < length)
        if SORTED:
            store_word(WORDS + slot, gl.where(chosen, column - base, -1), slot < length)
        else:
            # on their way while places are reserved
            page = load_pages(pages, column, chosen)
            place = reserve_each(COUNTERS + WRITTEN, chosen)
            gl.store(out_ptr + place, column, mask=chosen)
            store_slots(pages, place, column, page, chosen)
    if SORTED:
        _write_ascending(bins, length, out_ptr, base, limit, WORDS, NUM_WARPS, pages)


@gluon.jit
def _write_ascending(
    bins, length, out_ptr, base, limit, WORDS: gl.constexpr, NUM_WARPS: gl.constexpr, pages
):
    """Write the list's columns that are not -1: a bitmap in place of the values gives their ranks.

    Each thread reads the entries that it has marked itself.
    """
    CHUNK: gl.constexpr = NUM_WARPS * 32 * LIST_UNROLL
    THREADS: gl.constexpr = NUM_WARPS * 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // THREADS], [32], [NUM_WARPS], [0])
    slots = list_slots(NUM_WARPS)
    group = gl.arange(0, BINS, LAYOUT)
    written = 0
    for window in range(0, limit, WINDOW_WORDS * 32):
        block_barrier()
        for begin in range(0, WINDOW_WORDS, CHUNK):
            store_word(begin + slots, gl.zeros_like(slots), gl.full_like(slots, 1))
        block_barrier()
        for begin in range(0, length, CHUNK):
            slot = begin + slots
            bit = load_word(WORDS + slot) - window
            here = (slot < length) & (bit >= 0) & (bit < WINDOW_WORDS * 32)
            set_bit(gl.zeros_like(slots), gl.where(here, bit, 0), here)
        block_barrier()
        counts = count_bits(0, group)
        reached = gl.associative_scan(counts, 0, add)
        bins.store(written + reached - counts)
        written += gl.max(reached, 0)
        block_barrier()
        for begin in range(0, length, CHUNK):
            slot = begin + slots
            bit = load_word(WORDS + slot) - window
            here = (slot < length) & (bit >= 0) & (bit < WINDOW_WORDS * 32)
            bit = gl.where(here, bit, 0)
            column = base + window + bit
            page = load_pages(pages, column, here)
            place = load_word(2 * WORDS + (bit >> 7)) + count_bits_below(0, bit)
            gl.store(out_ptr + place, column, mask=here)
            store_slots(pages, place, column, page, here)
    # cleared, as the next row's histogram finds it
    block_barrier()
    bins.store(gl.zeros([BINS], gl.int32, LAYOUT))
