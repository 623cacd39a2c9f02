"""From a sweep to the cases that a run takes: what computes each, and which cannot be made."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsa_bench import measure, registry, sweep
from dsa_bench.contest import BESIDE, DENSE_BESIDE
from dsa_bench.operator import Machine, Operator, Unsupported, UsageError
from dsa_bench.preset import PRESETS
from dsa_bench.record import Case
from dsa_bench.sweep import FLAGS, Planned, Sweep, unknown

AUTO = "auto"
ALL = "all"
# the report's "dense" is the fastest that ran, so `auto` takes several of them
OPPONENTS = frozenset({"dense_attention"}) | DENSE_BESIDE
CONTENDERS = 4
"""How many of those `auto` takes, by priority. On an H100 the ones behind them are 2 to 5 times as
slow as the fastest, and took more than half of a run; `--impl all` takes them too."""

Impl = str | dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What --impl asks for."""

    names: tuple[str, ...]
    """Plain items, in order: `auto`, `all`, or the name of an implementation."""
    by_operator: Mapping[str, tuple[str, ...]]
    """operator or stage -> its implementations, from `operator=name`."""


def plan(wanted: Sweep, machine: Machine) -> tuple[Planned, ...]:
    """Every case of the sweep with its implementation, each once, in the order of the run."""
    if ALL in wanted.ops:
        wanted = dataclasses.replace(wanted, ops=tuple(registry.operators()))
    operators = {name: registry.operator(name) for name in wanted.ops}
    selection = select(wanted.impls, operators)
    planned: dict[str, Planned] = {}
    for case in sweep.cases(wanted, operators):
        operator = operators[case.op]
        reason = _obstacle(case, operator) or measure.unsuited(case.mode, machine.device)
        for impl, missing in _implementations(case, operator, selection, machine):
            item = Planned(case=with_impl(case, impl), reason=reason or missing)
            planned.setdefault(item.case.key, item)
    if not planned:
        raise UsageError(_no_case(wanted, operators))
    return tuple(planned.values())


def _no_case(wanted: Sweep, operators: Mapping[str, Operator]) -> str:
    """Why a selection makes no case."""
    for operator in operators.values():
        if set(wanted.phases) <= set(operator.instead):
            return operator.instead[next(iter(wanted.phases))]
    return (
        f"the selection makes no case: {', '.join(wanted.ops)} in {', '.join(wanted.phases)}"
        f" with --impl {','.join(wanted.impls)} (see dsa-bench list)"
    )


def with_impl(case: Case, impl: Impl) -> Case:
    """The same case computed by `impl`."""
    return Case.from_json(case.to_json() | {"impl": impl})


def select(items: tuple[str, ...], operators: Mapping[str, Operator]) -> Selection:
    """Parse the items of --impl and check that every name is known somewhere in the selection."""
    offers = {name: set(registry.implementations(name)) for name in _parts(operators)}
    names: list[str] = []
    by_operator: dict[str, tuple[str, ...]] = {}
    for item in items:
        owner, separator, name = item.rpartition("=")
        if not separator:
            names.append(name)
        elif owner not in offers:
            raise unknown(f"{FLAGS['impl']} {item}: operator", owner, sorted(offers))
        else:
            by_operator[owner] = (*by_operator.get(owner, ()), name)
        known = offers[owner] if separator else set().union(*offers.values())
        if name not in (AUTO, ALL, *known):
            where = f"implementation of {owner}" if separator else "implementation"
            raise unknown(where, name, sorted(known))
    return Selection(names=tuple(names) or (AUTO,), by_operator=by_operator)


def _parts(operators: Mapping[str, Operator]) -> dict[str, None]:
    """Names of the selected operators and of all their stages, in order."""
    parts: dict[str, None] = {}
    for name, operator in operators.items():
        parts[name] = None
        for phase in operator.phases if operator.stages else ():
            parts |= dict.fromkeys(operator.stages(phase) if operator.stages else ())
    return parts


def _obstacle(case: Case, operator: Operator) -> str:
    """Why the case makes no sense whatever computes it, or an empty text."""
    if case.topk is not None and case.topk > case.seq_len_kv:
        return f"topk {case.topk} is more than the {case.seq_len_kv} keys there are"
    try:
        operator.shape(case, PRESETS[case.preset])
    except Unsupported as error:
        return str(error)
    return ""


def _implementations(
    case: Case, operator: Operator, selection: Selection, machine: Machine
) -> Iterator[tuple[Impl, str]]:
    """(implementation, why it is missing or an empty text) for each that the selection asks for."""
    if operator.stages is not None:
        yield from _compositions(case, operator.stages(case.phase), selection, machine)
        return
    known = registry.implementations(case.op)
    for name in selection.by_operator.get(case.op, selection.names):
        if name == ALL:
            yield from ((each, "") for each in known if each != registry.REFERENCE)
        elif name == AUTO:
            yield from _auto(case, machine)
        elif name in known:
            yield name, ""


def _auto(case: Case, machine: Machine) -> list[tuple[str, str]]:
    preset = PRESETS[case.preset]
    if case.op not in OPPONENTS:
        return [(str(registry.choose(case.op, case, preset, machine)), "")]
    try:
        names = registry.available(case.op, case, preset, machine)
    except Unsupported:
        names = [registry.REFERENCE]
    if names == [registry.REFERENCE]:
        return [(registry.REFERENCE, _why_not_by_reference(case, machine))]
    brought = registry.brought_by_files().get(case.op, ())
    taken = [name for i, name in enumerate(names) if i < CONTENDERS or name in brought]
    return [(name, "") for name in taken]


def _why_not_by_reference(case: Case, machine: Machine) -> str:
    """Why `auto` leaves out what only a reference can do, or an empty text where it doesn't.

    Nobody computes attention that way on a GPU, and it would take hours.
    """
    if case.op not in BESIDE or machine.device != "cuda":
        return ""
    try:
        why = registry.obstacles(case.op, case, PRESETS[case.preset], machine)
    except Unsupported:
        return ""
    return f"only the reference can do this here: {'; '.join(why)}"


def _compositions(
    case: Case, stages: tuple[str, ...], selection: Selection, machine: Machine
) -> Iterator[tuple[Impl, str]]:
    known = {stage: registry.implementations(stage) for stage in stages}
    auto = registry.choose(case.op, case, PRESETS[case.preset], machine)
    for name in selection.by_operator.get(case.op, selection.names):
        # every implementation of a stage is a case of that stage; the composition takes the best
        name = AUTO if name == ALL else name
        # a name that no stage has is meant for another operator of the selection
        if name != AUTO and not any(name in offer for offer in known.values()):
            continue
        wanted = [selection.by_operator.get(stage, (name,)) for stage in stages]
        for combination in itertools.product(*wanted):
            chosen = dict(zip(stages, combination, strict=True))
            lacking = [s for s, n in chosen.items() if n != AUTO and n not in known[s]]
            if lacking:
                stage = lacking[0]
                offer = ", ".join(known[stage])
                yield chosen, f"{stage} has no implementation {chosen[stage]}; known: {offer}"
            else:
                made = {s: _stage_auto(auto, s) if n == AUTO else n for s, n in chosen.items()}
                by_auto = {made[stage] for stage, n in chosen.items() if n == AUTO}
                is_slow = registry.REFERENCE in by_auto
                yield made, _why_not_by_reference(case, machine) if is_slow else ""


def _stage_auto(auto: str | Mapping[str, str], stage: str) -> str:
    return auto if isinstance(auto, str) else auto[stage]
