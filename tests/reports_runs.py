"""Believable runs for the tests of the reports, made from formulas, not measured."""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsa_bench.record import Case, KernelTime, MemoryUse, Record, StageTime, Telemetry, Timing

LENGTHS = tuple(1024 * n for n in (4, 8, 16, 32, 64, 128))
HEADER = {
    "schema": "dsa-bench/run@1",
    "started": "2026-11-23T18:05:00+00:00",
    "argv": ["dsa-bench", "run"],
    "machine": {
        "name": "NVIDIA H100 80GB HBM3",
        "device": "cuda",
        "capability": [9, 0],
        "num_sms": 132,
        "memory_bytes": 85_899_345_920,
        "l2_bytes": 52_428_800,
        "driver": "580.65.06",
        "cpu": "Intel Xeon Platinum 8480C",
    },
    "versions": {"dsa_bench": "0.1.0", "torch": "2.11.0+cu130", "triton": "3.6.0"},
    "ceilings": {
        "copy_bytes_per_second": 3.0e12,
        "bf16_flops_per_second": 786e12,
        "fp8_flops_per_second": 1.5e15,
    },
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "options": {"gpu_hour_usd": 2.0, "effort": "standard"},
}
PREFILL_IMPL = {"indexer": "triton", "topk": "gluon", "sparse_prefill": "gluon"}
DECODE_IMPL = {"paged_indexer": "triton", "topk": "gluon", "sparse_decode": "gluon"}
ENDED = 1795457100.0 + 115 * 60
"""Unix time of an ending 115 minutes after `started`."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '"><svg onload=alert(4)>',
    "<!-- --!><b>",
    "javascript:alert(5)",
    '=HYPERLINK("http://evil.example/?x")',
    "+cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "-2+3",
    "{{ 7*7 }}${7*7}#{7*7}",
    "a|b\nc\r\nd\te\u2028f\u2029g",
    "\x1b[31mred\x1b[0m\x07\x00",
    "[link](http://evil.example) ![i](http://evil.example/i.png) `code` **bold**",
    "\u202egnp.exe",
    "$$ \\frac{1}{0 $ _^",
)


@dataclass
class FakeRun:
    """What dsa_bench.store.read_run gives, without a folder."""

    path: Path
    header: dict[str, Any]
    records: list[Record]
    torn: bool = False
    findings: tuple[Any, ...] = ()


@dataclass
class Noise:
    """Samples round a time, the same for the same seed."""

    seed: int = 1
    relative: float = 0.006
    samples: int = 24
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def timing(self, seconds: float, mode: str = "cold") -> Timing:
        drawn = (seconds * (1 + self.rng.gauss(0, self.relative)) for _ in range(self.samples))
        return Timing(mode=mode, seconds=tuple(drawn), stop="settled")


def ok(case: Case, seconds: float | tuple[float, ...], **fields: Any) -> Record:
    """An `ok` record with these samples."""
    samples = seconds if isinstance(seconds, tuple) else (seconds,) * 8
    time = Timing(mode="cold", seconds=samples, stop="settled")
    command = f"dsa-bench run --op {case.op} --phase {case.phase} -L {case.seq_len_kv}"
    return replace(Record(case=case, status="ok", time=time, reproduce=command), **fields)


def h100_run(seed: int = 1) -> FakeRun:
    """Prefill and decode as an H100 might run them, with some cases that failed."""
    noise = Noise(seed=seed)
    records = [*_prefill(noise), *_decode(noise), *_endings()]
    return FakeRun(path=Path("results/h100"), header=HEADER, records=records)


def hostile_run() -> FakeRun:
    """Every text that a run folder holds is an attack on the page that shows it."""
    records = []
    for i, text in enumerate(HOSTILE):
        impl = {"indexer": text, "topk": text, "sparse_prefill": text}
        case = Case(
            op="dsa" if i % 2 else "dense_attention",
            impl=impl if i % 2 else text,
            phase="prefill",
            seq_len_kv=8192 * (1 + i // 2),
            seq_len_q=4096,
            topk=2048 if i % 2 else None,
            precision=text if i % 5 == 0 else "bf16",
        )
        stage = StageTime(
            name=text, impl=text, seconds=1e-3, flops=1e12, bytes_read=1e9, bytes_written=1e8
        )
        kernel = KernelTime(name=text, stage=text, calls=1.0, seconds=1e-3)
        record = ok(case, 0.001 * (i + 1), stages=(stage,), kernels=(kernel,), flags=(text,))
        record = _with_time(record, mode=text, stop=text, telemetry=Telemetry(power_w=(1.0,)))
        records.append(replace(record, reproduce=text, reason=text, phases={text: 1.0}))
        failed = replace(case, seed=i + 1, impl=text, op=text)
        failure = Record(case=failed, status="failed", reason=text, reproduce=text)
        records.append(replace(failure, log=(text, text), lost_workers=1, flags=(text,)))
    machine = {"name": HOSTILE[0], "device": HOSTILE[1], "driver": HOSTILE[2]}
    header = HEADER | {"machine": machine, "argv": list(HOSTILE), "started": HOSTILE[2]}
    header |= {"versions": {text: text for text in HOSTILE}}
    return FakeRun(path=Path(HOSTILE[3]), header=header, records=records)


def doubtful_run() -> FakeRun:
    """A run with every kind of doubt, three processes a case, two modes, energy, phases and logs.

    At 8K the suspect `cheat` is faster than the honest dense attention; at 32K DSA is suspect; at
    64K its second process failed; 16K is noisy in one process.
    """
    records = []
    for i, length in enumerate((4096, 8192, 16384, 32768, 65536)):
        sparse = Case(op="dsa", impl="gluon", phase="prefill", seq_len_kv=length,
                      seq_len_q=4096, topk=2048)  # fmt: skip
        dense = replace(sparse, op="dense_attention", impl="flash_attn_3", topk=None)
        warm = {"mode": "warm"}
        for case, seconds in (
            (sparse, 2e-3), (dense, 1e-3 * 2**i),
            (replace(sparse, **warm), 1.8e-3), (replace(dense, **warm), 0.9e-3 * 2**i),
        ):  # fmt: skip
            records += [_timed(case, seconds, replicate) for replicate in range(3)]
    cheat = Case(op="dense_attention", impl="cheat", phase="prefill", seq_len_kv=8192,
                 seq_len_q=4096)  # fmt: skip
    records.append(replace(ok(cheat, 1e-6), flags=("below_floor", "made_up_flag")))
    sustained = replace(cheat, impl="flash_attn_3", mode="sustained", seq_len_kv=16384)
    read = Telemetry(energy_joules=600.0, energy_calls=100)
    records.append(_with_time(ok(sustained, 4e-3), mode="sustained", telemetry=read))
    records = [_doubted(record) for record in records]
    header = HEADER | {"started": "2026-11-23T18:05:00+00:00"}
    return FakeRun(path=Path("results/doubtful"), header=header, records=records)


def _timed(case: Case, seconds: float, replicate: int) -> Record:
    """One process of three, with all that a timing may say."""
    samples = tuple(seconds * (1 + 1e-4 * ((7 * i + replicate) % 5)) for i in range(100))
    read = Telemetry(
        seconds=(0.0, 0.1), sm_clock_mhz=(1980.0, 1965.0), power_w=(640.0, 660.0),
        temperature_c=(61.0, 63.0), sm_clock_max_mhz=1980.0, throttle_reasons=0x04 | 0x40,
    )  # fmt: skip
    mode = "cold" if case.mode == "auto" else case.mode
    record = _with_time(
        ok(case, samples, replicate=replicate), mode=mode, telemetry=read, blocks=(50, 50),
        beside=("x",), input_sets=3, spin_seconds=2e-4, flush_bytes=2**27,
        event_overhead_seconds=2.1e-6,
    )  # fmt: skip
    return replace(record, phases={"measure": 60.0, "gate": 20.0, "recheck": 10.0}, ended=ENDED)


def _doubted(record: Record) -> Record:
    case = record.case
    if (case.op, case.mode) != ("dsa", "auto"):
        return record
    if case.seq_len_kv == 32768:
        return replace(record, flags=("launch_bound",))
    if case.seq_len_kv == 16384 and record.replicate == 1:
        return replace(record, flags=("drift",))
    if case.seq_len_kv == 65536 and record.replicate == 1:
        log = ("CUDA error: an illegal memory access", "<b>worker ended</b>")
        return Record(case=case, status="failed", reason="worker died with signal 6",
                      replicate=1, log=log, lost_workers=2)  # fmt: skip
    return record


def _with_time(record: Record, **fields: Any) -> Record:
    assert record.time is not None
    return replace(record, time=replace(record.time, **fields))


def _record(
    case: Case, noise: Noise, stages: tuple[StageTime, ...], memory: MemoryUse, rest: float
) -> Record:
    total = sum(s.seconds for s in stages) + rest
    cost = {
        "flops": sum(s.flops for s in stages),
        "bytes_read": sum(s.bytes_read for s in stages),
        "bytes_written": sum(s.bytes_written for s in stages),
    }
    kernels = tuple(
        KernelTime(name=f"_{s.name}_kernel", stage=s.name, calls=1.0, seconds=s.seconds)
        for s in stages
    )
    gate: dict[str, Any] = {"checks": [], "rows_checked": 64, "rows": 4096}
    if case.op == "dsa":
        gate["dense_error"] = {
            "relative_l2": 0.35 * (case.topk or 1) ** -0.5 * (case.seq_len_kv / 4096) ** 0.3
        }
    topk = f" -k {case.topk}" if case.topk else ""
    return Record(
        case=case,
        status="ok",
        time=noise.timing(total),
        stages=stages,
        kernels=kernels,
        cost=cost,
        memory=memory,
        gate=gate,
        reproduce=f"dsa-bench run --op {case.op} --phase {case.phase} -L {case.seq_len_kv}{topk}"
        f" --precision {case.precision} --batch {case.batch_size} --impl {case.impl_label}",
    )


def _stage(
    name: str, impl: str, flops: float, read: float, written: float, rate: float, bandwidth: float
) -> StageTime:
    seconds = max(flops / rate, (read + written) / bandwidth)
    return StageTime(
        name=name, impl=impl, seconds=seconds, flops=flops, bytes_read=read, bytes_written=written
    )


def _memory(inputs: float, outputs: float, workspace: float) -> MemoryUse:
    total = int(inputs + outputs + workspace)
    return MemoryUse(
        peak_bytes=total,
        input_bytes=int(inputs),
        output_bytes=int(outputs),
        workspace_bytes=int(workspace),
        predicted_bytes=int(total * 1.02),
    )


def _prefill(noise: Noise) -> list[Record]:
    records = []
    q = 4096
    for length in LENGTHS:
        pairs = q * (length - q) + q * (q + 1) / 2
        for topk in (512, 1024, 2048):
            case = Case(
                op="dsa", impl=PREFILL_IMPL, phase="prefill", seq_len_kv=length, seq_len_q=q,
                topk=topk, precision="fp8",
            )  # fmt: skip
            sparse = 278_528.0 * q * min(topk, length) * (0.75 if length == q else 1.0)
            stages = (
                _stage(
                    "indexer",
                    "triton",
                    16_384 * pairs,
                    length * 132 + q * 8448,
                    4 * pairs,
                    1.0e15,
                    2.8e12,
                ),
                _stage("topk", "gluon", 0, 4 * pairs, 4.0 * topk * q, 1e15, 1.5e12),
                _stage(
                    "sparse_prefill",
                    "gluon",
                    sparse,
                    length * 1152 + q * 147_456,
                    q * 131_072,
                    5.9e14,
                    3e12,
                ),
            )
            memory = _memory(
                length * 1284 + q * 155_904, q * (131_072 + 512), min(4 * pairs, 512 * 2**20)
            )
            records.append(_record(case, noise, stages, memory, 40e-6))
        for impl, precision, rate in (
            ("flash_attn_3", "bf16", 6.9e14),
            ("sdpa_cudnn", "bf16", 5.9e14),
            ("triton", "bf16", 4.6e14),
        ):
            case = Case(
                op="dense_attention", impl=impl, phase="prefill", seq_len_kv=length, seq_len_q=q,
                precision=precision,
            )  # fmt: skip
            stage = _stage(
                "dense_attention",
                impl,
                81_920 * pairs,
                128 * 640.0 * length + q * 49_152,
                q * 32_768,
                rate,
                3e12,
            )
            memory = _memory(128 * 640.0 * length + q * 49_152, q * 32_768, 0)
            records.append(_record(case, noise, (stage,), memory, 10e-6))
    return records


def _decode(noise: Noise) -> list[Record]:
    records = []
    for length in LENGTHS:
        for batch in (1, 32, 128):
            case = Case(
                op="dsa", impl=DECODE_IMPL, phase="decode", seq_len_kv=length, seq_len_q=1,
                topk=2048, precision="fp8", batch_size=batch,
            )  # fmt: skip
            scale = min(1.0, 0.12 + batch / 40)
            stages = (
                _stage(
                    "paged_indexer",
                    "triton",
                    16_384.0 * batch * length,
                    132.0 * batch * length + 5e6 * scale,
                    4.0 * batch * length,
                    9e14,
                    2.6e12 * scale,
                ),
                _stage(
                    "topk",
                    "gluon",
                    0,
                    4.0 * batch * length + 2e6,
                    8192.0 * batch,
                    1e15,
                    4e11 * scale,
                ),
                _stage(
                    "sparse_decode",
                    "gluon",
                    278_528.0 * batch * 2048,
                    batch * 2048 * 656.0,
                    batch * 262_144.0,
                    2.8e14 * scale,
                    2e12,
                ),
            )
            memory = _memory(batch * length * 788.0, batch * 131_072, batch * length * 4 + 2**24)
            records.append(_record(case, noise, stages, memory, 9e-6))
            for impl, rate in (("flash_attn_3", 2.5e12), ("triton", 1.7e12)):
                case = Case(
                    op="dense_attention", impl=impl, phase="decode", seq_len_kv=length, seq_len_q=1,
                    batch_size=batch,
                )  # fmt: skip
                if batch == 128 and length == LENGTHS[-1] and impl == "triton":
                    records.append(
                        Record(case=case, status="oom", reason="needs 86.1 GiB, 78.2 GiB are free")
                    )
                    continue
                stage = _stage(
                    "dense_attention",
                    impl,
                    278_528.0 * batch * length,
                    1152.0 * batch * length + 4e6,
                    batch * 131_072.0,
                    6.1e14,
                    rate * scale,
                )
                memory = _memory(batch * length * 1152.0, batch * 131_072, 2**22)
                record = _record(case, noise, (stage,), memory, 6e-6)
                if batch == 1 and length == LENGTHS[1]:
                    record = replace(record, flags=("noisy_samples",))
                records.append(record)
    return records


def _endings() -> list[Record]:
    def case(impl: str, length: int, topk: int | None = None) -> Case:
        op = "dsa" if topk else "dense_attention"
        return Case(op=op, impl=impl, phase="prefill", seq_len_kv=length, seq_len_q=4096, topk=topk)

    endings = [
        ("flash_mla", 4096, None, "skipped", "flash_mla is not installed (pip install flash_mla)"),
        ("triton", 1024, 2048, "skipped", "topk=2048 is larger than seq_len_kv=1024"),
        ("gluon", 131072, 1024, "failed", "worker died with signal 11 (segmentation fault)"),
        ("gluon", 65536, 1024, "wrong", "out: cos 0.0213, limit 0.0001"),
        ("triton", 65536, 512, "timeout", "no answer after 120 s"),
    ]
    return [
        Record(
            case=case(impl, length, topk),
            status=status,
            reason=reason,
            reproduce=f"dsa-bench run -L {length} --impl {impl}",
        )
        for impl, length, topk, status, reason in endings
    ]
