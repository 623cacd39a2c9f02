"""The ring of weights between the scores warpgroup and two output warpgroups: whom its entries wait
for, by named barriers.

An entry is filled by the scores, who tell the outputs (READY), and free when they have used it
(FREE). Each entry has a barrier of its own, at these numbers plus its own; 0 to 4 are the
compiler's. Where each output warpgroup is a role of its own, each has a READY too.
"""

from triton.experimental.gluon import language as gl

RING = gl.constexpr(2)
"""Entries: a piece has one for each block, and one without weights, whose factor is 1 / Σ."""
READY = gl.constexpr(8)
LEFT_READY = gl.constexpr(8)
RIGHT_READY = gl.constexpr(10)
ENTRY_FREE = gl.constexpr(12)
READY_THREADS = gl.constexpr(256)
"""The scores and one output warpgroup."""
ALL_THREADS = gl.constexpr(384)
"""The scores and both."""
