"""The model-level estimate as figures and tables."""

from dsa_bench.reports import crossover, frame, lines, published, units
from dsa_bench.reports.chart import Axis, Figure, Series
from dsa_bench.reports.chart import Point as Drawn
from dsa_bench.reports.digest import Digest
from dsa_bench.reports.estimate import KINK, PRESET, Curve, Estimate, estimates
from dsa_bench.reports.naming import operator_text
from dsa_bench.reports.series import LENGTH
from dsa_bench.reports.sheet import Sheet

LENGTHS = tuple(1024 * n for n in (16, 32, 64, 128))
"""Where the distance from the published curves is told."""
ROLES = {"dense": "dense0", "dsa": "sparse0"}


def figures(report: Digest) -> list[Figure]:
    """Estimated and published cost over L, whole model."""
    made = []
    for each in estimates(report):
        title = _title(each, report)
        made.append(
            Figure(
                name=f"estimate-{lines.slug_of(title)}",
                title=f"Cost of a million tokens in the whole model, estimate, {title}",
                question="What would a token at position L cost, and what did DeepSeek publish?",
                answer=f"{_distance_sentence(each)} {assumptions(each)} "
                f"{published.source(each.gpu_hour_usd)}",
                x=Axis(title=LENGTH.title, text=units.format_length, base=2, log=False),
                y=Axis(title="USD per million tokens", text=units.format_usd, log=False),
                series=(
                    *(_series(curve) for curve in each.curves),
                    *published.absolute(each.phase, each.gpu_hour_usd),
                ),
            )
        )
    return made


def sheets(report: Digest) -> list[Sheet]:
    """Distance from the published curves of each estimate, and the slopes of them all."""
    found = estimates(report)
    made = [_distances(each, report) for each in found]
    return [*made, _slopes(found, report)] if found else []


def assumptions(each: Estimate) -> str:
    """What went into an estimate beside measured times."""
    machine = f"{each.machine} at ${each.gpu_hour_usd:g} per GPU-hour"
    batch = f", batch {each.line.axes['batch_size']}" if each.phase == "decode" else ""
    how = (
        "calibrated to one published number, V3.1 at L = 0, and the same for both"
        if each.is_calibrated
        else "configured"
    )
    text = (
        f"One layer measured on {machine}{batch}, times {PRESET.num_layers}; sparse: "
        f"{crossover.describe(each.line)}, at each L the faster form. Rest (experts, embeddings, "
        f"head): {units.format_usd(each.rest_usd)}, {how}."
    )
    if each.num_gpus > 1:
        text += (
            f" On {each.num_gpus} GPUs, communication priced, not measured: a ring all-reduce of "
            f"[tokens, {PRESET.hidden_size}] bf16 a layer at {each.link_gbps:g} GB/s, "
            f"{units.format_usd(each.communication_usd)}."
        )
    if each.phase == "prefill":
        text += f" L is where a chunk of {each.chunk} queries ends."
    return text


def _title(each: Estimate, report: Digest) -> str:
    parts = [each.phase]
    parts += [each.run_label] if len(report.runs) > 1 else []
    parts += [f"tp {each.num_gpus}"] if each.num_gpus > 1 else []
    return ", ".join(parts)


def _series(curve: Curve) -> Series:
    return Series(
        label=curve.label,
        role=ROLES[curve.attention],
        points=tuple(
            Drawn(
                x=p.seq_len_kv,
                y=p.usd,
                text=units.format_usd(p.usd),
                note=operator_text(p.op),
                flags=", ".join(frame.flags_of({"flags": p.flags})),
                doubt=p.doubt,
            )
            for p in curve.points
        ),
    )


def _distance_sentence(each: Estimate) -> str:
    """How far the estimates are from the published costs at the longest L that both have."""
    told = []
    for curve in each.curves:
        at = [n for n in LENGTHS if curve.at(n) is not None and curve.published_at(n) is not None]
        if at:
            own, theirs = curve.at(at[-1]), curve.published_at(at[-1])
            assert own is not None and theirs is not None
            told.append(
                f"{curve.label} {units.format_usd(own)}, {units.format_ratio(own / theirs)} "
                f"the published {units.format_usd(theirs)} at {units.format_length(at[-1])}"
            )
    return f"{'; '.join(told)}." if told else "No measured L reaches those that are compared."


def _distances(each: Estimate, report: Digest) -> Sheet:
    rows = []
    for curve in each.curves:
        for length in LENGTHS:
            own, theirs = curve.at(length), curve.published_at(length)
            cells = [units.MISSING] * 4
            if own is not None and theirs is not None:
                sign = "+" if own >= theirs else "-"
                cells = [
                    *(units.format_usd(own), units.format_usd(theirs)),
                    units.format_ratio(own / theirs),
                    f"{sign}{units.format_usd(abs(own - theirs))}",
                ]
            rows.append((curve.label, units.format_length(length), *cells))
    return Sheet(
        title=f"Whole model, estimate against published, {_title(each, report)}",
        head=("model", "L", "estimate", "published", "ratio", "difference"),
        rows=tuple(rows),
        notes=(
            "USD per million tokens; between measured L on straight lines, none beyond them",
            assumptions(each),
        ),
    )


def _slopes(found: tuple[Estimate, ...], report: Digest) -> Sheet:
    rows = []
    for each in found:
        for curve in each.curves:
            slopes = curve.slopes()
            name = f"{curve.label}, {_title(each, report)}"
            if slopes is None:
                rows.append((name, *[units.MISSING] * 4))
                continue
            first, ours, theirs = slopes
            rows.append(
                (
                    *(name, units.format_length(first)),
                    *(f"${ours:.3g}", f"${theirs:.3g}", units.format_ratio(ours / theirs)),
                )
            )
    return Sheet(
        title="Slope of the cost over L",
        head=("model", "from L", "estimate, per 1K", "published, per 1K", "ratio"),
        rows=tuple(rows),
        notes=(
            "USD per million tokens and 1024 tokens of L: straight lines of least squares through "
            f"the measured L, of V3.2 above {units.format_length(KINK)}; the rest and "
            "communication do not change them",
        ),
    )
