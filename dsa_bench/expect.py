"""Checks of arguments at the door, and the sentences they raise."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def expect_tensor(
    name: str, tensor: "Tensor", dtype: "torch.dtype | tuple[torch.dtype, ...]", **dims: int | None
) -> None:
    """Raise TypeError or ValueError unless `tensor` has this dtype and these dimensions, in order.

    A dimension of None takes any size. The last dimension must have stride 1.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    sizes = tuple(dims.values())
    right = len(sizes) == tensor.dim() and all(
        want is None or want == got for want, got in zip(sizes, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not right:
        wanted = ", ".join(k if v is None else f"{k}={v}" for k, v in dims.items())
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        kind = TypeError if tensor.dtype not in dtypes else ValueError
        raise kind(f"{name} must be {names} [{wanted}], got {got}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tuple(tensor.stride())}"
            " (pass x.contiguous())"
        )


def expect_same_device(**tensors: "Tensor | None") -> None:
    """Raise ValueError unless all tensors that are given live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listing}")
