"""Passes over one row of logits in global memory, for exact selection: a threshold from a sample,
the entries that reach it, and the exact way for rows that no threshold divides. In Gluon.

Positions of a row count from the last 16-byte boundary before its range, so that loads of 16 bytes
stay aligned whatever the stride and start: the range is [first, limit), and position p is column
base + p. A chunk is what the program loads at a time: ELEMENTS logits a thread, in vectors of 16
bytes. Chunks that reach over an end of the range are loaded element by element.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.radix_select import (
    DIGIT_BITS,
    LEAST_KEY,
    LISTED,
    SLACK_WORDS,
    SPARE_WORDS,
    TOP,
    add,
    best_of_list,
    count_digits,
    find_bin,
    select_entries,
    sort_key,
    store_entry,
    unsigned,
    write_columns,
)
from dsa_bench.kernels.row_slots import load_pages, store_slots
from dsa_bench.kernels.shared_words import block_barrier, load_word, reserve, store_word

FIRST_SHIFT = gl.constexpr(22)
"""Of 32-bit keys: their highest 10 bits."""
SAMPLE_SHIFT = gl.constexpr(12)
"""Bits of a key that a threshold leaves out: it is right to 2^-11 of its value."""
MINUS_INFINITY_DEPTH = gl.constexpr(0xFF800000)
"""Of -inf and NaN, as an unsigned number."""


@gluon.jit
def locate_row(
    logits_ptr, kv_start_ptr, kv_end_ptr, row, num_cols, stride_row, VECTOR: gl.constexpr
):
    """`locate_columns` of the row's range."""
    start = gl.minimum(gl.maximum(gl.load(kv_start_ptr + row), 0), num_cols)
    end = gl.maximum(gl.minimum(gl.load(kv_end_ptr + row), num_cols), start)
    return locate_columns(logits_ptr, row, start, end, stride_row, VECTOR)


@gluon.jit
def locate_columns(logits_ptr, row, start, end, stride_row, VECTOR: gl.constexpr):
    """(pointer of position 0, column of position 0, first, limit)."""
    address = row.to(gl.int64) * stride_row + start
    aligned = address // VECTOR * VECTOR
    first = (address - aligned).to(gl.int32)
    return logits_ptr + aligned, start - first, first, first + end - start


@gluon.jit
def depth_of(x):
    """How far the key of x lies below the highest one: as an unsigned number, 0 is the best."""
    return sort_key(x) ^ TOP


@gluon.jit
def value_of_depth(depth):
    key = gl.to_tensor(depth) ^ TOP
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)


@gluon.jit
def chunk_offsets(VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """[threads, elements of a thread] offsets of a chunk: vectors of a warp follow each other."""
    TILE: gl.constexpr = gl.BlockedLayout([1, ELEMENTS], [32, 1], [NUM_WARPS, 1], [1, 0])
    thread = gl.arange(0, NUM_WARPS * 32, gl.SliceLayout(1, TILE))
    element = gl.arange(0, ELEMENTS, gl.SliceLayout(0, TILE))
    across = element // VECTOR * (NUM_WARPS * 32 * VECTOR) + element % VECTOR
    return thread[:, None] * VECTOR + across[None, :]


@gluon.jit
def load_chunk(row_ptr, begin, offs, first, limit, CHUNK: gl.constexpr):
    """The chunk in fp32, NaN outside of the range. Without a mask a thread loads 16 bytes."""
    if (begin >= first) & (begin + CHUNK <= limit):
        x = gl.load(row_ptr + begin + offs).to(gl.float32)
    else:
        inside = (begin + offs >= first) & (begin + offs < limit)
        x = gl.load(row_ptr + begin + offs, mask=inside, other=float("nan")).to(gl.float32)
    return x


@gluon.jit
def loaded_together(x, WORDS: gl.constexpr):
    """x, used by no instruction before all of it is on its way.

    Of a sample, ptxas would load 16 bytes, wait for them and turn them into keys, then load the
    next. So the keys depend on a word that is read behind a barrier, which no load passes: a
    cleared counter, 0.
    """
    block_barrier()
    zero = load_word(2 * WORDS - SLACK_WORDS + LISTED)
    return (x.to(gl.int32, bitcast=True) | zero).to(gl.float32, bitcast=True)


@gluon.jit
def load_sample(
    row_ptr, limit, SAMPLE: gl.constexpr, VECTOR: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """SAMPLE logits, evenly spread over the row.

    Vectors without masks: `first` is less than VECTOR, and the row much longer. A row too short for
    so many gives its last vector repeatedly.
    """
    # else lanes would have the same vectors, and count them twice
    gl.static_assert(SAMPLE >= NUM_WARPS * 32 * VECTOR)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32, 1], [NUM_WARPS, 1], [1, 0])
    vector = gl.arange(0, SAMPLE // VECTOR, gl.SliceLayout(1, LAYOUT))
    lane = gl.arange(0, VECTOR, gl.SliceLayout(0, LAYOUT))
    last = limit // VECTOR - 1
    step = gl.maximum((last - 1) // (SAMPLE // VECTOR), 1)
    begin = gl.minimum(1 + vector * step, last) * VECTOR
    return gl.load(row_ptr + begin[:, None] + lane[None, :])


@gluon.jit
def _all_of(x, is_valid):
    if is_valid is None:
        is_valid = gl.full_like(x, 1) == 1
    return is_valid


@gluon.jit
def count_sample(sample, WORDS: gl.constexpr, is_valid=None):
    """The depths of a sample, whose first digits are counted (of what is valid; None: all is): it
    has arrived when this ends.

    Behind it the row may be asked for: loads before it would stand in its way, and all that follows
    waits for it (128 rows of 32768: 2 µs later with 16 logits a thread on their way).
    """
    depths = depth_of(loaded_together(sample.to(gl.float32), WORDS))
    count_digits(depths, 0, FIRST_SHIFT, _all_of(depths, is_valid), WORDS)
    block_barrier()
    return depths


@gluon.jit
def choose_threshold(
    bins, depths, share,
    TOPK: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr, NUM_WARPS: gl.constexpr,
    is_valid=None,
):  # fmt: skip
    """(depth, 1): TOPK … CAPACITY logits of the row probably have at most this depth; (.., 0): no
    threshold is likely to divide the row so. `depths` is what `count_sample` gave, of a sample that
    is this share of the row; the depth is right to 20 bits.

    The rank in the sample is 4.25 σ above what TOPK alone would have, so that one row in 10^5 lists
    too few, but no nearer to what overflows the list than to TOPK, in σ of each.
    """
    expected = gl.to_tensor(TOPK * share).to(gl.float32)
    most = CAPACITY * share
    rank = gl.minimum(expected + 4.25 * gl.sqrt(expected) + 1.0, gl.sqrt(expected * most))
    rank = gl.maximum(rank.to(gl.int32), 1)
    number, above, up_to = find_bin(bins, rank, WORDS, NUM_WARPS)
    low = number << FIRST_SHIFT
    count_digits(depths, low, SAMPLE_SHIFT, _all_of(depths, is_valid), WORDS)
    number, before, reached = find_bin(bins, rank - above, WORDS, NUM_WARPS)
    depth = low + (number << SAMPLE_SHIFT) + (1 << SAMPLE_SHIFT) - 1
    up_to = above + reached
    above += before
    is_likely = 1
    if up_to.to(gl.float32) > most + 1.0:
        # more equal values than the list holds: leave them out if enough are above them
        depth -= 1 << SAMPLE_SHIFT
        is_likely = (above.to(gl.float32) >= expected + 1.0).to(gl.int32)
    # a comparison with -inf would miss NaN
    return depth, is_likely & (unsigned(depth) < MINUS_INFINITY_DEPTH).to(gl.int32)


@gluon.jit
def append_entries(
    x, column, take, values_ptr, columns_ptr,
    TO_GLOBAL: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Append the elements to take to the list, or to one in global memory, with room for CAPACITY
    and SLACK_WORDS more; beyond CAPACITY they are only counted."""
    ones = take.to(gl.int32)
    place = reserve(2 * WORDS - SLACK_WORDS + LISTED, gl.sum(ones, 1))
    take = take & (place < CAPACITY)[:, None]
    place = place[:, None] + gl.associative_scan(ones, 1, add) - ones
    if TO_GLOBAL:
        gl.store(values_ptr + place, x, mask=take)
        gl.store(columns_ptr + place, column, mask=take)
    else:
        store_entry(place, x, column, take, WORDS)


@gluon.jit
def append_above(
    x, row_ptr, base, first, limit, begin_chunk, end_chunk, threshold, values_ptr, columns_ptr,
    TO_GLOBAL: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr,
    VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Append what has at most the depth `threshold`, which is above -inf; x is the first chunk.

    Floats are compared, not depths: one instruction an element. The next chunk is on its way while
    one is looked at (two: no faster).
    """
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
    limit = gl.minimum(limit, end_chunk * CHUNK)
    least = value_of_depth(threshold)
    for i in range(begin_chunk, end_chunk):
        following = load_chunk(row_ptr, (i + 1) * CHUNK, offs, first, limit, CHUNK)
        column = base + i * CHUNK + offs
        append_entries(x, column, x >= least, values_ptr, columns_ptr, TO_GLOBAL, CAPACITY, WORDS)
        x = following


@gluon.jit
def list_row(
    bins, row_ptr, base, first, limit,
    TOPK: gl.constexpr, SAMPLE: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr,
    VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """`choose_threshold` of the row, and if one is likely, what reaches it in the list."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    sample = load_sample(row_ptr, limit, SAMPLE, VECTOR, NUM_WARPS)
    depths = count_sample(sample, WORDS)
    share = SAMPLE / (limit - first).to(gl.float32)
    threshold, is_likely = choose_threshold(bins, depths, share, TOPK, CAPACITY, WORDS, NUM_WARPS)
    if is_likely == 1:
        offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
        x = load_chunk(row_ptr, 0, offs, first, limit, CHUNK)
        append_above(
            x, row_ptr, base, first, limit, 0, (limit + CHUNK - 1) // CHUNK, threshold,
            row_ptr, row_ptr, False, CAPACITY, WORDS, VECTOR, ELEMENTS, NUM_WARPS,
        )  # fmt: skip
    return threshold, is_likely


@gluon.jit
def append_any(
    row_ptr, base, first, limit, threshold,
    CAPACITY: gl.constexpr, WORDS: gl.constexpr, VECTOR: gl.constexpr, ELEMENTS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Append what has at most the depth `threshold`, be it NaN."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
    for begin in range(0, (limit + CHUNK - 1) // CHUNK * CHUNK, CHUNK):
        x = load_chunk(row_ptr, begin, offs, first, limit, CHUNK)
        inside = (begin + offs >= first) & (begin + offs < limit)
        take = inside & (unsigned(depth_of(x)) <= unsigned(threshold))
        append_entries(x, base + begin + offs, take, row_ptr, row_ptr, False, CAPACITY, WORDS)


@gluon.jit
def list_whole(
    row_ptr, base, first, limit,
    WORDS: gl.constexpr, VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """List all of a row that fits, each logit at the place that its position gives; the largest
    key."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
    best = gl.full_like(offs, LEAST_KEY)
    for begin in range(0, (limit + CHUNK - 1) // CHUNK * CHUNK, CHUNK):
        x = load_chunk(row_ptr, begin, offs, first, limit, CHUNK)
        position = begin + offs
        inside = (position >= first) & (position < limit)
        store_entry(position - first, x, base + position, inside, WORDS)
        best = gl.maximum(best, gl.where(inside, sort_key(x), LEAST_KEY))
    best = gl.max(gl.max(best, 1), 0)
    block_barrier()
    return best


@gluon.jit
def clear_counters(WORDS: gl.constexpr):
    """Of the list and of what is written."""
    block_barrier()
    counters = 2 * WORDS - SLACK_WORDS
    for i in gl.static_range(2):
        store_word(gl.to_tensor(counters + i), gl.to_tensor(0), gl.to_tensor(1))
    block_barrier()


@gluon.jit
def list_length(WORDS: gl.constexpr):
    block_barrier()
    return load_word(2 * WORDS - SLACK_WORDS + LISTED)


@gluon.jit
def divide_row(
    bins, row_ptr, first, limit,
    TOPK: gl.constexpr, CAPACITY: gl.constexpr, WORDS: gl.constexpr, LEAST_SHIFT: gl.constexpr,
    VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """(low, last, want, fits): digit by digit, a pass over the row for each, until the logits of
    at most the depth `last` fit into a list, or (fits = 0) until those of `low` … `last` are equal:
    `want` of them are wanted, and all above them."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
    low = 0
    last = 0
    want = TOPK
    shift = gl.to_tensor(FIRST_SHIFT)
    fits = 0
    is_done = 0
    while is_done == 0:
        for begin in range(0, (limit + CHUNK - 1) // CHUNK * CHUNK, CHUNK):
            x = load_chunk(row_ptr, begin, offs, first, limit, CHUNK)
            inside = (begin + offs >= first) & (begin + offs < limit)
            count_digits(depth_of(x), low, shift, inside, WORDS)
        number, before, reached = find_bin(bins, want, WORDS, NUM_WARPS)
        low += number << shift
        last = low + (1 << shift) - 1
        fits = (TOPK - want + reached <= CAPACITY).to(gl.int32)
        want -= before
        is_done = fits | (shift <= LEAST_SHIFT).to(gl.int32)
        shift = gl.maximum(shift - DIGIT_BITS, LEAST_SHIFT)
    return low, last, want, fits


@gluon.jit
def write_with_ties(
    row_ptr, base, first, limit, low, last, want, out_ptr, VECTOR: gl.constexpr,
    NUM_WARPS: gl.constexpr, pages=None,
):  # fmt: skip
    """Write, in the order of columns, all above depth `low` and the first `want` of `low` … `last`,
    which are equal."""
    CHUNK: gl.constexpr = NUM_WARPS * 32 * VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([VECTOR], [32], [NUM_WARPS], [0])
    offs = gl.arange(0, CHUNK, LAYOUT)
    num_above = 0
    num_equal = 0
    for begin in range(0, limit, CHUNK):
        inside = (begin + offs >= first) & (begin + offs < limit)
        depth = depth_of(gl.load(row_ptr + begin + offs, mask=inside, other=0.0).to(gl.float32))
        is_above = inside & (unsigned(depth) < unsigned(low))
        is_equal = inside & (unsigned(depth) <= unsigned(last)) & (is_above == 0)
        # both counts in one number: a chunk has no more than 2^13 elements
        ones = is_above.to(gl.int32) + (is_equal.to(gl.int32) << 16)
        reached = gl.associative_scan(ones, 0, add)
        before = reached - ones
        tie = num_equal + (before >> 16)
        place = num_above + (before & 0xFFFF) + gl.minimum(tie, want)
        chosen = is_above | (is_equal & (tie < want))
        column = base + begin + offs
        gl.store(out_ptr + place, column, mask=chosen)
        store_slots(pages, place, column, load_pages(pages, column, chosen), chosen)
        total = gl.max(reached, 0)
        num_above += total & 0xFFFF
        num_equal += total >> 16


@gluon.jit
def finish_row(
    bins, is_listed, length, least_key, best, row_ptr, base, first, limit, out_ptr,
    TOPK: gl.constexpr, WORDS: gl.constexpr, SORTED: gl.constexpr, LEAST_SHIFT: gl.constexpr,
    VECTOR: gl.constexpr, ELEMENTS: gl.constexpr, NUM_WARPS: gl.constexpr, pages=None,
):  # fmt: skip
    """Write the TOPK columns: from the list of `length` entries, or, where there is none, from the
    row itself; with `pages` their slots too."""
    CAPACITY: gl.constexpr = WORDS - SPARE_WORDS
    low = 0
    last = -1
    want = 0
    clear_counters(WORDS)
    if is_listed == 0:
        fits = 1
        length = limit - first
        least_key = LEAST_KEY
        if length <= CAPACITY:
            best = list_whole(row_ptr, base, first, limit, WORDS, VECTOR, ELEMENTS, NUM_WARPS)
        else:
            low, last, want, fits = divide_row(
                bins, row_ptr, first, limit,
                TOPK, CAPACITY, WORDS, LEAST_SHIFT, VECTOR, ELEMENTS, NUM_WARPS,
            )  # fmt: skip
            if fits == 1:
                append_any(
                    row_ptr, base, first, limit, last, CAPACITY, WORDS, VECTOR, ELEMENTS, NUM_WARPS
                )
                length = list_length(WORDS)
                least_key = last ^ TOP
                best = best_of_list(length, NUM_WARPS)
        is_listed = fits
    if is_listed == 1:
        last, tied, tied_shift = select_entries(
            bins, length, least_key, best, base + limit, TOPK, WORDS, LEAST_SHIFT, NUM_WARPS
        )
        write_columns(
            bins, length, out_ptr, base, limit, best, last, tied, tied_shift,
            WORDS, SORTED, NUM_WARPS, pages,
        )  # fmt: skip
    else:
        write_with_ties(
            row_ptr, base, first, limit, low, last, want, out_ptr, VECTOR, NUM_WARPS, pages
        )


@gluon.jit
def write_all(start, length, out_ptr, TOPK: gl.constexpr, NUM_WARPS: gl.constexpr, pages=None):
    """A row of no more than TOPK columns: all of them, then -1; with `pages` their slots too."""
    THREADS: gl.constexpr = NUM_WARPS * 32
    slot = gl.arange(0, THREADS, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    for begin in range(0, TOPK, THREADS):
        entry = begin + slot
        exists = entry < TOPK
        column = gl.where(entry < length, start + entry, -1)
        gl.store(out_ptr + entry, column, mask=exists)
        store_slots(pages, entry, column, load_pages(pages, column, exists), exists)
