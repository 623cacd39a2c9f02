"""Exact top-k in one pass over each row, in Gluon with shared-memory atomics.

One program: one row. (1) A sample of 4096 or 8192 logits gives a threshold that about topk + 4σ
logits of the row reach. (2) One pass over the row appends every logit that reaches it to a list
in shared memory. (3) The exact k-th largest of the list is found bit by bit, and the columns are
written. If the list came out too short or too long, the threshold is moved and the pass repeated;
rows that no threshold can divide (thousands of equal values) end in an exact search that streams
the row 32 times. So the usual row is read once; 4096 × 131072 take 1.15 ms on an H100, 62 % of
what reading them once allows.

The list's atomics are inline assembly on the PTX symbol of dynamic shared memory, which Gluon 3.6
has no words for; the buffer is the first and largest allocation and so lies at offset 0. Supports
topk up to 3584, any row length and stride; 16-byte loads need a row stride that is a multiple of
16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.topk import TopkInputs, TopkOutputs, TopkShape
from dsa_bench.operator import Implementation, Machine

IMPLEMENTS = "topk"
MAX_TOPK = 3584
"""The list must hold topk and the spread of a threshold: topk + 4 √topk + 2 < CAPACITY."""

# triton 3.7 renamed it
block_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

CAPACITY = gl.constexpr(4064)
"""Entries of the list. Shared memory, in words: 4064 values, 3 counters (list, greater, equal),
4096: columns."""
MAX_TRIES = gl.constexpr(6)
INT_MIN = gl.constexpr(-(2**31))
MINUS_INFINITY_KEY = gl.constexpr(-(2**31) + 0x7FFFFF)
"""`_sort_key` of -inf."""
GREATER_COUNTER = gl.constexpr(16260)
EQUAL_COUNTER = gl.constexpr(16264)
"""Byte offsets of the counters."""
VECTOR_ELEMENTS = gl.constexpr(4)
VECTORS_A_THREAD = gl.constexpr(2)


@gluon.jit
def _sort_key(x):
    """fp32 -> int32 in the same order; NaN counts as -inf, -0 as +0."""
    bits = gl.where(x == x, x, -float("inf")).to(gl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return gl.where(key == -1, 0, key)


@gluon.jit
def _value_of_key(key):
    """The inverse of `_sort_key`."""
    key = gl.to_tensor(key)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)


@gluon.jit
def _append(value, column, take):
    """Append (value, column) to the list where `take` is not 0; beyond its capacity only count."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .u32 a, n;
        setp.ne.s32 p, $3, 0; mov.u32 a, global_smem; mov.u32 n, 4064;
        @p atom.shared.add.u32 n, [a + 16256], 1;
        setp.lt.u32 q, n, 4064; shl.b32 n, n, 2; add.u32 a, a, n;
        @q st.shared.b32 [a], $1; @q st.shared.b32 [a + 16384], $2; mov.b32 $0, 0; }""",
        "=r,r,r,r,~{memory}",
        [value.to(gl.int32, bitcast=True), column, take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def claim_asm(counter):
    return f"""{{ .reg .pred p; .reg .u32 a;
        setp.ne.s32 p, $1, 0; mov.u32 a, global_smem; mov.b32 $0, -1;
        @p atom.shared.add.u32 $0, [a + {counter}], 1; }}"""


@gluon.jit
def _claim(COUNTER: gl.constexpr, take):
    """A number of its own, counted from 0, for each element where `take` is not 0; -1 elsewhere."""
    return gl.inline_asm_elementwise(
        claim_asm(COUNTER),
        "=&r,r,~{memory}",
        [take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _list_length():
    return gl.inline_asm_elementwise(
        "{ .reg .u32 a; mov.u32 a, global_smem; ld.volatile.shared.u32 $0, [a + 16256]; }",
        "=r,~{memory}",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _clear(memory, zeros):
    block_barrier()
    memory.store(zeros)
    block_barrier()


@gluon.jit
def _kth_key(key, k):
    """k-th largest of `key`; positions that do not count hold INT_MIN."""
    found = INT_MIN
    count = 0
    bit = 31
    while (bit >= 0) & (count != k):
        candidate = 0
        if bit != 31:
            candidate = found + (1 << bit)
        reached = gl.sum((key >= candidate).to(gl.int32), 0)
        if reached >= k:
            found = candidate
            count = reached
        bit -= 1
    return found


@gluon.jit
def _sample_keys(row_ptr, limit, SAMPLE: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Keys of SAMPLE logits, vectors of 4 evenly spread over [4, limit); a short row gives its
    last vector repeatedly.

    Without masks, so that a thread loads 16 bytes: the caller knows that first < 4 and limit >
    CAPACITY.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR_ELEMENTS], [32, 1], [NUM_WARPS, 1], [1, 0])
    vector = gl.arange(0, SAMPLE // VECTOR_ELEMENTS, gl.SliceLayout(1, LAYOUT))
    lane = gl.arange(0, VECTOR_ELEMENTS, gl.SliceLayout(0, LAYOUT))
    last = limit // VECTOR_ELEMENTS - 1
    step = gl.maximum((last - 1) // (SAMPLE // VECTOR_ELEMENTS), 1)
    begin = gl.minimum(1 + vector * step, last) * VECTOR_ELEMENTS
    x = gl.load(row_ptr + begin[:, None] + lane[None, :])
    return gl.reshape(_sort_key(x), [SAMPLE])


@gluon.jit
def _append_edge(row_ptr, offs, base, first, limit, threshold, take_all):
    """A chunk that may reach over the range's ends."""
    inside = (offs >= first) & (offs < limit)
    x = gl.load(row_ptr + offs, mask=inside, other=-float("inf"))
    _append(x, base + offs, inside & ((x >= threshold) | (take_all != 0)))


@gluon.jit
def _append_row(
    row_ptr, base, first, limit, threshold, take_all, CHUNK: gl.constexpr, LAYOUT: gl.constexpr
):
    """One pass: append what reaches the threshold. Only inner chunks go without a mask, and so by
    16 bytes."""
    offs = gl.arange(0, CHUNK, LAYOUT)
    _append_edge(row_ptr, offs, base, first, limit, threshold, take_all)
    inner_end = limit // CHUNK * CHUNK
    for begin in range(CHUNK, inner_end, CHUNK):
        x = gl.load(row_ptr + begin + offs)
        _append(x, base + begin + offs, x >= threshold)
    if (inner_end < limit) & (inner_end >= CHUNK):
        _append_edge(row_ptr, inner_end + offs, base, first, limit, threshold, take_all)


@gluon.jit
def _write_list(memory, length, out_ptr, TOPK: gl.constexpr, LAYOUT: gl.constexpr):
    """The TOPK largest entries of the list -> columns, in no order."""
    slot = gl.arange(0, 4096, LAYOUT)
    exists = slot < length
    value = memory.slice(0, 4096).load(LAYOUT).to(gl.float32, bitcast=True)
    key = gl.where(exists, _sort_key(value), INT_MIN)
    kth = _kth_key(key, TOPK)
    column = memory.slice(4096, 4096).load(LAYOUT)
    is_greater = exists & (key > kth)
    num_greater = gl.sum(is_greater.to(gl.int32), 0)
    gl.store(out_ptr + _claim(GREATER_COUNTER, is_greater), column, mask=is_greater)
    is_equal = exists & (key == kth)
    tie = _claim(EQUAL_COUNTER, is_equal)
    gl.store(out_ptr + num_greater + tie, column, mask=is_equal & (tie < TOPK - num_greater))


@gluon.jit
def _search_row(
    memory,
    zeros,
    row_ptr,
    base,
    first,
    limit,
    out_ptr,
    TOPK: gl.constexpr,
    CHUNK: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The exact way for rows that no threshold divides: the k-th key bit by bit, a pass over the
    row for each bit."""
    offs = gl.arange(0, CHUNK, LAYOUT)
    kth = INT_MIN
    bit = 31
    while bit >= 0:
        candidate = 0
        if bit != 31:
            candidate = kth + (1 << bit)
        count = gl.zeros([CHUNK], gl.int32, LAYOUT)
        for begin in range(0, limit, CHUNK):
            inside = (begin + offs >= first) & (begin + offs < limit)
            x = gl.load(row_ptr + begin + offs, mask=inside, other=0.0)
            count += (inside & (_sort_key(x) >= candidate)).to(gl.int32)
        if gl.sum(count, 0) >= TOPK:
            kth = candidate
        bit -= 1
    count = gl.zeros([CHUNK], gl.int32, LAYOUT)
    for begin in range(0, limit, CHUNK):
        inside = (begin + offs >= first) & (begin + offs < limit)
        x = gl.load(row_ptr + begin + offs, mask=inside, other=0.0)
        count += (inside & (_sort_key(x) > kth)).to(gl.int32)
    num_greater = gl.sum(count, 0)
    _clear(memory, zeros)
    for begin in range(0, limit, CHUNK):
        inside = (begin + offs >= first) & (begin + offs < limit)
        key = _sort_key(gl.load(row_ptr + begin + offs, mask=inside, other=0.0))
        is_greater = inside & (key > kth)
        is_equal = inside & (key == kth)
        place = _claim(GREATER_COUNTER, is_greater)
        tie = _claim(EQUAL_COUNTER, is_equal)
        column = base + begin + offs
        gl.store(out_ptr + place, column, mask=is_greater)
        gl.store(out_ptr + num_greater + tie, column, mask=is_equal & (tie < TOPK - num_greater))


@gluon.jit
def _topk_kernel(
    logits_ptr, kv_start_ptr, kv_end_ptr, out_ptr, num_cols, stride_row,
    TOPK: gl.constexpr, SAMPLE: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """One program: one row."""
    VECTORS: gl.constexpr = gl.BlockedLayout([VECTOR_ELEMENTS], [32], [NUM_WARPS], [0])
    SINGLES: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    CHUNK: gl.constexpr = NUM_WARPS * 32 * VECTOR_ELEMENTS * VECTORS_A_THREAD
    memory = gl.allocate_shared_memory(gl.int32, [8192], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zeros = gl.zeros([8192], gl.int32, SINGLES)
    row = gl.program_id(0)
    start = gl.maximum(gl.load(kv_start_ptr + row), 0)
    # not below 0: the start is taken off
    end = gl.maximum(gl.minimum(gl.load(kv_end_ptr + row), num_cols), 0)
    length = gl.maximum(end - start, 0)
    # from here positions count from `base`, so that vectors of 4 stay aligned; the range is
    # [first, limit)
    base = start // VECTOR_ELEMENTS * VECTOR_ELEMENTS
    first = start - base
    limit = end - base
    row_ptr = logits_ptr + row.to(gl.int64) * stride_row + base
    out_ptr += row.to(gl.int64) * TOPK
    if length <= TOPK:
        slot = gl.arange(0, 4096, SINGLES)
        gl.store(out_ptr + slot, gl.where(slot < length, start + slot, -1), mask=slot < TOPK)
    else:
        take_all = (length <= CAPACITY).to(gl.int32)
        key = MINUS_INFINITY_KEY
        rank = length
        if take_all == 0:
            share = SAMPLE / length.to(gl.float32)
            expected = TOPK * share
            # 4 sigma above what is needed, but not so many that the list would overflow
            rank = (
                gl.minimum(expected + 4.0 * gl.sqrt(expected), 0.9 * CAPACITY * share).to(gl.int32)
                + 1
            )
            key = _kth_key(_sample_keys(row_ptr, limit, SAMPLE, NUM_WARPS), rank)
        count = 0
        too_few = 0
        too_many = SAMPLE
        tries = 0
        found = 0
        # a threshold of -inf would miss NaN
        while (found == 0) & (tries < MAX_TRIES) & ((key > MINUS_INFINITY_KEY) | (take_all != 0)):
            _clear(memory, zeros)
            _append_row(row_ptr, base, first, limit, _value_of_key(key), take_all, CHUNK, VECTORS)
            block_barrier()
            count = _list_length()
            if (count >= TOPK) & (count <= CAPACITY):
                found = 1
            else:
                if count < TOPK:
                    too_few = rank
                    rank = gl.minimum(rank * 2, (rank + too_many + 1) // 2)
                else:
                    too_many = rank
                    rank = gl.maximum((too_few + rank) // 2, 1)
                # sampled again rather than kept, which would cost 16 registers in every pass
                key = _kth_key(_sample_keys(row_ptr, limit, SAMPLE, NUM_WARPS), rank)
            tries += 1
        if found == 1:
            _write_list(memory, count, out_ptr, TOPK, SINGLES)
        else:
            _search_row(memory, zeros, row_ptr, base, first, limit, out_ptr, TOPK, CHUNK, VECTORS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkConfig:
    num_warps: int
    sample: int
    """Logits that the threshold is taken from: fewer take less time and registers, more miss it
    less often."""
    max_registers: int | None


def choose_config(num_rows: int, num_sms: int) -> TopkConfig:
    """Many rows: two programs of 16 warps on each SM; few rows: one of 32, and the larger sample.

    H100, topk 2048, median µs of (16 warps, 64 registers) / (32 warps): 4096 × 131072 1141 /
    1305, 4096 × 32768 522 / 710, 128 × 32768 37 / 32, 1 × 131072 58 / 41. A row that misses its
    threshold is read twice, which few rows cannot hide (32 × 131072: 80 instead of 47 µs), hence
    their larger sample.
    """
    if num_rows > 2 * num_sms:
        return TopkConfig(num_warps=16, sample=4096, max_registers=64)
    return TopkConfig(num_warps=32, sample=8192, max_registers=None)


def topk(index_logits: Tensor, kv_start: Tensor, kv_end: Tensor, topk: int) -> Tensor:
    """Columns of the `topk` largest logits of each row; conventions as in `topk.py`.

    Args:
        index_logits: [num_rows, num_cols] fp32, any row stride.
        kv_start, kv_end: [num_rows] int32; clamped to [0, num_cols].
        topk: 1 … 3584.
    Returns:
        [num_rows, topk] int32, unsorted, -1 behind the last one.
    """
    expect_tensor("index_logits", index_logits, torch.float32, num_rows=None, num_cols=None)
    expect_tensor("kv_start", kv_start, torch.int32, num_rows=index_logits.shape[0])
    expect_tensor("kv_end", kv_end, torch.int32, num_rows=index_logits.shape[0])
    expect_same_device(index_logits=index_logits, kv_start=kv_start, kv_end=kv_end)
    if not 0 < topk <= MAX_TOPK:
        raise ValueError(f"topk must be 1 … {MAX_TOPK}, got {topk}")
    num_rows, num_cols = index_logits.shape
    out = torch.empty(num_rows, topk, dtype=torch.int32, device=index_logits.device)
    if num_rows == 0:
        return out
    num_sms = torch.cuda.get_device_properties(out.device).multi_processor_count
    config = choose_config(num_rows, num_sms)
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    _topk_kernel[(num_rows,)](
        index_logits, kv_start, kv_end, out, num_cols, index_logits.stride(0),
        TOPK=topk, SAMPLE=config.sample, NUM_WARPS=config.num_warps,
        num_warps=config.num_warps, **limit,
    )  # fmt: skip
    return out


def run(inputs: TopkInputs) -> TopkOutputs:
    return TopkOutputs(topk(inputs.index_logits, inputs.kv_start, inputs.kv_end, inputs.topk))


def supports(shape: TopkShape, machine: Machine) -> str | None:
    if machine.capability is None or machine.capability < (8, 0):
        return f"gluon topk needs an NVIDIA GPU of sm_80 or newer, this is {machine.name}"
    if shape.topk > MAX_TOPK:
        return f"gluon topk takes topk up to {MAX_TOPK}, this case has {shape.topk}"
    return None


IMPLEMENTATIONS = (Implementation(name="gluon", run=run, supports=supports, priority=20),)


def compile_cases() -> list[CompileCase]:
    signature = {
        "logits_ptr": "*fp32:16", "kv_start_ptr": "*i32:16", "kv_end_ptr": "*i32:16",
        "out_ptr": "*i32:16", "num_cols": "i32:16", "stride_row": "i32:16",
    }  # fmt: skip
    cases = []
    for label, num_rows in (("few-rows", 32), ("many-rows", 4096)):
        config = choose_config(num_rows, 132)
        options = {"num_warps": config.num_warps}
        if config.max_registers is not None:
            options["maxnreg"] = config.max_registers
        cases.append(
            CompileCase(
                name=f"topk_gluon[{label}]",
                kernel=_topk_kernel,
                signature=signature,
                constexprs={"TOPK": 2048, "SAMPLE": config.sample, "NUM_WARPS": config.num_warps},
                options=options,
                must_have={"ATOMS": 3, "LDG.E.128": 4},
            )
        )
    return cases
