"""Implementations over the hostile inputs of their operator: `python -m dsa_bench.conformance`.

Each is examined in a process of its own, which writes what it does to a file, one JSON line each:
{"place", "name"} before an input, {"finding"} after it, {"end"} at last. A kernel that reads wildly
may take the process with it, or leave it a device that answers nothing: that is the finding on the
input that was on, and another process takes the inputs behind it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsa_bench.finding import Finding
from dsa_bench.record import EQUAL_LENGTHS, Case

TIMEOUT = 600.0
"""Seconds for one process; compiling a kernel takes the most."""
SIZES = {"cpu": ((300, 64, 16),), "cuda": ((300, 64, 16), (4160, 2048, 128))}
"""Device -> (L, topk, heads) of the cases that are made hostile."""
ODD_SIZES = ((301, 1), (37, 37))
"""(L, queries) of a prefill with random inputs: one query, and as many as there are keys. Decode
takes one new token of one sequence."""
ODD_TOPK, ODD_HEADS = 16, 16
RAGGED = "one-long"
"""Lengths of one more decode: all but one sequence have fewer keys than topk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One hostile input, before it is made."""

    name: str
    shape: Any
    mutate: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one process wrote, and how it ended."""

    lines: tuple[Mapping[str, Any], ...]
    ending: str
    is_hung: bool


def examine(wanted: Mapping[str, Sequence[str]], device: str) -> list[Finding]:
    """Operator -> implementations, each in processes of its own; a crash is a finding."""
    pairs = [(op, impl) for op, names in wanted.items() for impl in names]
    return [finding for op, impl in pairs for finding in _examine_one(op, impl, device)]


def _examine_one(op: str, impl: str, device: str) -> Iterator[Finding]:
    first = 0
    while True:
        answer = _ask(op, impl, device, first)
        begun = ""
        for line in answer.lines:
            if "end" in line:
                return
            if "finding" in line:
                yield Finding(**line["finding"])
            begun = line.get("name", "")
        if begun or not answer.lines:
            name = begun or "the process"
            yield Finding(op=op, impl=impl, name=name, verdict="raised", reason=answer.ending)
        if answer.is_hung or not answer.lines:
            # it would hang, or end before its first input, again
            return
        first = max(line["place"] for line in answer.lines if "place" in line) + 1


def _ask(op: str, impl: str, device: str, first: int) -> Answer:
    """Examine the inputs from place `first` on, as far as one process gets."""
    with tempfile.TemporaryDirectory(prefix="dsa-bench-") as folder:
        replies = Path(folder) / "replies.jsonl"
        replies.touch()
        command = [sys.executable, "-m", "dsa_bench.conformance", op, impl, device]
        is_hung = False
        try:
            done = subprocess.run(
                [*command, str(first), str(replies)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
            last = (done.stderr.strip().splitlines() or [""])[-1]
            ending = f"the process ended with exit code {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            ending, is_hung = f"no end within {TIMEOUT:.0f} s", True
        whole = [line for line in replies.read_text().splitlines(True) if line.endswith("\n")]
    return Answer(lines=tuple(map(json.loads, whole)), ending=ending, is_hung=is_hung)


def inputs_of(owner: Any, device: str) -> Iterator[Input]:
    """Every hostile input of an operator: odd sizes, then all mutations of its inputs."""
    from dsa_bench.kernels.hostile import MUTATIONS, SINGLE, plain

    odd = [(length, count, ODD_TOPK, ODD_HEADS) for length, count in ODD_SIZES]
    for name, shape in _shapes(owner, odd, batch_size=1, new_tokens=1):
        yield Input(name=f"{name} odd", shape=shape, mutate=plain)
    mutations = {"random": plain, **SINGLE.get(owner.name, {}), **MUTATIONS.get(owner.name, {})}
    sizes = [(length, 9, topk, heads) for length, topk, heads in SIZES[device]]
    for name, shape in _shapes(owner, sizes, batch_size=3, new_tokens=2):
        for kind, mutate in mutations.items():
            yield Input(name=f"{name} {kind}", shape=shape, mutate=mutate)
    if "lengths" in owner.axes:
        for name, shape in _shapes(owner, sizes, batch_size=3, new_tokens=2, lengths=RAGGED):
            yield Input(name=f"{name} {RAGGED}", shape=shape, mutate=plain)


def _shapes(
    owner: Any,
    sizes: Sequence[tuple[int, int, int, int]],
    *,
    batch_size: int,
    new_tokens: int,
    lengths: str = EQUAL_LENGTHS,
) -> Iterator[tuple[str, Any]]:
    """(name, shape) of (L, queries, topk, heads) in each phase and precision that has them.

    `queries` is of prefill, `batch_size`, `new_tokens` and `lengths` are of decode, the only phase
    of lengths that are not equal.
    """
    from dsa_bench.operator import Unsupported
    from dsa_bench.preset import PRESETS

    for phase in owner.phases if lengths == EQUAL_LENGTHS else ("decode",):
        is_prefill = phase == "prefill"
        for precision in ("bf16", "fp8") if "precision" in owner.axes else ("bf16",):
            for length, queries, topk, heads in sizes:
                case = Case(
                    op=owner.name,
                    impl="reference",
                    phase=phase,
                    seq_len_kv=length,
                    seq_len_q=queries if is_prefill else new_tokens,
                    topk=topk if "topk" in owner.axes else None,
                    precision=precision,
                    batch_size=1 if is_prefill else batch_size,
                    num_heads=heads,
                    lengths=lengths,
                )
                try:
                    shape = owner.shape(case, PRESETS[case.preset])
                except Unsupported:
                    continue
                yield f"{phase} {precision} L={length}", shape


def judge(owner: Any, part: Any, item: Input, here: Any, *, seed: int) -> tuple[str, str, bool]:
    """(verdict, reason, whether this process can go on) of an implementation on one input."""
    import torch

    from dsa_bench import gate, worker
    from dsa_bench.machine import free_bytes
    from dsa_bench.operator import Unsupported

    refusal = part.supports(item.shape, here)
    if refusal is not None:
        return "refused", refusal, True
    inputs = item.mutate(owner.make_inputs(item.shape, seed=seed, device=here.device))
    num_rows = owner.num_rows(item.shape)
    gate.poison_memory(owner.memory(item.shape), here.device, free_bytes(here))
    try:
        with torch.no_grad():
            verdict = gate.check_outputs(
                owner,
                inputs,
                part.run(inputs),
                num_rows=num_rows,
                seed=seed,
                device=here.device,
                limit=num_rows,
                figures=False,
            )
    except Unsupported as error:
        return "refused", str(error), True
    except Exception as error:
        _, reason, is_lost = worker.classify(error, "check")
        return "raised", reason, not is_lost
    return ("ok" if verdict.passed else "wrong"), verdict.reason, True


def main() -> int:
    parser = argparse.ArgumentParser(prog="dsa_bench.conformance", description=__doc__)
    for name in ("op", "impl", "device"):
        parser.add_argument(name)
    parser.add_argument("first", type=int, help="place of the first input")
    parser.add_argument("replies", type=Path, help="the file to write to")
    wanted = parser.parse_args()

    from dsa_bench import library, machine, registry

    library.load_here()
    here, owner = machine.detect(wanted.device), registry.operator(wanted.op)
    part = registry.implementation(wanted.op, wanted.impl)
    with wanted.replies.open("w", buffering=1) as replies:
        for place, item in enumerate(inputs_of(owner, here.device)):
            if place < wanted.first:
                continue
            print(json.dumps({"place": place, "name": item.name}), file=replies)
            verdict, reason, can_go_on = judge(owner, part, item, here, seed=place)
            found = Finding(
                op=owner.name, impl=part.name, name=item.name, verdict=verdict, reason=reason
            )
            print(json.dumps({"finding": asdict(found)}), file=replies)
            if not can_go_on:
                return 1
        print(json.dumps({"end": True}), file=replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
