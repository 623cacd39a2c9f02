"""How sizes are written on the command line and in sweep files.

A size is an integer with an optional suffix: `512`, `8k` (k = 1024), `1m` (m = 1024²). An axis
takes a list `a,b,c` whose items are sizes or ranges: `4k:128k:x2` multiplies from start to stop,
`1k:8k:+1k` adds; the stop is included where the range meets it.
"""

from collections.abc import Sequence

from dsa_bench.operator import UsageError

SUFFIXES = {"k": 1024, "m": 1024**2}
# a slip such as 1:1m:+1 would otherwise plan a million cases
MAX_VALUES = 1000
SIZES_HINT = "sizes like 4k,8k or a range like 4k:128k:x2 or 1k:8k:+1k"


def parse_size(text: str) -> int:
    """`8k` -> 8192; ValueError where it isn't a positive size."""
    digits, factor = text.strip().lower(), 1
    if digits and digits[-1] in SUFFIXES:
        digits, factor = digits[:-1], SUFFIXES[digits[-1]]
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise ValueError(f"'{text.strip()}' isn't a positive size")
    return int(digits) * factor


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads as `size`: 131072 -> `128k`."""
    for suffix, factor in sorted(SUFFIXES.items(), key=lambda item: -item[1]):
        if size % factor == 0:
            return f"{size // factor}{suffix}"
    return str(size)


def parse_sizes(name: str, text: str) -> tuple[int, ...]:
    """Values of an axis, in the order written, each once; UsageError if the text is malformed."""
    try:
        values = [value for item in text.split(",") for value in _item(item)]
    except ValueError as error:
        raise UsageError(f"{name} must be {SIZES_HINT}, got '{text}' ({error})") from None
    return tuple(dict.fromkeys(values))


def _item(text: str) -> Sequence[int]:
    parts = text.split(":")
    if len(parts) == 1:
        return [parse_size(text)]
    if len(parts) != 3 or parts[2].strip()[:1] not in ("x", "+"):
        raise ValueError(f"'{text}' needs the form start:stop:xFACTOR or start:stop:+STEP")
    start, stop, rule = parse_size(parts[0]), parse_size(parts[1]), parts[2].strip()
    step = parse_size(rule[1:])
    if stop < start:
        raise ValueError(f"the stop of '{text}' is below its start")
    if rule[0] == "x" and step == 1:
        raise ValueError(f"the factor of '{text}' must be at least 2")
    values, value = [], start
    while value <= stop:
        values.append(value)
        if len(values) > MAX_VALUES:
            raise ValueError(f"'{text}' has more than {MAX_VALUES} values")
        value = value * step if rule[0] == "x" else value + step
    return values
