"""Models of inline assembly: (the text, its tensor arguments) -> what it returns.

A model is chosen by the first registered piece of text that the assembly contains. Those of every
kernel are in `MODELS`; a kernel's own, such as atomics on shared memory, are given to
`emulated_gluon(asm=...)`, made by the functions below where they fit.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gluon_emulator.program import WARP_SIZE, EmulationError, NamedBarrier, current

Model = Callable[[str, list[Any]], Any]


def named_barrier(text: str, arguments: list[Any]) -> Tensor:
    """`bar.arrive N, T` and `bar.sync N, T`: T threads meet at barrier N, a number or `$1`."""
    found = re.search(r"bar(?:rier)?\.(arrive|sync)(?:\.aligned)? (\d+|\$1), (\d+)", text)
    if found is None:
        raise EmulationError(f"named barrier without number and thread count: {text}")
    number = int(arguments[0] if found[2] == "$1" else found[2])
    barriers = current.program.named_barriers
    barrier = barriers.setdefault(number, NamedBarrier(number))
    barrier.hit(int(found[3]), wait=found[1] == "sync")
    return torch.tensor(0)


def opaque_zero(text: str, arguments: list[Any]) -> Tensor:
    """A 0 that the compiler cannot see through."""
    return torch.tensor(0)


def e4m3_columns_to_f16(text: str, arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """(int16 pairs of e4m3, f16 factors) -> f16: both bytes of even pairs, both of odd pairs.

    A word has two pairs and two factors; each result takes the first factor for its low half.
    """
    values, factors = _e4m3_bytes(arguments[0]), arguments[1]
    words = values.unflatten(-2, (-1, 2))
    first, second = words[..., 0, :].flatten(-2), words[..., 1, :].flatten(-2)
    return first * factors, second * factors


def e4m3_rows_to_f16(text: str, arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """(int16 pairs of e4m3, f16 factors) -> f16: their low bytes, their high bytes."""
    values, factors = _e4m3_bytes(arguments[0]), arguments[1]
    return values[..., 0] * factors, values[..., 1] * factors


def _e4m3_bytes(pairs: Tensor) -> Tensor:
    """int16 [..] -> their two bytes [.., 2] in f16, which has every number of e4m3."""
    values = pairs.contiguous().view(torch.float8_e4m3fn).view(*pairs.shape, 2)
    return values.to(torch.float16)


def product(text: str, arguments: list[Any]) -> Tensor:
    """Of 16-bit floats, rounded once: torch multiplies them in fp32, which has every product."""
    a, b = arguments
    if a.dtype != b.dtype:
        raise EmulationError(f"{a.dtype} times {b.dtype} by {text}")
    result: Tensor = a * b
    return result


def product_in_f16(text: str, arguments: list[Any]) -> Tensor:
    return product(text, arguments).to(torch.float16)


def larger_bits(text: str, arguments: list[Any]) -> Tensor:
    """(int16, bf16) -> the larger of the first and the second's bits without its sign."""
    return torch.maximum(arguments[0], arguments[1].contiguous().view(torch.int16) & 0x7FFF)


def split_bytes(text: str, arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """int16 -> its low and its high byte, int8."""
    pairs = arguments[0].contiguous().view(torch.int8).view(*arguments[0].shape, 2)
    return pairs[..., 0].contiguous(), pairs[..., 1].contiguous()


def bf16_pair(text: str, arguments: list[Any]) -> Tensor:
    """Two fp32 -> an int32 word of both in bf16, the first one low."""
    return torch.stack(arguments, -1).to(torch.bfloat16).view(torch.int32).squeeze(-1)


def fp32_pair(text: str, arguments: list[Any]) -> Tensor:
    """Two fp32 -> an int64 word of both, the first one low."""
    return torch.stack(arguments, -1).view(torch.int64).squeeze(-1)


def unchanged(text: str, arguments: list[Any]) -> Any:
    return arguments[0]


def _shared_words() -> Tensor:
    """The first allocation, where the PTX symbol `global_smem` points, as int32."""
    return current.program.allocations[0].data.view(torch.int32).view(-1)


def _active_lanes(predicate: Tensor) -> list[int]:
    """Flat numbers of the lanes that take part, in the random order that atomics run in."""
    lanes: list[int] = predicate.reshape(-1).nonzero().flatten().tolist()
    current.dice.shuffle(lanes)
    return lanes


def ticket_counter(word: int) -> Model:
    """(predicate) -> `atomicAdd(word, 1)` for lanes whose predicate isn't 0; -1 for others."""

    def model(text: str, arguments: list[Any]) -> Tensor:
        (predicate,) = arguments
        lanes = _active_lanes(predicate)
        tickets = torch.full((predicate.numel(),), -1, dtype=torch.int32)
        words = _shared_words()
        tickets[lanes] = (int(words[word]) + torch.arange(len(lanes))).to(torch.int32)
        words[word] += len(lanes)
        return tickets.view(predicate.shape)

    return model


def list_append(word: int, capacity: int, starts: tuple[int, ...]) -> Model:
    """(value for each list .., predicate): lanes take a ticket of `word`; below `capacity` write.

    `starts` are the first words of the lists. Returns 0.
    """

    def model(text: str, arguments: list[Any]) -> Tensor:
        *values, predicate = torch.broadcast_tensors(*arguments)
        lanes = _active_lanes(predicate)
        words = _shared_words()
        first = int(words[word])
        words[word] += len(lanes)
        kept = lanes[: max(0, capacity - first)]
        for start, value in zip(starts, values, strict=True):
            place = start + first
            words[place : place + len(kept)] = value.reshape(-1)[kept].to(torch.int32)
        return torch.tensor(0)

    return model


def word_read(word: int) -> Model:
    """() -> the word, the same for every thread."""
    return lambda text, arguments: _shared_words()[word].clone()


def histogram_add(start: int = 0) -> Model:
    """(bin[, predicate]): adds 1 to the word of each lane's bin. Returns 0."""

    def model(text: str, arguments: list[Any]) -> Tensor:
        bins, *predicate = arguments
        chosen = bins[predicate[0] != 0] if predicate else bins
        words = _shared_words()
        counts = torch.bincount(chosen.reshape(-1).long())
        words[start : start + counts.numel()] += counts.to(torch.int32)
        return torch.tensor(0)

    return model


def word_load(text: str, arguments: list[Any]) -> Tensor:
    """(word) -> the words; the kernel may mask what it gets, but not leave shared memory."""
    # indexed by a number alone it would be a view
    return _shared_words()[_places(arguments[0])].clone()


def word_store(text: str, arguments: list[Any]) -> Tensor:
    """(word, value, predicate); of several values for one word any may stay. Returns 0."""
    word, value, lanes = _chosen(*arguments)
    _shared_words()[_places(word[lanes])] = value[lanes].to(torch.int32)
    return torch.tensor(0)


def entry_store(text: str, arguments: list[Any]) -> Tensor:
    """(place, value, column, predicate): both, the column some bytes behind. Returns 0."""
    found = re.search(r"\[a \+ (\d+)\], \$3;", text)
    assert found is not None
    place, value, column, lanes = _chosen(*arguments)
    behind = place + int(found[1]) // 4
    _shared_words()[_places(place[lanes])] = value[lanes]
    _shared_words()[_places(behind[lanes])] = column[lanes].to(torch.int32)
    return torch.tensor(0)


def reaching_store(text: str, arguments: list[Any]) -> Tensor:
    """(places, values, columns, bounds), [threads, elements of a thread]: those that are at least
    the bound go behind each other from the thread's first place, which is no more than the text's
    limit, their columns, counted from the first one, some bytes behind. The place behind them."""
    limit = re.search(r"min.u32 n, n, (\d+);", text)
    behind = re.search(r"\[a \+ (\d+)\], c;", text)
    assert limit is not None and behind is not None
    places, values, columns, bounds = arguments
    chosen = values >= bounds
    count = chosen.sum(1, dtype=torch.int32, keepdim=True)
    start = places[:, :1].clamp(max=int(limit[1]))
    column = columns[:, :1] + torch.arange(values.shape[1])
    place = (start + chosen.cumsum(1) - 1)[chosen]
    _shared_words()[_places(place)] = values.contiguous().view(torch.int32)[chosen]
    _shared_words()[_places(place + int(behind[1]) // 4)] = column[chosen].to(torch.int32)
    return (start + count).expand(values.shape)


def digit_count(text: str, arguments: list[Any]) -> Tensor:
    """(number, low, shift, predicate): adds 1 to word (number - low) >> shift of a histogram.

    The text says how many words that has and how many bytes stand before it. Returns 0.
    """
    found = re.search(r"p, d, (\d+), q;.*\[a \+ (\d+)\]", text, flags=re.DOTALL)
    assert found is not None
    bins, start = int(found[1]), int(found[2]) // 4
    number, low, shift, lanes = _chosen(*arguments)
    digit = ((number.long() - low.long()) & 0xFFFFFFFF) >> shift.long()
    digit = digit[lanes]
    digit = digit[digit < bins]
    ones = torch.ones(len(digit), dtype=torch.int32)
    _shared_words().index_add_(0, _places(start + digit), ones)
    return torch.tensor(0)


def bit_set(text: str, arguments: list[Any]) -> Tensor:
    """(first word of the bitmap, bit, predicate). Returns 0."""
    start, bit, lanes = _chosen(*arguments)
    words = _shared_words()
    for place, n in zip((start + (bit >> 5))[lanes].tolist(), bit[lanes].tolist(), strict=True):
        words[place] |= _as_int32(1 << (n & 31))
    return torch.tensor(0)


def bits_below(text: str, arguments: list[Any]) -> Tensor:
    """(first word of the bitmap, bit) -> bits set in the 128 around it and below it."""
    start, bit = torch.broadcast_tensors(*map(torch.as_tensor, arguments))
    below = (torch.arange(128) < (bit.reshape(-1, 1) & 127)) & _group_bits(start, bit >> 7)
    return below.sum(1, dtype=torch.int32).view(bit.shape)


def bits_of_group(text: str, arguments: list[Any]) -> Tensor:
    """(first word of the bitmap, number of a group of 128 bits) -> bits set in it."""
    start, group = torch.broadcast_tensors(*map(torch.as_tensor, arguments))
    return _group_bits(start, group).sum(1, dtype=torch.int32).view(group.shape)


def _group_bits(start: Tensor, group: Tensor) -> Tensor:
    """[groups, 128] bool."""
    first = _places((start + 4 * group).reshape(-1))
    words = _shared_words()[first[:, None] + torch.arange(4)]
    return ((words[..., None] >> torch.arange(32)) & 1).bool().flatten(1)


def reserved_numbers(text: str, arguments: list[Any]) -> Tensor:
    """(word, count a thread): warps in random order add their counts; the first number of each."""
    word, count = int(arguments[0]), arguments[1].reshape(-1)
    if count.numel() != WARP_SIZE * current.num_warps:
        raise EmulationError(f"{count.numel()} counts for {current.num_warps} warps")
    warps = list(range(current.num_warps))
    current.dice.shuffle(warps)
    sums = count.view(-1, WARP_SIZE).cumsum(1, dtype=torch.int32)
    first = sums - count.view(-1, WARP_SIZE)
    words = _shared_words()
    for warp in warps:
        first[warp] += words[word]
        words[word] += sums[warp, -1]
    return first.view(arguments[1].shape)


def _chosen(*arguments: Any) -> list[Any]:
    """The flat arguments before the predicate, and the lanes that it chooses."""
    *values, predicate = torch.broadcast_tensors(*map(torch.as_tensor, arguments))
    return [*(value.reshape(-1) for value in values), _active_lanes(predicate)]


def _places(words: Any) -> Tensor:
    places = torch.as_tensor(words).long()
    size = _shared_words().numel()
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise EmulationError(f"words {int(places.min())} .. {int(places.max())} of {size}")
    return places


def _as_int32(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


MODELS: dict[str, Model] = {
    "ld.shared.u32 $0, [a];": word_load,
    "setp.ne.s32 p, $4, 0; @p st.shared.b32 [a], $2;": entry_store,
    "setp.ne.s32 p, $3, 0; @p st.shared.b32 [a], $2;": word_store,
    "st.shared.u32 [a + ": reaching_store,
    "shr.u32 d, d, $3; setp.ne.s32 q, $4, 0;": digit_count,
    "@p red.shared.or.b32 [a], m;": bit_set,
    "popc.b32 w0, w0; add.u32 n, n, w0;": bits_below,
    "popc.b32 w0, w0; popc.b32 w1, w1;": bits_of_group,
    "shfl.sync.up.b32 t|p, n, 1,": reserved_numbers,
    "// $0": unchanged,
    "bar.arrive": named_barrier,
    "bar.sync": named_barrier,
    "barrier.arrive": named_barrier,
    "barrier.sync": named_barrier,
    "cvt.rn.bf16x2.f32 $0, $2, $1;": bf16_pair,
    "mov.b64 $0, {$1, $2};": fp32_pair,
    "mul.bf16x2 $0, $1, $2;": product,
    "cvt.rn.f16x2.f32 $0, high, low;": product_in_f16,
    "max.u16x2 $0, $1, bits;": larger_bits,
    "mov.b32 {a, b}, $2;": e4m3_columns_to_f16,
    "prmt.b32 w, $2, $2, 0x3120;": e4m3_rows_to_f16,
    "mov.b32 $0, 0;": opaque_zero,
    "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;": split_bytes,
}
