"""Exact selection from lists of candidates, one program a row: the second half of a top-k that
several programs share, whatever wrote the lists.

Lists:
    values   [num_rows, num_parts, capacity]  fp32   a candidate's logit
    columns  [num_rows, num_parts, capacity]  int32  its column
    counts   [num_rows, num_parts]            int32  how many the part has; more than `capacity`
                                                     says that it had no room for the rest
num_parts is a power of 2, up to 128. What stands behind the count may be anything, the order within
a part has no meaning. Lists may be paired: then there are counts [num_rows, num_parts, 2], and of
the two programs that fill a part the second begins at its end.

The lists of a row are complete if they hold its topk largest logits and, if one of a value is
listed, all logits of the row that equal it: so it is when each part lists what reaches one
threshold of the row.

A row whose lists are not complete, because a part ran out of room, all parts together list fewer
than topk, or more than the words of a list less 64, is selected from its logits, if they are given;
else its indices are all -1 and `failed` gets a 1. Rows with no more than topk columns need no
lists.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dsa_bench.kernels.compile_case import CompileCase
from dsa_bench.kernels.dependent_launch import wait_for_launch
from dsa_bench.kernels.paging import Pages
from dsa_bench.kernels.radix_select import (
    BINS,
    SPARE_WORDS,
    select_entries,
    sort_key,
    store_entry,
    write_columns,
)
from dsa_bench.kernels.row_scan import (
    clear_counters,
    finish_row,
    locate_row,
    write_all,
)
from dsa_bench.kernels.row_slots import locate_pages, page_arguments, page_types

MAX_PARTS = 128
GATHER_UNROLL = gl.constexpr(8)
"""Candidates that a thread loads before it stores the first."""


@dataclass(frozen=True, slots=True)
class CandidateLists:
    """Shapes and meaning as above."""

    values: Tensor
    columns: Tensor
    counts: Tensor


def empty_lists(
    num_rows: int, num_parts: int, capacity: int, device: torch.device
) -> CandidateLists:
    """Room for lists; nothing needs to be cleared."""
    return CandidateLists(
        torch.empty(num_rows, num_parts, capacity, dtype=torch.float32, device=device),
        torch.empty(num_rows, num_parts, capacity, dtype=torch.int32, device=device),
        torch.empty(num_rows, num_parts, dtype=torch.int32, device=device),
    )


def list_words(topk: int, length: int = 0) -> int:
    """Words for the values of a list that holds topk entries and the spread of a threshold, from a
    sample of a row of this length; 0: of one up to 131072.

    With 5120 a threshold from 64 of a sample is missed by one row in 10^5; with 4096 it was one in
    700, and of 128 rows one in seven calls had such a row and took 31 µs instead of 19. More than
    48 KB in all would cost 10 %: the kernel would then be launched with the smallest L1. Of
    a longer row fewer of the sample are among the topk, and their number varies more.
    """
    return 5120 if topk <= 2560 and length <= 131072 else 8192


@gluon.constexpr_function
def parts_layout(lanes, num_warps):
    """Of [parts, lanes]: a thread's elements are parts of the same lane."""
    across = min(lanes, 32)
    warps_across = min(lanes // across, num_warps)
    return gl.BlockedLayout(
        [1, 1], [32 // across, across], [num_warps // warps_across, warps_across], [1, 0]
    )


@gluon.jit
def count_before(counts_ptr, NUM_PARTS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Candidates in the parts before each part."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [NUM_WARPS, 1], [1, 0])
    part = gl.arange(0, NUM_PARTS, gl.SliceLayout(1, LAYOUT))
    other = gl.arange(0, NUM_PARTS, gl.SliceLayout(0, LAYOUT))
    count = gl.load(counts_ptr + other)
    return gl.sum(gl.where(other[None, :] < part[:, None], count[None, :], 0), 1)


@gluon.jit
def load_candidates(
    values_ptr, columns_ptr, part, number, take,
    PART_CAPACITY: gl.constexpr, IS_PAIRED: gl.constexpr,
):  # fmt: skip
    """Values and columns of the candidates `number` of each part."""
    slot = part[:, None] * PART_CAPACITY + number[None, :]
    if IS_PAIRED:
        # the odd ones fill the part before them from its end
        number = number[None, :]
        slot = gl.where((part & 1)[:, None] == 1, PART_CAPACITY - 1 - number, number)
        slot += (part // 2)[:, None] * PART_CAPACITY
    x = gl.load(values_ptr + slot, mask=take, other=0.0)
    return x, gl.load(columns_ptr + slot, mask=take, other=0)


@gluon.jit
def gather_lists(
    values_ptr, columns_ptr, counts_ptr,
    PART_CAPACITY: gl.constexpr, NUM_PARTS: gl.constexpr, IS_PAIRED: gl.constexpr,
    WORDS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Put the parts' candidates behind each other in the list; (entries, least key, largest key), 0
    entries if a part or the list has no room for all."""
    LANES: gl.constexpr = NUM_WARPS * 32 * GATHER_UNROLL // NUM_PARTS
    TILE: gl.constexpr = parts_layout(LANES, NUM_WARPS)
    part = gl.arange(0, NUM_PARTS, gl.SliceLayout(1, TILE))
    lane = gl.arange(0, LANES, gl.SliceLayout(0, TILE))
    count = gl.load(counts_ptr + part)
    # the first candidates travel together with the counts, which say how many of them there are
    has_room = (part[:, None] >= 0) & (lane[None, :] < PART_CAPACITY)
    x, column = load_candidates(
        values_ptr, columns_ptr, part, lane, has_room, PART_CAPACITY, IS_PAIRED
    )
    most = gl.max(count, 0)
    fullest = most
    if IS_PAIRED:
        fullest = gl.max(count + gl.load(counts_ptr + (part ^ 1)), 0)
    before = gl.convert_layout(
        count_before(counts_ptr, NUM_PARTS, NUM_WARPS), gl.SliceLayout(1, TILE)
    )
    total = gl.sum(count, 0)
    least = gl.full([NUM_PARTS, LANES], 0x7FFFFFFF, gl.int32, TILE)
    best = gl.full([NUM_PARTS, LANES], -(2**31), gl.int32, TILE)
    fits = (fullest <= PART_CAPACITY) & (total <= WORDS - SPARE_WORDS)
    if fits:
        for begin in range(0, most, LANES):
            exists = begin + lane[None, :] < count[:, None]
            store_entry(before[:, None] + begin + lane[None, :], x, column, exists, WORDS)
            key = sort_key(x)
            least = gl.minimum(least, gl.where(exists, key, 0x7FFFFFFF))
            best = gl.maximum(best, gl.where(exists, key, -(2**31)))
            following = begin + LANES + lane
            x, column = load_candidates(
                values_ptr, columns_ptr, part, following, following[None, :] < count[:, None],
                PART_CAPACITY, IS_PAIRED,
            )  # fmt: skip
    least, best = gl.min(gl.min(least, 1), 0), gl.max(gl.max(best, 1), 0)
    return gl.where(fits, total, 0), least, best


# a 1 would be specialised to a constant, which an aggregate refuses
@gluon.jit(do_not_specialize=["seq_len_q", "max_pages", "stride_table_row"])
def _select_kernel(
    values_ptr, columns_ptr, counts_ptr, logits_ptr, kv_start_ptr, kv_end_ptr, out_ptr, failed_ptr,
    num_cols, stride_row, slots_ptr, table_ptr, seq_len_q, max_pages, stride_table_row,
    TOPK: gl.constexpr, PART_CAPACITY: gl.constexpr, NUM_PARTS: gl.constexpr,
    IS_PAIRED: gl.constexpr, WORDS: gl.constexpr, ELEMENTS: gl.constexpr,
    ELEMENT_BYTES: gl.constexpr, SORTED: gl.constexpr, HAS_LOGITS: gl.constexpr,
    IS_DEPENDENT: gl.constexpr, HAS_PAGES: gl.constexpr, PAGE_SIZE: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """One program: one row."""
    memory = gl.allocate_shared_memory(
        gl.int32, [2 * WORDS // BINS + 1, BINS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bins = memory.index(2 * WORDS // BINS)
    LAYOUT: gl.constexpr = gl.BlockedLayout([BINS // (32 * NUM_WARPS)], [32], [NUM_WARPS], [0])
    bins.store(gl.zeros([BINS], gl.int32, LAYOUT))
    VECTOR: gl.constexpr = 16 // ELEMENT_BYTES
    LEAST_SHIFT: gl.constexpr = 32 - 8 * ELEMENT_BYTES
    row = gl.program_id(0)
    # ranges are no work of the kernel before, only lists are
    row_ptr, base, first, limit = locate_row(
        logits_ptr, kv_start_ptr, kv_end_ptr, row, num_cols, stride_row, VECTOR
    )
    out_ptr += row.to(gl.int64) * TOPK
    pages = None
    if HAS_PAGES:
        pages = locate_pages(
            slots_ptr, table_ptr, row, seq_len_q, max_pages, stride_table_row, TOPK, PAGE_SIZE
        )
    if IS_DEPENDENT:
        wait_for_launch()
    if not HAS_LOGITS:
        gl.store(failed_ptr + row, 0)
    if limit - first <= TOPK:
        write_all(base + first, limit - first, out_ptr, TOPK, NUM_WARPS, pages)
    else:
        number = row.to(gl.int64) * NUM_PARTS
        place = (number // 2 if IS_PAIRED else number) * PART_CAPACITY
        length, least_key, best = gather_lists(
            values_ptr + place, columns_ptr + place, counts_ptr + number,
            PART_CAPACITY, NUM_PARTS, IS_PAIRED, WORDS, NUM_WARPS,
        )  # fmt: skip
        is_listed = (length >= TOPK).to(gl.int32)
        if HAS_LOGITS:
            finish_row(
                bins, is_listed, length, least_key, best, row_ptr, base, first, limit, out_ptr,
                TOPK, WORDS, SORTED, LEAST_SHIFT, VECTOR, ELEMENTS, NUM_WARPS, pages,
            )  # fmt: skip
        else:
            if is_listed == 1:
                clear_counters(WORDS)
                last, tied, tied_shift = select_entries(
                    bins, length, least_key, best, base + limit, TOPK, WORDS, LEAST_SHIFT, NUM_WARPS
                )
                write_columns(
                    bins, length, out_ptr, base, limit, best, last, tied, tied_shift,
                    WORDS, SORTED, NUM_WARPS, pages,
                )  # fmt: skip
            else:
                gl.store(failed_ptr + row, 1)
                write_all(0, 0, out_ptr, TOPK, NUM_WARPS, pages)
    memory._keep_alive()


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    num_warps: int = 8
    elements: int = 8
    """Logits that a thread loads at a time, where a row is selected from them."""
    is_dependent: bool = True
    """Launched while the kernel before still runs (programmatic dependent launch)."""

    @property
    def max_registers(self) -> int:
        """Stated, for without a limit ptxas spills to keep to a lower one of its own."""
        return min(128, 2048 // self.num_warps)


def select_candidates(
    lists: CandidateLists, kv_start: Tensor, kv_end: Tensor, topk: int, num_cols: int, *,
    logits: Tensor | None = None, failed: Tensor | None = None, out: Tensor | None = None,
    sorted_indices: bool = False, pages: Pages | None = None, slots: Tensor | None = None,
    words: int | None = None, config: SelectConfig | None = None,
) -> Tensor:  # fmt: skip
    """Columns of the `topk` largest candidates of each row; equal ones by the lowest column.

    Args:
        lists: as described above.
        kv_start, kv_end: [num_rows] int32, the range that the row's columns come from.
        logits: [num_rows, num_cols] fp32 or bf16, for rows whose lists are not complete.
        failed: [num_rows] int32; wanted if there are no logits.
        out: contiguous, for the result.
        sorted_indices: ascending columns.
        pages, slots: as in `row_topk.py`.
        words: 64 more than the most entries that are selected from, a multiple of 512, at least
            4096; None: as `list_words` says.
    Returns:
        [num_rows, topk] int32, -1 behind the last one.
    """
    if logits is None and failed is None:
        raise ValueError("give the logits, or failed to say which rows need them")
    num_rows, num_parts, capacity = lists.values.shape
    is_paired = lists.counts.dim() == 3
    config = SelectConfig() if config is None else config
    if out is None:
        out = torch.empty(num_rows, topk, dtype=torch.int32, device=kv_start.device)
    if num_rows == 0:
        return out
    # never read where it stands for what is missing
    source = lists.values.view(-1, capacity) if logits is None else logits
    _select_kernel[(num_rows,)](
        lists.values, lists.columns, lists.counts, source, kv_start, kv_end, out,
        out if failed is None else failed, num_cols, source.stride(0),
        TOPK=topk, PART_CAPACITY=capacity, NUM_PARTS=num_parts * (2 if is_paired else 1),
        IS_PAIRED=is_paired, WORDS=list_words(topk) if words is None else words,
        ELEMENTS=config.elements, ELEMENT_BYTES=source.element_size(), SORTED=sorted_indices,
        HAS_LOGITS=logits is not None, IS_DEPENDENT=config.is_dependent,
        **page_arguments(pages, slots, num_rows),
        NUM_WARPS=config.num_warps, num_warps=config.num_warps, maxnreg=config.max_registers,
        launch_pdl=config.is_dependent,
    )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    signature = {
        "values_ptr": "*fp32:16", "columns_ptr": "*i32:16", "counts_ptr": "*i32:16",
        "logits_ptr": "*fp32:16", "kv_start_ptr": "*i32:16", "kv_end_ptr": "*i32:16",
        "out_ptr": "*i32:16", "failed_ptr": "*i32:16", "num_cols": "i32:16", "stride_row": "i32:16",
    }  # fmt: skip
    config = SelectConfig(num_warps=16)
    return [
        CompileCase(
            name=f"candidate_list[{label}]",
            kernel=_select_kernel,
            signature=signature | {"logits_ptr": f"*{kind}:16"} | of_pages,
            constexprs={
                "TOPK": 2048, "PART_CAPACITY": capacity, "NUM_PARTS": parts,
                "IS_PAIRED": not has_logits, "WORDS": words,
                "ELEMENTS": config.elements, "ELEMENT_BYTES": 4 if kind == "fp32" else 2,
                "SORTED": is_sorted, "HAS_LOGITS": has_logits, "IS_DEPENDENT": True,
                "NUM_WARPS": config.num_warps, **page_constexprs,
            },
            options={"num_warps": config.num_warps, "maxnreg": config.max_registers},
            must_have={"ATOMS": 3, "SHFL": 10},
        )
        for label, kind, parts, capacity, words, is_sorted, has_logits, page_size in (
            ("plain", "fp32", 8, 5088, 5120, False, True, None),
            ("bf16-sorted", "bf16", 64, 5088, 5120, True, True, None),
            # as `indexer_topk_gluon.py` launches it
            ("no-logits", "fp32", 8, 1440, 5632, False, False, None),
            ("slots", "fp32", 64, 5088, 5120, False, True, 64),
            ("slots-sorted", "fp32", 64, 5088, 5120, True, True, 17),
        )
        for of_pages, page_constexprs in [page_types(page_size)]
    ]  # fmt: skip
