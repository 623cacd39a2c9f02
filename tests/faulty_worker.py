"""A real worker whose implementations of `double` crash, hang and misbehave.

`python -m tests.faulty_worker --reply-fd N`
"""

import ctypes
import os
import sys
import threading
import time
from typing import Any

import torch

from dsa_bench import measure, registry, worker
from dsa_bench.measure import Effort
from dsa_bench.operator import Implementation
from tests import fake_operator
from tests.fake_operator import FakeInputs, FakeOutputs, good


def segfault(inputs: FakeInputs, /) -> FakeOutputs:
    print("reading address 0", file=sys.stderr, flush=True)
    ctypes.string_at(0)
    return good(inputs)


def abort(inputs: FakeInputs, /) -> FakeOutputs:
    os.abort()


def exit_early(inputs: FakeInputs, /) -> FakeOutputs:
    os._exit(0)


def leave(inputs: FakeInputs, /) -> FakeOutputs:
    """SystemExit is no Exception: nothing that catches those sees it."""
    sys.exit(0)


def loop(inputs: FakeInputs, /) -> FakeOutputs:
    while True:
        time.sleep(0.01)


def deadlock(inputs: FakeInputs, /) -> FakeOutputs:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return good(inputs)


def out_of_memory(inputs: FakeInputs, /) -> FakeOutputs:
    return FakeOutputs(torch.empty(2**56, device=inputs.x.device))


def talk(inputs: FakeInputs, /) -> FakeOutputs:
    """What it prints looks like an answer."""
    print('{"event": "done"}', flush=True)
    os.write(1, b'{"event": "record", "case": 0}\n')
    return good(inputs)


def illegal_address(inputs: FakeInputs, /) -> FakeOutputs:
    rows = torch.full((4,), 2**30, device=inputs.x.device)
    return FakeOutputs(inputs.x[rows])


def endless_kernel(inputs: FakeInputs, /) -> FakeOutputs:
    sleep: Any = torch.cuda._sleep
    for _ in range(1000):
        sleep(2**40)
    return good(inputs)


RUNS = (
    *(good, segfault, abort, exit_early, leave, loop, deadlock, out_of_memory, talk),
    *(illegal_address, endless_kernel),
)


def catalogue() -> registry.Catalogue:
    faulty = tuple(Implementation(name=run.__name__, run=run, priority=-1) for run in RUNS)
    return registry.collect(
        {
            "double": fake_operator.module(OPERATOR=fake_operator.DOUBLE),
            "double_faulty": fake_operator.module(IMPLEMENTS="double", IMPLEMENTATIONS=faulty),
        }
    )


if __name__ == "__main__":
    found = catalogue()
    registry.catalogue = lambda: found  # type: ignore[assignment]
    measure.EFFORTS["quick"] = Effort(half_width=9.0, max_seconds=0.05)
    code = worker.main()
    os._exit(code)
