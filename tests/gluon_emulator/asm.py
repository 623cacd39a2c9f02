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

from tests.gluon_emulator.program import EmulationError, NamedBarrier, current

Model = Callable[[str, list[Any]], Any]


def named_barrier(text: str, arguments: list[Any]) -> Tensor:
    """`bar.arrive N, T` and `bar.sync N, T`: T threads meet at barrier N, a number or `$1`."""
    found = re.search(r"bar(?:rier)?\.(arrive|sync)(?:\.aligned)? (\d+|\$1), (\d+)", text)
    if found is None:
        raise EmulationError(f"named barrier without number and thread count: {text}")
    number = int(arguments[0] if found[2] == "$1" else found[2])
    barriers = current.program.named_barriers
    with current.program.changed:
        barrier = barriers.setdefault(number, NamedBarrier(number))
    barrier.hit(int(found[3]), wait=found[1] == "sync")
    return torch.tensor(0)


def opaque_zero(text: str, arguments: list[Any]) -> Tensor:
    """A 0 that the compiler cannot see through."""
    return torch.tensor(0)


def e4m3_words_to_bf16(text: str, arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """(int32 words of 4 e4m3, optional fp32 scales) -> two int32 words of 2 bf16 each."""
    words, *scales = arguments
    values = words.contiguous().view(torch.float8_e4m3fn).float().view(*words.shape, 4)
    if scales:
        values = values * torch.as_tensor(scales[0])[..., None]
    pairs = values.to(torch.bfloat16).view(torch.int32)
    return pairs[..., 0].contiguous(), pairs[..., 1].contiguous()


def split_bytes(text: str, arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """int16 -> its low and its high byte, int8."""
    pairs = arguments[0].contiguous().view(torch.int8).view(*arguments[0].shape, 2)
    return pairs[..., 0].contiguous(), pairs[..., 1].contiguous()


def bf16_pair(text: str, arguments: list[Any]) -> Tensor:
    """Two fp32 -> an int32 word of both in bf16, the first one low."""
    return torch.stack(arguments, -1).to(torch.bfloat16).view(torch.int32).squeeze(-1)


def unchanged(text: str, arguments: list[Any]) -> Any:
    return arguments[0]


MODELS: dict[str, Model] = {
    "// $0": unchanged,
    "bar.arrive": named_barrier,
    "bar.sync": named_barrier,
    "barrier.arrive": named_barrier,
    "barrier.sync": named_barrier,
    "cvt.rn.bf16x2.f32 $0, $2, $1;": bf16_pair,
    "cvt.rn.f16x2.e4m3x2": e4m3_words_to_bf16,
    "mov.b32 $0, 0;": opaque_zero,
    "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;": split_bytes,
}


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
        with current.program.changed:
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
        with current.program.changed:
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
        with current.program.changed:
            words = _shared_words()
            counts = torch.bincount(chosen.reshape(-1).long())
            words[start : start + counts.numel()] += counts.to(torch.int32)
        return torch.tensor(0)

    return model
