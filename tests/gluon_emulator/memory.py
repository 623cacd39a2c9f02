"""Global pointers with bounds, shared memory that starts as NaN, asynchronous copies into it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.gluon_emulator.program import (
    WARP_SIZE,
    Barrier,
    EmulationError,
    current,
    pause,
    wait_for_landing,
)

SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POISON = -1234567
"""What an undefined integer reads as; an undefined float reads as NaN."""


def undefined(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values that no right kernel may use."""
    if dtype.is_floating_point:
        return torch.full(list(shape), float("nan")).to(dtype)
    return torch.full(list(shape), POISON).to(dtype)


class Pointer:
    """A tensor's memory and offsets into it, counted in elements from the tensor's first one."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @classmethod
    def of(cls, tensor: Tensor) -> "Pointer":
        """Everything between the tensor's first and last element."""
        span = 1 + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        return cls(tensor.as_strided((span if tensor.numel() else 0,), (1,)))

    def to(self, dtype: torch.dtype) -> "Pointer":
        """An address as a number, for assembly."""
        return self

    def __add__(self, offset: Any) -> "Pointer":
        moved = offset.to(torch.int64) if isinstance(offset, Tensor) else offset
        return Pointer(self.memory, self.offset + moved)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> "Pointer":
        return self + (-offset)

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.memory, self.offset[key])

    def lanes(self, mask: Any, value: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(offsets, mask, value) broadcast to one shape; refuses access outside of the tensor."""
        offset = torch.as_tensor(self.offset)
        active = torch.as_tensor(True if mask is None else mask)
        given = [] if value is None else [torch.as_tensor(value)]
        offset, active, *given = torch.broadcast_tensors(offset, active, *given)
        used = offset[active]
        if used.numel() and not 0 <= used.min().item() <= used.max().item() < self.memory.numel():
            raise EmulationError(
                f"access at {used.min().item()} .. {used.max().item()} of a tensor"
                f" of {self.memory.numel()} elements"
            )
        return offset, active, given[0] if given else None


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Tensor:
    """Masked lanes read nothing; without `other` they are undefined, as on the device."""
    offset, active, _ = pointer.lanes(mask)
    dtype = pointer.memory.dtype
    out = undefined(offset.shape, dtype)
    if other is not None:
        out.copy_(torch.as_tensor(other).broadcast_to(out.shape))
    bits = SAME_WIDTH[dtype.itemsize]  # indexing of fp8 tensors isn't implemented everywhere
    out.view(bits)[active] = pointer.memory.view(bits)[offset[active]]
    return out


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    offset, active, lanes = pointer.lanes(mask, value)
    bits = SAME_WIDTH[pointer.memory.dtype.itemsize]
    assert lanes is not None
    cast = lanes.to(pointer.memory.dtype).view(bits)
    pointer.memory.view(bits)[offset[active]] = cast[active]


def atomic(pointer: Pointer, value: Any, combine: Any, mask: Any = None) -> Tensor:
    """Lane after lane in random order; returns what each lane found."""
    offset, active, lanes = pointer.lanes(mask, value)
    assert lanes is not None
    found = undefined(offset.shape, pointer.memory.dtype)
    chosen = active.nonzero().tolist()
    current.dice.shuffle(chosen)
    for lane in map(tuple, chosen):
        place = int(offset[lane])
        found[lane] = pointer.memory[place]
        pointer.memory[place] = combine(pointer.memory[place], lanes[lane])
    return found


class SharedTile:
    """A view of shared memory, with a mark on each element that was written and not yet fenced."""

    def __init__(self, data: Tensor, mark: Tensor) -> None:
        self.data, self.mark = data, mark

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: Sequence[int], value: Any = None) -> "SharedTile":
        mark = torch.zeros(list(shape), dtype=SAME_WIDTH[dtype.itemsize])
        tile = cls(undefined(shape, dtype), mark)
        if value is not None:
            tile.store(value)
        current.program.allocations.append(tile)
        return tile

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))

    def index(self, i: Any) -> "SharedTile":
        if not 0 <= int(i) < self.data.shape[0]:
            raise EmulationError(f"buffer {int(i)} of {self.data.shape[0]}")
        return SharedTile(self.data[int(i)], self.mark[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "SharedTile":
        return SharedTile(
            self.data.narrow(dim, start, length), self.mark.narrow(dim, start, length)
        )

    def permute(self, order: Sequence[int]) -> "SharedTile":
        return SharedTile(self.data.permute(*order), self.mark.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> "SharedTile":
        data = self.data.view(dtype)
        if data.dim() == 1 and data.numel() == math.prod(shape):
            # a vector has no swizzle that another shape would see
            return SharedTile(
                data.view(*shape), self.mark.view(SAME_WIDTH[dtype.itemsize]).view(*shape)
            )
        if list(data.shape) != list(shape):
            raise EmulationError(f"{self.shape} {self.dtype} seen as {dtype} is {list(data.shape)}")
        return SharedTile(data, self.mark.view(SAME_WIDTH[dtype.itemsize]))

    def store(self, value: Tensor) -> None:
        """A store by the partition's threads; wgmma and TMA see it after fence_async_shared."""
        self.write(value)
        self.mark.fill_(-1 if self.mark.dtype.is_signed else 255)
        current.unfenced.append(self.mark)

    def write(self, value: Tensor) -> None:
        if value.shape != self.data.shape or value.dtype != self.data.dtype:
            raise EmulationError(
                f"{value.dtype} {list(value.shape)} stored to shared {self.dtype} {self.shape}"
            )
        self.data.copy_(value)

    def load(self, layout: Any = None) -> Tensor:
        if self.data.dim() > 1:
            pause(8)  # as long as a copy needs that lands in a tile given away before it is read
        return self.data.clone()

    def read_by_async_proxy(self) -> Tensor:
        if self.mark.ne(0).any():
            raise EmulationError(
                f"{current.name}: shared memory is read by wgmma or TMA, and its writer has made no"
                " fence_async_shared after storing it"
            )
        return self.data

    def _keep_alive(self) -> None:
        """Nothing to do: memory lives as long as it is named."""


def fence_async_shared(cluster: bool = False) -> None:
    for mark in current.unfenced:
        mark.zero_()
    current.unfenced.clear()


def copy_to_shared(tile: SharedTile, pointer: Pointer, mask: Any = None, **_: Any) -> None:
    """cp.async: runs up to the arrival or wait that asks for it; masked lanes become 0."""
    offset, active, _ = pointer.lanes(mask)
    source = Pointer(pointer.memory, offset.clone())
    current.copy_queue.append(
        lambda: tile.write(load(source, active, 0).broadcast_to(tile.data.shape))
    )
    while current.copy_queue and current.dice.random() < 0.3:
        current.copy_queue.pop(0)()


def _take_copies() -> list[Any]:
    taken = list(current.copy_queue)
    current.copy_queue.clear()
    return taken


def arrive_when_copied(barrier: Barrier, increment_count: bool = True) -> None:
    """cp.async.mbarrier.arrive: each thread arrives once its copies so far have landed."""
    if increment_count:
        raise EmulationError("mbarrier_arrive is emulated with increment_count=False only")
    copies, arrivals = _take_copies(), WARP_SIZE * current.num_warps

    def land() -> None:
        for copy in copies:
            copy()
        barrier.count_down(arrivals, 0)

    current.program.start_copy(land)


def wait_for_copies(num_outstanding: int = 0) -> None:
    """cp.async.wait_group; groups aren't told apart: every copy issued so far lands."""
    for copy in _take_copies():
        copy()
    wait_for_landing()


class TensorDescriptor:
    """A TMA descriptor: a tensor and the shape of the block that one copy moves."""

    def __init__(self, base: Tensor, block_shape: Sequence[int]) -> None:
        self.base, self.block_shape = base, list(block_shape)
        # of its block_type, which it is itself
        self.shape = self.block_shape
        self.layout = None
        self.dtype = base.dtype
        self.block_type = self
        self.nbytes = base.element_size() * torch.Size(self.block_shape).numel()

    @classmethod
    def from_tensor(cls, tensor: Tensor, block_shape: Sequence[int], layout: Any = None, **_: Any):
        return cls(tensor, block_shape)

    def window(self, corner: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(slices of the tensor, slices of the block) of the part inside of the tensor."""
        starts = [int(c) for c in corner]
        bounds = list(zip(starts, self.block_shape, self.base.shape, strict=True))
        low = [max(0, c) for c, _, _ in bounds]
        high = [max(0, min(c + b, n)) for c, b, n in bounds]
        inside = tuple(slice(a, max(a, z)) for a, z in zip(low, high, strict=True))
        block = tuple(slice(s.start - c, s.stop - c) for s, c in zip(inside, starts, strict=True))
        return inside, block


def tma_load(
    desc: TensorDescriptor,
    corner: Sequence[Any],
    barrier: Barrier,
    tile: SharedTile,
    pred: Any = True,
) -> None:
    """Lands at a random moment and takes its bytes from the barrier; outside of the tensor is 0."""
    if not pred:
        return
    inside, block = desc.window(corner)

    def land() -> None:
        value = torch.zeros(desc.block_shape, dtype=desc.dtype)
        value[block] = desc.base[inside]
        tile.write(value.view(tile.data.shape))
        barrier.count_down(0, -desc.nbytes)

    current.program.start_copy(land)


def tma_store(desc: TensorDescriptor, corner: Sequence[Any], tile: SharedTile) -> None:
    """Reads shared memory at a random moment up to store_wait."""
    inside, block = desc.window(corner)
    source = tile.read_by_async_proxy()

    def land() -> None:
        desc.base[inside] = source.view(desc.block_shape)[block]

    current.program.start_copy(land)
