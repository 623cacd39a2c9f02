"""Files that others wrote: how much of them is read, how deep they nest, which types they hold.

Run folders are passed on, so nothing in one is believed before it was looked at. Whatever is
refused here is a `Refused` with a sentence; the caller knows the file and the line. Only plain JSON
is read, nothing is ever executed, and no text of a file becomes part of a path.
"""

import dataclasses
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

T = TypeVar("T")

MIB = 2**20
MAX_REPORT_BYTES = 64 * MIB
"""Of a report.csv or report.md that is checked."""
MAX_DEPTH = 32
"""Lists and objects within each other; a record of ours has 6."""
MAX_DIGITS = 20
"""Of an integer: more than 64 bits hold."""
MAX_INTEGER = 2**63
MAX_NUMBER = 1e30
"""Beyond any rate, cost or time; products of a few such numbers still are finite."""
MAX_ITEMS = 1_000_000
"""Of one list."""
MAX_TEXT = 10_000
"""Characters of one text."""

# a text to its end, or to the end of the file; possessive, so it never looks back
_TEXT = re.compile(r'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
_NO_BRACKET = re.compile(r"[^\[\]{}]+")


class Refused(ValueError):
    """What a file holds is not what this program reads; the text says what and where in it."""


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; a link, pipe or device is refused."""
    _expect_regular(path, path.lstat().st_mode)
    # what was looked at may have been exchanged: no link is followed, no pipe is waited for
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _expect_regular(path, os.fstat(descriptor).st_mode)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"is larger than {limit // MIB} MiB (is this a dsa-bench run folder?)")
    return data


def _expect_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    what = "a link" if stat.S_ISLNK(mode) else "no regular file"
    raise Refused(f"is {what} (copy the run folder with plain files in it)")


def expect_no_links(folder: Path) -> None:
    """Refused if anything below the folder is a link: writing through it would change other files.

    The folder itself may be reached through links.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = Path(place, name)
            if found.is_symlink():
                raise Refused(f"{found} is a link (remove it, or give another folder)")


def parse(data: bytes) -> Any:
    """The value of one JSON text in UTF-8.

    Beside JSON's own rules: at most MAX_DEPTH levels, no NaN or infinity by name or by overflow, no
    integer beyond MAX_DIGITS digits. Of a key that stands twice the last value counts.
    """
    text = data.decode("utf-8")
    _expect_flat(text)
    return json.loads(text, parse_constant=_no_number, parse_float=_real, parse_int=_whole)


def _expect_flat(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _NO_BRACKET.sub("", _TEXT.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise Refused(f"nests deeper than {MAX_DEPTH} levels")


def _no_number(text: str) -> NoReturn:
    raise Refused(f"holds {text}, which is no number in JSON")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"holds the number {shown(text)}, which is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise Refused(f"holds the number {shown(text)}, which is too large")
    return int(text)


def shown(value: object) -> str:
    """A value as a sentence quotes it: in one line and short."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def build(kind: type[T], data: object, place: str) -> T:
    """A dataclass from the items of a JSON object that it has fields for, each of the field's type.

    Other items are read over, for a newer version may write more. `place` begins every sentence.
    """
    items = _expect_object(data, place)
    found = {}
    for field in dataclasses.fields(cast(Any, kind)):
        name = f"{place}.{field.name}" if place else field.name
        if field.name in items:
            found[field.name] = expect(field.type, items[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Refused(f"{name} is missing")
    return kind(**found)


def expect(kind: Any, value: Any, place: str) -> Any:
    """`value` as the type `kind`; Refused where it isn't one.

    Types: str, bool, int (not negative), float, None, dataclasses, unions, `tuple[X, ...]` from a
    list, `Mapping[str, X]` from an object.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _expect_one_of(arguments, value, place)
    if origin is tuple:
        items = _expect_list(value, place)
        return tuple(expect(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(items))
    if origin is not None:
        found = _expect_object(value, place)
        return {key: expect(arguments[1], found[key], f"{place}.{shown(key)}") for key in found}
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return build(cast(type, kind), value, place)
    return _expect_plain(kind, value, place)


def _expect_one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if type(None) in kinds and value is None:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    # of str | Mapping the one that fits the value, so that the sentence speaks of that
    fitting = [kind for kind in others if (kind is str) == isinstance(value, str)]
    return expect((fitting or others)[0], value, place)


def _expect_plain(kind: type, value: Any, place: str) -> Any:
    if kind is str:
        return text(value, place)
    if kind is bool:
        if not isinstance(value, bool):
            raise Refused(f"{place} must be true or false, got {shown(value)}")
        return value
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_INTEGER:
            raise Refused(f"{place} must be a whole number from 0, got {shown(value)}")
        return value
    return number(value, place)


def text(value: Any, place: str, limit: int = MAX_TEXT) -> str:
    """A text of at most `limit` characters."""
    if not isinstance(value, str):
        raise Refused(f"{place} must be a text, got {shown(value)}")
    if len(value) > limit:
        raise Refused(f"{place} must have at most {limit} characters, got {len(value)}")
    return value


def number(value: Any, place: str, *, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float:
    """A finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = f"from {low:g} to {high:g}"
        raise Refused(f"{place} must be a number {bounds}, got {shown(value)}")
    return value


def _expect_list(value: Any, place: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Refused(f"{place} must be a list, got {shown(value)}")
    if len(value) > MAX_ITEMS:
        raise Refused(f"{place} must have at most {MAX_ITEMS} items, got {len(value)}")
    return value


def _expect_object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Refused(f"{place or 'it'} must be an object, got {shown(value)}")
    return value
