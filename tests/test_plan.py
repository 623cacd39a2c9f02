"""Which implementations a selection takes, and which cases are skipped before they run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dsa_bench import plan, registry, sweep
from dsa_bench.contest import DENSE_BESIDE
from dsa_bench.library import Library
from dsa_bench.operator import Implementation, Machine, Operator, Unsupported, UsageError
from dsa_bench.preset import PRESETS
from dsa_bench.sweep import Layer, Planned
from tests.test_sweep import operator

MACHINE = Machine(device="cpu", name="test")
H100 = Machine(
    device="cuda",
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    num_sms=132,
    memory_bytes=80 * 2**30,
    l2_bytes=50 * 2**20,
)
STAGES = ("indexer", "topk")


def shape(case: Any, preset: Any) -> Any:
    if case.seq_len_q > case.seq_len_kv:
        raise Unsupported("the chunk is longer than L")
    return case


def composed(name: str, *axes: str) -> Operator:
    return dataclasses.replace(
        operator(name, *axes),
        shape=shape,
        stages=lambda phase: STAGES,
        stage_shapes=lambda shape: dict.fromkeys(STAGES, (shape,)),
    )


def offer(**priorities: int) -> Mapping[str, Implementation]:
    """Implementations by name, lowest priority first; a negative priority runs nowhere here."""
    made = [
        Implementation(
            name=name,
            run=lambda inputs: inputs,
            priority=priority,
            supports=lambda s, m, p=priority: "not here" if p < 0 and p != -1000 else None,  # type: ignore[misc]
        )
        for name, priority in priorities.items()
    ]
    return {i.name: i for i in sorted(made, key=lambda i: i.priority)}


Plan = Callable[..., tuple[Planned, ...]]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans a table of settings over a catalogue of fakes."""
    operators = {
        "dsa": composed("dsa", "topk"),
        "dense_attention": dataclasses.replace(operator("dense_attention"), shape=shape),
        "indexer": dataclasses.replace(operator("indexer"), shape=shape),
        "topk": dataclasses.replace(operator("topk", "topk"), shape=shape),
        "chunks": operator("chunks", phases=("prefill",)),
    }
    fake = registry.Catalogue(
        operators=operators,
        implementations={
            "dsa": offer(reference=-1000),
            "dense_attention": offer(reference=-1000, sdpa=1, triton=2, flash_attn_3=-1),
            "indexer": offer(reference=-1000, triton=1, gluon=2),
            "topk": offer(reference=-1000, gluon=1),
            "chunks": offer(reference=-1000),
        },
    )
    monkeypatch.setattr(registry, "catalogue", lambda: fake)

    def make(**table: Any) -> tuple[Planned, ...]:
        base = {"phase": "decode", "seq_len_kv": "4k"}
        layer = Layer(source="", table=base | table)
        return plan.plan(sweep.resolve("test", layer), MACHINE)

    return make


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """All foreign libraries are here."""
    monkeypatch.setattr(Library, "obstacle", lambda self: None)
    monkeypatch.setattr(Library, "found", lambda self: "sgl_kernel")


def impls(items: tuple[Planned, ...], op: str) -> list[Any]:
    return [item.case.impl for item in items if item.case.op == op and not item.reason]


def test_auto_is_the_best_of_each_stage_and_the_dense_attentions_that_run(planned: Plan) -> None:
    items = planned()
    assert impls(items, "dsa") == [{"indexer": "gluon", "topk": "gluon"}]
    assert impls(items, "dense_attention") == ["triton", "sdpa"]


def test_auto_takes_the_first_four_opponents_and_those_of_files(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = offer(reference=-1000, a=1, b=2, c=3, d=4, e=5, f=6)
    monkeypatch.setitem(registry.catalogue().implementations, "dense_attention", many)
    assert impls(planned(op="dense_attention"), "dense_attention") == ["f", "e", "d", "c"]
    monkeypatch.setattr(registry, "brought_by_files", lambda: {"dense_attention": ("a", "zzz")})
    assert impls(planned(op="dense_attention"), "dense_attention") == ["f", "e", "d", "c", "a"]
    everything = planned(op="dense_attention", impl="all")
    assert set(impls(everything, "dense_attention")) == set("abcdef")


def test_all_is_every_implementation_even_one_that_cannot_run(planned: Plan) -> None:
    items = planned(impl="all", op="dense_attention,indexer,dsa")
    assert set(impls(items, "dense_attention")) == {"triton", "sdpa", "flash_attn_3"}
    assert set(impls(items, "indexer")) == {"triton", "gluon"}
    assert impls(items, "dsa") == [{"indexer": "gluon", "topk": "gluon"}]


@pytest.mark.parametrize(
    ("impl", "dsa", "dense"),
    [
        ("gluon", [{"indexer": "gluon", "topk": "gluon"}], []),
        ("reference", [{"indexer": "reference", "topk": "reference"}], ["reference"]),
        ("sdpa", [], ["sdpa"]),
        ("dense_attention=flash_attn_3", [{"indexer": "gluon", "topk": "gluon"}], ["flash_attn_3"]),
        ("indexer=triton", [{"indexer": "triton", "topk": "gluon"}], ["triton", "sdpa"]),
        ("reference,indexer=triton", [{"indexer": "triton", "topk": "reference"}], ["reference"]),
        (
            "indexer=triton,indexer=gluon,dense_attention=sdpa",
            [{"indexer": "triton", "topk": "gluon"}, {"indexer": "gluon", "topk": "gluon"}],
            ["sdpa"],
        ),
    ],
)
def test_selection_of_implementations(
    planned: Plan, impl: str, dsa: list[Any], dense: list[str]
) -> None:
    items = planned(impl=impl)
    assert impls(items, "dsa") == dsa
    assert impls(items, "dense_attention") == dense


def test_name_that_a_stage_lacks_skips_with_the_reason(planned: Plan) -> None:
    (item,) = planned(impl="triton", op="dsa")
    assert item.reason == "topk has no implementation triton; known: reference, gluon"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"op": "dsaa"}, "unknown operator 'dsaa'; did you mean 'dsa'"),
        ({"impl": "gluoon"}, "implementation 'gluoon' is unknown; did you mean 'gluon'?"),
        ({"impl": "topk=triton"}, "implementation of topk 'triton' is unknown; known: gluon, ref"),
        ({"impl": "topkk=gluon"}, "operator 'topkk' is unknown; did you mean 'topk'?"),
        ({"impl": "sdpa", "op": "topk"}, "implementation 'sdpa' is unknown"),
    ],
)
def test_unknown_names_are_one_sentence(planned: Plan, table: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(**table)


def test_selection_without_a_case_is_refused(planned: Plan) -> None:
    with pytest.raises(UsageError, match=r"the selection makes no case: chunks in decode .*list"):
        planned(op="chunks")


def test_cases_that_make_no_sense_are_planned_as_skipped(planned: Plan) -> None:
    items = planned(seq_len_kv="1k", topk="512,2k", op="topk", phase="prefill,decode")
    reasons = {(item.case.phase, item.case.topk): item.reason for item in items}
    assert reasons == {
        ("prefill", 512): "the chunk is longer than L",
        ("prefill", 2048): "topk 2048 is more than the 1024 keys there are",
        ("decode", 512): "",
        ("decode", 2048): "topk 2048 is more than the 1024 keys there are",
    }


def test_skipped_dense_attention_is_planned_once(planned: Plan) -> None:
    items = planned(op="dense_attention", phase="prefill", seq_len_kv="1k")
    assert [(item.case.impl, item.reason) for item in items] == [
        ("reference", "the chunk is longer than L")
    ]


def test_planned_survives_json(planned: Plan) -> None:
    for item in planned():
        assert Planned.from_json(item.to_json()) == item


DECODE_SWEEPS = [name for name in sweep.shipped() if name.startswith("decode")]


@pytest.mark.parametrize("name", ["v3.2", "prefill", *DECODE_SWEEPS, "accuracy"])
def test_gpu_sweeps_skip_nothing_on_an_h100(name: str) -> None:
    items = plan.plan(sweep.resolve(name, sweep.load(name)), H100)
    # dense attention in fp8 needs a library, which need not be here
    assert {item.reason for item in items if item.case.op not in DENSE_BESIDE} == {""}
    assert len(items) > 10


@pytest.mark.parametrize("name", DECODE_SWEEPS)
def test_a_decode_sweep_takes_less_than_ten_minutes(name: str, libraries: None) -> None:
    """With every library there; a case takes about 1.5 s on an H100."""
    items = plan.plan(sweep.resolve(name, sweep.load(name)), H100)
    assert len(items) * 1.5 < 600
    for item in items:
        owner = registry.operator(item.case.op)
        shape = owner.shape(item.case, PRESETS[item.case.preset])
        assert owner.memory(shape).total_bytes < 70 * 2**30


def test_opponents_of_a_ragged_batch_are_those_that_take_one(libraries: None) -> None:
    wanted = {
        "equal": {"flash_attn_3", "flash_mla", "gluon", "flashinfer"},
        "one-long": {"flash_attn_3", "flash_mla", "triton", "flashinfer"},
    }
    table = {"lengths": list(wanted), "phase": "decode", "op": "dense_attention"}
    items = plan.plan(sweep.resolve("test", Layer(source="", table=table)), H100)
    for lengths, names in wanted.items():
        assert {i.case.impl for i in items if i.case.lengths == lengths} == names
    table |= {"impl": "all", "lengths": "one-long"}
    items = plan.plan(sweep.resolve("test", Layer(source="", table=table)), H100)
    (gluon,) = {i.case.impl: i for i in items if i.case.impl == "gluon"}.values()
    assert registry.resolve(gluon.case, H100).reason == (
        "gluon dense_attention decodes sequences of one length: its programs all walk equally many"
        " keys (use triton, or --lengths equal)"
    )


@pytest.mark.parametrize("name", ["cpu", "smoke"])
def test_cpu_sweeps_skip_nothing_on_a_cpu(name: str) -> None:
    items = plan.plan(sweep.resolve(name, sweep.load(name)), MACHINE)
    assert {item.reason for item in items} == {""}
    assert {item.case.op for item in items} == {"dsa", "dense_attention"}


FP8 = "dense_attention_fp8"


def plan_fp8(machine: Machine, wanted: str = FP8, **table: Any) -> list[Planned]:
    """The cases of an operator in fp8, dense attention, of a run at L 4K."""
    layer = Layer(source="", table={"seq_len_kv": "4k", "phase": "prefill"} | table)
    items = plan.plan(sweep.resolve("test", layer), machine)
    return [item for item in items if item.case.op == wanted]


@pytest.mark.parametrize("precision", ["fp8", "bf16,fp8"])
def test_a_run_that_names_no_operator_takes_fp8_dense_beside_fp8(precision: str) -> None:
    items = plan_fp8(MACHINE, precision=precision)
    assert [(item.case.precision, item.reason) for item in items] == [("fp8", "")]
    assert plan_fp8(MACHINE, precision="bf16") == []
    assert plan_fp8(MACHINE, precision=precision, op="dsa,dense_attention") == []


def test_fp8_dense_in_bf16_is_skipped_with_the_reason() -> None:
    (item,) = plan_fp8(MACHINE, precision="bf16", op=FP8)
    assert "computes in fp8, got precision bf16" in item.reason


def test_the_reference_of_fp8_dense_is_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str | None) -> None:
        found = registry.catalogue()
        foreign = {
            name: dataclasses.replace(part, supports=lambda s, m: reason)
            for name, part in found.implementations[FP8].items()
            if name != registry.REFERENCE
        }
        parts = {registry.REFERENCE: found.implementations[FP8][registry.REFERENCE]} | foreign
        fake = dataclasses.replace(found, implementations={**found.implementations, FP8: parts})
        monkeypatch.setattr(registry, "catalogue", lambda: fake)

    refuse("it is not installed (pip install it)")
    (item,) = plan_fp8(H100, precision="fp8")
    assert item.reason.startswith("only the reference can do this here: it is not installed (pip")
    (item,) = plan_fp8(H100, precision="fp8", op=FP8, impl="reference")
    assert (item.case.impl, item.reason) == ("reference", "")
    refuse(None)
    items = plan_fp8(H100, precision="fp8")
    assert {item.reason for item in items} == {""}
    assert {item.case.impl for item in items} == {"flash_attn_3", "flash_mla"}


DSA_FP8 = "dsa_fp8"


def test_a_run_that_names_no_operator_takes_dsa_fp8_at_its_largest_k() -> None:
    table = {"topk": "512,2k,1k", "precision": "bf16,fp8"}
    items = plan_fp8(H100, DSA_FP8, **table)
    assert [(item.case.topk, item.case.precision) for item in items] == [(2048, "fp8")]
    assert [(item.case.impl, item.reason) for item in items] == [
        ({"indexer": "gluon", "topk": "gluon", "sparse_prefill_fp8": "gluon"}, "")
    ]
    assert len(plan_fp8(H100, "dsa", **table)) == 6
    # the largest is that of the phase, and dense attention in fp8 has none
    assert [item.case.topk for item in plan_fp8(H100, FP8, **table)] == [None]
    assert plan_fp8(H100, DSA_FP8, precision="bf16") == []
    assert plan_fp8(H100, DSA_FP8, phase="decode", precision="fp8") == []
    named = plan_fp8(H100, DSA_FP8, op=f"dsa,dense_attention,{DSA_FP8}", **table)
    assert [item.case.topk for item in named] == [512, 2048, 1024]


def test_dsa_fp8_follows_the_implementations_that_are_named_for_its_stages() -> None:
    table = {"precision": "fp8", "impl": "indexer=triton,sparse_prefill=triton"}
    (item,) = plan_fp8(H100, DSA_FP8, **table)
    assert item.case.impl == {
        "indexer": "triton", "topk": "gluon", "sparse_prefill_fp8": "gluon"
    }  # fmt: skip


def test_dsa_fp8_by_reference_is_not_run_on_a_gpu() -> None:
    l40 = dataclasses.replace(H100, name="L40", capability=(8, 9))
    (item,) = plan_fp8(l40, DSA_FP8, precision="fp8")
    assert item.reason == (
        "only the reference can do this here: gluon sparse_prefill_fp8 needs a Hopper GPU (sm_90),"
        " this is L40"
    )
    (item,) = plan_fp8(l40, DSA_FP8, op=DSA_FP8, precision="fp8", impl="reference")
    assert item.reason == ""
    (item,) = plan_fp8(MACHINE, DSA_FP8, precision="fp8")
    assert (set(item.case.impl.values()), item.reason) == ({"reference"}, "")  # type: ignore[union-attr]
    # what the case itself lacks comes first
    (item,) = plan_fp8(l40, DSA_FP8, precision="fp8", topk="8k")
    assert item.reason == "topk 8192 is more than the 4096 keys there are"


def test_dsa_fp8_says_what_to_take_where_it_cannot() -> None:
    (item,) = plan_fp8(H100, DSA_FP8, op=DSA_FP8, precision="bf16")
    assert "computes in fp8, got precision bf16 (add --precision fp8, or take dsa)" in item.reason
    with pytest.raises(UsageError, match=r"in fp8 already \(pass --op dsa --precision fp8\)$"):
        plan_fp8(H100, DSA_FP8, op=DSA_FP8, precision="fp8", phase="decode")
    # beside an operator that has the phase it makes no case, as every operator
    assert plan_fp8(H100, DSA_FP8, op=f"dsa,{DSA_FP8}", precision="fp8", phase="decode") == []
