"""What a person wants measured: axes and their grammar, sweep files (TOML), the product of axes.

A sweep is built from layers, later ones winning: defaults, file, command line. A file may hold
tables `[prefill]` and `[decode]` with axes for that phase alone. Sizes are written as in `sizes`.
Nothing here knows torch.
"""

import dataclasses
import difflib
import itertools
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsa_bench.contest import CONTESTS
from dsa_bench.operator import Operator, UsageError
from dsa_bench.preset import PRESETS
from dsa_bench.record import (
    AUTO_MODE,
    EQUAL_LENGTHS,
    INPUT_KINDS,
    LATER_FIELDS,
    LENGTH_KINDS,
    MODES,
    OVERLAP,
    PHASES,
    RANDOM_INPUTS,
    Case,
    overlap_of,
    split_weights,
)
from dsa_bench.sizes import SIZES_HINT, format_size, parse_sizes

PRECISIONS = ("bf16", "fp8")
SIZE_AXES = ("seq_len_kv", "topk", "batch_size", "seq_len_q", "num_heads", "tensor_parallel")
AXES = (*SIZE_AXES, "lengths", "precision", "mode", "inputs", "weights")
TENSORS_SUFFIX = ".safetensors"
SWEEP_FOLDER = Path(__file__).parent / "sweeps"

FLAGS = {
    "op": "--op",
    "impl": "--impl",
    "phase": "--phase",
    "seq_len_kv": "-L",
    "topk": "-k",
    "precision": "--precision",
    "batch_size": "--batch",
    "lengths": "--lengths",
    "seq_len_q": "--seq-len-q",
    "num_heads": "--heads",
    "tensor_parallel": "--tp",
    "inputs": "--inputs",
    "weights": "--weights",
    "preset": "--preset",
    "seed": "--seed",
    "mode": "--mode",
}
"""Key of a sweep file -> the flag that overrides it."""

DEFAULTS: Mapping[str, Any] = {
    "op": "dsa,dense_attention",
    "impl": "auto",
    "phase": "prefill,decode",
    "seq_len_kv": "4k:128k:x2",
    "topk": 2048,
    "precision": "bf16",
    "preset": "v3.2",
    "seed": 0,
    "mode": AUTO_MODE,
    "prefill": {"seq_len_q": "4k"},
    "decode": {"seq_len_q": 1, "batch_size": 32},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """Values of the swept axes in one phase."""

    seq_len_kv: tuple[int, ...]
    seq_len_q: tuple[int, ...]
    topk: tuple[int, ...]
    precision: tuple[str, ...]
    batch_size: tuple[int, ...] = (1,)
    """Decode alone; a prefill case is a chunk of one sequence."""
    num_heads: tuple[int, ...] = ()
    """Empty: as many as the preset has."""
    mode: tuple[str, ...] = (AUTO_MODE,)
    tensor_parallel: tuple[int, ...] = (1,)
    inputs: tuple[str, ...] = (RANDOM_INPUTS,)
    """Kinds, and paths of files with captured inputs."""
    weights: str = ""
    """FILE or FILE:LAYER; empty: made up."""
    lengths: tuple[str, ...] = (EQUAL_LENGTHS,)
    """Decode alone, as the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One source of settings; its errors begin with its name (empty: the command line)."""

    source: str
    table: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Resolved values of one sweep; the product of its axes are the cases."""

    name: str
    ops: tuple[str, ...]
    impls: tuple[str, ...]
    """Items of --impl: `auto`, `name`, or `operator=name`."""
    phases: Mapping[str, Axes]
    preset: str
    seed: int
    added: tuple[str, ...] = ()
    """Those of `ops` that nobody named: what is shown beside the others, at the largest k alone."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One case of a run."""

    case: Case
    reason: str = ""
    """Why it will be skipped; empty: it runs."""

    def to_json(self) -> dict[str, Any]:
        return {"case": self.case.to_json(), "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Planned":
        return cls(case=Case.from_json(data["case"]), reason=data.get("reason", ""))


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of the known ones, with the nearest of them."""
    listed = tuple(known)
    near = difflib.get_close_matches(name, listed, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(listed)}"
    return UsageError(f"{what} '{name}' is unknown; {hint}")


def _words(name: str, value: Any) -> tuple[str, ...]:
    """Names from `a,b` or a list of names."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UsageError(f"{name} must be names like a,b, got {value!r}")
    words = tuple(dict.fromkeys(word.strip() for word in items))
    if not all(words) or not words:
        raise UsageError(f"{name} must be names like a,b, got {value!r}")
    return words


def _choices(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    words = _words(name, value)
    for word in words:
        if word not in known:
            raise unknown(name, word, known)
    return words


def _inputs(name: str, value: Any) -> tuple[str, ...]:
    """Kinds of made-up inputs, and paths of files that exist; `overlap=0.90` as `overlap=0.9`."""
    words = []
    for word in _words(name, value):
        if word.endswith(TENSORS_SUFFIX):
            _expect_file(name, word)
        elif word.startswith(OVERLAP):
            share = overlap_of(word)
            if share is None:
                raise UsageError(f"{name} {OVERLAP}R takes R from 0 to 1, got {word!r}")
            word = f"{OVERLAP}{abs(share):.12g}"
        elif word not in INPUT_KINDS:
            raise unknown(name, word, (*INPUT_KINDS, f"{OVERLAP}0.9", f"FILE{TENSORS_SUFFIX}"))
        words.append(word)
    return tuple(dict.fromkeys(words))


def _weights(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name} must be FILE or FILE:LAYER, got {value!r}")
    path, _ = split_weights(value.strip())
    if not path.endswith(TENSORS_SUFFIX):
        raise UsageError(f"{name} must name a {TENSORS_SUFFIX} file, got {value!r}")
    _expect_file(name, path)
    return value.strip()


def _expect_file(name: str, path: str) -> None:
    if not Path(path).is_file():
        raise UsageError(f"{name}: there is no file {path} (give the path from this folder)")


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """An axis from a file (integer, text, or a list of both) or from the command line (text)."""
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(i, bool) or not isinstance(i, int | str) for i in items):
        raise UsageError(f"{name} must be {SIZES_HINT}, got {value!r}")
    return parse_sizes(name, ",".join(str(item) for item in items))


def _parse(name: str, key: str, value: Any) -> Any:
    """The value of one key of a layer; `name` is what an error calls it."""
    if key in SIZE_AXES:
        return _sizes(name, value)
    if key == "precision":
        return _choices(name, value, PRECISIONS)
    if key == "mode":
        return _choices(name, value, (AUTO_MODE, *MODES))
    if key == "phase":
        return _choices(name, value, PHASES)
    if key == "lengths":
        return _choices(name, value, LENGTH_KINDS)
    if key in ("op", "impl"):
        return _words(name, value)
    if key == "inputs":
        return _inputs(name, value)
    if key == "weights":
        return _weights(name, value)
    if key == "preset":
        return _choices(name, value, tuple(PRESETS))[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{name} must be a whole number from 0 on, got {value!r}")
    return value


def _name(layer: Layer, key: str) -> str:
    return f"{layer.source}: {key}" if layer.source else FLAGS[key]


def _settings(layer: Layer, phase: str) -> dict[str, Any]:
    """Parsed values of a layer as they hold in one phase."""
    own = layer.table.get(phase, {})
    if not isinstance(own, Mapping):
        raise UsageError(f"{layer.source}: [{phase}] must be a table of axes, got {own!r}")
    for key in layer.table:
        if key not in (*FLAGS, *PHASES, "summary"):
            raise unknown(f"{layer.source}: key", key, (*FLAGS, *PHASES, "summary"))
    for key in own:
        if key not in AXES:
            raise unknown(f"{layer.source}: axis", f"{phase}.{key}", [f"{phase}.{a}" for a in AXES])
    shared = {key: layer.table[key] for key in layer.table if key in FLAGS}
    both = {**shared, **own}
    return {key: _parse(_name(layer, key), key, value) for key, value in both.items()}


def resolve(name: str, *layers: Layer) -> Sweep:
    """The sweep that these layers describe over the defaults; later layers win."""
    stack = (Layer(source="defaults", table=DEFAULTS), *layers)
    merged: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
    for layer in stack:
        for phase in PHASES:
            merged[phase] |= _settings(layer, phase)
    common = merged[PHASES[0]]
    names = {f.name for f in fields(Axes)}
    added = () if any("op" in each.table for each in layers) else _added_ops(merged)
    return Sweep(
        name=name,
        ops=(*common["op"], *added),
        added=added,
        impls=common["impl"],
        phases={
            phase: Axes(**{key: value for key, value in merged[phase].items() if key in names})
            for phase in common["phase"]
        },
        preset=common["preset"],
        seed=common["seed"],
    )


def _added_ops(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What a run that names no operator takes besides: attention in fp8, where fp8 is asked for."""
    common = settings[PHASES[0]]
    if not any("fp8" in settings[phase]["precision"] for phase in common["phase"]):
        return ()
    dense = [contest for contest in CONTESTS if contest.dense in common["op"]]
    return tuple(op for contest in dense for op in contest.beside)


def shipped() -> dict[str, Path]:
    """Sweeps that come with the tool, by name."""
    return {path.stem: path for path in sorted(SWEEP_FOLDER.glob("*.toml"))}


def load(name: str) -> Layer:
    """The layer of a shipped sweep's name or of a path to a TOML file."""
    known = shipped()
    path = known.get(name, Path(name))
    if name not in known and path.suffix != ".toml":
        raise unknown("sweep", name, known)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"sweep file {name} doesn't exist (shipped sweeps: {', '.join(known)})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"sweep file {name} can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: isn't valid TOML: {error}") from None
    return Layer(source=name, table=table)


def summary(path: Path) -> str:
    """What a shipped sweep says of itself."""
    return str(tomllib.loads(path.read_text(encoding="utf-8")).get("summary", ""))


def cases(sweep: Sweep, operators: Mapping[str, Operator]) -> tuple[Case, ...]:
    """The product of the axes, each case once, with impl `auto`.

    L ascends before the operators change, so that a run that is cut short still compares them. An
    axis that an operator lacks stands at its default (topk None, bf16, batch 1, equal lengths, the
    preset's heads, one rank, random inputs, made-up weights), and an operator makes no case in a
    phase it doesn't have.
    """
    made = {
        case.key: case
        for phase, axes in sweep.phases.items()
        for seq_len_kv in axes.seq_len_kv
        for op in sweep.ops
        if phase in operators[op].phases
        for case in _points(sweep, operators[op], phase, axes, seq_len_kv)
    }
    return tuple(made.values())


def _points(
    sweep: Sweep, operator: Operator, phase: str, axes: Axes, seq_len_kv: int
) -> Iterator[Case]:
    own = operator.axes
    heads = axes.num_heads if "num_heads" in own else ()
    topk = (max(axes.topk),) if operator.name in sweep.added else axes.topk
    product = itertools.product(
        topk if "topk" in own else (None,),
        _precisions(operator, axes),
        axes.batch_size if "batch_size" in own and phase == "decode" else (1,),
        axes.seq_len_q,
        heads or (PRESETS[sweep.preset].num_heads,),
        axes.mode,
        axes.tensor_parallel if "tensor_parallel" in own else (1,),
        axes.inputs if "inputs" in own else (RANDOM_INPUTS,),
        axes.lengths if "lengths" in own and phase == "decode" else (EQUAL_LENGTHS,),
    )
    for k, precision, batch_size, seq_len_q, num_heads, mode, ranks, inputs, lengths in product:
        if num_heads % ranks:
            flag = FLAGS["tensor_parallel"]
            raise UsageError(f"{flag} must divide the {num_heads} heads, got {ranks}")
        yield Case(
            op=operator.name,
            impl="auto",
            phase=phase,
            seq_len_kv=seq_len_kv,
            seq_len_q=seq_len_q,
            topk=k,
            precision=precision,
            batch_size=batch_size,
            num_heads=num_heads,
            preset=sweep.preset,
            seed=sweep.seed,
            mode=mode,
            tensor_parallel=ranks,
            inputs=inputs,
            weights=axes.weights if "weights" in own else "",
            lengths=lengths,
        )


def _precisions(operator: Operator, axes: Axes) -> tuple[str, ...]:
    """Those asked for that it computes in; where there is none all, to be skipped with a reason."""
    if "precision" not in operator.axes:
        return ("bf16",)
    able = tuple(name for name in axes.precision if name in operator.precisions)
    return able or axes.precision


def reproduce(case: Case, *, device: str, effort: str = "quick") -> str:
    """The command that runs this one case again on such a device, with the same effort."""
    if isinstance(case.impl, str):
        impl = case.impl
    else:
        impl = ",".join(f"{stage}={name}" for stage, name in case.impl.items())
    values = {
        "op": case.op,
        "impl": impl,
        "phase": case.phase,
        "seq_len_kv": format_size(case.seq_len_kv),
        "topk": None if case.topk is None else format_size(case.topk),
        "precision": case.precision,
        "batch_size": format_size(case.batch_size),
        "seq_len_q": format_size(case.seq_len_q),
        "num_heads": str(case.num_heads),
        "preset": case.preset,
        "seed": str(case.seed) if case.seed else None,
    }
    # what came later and stands at its default is left out
    later = {name: getattr(case, name) for name in LATER_FIELDS}
    values |= {
        name: shlex.quote(str(value))
        for name, value in later.items()
        if value != LATER_FIELDS[name]
    }
    flags = [f"{FLAGS[key]} {value}" for key, value in values.items() if value is not None]
    if effort != "quick":
        flags.append(f"--effort {effort}")
    return " ".join(("dsa-bench run", *flags, f"--device {device}"))
