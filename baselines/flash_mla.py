"""FlashMLA, DeepSeek's CUDA kernels for Hopper: sparse prefill, sparse decode, dense decode in bf16
and, in the wheel alone, in fp8.

The package `flash_mla` is built from source; the same kernels come as a wheel inside
`sglang-kernel`, as one library of operators, which is loaded by itself: nothing else of that
package is imported. Where both are there, `flash_mla` is taken.

Their words: `indices` [seq_len_q, 1, topk] are topk_indices (in decode topk_slots), `topk_length`
topk_lens; a heads axis of 1 is added to keys. lse of decode is natural and [batch_size, num_heads,
seq_len_q], transposed here as a view.

`sglang-kernel` 0.4.3 gives max_logits and lse of prefill to base 2, the package of its own natural:
the former are multiplied by ln 2 inside the timed call, 4 bytes a row and head.

Their kernels take 64 or 128 heads. Fewer are padded to the next with zeros inside the timed call,
as whoever calls them from 16 heads must.

The schedule of a decode depends on lengths and shape, alike for all layers: an engine makes it once
a step. Here it is made at the first call of a shape and kept, so its kernel is not in the time (5
to 7 µs a step). With lengths it is made at each call, for nothing says that they are still the
same. So lengths that only repeat what the slots say, those of `dsa`, are not handed over: blocks
without a key are multiplied.
"""

import importlib
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsa_bench.baselines.dense_attention import (
    DenseAttentionShape,
    DenseDecodeInputs,
    DenseOutputs,
)
from dsa_bench.baselines.dense_attention_fp8 import PIECE_KEYS, Fp8DecodeInputs, num_pieces
from dsa_bench.baselines.key_pages import PAGE_SIZE, KeyPages, lay_out_pages
from dsa_bench.kernels.attention import LOG2_E
from dsa_bench.kernels.combine_splits import MAX_SPLITS, combine_splits
from dsa_bench.kernels.sparse_decode import (
    SparseDecodeInputs,
    SparseDecodeOutputs,
    SparseDecodeShape,
)
from dsa_bench.kernels.sparse_prefill import (
    SparsePrefillInputs,
    SparsePrefillOutputs,
    SparsePrefillShape,
)
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine

HEADS_TAKEN = (64, 128)
PREFILL_TOPK_MULTIPLE, DECODE_TOPK_MULTIPLE = 128, 64
MAX_SEQUENCES = 4095
"""Of one schedule of the fp8 decode; one more ends the process."""
WHEEL_MODULE = "sgl_kernel"
WHEEL_FILE = "flashmla_ops.abi3.so"


@cache
def ops() -> Any:
    """The namespace of their operators, loaded once."""
    if importlib.util.find_spec("flash_mla") is not None:
        return importlib.import_module("flash_mla.cuda")
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("neither flash_mla nor sgl_kernel is installed")
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / WHEEL_FILE))
    return torch.ops.sgl_kernel


LIBRARY = Library(
    title="FlashMLA",
    modules=("flash_mla", "sgl_kernel"),
    distributions=("flash_mla", "sglang-kernel"),
    install="pip install sglang-kernel",
    load=ops,
)


@cache
def gives_base_2() -> bool:
    """Whether max_logits and lse of prefill come to base 2."""
    return LIBRARY.found() == WHEEL_MODULE


class Schedule(NamedTuple):
    """How the work of a decode is shared out; filled by the first call."""

    metadata: Tensor | None
    num_splits: Tensor | None


_schedules: dict[tuple[object, ...], Schedule] = {}


def padded_heads(num_heads: int) -> int:
    """64 or 128, the next that holds them."""
    return next(taken for taken in HEADS_TAKEN if num_heads <= taken)


def _pad_heads(q: Tensor) -> Tensor:
    missing = padded_heads(q.shape[-2]) - q.shape[-2]
    return torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q


def _pad_sink(attn_sink: Tensor | None) -> Tensor | None:
    if attn_sink is None:
        return None
    return torch.nn.functional.pad(
        attn_sink, (0, padded_heads(attn_sink.shape[0]) - attn_sink.shape[0])
    )


@torch.no_grad()
def sparse_prefill(inputs: SparsePrefillInputs, /) -> SparsePrefillOutputs:
    heads = inputs.q.shape[1]
    out, max_logits, lse = ops().sparse_prefill_fwd(
        _pad_heads(inputs.q),
        inputs.kv.unsqueeze(1),
        inputs.topk_indices.unsqueeze(1),
        inputs.sm_scale,
        inputs.head_dim_v,
        _pad_sink(inputs.attn_sink),
        inputs.topk_lens,
    )
    if gives_base_2():
        max_logits, lse = max_logits.mul_(math.log(2)), lse.mul_(math.log(2))
    return SparsePrefillOutputs(out[:, :heads], max_logits[:, :heads], lse[:, :heads])


@torch.no_grad()
def sparse_decode(inputs: SparseDecodeInputs, /) -> SparseDecodeOutputs:
    batch_size, seq_len_q, heads, _ = inputs.q.shape
    q, slots, lens = inputs.q, inputs.topk_slots, inputs.needed_lens
    key = ("sparse", q.device, *q.shape, slots.shape[-1])
    schedule = Schedule(None, None)
    if lens is None:
        # with lengths of its own a call has a schedule of its own
        schedule = _schedules.get(key, schedule)
    else:
        # theirs are one a sequence and not above topk; a query may be a sequence of its own, for
        # slots are those of the whole cache
        q, slots = q.flatten(0, 1).unsqueeze(1), slots.flatten(0, 1).unsqueeze(1)
        lens = lens.flatten().clamp(0, slots.shape[-1])
    out, lse, *made = ops().sparse_decode_fwd(
        _pad_heads(q),
        inputs.kv_cache.unsqueeze(2),
        slots,
        lens,
        _pad_sink(inputs.attn_sink),
        *schedule,
        None, None, None,
        512,
        inputs.sm_scale,
    )  # fmt: skip
    if lens is None:
        _schedules[key] = Schedule(*made)
    return SparseDecodeOutputs(
        out[:, :, :heads].reshape(batch_size, seq_len_q, heads, -1),
        lse.transpose(1, 2)[:, :, :heads].reshape(batch_size, seq_len_q, heads),
    )


@cache
def _pages(batch_size: int, seq_len_kv: int, device: torch.device) -> KeyPages:
    """A contiguous cache seen as pages of 64 tokens, in order."""
    return lay_out_pages((seq_len_kv,) * batch_size, device)


def _pages_of(inputs: DenseDecodeInputs | Fp8DecodeInputs) -> KeyPages:
    return inputs.pages or _pages(*inputs.kv.shape[:2], inputs.kv.device)


@torch.no_grad()
def dense_decode(inputs: DenseDecodeInputs, /) -> DenseOutputs:
    pages = _pages_of(inputs)
    key = ("dense", inputs.q.device, *inputs.q.shape, pages.lengths)
    out, lse, *made = ops().dense_decode_fwd(
        inputs.q,
        inputs.kv.view(-1, PAGE_SIZE, 1, inputs.kv.shape[-1]),
        inputs.head_dim_v,
        pages.seq_lens,
        pages.block_table,
        inputs.sm_scale,
        True,
        *_schedules.get(key, Schedule(None, None)),
    )
    _schedules[key] = Schedule(*made)
    return DenseOutputs(out, lse.transpose(1, 2))


class Pieces(NamedTuple):
    """Sequences cut into pieces of PIECE_KEYS keys, each a sequence to the kernel: the first piece
    of all sequences, the second of all that have one, …"""

    block_table: Tensor
    seq_lens: Tensor
    places: Tensor | None
    """[pieces] int64: number of the piece · sequences + sequence; None: every sequence has all."""
    most: int
    """Pieces of the longest sequence."""


@cache
def _pieces(lengths: tuple[int, ...], first: int, end: int, device: torch.device) -> Pieces:
    """Of the sequences first … end - 1 of a batch of these lengths."""
    pages = lay_out_pages(lengths, device).select(slice(first, end))
    count, width = num_pieces(max(pages.lengths)), PIECE_KEYS // PAGE_SIZE
    table = pages.block_table[:, : count * width]
    table = torch.nn.functional.pad(table, (0, count * width - table.shape[1]))
    table = table.view(-1, count, width).transpose(0, 1).reshape(-1, width)
    begins = torch.arange(count, dtype=torch.int32, device=device)[:, None] * PIECE_KEYS
    lens = (pages.seq_lens - begins).clamp(0, PIECE_KEYS).flatten()
    places = lens.nonzero().flatten()
    if len(places) == len(lens):
        return Pieces(table, lens, None, count)
    return Pieces(table[places], lens[places], places, count)


def _schedule_fp8(q: Tensor, seq_lens: Tensor, *of: object) -> Schedule:
    """Of these lengths; `of` tells them from others of as many queries."""
    key = ("dense fp8", q.device, *q.shape, *of)
    if key not in _schedules:
        rows = q.shape[1] * q.shape[2]
        made = ops().get_mla_decoding_metadata_dense_fp8(seq_lens, rows, 1)
        _schedules[key] = Schedule(*made)
    return _schedules[key]


def _attend_fp8(
    inputs: Fp8DecodeInputs, q: Tensor, block_table: Tensor, seq_lens: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    out, lse = ops().fwd_kvcache_mla_fp8(
        q,
        inputs.kv.view(-1, PAGE_SIZE, 1, inputs.kv.shape[-1]),
        inputs.head_dim_v,
        seq_lens,
        block_table,
        inputs.sm_scale,
        True,
        *schedule,
        inputs.q_scale,
        inputs.kv_scale,
    )
    return out, lse.transpose(1, 2)


@torch.no_grad()
def dense_decode_fp8(inputs: Fp8DecodeInputs, /) -> DenseOutputs:
    """As `dense_decode` over e4m3, one descale for all queries and one for all keys and values.

    Their schedule cuts all keys of a batch in as many parts as there are programs at a time, and
    within a part, which may be some blocks longer than its share, sums the keys of a sequence in
    one accumulator. Where the share is more than PIECE_KEYS, pieces of that length are handed over
    as sequences, with a copy of the query each, and joined by lse, all inside the timed call.
    Several new tokens a sequence are not cut: the mask of the last ones would fall on every piece.
    """
    q, pages = inputs.q, _pages_of(inputs)
    lengths = pages.lengths
    schedule = _schedule_fp8(q, pages.seq_lens, lengths)
    assert schedule.metadata is not None
    keys_of_a_part = min(max(lengths), sum(lengths) // schedule.metadata.shape[0])
    if keys_of_a_part <= PIECE_KEYS or q.shape[1] > 1:
        out, lse = _attend_fp8(inputs, q, pages.block_table, pages.seq_lens, schedule)
        return DenseOutputs(out, lse)
    out = torch.empty(*q.shape[:-1], inputs.head_dim_v, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(q.shape[:-1], device=q.device)
    at_once = MAX_SEQUENCES // num_pieces(max(lengths))
    for first in range(0, len(lengths), at_once):
        some = slice(first, first + at_once)
        pieces = _pieces(lengths, first, first + at_once, q.device)
        _decode_fp8_pieces(inputs, q[some], pieces, out[some], lse[some], lengths, first)
    return DenseOutputs(out, lse)


def _decode_fp8_pieces(
    inputs: Fp8DecodeInputs, q: Tensor, pieces: Pieces, out: Tensor, lse: Tensor, *of: object
) -> None:
    """Each piece a sequence, then the pieces of a sequence joined into `out` and `lse`."""
    places, num_places = pieces.places, pieces.most * len(q)
    if places is None:
        copies = q.repeat(pieces.most, 1, 1, 1)
    else:
        copies = q.view(torch.uint8)[places % len(q)].view(q.dtype)
    schedule = _schedule_fp8(copies, pieces.seq_lens, *of)
    part, part_lse = _attend_fp8(inputs, copies, pieces.block_table, pieces.seq_lens, schedule)
    part_lse = part_lse * LOG2_E
    if places is not None:
        # what is missing is not read: its weight is 0
        part = part.new_empty(num_places, *part.shape[1:]).index_copy_(0, places, part)
        nothing = part_lse.new_full((num_places, *part_lse.shape[1:]), float("-inf"))
        part_lse = nothing.index_copy_(0, places, part_lse)
    combine_splits(part, part_lse, pieces.most, None, out, lse)


def _needs_hopper(machine: Machine) -> str | None:
    if machine.device != "cuda" or not machine.is_hopper:
        return "flash_mla needs a Hopper GPU (compute capability 9.0)"
    return None


def _takes_lists(num_heads: int, topk: int, multiple: int) -> str | None:
    if num_heads > max(HEADS_TAKEN):
        return f"flash_mla takes up to {max(HEADS_TAKEN)} heads, this case has {num_heads}"
    if topk % multiple:
        return f"flash_mla takes a topk that is a multiple of {multiple}, this case has {topk}"
    return None


def _supports_prefill(shape: SparsePrefillShape, machine: Machine) -> str | None:
    return (
        _needs_hopper(machine)
        or _takes_lists(shape.num_heads, shape.topk, PREFILL_TOPK_MULTIPLE)
        or LIBRARY.obstacle()
    )


def _supports_sparse_decode(shape: SparseDecodeShape, machine: Machine) -> str | None:
    reason = _needs_hopper(machine) or _takes_lists(
        shape.num_heads, shape.topk, DECODE_TOPK_MULTIPLE
    )
    if reason is not None:
        return reason
    if shape.precision != "fp8":
        return f"flash_mla sparse_decode takes an fp8 cache only, this one is {shape.precision}"
    if shape.page_size != PAGE_SIZE:
        return f"flash_mla takes pages of {PAGE_SIZE} tokens, this case has {shape.page_size}"
    return LIBRARY.obstacle()


def _supports_dense_decode(shape: DenseAttentionShape, machine: Machine) -> str | None:
    reason = _needs_hopper(machine)
    if reason is not None:
        return reason
    if shape.is_prefill:
        return "flash_mla has no dense prefill for Hopper"
    if shape.seq_len_kv % PAGE_SIZE and not shape.is_ragged:
        return (
            f"flash_mla reads pages of {PAGE_SIZE} tokens, and {shape.seq_len_kv} keys of a"
            " contiguous cache are no whole number of them"
        )
    return LIBRARY.obstacle()


def _supports_dense_decode_fp8(shape: DenseAttentionShape, machine: Machine) -> str | None:
    reason = _supports_dense_decode(shape, machine)
    if reason is None and LIBRARY.found() != WHEEL_MODULE:
        return (
            "the package flash_mla has no dense decode in fp8, the wheel has"
            " (uninstall flash_mla, and pip install sglang-kernel)"
        )
    if reason is None and shape.batch_size > MAX_SEQUENCES:
        return (
            f"flash_mla takes up to {MAX_SEQUENCES} sequences in fp8,"
            f" this case has {shape.batch_size}"
        )
    if reason is None and num_pieces(shape.seq_len_kv) > MAX_SPLITS:
        return (
            f"flash_mla's fp8 results are joined here from up to {MAX_SPLITS} pieces of"
            f" {PIECE_KEYS} keys, this case has {shape.seq_len_kv} keys"
        )
    return reason


IMPLEMENTATIONS = {
    "sparse_prefill": (
        Implementation(
            name="flash_mla",
            run=sparse_prefill,
            supports=_supports_prefill,
            library=LIBRARY,
            priority=-10,
        ),
    ),
    "sparse_decode": (
        Implementation(
            name="flash_mla",
            run=sparse_decode,
            supports=_supports_sparse_decode,
            library=LIBRARY,
            priority=-10,
        ),
    ),
    "dense_attention": (
        Implementation(
            name="flash_mla",
            run=dense_decode,
            supports=_supports_dense_decode,
            library=LIBRARY,
            priority=35,
        ),
    ),
    "dense_attention_fp8": (
        Implementation(
            name="flash_mla",
            run=dense_decode_fp8,
            supports=_supports_dense_decode_fp8,
            library=LIBRARY,
            priority=35,
        ),
    ),
}
