"""Triton's interpreter, repaired: kernels run on a CPU with the rounding of the hardware.

Triton decides when it is imported whether it interprets, so tests that need it are marked
`interpret` and run in a pytest of their own with TRITON_INTERPRET=1 (`make test` does both runs).
In that run `conftest.py` calls `repair()` before any test module is imported.

Wrong in triton 3.6 to 3.9, and repaired here:
- `tl.dot` and arithmetic on bf16 take the raw bits as integers; bf16 constants raise
- fp32 -> bf16 truncates; fp32 -> e4m3 loses the carry of the rounding and makes NaN of what should
  saturate
- `range` with a tensor bound leans on a conversion that numpy deprecates and drops in 2.4
- numpy warns where a GPU gives inf or NaN in silence
- each call of a jit function looks through the language for what to replace, and `tl.reduce` with a
  function of ours calls it for each element: half the time of these tests
Each product is rounded; the compiler fuses it with a sum that it goes into: `fused_products`.
Not repaired: inline assembly is refused; Gluon is not interpreted (tests/gluon_emulator does that).
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

FP8_MAX = 448.0
FACTORS = "factors"
"""Attribute of a product's handle."""


def is_interpreting() -> bool:
    """Whether this process was started to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def repair() -> None:
    """Replace the wrong parts of triton.runtime.interpreter in this process; call it once."""
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    interpreter._convert_float = _converter(tl, interpreter._convert_float)

    def widen(x: Any) -> Any:
        if not isinstance(x, handle) or x.dtype.scalar != tl.bfloat16:
            return x
        bits = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None)
        return handle(bits.view(np.float32), tl.float32)

    def narrow(x: Any) -> Any:
        bits = interpreter._convert_float(x.data, tl.float32, tl.bfloat16, None)
        return handle(bits, tl.bfloat16)

    def in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, first: Any, *rest: Any) -> Any:
            result = method(self, widen(first), *map(widen, rest))
            was_bf16 = first.dtype.scalar == tl.bfloat16
            return narrow(result) if was_bf16 and result.data.dtype == np.float32 else result

        return call

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), acc, *rest)

    dot = builder.create_dot
    builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, in_fp32(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: narrow(handle(np.array([value], np.float32), tl.float32))
    _repair_scalars(interpreter)
    _silence_numpy(interpreter)
    _patch_once_a_launch(interpreter)
    interpreter.ReduceOps.generic_reduce = _reduce_slices


@contextmanager
def fused_products() -> Iterator[None]:
    """A product of fp32 that goes into a sum or difference is not rounded first, as in machine code
    for a GPU; where it goes into anything else it is."""
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    multiply, add, subtract = builder.create_fmul, builder.create_fadd, builder.create_fsub

    def exact(x: Any) -> Any:
        first, second = x.attr[FACTORS]
        return first.astype(np.float64) * second

    def create_fmul(self: Any, x: Any, y: Any) -> Any:
        product = multiply(self, x, y)
        if product.data.dtype == np.float32:
            product.set_attr(FACTORS, (x.data, y.data))
        return product

    def fused(method: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, x: Any, y: Any) -> Any:
            if FACTORS in x.attr:
                result = operation(exact(x), y.data)
            elif FACTORS in y.attr:
                result = operation(x.data, exact(y))
            else:
                return method(self, x, y)
            return handle(result.astype(np.float32), x.dtype.scalar)

        return call

    with (
        patch.object(builder, "create_fmul", create_fmul),
        patch.object(builder, "create_fadd", fused(add, np.add)),
        patch.object(builder, "create_fsub", fused(subtract, np.subtract)),
    ):
        yield


def _converter(tl: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """Conversion between float types through torch: round to nearest even, e4m3 saturates."""
    kinds = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    unsigned = {8: np.uint8, 16: np.uint16, 32: np.uint32}

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding is None or "RTNE" in str(rounding)
        if not nearest or source not in kinds or target not in kinds:
            return original(data, source, target, rounding)
        raw = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy())
        values = raw.view(kinds[source]).float()
        if target == tl.float8e4nv:
            values = values.clamp(-FP8_MAX, FP8_MAX)
        bits = values.to(kinds[target]).view(torch.uint8).numpy()
        return bits.view(unsigned[target.primitive_bitwidth]).reshape(data.shape)

    return convert


def _repair_scalars(interpreter: Any) -> None:
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _silence_numpy(interpreter: Any) -> None:
    original = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch


def _patch_once_a_launch(interpreter: Any) -> None:
    """What a function sees of the language is replaced at its first call in a launch."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen_by: dict[Any, frozenset[str]] = {}
    done: set[frozenset[str]] = set()

    def patch_once(fn: Any) -> Any:
        if fn not in seen_by:
            seen = [x.__name__ for x in fn.__globals__.values() if inspect.ismodule(x)]
            seen_by[fn] = frozenset(seen) & {"triton.language", "triton.language.core"}
        if seen_by[fn] in done:
            return interpreter._LangPatchScope()
        done.add(seen_by[fn])
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def _reduce_slices(self: Any, given: Any) -> list[Any]:
    """`ReduceOps.generic_reduce`, in its order, but of all elements of a slice at once."""
    whole, (given, axis) = self.axis is None, self.unravel(given, self.axis)
    shape = given[0].handle.data.shape

    def part(place: int) -> tuple[Any, ...]:
        return tuple(self.to_tensor(x.handle.data.take(place, axis), x.dtype) for x in given)

    found = part(0)
    for place in range(1, shape[axis]):
        found = self.combine_fn.fn(*found, *part(place))
        found = found if isinstance(found, tuple) else (found,)
    kept = (1,) * len(shape) if whole else (*shape[:axis], 1, *shape[axis + 1 :])
    left = kept if self.keep_dims else () if whole else (*shape[:axis], *shape[axis + 1 :])
    return [
        self.to_tensor(y.handle.data.reshape(left), x.dtype)
        for x, y in zip(given, found, strict=True)
    ]
