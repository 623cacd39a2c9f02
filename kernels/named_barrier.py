"""Hardware barriers by number, for Gluon: warpgroups tell each other without a whole partition's
bar.sync, which every operation on an mbarrier costs (Triton 3.6).

0, 1 and one number for each worker of `warp_specialize` are the compiler's; there are 16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def barrier_asm(kind, threads):
    """An asm must have a result, hence the mov."""
    return f"bar.{kind} $1, {threads}; mov.b32 $0, 0;"


@gluon.jit
def arrive_at(number, THREADS: gl.constexpr = 256):
    """Tell those who wait, without waiting for them. THREADS: all who arrive or wait."""
    gl.inline_asm_elementwise(
        barrier_asm("arrive", THREADS), "=r,r,~{memory}", [number], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_at(number, THREADS: gl.constexpr = 256):
    """Wait until all others have arrived or wait too."""
    gl.inline_asm_elementwise(
        barrier_asm("sync", THREADS), "=r,r,~{memory}", [number], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
