"""The grammar of axes, sweep files and their layers, the product, and the command of one case."""

import dataclasses
import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_bench import sweep
from dsa_bench.operator import Cost, Memory, Operator, UsageError
from dsa_bench.record import LENGTH_KINDS, Case
from dsa_bench.sizes import format_size, parse_size, parse_sizes
from dsa_bench.sweep import Axes, Layer, Sweep

SIZES = st.integers(min_value=1, max_value=2**30)


def operator(name: str, *axes: str, phases: tuple[str, ...] = ("prefill", "decode")) -> Operator:
    return Operator(
        name=name,
        summary="",
        phases=phases,
        axes=frozenset(axes),
        shape=lambda case, preset: case,
        make_inputs=lambda shape, *, seed, device: None,
        reference=lambda inputs, *, rows=None: None,
        check=lambda inputs, outputs, *, rows=None: (),
        cost=lambda shape: Cost(flops=0, bytes_read=0, bytes_written=0),
        memory=lambda shape: Memory(input_bytes=0, output_bytes=0),
        num_rows=lambda shape: 1,
    )


DSA = operator("dsa", "topk", "precision", "batch_size", "lengths", "num_heads")
LAYER = operator("layer", "tensor_parallel", "inputs", "weights", "num_heads")
DENSE = operator("dense_attention", "batch_size", "num_heads")
INDEXER = operator("indexer", phases=("prefill",))


def make(**table: Any) -> Sweep:
    return sweep.resolve("test", Layer(source="", table=table))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", (512,)),
        ("4k", (4096,)),
        ("1M", (1024**2,)),
        ("4k:128k:x2", (4096, 8192, 16384, 32768, 65536, 131072)),
        ("1:30:x3", (1, 3, 9, 27)),
        ("1k:2k:+512", (1024, 1536, 2048)),
        ("8:20:+5", (8, 13, 18)),
        ("3:3:x2", (3,)),
        ("64, 1k:4k:x2 ,2k", (64, 1024, 2048, 4096)),
    ],
)
def test_parse_sizes_values(text: str, expected: tuple[int, ...]) -> None:
    assert parse_sizes("-L", text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "4q", "4 k k", "1.5k", "1k,,2k", "4k:8k", "4k:8k:2", "4k:8k:x", "4k:8k:x1",
     "4k:8k:+0", "8k:4k:x2", "1:2:3:x2", "1:1m:+1", "²", "k"],
)  # fmt: skip
def test_parse_sizes_malformed(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-L must be sizes like 4k,8k or a range") as caught:
        parse_sizes("-L", text)
    assert "\n" not in str(caught.value)


@given(SIZES)
def test_parse_size_reads_what_format_size_writes(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(start=SIZES, extra=st.integers(0, 2**30), factor=st.integers(2, 9))
def test_factor_range_is_geometric_and_ends_within_its_stop(
    start: int, extra: int, factor: int
) -> None:
    values = parse_sizes("-L", f"{start}:{start + extra}:x{factor}")
    assert values[0] == start
    assert all(b == a * factor for a, b in itertools.pairwise(values))
    assert values[-1] <= start + extra < values[-1] * factor


@given(start=SIZES, count=st.integers(1, 50), step=st.integers(1, 5000), rest=st.integers(0, 4999))
def test_step_range_counts_its_steps(start: int, count: int, step: int, rest: int) -> None:
    stop = start + (count - 1) * step + rest % step
    values = parse_sizes("-L", f"{start}:{stop}:+{step}")
    assert values == tuple(range(start, start + count * step, step))


@given(st.text(max_size=20))
def test_parse_sizes_gives_values_or_one_sentence(text: str) -> None:
    try:
        values = parse_sizes("-k", text)
    except UsageError as error:
        assert str(error).startswith("-k must be sizes")
    else:
        assert all(value >= 1 for value in values)


def test_layers_later_win_and_phase_tables_stand_over_their_file() -> None:
    file = Layer(
        source="a.toml",
        table={"seq_len_kv": "4k,8k", "topk": [512, "2k"], "decode": {"topk": 128}, "seed": 3},
    )
    resolved = sweep.resolve("a", file, Layer(source="", table={"seq_len_kv": "16k"}))
    assert resolved.phases["prefill"].seq_len_kv == (16384,)
    assert resolved.phases["prefill"].topk == (512, 2048)
    assert resolved.phases["decode"].topk == (128,)
    assert resolved.seed == 3
    over = sweep.resolve("a", file, Layer(source="", table={"topk": "64"}))
    assert over.phases["decode"].topk == (64,)
    assert over.phases["prefill"].topk == (64,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"seqlen_kv": 8}, "a.toml: key 'seqlen_kv' is unknown; did you mean 'seq_len_kv'?"),
        ({"decode": {"topkk": 8}}, "a.toml: axis 'decode.topkk' is unknown; did you mean"),
        ({"decode": 3}, r"a.toml: \[decode\] must be a table of axes, got 3"),
        ({"topk": True}, "a.toml: topk must be sizes like"),
        ({"topk": [1.5]}, "a.toml: topk must be sizes like"),
        ({"topk": []}, "a.toml: topk must be sizes like"),
        ({"seq_len_kv": "4k:8k"}, r"a.toml: seq_len_kv must be .*, got '4k:8k' \('4k:8k' needs"),
        ({"tensor_parallel": "a"}, "a.toml: tensor_parallel must be sizes like"),
        ({"precision": "fp32"}, "a.toml: precision 'fp32' is unknown; known: bf16, fp8"),
        ({"inputs": "neddle"}, "a.toml: inputs 'neddle' is unknown; did you mean 'needle'?"),
        ({"inputs": "overlap=2"}, "a.toml: inputs overlap=R takes R from 0 to 1, got 'overlap=2'"),
        ({"inputs": "no.safetensors"}, "a.toml: inputs: there is no file no.safetensors"),
        ({"weights": "no.safetensors:3"}, "a.toml: weights: there is no file no.safetensors "),
        ({"weights": "w.bin"}, "a.toml: weights must name a .safetensors file, got 'w.bin'"),
        ({"weights": ["a"]}, "a.toml: weights must be FILE or FILE:LAYER, got"),
        ({"lengths": "equla"}, "a.toml: lengths 'equla' is unknown; did you mean 'equal'?"),
        ({"lengths": "1k"}, "a.toml: lengths '1k' is unknown; known: equal, spread, one-long"),
        ({"decode": {"lengths": 3}}, "a.toml: lengths must be names like a,b, got 3"),
        ({"precision": "fp16"}, "a.toml: precision 'fp16' is unknown; did you mean 'bf16'?"),
        ({"phase": "prefil"}, "a.toml: phase 'prefil' is unknown; did you mean 'prefill'?"),
        ({"preset": "llama"}, "a.toml: preset 'llama' is unknown; known: v3.2, v3.2-cpu"),
        ({"op": ""}, "a.toml: op must be names like a,b, got ''"),
        ({"op": 7}, "a.toml: op must be names like a,b, got 7"),
        ({"seed": -1}, "a.toml: seed must be a whole number from 0 on, got -1"),
    ],
)
def test_file_mistakes_are_one_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sweep.resolve("a", Layer(source="a.toml", table=table))


def test_command_line_mistakes_name_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--batch must be sizes like"):
        make(batch_size="many")


def test_load_finds_files_and_says_what_is_wrong(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('topk = "1k"\n')
    bad.write_text("topk = \n")
    assert sweep.load(str(good)).table == {"topk": "1k"}
    with pytest.raises(UsageError, match=r"bad.toml: isn't valid TOML: .*line 1"):
        sweep.load(str(bad))
    with pytest.raises(UsageError, match=r"none.toml doesn't exist \(shipped sweeps: "):
        sweep.load(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"sweep 'smoek' is unknown; did you mean 'smoke'\?"):
        sweep.load("smoek")


@pytest.mark.parametrize("name", sorted(sweep.shipped()))
def test_shipped_sweeps_resolve_and_have_a_summary(name: str) -> None:
    assert sweep.summary(sweep.shipped()[name])
    assert sweep.resolve(name, sweep.load(name)).phases


def test_cases_are_the_product_without_the_axes_an_operator_lacks() -> None:
    wanted = make(
        op="dsa,dense_attention", phase="decode", seq_len_kv="4k,8k", topk="512,2k",
        precision="bf16,fp8", batch_size="1,32", num_heads="128,16",
    )  # fmt: skip
    found = sweep.cases(wanted, {"dsa": DSA, "dense_attention": DENSE})
    dsa = [case for case in found if case.op == "dsa"]
    dense = [case for case in found if case.op == "dense_attention"]
    assert len(dsa) == 2 * 2 * 2 * 2 * 2
    assert len(dense) == 2 * 2 * 2
    assert {(case.topk, case.precision) for case in dense} == {(None, "bf16")}
    assert len({case.key for case in found}) == len(found)


def test_cases_take_the_presets_heads_and_one_sequence_in_prefill() -> None:
    wanted = make(op="dsa", seq_len_kv="4k", preset="v3.2-cpu", batch_size="2,4")
    found = sweep.cases(wanted, {"dsa": DSA})
    assert [(c.phase, c.batch_size, c.seq_len_q, c.num_heads) for c in found] == [
        ("prefill", 1, 4096, 16),
        ("decode", 2, 1, 16),
        ("decode", 4, 1, 16),
    ]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my file.safetensors").touch()
    return "my file.safetensors"


def test_cases_have_ranks_inputs_and_weights_where_the_operator_has(file: str) -> None:
    wanted = make(
        op="layer,dsa", phase="prefill", seq_len_kv="4k", tensor_parallel="1,8",
        inputs=f"random,{file}", weights=f"{file}:3",
    )  # fmt: skip
    found = sweep.cases(wanted, {"layer": LAYER, "dsa": DSA})
    assert [(c.op, c.tensor_parallel, c.inputs, c.weights) for c in found] == [
        ("layer", 1, "random", "my file.safetensors:3"),
        ("layer", 1, "my file.safetensors", "my file.safetensors:3"),
        ("layer", 8, "random", "my file.safetensors:3"),
        ("layer", 8, "my file.safetensors", "my file.safetensors:3"),
        ("dsa", 1, "random", ""),
    ]


def test_lengths_are_those_of_decode_where_the_operator_has_them() -> None:
    wanted = make(
        op="dsa,dense_attention", seq_len_kv="4k", batch_size="2,4", lengths="equal,one-long"
    )
    found = sweep.cases(wanted, {"dsa": DSA, "dense_attention": DENSE})
    assert [(c.op, c.phase, c.batch_size, c.lengths) for c in found] == [
        ("dsa", "prefill", 1, "equal"),
        ("dense_attention", "prefill", 1, "equal"),
        ("dsa", "decode", 2, "equal"),
        ("dsa", "decode", 2, "one-long"),
        ("dsa", "decode", 4, "equal"),
        ("dsa", "decode", 4, "one-long"),
        # this one knows of no lengths
        ("dense_attention", "decode", 2, "equal"),
        ("dense_attention", "decode", 4, "equal"),
    ]


def test_an_overlap_has_one_spelling() -> None:
    wanted = make(
        op="layer", phase="prefill", seq_len_kv="4k", inputs="overlap=0.90,overlap=.9,overlap=-0"
    )
    found = [c.inputs for c in sweep.cases(wanted, {"layer": LAYER})]
    assert found == ["overlap=0.9", "overlap=0"]


def test_ranks_divide_the_heads() -> None:
    plain = make(op="dsa", phase="prefill", seq_len_kv="4k", tensor_parallel="3")
    assert [case.tensor_parallel for case in sweep.cases(plain, {"dsa": DSA})] == [1]
    wanted = dataclasses.replace(plain, ops=("layer", "dsa"))
    with pytest.raises(UsageError, match=r"^--tp must divide the 128 heads, got 3$"):
        sweep.cases(wanted, {"layer": LAYER, "dsa": DSA})


def test_reproduce_names_later_axes_where_they_are_not_at_their_default(file: str) -> None:
    plain = Case(op="layer", impl="triton", phase="prefill", seq_len_kv=4096, seq_len_q=4096)
    words = shlex.split(sweep.reproduce(plain, device="cpu"))
    assert not {"--mode", "--tp", "--inputs", "--weights", "--lengths"} & set(words)
    case = dataclasses.replace(
        plain, tensor_parallel=8, inputs=file, weights=f"{file}:3", mode="warm", lengths="spread"
    )
    words = shlex.split(sweep.reproduce(case, device="cpu"))
    later = {"--mode": "warm", "--tp": "8", "--inputs": file, "--weights": f"{file}:3"}
    later["--lengths"] = "spread"
    assert {flag: words[words.index(flag) + 1] for flag in later} == later


def test_cases_leave_out_phases_an_operator_lacks() -> None:
    found = sweep.cases(make(op="indexer", seq_len_kv="4k"), {"indexer": INDEXER})
    assert [case.phase for case in found] == ["prefill"]


def test_sweep_json_holds_the_resolved_values() -> None:
    plain = make(phase="decode", seq_len_kv="4k").to_json()
    axes = Axes(seq_len_kv=(4096,), seq_len_q=(1,), topk=(2048,), precision=("bf16",),
                batch_size=(32,))  # fmt: skip
    assert plain["phases"] == {"decode": dataclasses.asdict(axes)}
    assert (plain["preset"], plain["impls"]) == ("v3.2", ("auto",))


CASES = st.builds(
    Case,
    op=st.just("dsa"),
    impl=st.sampled_from(["triton", {"indexer": "triton", "topk": "gluon"}]),
    phase=st.sampled_from(["prefill", "decode"]),
    seq_len_kv=SIZES,
    seq_len_q=SIZES,
    topk=SIZES,
    precision=st.sampled_from(["bf16", "fp8"]),
    batch_size=SIZES,
    num_heads=SIZES,
    preset=st.sampled_from(["v3.2", "v3.2-cpu"]),
    seed=st.integers(0, 9),
    lengths=st.sampled_from(LENGTH_KINDS),
)


@given(CASES)
def test_reproduce_is_a_command_for_the_same_case(case: Case) -> None:
    """Parsing is done here by hand; test_cli gives the command to the real parser."""
    if case.phase == "prefill":
        case = dataclasses.replace(case, batch_size=1, lengths="equal")
    program, verb, *words = shlex.split(sweep.reproduce(case, device="cpu"))
    assert (program, verb) == ("dsa-bench", "run")
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values.pop("--device") == "cpu"
    keys = {flag: key for key, flag in sweep.FLAGS.items()}
    table: dict[str, Any] = {keys[flag]: value for flag, value in values.items()}
    impl = table.pop("impl")
    table["seed"] = int(table.get("seed", 0))
    (found,) = sweep.cases(make(**table), {"dsa": DSA})
    assert dataclasses.replace(found, impl=case.impl) == case
    spelled = case.impl if isinstance(case.impl, str) else "indexer=triton,topk=gluon"
    assert impl == spelled
