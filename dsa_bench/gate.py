"""Is the output right? Asked before any time is taken: a case that is wrong has no time.

A few rows are held against the reference completely; of many rows the first, the last and random
ones are, for the reference in fp32 would cost more than the measurement. The others must at least
be finite where the operator says so, which shows rows that nobody wrote.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_bench.accuracy import Check, finite_check
from dsa_bench.operator import Memory, Operator

SAMPLED_ROWS = 64
RECHECKED_ROWS = 16
FIGURE_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`gate` goes into the record; `reason` says what failed, empty where all checks passed."""

    gate: dict[str, Any]
    reason: str

    @property
    def passed(self) -> bool:
        return not self.reason


def sample_rows(
    num_rows: int,
    *,
    seed: int,
    device: str,
    limit: int = SAMPLED_ROWS,
    always: Sequence[int] = (),
) -> Tensor | None:
    """Sorted row numbers: first, last, random ones, and `always`; None (all rows) where there are
    few."""
    if num_rows <= limit:
        return None
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(num_rows - 2, generator=generator)[: limit - 2] + 1
    return torch.tensor(sorted({0, num_rows - 1, *inner.tolist(), *always}), device=device)


def poison_memory(memory: Memory, device: str, free: int) -> None:
    """Leave NaN in what the allocator hands out next: an element that nobody writes then shows.

    Only on CUDA, where freed blocks stay in torch's pool; and only where the blocks fit into what
    is free.
    """
    if device != "cuda":
        return
    sizes = [size for size in (memory.output_bytes, memory.workspace_bytes) if size >= 4]
    if 2 * sum(sizes) > free:
        return
    blocks = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
    del blocks


def check_outputs(
    operator: Operator,
    inputs: Any,
    outputs: Any,
    *,
    num_rows: int,
    seed: int,
    device: str,
    limit: int = SAMPLED_ROWS,
    always: Sequence[int] = (),
    figures: bool = True,
) -> Verdict:
    """Run the operator's checks on all rows or a sample of them, and its informative figures.

    A tensor that is no plain torch.Tensor is refused: it could put off its work until somebody
    looks at it, long after the stopwatch.
    """
    kinds = {type(x) for x in outputs if isinstance(x, Tensor)} - {Tensor}
    lazy = sorted(kind.__name__ for kind in kinds)
    if lazy:
        reason = f"outputs must be plain torch.Tensor, got {', '.join(lazy)}"
        return Verdict(gate={"checks": []}, reason=reason)
    rows = sample_rows(num_rows, seed=seed, device=device, limit=limit, always=always)
    checks = operator.check(inputs, outputs, rows=rows)
    checks += tuple(finite_check(name, getattr(outputs, name)) for name in operator.finite)
    gate: dict[str, Any] = {
        "checks": [check.to_json() for check in checks],
        "rows_checked": num_rows if rows is None else len(rows),
        "rows": num_rows,
    }
    if figures and operator.figures is not None:
        few = sample_rows(num_rows, seed=seed, device=device, limit=min(limit, FIGURE_ROWS))
        gate |= operator.figures(inputs, outputs, rows=few)
    return Verdict(gate=gate, reason=explain(checks))


def explain(checks: Iterable[Check]) -> str:
    """Sentence on what failed; empty where nothing did."""
    return "; ".join(_explain_one(check) for check in checks if not check.passed)


def _explain_one(check: Check) -> str:
    figures, limits = check.figures, check.limits
    if "shape_differs" in figures:
        return f"{check.name}: the output has another shape than the reference"
    said = []
    for name, value in figures.items():
        limit = limits.get(name)
        if limit is None or (value <= limit if limit == 0 else value < limit):
            continue
        if name == "outside":
            said.append(
                f"{value:.0f} elements outside abs {limits['abs']:.2g} and rel {limits['rel']:.2g}"
                f" (worst {figures['max_abs']:.2g} off)"
            )
        elif name == "special":
            said.append(f"{value:.0f} elements where only one of both is NaN or infinite")
        else:
            said.append(f"{name} {value:.3g}, limit {limit:.3g}")
    return f"{check.name}: {', '.join(said) or 'failed'}"
