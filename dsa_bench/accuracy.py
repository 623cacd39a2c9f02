"""How far a tensor is from what it should be: tolerances, budgets, figures and verdicts.

A tolerance is a fixed number. A budget comes from the data: an output may be at most twice as far
from the fp32 reference as what plain bf16 torch makes of the same inputs. Both are asked: where the
scores are weak a fixed tolerance is as large as the output, where they are strong the budget is
the wider one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BUDGET_FACTOR = 2.0
BF16_ROUNDING = 2.0**-8
"""Largest relative error of one rounding to bf16; its rms over many values is 1.66e-3."""
LOG_ROUNDING = 2.0**-19
"""Of logits and lse in fp32: 32 roundings, for sums of 10^5 terms and the GPU's exp2 and log2. The
largest seen on an H100 is 2^-21 of an lse of 12."""
CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """An element passes if |actual - expected| is below abs, or below rel · (|expected| + 1e-6).

    Beside that the whole tensor must satisfy 1 - 2 Σ xy / Σ (x² + y²) < cos, and NaN and ±inf must
    stand at exactly the expected places. Source: FlashMLA, tests/kernelkit/compare.py (values
    restated per operator).
    """

    abs: float
    rel: float
    cos: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One verdict of the gate, with the figures it rests on and their limits."""

    name: str
    passed: bool
    figures: dict[str, float]
    limits: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "figures": self.figures,
            "limits": self.limits,
        }


def shape_differs(name: str) -> Check:
    """The verdict on an output of another shape than the reference's: nothing can be compared."""
    return Check(name=name, passed=False, figures={"shape_differs": 1.0}, limits={})


def cosine_difference(actual: "Tensor", expected: "Tensor") -> float:
    """1 - 2 Σ xy / Σ (x² + y²) in fp64; 0 for two zero tensors."""
    x, y = actual.double(), expected.double()
    square = (x * x + y * y).sum().item()
    return 1.0 - 2.0 * (x * y).sum().item() / square if square > 0 else 0.0


def compare_tensors(
    name: str,
    actual: "Tensor",
    expected: "Tensor",
    tolerance: Tolerance,
    *,
    mask: "Tensor | None" = None,
) -> Check:
    """Compare element by element under `mask` (True = compared); shapes must be equal.

    Figures: `max_abs`, `max_rel` (of elements beyond the absolute tolerance), `cos`, `outside`
    (elements that fail both tolerances), `special` (NaN or ±inf at a place where it isn't expected,
    or missing).
    """
    if actual.shape != expected.shape:
        return shape_differs(name)
    limits = {
        "abs": tolerance.abs,
        "rel": tolerance.rel,
        "cos": tolerance.cos,
        "outside": 0,
        "special": 0,
    }
    x, y = actual.float(), expected.float()
    if mask is not None:
        x, y = x[mask], y[mask]
    finite = x.isfinite() & y.isfinite()
    same = finite | (x == y) | (x.isnan() & y.isnan())
    x, y = x[finite], y[finite]
    error = (x - y).abs()
    relative = error / (y.abs() + 1e-6)
    beyond = error >= tolerance.abs
    figures = {
        "max_abs": error.max().item() if error.numel() else 0.0,
        "max_rel": relative[beyond].max().item() if beyond.any().item() else 0.0,
        "cos": cosine_difference(x, y),
        "outside": float((beyond & (relative >= tolerance.rel)).sum().item()),
        "special": float((~same).sum().item()),
    }
    passed = figures["outside"] == 0 and figures["special"] == 0 and figures["cos"] < tolerance.cos
    return Check(name=name, passed=passed, figures=figures, limits=limits)


def compare_to_budget(
    name: str,
    actual: "Tensor",
    expected: "Tensor",
    plain: "Tensor",
    *,
    mask: "Tensor | None" = None,
    factor: float = BUDGET_FACTOR,
    floor: float = BF16_ROUNDING,
) -> Check:
    """Errors of `actual` against those that `plain`, torch in bf16, makes on the same inputs.

    A vector is what lies along the last dimension; elements where `mask` is False do not count.

        rms_error      ‖actual - expected‖ / ‖expected‖ over all elements
        worst_vector   largest ‖actual - expected‖ / ‖expected‖ of one vector
        worst_element  largest max |actual - expected| / max |expected| of one vector
        special        elements of which only one of actual and expected is finite; limit 0

    The first sees a loss of precision everywhere, the second a wrong row or head among thousands,
    the third a wrong column. A vector below the median size is measured by the median: where values
    cancel, the little that is left says nothing of what was added up.

    limit = max(factor · figure of plain, its floor). The floors are for inputs on which plain is
    exact by luck (a single key): half of `floor` for rms_error, as a rounding's rms is below half
    its largest error; `floor` for worst_vector, where all weights of a vector may be rounded the
    same way; three times `floor` for worst_element, which is rounded as a weight, as the result of
    a part of the keys (where a library can only give that in bf16) and as an output.
    """
    if actual.shape != expected.shape:
        return shape_differs(name)
    floors = {"rms_error": floor / 2, "worst_vector": floor, "worst_element": 3 * floor}
    return _within_budget(
        name,
        _relative_errors(actual, expected, mask),
        _relative_errors(plain, expected, mask),
        factor=factor,
        floors=floors,
    )


def compare_logs_to_budget(
    name: str,
    actual: "Tensor",
    expected: "Tensor",
    plain: "Tensor",
    *,
    factor: float = BUDGET_FACTOR,
    floor: float = LOG_ROUNDING,
    absolute_floor: float = 0.0,
) -> Check:
    """`compare_to_budget` of logarithms: an absolute error of lse is a relative one of the sum.

    Figures: `rms_error` and `worst_error` = max |actual - expected|, both absolute, `special` as
    there. limit = max(factor · figure of plain, floor · max(1, max |expected|), absolute_floor).
    """
    if actual.shape != expected.shape:
        return shape_differs(name)
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    least = max(floor * max(1.0, largest), absolute_floor)
    return _within_budget(
        name,
        _absolute_errors(actual, expected),
        _absolute_errors(plain, expected),
        factor=factor,
        floors={"rms_error": least, "worst_error": least},
    )


def finite_check(name: str, tensor: "Tensor") -> Check:
    """Every element is finite: a look at the rows that are too many to be compared."""
    rows = tensor if tensor.dim() else tensor.reshape(1)
    parts = rows.chunk(max(1, -(-rows.numel() // CHUNK_ELEMENTS)))
    figures = {"not_finite": float(sum((~part.isfinite()).sum() for part in parts))}
    return Check(
        name=f"{name}_finite",
        passed=figures["not_finite"] == 0,
        figures=figures,
        limits={"not_finite": 0.0},
    )


def _within_budget(
    name: str,
    figures: dict[str, float],
    plain: dict[str, float],
    *,
    factor: float,
    floors: dict[str, float],
) -> Check:
    limits = {figure: max(factor * plain[figure], floor) for figure, floor in floors.items()}
    passed = figures["special"] == 0 and all(figures[x] < limits[x] for x in limits)
    return Check(name=name, passed=passed, figures=figures, limits=limits | {"special": 0.0})


def _relative_errors(
    actual: "Tensor", expected: "Tensor", mask: "Tensor | None"
) -> dict[str, float]:
    """Figures of `compare_to_budget`, in fp64 and in chunks."""
    import torch

    if not expected.numel():
        return dict.fromkeys(("rms_error", "worst_vector", "worst_element", "special"), 0.0)
    width, num_chunks = expected.shape[-1], -(-expected.numel() // CHUNK_ELEMENTS)
    everywhere = torch.ones((), dtype=torch.bool, device=expected.device)
    kept = (everywhere if mask is None else mask).expand(expected.shape)
    chunks = (x.reshape(-1, width).chunk(num_chunks) for x in (actual, expected, kept))
    parts = [_vector_sizes(*part) for part in zip(*chunks, strict=True)]
    error, size, worst, largest, special = (torch.cat(x) for x in zip(*parts, strict=True))
    total = size.sum()
    filled = size > 0
    if filled.any().item():
        size = size.clamp(min=size[filled].median())
        largest = largest.clamp(min=largest[filled].median())
    else:
        size, largest = torch.ones_like(size), torch.ones_like(largest)
    return {
        "rms_error": (error.sum() / torch.where(total > 0, total, 1.0)).sqrt().item(),
        "worst_vector": (error / size).max().sqrt().item(),
        "worst_element": (worst / largest).max().item(),
        "special": float(special.sum().item()),
    }


def _vector_sizes(actual: "Tensor", expected: "Tensor", kept: "Tensor") -> tuple["Tensor", ...]:
    """Of each row: squared error and size, largest error and element, special elements."""
    special = kept & (actual.isfinite() != expected.isfinite())
    kept = kept & actual.isfinite() & expected.isfinite()
    x, y = actual.double().where(kept, 0.0), expected.double().where(kept, 0.0)
    error = (x - y).abs()
    return (
        error.square().sum(-1),
        y.square().sum(-1),
        error.amax(-1),
        y.abs().amax(-1),
        special.sum(-1),
    )


def _absolute_errors(actual: "Tensor", expected: "Tensor") -> dict[str, float]:
    x, y = actual.double(), expected.double()
    finite = x.isfinite() & y.isfinite()
    error = (x - y)[finite].abs()
    return {
        "rms_error": error.square().mean().sqrt().item() if error.numel() else 0.0,
        "worst_error": error.max().item() if error.numel() else 0.0,
        "special": float((x.isfinite() != y.isfinite()).sum().item()),
    }
