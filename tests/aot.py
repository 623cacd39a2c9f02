"""Compile kernels for Hopper without a GPU, and read what the machine code needs and holds.

Only the triton wheel is wanted: it brings ptxas and nvdisasm. Registers, spills and ptxas' remarks
come from the log of Triton's own ptxas, instruction counts from the disassembled machine code.
"""

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dsa_bench.kernels.compile_case import CompileCase

CAPABILITY = 90
WARP_SIZE = 32
SHARED_BYTES_LIMIT = 232448
"""227 KiB: the most shared memory that one program can ask for on an H100 or H200."""
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What the compiler made of a kernel for sm_90a."""

    registers: int
    """A thread, at launch; a warp-specialised kernel shares them out anew by setmaxnreg."""
    spill_bytes: int
    """Stores and loads of spilled registers together, a thread."""
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    """Of the whole program, all partitions together."""
    remarks: tuple[str, ...]
    """What ptxas complained of: wgmma that it serialises, register limits that it ignores."""
    cubin: bytes

    def count(self, beginning: str) -> int:
        """How many instructions have an opcode that begins so: `HGMMA.64x256`."""
        opcodes = opcodes_of(self.cubin)
        return sum(n for opcode, n in opcodes.items() if opcode.startswith(beginning))


def compile_case(case: CompileCase) -> MachineCode:
    """Compile for sm_90a; raises what the compiler raises."""
    signature, attributes, constexprs = describe_arguments(case)
    if getattr(case.kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source = Source(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled, log = compile_with_log(source, case.options)
    stack, spill_stores, spill_loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    return MachineCode(
        registers=_numbers(r"Used (\d+) registers", log)[0],
        spill_bytes=spill_stores + spill_loads,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        remarks=find_remarks(log),
        cubin=compiled.asm["cubin"],
    )


def describe_arguments(
    case: CompileCase,
) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]], dict[str, Any]]:
    """(signature, attributes, constexprs) as Triton wants them.

    `:16` behind a type becomes an attribute of divisibility, without which no load is wider than an
    element; `:1` becomes the constant 1, as the launcher does with a stride of 1.
    """
    names = list(case.kernel.arg_names)
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    missing = set(names) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(
            f"{case.name}: unknown arguments {sorted(unknown)}, missing {sorted(missing)}"
        )
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constexprs = dict(case.constexprs)
    for position, name in enumerate(names):
        kind, _, hint = case.signature.get(name, "constexpr").partition(":")
        if "tensordesc" in kind:  # the layout's text may hold colons
            kind, hint = case.signature[name], ""
        if hint == "16":
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif hint == "1":
            kind, constexprs[name] = "constexpr", 1
        elif hint:
            raise ValueError(
                f"{case.name}: {name} is {case.signature[name]}, known hints are :16 and :1"
            )
        signature[name] = kind
    return signature, attributes, constexprs


def compile_with_log(source: ASTSource, options: Mapping[str, Any]) -> tuple[CompiledKernel, str]:
    """The kernel, and what ptxas said of it: Triton prints that on demand.

    An old result from the cache has no log, so that always compiles.
    """
    target = GPUTarget("cuda", CAPABILITY, WARP_SIZE)
    with (
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
        contextlib.redirect_stdout(io.StringIO()) as log,
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=target, options=dict(options)), log.getvalue()


@functools.lru_cache(maxsize=1)
def opcodes_of(cubin: bytes) -> Counter[str]:
    """SASS opcode with its suffixes -> how often it stands in the code."""
    return count_opcodes(disassemble(cubin))


def disassemble(cubin: bytes) -> str:
    """Without the analysis of where jumps lead, a quarter of the time: it only names labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(DISASSEMBLER), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_opcodes(sass: str) -> Counter[str]:
    """Opcodes of `/*0080*/ @!P0 HGMMA.64x64x16.F32.BF16 R24, ...` lines, predicates taken off."""
    line = r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P[T\d]+\s+)?([A-Z][A-Za-z0-9_.]*)"
    return Counter(re.findall(line, sass, flags=re.MULTILINE))


def find_remarks(log: str) -> tuple[str, ...]:
    """C75xx (serialised wgmma), C76xx, warnings and setmaxnreg complaints, each once."""
    pattern = r"(?:\(?C7[567]\d\d|setmaxnreg|warning|Potential Performance)[^\n]*"
    return tuple(sorted(set(re.findall(pattern, log))))


def _numbers(pattern: str, log: str) -> tuple[int, ...]:
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"ptxas printed nothing like {pattern!r}:\n{log}")
    return tuple(map(int, found.groups()))
