"""Asking for data before anything can wait for it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def prefetch_l2(ptrs):
    """The lines of 128 bytes at these addresses, to L2; nothing waits for them."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
