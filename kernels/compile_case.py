"""One way to compile a kernel, for the tests that compile every kernel without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileCase:
    """A kernel with everything the compiler needs, and what its machine code must hold."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Argument -> type: `*bf16:16` a pointer of 16-byte alignment, `i32:16` a multiple of 16."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    """`num_warps`, `num_stages`, `maxnreg`."""
    must_have: Mapping[str, int] = field(default_factory=dict)
    """Beginning of a SASS opcode -> smallest count: {"HGMMA": 16}."""
    max_spill_bytes: int = 0
    max_shared_bytes: int | None = None
    """None: what a program may have."""
