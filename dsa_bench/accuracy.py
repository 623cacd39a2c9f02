"""How far a tensor is from what it should be: tolerances, figures and verdicts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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
    limits = {
        "abs": tolerance.abs,
        "rel": tolerance.rel,
        "cos": tolerance.cos,
        "outside": 0,
        "special": 0,
    }
    if actual.shape != expected.shape:
        return Check(name=name, passed=False, figures={"shape_differs": 1.0}, limits=limits)
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
