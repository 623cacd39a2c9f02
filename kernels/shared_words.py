"""Words of a program's shared memory by number: loads, stores and atomics at computed places.

Gluon 3.6 has none of these, so they are inline assembly on the PTX symbol of dynamic shared memory.
A kernel that calls them allocates one buffer of int32 before any other, the largest it has, and
keeps it alive to its end (`_keep_alive`): then word 0 of that buffer lies at offset 0, and scratch
of the compiler behind it. The compiler knows nothing of these accesses and puts no barrier between
them: callers do, by `block_barrier`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# triton 3.7 renamed it
block_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def load_word(word):
    """The int32 at each of these words."""
    return gl.inline_asm_elementwise(
        """{ .reg .u32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;
        ld.shared.u32 $0, [a]; }""",
        "=r,r,~{memory}",
        [gl.to_tensor(word)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_word(word, value, take):
    """Store the int32 `value` where `take` is not 0."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;
        setp.ne.s32 p, $3, 0; @p st.shared.b32 [a], $2; mov.b32 $0, 0; }""",
        "=r,r,r,r,~{memory}",
        [word, value, take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def set_bit(start, number, take):
    """Set bit `number` of the bitmap that begins at word `start` where `take` is not 0."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 a, b, m; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;
        shr.u32 b, $2, 5; mad.lo.u32 a, b, 4, a; and.b32 b, $2, 31; mov.u32 m, 1;
        shl.b32 m, m, b; setp.ne.s32 p, $3, 0; @p red.shared.or.b32 [a], m; mov.b32 $0, 0; }""",
        "=r,r,r,r,~{memory}",
        [start, number, take.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def count_bits_below(start, number):
    """How many bits are set among those of the same 128 as `number`, and below it."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 a, b, m, n, w<4>; mov.u32 a, global_smem;
        mad.lo.u32 a, $1, 4, a; shr.u32 b, $2, 7; mad.lo.u32 a, b, 16, a;
        ld.shared.v4.u32 {w0, w1, w2, w3}, [a];
        shr.u32 b, $2, 5; and.b32 b, b, 3; and.b32 n, $2, 31; mov.u32 m, 1; shl.b32 m, m, n;
        sub.u32 m, m, 1; mov.u32 n, 0;
        setp.eq.u32 p, b, 0; @p and.b32 w0, w0, m; popc.b32 w0, w0; add.u32 n, n, w0;
        setp.eq.u32 p, b, 1; @p and.b32 w1, w1, m; popc.b32 w1, w1;
        setp.ge.u32 p, b, 1; @p add.u32 n, n, w1;
        setp.eq.u32 p, b, 2; @p and.b32 w2, w2, m; popc.b32 w2, w2;
        setp.ge.u32 p, b, 2; @p add.u32 n, n, w2;
        and.b32 w3, w3, m; popc.b32 w3, w3;
        setp.eq.u32 p, b, 3; @p add.u32 n, n, w3; mov.b32 $0, n; }""",
        "=r,r,r,~{memory}",
        [gl.to_tensor(start), number],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def count_bits(start, group):
    """How many bits are set in each group of 128 bits of the bitmap at word `start`."""
    return gl.inline_asm_elementwise(
        """{ .reg .u32 a, w<4>; mov.u32 a, global_smem;
        mad.lo.u32 a, $1, 4, a; mad.lo.u32 a, $2, 16, a;
        ld.shared.v4.u32 {w0, w1, w2, w3}, [a];
        popc.b32 w0, w0; popc.b32 w1, w1; popc.b32 w2, w2; popc.b32 w3, w3;
        add.u32 w0, w0, w1; add.u32 w2, w2, w3; add.u32 $0, w0, w2; }""",
        "=r,r,r,~{memory}",
        [gl.to_tensor(start), group],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def reserve(word, count):
    """Add each thread's `count` to the counter; gives each the first of `count` numbers of its own.

    `count` has one element a thread. The 32 of a warp are summed by shuffles and added by one
    atomic: 32 atomics on one word would stand in line.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 a, n, t, b;
        mov.u32 n, $2;
        shfl.sync.up.b32 t|p, n, 1, 0, 0xffffffff; @p add.u32 n, n, t;
        shfl.sync.up.b32 t|p, n, 2, 0, 0xffffffff; @p add.u32 n, n, t;
        shfl.sync.up.b32 t|p, n, 4, 0, 0xffffffff; @p add.u32 n, n, t;
        shfl.sync.up.b32 t|p, n, 8, 0, 0xffffffff; @p add.u32 n, n, t;
        shfl.sync.up.b32 t|p, n, 16, 0, 0xffffffff; @p add.u32 n, n, t;
        mov.u32 t, %laneid; setp.eq.u32 p, t, 31; mov.u32 b, 0;
        mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;
        @p atom.shared.add.u32 b, [a], n;
        shfl.sync.idx.b32 b, b, 31, 31, 0xffffffff;
        sub.u32 n, n, $2; add.u32 $0, n, b; }""",
        "=r,r,r,~{memory}",
        [gl.to_tensor(word), count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
