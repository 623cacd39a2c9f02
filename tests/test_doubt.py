"""Every flag is set by what it names, on both sides of its threshold, and by nothing else."""

import dataclasses
import random

import pytest

from dsa_bench import doubt
from dsa_bench.record import Case, Record, StageTime, Telemetry, Timing

CEILINGS = {
    "copy_bytes_per_second": 3e12,
    "l2_bytes_per_second": 6e12,
    "bf16_flops_per_second": 800e12,
}
WORKERS = ("launch_bound", "no_graph", "same_inputs", "output_differs")


def samples(seed: int = 1, *, n: int = 200, middle: float = 1e-3, sigma: float = 0.004):
    rng = random.Random(seed)
    return tuple(middle * (1 + rng.gauss(0, sigma)) for _ in range(n))


def telemetry(**changes) -> Telemetry:
    clean = Telemetry(sm_clock_mhz=(1980.0,) * 9 + (1965.0,), sm_clock_max_mhz=1980.0)
    return dataclasses.replace(clean, **changes)


def stage(seconds: float) -> StageTime:
    sizes = {"flops": 1e9, "bytes_read": 1e6, "bytes_written": 1e6}
    return StageTime(name="attend", impl="triton", seconds=seconds, **sizes)


def record(
    *, flags=(), precision="bf16", cost=None, stages=(), lost_workers=0, **changes
) -> Record:
    """A clean record of 1 ms, whose floor is 0.5 ms, and what a test changes in its timing."""
    timing = Timing(
        **{
            "mode": "cold",
            "seconds": samples(),
            "stop": "settled",
            "event_overhead_seconds": 2e-6,
            "hidden_seconds": 10e-6,
            "telemetry": telemetry(),
            **changes,
        }
    )
    case = Case(op="o", impl="i", phase="prefill", seq_len_kv=8, seq_len_q=8, precision=precision)
    return Record(
        case=case,
        status="ok",
        time=timing,
        stages=stages or (stage(0.9e-3),),
        cost=cost or {"flops": 400e9, "bytes_read": 0.5e9, "bytes_written": 0.5e9},
        flags=tuple(flags),
        lost_workers=lost_workers,
    )


def judged(**changes) -> tuple[str, ...]:
    return doubt.judge(record(**changes), CEILINGS)


def around(share: float) -> tuple[float, ...]:
    """A quarter each of four values whose robust spread is `share`, in an order without trend."""
    step = share / 1.4826
    return tuple(1 + s * step for s in (-1.001, 1.001, -0.999, 0.999)) * 25


SETS: dict[str, dict] = {
    "noisy_samples": {"seconds": samples(sigma=0.03)},
    "very_noisy": {"seconds": samples(sigma=0.15)},
    "drift": {"seconds": tuple(v * (1 + 0.0001 * i) for i, v in enumerate(samples()))},
    "two_modes": {"seconds": tuple(v * (1 + 0.05 * (i % 3 == 0)) for i, v in enumerate(samples()))},
    "outliers": {"seconds": tuple(v * (1 + (i % 15 == 0)) for i, v in enumerate(samples()))},
    "not_settled": {"stop": "max_seconds"},
    "clock": {"telemetry": telemetry(sm_clock_mhz=(1980.0,) * 9 + (1500.0,))},
    "launch_bound": {"flags": ("launch_bound",)},
    "no_graph": {"flags": ("no_graph",)},
    "same_inputs": {"flags": ("same_inputs",)},
    "too_short": {"event_overhead_seconds": 0.3e-3},
    "neighbour": {"telemetry": telemetry(neighbours=1)},
    "below_floor": {"cost": {"flops": 1e9, "bytes_read": 3e9, "bytes_written": 1e9}},
    "output_differs": {"flags": ("output_differs",)},
    "hidden_work": {"hidden_seconds": 160e-6},
    "fresh_slower": {"fresh_seconds": (2.5e-3, 2.1e-3)},
    "lost_worker": {"lost_workers": 1},
    "kernels_exceed_call": {"stages": (stage(0.8e-3), stage(0.8e-3))},
}


def test_a_clean_record_has_no_flag():
    assert judged() == ()
    for seed in range(20):
        assert judged(seconds=samples(seed)) == ()


@pytest.mark.parametrize("name", [n for n in doubt.FLAGS if n != "unsteady_processes"])
def test_each_flag_is_set_by_what_it_names_and_by_nothing_else(name):
    assert judged(**SETS[name]) == (name,)


def test_flags_are_the_workers_those_of_samples_and_one_between_processes():
    assert set(doubt.FLAGS) == set(WORKERS) | set(doubt.RULES) | {"unsteady_processes"}
    assert not set(WORKERS) & set(doubt.RULES)


def test_unsteady_processes_lie_further_apart_than_their_samples_explain():
    same = [samples(seed) for seed in range(3)]
    apart = [samples(1), samples(2), samples(3, middle=1.02e-3)]
    assert not doubt.unsteady_processes(same)
    assert doubt.unsteady_processes(apart)
    assert not doubt.unsteady_processes(apart[2:])
    # so noisy that two percent are nothing
    noisy = [samples(1, sigma=0.2), samples(2, sigma=0.2, middle=1.02e-3)]
    assert not doubt.unsteady_processes(noisy)
    # the level moves from visit to visit as much as from process to process
    visits = [tuple(v * (1 + 0.03 * (i // 50 % 2)) for i, v in enumerate(s)) for s in apart]
    assert not doubt.unsteady_processes(visits, [(50,) * 4] * 3)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [(0.0199, ()), (0.0203, ("noisy_samples",)), (0.099, ("noisy_samples",))],
)
def test_threshold_of_noise(spread, expected):
    flags = judged(seconds=around(spread), cost={"flops": 1.0, "bytes_read": 1, "bytes_written": 1})
    assert [f for f in flags if "nois" in f] == list(expected)


def test_very_noisy_is_said_instead_of_noisy():
    flags = judged(seconds=around(0.101))
    assert "very_noisy" in flags
    assert "noisy_samples" not in flags


@pytest.mark.parametrize(("count", "expected"), [(10, False), (11, True)])
def test_threshold_of_outliers(count, expected):
    values = list(samples())
    for i in range(count):
        values[17 * i] *= 3
    assert ("outliers" in judged(seconds=tuple(values))) is expected


@pytest.mark.parametrize(
    ("stop", "expected"), [("settled", ()), ("max_samples", 1), ("max_seconds", 1)]
)
def test_a_cut_short_series_has_not_settled(stop, expected):
    assert judged(stop=stop) == (("not_settled",) if expected else ())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sm_clock_mhz": (2000.0,) * 50 + (1000.0,) * 2}, ()),
        ({"sm_clock_mhz": (2000.0,) * 50 + (1899.0,) * 5}, ("clock",)),
        ({"sm_clock_mhz": (2000.0,) * 50 + (1901.0,) * 5}, ()),
        # always slow is steady
        ({"sm_clock_mhz": (1200.0,) * 20}, ()),
        ({"sm_clock_mhz": ()}, ()),
        # idle, clocks set by the user, power cap, sync boost: no heat and no brake
        ({"throttle_reasons": 0x01 | 0x02 | 0x04 | 0x10}, ()),
        *(({"throttle_reasons": bit}, ("clock",)) for bit in (0x08, 0x20, 0x40, 0x80)),
    ],
)
def test_clock(changes, expected):
    assert judged(telemetry=telemetry(**changes)) == expected


def test_without_telemetry_nothing_is_said_of_the_clock():
    assert judged(telemetry=None) == ()


@pytest.mark.parametrize(
    ("mode", "middle", "overhead", "calls", "expected"),
    [
        ("cold", 5.1e-6, 1.0e-6, 1, False),
        ("cold", 5.1e-6, 1.1e-6, 1, True),
        ("graph", 4.9e-6, 0.5e-6, 1, True),
        ("cpu", 4.9e-6, 0.5e-6, 1, False),
        ("cpu", 4.9e-6, 1.0e-6, 1, True),
        ("sustained", 1.0e-6, 2.0e-6, 11, False),
        ("sustained", 1.0e-6, 2.0e-6, 9, True),
    ],
)
def test_too_short(mode, middle, overhead, calls, expected):
    flags = judged(
        mode=mode,
        seconds=(middle,) * 50,
        event_overhead_seconds=overhead,
        calls_per_sample=calls,
        cost={"flops": 1.0, "bytes_read": 1.0, "bytes_written": 1.0},
        stages=(stage(1e-6),),
    )
    assert flags == (("too_short",) if expected else ())


@pytest.mark.parametrize(
    ("mode", "flops", "moved", "expected"),
    [
        # 1 ms against 0.95 of the floor
        ("cold", 1.0, 3.10e9, False),
        ("cold", 1.0, 3.20e9, True),
        ("graph", 1.0, 3.20e9, True),
        ("cold", 830e9, 1.0, False),
        ("cold", 850e9, 1.0, True),
        # from L2 at twice the rate, from a CPU's cache at any rate
        ("warm", 1.0, 6.2e9, False),
        ("warm", 1.0, 6.4e9, True),
        ("sustained", 1.0, 3.2e9, False),
        ("cpu", 1.0, 100e9, False),
        ("warm", 850e9, 1.0, True),
        ("cpu", 850e9, 1.0, True),
    ],
)
def test_below_floor(mode, flops, moved, expected):
    cost = {"flops": flops, "bytes_read": moved - 0.5, "bytes_written": 0.5}
    if mode == "cpu":
        limits = {"copy_bytes_per_second": 3e12, "fp32_flops_per_second": 800e12}
    else:
        limits = CEILINGS
    flags = doubt.judge(record(mode=mode, cost=cost, seconds=(1e-3,) * 50), limits)
    assert flags == (("below_floor",) if expected else ())


def test_without_a_rate_there_is_no_floor():
    heavy = {"flops": 1e15, "bytes_read": 1e12, "bytes_written": 1e12}
    assert judged(cost=heavy) == ("below_floor",)
    assert doubt.judge(record(cost=heavy), {}) == ()
    assert judged(cost={"flops": 1e15}) == ()
    # the fp8 rate was not measured, and the bf16 one is no bound
    assert judged(cost=heavy, precision="fp8") == ()
    with_fp8 = {**CEILINGS, "fp8_flops_per_second": 1.5e15}
    assert doubt.judge(record(cost=heavy, precision="fp8"), with_fp8) == ("below_floor",)


@pytest.mark.parametrize(
    ("middle", "hidden", "expected"),
    [(1e-4, 149e-6, False), (1e-4, 151e-6, True), (1e-2, 490e-6, False), (1e-2, 510e-6, True)],
)
def test_hidden_work(middle, hidden, expected):
    flags = judged(
        seconds=(middle,) * 50,
        hidden_seconds=hidden,
        cost={"flops": 1.0, "bytes_read": 1.0, "bytes_written": 1.0},
        stages=(stage(1e-6),),
    )
    assert flags == (("hidden_work",) if expected else ())


@pytest.mark.parametrize(
    ("mode", "kernels", "expected"),
    [
        ("cold", 1.26e-3, False),
        ("cold", 1.28e-3, True),
        ("graph", 1.28e-3, True),
        ("warm", 1.28e-3, True),
        ("sustained", 9e-3, False),
        ("cpu", 3.9e-3, False),
        ("cpu", 4.1e-3, True),
    ],
)
def test_kernels_exceed_call(mode, kernels, expected):
    halves = (stage(kernels / 2),) * 2
    flags = judged(mode=mode, seconds=(1e-3,) * 50, stages=halves)
    assert flags == (("kernels_exceed_call",) if expected else ())


def test_what_the_worker_saw_stays_and_what_samples_show_is_worked_out_anew():
    claimed = ("no_graph", "drift", "flag_of_2031", "no_graph", "unsteady_processes", "clock")
    noisy = record(flags=claimed, seconds=samples(sigma=0.03), stop="max_seconds")
    assert doubt.observed(noisy) == ("no_graph", "flag_of_2031")
    flags = doubt.judge(noisy, CEILINGS)
    assert flags == ("no_graph", "flag_of_2031", "noisy_samples", "not_settled")
    assert doubt.judge(dataclasses.replace(noisy, flags=flags), CEILINGS) == flags


def test_without_a_time_only_the_worker_has_seen_something():
    clean = record(flags=("output_differs", "drift"))
    for time in (None, dataclasses.replace(clean.time, seconds=())):
        untimed = dataclasses.replace(clean, time=time)
        assert doubt.judge(untimed, CEILINGS) == ("output_differs",)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("value", [1e-3, 0.0])
def test_a_few_equal_samples_are_judged_without_error(n, value):
    flags = judged(seconds=(value,) * n)
    assert ("below_floor" in flags) is (value == 0)
    assert ("drift" in flags, "two_modes" in flags, "outliers" in flags) == (False,) * 3


@pytest.mark.parametrize(
    ("flags", "severity", "trusted"),
    [
        ((), "", True),
        (("drift",), "noisy", True),
        (("flag_of_2031",), "noisy", True),
        (("drift", "neighbour"), "suspect", False),
        (("very_noisy",), "suspect", False),
        (("output_differs", "drift", "neighbour"), "invalid", False),
    ],
)
def test_the_gravest_flag_counts(flags, severity, trusted):
    assert doubt.severity(flags) == severity
    assert doubt.is_trusted(flags) is trusted


def test_severities_are_those_of_the_protocol():
    by_severity = {
        s: {f.name for f in doubt.FLAGS.values() if f.severity == s} for s in doubt.SEVERITIES
    }
    assert by_severity["invalid"] == {"below_floor", "output_differs"}
    suspect = {"very_noisy", "launch_bound", "neighbour", "hidden_work", "fresh_slower"}
    suspect.add("kernels_exceed_call")
    assert by_severity["suspect"] == suspect
    assert sum(map(len, by_severity.values())) == len(doubt.FLAGS)


def test_explain_has_a_line_a_flag_with_what_to_do():
    text = doubt.explain(("neighbour", "flag_of_2031"))
    assert text.splitlines() == [
        "neighbour: another process computed on the GPU meanwhile "
        "(wait until the GPU is free (nvidia-smi), then measure again)",
        "flag_of_2031: not known to this version (upgrade dsa-bench)",
    ]
    assert doubt.explain(()) == ""


@pytest.mark.parametrize("name", doubt.FLAGS)
def test_texts_fit_into_a_line_of_a_report(name):
    flag = doubt.FLAGS[name]
    assert flag.name == name
    assert 10 < len(flag.rule) < 100
    assert 10 < len(doubt.hint(name)) < 100
    assert not (flag.rule + flag.hint).endswith(".")


def test_one_slow_call_on_fresh_inputs_is_chance():
    assert judged(fresh_seconds=(2.5e-3, 1.0e-3)) == ()
    assert judged(fresh_seconds=(1.9e-3, 1.9e-3)) == ()
    # a few microseconds more are the first touch of new memory
    assert "fresh_slower" not in judged(seconds=(1e-6,) * 40, fresh_seconds=(15e-6,))
    assert "fresh_slower" in judged(seconds=(1e-6,) * 40, fresh_seconds=(25e-6,))
