"""A kernel that is launched while the one before it runs (programmatic dependent launch, sm_90).

Its programs may start as soon as all programs of the kernel before have said so or ended; before
they touch memory they wait until that kernel has ended and its stores are seen. So only the launch
and what comes before the wait overlap: about a microsecond a kernel.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def can_depend(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@gluon.jit
def wait_for_launch():
    """Until all of the kernel before has run and its stores are seen (griddepcontrol, sm_90)."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def let_next_launch():
    """The next kernel may start as soon as all programs of this one have come here, and not only
    when they have ended. Where some SMs are idle its programs then crowd on those."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
