"""Runs for the tests of `dsa-bench compare`: one topk case for each length, timed as one says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa_bench.record import Case, Record, Telemetry, Timing
from dsa_bench.reports.compare import Comparison, compare
from tests.reports_runs import HEADER, FakeRun

FIVE = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Logarithms of five processes in units of u: standard error u · sqrt(2.5 / 5), 4 degrees."""
H200 = HEADER["machine"] | {"name": "NVIDIA H200"}


def case(number: int = 0, **fields: Any) -> Case:
    length = 4096 * (1 + number)
    given = {"op": "topk", "impl": "triton", "phase": "decode", "seq_len_kv": length}
    return Case(**(given | {"seq_len_q": 1} | fields))


def timed(of: Case, seconds: float | Sequence[float], replicate: int = 0, **fields: Any) -> Record:
    """An `ok` record; of one number nine equal samples."""
    samples = (seconds,) * 9 if isinstance(seconds, float) else tuple(seconds)
    clock = fields.pop("clock_mhz", None)
    read = None if clock is None else Telemetry(seconds=(0.0,), sm_clock_mhz=(clock,))
    mode = fields.pop("mode", "graph")
    time = Timing(mode=mode, seconds=samples, stop="settled", telemetry=read)
    return Record(case=of, status="ok", time=time, replicate=replicate, **fields)


def five(of: Case, seconds: float, unit: float, **fields: Any) -> list[Record]:
    """Five processes round this time: geometric mean and median are `seconds`."""
    return [timed(of, seconds * math.exp(x * unit), i, **fields) for i, x in enumerate(FIVE)]


def run(name: str, records: Sequence[Record], **header: Any) -> FakeRun:
    return FakeRun(path=Path(name), header={**HEADER, **header}, records=list(records))


def compared(base: Sequence[Record], new: Sequence[Record], **options: Any) -> Comparison:
    return compare(run("base", base), run("new", new), **options)


def verdicts(found: Comparison) -> dict[int, str]:
    """Number of the case -> verdict."""
    return {row.case.seq_len_kv // 4096 - 1: row.verdict for row in found.rows}
