"""Numbers as people read them; the only place where milli, tera and GiB exist."""

import math
import re

MISSING = "–"  # noqa: RUF001 - an en dash, as in printed tables


def clean(text: str) -> str:
    """One line without control and direction characters, which garble a terminal or an SVG."""
    return "".join(c if c.isprintable() else " " for c in text)


def shorten(text: str, length: int = 44) -> str:
    """The text, cut with an ellipsis where it is longer than a label may be."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def is_missing(value: object) -> bool:
    """None, NaN and pandas' NA have no text."""
    return value is None or value != value or str(value) == "<NA>"


def format_length(value: float) -> str:
    """Tokens, 1K = 1024: 4K, 11.2K, 1M; below 1024 as they are."""
    if value < 1024:
        return f"{value:.0f}"
    scaled, suffix = (value / 1024, "K") if value < 1024**2 else (value / 1024**2, "M")
    return f"{scaled:.1f}".removesuffix(".0") + suffix


def format_seconds(value: float | None) -> str:
    """Three figures: 22.3 µs, 1.95 ms."""
    return _scaled(value, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def format_bytes(value: float | None) -> str:
    """Three figures in powers of 1024: 512 MiB."""
    steps = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
    return _scaled(value, steps)


def format_flops(value: float | None) -> str:
    """Three figures: 631 TFLOP/s."""
    return _scaled(value, (("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)))


def format_bandwidth(value: float | None) -> str:
    """Three figures in powers of 1000: 2.26 TB/s."""
    return _scaled(value, (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)))


def format_usd(value: float | None) -> str:
    """Three figures: $0.0441."""
    return MISSING if value is None or is_missing(value) else f"${three_figures(value)}"


def format_joules(value: float | None) -> str:
    """Three figures: 12.1 µJ."""
    return _scaled(value, (("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6), ("nJ", 1e-9)))


def format_ratio(value: float | None) -> str:
    """Three figures with the sign: 4.36 times."""
    return MISSING if value is None or is_missing(value) else f"{three_figures(value)}×"  # noqa: RUF001


def format_share(value: float | None) -> str:
    """A share of one as per cent."""
    return MISSING if value is None or is_missing(value) else f"{100 * value:.0f} %"


def format_spread(value: float | None) -> str:
    """A small share of one as per cent with a decimal."""
    return MISSING if value is None or is_missing(value) else f"{100 * value:.1f} %"


def format_error(value: float | None) -> str:
    """Two figures: 0.021, 3.1e-05."""
    return MISSING if value is None or is_missing(value) else f"{value:.2g}"


def format_number(value: float | None) -> str:
    """A whole number, or three figures."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:.0f}" if float(value).is_integer() else three_figures(value)


def three_figures(value: float) -> str:
    """Three significant figures without an exponent; from 1000 on all whole figures."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    # 9.999 rounds up to 10.00: then one decimal is one too many
    if digits and abs(round(value, digits)) >= 10 ** (3 - digits):
        digits -= 1
    return f"{value:.{digits}f}"


def _scaled(value: float | None, steps: tuple[tuple[str, float], ...]) -> str:
    if value is None or is_missing(value):
        return MISSING
    # 0.9995 of a step prints as 1000 of the one below
    unit, size = next((s for s in steps if abs(value) >= 0.9995 * s[1]), steps[-1])
    return f"{three_figures(value / size)} {unit}"


def tick(text: str) -> str:
    """A value's text as a tick shows it: 2.00 ms -> 2 ms, $0.500 -> $0.5."""
    if re.match(r"\$?0(\.0+)?(?![.\d])", text):
        return "0"
    number = re.match(r"(\$?)(\d+)\.(\d+)(.*)", text)
    if not number:
        return text
    sign, whole, decimals, rest = number.groups()
    decimals = decimals.rstrip("0")
    return f"{sign}{whole}{'.' if decimals else ''}{decimals}{rest}"
