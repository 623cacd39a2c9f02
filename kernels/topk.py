"""Top-k selector: for each row the columns of the k largest logits inside its valid range.

    topk_indices[i, :] = columns of the min(topk, kv_end[i] - kv_start[i]) largest
                         index_logits[i, kv_start[i]:kv_end[i]]

Shapes:
    index_logits  [num_rows, num_cols]  fp32   any row stride; or bf16
    kv_start      [num_rows]            int32  first valid column
    kv_end        [num_rows]            int32  one past the last valid column
    topk_indices  [num_rows, topk]      int32  columns (positions in the sequence), -1 = none;
                                               unsorted, or ascending if sorted_indices
    topk_slots    [num_rows, topk]      int32  optional: rows of the paged cache, see below

Conventions: a row with fewer than topk valid columns lists them all, then -1; an empty row is all
-1. Which of several equal values at the boundary is taken is undefined, except where an
implementation says that it takes the lowest columns, as the reference does: then the set depends on
nothing but the values. -0 equals +0; NaN counts as -inf; -inf inside the range is a valid, smallest
value. What is outside is never looked at.

If the inputs have pages, an implementation may give `topk_slots` too, what `page_slots` makes of
topk_indices: then decode needs no stage for it. Rows are those of the batch's sequences, seq_len_q
= num_rows / batch_size each, in order. The reference leaves them to `page_slots`.

Source: the contract that vLLM, SGLang and Megatron use; TileLang's selector differs (it leaves the
tail at 0).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, shape_differs
from dsa_bench.kernels import page_slots
from dsa_bench.kernels.decode_lengths import decode_lengths, expect_lengths
from dsa_bench.kernels.indexer import causal_range
from dsa_bench.kernels.paging import Pages
from dsa_bench.operator import Cost, Memory, Operator, Unsupported
from dsa_bench.preset import Preset
from dsa_bench.record import Case

LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class TopkShape:
    """`valid` counts the valid columns of all rows."""

    num_rows: int
    num_cols: int
    topk: int
    valid: int
    logits: str = "fp32"
    """Their type: fp32 or bf16."""
    row_ends: tuple[int, ...] = ()
    """kv_end of each row; empty: of a causal chunk, or num_cols where all columns are valid."""

    def __post_init__(self) -> None:
        if self.topk > self.num_cols:
            raise Unsupported(f"topk {self.topk} is more than the {self.num_cols} keys there are")
        if self.logits not in LOGITS:
            raise Unsupported(f"logits are {' or '.join(LOGITS)}, not {self.logits}")

    @property
    def logit_bytes(self) -> int:
        return LOGITS[self.logits].itemsize


@dataclass(frozen=True, slots=True)
class TopkInputs:
    index_logits: Tensor
    kv_start: Tensor
    kv_end: Tensor
    topk: int
    sorted_indices: bool = False
    """Each row's columns ascend."""
    pages: Pages | None = None
    """Of the sequences that the rows are queries of."""


class TopkOutputs(NamedTuple):
    topk_indices: Tensor
    topk_slots: Tensor | None = None
    """None: there are no pages, or the implementation makes no slots of them."""


def make_inputs(shape: TopkShape, *, seed: int, device: torch.device | str) -> TopkInputs:
    """Gaussian logits; rows are valid up to `row_ends`, as in a causal chunk, or wholly."""
    g = torch.Generator(device=device).manual_seed(seed)
    logits = torch.randn(shape.num_rows, shape.num_cols, generator=g, device=device)
    logits = logits.to(LOGITS[shape.logits])
    ends = shape.row_ends
    if not ends and shape.valid == shape.num_rows * shape.num_cols:
        ends = (shape.num_cols,) * shape.num_rows
    if ends:
        kv_end = torch.tensor(ends, dtype=torch.int32, device=device)
        return TopkInputs(logits, torch.zeros_like(kv_end), kv_end, shape.topk)
    return TopkInputs(logits, *causal_range(shape.num_rows, shape.num_cols, device), shape.topk)


def valid_logits(inputs: TopkInputs, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits with NaN and everything outside the range at -inf, and the mask of the range."""
    logits, start, end = (
        x if rows is None else x[rows]
        for x in (inputs.index_logits, inputs.kv_start, inputs.kv_end)
    )
    columns = torch.arange(logits.shape[1], device=logits.device)
    inside = (columns >= start[:, None]) & (columns < end[:, None])
    return torch.where(inside & ~logits.isnan(), logits.float(), float("-inf")), inside


def reference(inputs: TopkInputs, *, rows: Tensor | None = None) -> TopkOutputs:
    """torch.topk of integers: the logit's order, then the lowest column; what lies outside of the
    range comes last."""
    logits, inside = valid_logits(inputs, rows)
    order = torch.where(inside, ordered_bits(logits), torch.iinfo(torch.int32).min).long()
    columns = torch.arange(order.shape[1], device=order.device)
    unique = (order << 32) + (torch.iinfo(torch.int32).max - columns)
    best = unique.topk(min(inputs.topk, order.shape[1]), dim=1).indices
    chosen = torch.where(inside.gather(1, best), best, -1).to(torch.int32)
    unused = inputs.topk - chosen.shape[1]
    chosen = torch.nn.functional.pad(chosen, (0, unused), value=-1)
    return TopkOutputs(ascending(chosen) if inputs.sorted_indices else chosen)


def ascending(indices: Tensor) -> Tensor:
    """The columns of each row in ascending order, -1 behind them."""
    behind = torch.iinfo(torch.int32).max
    in_order = indices.masked_fill(indices < 0, behind).sort(1).values
    return in_order.masked_fill_(in_order == behind, -1)


def refuse_options(inputs: TopkInputs, name: str) -> None:
    """For implementations that take fp32 logits alone and list columns in any order."""
    if inputs.sorted_indices:
        raise Unsupported(f"{name} does not sort its indices (sorted_indices)")
    if inputs.index_logits.dtype != torch.float32:
        kind = str(inputs.index_logits.dtype).removeprefix("torch.")
        raise Unsupported(f"{name}, as it is called here, takes float32 logits, not {kind}")


def ordered_bits(x: Tensor) -> Tensor:
    """int32 in the order of the fp32 values, -0 as +0; that of -inf is above the least int32."""
    bits = (x + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def check(
    inputs: TopkInputs, outputs: TopkOutputs, *, rows: Tensor | None = None
) -> tuple[Check, ...]:
    """Selected values equal the k largest as a multiset; columns are unique and valid, -1 last, and
    ascend if they are to. Slots, if there are any, are those of the columns, one by one."""
    actual = outputs.topk_indices if rows is None else outputs.topk_indices[rows]
    num_rows = inputs.kv_start.shape[0] if rows is None else len(rows)
    if actual.shape != (num_rows, inputs.topk):
        return (shape_differs("topk_indices"),)
    logits, inside = valid_logits(inputs, rows)
    num_valid = inside.sum(1).clamp(max=inputs.topk)
    used = torch.arange(inputs.topk, device=actual.device) < num_valid[:, None]
    safe = actual.long().clamp(0, logits.shape[1] - 1)
    in_range = (actual == safe) & inside.gather(1, safe)
    bad_slots = torch.where(used, ~in_range, actual != -1).sum().item()
    # unused slots get numbers of their own, below every column, so that only real repetition shows
    own = -1 - torch.arange(inputs.topk, device=actual.device)
    listed = torch.where(used, actual.long(), own).sort(1).values
    repeated = (listed[:, 1:] == listed[:, :-1]).sum().item()
    lowest = float("-inf")
    values = torch.where(used, logits.gather(1, safe), lowest).sort(1, descending=True).values
    best = logits.topk(min(inputs.topk, logits.shape[1]), dim=1).values
    best = torch.nn.functional.pad(best, (0, inputs.topk - best.shape[1]), value=lowest)
    wrong_values = (values != best).sum().item()
    figures = {
        "bad_slots": float(bad_slots),
        "repeated": float(repeated),
        "wrong_values": float(wrong_values),
    }
    if inputs.sorted_indices:
        descents = used[:, 1:] & (actual[:, 1:] <= actual[:, :-1])
        figures["descents"] = float(descents.sum().item())
    return (
        Check(
            name="topk_indices",
            passed=not any(figures.values()),
            figures=figures,
            limits=dict.fromkeys(figures, 0.0),
        ),
        *check_slots(inputs, outputs, rows),
    )


def check_slots(inputs: TopkInputs, outputs: TopkOutputs, rows: Tensor | None) -> tuple[Check, ...]:
    """Against those that the returned columns have; nothing where there are no slots."""
    pages, slots = inputs.pages, outputs.topk_slots
    if pages is None or slots is None:
        return ()
    indices, num_rows = outputs.topk_indices, inputs.kv_start.shape[0]
    if slots.shape != indices.shape:
        return (shape_differs("topk_slots"),)
    if rows is None:
        rows = torch.arange(num_rows, device=indices.device)
    table = pages.block_table[rows // pages.seq_len_q(num_rows)]
    of_rows = page_slots.PageSlotsInputs(indices[rows, None], table, pages.page_size)
    return page_slots.check(of_rows, page_slots.PageSlotsOutputs(slots[rows, None]))


def cost(shape: TopkShape) -> Cost:
    """No FLOP; each valid logit read once, the indices written once."""
    return Cost(
        flops=0.0,
        bytes_read=float(shape.logit_bytes * shape.valid),
        bytes_written=4.0 * shape.num_rows * shape.topk,
    )


def memory(shape: TopkShape) -> Memory:
    return Memory(
        input_bytes=shape.logit_bytes * shape.num_rows * shape.num_cols + 8 * shape.num_rows,
        output_bytes=4 * shape.num_rows * shape.topk,
    )


def shape_of(case: Case, preset: Preset) -> TopkShape:
    """Prefill: a causal chunk of seq_len_q rows. Decode: batch_size · seq_len_q rows, each valid up
    to the length of its sequence."""
    if case.topk is None:
        raise Unsupported("topk has no value (pass -k)")
    if case.seq_len_q > case.seq_len_kv:
        raise Unsupported(f"seq_len_q {case.seq_len_q} is more than L {case.seq_len_kv}")
    expect_lengths(case)
    if case.phase == "prefill":
        before = case.seq_len_kv - case.seq_len_q
        rows = case.seq_len_q
        valid = rows * before + rows * (rows + 1) // 2
        return TopkShape(num_rows=rows, num_cols=case.seq_len_kv, topk=case.topk, valid=valid)
    ends = tuple(n for n in decode_lengths(case) for _ in range(case.seq_len_q))
    return TopkShape(
        num_rows=len(ends),
        num_cols=case.seq_len_kv,
        topk=case.topk,
        valid=sum(ends),
        row_ends=ends,
    )


def longest_rows(shape: TopkShape) -> tuple[int, ...]:
    """The rows of the longest sequence of a batch; none where all are alike."""
    ends = shape.row_ends
    if len(set(ends)) < 2:
        return ()
    longest = max(ends)
    return tuple(row for row, end in enumerate(ends) if end == longest)


OPERATOR = Operator(
    name="topk",
    summary="columns of the k largest index logits of each row",
    phases=("prefill", "decode"),
    axes=frozenset({"topk", "batch_size", "lengths"}),
    shape=shape_of,
    make_inputs=make_inputs,
    reference=reference,
    check=check,
    cost=cost,
    memory=memory,
    num_rows=lambda shape: shape.num_rows,
    always_checked=longest_rows,
)
