"""Reads from the L2 cache alone, for its bandwidth: no operator, a probe of the machine.

Every program reads the whole buffer; `.cg` passes L1 by, so each byte comes from L2 as long as the
buffer fits there. Each goes through the blocks in an order of its own: where neighbours read one
block at about the same time, the hardware fetches it once for both. Programs that follow each
other through the buffer so seemed to reach 10 to 14 TB/s on an H100; these reach 7.9 to 8.0 TB/s,
the same for buffers of 8 to 32 MiB and for 2 to 8 programs on an SM.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_bench.expect import expect_same_device, expect_tensor
from dsa_bench.kernels.compile_case import CompileCase

BLOCK = 4096
PROGRAMS_PER_SM = 4
NUM_WARPS = 8


@triton.jit
def _l2_read_kernel(x_ptr, sums_ptr, num_blocks, BLOCK: tl.constexpr):
    """One program: all blocks of x, the sum of which is stored so that every load is needed."""
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    # an odd step meets each of 2^n blocks once
    step = 2 * program + 1
    block = program * 127
    for _ in range(num_blocks):
        block = (block + step) & (num_blocks - 1)
        total += tl.load(x_ptr + block.to(tl.int64) * BLOCK + offs, cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(total))


def l2_read(x: Tensor, sums: Tensor) -> None:
    """Read x once a program, of which there are as many as `sums` has elements.

    Args:
        x: [num_blocks · 4096] int32, contiguous; num_blocks is a power of two.
        sums: [programs] int32; each becomes the sum of x, modulo 2³².
    """
    expect_tensor("x", x, torch.int32, size=None)
    expect_tensor("sums", sums, torch.int32, programs=None)
    expect_same_device(x=x, sums=sums)
    num_blocks, rest = divmod(x.numel(), BLOCK)
    if rest or num_blocks.bit_count() != 1:
        raise ValueError(f"x must have {BLOCK} · 2^n elements, got {x.numel()}")
    _l2_read_kernel[(sums.numel(),)](
        x, sums, num_blocks, BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name="l2_read_triton",
            kernel=_l2_read_kernel,
            signature={"x_ptr": "*i32:16", "sums_ptr": "*i32:16", "num_blocks": "i32"},
            constexprs={"BLOCK": BLOCK},
            options={"num_warps": NUM_WARPS},
            must_have={"LDG.E.128": 4},
        )
    ]
