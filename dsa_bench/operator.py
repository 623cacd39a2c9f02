"""The vocabulary between the suite and the kernels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsa_bench.accuracy import Check
from dsa_bench.library import Library
from dsa_bench.preset import Preset
from dsa_bench.record import Case


class Unsupported(Exception):
    """The contract is fine, but this cannot run here; the text says why, to a person."""


class UsageError(Exception):
    """A person asked for something that makes no sense; the text says what to write instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a kernel needs to know of the device it runs on."""

    device: str
    """`cuda` or `cpu`."""
    name: str
    capability: tuple[int, int] | None = None
    """Compute capability of a CUDA device: (9, 0) is Hopper."""
    num_sms: int = 0
    memory_bytes: int = 0
    l2_bytes: int = 0

    @property
    def is_hopper(self) -> bool:
        """wgmma and setmaxnreg exist on sm_90a alone."""
        return self.capability is not None and self.capability[0] == 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the mathematics of one call needs at least; counted on valid entries."""

    flops: float
    """2 for each multiply-add of the matrix products."""
    bytes_read: float
    """Each input byte once."""
    bytes_written: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            flops=self.flops + other.flops,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that one call will hold on the device, predicted from the shape alone."""

    input_bytes: int
    output_bytes: int
    workspace_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.input_bytes + self.output_bytes + self.workspace_bytes


class Run(Protocol):
    """Runs an implementation: inputs in, outputs out (a NamedTuple of tensors)."""

    def __call__(self, inputs: Any, /) -> Any: ...


def supports_all(shape: Any, machine: Machine) -> str | None:
    """`supports` of an implementation that takes every shape on every device."""
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One selectable way to compute an operator."""

    name: str
    run: Run
    supports: Callable[[Any, Machine], str | None] = supports_all
    """(shape, machine) -> None, or the reason why it cannot, as a sentence for a person."""
    install: str = ""
    """What to type when what it needs is missing, for one without `library`."""
    library: Library | None = None
    """The foreign package that does the work."""
    priority: int = 0
    """`auto` takes the supported implementation with the highest priority."""


def no_rows(shape: Any) -> tuple[int, ...]:
    """`always_checked` of an operator whose rows are all alike."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """A function with fixed mathematics: all that does not depend on how it is computed."""

    name: str
    summary: str
    phases: tuple[str, ...]
    axes: frozenset[str]
    """Axes of a Case that it has, of: topk, precision, batch_size, lengths, num_heads,
    tensor_parallel, inputs, weights.
    """
    shape: Callable[[Case, Preset], Any]
    """The integers of a case; raises Unsupported(reason) where the case makes no sense."""
    make_inputs: Callable[..., Any]
    """(shape, *, seed, device) -> inputs; realistic, the same for the same seed and device."""
    reference: Callable[..., Any]
    """(inputs, *, rows=None) -> outputs of all queries, or of the queries in `rows`, in fp32."""
    check: Callable[..., tuple[Check, ...]]
    """(inputs, outputs, *, rows=None) -> verdicts on the outputs of these queries."""
    cost: Callable[[Any], Cost]
    memory: Callable[[Any], Memory]
    num_rows: Callable[[Any], int]
    """How many queries (rows) an output of this shape has."""
    always_checked: Callable[[Any], tuple[int, ...]] = no_rows
    """Rows that no sample leaves out: of a batch that of its longest sequence."""
    stages: Callable[[str], tuple[str, ...]] | None = None
    """phase -> names of the operators it is composed of, in order; None for a plain operator."""
    compose: Callable[[str, Mapping[str, Implementation]], Run] | None = None
    """(phase, stage -> implementation) -> the composition."""
    stage_shapes: Callable[[Any], Mapping[str, tuple[Any, ...]]] | None = None
    """shape -> stage -> the shapes of that stage's calls, for its cost and for `supports`; a stage
    that this shape does without has none.
    """
    figures: Callable[..., Mapping[str, Any]] | None = None
    """(inputs, outputs, *, rows=None) -> figures that no verdict rests on: the error of DSA against
    dense attention.
    """
    finite: tuple[str, ...] = ()
    """Outputs that have no NaN and no infinity in any row, those that nobody compares included."""
    precisions: tuple[str, ...] = ("bf16", "fp8")
    """Those of the axis `precision` that it computes in."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Phase that it doesn't have -> why not, and what to take instead, for a person who asks."""
