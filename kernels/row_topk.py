"""Exact top-k that reads each row once, in Gluon with shared-memory atomics.

(1) A sample of the row gives a threshold that topk and some more of its logits probably reach. (2)
One pass over the row appends every logit that reaches it to a list in shared memory. (3) Radix
selection in the list finds the exact set, equal values by the lowest column, and the columns are
written. A list that came out too short or too long, or a row that no threshold can divide
(thousands of equal values), is done digit by digit, in two to five more passes.

Rows that the list holds whole are listed as they are, and (3) is all that is left. Many rows: one
program does all three for its row, and three or four programs on an SM hide each other's waits. Few
rows of up to 32768 columns: a program asks for its whole row at once, holds it in registers, and
takes the sample from those (`held_row.py`). Few long rows: each is shared out over several programs
that take the same sample and so the same threshold, list what reaches it in their part in global
memory, and end; a second kernel does (3) with one program a row (`candidate_list.py`).

Supports topk up to 4096, fp32 and bf16 logits, any row length, stride and alignment: loads are of
16 bytes where the tensor itself begins at a multiple of 16 bytes.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.candidate_list import (
    SelectConfig,
    empty_lists,
    list_words,
    select_candidates,
)
from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.dependent_launch import let_next_launch, wait_for_launch
from dsa_bench.kernels.held_row import list_held_row
from dsa_bench.kernels.paging import Pages
from dsa_bench.kernels.radix_select import BINS, SLACK_WORDS, SPARE_WORDS, TOP, best_of_list
from dsa_bench.kernels.row_scan import (
    append_above,
    choose_threshold,
    chunk_offsets,
    clear_counters,
    count_sample,
    finish_row,
    list_length,
    list_row,
    load_chunk,
    load_sample,
    locate_columns,
    locate_row,
    write_all,
)
from dsa_bench.kernels.row_slots import check_pages, locate_pages, page_arguments, page_types

MAX_TOPK = 4096


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["seq_len_q", "max_pages", "stride_table_row"])
def _topk_kernel(
    logits_ptr, kv_start_ptr, kv_end_ptr, out_ptr, num_cols, stride_row,
    slots_ptr, table_ptr, seq_len_q, max_pages, stride_table_row,
    TOPK: gl.constexpr, SAMPLE: gl.constexpr, WORDS: gl.constexpr, ELEMENTS: gl.constexpr,
    ELEMENT_BYTES: gl.constexpr, SORTED: gl.constexpr, HAS_PAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr, VECTORS: gl.constexpr, IS_DEPENDENT: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """One program: one row, held in registers or read chunk by chunk."""
    CAPACITY: gl.constexpr = WORDS - SPARE_WORDS
    VECTOR: gl.constexpr = 16 // ELEMENT_BYTES
    LEAST_SHIFT: gl.constexpr = 32 - 8 * ELEMENT_BYTES
    # first and largest, so that it begins at word 0
    memory = gl.allocate_shared_memory(
        gl.int32, [2 * WORDS // BINS + 1, BINS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bins = memory.index(2 * WORDS // BINS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    bins.store(gl.zeros([BINS], gl.int32, LAYOUT))
    if IS_DEPENDENT:
        wait_for_launch()
    row = gl.program_id(0)
    row_ptr, base, first, limit = locate_row(
        logits_ptr, kv_start_ptr, kv_end_ptr, row, num_cols, stride_row, VECTOR
    )
    out_ptr += row.to(gl.int64) * TOPK
    pages = None
    if HAS_PAGES:
        pages = locate_pages(
            slots_ptr, table_ptr, row, seq_len_q, max_pages, stride_table_row, TOPK, PAGE_SIZE
        )
    if limit - first <= TOPK:
        write_all(base + first, limit - first, out_ptr, TOPK, NUM_WARPS, pages)
    else:
        is_listed = 0
        length = 0
        least_key = 0
        best = 0
        clear_counters(WORDS)
        if limit - first > CAPACITY:
            if VECTORS:
                threshold, is_likely, best = list_held_row(
                    bins, row_ptr, base, first, limit,
                    TOPK, CAPACITY, WORDS, VECTORS, VECTOR, NUM_WARPS,
                )  # fmt: skip
            else:
                threshold, is_likely = list_row(
                    bins, row_ptr, base, first, limit,
                    TOPK, SAMPLE, CAPACITY, WORDS, VECTOR, ELEMENTS, NUM_WARPS,
                )  # fmt: skip
            if is_likely == 1:
                length = list_length(WORDS)
                is_listed = ((length >= TOPK) & (length <= CAPACITY)).to(gl.int32)
                least_key = threshold ^ TOP
                if (VECTORS == 0) & (is_listed == 1):
                    best = best_of_list(length, NUM_WARPS)
        finish_row(
            bins, is_listed, length, least_key, best, row_ptr, base, first, limit, out_ptr,
            TOPK, WORDS, SORTED, LEAST_SHIFT, VECTOR, ELEMENTS, NUM_WARPS, pages,
        )  # fmt: skip
    memory._keep_alive()


@gluon.jit
def _list_kernel(
    logits_ptr, kv_start_ptr, kv_end_ptr, values_ptr, columns_ptr, counts_ptr, num_cols,
    stride_row,
    TOPK: gl.constexpr, SAMPLE: gl.constexpr, CAPACITY: gl.constexpr, PART_CAPACITY: gl.constexpr,
    NUM_PARTS: gl.constexpr, ELEMENTS: gl.constexpr, ELEMENT_BYTES: gl.constexpr,
    IS_DEPENDENT: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """One program: one part of a row, whose candidates it lists in global memory.

    Rows that fit into the list of the second kernel, and those without a threshold, list nothing.
    """
    WORDS: gl.constexpr = BINS // 2
    VECTOR: gl.constexpr = 16 // ELEMENT_BYTES
    CHUNK: gl.constexpr = NUM_WARPS * 32 * ELEMENTS
    memory = gl.allocate_shared_memory(
        gl.int32, [2 * WORDS // BINS + 1, BINS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bins = memory.index(2 * WORDS // BINS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    bins.store(gl.zeros([BINS], gl.int32, LAYOUT))
    if IS_DEPENDENT:
        let_next_launch()
        wait_for_launch()
    row = gl.program_id(1)
    part = gl.program_id(0)
    # if the range is the whole row, the sample is on its way together with the range
    whole, _, _, end = locate_columns(logits_ptr, row, 0, num_cols, stride_row, VECTOR)
    sample = load_sample(whole, end, SAMPLE, VECTOR, NUM_WARPS)
    row_ptr, base, first, limit = locate_row(
        logits_ptr, kv_start_ptr, kv_end_ptr, row, num_cols, stride_row, VECTOR
    )
    number = row.to(gl.int64) * NUM_PARTS + part
    length = 0
    clear_counters(WORDS)
    if limit - first > CAPACITY:
        if limit - first != num_cols:
            sample = load_sample(row_ptr, limit, SAMPLE, VECTOR, NUM_WARPS)
        chunks = (limit + CHUNK - 1) // CHUNK
        each = (chunks + NUM_PARTS - 1) // NUM_PARTS
        begin = part * each
        end = gl.minimum(begin + each, chunks)
        offs = chunk_offsets(VECTOR, ELEMENTS, NUM_WARPS)
        depths = count_sample(sample, WORDS)
        x = load_chunk(row_ptr, begin * CHUNK, offs, first, limit, CHUNK)
        share = SAMPLE / (limit - first).to(gl.float32)
        threshold, is_likely = choose_threshold(
            bins, depths, share, TOPK, CAPACITY, WORDS, NUM_WARPS
        )
        if is_likely == 1:
            append_above(
                x, row_ptr, base, first, limit, begin, end, threshold,
                values_ptr + number * PART_CAPACITY, columns_ptr + number * PART_CAPACITY,
                True, PART_CAPACITY - SLACK_WORDS, WORDS, VECTOR, ELEMENTS, NUM_WARPS,
            )  # fmt: skip
            length = list_length(WORDS)
            if length > PART_CAPACITY - SLACK_WORDS:
                length = PART_CAPACITY + 1
    gl.store(counts_ptr + number, length)
    memory._keep_alive()


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkConfig:
    num_warps: int
    sample: int
    """Logits that the threshold is taken from."""
    words: int
    """Of a list: 64 more than the entries that it holds."""
    elements: int
    """Logits that a thread loads at a time, in vectors of 16 bytes."""
    max_registers: int = 64
    """Of a thread: 64 leaves room for 4 programs of 8 warps on an SM, 80 for 3."""
    is_held: bool = False
    """A program has its whole row in registers, all of it asked for at once."""
    parts: int = 1
    """Programs that share a row and leave the selection to a second kernel; 1: no second kernel."""
    select_warps: int = 8
    """Of the second kernel."""
    is_dependent: bool = True
    """Of few rows, kernels are launched while the one before still runs: from sm_90 on."""


def choose_sample(length: int, topk: int) -> int:
    """About 64 of the sample are among the topk: their number then has a σ of an eighth. At most
    4096 logits; of rows longer than 2^19, 8192, which leaves 16."""
    most = 4096 if length <= 2**19 else 8192
    sample = 1024
    while sample < most and sample * topk < 48 * length:
        sample *= 2
    return sample


def choose_config(
    num_rows: int, num_cols: int, topk: int, num_sms: int, list_room: int | None = None
) -> TopkConfig:
    """Many rows, and those that a list holds whole: a program each. A row for each SM or fewer, of
    up to 32768 columns: programs that hold their rows. Other few rows: so many parts that the GPU
    has two programs an SM or nearly so, of at least 2048 columns, with 16 warps from 16384 on.

    H100, topk 2048, µs, from one run for each line:
        128 × 32768    held 16.4, in parts 18.6, SGLang 28.3
        16 × 32768     held 12.4, in parts 12.6; 8 rows 12.6 and 11.9
        128 × 16384    held by 8 warps 13.4, by 16 14.2; 32 rows 11.7 and 11.2
        128 × 8192     held by 8 warps 11.1, by 16 12.3, in parts 14.7
        128 × 4096     16 warps and 128 registers 9.0, 64 registers 9.2, 8 warps 9.6
        256 × 4096     16 logits a thread and 80 registers 12.6, 8 and 128 12.5, 16 warps 12.5
        128 × 32768    parts of 8 warps 19.4, 16 warps 19.0, twice as many 18.9
        32 × 131072    8 warps 20.0, 16 warps 18.9, twice the parts 20.9, 16 logits a thread 19.1
        1 × 131072     8 warps 13.4, 16 warps 13.8, twice the parts 14.0, 16 logits a thread 13.9
        4096 × 32768   16 logits a thread and 80 registers 224, 8 and 64 245, 16 and 96 260
        4096 × 8192    causal, 16 logits a thread and 80 registers 121, 8 and 64 105
    """
    words, sample = list_words(topk, num_cols), choose_sample(num_cols, topk)
    fits_list, is_many = num_cols < words, num_rows > 2 * num_sms
    if fits_list and num_rows <= num_sms:
        return TopkConfig(
            num_warps=16, sample=sample, words=words, elements=8, max_registers=128
        )  # fmt: skip
    if not fits_list and _can_hold(num_rows, num_cols, num_sms):
        is_narrow = num_cols <= 8192 or (num_cols <= 16384 and 2 * num_rows > num_sms)
        num_warps = 8 if is_narrow else 16
        return TopkConfig(
            num_warps=num_warps, sample=sample, words=words, elements=8, max_registers=128,
            is_held=True,
        )  # fmt: skip
    parts = 1
    while 2 * num_rows * parts < 3 * num_sms and parts < 64 and num_cols >= 4096 * parts:
        parts *= 2
    too_much = list_room is not None and num_rows * parts * 8 * words > list_room
    if parts == 1 or fits_list or too_much:
        # four programs an SM instead of three, where they hardly wait for loads
        elements, max_registers = (8, 64) if is_many and num_cols <= 8192 else (16, 80)
        return TopkConfig(
            num_warps=8, sample=sample, words=words, elements=elements,
            max_registers=max_registers, is_dependent=not is_many,
        )  # fmt: skip
    return TopkConfig(
        num_warps=16 if num_cols >= 16384 * parts else 8,
        sample=sample, words=words, elements=8, parts=parts, select_warps=16,
    )  # fmt: skip


def _can_hold(num_rows: int, num_cols: int, num_sms: int) -> bool:
    """Whether all programs run at once, each with its row in registers, and enough of them."""
    if num_cols <= 8192:
        return num_rows <= 2 * num_sms
    if num_cols <= 16384:
        return num_rows <= num_sms
    return num_cols <= 32768 and 16 <= num_rows <= num_sms


def topk(
    index_logits: Tensor, kv_start: Tensor, kv_end: Tensor, topk: int, *,
    sorted_indices: bool = False, pages: Pages | None = None, slots: Tensor | None = None,
    out: Tensor | None = None, list_room: int | None = None, config: TopkConfig | None = None,
) -> Tensor:  # fmt: skip
    """Columns of the `topk` largest logits of each row; conventions as in `topk.py`.

    Of equal values the lowest columns are taken, so that the set is the same in every run.

    Args:
        index_logits: [num_rows, num_cols] fp32 or bf16, any row stride.
        kv_start, kv_end: [num_rows] int32; clamped to [0, num_cols].
        topk: 1 … 4096.
        sorted_indices: write the columns of each row in ascending order: a bitmap of the columns,
            the sums of its bits and one pass more over the list for every 131072 columns.
        pages: of the sequences whose positions the columns are; num_rows / batch_size rows each.
        slots: [num_rows, topk] int32, contiguous, for the rows of the cache that these positions
            lie in, as in `page_slots.py`, written by the same kernel; wanted with `pages`.
        out: [num_rows, topk] int32, contiguous, for the result.
        list_room: bytes that lists of few rows may take (up to 26 MB); None: what they need.
        config: how to launch it; None lets `choose_config` decide.
    Returns:
        [num_rows, topk] int32, unsorted unless asked for, -1 behind the last one.
    """
    dtypes = (torch.float32, torch.bfloat16)
    expect_tensor("index_logits", index_logits, dtypes, num_rows=None, num_cols=None)
    expect_tensor("kv_start", kv_start, torch.int32, num_rows=index_logits.shape[0])
    expect_tensor("kv_end", kv_end, torch.int32, num_rows=index_logits.shape[0])
    expect_same_device(index_logits=index_logits, kv_start=kv_start, kv_end=kv_end, slots=slots)
    if not 0 < topk <= MAX_TOPK:
        raise ValueError(f"topk must be 1 … {MAX_TOPK}, got {topk}")
    num_rows, num_cols = index_logits.shape
    check_pages(pages, slots, num_rows, topk)
    if out is None:
        out = torch.empty(num_rows, topk, dtype=torch.int32, device=index_logits.device)
    if num_rows == 0:
        return out
    device = torch.cuda.get_device_properties(index_logits.device)
    if config is None:
        num_sms = device.multi_processor_count
        config = choose_config(num_rows, num_cols, topk, num_sms, list_room)
    if device.major < 9:
        config = replace(config, is_dependent=False)
    launch = _launch_rows if config.parts == 1 else _launch_parts
    launch(index_logits, kv_start, kv_end, out, sorted_indices, pages, slots, config)
    return out


def _scan_constants(config: TopkConfig, element_bytes: int) -> dict[str, int]:
    """Of both kernels that read rows. Every thread has a vector of the sample of its own."""
    least = config.num_warps * 32 * 16 // element_bytes
    return {
        "SAMPLE": max(config.sample, least), "ELEMENTS": config.elements,
        "ELEMENT_BYTES": element_bytes, "NUM_WARPS": config.num_warps,
    }  # fmt: skip


def _held_vectors(config: TopkConfig, num_cols: int, element_bytes: int) -> int:
    """Of 16 bytes, that a thread holds: the least power of 2 that is enough; 0: none."""
    of_threads = config.num_warps * 32 * 16 // element_bytes
    return triton.next_power_of_2(-(-num_cols // of_threads)) if config.is_held else 0


def _capacities(config: TopkConfig) -> tuple[int, int]:
    """Of a row's list, and of the list of a part, which overflows into its slack."""
    capacity = config.words - int(SPARE_WORDS.value)
    return capacity, capacity + int(SLACK_WORDS.value)


def _launch_rows(
    logits: Tensor, kv_start: Tensor, kv_end: Tensor, out: Tensor, sorted_indices: bool,
    pages: Pages | None, slots: Tensor | None, config: TopkConfig,
) -> None:  # fmt: skip
    num_rows, num_cols = logits.shape
    _topk_kernel[(num_rows,)](
        logits, kv_start, kv_end, out, num_cols, logits.stride(0),
        TOPK=out.shape[1], WORDS=config.words, SORTED=sorted_indices,
        VECTORS=_held_vectors(config, num_cols, logits.element_size()),
        IS_DEPENDENT=config.is_dependent,
        **page_arguments(pages, slots, num_rows), **_scan_constants(config, logits.element_size()),
        num_warps=config.num_warps, maxnreg=config.max_registers,
        launch_pdl=config.is_dependent,
    )  # fmt: skip


def _launch_parts(
    logits: Tensor, kv_start: Tensor, kv_end: Tensor, out: Tensor, sorted_indices: bool,
    pages: Pages | None, slots: Tensor | None, config: TopkConfig,
) -> None:  # fmt: skip
    num_rows, num_cols = logits.shape
    capacity, part_capacity = _capacities(config)
    lists = empty_lists(num_rows, config.parts, part_capacity, logits.device)
    _list_kernel[(config.parts, num_rows)](
        logits, kv_start, kv_end, lists.values, lists.columns, lists.counts, num_cols,
        logits.stride(0),
        TOPK=out.shape[1], CAPACITY=capacity, PART_CAPACITY=part_capacity,
        NUM_PARTS=config.parts, IS_DEPENDENT=config.is_dependent,
        **_scan_constants(config, logits.element_size()),
        num_warps=config.num_warps, maxnreg=config.max_registers, launch_pdl=config.is_dependent,
    )  # fmt: skip
    select_candidates(
        lists, kv_start, kv_end, out.shape[1], num_cols, logits=logits, out=out,
        sorted_indices=sorted_indices, pages=pages, slots=slots, words=config.words,
        config=SelectConfig(
            num_warps=config.select_warps, elements=config.elements,
            is_dependent=config.is_dependent,
        ),
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    signature = {
        "logits_ptr": "*fp32:16", "kv_start_ptr": "*i32:16", "kv_end_ptr": "*i32:16",
        "out_ptr": "*i32:16", "num_cols": "i32:16", "stride_row": "i32:16",
    }  # fmt: skip
    lists = {name: f"*{kind}:16" for name, kind in (
        ("values_ptr", "fp32"), ("columns_ptr", "i32"), ("counts_ptr", "i32"),
    )}  # fmt: skip
    cases = []
    for label, num_rows, num_cols, kind, is_sorted, page_size in (
        ("few-rows", 32, 131072, "fp32", False, None),
        ("few-rows-bf16", 32, 131072, "bf16", False, None),
        ("many-rows", 4096, 131072, "fp32", False, None),
        ("few-rows-1m", 1, 2**20, "fp32", False, None),
        ("many-rows-1m", 4096, 2**20, "fp32", False, None),
        ("many-rows-8192", 4096, 8192, "fp32", False, 64),
        ("rows-of-a-list", 32, 4096, "fp32", False, 64),
        ("many-rows-bf16-sorted", 4096, 131072, "bf16", True, None),
        ("many-rows-slots", 4096, 131072, "fp32", False, 64),
        ("many-rows-slots-sorted", 4096, 131072, "fp32", True, 17),
        ("held", 128, 32768, "fp32", False, None),
        ("held-slots", 128, 32768, "fp32", False, 64),
        ("held-bf16-slots-sorted", 128, 32768, "bf16", True, 17),
        ("held-16384", 128, 16384, "fp32", False, None),
        ("held-8192", 128, 8192, "fp32", False, 64),
    ):
        config = choose_config(num_rows, num_cols, 2048, 132)
        options = {"num_warps": config.num_warps, "maxnreg": config.max_registers}
        element_bytes = 4 if kind == "fp32" else 2
        constexprs = {"TOPK": 2048, **_scan_constants(config, element_bytes)}
        own = signature | {"logits_ptr": f"*{kind}:16"}
        if config.parts == 1:
            of_pages, page_constexprs = page_types(page_size)
            constexprs |= {"WORDS": config.words, "SORTED": is_sorted, **page_constexprs}
            vectors = _held_vectors(config, num_cols, element_bytes)
            constexprs |= {"VECTORS": vectors, "IS_DEPENDENT": config.is_dependent}
            own |= of_pages
        else:
            capacity, part_capacity = _capacities(config)
            constexprs |= {"CAPACITY": capacity, "PART_CAPACITY": part_capacity}
            constexprs |= {"NUM_PARTS": config.parts, "IS_DEPENDENT": True}
            own = {k: v for k, v in own.items() if k != "out_ptr"} | lists
        cases.append(
            CompileCase(
                name=f"row_topk[{label}]",
                kernel=_topk_kernel if config.parts == 1 else _list_kernel,
                signature=own,
                constexprs=constexprs,
                options=options,
                must_have={"ATOMS": 3, "LDG.E.128": max(4, constexprs.get("VECTORS", 0) + 2)},
            )
        )
    return cases
