"""Which cases share a request, and in which order requests are made."""

from dsa_bench.record import Case
from dsa_bench.schedule import MAX_GROUP, groups
from dsa_bench.sweep import Planned


def item(op: str = "dsa", impl: str = "triton", reason: str = "", **axes: object) -> Planned:
    base = {"phase": "decode", "seq_len_kv": 4096, "seq_len_q": 1, "batch_size": 32}
    return Planned(case=Case(op=op, impl=impl, **(base | axes)), reason=reason)  # type: ignore[arg-type]


def shapes(planned: list[Planned], **options: object) -> list[list[Planned]]:
    return [list(group.items) for group in groups(planned, **options)]  # type: ignore[arg-type]


def test_whole_attention_competes_at_one_shape() -> None:
    a, b = item(topk=512), item(topk=2048, precision="fp8")
    dense, longer = item(op="dense_attention"), item(seq_len_kv=8192)
    warm, alone = item(mode="warm"), item(op="topk")
    assert shapes([a, b, dense, longer, warm, alone]) == [[a, b, dense], [longer], [warm], [alone]]
    ragged = [item(lengths="spread"), item(op="dense_attention", lengths="spread")]
    assert shapes([a, *ragged, dense]) == [[a, dense], ragged]


def test_implementations_of_an_operator_compete() -> None:
    gluon, triton, other = item("topk", "gluon"), item("topk", "triton"), item("indexer", "gluon")
    assert shapes([gluon, other, triton]) == [[gluon, triton], [other]]


def test_skipped_cases_and_other_verbs_stand_alone() -> None:
    a, b, skipped = item(topk=512), item(topk=1024), item(topk=9999, reason="too many")
    assert shapes([a, skipped, b]) == [[a, b], [skipped]]
    assert shapes([a, skipped, b], together=False) == [[a], [skipped], [b]]


def test_large_groups_are_cut() -> None:
    many = [item(topk=1 + i) for i in range(MAX_GROUP + 3)]
    assert [len(group) for group in shapes(many)] == [MAX_GROUP, 3]


def test_replicates_hold_the_same_cases_in_an_order_of_their_own() -> None:
    planned = [item(topk=k, seq_len_kv=n) for n in range(4096, 4106) for k in (512, 1024, 2048)]
    made = groups(planned, replicates=3, seed=7)
    by_replicate = [[i for g in made if g.replicate == r for i in g.items] for r in range(3)]
    assert [g.replicate for g in made] == [0] * 10 + [1] * 10 + [2] * 10
    for items in by_replicate:
        assert {i.case.key for i in items} == {i.case.key for i in planned}
    assert by_replicate[0] != by_replicate[1] != by_replicate[2] != planned
    # a resume must find the same order
    assert groups(planned, replicates=3, seed=7) == made
    assert groups(planned, replicates=3, seed=8) != made


def test_one_replicate_keeps_the_order_of_the_plan() -> None:
    planned = [item(seq_len_kv=n) for n in range(4096, 4106)]
    assert [g.items[0] for g in groups(planned, seed=7)] == planned
