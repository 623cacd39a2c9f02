"""Tiles that the tensor memory accelerator (TMA) copies to shared memory: host and device code."""

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# triton 3.9 renamed it
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def tile_layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """128 bytes of a row beside each other, as a product of the tensor cores wants them."""
    return gl.NVMMASharedLayout(128, 8 * dtype.itemsize, 2)


def tile_type(dtype: torch.dtype, rows: int, columns: int) -> str:
    """The type of a descriptor of such tiles, for a compile case."""
    name = "fp8e4nv" if dtype.itemsize == 1 else "bf16"
    return f"tensordesc<{name}{[rows, columns]},{tile_layout(dtype)!r}>"
