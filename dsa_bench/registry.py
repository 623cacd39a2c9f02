"""Finds operators and implementations: the folders kernels/ and baselines/ are the registry.

A module with `OPERATOR` defines an operator. A module with `IMPLEMENTATIONS` gives ways to compute
one: a tuple for the operator that its constant `IMPLEMENTS` names, or a dict {operator name: tuple}
for a library that covers several. Every operator has the implementation `reference` besides. A
composed operator has stages; what runs it is a mapping stage -> implementation name.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import dsa_bench.baselines
import dsa_bench.kernels
from dsa_bench import plugins
from dsa_bench.operator import Implementation, Machine, Operator, Run, Unsupported, UsageError
from dsa_bench.plugins import Plugin
from dsa_bench.preset import PRESETS, Preset
from dsa_bench.record import Case

REFERENCE = "reference"
REFERENCE_PRIORITY = -1000
BROKEN_PRIORITY = -2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """What the folders hold."""

    operators: Mapping[str, Operator]
    implementations: Mapping[str, Mapping[str, Implementation]]
    """operator name -> implementation name -> implementation, lowest priority first."""
    plugins: tuple[Plugin, ...] = ()
    """What others brought, broken ones with their problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A case with everything that is needed to run it."""

    operator: Operator
    shape: Any
    run: Run
    parts: Mapping[str, Implementation]
    """stage -> implementation; a plain operator is its own only stage."""
    stage_shapes: Mapping[str, tuple[Any, ...]]
    """stage -> the shapes of its calls; none of a stage that the case does without."""
    reason: str | None
    """Why it cannot run here; None where it can."""


def catalogue() -> Catalogue:
    """The folders and the plug-ins, read once in a process."""
    return _catalogue(plugins.files())


@cache
def _catalogue(files: tuple[Path, ...]) -> Catalogue:
    try:
        return with_plugins(_folders(), plugins.load())
    except plugins.BrokenPlugin as error:
        raise UsageError(str(error)) from error


@cache
def _folders() -> Catalogue:
    return scan((dsa_bench.kernels, dsa_bench.baselines))


def with_plugins(known: Catalogue, found: Iterable[Plugin]) -> Catalogue:
    """The catalogue with what plug-ins offer; a name that is taken is refused.

    UsageError for a file that offers what cannot be; of an entry point it becomes its problem.
    """
    offers = {name: dict(offer) for name, offer in known.implementations.items()}
    listed = []
    for plugin in found:
        problem = plugin.problem or plugins.join(offers, plugin)
        if problem and plugin.is_file:
            raise UsageError(f"--impl-file {plugin.source}: {problem}")
        listed.append(dataclasses.replace(plugin, problem=problem))
    return Catalogue(
        operators=known.operators,
        implementations={
            name: {i.name: i for i in sorted(offer.values(), key=lambda i: i.priority)}
            for name, offer in offers.items()
        },
        plugins=tuple(listed),
    )


def scan(packages: Iterable[ModuleType]) -> Catalogue:
    """Import every module of the packages, in order of name, and collect what they offer."""
    modules, missing = {}, {}
    for package in packages:
        for info in pkgutil.iter_modules(package.__path__):
            full = f"{package.__name__}.{info.name}"
            try:
                modules[info.name] = importlib.import_module(full)
            except ImportError as error:
                # a name of ours that isn't there is our own mistake, no missing library
                if (error.name or "").startswith("dsa_bench"):
                    raise
                missing[info.name] = error
    return collect(modules, missing)


def collect(
    modules: Mapping[str, ModuleType], missing: Mapping[str, ImportError] | None = None
) -> Catalogue:
    """Catalogue of modules by short name; `missing` could not be imported, for that reason."""
    found = [module.OPERATOR for module in modules.values() if hasattr(module, "OPERATOR")]
    operators = {operator.name: operator for operator in found}
    offers: dict[str, list[Implementation]] = {
        name: [_reference(o)] for name, o in operators.items()
    }
    for name, module in modules.items():
        for operator_name, implementations in plugins.offered(name, module).items():
            if operator_name not in offers:
                raise ValueError(f"{name}.py implements {operator_name!r}, which no module defines")
            offers[operator_name].extend(implementations)
    for name, error in (missing or {}).items():
        owner = max((o for o in offers if name.startswith(f"{o}_")), key=len, default=None)
        if owner is None:
            raise error
        offers[owner].append(_broken(name.removeprefix(f"{owner}_"), error))
    return Catalogue(
        operators=operators,
        implementations={
            name: {i.name: i for i in sorted(offer, key=lambda i: i.priority)}
            for name, offer in offers.items()
        },
    )


def _reference(operator: Operator) -> Implementation:
    def run(inputs: Any, /) -> Any:
        return operator.reference(inputs)

    return Implementation(name=REFERENCE, run=run, priority=REFERENCE_PRIORITY)


def _broken(name: str, error: ImportError) -> Implementation:
    """Stands for a module <operator>_<name>.py: the name stays known and says why it cannot run."""
    library = (error.name or "").partition(".")[0]
    install = f"pip install {library}" if isinstance(error, ModuleNotFoundError) else ""
    reason = f"{name} cannot be imported: {error}" + (f" ({install})" if install else "")

    def run(inputs: Any, /) -> Any:
        raise Unsupported(reason)

    return Implementation(
        name=name,
        run=run,
        supports=lambda shape, machine: reason,
        install=install,
        priority=BROKEN_PRIORITY,
    )


def brought_by_files() -> dict[str, tuple[str, ...]]:
    """Operator -> names of the implementations that came with --impl-file."""
    out: dict[str, tuple[str, ...]] = {}
    for plugin in catalogue().plugins:
        if plugin.is_file:
            for name, offered in plugins.offered(plugin.name, plugin.offer).items():
                out[name] = (*out.get(name, ()), *(part.name for part in offered))
    return out


def operators() -> dict[str, Operator]:
    """All operators by name."""
    return dict(catalogue().operators)


def operator(name: str) -> Operator:
    """The operator of this name, or a UsageError that says which there are."""
    known = catalogue().operators
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"unknown operator {name!r}; {hint}")
    return known[name]


def implementations(op_name: str) -> dict[str, Implementation]:
    """Implementations of an operator by name, lowest priority first, `reference` among them."""
    operator(op_name)
    return dict(catalogue().implementations[op_name])


def implementation(op_name: str, name: str) -> Implementation:
    """The implementation of this name, or a UsageError that lists the known ones."""
    known = implementations(op_name)
    if name not in known:
        raise UsageError(f"unknown implementation {name!r} of {op_name}; known: {', '.join(known)}")
    return known[name]


def preset_of(case: Case) -> Preset:
    """The preset that a case names."""
    if case.preset not in PRESETS:
        raise UsageError(f"unknown preset {case.preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[case.preset]


def resolve(case: Case, machine: Machine, *, workspace_bytes: int | None = None) -> Resolved:
    """Everything needed to run a case; raises Unsupported where its shape makes no sense.

    `workspace_bytes` replaces the default of a shape that has such a field.
    """
    owner = operator(case.op)
    if case.phase not in owner.phases:
        lacking = f"{case.op} has no phase {case.phase} (it has {', '.join(owner.phases)})"
        raise Unsupported(owner.instead.get(case.phase, lacking))
    shape = owner.shape(case, preset_of(case))
    if workspace_bytes is not None and hasattr(shape, "workspace_bytes"):
        shape = dataclasses.replace(shape, workspace_bytes=workspace_bytes)
    names = _stage_names(owner, case)
    if names is None:
        part = implementation(case.op, str(case.impl))
        parts, run, shapes = {case.op: part}, part.run, {case.op: (shape,)}
    else:
        parts = {stage: implementation(stage, name) for stage, name in names.items()}
        assert owner.compose is not None and owner.stage_shapes is not None
        run, shapes = owner.compose(case.phase, parts), dict(owner.stage_shapes(shape))
    return Resolved(
        operator=owner,
        shape=shape,
        run=run,
        parts=parts,
        stage_shapes=shapes,
        reason=_obstacle(parts, shapes, machine),
    )


def _stage_names(owner: Operator, case: Case) -> dict[str, str] | None:
    """stage -> implementation name; None where one implementation does the whole operator.

    A single name that isn't an implementation of the composed operator itself stands for all its
    stages.
    """
    if owner.stages is None:
        if not isinstance(case.impl, str):
            raise UsageError(f"{case.op} has no stages; name one implementation (--impl triton)")
        return None
    stages = owner.stages(case.phase)
    if isinstance(case.impl, str):
        whole = case.impl in implementations(case.op)
        return None if whole else dict.fromkeys(stages, case.impl)
    if set(case.impl) != set(stages):
        raise UsageError(
            f"{case.op} in phase {case.phase} has the stages {', '.join(stages)},"
            f" got implementations of {', '.join(case.impl) or 'none'}"
        )
    return {stage: case.impl[stage] for stage in stages}


def _obstacle(
    parts: Mapping[str, Implementation], shapes: Mapping[str, Any], machine: Machine
) -> str | None:
    for stage, part in parts.items():
        reason = _refusal(part, shapes[stage], machine)
        if reason is not None:
            place = f"{stage}: " if len(parts) > 1 else ""
            return f"{place}{reason}"
    return None


def _refusal(part: Implementation, shapes: Iterable[Any], machine: Machine) -> str | None:
    """Why it cannot do one of these calls, or None."""
    reasons = (part.supports(shape, machine) for shape in shapes)
    return next((reason for reason in reasons if reason is not None), None)


def available(op_name: str, case: Case, preset: Preset, machine: Machine) -> list[str]:
    """Names that can run this case, best first; `reference` only where nothing else can.

    Raises Unsupported where the shape of the case makes no sense. For a composed operator ask for
    its stages.
    """
    return _available(op_name, (operator(op_name).shape(case, preset),), machine)


def obstacles(op_name: str, case: Case, preset: Preset, machine: Machine) -> list[str]:
    """Why only `reference` can run this case, or a stage of it: what the other implementations say,
    the best first. Empty where something else can."""
    owner = operator(op_name)
    shape = owner.shape(case, preset)
    parts = {op_name: (shape,)} if owner.stage_shapes is None else owner.stage_shapes(shape)
    return [
        str(_refusal(part, shapes, machine))
        for stage, shapes in parts.items()
        if _available(stage, shapes, machine) == [REFERENCE]
        for name, part in reversed(implementations(stage).items())
        if name != REFERENCE
    ]


def _available(op_name: str, shapes: tuple[Any, ...], machine: Machine) -> list[str]:
    able = [
        name
        for name, part in reversed(implementations(op_name).items())
        if _refusal(part, shapes, machine) is None
    ]
    return [name for name in able if name != REFERENCE] or able


def _first(stage: str, shapes: tuple[Any, ...], machine: Machine) -> str:
    """The best for these calls; a stage without a call is named as one with a call would be."""
    if not shapes and machine.device == "cpu":
        return REFERENCE
    return _available(stage, shapes, machine)[0]


def choose(op_name: str, case: Case, preset: Preset, machine: Machine) -> str | dict[str, str]:
    """What `auto` means: the supported implementation of highest priority, for each stage.

    A case whose shape makes no sense gets `reference`: it will be skipped with the reason, whatever
    its name.
    """
    owner = operator(op_name)
    stages = owner.stages(case.phase) if owner.stages is not None else ()
    try:
        shape = owner.shape(case, preset)
        shapes = owner.stage_shapes(shape) if owner.stage_shapes is not None else {}
    except Unsupported:
        return dict.fromkeys(stages, REFERENCE) if stages else REFERENCE
    if stages:
        return {stage: _first(stage, shapes[stage], machine) for stage in stages}
    return _available(op_name, (shape,), machine)[0]


def list_rows(machine: Machine) -> list[dict[str, Any]]:
    """Rows of `dsa-bench list`: operator, summary, phases, implementation, available, reason,
    library, version, install.

    Whether an implementation can run is asked for a common shape: L 8192, topk 2048, as the preset
    v3.2 has it, in any phase and precision of the operator. `install` is what to type where its
    library is missing, an empty text where it isn't or none is needed.
    """
    rows = []
    for name, owner in operators().items():
        for part in reversed(implementations(name).values()):
            reason = _listed_reason(owner, part, machine)
            library = part.library
            missing = library is not None and library.found() is None
            rows.append(
                {
                    "operator": name,
                    "summary": owner.summary,
                    "phases": list(owner.phases),
                    "implementation": part.name,
                    "available": reason is None,
                    "reason": reason or "",
                    "library": library.title if library is not None else "",
                    "version": (library.version() or "") if library is not None else "",
                    "install": library.install if library is not None and missing else "",
                }
            )
    return rows


def _listed_reason(owner: Operator, part: Implementation, machine: Machine) -> str | None:
    """None if it takes the common shape in some phase and precision, else the first reason."""
    reasons = [
        _common_reason(owner, part, machine, phase, precision)
        for phase in owner.phases
        for precision in (owner.precisions if "precision" in owner.axes else ("bf16",))
    ]
    return None if None in reasons else reasons[0]


def _common_reason(
    owner: Operator, part: Implementation, machine: Machine, phase: str, precision: str
) -> str | None:
    case = Case(
        op=owner.name,
        impl=part.name,
        phase=phase,
        seq_len_kv=8192,
        seq_len_q=4096 if phase == "prefill" else 1,
        topk=2048 if "topk" in owner.axes else None,
        precision=precision,
    )
    try:
        shape = owner.shape(case, PRESETS[case.preset])
    except Unsupported as error:
        return str(error)
    return _obstacle({owner.name: part}, {owner.name: (shape,)}, machine)
