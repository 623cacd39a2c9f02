"""Runs Gluon kernels on a CPU, to find wrong results and broken protocols without a GPU.

Triton's interpreter does not know Gluon. Here stand-ins made of torch functions take the place of
the modules under `triton.experimental.gluon`, the kernels' modules are imported anew on top of
them, and every partition of `warp_specialize` runs in a thread of its own. Modelled is what a
protocol bug would break:

- mbarriers with counts, bytes and phase parity, named barriers by inline assembly, deadlock
  (reported at once, with the state of what each partition waits on)
- wgmma, cp.async and TMA run at a random moment between issue and the wait that asks for them, so
  an operand that is overwritten too early, or read too early, gives wrong numbers
- shared memory and masked lanes start undefined (NaN); accesses outside of a tensor are refused
- wgmma or TMA reading what a thread stored without fence_async_shared
- random delays in counted time, with some partitions much slower than others

Not modelled: layouts (results do not depend on them), the fence after cp.async, races between
threads of one partition (there the compiler inserts the barriers), overflow of int32 indices,
registers, speed.

    with emulated_gluon(seed=3) as emulated:
        kernels = emulated.load("dsa_bench.kernels.sparse_prefill_gluon")
        kernels.sparse_prefill(q, kv, topk_indices, sm_scale=...)
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton.language import core

from tests.gluon_emulator import language
from tests.gluon_emulator.asm import MODELS, Model
from tests.gluon_emulator.asm_lanes import LANES
from tests.gluon_emulator.program import Deadlock, EmulationError

__all__ = ["Deadlock", "Emulated", "EmulationError", "emulated_gluon"]

OURS = ("dsa_bench.", "tests.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulated:
    """The running emulation."""

    seed: str

    def load(self, name: str) -> types.ModuleType:
        """Import a module with kernels on top of the emulator."""
        return importlib.import_module(name)

    def change(self, changes: Mapping[str, Callable[[Any], Any]]) -> None:
        """Put something else in place of names of our kernels' modules: {"module.name": what makes
        it of what stands there}."""
        for path, make in changes.items():
            module, _, name = path.partition(".")
            loaded = self.load(f"dsa_bench.kernels.{module}")
            setattr(loaded, name, make(getattr(loaded, name)))


@contextmanager
def emulated_gluon(
    *,
    seed: int | str = 0,
    asm: Mapping[str, Model] | None = None,
    num_sms: int = 132,
) -> Iterator[Emulated]:
    """Put the stand-ins in place; at the end everything is as it was.

    `asm` maps a piece of assembly text to its model and goes before the common ones. Host code that
    asks torch for the device's properties sees a Hopper GPU of `num_sms` multiprocessors.
    """
    settings = Emulated(seed=str(seed))
    stand_ins = language.stand_ins(settings, {**(asm or {}), **LANES, **MODELS})
    device = types.SimpleNamespace(multi_processor_count=num_sms, major=9, minor=0, name="emulated")
    saved = {name: module for name, module in sys.modules.items() if _is_gluon(name, module)}
    for name in saved:
        _forget(name)
    sys.modules.update(stand_ins)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # partitions are threads already
    try:
        with (
            patch.object(torch.Tensor, "to", language.convert),
            patch.object(torch.Tensor, "type", language.TensorType()),
            patch.object(torch.cuda, "get_device_properties", lambda *_: device),
            patch.object(core, "_aggregate", lambda cls: cls),
        ):
            yield settings
    finally:
        torch.set_num_threads(threads)
        for name in [name for name, module in sys.modules.items() if _is_gluon(name, module)]:
            _forget(name)
        for name, module in sorted(saved.items()):  # parents first
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                setattr(sys.modules[parent], child, module)


def _is_gluon(name: str, module: object) -> bool:
    """Gluon itself, and those of our modules that have imported it, or kernels made of it."""
    if name.startswith(language.ROOT):
        return True
    if not name.startswith(OURS) or name.startswith(__name__):
        return False
    if name.endswith("_gluon"):
        return True
    names = (getattr(value, "__name__", "") for value in vars(module).values())
    return any(str(n).startswith(f"{language.ROOT}.gluon") for n in names)


def _forget(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, child = name.rpartition(".")
    if vars(sys.modules.get(parent, module)).get(child) is module:
        delattr(sys.modules[parent], child)
