"""Every kernel compiles for Hopper: no spills, enough shared memory, the instructions meant."""

import dataclasses
import importlib
import os
import pkgutil
import re
from pathlib import Path

import pytest
import triton
import triton.language as tl

from dsa_bench.kernels.compile_case import CompileCase
from tests import aot, triton_interpreter

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "baselines")


@pytest.fixture(scope="session", autouse=True)
def compiler_cache(tmp_path_factory):
    """A cold cache of this process alone, so that a result is never an old one."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def kernel_modules() -> list[str]:
    """Modules whose text has a jit function that one launches."""
    return [
        f"dsa_bench.{folder}.{module.name}"
        for folder in FOLDERS
        for module in pkgutil.iter_modules([str(ROOT / folder)])
        if "\n@triton.jit" in (text := (ROOT / folder / f"{module.name}.py").read_text())
        or "\n@gluon.jit" in text
    ]


def all_cases() -> dict[str, CompileCase]:
    """Name -> case, of all modules."""
    if triton_interpreter.is_interpreting():
        return {}  # there is nothing to compile in that run
    modules = map(importlib.import_module, kernel_modules())
    cases = [
        case
        for module in modules
        if hasattr(module, "compile_cases")
        for case in module.compile_cases()
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two compile cases of one name: {sorted(names)}"
    return dict(zip(names, cases, strict=True))


CASES = all_cases()


def problems(case: CompileCase, code: aot.MachineCode) -> list[str]:
    """What is wrong with the machine code, as sentences."""
    found = [f"ptxas: {remark}" for remark in code.remarks]
    if code.spill_bytes > case.max_spill_bytes:
        found.append(f"spills {code.spill_bytes} bytes, allowed are {case.max_spill_bytes}")
    limit = aot.SHARED_BYTES_LIMIT if case.max_shared_bytes is None else case.max_shared_bytes
    if code.shared_bytes > limit:
        found.append(f"needs {code.shared_bytes} bytes of shared memory, allowed are {limit}")
    for opcode, least in case.must_have.items():
        if code.count(opcode) < least:
            found.append(f"has {code.count(opcode)} {opcode}, should have {least} or more")
    return found


@pytest.mark.parametrize("name", CASES)
def test_kernel_compiles_for_hopper(name):
    case = CASES[name]
    code = aot.compile_case(case)
    summary = f"{code.registers} registers, {code.shared_bytes} bytes of shared memory"
    assert not problems(case, code), summary


def test_every_kernel_has_a_case():
    """A jit function named `_..._kernel` that no case names would go unseen."""
    compiled = {case.kernel.__name__ for case in CASES.values()}
    kernels = {
        name
        for module in kernel_modules()
        for name in vars(importlib.import_module(module))
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert not kernels - compiled, "these have no CompileCase in their module's compile_cases()"


@triton.jit
def _many_live_values(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x * tl.sum(x, 0))


def test_spills_and_missing_instructions_are_problems():
    case = CompileCase(
        name="spilling",
        kernel=_many_live_values,
        signature={"x_ptr": "*fp32:16"},
        constexprs={"N": 2048},
        options={"num_warps": 1, "maxnreg": 32},
        must_have={"HGMMA": 1},
    )
    code = aot.compile_case(case)
    first, second = problems(case, code)
    assert re.fullmatch(r"spills \d+ bytes, allowed are 0", first)
    assert second == "has 0 HGMMA, should have 1 or more"
    assert problems(dataclasses.replace(case, max_spill_bytes=10**6, must_have={}), code) == []


def test_machine_code_of_a_gluon_kernel():
    from tests.gluon_ring import ring_kernel

    pointers = {
        "x_ptr": "*bf16:16",
        "kv_ptr": "*bf16:16",
        "index_ptr": "*i32:16",
        "out_ptr": "*fp32:16",
    }
    case = CompileCase(
        name="ring",
        kernel=ring_kernel,
        signature={**pointers, "num_rows": "i32"},
        constexprs={"NUM_TILES": 6, "BUG": ""},
        options={"num_warps": 4, "maxnreg": 128},
        must_have={"HGMMA.64x64x16": 4, "LDGSTS": 4},
    )
    code = aot.compile_case(case)
    assert not problems(case, code)
    assert code.num_warps == 8
    assert code.shared_bytes >= 3 * 64 * 64 * 2


def test_opcodes_are_counted_without_predicates():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/             @UP1  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        .L_x_3:
    """
    opcodes = aot.count_opcodes(sass)
    assert opcodes == {
        "LDC": 1,
        "HGMMA.64x256x16.F32.BF16": 1,
        "HGMMA.64x64x16.F32.BF16": 1,
    }


def test_serialised_wgmma_is_a_remark():
    complaint = "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    log = f"ptxas info    : {complaint}\nptxas info    : Used 255 registers, used 1 barriers"
    assert aot.find_remarks(log) == (complaint,)


def test_a_case_names_every_argument():
    case = CompileCase(
        name="short", kernel=_many_live_values, signature={"y_ptr": "*fp32"}, constexprs={"N": 8}
    )
    with pytest.raises(
        ValueError, match=r"short: unknown arguments \['y_ptr'\], missing \['x_ptr'\]"
    ):
        aot.compile_case(case)
