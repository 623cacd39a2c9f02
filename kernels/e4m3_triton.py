"""What Triton kernels that write e4m3 share: power-of-two scales and Hadamard's signs."""

import triton
import triton.language as tl


@triton.jit
def power_of_two_scale(largest, LEAST: tl.constexpr):
    """(2^ceil(log2(largest / 448)), at least LEAST, a power of two; its inverse), both exact.

    448 = 1.75 · 2^8, so a mantissa above 1.75 carries into the exponent. The scale of inf is inf:
    times 448 and a small weight, 2^120 would be a number.
    """
    bits = tl.maximum(largest, LEAST * 448.0).to(tl.int32, bitcast=True)
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    inverse = (254 << 23) - bits
    scale = tl.where(largest == float("inf"), largest, bits.to(tl.float32, bitcast=True))
    return scale, inverse.to(tl.float32, bitcast=True)


@triton.jit
def hadamard_signs(SIZE: tl.constexpr):
    """[SIZE, SIZE] bf16, SIZE up to 256: -1 where i & j has an odd number of bits, else 1."""
    i = tl.arange(0, SIZE)
    both = i[:, None] & i[None, :]
    # bit n of 0x6996 is the parity of n
    odd = 0x6996 >> ((both ^ (both >> 4)) & 15)
    bits = ((odd & 1) << 15) | 0x3F80
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
