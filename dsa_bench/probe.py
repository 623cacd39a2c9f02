"""Asks about the machine in a process of its own: `python -m dsa_bench.probe --device auto`.

The process that drives a run must not hold a context, or memory, on the device whose times and
memory it reports; so the questions that need the device are answered by one that has ended before
the first case. The answer is one JSON line on stdout; a UsageError is a sentence on stderr, exit 2.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsa_bench.operator import Machine, UsageError

USAGE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What was found."""

    machine: Machine
    header: Mapping[str, Any]
    """What `run.json` keeps: `machine`, `versions`, `git`, `load` (programs that ran, mean of the
    minute before), `ceilings` and, where there are some, `ceilings_measured`.
    """
    busy: str = ""
    """Other work that will make times noisy, as a sentence; see `machine.busy_hint`."""


def probe(device: str, *, with_ceilings: bool) -> Probe:
    """Ask a fresh process about `auto`, `cuda` or `cpu`."""
    command = [sys.executable, "-m", "dsa_bench.probe", "--device", device]
    if with_ceilings:
        command.append("--ceilings")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == USAGE:
            raise UsageError(said)
        raise UsageError(f"the machine can't be examined: {said} (see dsa-bench doctor)")
    answer = json.loads(done.stdout.splitlines()[-1])
    capability = answer["machine"]["capability"]
    answer["machine"]["capability"] = None if capability is None else tuple(capability)
    return Probe(machine=Machine(**answer["machine"]), header=answer["header"], busy=answer["busy"])


def main() -> int:
    """Answer on stdout."""
    from dsa_bench import ceilings, machine, nvml

    parser = argparse.ArgumentParser(prog="dsa_bench.probe")
    parser.add_argument("--device", required=True)
    parser.add_argument("--ceilings", action="store_true")
    wanted = parser.parse_args()
    # before this process has a CUDA context or makes a load of its own
    before, load = nvml.processes_before(), machine.load_average()
    try:
        found = machine.detect(wanted.device)
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE
    busy = machine.busy_hint(found, before)
    header: dict[str, Any] = {
        "machine": machine.describe(found),
        "versions": machine.versions(),
        "git": machine.git_state(),
        "load": load,
        "ceilings": {},
    }
    if wanted.ceilings:
        known = ceilings.known_ceilings(found)
        if not known.measured:
            known = ceilings.fresh_ceilings(found, busy=busy)
        header |= {"ceilings": dict(known.rates), "ceilings_measured": known.measured}
    print(json.dumps({"machine": dataclasses.asdict(found), "header": header, "busy": busy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
