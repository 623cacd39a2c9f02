"""What a token costs in the whole model, estimated from measured layers, beside published costs.

    usd(L) = price / 3600 · GPUs · layers · (layer seconds per token + communication) · 10⁶ + rest

`rest` is all that is no attention layer (experts, embeddings, head), in USD per million tokens. It
is configured, or calibrated: the published cost of V3.1 at position 0 less the dense layers' cost
that a straight line through every measured L has at 0, at least 0. The one rest of a phase serves
both models. Communication with `tensor_parallel` ranks is one ring all-reduce of the layer's output
in bf16; it is priced from a stated bandwidth, not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dsa_bench import cost
from dsa_bench.contest import LAYER
from dsa_bench.operator import UsageError
from dsa_bench.preset import PRESETS
from dsa_bench.record import PHASES
from dsa_bench.reports import crossover, frame, lines, naming, published
from dsa_bench.reports.crossover import Crossover
from dsa_bench.reports.digest import Digest

PRESET = PRESETS["v3.2"]
DEFAULT_LINK_GBPS = 450.0
"""GB/s that one GPU sends over NVLink 4 in one direction."""
BF16_BYTES = 2
KINK = 8192
"""Above this L the cost of V3.2 is straight: k tokens are selected from more than them."""
SHARED_AXES = ("batch_size", "lengths", "chunk", "inputs", "weights", "seed", "asked_mode")
"""What a sparse line and its dense opponents have in common beside run, phase and ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The estimate at one measured L, and the case that it comes from."""

    seq_len_kv: float
    usd: float
    op: str
    flags: str
    doubt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One estimated model, and the published cost of the model that it stands for."""

    attention: str
    """`dense` (as V3.1) or `dsa` (as V3.2)."""
    label: str
    points: tuple[Point, ...]
    """L ascends."""
    published: tuple[tuple[float, float], ...]
    """Vertices (L, USD) at this run's price."""

    def at(self, length: float) -> float | None:
        """The estimate at L: on straight lines between measured L; None outside of them."""
        vertices = [(p.seq_len_kv, p.usd) for p in self.points]
        if not vertices[0][0] <= length <= vertices[-1][0]:
            return None
        return published.interpolate(vertices, length)

    def published_at(self, length: float) -> float | None:
        """The published cost at L; None beyond the end of the curve."""
        return (
            None
            if length > self.published[-1][0]
            else published.interpolate(self.published, length)
        )

    def slopes(self) -> tuple[float, float, float] | None:
        """(first L, USD per 1K of L of ours, of the published): lines through the same L.

        Of V3.2 only above KINK. None for fewer than two L.
        """
        first = KINK if self.attention == "dsa" else 0
        end = self.published[-1][0]
        used = [p for p in self.points if first < p.seq_len_kv <= end]
        if len(used) < 2:
            return None
        xs = [p.seq_len_kv for p in used]
        ours = fit(xs, [p.usd for p in used])[0]
        theirs = fit(xs, [published.interpolate(self.published, x) for x in xs])[0]
        return xs[0], 1024 * ours, 1024 * theirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Both models in one phase of one run on so many GPUs."""

    run_label: str
    machine: str
    phase: str
    num_gpus: int
    gpu_hour_usd: float
    rest_usd: float
    is_calibrated: bool
    """False: the rest was configured."""
    communication_usd: float
    """Of all layers, per million tokens; 0 on one GPU."""
    link_gbps: float
    line: Crossover
    """The sparse line that it speaks of."""
    chunk: int
    curves: tuple[Curve, ...]


def parse_rest(text: str) -> dict[str, float]:
    """`prefill=0.03,decode=0.05` -> USD per million tokens by phase; else UsageError."""
    found = {}
    for part in text.split(","):
        phase, _, value = part.partition("=")
        if phase.strip() not in PHASES:
            raise UsageError(f"--rest-usd must name a phase ({', '.join(PHASES)}), got {part!r}")
        try:
            usd = float(value)
        except ValueError:
            usd = -1.0
        if not 0 <= usd < float("inf"):
            raise UsageError(f"--rest-usd must be like prefill=0.03,decode=0.05, got {part!r}")
        found[phase.strip()] = usd
    return found


def assume(
    header: Mapping[str, Any], *, rest_usd: str | None = None, link_gbps: float | None = None
) -> dict[str, Any]:
    """The header of a run with what an estimate is to assume; None leaves what it has."""
    options = dict(header.get("options") or {})
    options |= {} if rest_usd is None else {"rest_usd": parse_rest(rest_usd)}
    options |= {} if link_gbps is None else {"link_gbps": link_gbps}
    return {**header, "options": options}


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(slope, value at 0) of the line with the least squared error."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return slope, mean_y - slope * mean_x


def estimates(report: Digest) -> tuple[Estimate, ...]:
    """One for each run, phase and number of ranks that timed the full model's layers on a GPU."""
    cases = report.cases
    is_full = (cases["preset"] == PRESET.name) & (cases["num_heads"] == published.NUM_HEADS)
    is_at_position = (cases["device"] == "cuda") & (cases["chunk"] > 0)
    rows = cases[
        (cases["contest"] == LAYER.name)
        & is_full
        & is_at_position
        & cases["usd_per_million_tokens"].notna()
    ]
    made = []
    ranks = rows["phase"].map(lines.PHASE_RANKS)
    groups = rows.assign(phase_rank=ranks).groupby(["run", "phase_rank", "tensor_parallel"])
    for _, part in groups:
        options = report.runs[int(part["run"].iloc[0])].header.get("options") or {}
        found = _estimate(lines.largest_batch(part), options)
        made += [found] if found else []
    return tuple(made)


def _estimate(rows: pd.DataFrame, options: Mapping[str, Any]) -> Estimate | None:
    line = crossover.choose(crossover.crossovers(rows))
    if line is None:
        return None
    first = rows.iloc[0]
    phase, price = str(first["phase"]), float(first["gpu_hour_usd"])
    gpus, link = int(first["tensor_parallel"]), _link_gbps(options)
    talk = _communication_usd(gpus, link, price)
    shared = {axis: line.axes[axis] for axis in SHARED_AXES}
    rows = rows[[lines.same_axes(shared, row) for row in frame.rows(rows)]]
    chosen = {"topk": line.axes["topk"], "precision": line.axes["precision"]}
    is_sparse = rows["op"].isin(LAYER.sparse)
    is_chosen = pd.Series([lines.same_axes(chosen, r) for r in frame.rows(rows)], index=rows.index)
    layers = {
        "dense": _fastest(rows[rows["op"] == LAYER.dense], talk),
        "dsa": _fastest(rows[is_sparse & is_chosen], talk),
    }
    curves_of = {curve.attention: curve for curve in published.curves(phase, price)}
    rest, is_calibrated = _rest(options, phase, layers["dense"], curves_of)
    if rest is None:
        return None
    return Estimate(
        run_label=str(first["run_label"]),
        machine=str(first["machine"]),
        phase=phase,
        num_gpus=gpus,
        gpu_hour_usd=price,
        rest_usd=rest,
        is_calibrated=is_calibrated,
        communication_usd=talk,
        link_gbps=link,
        line=line,
        chunk=int(first["chunk"]),
        curves=tuple(
            _curve(attention, points, rest, curves_of[attention].vertices)
            for attention, points in layers.items()
            if points and attention in curves_of
        ),
    )


def _fastest(rows: pd.DataFrame, talk: float) -> tuple[Point, ...]:
    """At each L the cheapest case, with its communication and without the rest."""
    best = rows.sort_values("usd_per_million_tokens", kind="stable").drop_duplicates("seq_len_kv")
    return tuple(
        Point(
            seq_len_kv=float(row["seq_len_kv"]),
            usd=float(row["usd_per_million_tokens"]) + talk,
            op=str(row["op"]),
            flags=str(row["flags"]),
            doubt=str(row["doubt"]),
        )
        for row in frame.rows(best.sort_values("seq_len_kv"))
    )


def _curve(
    attention: str,
    points: Sequence[Point],
    rest: float,
    vertices: Sequence[tuple[float, float]],
) -> Curve:
    ops = dict.fromkeys(p.op for p in points)
    model = "V3.1" if attention == "dense" else "V3.2"
    return Curve(
        attention=attention,
        label=f"{model}-like ({' / '.join(naming.operator_text(op) for op in ops)})",
        points=tuple(
            Point(seq_len_kv=p.seq_len_kv, usd=p.usd + rest, op=p.op, flags=p.flags, doubt=p.doubt)
            for p in points
        ),
        published=tuple(vertices),
    )


def _rest(
    options: Mapping[str, Any],
    phase: str,
    dense: Sequence[Point],
    curves_of: Mapping[str, published.Curve],
) -> tuple[float | None, bool]:
    """(USD per million tokens, whether it was calibrated); None where nothing gives one."""
    configured = options.get("rest_usd")
    value = configured.get(phase) if isinstance(configured, Mapping) else None
    if isinstance(value, int | float):
        return float(value), False
    if len(dense) < 2 or "dense" not in curves_of:
        return None, False
    _, at_zero = fit([p.seq_len_kv for p in dense], [p.usd for p in dense])
    return max(0.0, curves_of["dense"].vertices[0][1] - at_zero), True


def _communication_usd(gpus: int, link_gbps: float, price: float) -> float:
    """All layers' all-reduces of a token's output, per million tokens."""
    seconds = cost.all_reduce_seconds(
        PRESET.hidden_size * BF16_BYTES, ranks=gpus, bytes_per_second=link_gbps * 1e9
    )
    return cost.usd_per_million_tokens(
        seconds, num_layers=PRESET.num_layers, gpu_hour_usd=price, num_gpus=gpus
    )


def _link_gbps(options: Mapping[str, Any]) -> float:
    value = options.get("link_gbps")
    return float(value) if isinstance(value, int | float) and value > 0 else DEFAULT_LINK_GBPS
