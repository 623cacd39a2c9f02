"""Implementations over the hostile inputs of their operator: `python -m dsa_bench.conformance`.

In a process of its own, which a kernel that reads wildly may take with it: what it printed before
then stands, one JSON line an input.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TIMEOUT = 600.0
"""Seconds for one of them; compiling a kernel takes the most."""
SIZES = {"cpu": ((300, 64, 16),), "cuda": ((300, 64, 16), (4160, 2048, 128))}
"""Device -> (L, topk, heads) of the cases that are made hostile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One implementation on one hostile input."""

    op: str
    impl: str
    name: str
    """Of the input: phase, precision, L and what makes it hostile."""
    verdict: str
    """`ok`, `wrong`, `refused` (it says that it cannot take this) or `raised`."""
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        return self.verdict in ("wrong", "raised")


def examine(wanted: Mapping[str, Sequence[str]], device: str) -> list[Finding]:
    """Operator -> implementations, each in a process of its own; a crash is a finding."""
    pairs = [(op, impl) for op, names in wanted.items() for impl in names]
    return [finding for op, impl in pairs for finding in _examine_one(op, impl, device)]


def _examine_one(op: str, impl: str, device: str) -> list[Finding]:
    wanted = json.dumps({op: [impl]})
    command = [sys.executable, "-m", "dsa_bench.conformance", device, wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        output, ending = done.stdout, f"exit code {done.returncode}: {_last(done.stderr)}"
        crashed = done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else ""
        ending, crashed = f"no end within {TIMEOUT:.0f} s", True
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"op"')]
    found = [Finding(**line) for line in lines]
    if crashed:
        found.append(Finding(op=op, impl=impl, name="the process", verdict="raised", reason=ending))
    return found


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def findings(wanted: Mapping[str, Sequence[str]], device: str) -> Iterator[Finding]:
    """Each implementation on every hostile input, as they end."""
    from dsa_bench import machine, registry
    from dsa_bench.preset import PRESETS

    here = machine.detect(device)
    for op, names in wanted.items():
        owner = registry.operator(op)
        for case in _cases(owner, here.device):
            shape = owner.shape(case, PRESETS[case.preset])
            label = f"{case.phase} {case.precision} L={case.seq_len_kv}"
            for name in names:
                part = registry.implementation(op, name)
                refusal = part.supports(shape, here)
                if refusal is not None:
                    yield Finding(op=op, impl=name, name=label, verdict="refused", reason=refusal)
                    continue
                yield from _over_mutations(owner, part, shape, label, here.device)


def _cases(owner: Any, device: str) -> Iterator[Any]:
    from dsa_bench.operator import Unsupported
    from dsa_bench.preset import PRESETS
    from dsa_bench.record import Case

    for phase in owner.phases:
        for precision in ("bf16", "fp8") if "precision" in owner.axes else ("bf16",):
            for length, topk, heads in SIZES[device]:
                case = Case(
                    op=owner.name,
                    impl="reference",
                    phase=phase,
                    seq_len_kv=length,
                    seq_len_q=9 if phase == "prefill" else 2,
                    topk=topk if "topk" in owner.axes else None,
                    precision=precision,
                    batch_size=3 if phase == "decode" else 1,
                    num_heads=heads,
                )
                try:
                    owner.shape(case, PRESETS[case.preset])
                except Unsupported:
                    continue
                yield case


def _over_mutations(
    owner: Any, part: Any, shape: Any, label: str, device: str
) -> Iterator[Finding]:
    from dsa_bench.kernels.hostile import MUTATIONS, plain

    for number, (kind, mutate) in enumerate(
        {"random": plain, **MUTATIONS.get(owner.name, {})}.items()
    ):
        inputs = mutate(owner.make_inputs(shape, seed=number, device=device))
        verdict, reason = _judge(owner, part, inputs)
        yield Finding(
            op=owner.name, impl=part.name, name=f"{label} {kind}", verdict=verdict, reason=reason
        )


def _judge(owner: Any, part: Any, inputs: Any) -> tuple[str, str]:
    import torch

    from dsa_bench.gate import explain
    from dsa_bench.library import first_line
    from dsa_bench.operator import Unsupported

    try:
        with torch.no_grad():
            reason = explain(owner.check(inputs, part.run(inputs)))
    except Unsupported as error:
        return "refused", str(error)
    except Exception as error:
        return "raised", first_line(error)
    return ("wrong", reason) if reason else ("ok", "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="dsa_bench.conformance", description=__doc__)
    parser.add_argument("device")
    parser.add_argument("wanted", type=json.loads, help="operator -> implementations, as JSON")
    arguments = parser.parse_args()
    for finding in findings(arguments.wanted, arguments.device):
        print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main()
