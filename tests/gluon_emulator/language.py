"""Stand-ins for the modules under triton.experimental.gluon, made of torch functions."""

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.gluon_emulator import memory, mma
from tests.gluon_emulator.asm import Model
from tests.gluon_emulator.memory import Pointer, SharedTile, TensorDescriptor
from tests.gluon_emulator.program import Barrier, EmulationError, Program, Stopped, current
from tests.gluon_emulator.program import finish_partition as finish

ROOT = "triton.experimental"
UINT32_MASK = 0xFFFFFFFF


class Unsigned32:
    """gl.uint32: held in int64, so that comparisons and shifts are those of unsigned numbers."""


class _Int(int):
    value = property(int)


class _Float(float):
    value = property(float)


def constexpr(value: Any) -> Any:
    """`gl.constexpr(x)`: x itself, with the `.value` that host code reads."""
    if type(value) is int:
        return _Int(value)
    return _Float(value) if type(value) is float else value


class Layout:
    """Results do not depend on layouts; every one is taken and forgotten."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def get_default_for(cls, *args: Any, **kwargs: Any) -> "Layout":
        return cls()


class BarrierLayout(Layout):
    pass


_torch_to = torch.Tensor.to


def convert(x: Any, dtype: Any = None, *args: Any, bitcast: bool = False, **kwargs: Any) -> Tensor:
    """`x.to(dtype, bitcast=)`; also torch's own Tensor.to, which it stands in for."""
    x = torch.as_tensor(x)
    if dtype is Unsigned32:
        bits = x.view(torch.int32) if bitcast and x.dtype.itemsize == 4 else x
        return _torch_to(bits, torch.int64) & UINT32_MASK
    if not bitcast:
        return _torch_to(x, *([] if dtype is None else [dtype]), *args, **kwargs)
    if x.dtype == torch.int64 and dtype.itemsize == 4:  # it held a uint32
        x = _torch_to(x, torch.int32)
    return x.view(dtype)


class TensorType:
    """`x.type`, of which kernels ask the layout and the type of the elements."""

    def __get__(self, x: Tensor, owner: type) -> types.SimpleNamespace:
        return types.SimpleNamespace(layout=Layout(), element_ty=x.dtype, shape=list(x.shape))


class Kernel:
    """What `gluon.jit` gives: callable by other kernels, and launched by kernel[grid](...)."""

    def __init__(self, function: Callable[..., Any], settings: Any) -> None:
        self.function, self.settings = function, settings
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.signature = inspect.signature(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        x, y, z = (*map(int, grid), 1, 1)[:3]
        return functools.partial(self.launch, (x, y, z))

    def launch(self, grid: tuple[int, int, int], *args: Any, num_warps: int = 4, **kwargs: Any):
        known = {k: v for k, v in kwargs.items() if k in self.signature.parameters}
        bound = self.signature.bind(*args, **known)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            annotation = self.signature.parameters[name].annotation
            bound.arguments[name] = (
                constexpr(value) if annotation is constexpr else _argument(value)
            )
        for z, y, x in itertools.product(*map(range, reversed(grid))):
            self.run(Program((x, y, z), grid, self.settings.seed), bound, num_warps)

    def run(self, program: Program, bound: inspect.BoundArguments, num_warps: int) -> None:
        program.enter("default", num_warps)
        try:
            self.function(*bound.args, **bound.kwargs)
            finish()
        except Stopped:
            pass
        if program.failure is not None:
            raise program.failure


def _argument(value: Any) -> Any:
    """A host argument as the device sees it."""
    if isinstance(value, Tensor):
        return Pointer.of(value)
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return _int32(value) if abs(value) < 2**31 else torch.tensor(value)
    return torch.tensor(value) if isinstance(value, float) else value


def allocate_shared_memory(
    dtype: Any, shape: Sequence[int], layout: Any = None, value: Any = None
) -> Any:
    if isinstance(layout, BarrierLayout):
        number = len(current.program.allocations)
        current.program.allocations.append(None)
        bars = [Barrier(f"barrier {number}[{i}]") for i in range(shape[0])]
        return BarrierArray(bars) if len(shape) > 1 else bars[0]
    return SharedTile.allocate(dtype, shape, value)


class BarrierArray:
    def __init__(self, barriers: Sequence[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(i)]


def warp_specialize(
    parts: Sequence[tuple[Kernel, tuple[Any, ...]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> None:
    warps = [current.num_warps, *worker_num_warps]
    if len(warps) != len(parts):
        raise EmulationError(f"{len(parts)} partitions, but warps for {len(warps)}")
    names = [f"{function.__name__}#{i}" for i, (function, _) in enumerate(parts)]
    bodies = [functools.partial(function, *args) for function, args in parts]
    current.program.run_partitions(list(zip(names, warps, bodies, strict=True)))


def _pairwise(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda a, b, **_: combine(*torch.broadcast_tensors(*_same_type(a, b)))


def _same_type(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(a, b)
    return torch.as_tensor(a).to(dtype), torch.as_tensor(b).to(dtype)


def _over(reduction: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axis: int | None = None, keep_dims: bool = False, **_: Any) -> Tensor:
        axes = tuple(range(x.dim())) if axis is None else (axis,)
        return reduction(x, dim=axes, keepdim=keep_dims)

    return run


def _sum(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    small = x.dtype in (torch.bool, torch.int8, torch.int16, torch.int32)
    return x.sum(dim=dim, keepdim=keepdim, dtype=torch.int32 if small else None)


def _extreme(reduction: Callable[..., Tensor], unit: float) -> Callable[..., Tensor]:
    """As max.f32 and min.f32 do, NaN gives way to any number."""

    def run(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
        if not x.is_floating_point():
            return reduction(x, dim=dim, keepdim=keepdim)
        is_nan = x.isnan()
        found = reduction(x.masked_fill(is_nan, unit), dim=dim, keepdim=keepdim)
        return found.masked_fill(is_nan.all(dim=dim, keepdim=keepdim), float("nan"))

    return _over(run)


def reduce(
    x: Tensor, axis: int, combine_fn: Callable[..., Tensor], keep_dims: bool = False
) -> Tensor:
    result = functools.reduce(combine_fn, x.unbind(axis))
    return result.unsqueeze(axis) if keep_dims else result


def associative_scan(x: Tensor, axis: int, combine_fn: Any, reverse: bool = False) -> Tensor:
    """Each element with the one before it, then with that 2, 4, … before it: few calls."""
    x, step = x.flip(axis) if reverse else x, 1
    while step < x.shape[axis]:
        rest = x.shape[axis] - step
        joined = combine_fn(x.narrow(axis, 0, rest), x.narrow(axis, step, rest))
        x = torch.cat([x.narrow(axis, 0, step), joined], axis)
        step *= 2
    return x.flip(axis) if reverse else x


def where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), *_same_type(a, b))


def static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: function(torch.as_tensor(x))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Has no effect on results."""


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _type(dtype: Any) -> torch.dtype:
    return torch.int64 if dtype is Unsigned32 else dtype


def _full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    torch_type = _type(dtype)
    number = float(value) if torch_type.is_floating_point else int(value)
    return torch.full(list(shape), number).to(torch_type)


def _int32(value: Any) -> Tensor:
    """As wide as on the device, so that what overflows there overflows here."""
    return torch.tensor(value, dtype=torch.int32)


def _language(inline_asm: Callable[..., Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "constexpr": constexpr,
        "tensor": Tensor,
        "shared_memory_descriptor": SharedTile,
        "arange": lambda start, end, layout=None: torch.arange(
            int(start), int(end), dtype=torch.int32
        ),
        "full": _full,
        "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
        "full_like": lambda x, value, **_: torch.full_like(x, value),
        "zeros_like": lambda x, **_: torch.zeros_like(x),
        "to_tensor": torch.as_tensor,
        "cast": convert,
        "load": memory.load,
        "store": memory.store,
        "program_id": lambda axis: _int32(current.program.position[axis]),
        "num_programs": lambda axis: _int32(current.program.grid[axis]),
        "num_warps": lambda: current.num_warps,
        "num_ctas": lambda: 1,
        "where": where,
        "maximum": _pairwise(torch.fmax),
        "minimum": _pairwise(torch.fmin),
        "max": _extreme(torch.amax, -float("inf")),
        "min": _extreme(torch.amin, float("inf")),
        "sum": _over(_sum),
        "reduce": reduce,
        "associative_scan": associative_scan,
        "fma": lambda a, b, c: a * b + c,
        "fdiv": lambda a, b, **_: a / b,
        "div_rn": lambda a, b: a / b,
        "cdiv": lambda a, b: (a + b - 1) // b,
        "expand_dims": lambda x, axis: x.unsqueeze(axis),
        "broadcast": lambda a, b: torch.broadcast_tensors(a, b),
        "reshape": lambda x, shape: x.reshape(list(shape)),
        "permute": lambda x, order: x.permute(*order),
        "join": lambda a, b: torch.stack([a, b], -1),
        "split": lambda x: x.unbind(-1),
        "gather": lambda x, index, axis: torch.gather(x, axis, index.long()),
        "histogram": lambda x, bins, **_: torch.bincount(x, minlength=bins).to(torch.int32),
        "static_range": range,
        "static_assert": static_assert,
        "allocate_shared_memory": allocate_shared_memory,
        "inline_asm_elementwise": inline_asm,
        "warp_specialize": warp_specialize,
        "uint32": Unsigned32,
        "int1": torch.bool,
        "float8e4nv": torch.float8_e4m3fn,
        "float8e5": torch.float8_e5m2,
    }
    same_in_torch = "int8 int16 int32 int64 uint8 float16 bfloat16 float32 float64"
    values |= {name: getattr(torch, name) for name in same_in_torch.split()}
    unary = "exp exp2 log log2 sqrt rsqrt sin cos abs floor ceil erf"
    values |= {name: _elementwise(getattr(torch, name)) for name in unary.split()}
    values |= {
        f"atomic_{name}": functools.partial(_atomic, combine=combine)
        for name, combine in {"add": torch.add, "max": torch.fmax, "min": torch.fmin}.items()
    }
    ignored = "assume device_assert device_print static_print thread_barrier barrier"
    values |= dict.fromkeys(ignored.split(), _ignore)
    unchanged = "convert_layout set_auto_layout max_contiguous multiple_of max_constancy"
    values |= dict.fromkeys(unchanged.split(), _same)
    layouts = "Auto Blocked Slice DistributedLinear DotOperand NVMMADistributed NVMMAShared"
    layouts += " SwizzledShared PaddedShared SharedLinear Coalesced"
    return values | {f"{name}Layout": Layout for name in layouts.split()}


def _atomic(pointer: Pointer, value: Any, mask: Any = None, *, combine: Any, **_: Any) -> Tensor:
    return memory.atomic(pointer, value, combine, mask)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(f"{ROOT}.{name}" if name else ROOT)
    vars(module).update(members)
    return module


def stand_ins(settings: Any, models: dict[str, Model]) -> dict[str, types.ModuleType]:
    """Module name -> stand-in, for everything that a kernel file imports of Gluon."""

    def inline_asm(text: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
        for piece, model in models.items():
            if piece in text:
                return model(text, list(args))
        raise EmulationError(f"no model of this assembly (emulated_gluon(asm=...)): {text}")

    barrier = _module(
        "gluon.language.nvidia.hopper.mbarrier",
        MBarrierLayout=BarrierLayout,
        init=lambda bar, count: bar.init(count),
        invalidate=_ignore,
        arrive=lambda bar, *, count=1, pred=True: bar.arrive(int(count)) if pred else None,
        expect=lambda bar, size, pred=True: bar.arrive(1, expect_bytes=int(size)) if pred else None,
        wait=lambda bar, phase, pred=True, deps=(): bar.wait(int(phase)) if pred else None,
    )
    tma = _module(
        "gluon.language.nvidia.hopper.tma",
        async_copy_global_to_shared=memory.tma_load,
        async_copy_shared_to_global=memory.tma_store,
        store_wait=memory.wait_for_copies,
        tensor_descriptor=TensorDescriptor,
    )
    copy = _module(
        "gluon.language.nvidia.ampere.async_copy",
        async_copy_global_to_shared=memory.copy_to_shared,
        mbarrier_arrive=memory.arrive_when_copied,
        commit_group=_ignore,
        wait_group=memory.wait_for_copies,
    )
    hopper = _module(
        "gluon.language.nvidia.hopper",
        mbarrier=barrier,
        tma=tma,
        async_copy=copy,
        fence_async_shared=memory.fence_async_shared,
        warpgroup_mma=mma.warpgroup_mma,
        warpgroup_mma_wait=mma.warpgroup_mma_wait,
        warpgroup_mma_init=mma.warpgroup_mma_init,
    )
    ampere = _module("gluon.language.nvidia.ampere", async_copy=copy, mbarrier=barrier)
    nvidia = _module("gluon.language.nvidia", hopper=hopper, ampere=ampere)
    language = _module("gluon.language", nvidia=nvidia, **_language(inline_asm))
    host = _module("gluon.nvidia.hopper", TensorDescriptor=TensorDescriptor)
    host_root = _module("gluon.nvidia", hopper=host)
    gluon = _module(
        "gluon",
        jit=lambda function=None, **options: (
            (lambda made: Kernel(made, settings))
            if function is None
            else Kernel(function, settings)
        ),
        constexpr_function=_same,
        language=language,
        nvidia=host_root,
    )
    modules = [barrier, tma, copy, hopper, ampere, nvidia, language, host, host_root, gluon]
    return {m.__name__: m for m in [*modules, _module("", gluon=gluon)]}
