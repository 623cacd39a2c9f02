"""A run folder: its header `run.json`, written once, and `records.jsonl`, a line for each ending.

One record is one `write` on an append-only descriptor followed by `fsync`, so a run that is killed
at any moment loses at most the case in flight. A last line without its newline is torn: reading
leaves it out and says so, and writing again cuts it off. Where a replicate of a case ended more
than once (after a resume), its newest record holds.

A line ends in the field `crc32`: `{...,"crc32":"0a1b2c3d"}` and a newline. It is the CRC-32 (that
of zlib) of the bytes of the line without this field, that is of `{...}`, in eight lower-case hex
digits. Lines of older versions have none.

A folder may hold `findings.jsonl` too: what implementations did on hostile inputs, a line for each
input, sealed in the same way. It is replaced as a whole, so it never is torn.

Folders come from others too, so what they hold is bounded and checked before it is believed (see
`untrusted`).
"""

import contextlib
import fcntl
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_bench.finding import Finding
from dsa_bench.operator import UsageError
from dsa_bench.record import CHECKSUM, RUN_SCHEMA, Case, Record, SchemaError, check_schema
from dsa_bench.untrusted import (
    MAX_TEXT,
    MIB,
    Refused,
    expect,
    expect_no_links,
    number,
    parse,
    read_file,
    text,
)

HEADER = "run.json"
UNFINISHED = f".{HEADER}"
"""A header that is being written."""
RECORDS = "records.jsonl"
FINDINGS = "findings.jsonl"
# statuses that a resume leaves alone; the others may end differently another time
ENDED = frozenset({"ok", "wrong", "skipped"})
LOST_WORKERS_LIMIT = 2
"""A case that killed this many workers is set aside."""

MAX_HEADER_BYTES = 16 * MIB
MAX_RECORDS_BYTES = 512 * MIB
MAX_LINE_BYTES = 8 * MIB
MAX_RECORDS = 1_000_000
MAX_FINDINGS_BYTES = 64 * MIB
MAX_FINDINGS = 100_000
MAX_MACHINE_NAME = 100
_CHECKSUM_FIELD = re.compile(rb',"crc32":"([0-9a-f]{8})"\}\Z')
# what reports and a resume read of the header, beside the plan
_HEADER_OBJECTS = ("machine", "versions", "options", "ceilings", "git", "sweep")
_HEADER_TEXTS = ("started", "verb")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run folder holds."""

    path: Path
    header: Mapping[str, Any]
    records: tuple[Record, ...]
    """One for each case and replicate, in the order in which they first ended."""
    torn: bool = False
    """The last line was cut off by a crash; it is not among the records."""
    findings: tuple[Finding, ...] = ()
    """On hostile inputs; empty where nobody asked for them."""

    @property
    def ended(self) -> frozenset[tuple[str, int]]:
        """(key of the case, replicate) that a resume need not run again.

        They ended for good, or have cost so many workers that they are set aside.
        """
        return frozenset(
            (r.case.key, r.replicate)
            for r in self.records
            if r.status in ENDED or r.lost_workers >= LOST_WORKERS_LIMIT
        )

    def lost_workers(self, key: str, replicate: int) -> int:
        """Workers that this replicate of the case has cost so far."""
        found = (r for r in self.records if (r.case.key, r.replicate) == (key, replicate))
        return next((r.lost_workers for r in found), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of the records, as `verify` looks at it."""

    number: int
    """From 1."""
    data: bytes
    """Without the newline."""
    record: Record | None
    """None: it can't be read."""
    fault: str = ""
    """Why it can't be read."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Appends records to one run folder."""

    descriptor: int

    def append(self, record: Record) -> None:
        """Save one record so that it outlives this process and a power cut."""
        data = line_of(record.to_json()) + b"\n"
        written = os.write(self.descriptor, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written (is the disk full?)")
        os.fsync(self.descriptor)


def line_of(fields: Mapping[str, Any]) -> bytes:
    """The line of a record without its newline, its checksum last."""
    plain = {name: _storable(value) for name, value in fields.items() if name != CHECKSUM}
    body = json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()
    return body[:-1] + b',"%s":"%08x"}' % (CHECKSUM.encode(), zlib.crc32(body))


def _storable(value: Any) -> Any:
    """The same JSON value as a reader takes it: null for NaN and infinities, texts not too long."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[: MAX_TEXT - 1] + "…"
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list | tuple) else value


def expect_free(path: Path) -> None:
    """UsageError if there is anything in this place; the beginning of a header that a killed run
    left behind doesn't count.
    """
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {UNFINISHED}):
        raise UsageError(
            f"{path} exists and isn't empty (choose another folder with -o,"
            f" or continue that run with --resume {path})"
        )


def create_run(path: Path, header: Mapping[str, Any]) -> None:
    """Make the folder with its header; refuse one that holds anything."""
    expect_free(path)
    content = json.dumps({"schema": RUN_SCHEMA} | dict(header), indent=1, allow_nan=False) + "\n"
    if len(content) > MAX_HEADER_BYTES:
        raise UsageError("the plan of this sweep is too large to be kept (split the sweep)")
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / HEADER, path / UNFINISHED, content.encode())
    (path / RECORDS).touch()


@contextlib.contextmanager
def open_writer(path: Path) -> Iterator[Writer]:
    """Append to the records of a run folder; a torn last line is cut off first.

    The folder is locked as long as the writer is open, so two runs cannot mix their records.
    """
    try:
        expect_no_links(path)
    except Refused as error:
        raise UsageError(str(error)) from None
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path / RECORDS, flags, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{path} is being written by another dsa-bench (wait for its end, or use -o)"
            ) from None
        os.ftruncate(descriptor, _read(path / RECORDS, MAX_RECORDS_BYTES).rfind(b"\n") + 1)
        yield Writer(descriptor)
    finally:
        os.close(descriptor)


def read_run(path: Path) -> Run:
    """The run in this folder; UsageError if it isn't one, or not one that this version can read."""
    header = read_header(path)
    lines, torn = _split(path)
    records: dict[tuple[str, int], Record] = {}
    for n, line in enumerate(lines, start=1):
        record = _read_record(f"{path / RECORDS}:{n}", line)
        records[record.case.key, record.replicate] = record
    return Run(
        path=path,
        header=header,
        records=tuple(records.values()),
        torn=torn,
        findings=read_findings(path),
    )


def is_run(path: Path) -> bool:
    """Whether a run was begun in this folder."""
    return os.path.lexists(path / HEADER)


def read_findings(path: Path) -> tuple[Finding, ...]:
    """What the folder says of hostile inputs, each input of an implementation once.

    UsageError where a line isn't one that dsa-bench wrote.
    """
    file = path / FINDINGS
    if not os.path.lexists(file):
        return ()
    *lines, rest = _read(file, MAX_FINDINGS_BYTES).split(b"\n")
    advice = f"(delete this file, then dsa-bench check --hostile -o {path})"
    if rest:
        raise UsageError(f"{file} breaks off in its last line {advice}")
    if len(lines) > MAX_FINDINGS:
        raise UsageError(f"{file} has more than {MAX_FINDINGS} lines (is this a dsa-bench run?)")
    found: dict[tuple[str, str, str], Finding] = {}
    for n, line in enumerate(lines, start=1):
        try:
            finding = _finding(line)
        except SchemaError as error:
            raise UsageError(f"{file}:{n}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}:{n}: isn't a finding: {error} {advice}") from None
        found[finding.op, finding.impl, finding.name] = finding
    return tuple(found.values())


def save_findings(path: Path, found: Sequence[Finding]) -> None:
    """Keep these findings in the folder, in place of all others on the same implementations.

    A process that is killed meanwhile leaves the file as it was or as it should be.
    """
    again = {(finding.op, finding.impl) for finding in found}
    with open_writer(path):
        others = [f for f in read_findings(path) if (f.op, f.impl) not in again]
        lines = (line_of(finding.to_json()) + b"\n" for finding in (*others, *found))
        _replace(path / FINDINGS, path / f".{FINDINGS}", b"".join(lines))


def _replace(file: Path, unfinished: Path, content: bytes) -> None:
    """Write the file under another name first, so that it is never there in part."""
    with unfinished.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)


def read_lines(path: Path) -> tuple[tuple[Line, ...], bool]:
    """(every line of the records with its record or what is wrong with it, the last one is torn).

    UsageError only where the file as a whole can't be read.
    """
    lines, torn = _split(path)
    return tuple(_read_line(n, line) for n, line in enumerate(lines, start=1)), torn


def _read_line(number: int, data: bytes) -> Line:
    try:
        return Line(number=number, data=data, record=_record(data))
    except (ValueError, RecursionError) as error:
        return Line(number=number, data=data, record=None, fault=str(error))


def _split(path: Path) -> tuple[list[bytes], bool]:
    """Lines of the records without newlines, and whether more follows the last newline."""
    file = path / RECORDS
    data = _read(file, MAX_RECORDS_BYTES) if os.path.lexists(file) else b""
    if data.count(b"\n") > MAX_RECORDS:
        raise UsageError(f"{file} has more than {MAX_RECORDS} lines (is this a dsa-bench run?)")
    *lines, rest = data.split(b"\n")
    return lines, bool(rest)


def _read(file: Path, limit: int) -> bytes:
    try:
        return read_file(file, limit)
    except Refused as error:
        raise UsageError(f"{file} {error}") from None


def read_header(path: Path) -> dict[str, Any]:
    """The header of the run in this folder; UsageError as of `read_run`."""
    file = path / HEADER
    if not path.exists():
        raise UsageError(f"{path} doesn't exist (give the folder that dsa-bench run has written)")
    if not os.path.lexists(file):
        state = "is empty" if path.is_dir() and not any(path.iterdir()) else f"has no {HEADER}"
        raise UsageError(f"{path} {state} (give the folder that dsa-bench run has written)")
    data = _read(file, MAX_HEADER_BYTES)
    try:
        header = parse(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} isn't JSON: {error} (cut off? run the sweep again)") from None
    if not isinstance(header, dict):
        raise UsageError(f"{file} must hold a JSON object (is this a dsa-bench run folder?)")
    try:
        check_schema(header.get("schema"), RUN_SCHEMA)
        _check_header(header)
    except (SchemaError, Refused) as error:
        raise UsageError(f"{file}: {error}") from None
    return header


def _check_header(header: Mapping[str, Any]) -> None:
    """Refused where a field that others read isn't of its type."""
    # what a version had nothing to say on is missing or null
    given = {name: value for name, value in header.items() if value is not None}
    for name in _HEADER_OBJECTS:
        if name in header and not (name == "ceilings" and header[name] is None):
            expect(Mapping[str, Any], header[name], name)
    for name in _HEADER_TEXTS:
        if name in header:
            text(header[name], name)
    expect(tuple[str, ...], header.get("argv", ()), "argv")
    expect(int, header.get("protocol", 0), "protocol")
    machine, options = given.get("machine", {}), given.get("options", {})
    for name in ("name", "device"):
        if machine.get(name) is not None:
            text(machine[name], f"machine.{name}", MAX_MACHINE_NAME)
    for name in ("device", "effort"):
        if name in options:
            text(options[name], f"options.{name}")
    for name, high in (("timeout", 1e9), ("gpu_hour_usd", 1e6)):
        if options.get(name) is not None:
            number(options[name], f"options.{name}", low=0.0, high=high)
    if not 1 <= expect(int, options.get("replicates", 1), "options.replicates") <= MAX_RECORDS:
        raise Refused("options.replicates must be at least 1")
    for name, value in given.get("ceilings", {}).items():
        # a rate so small that a floor over it is no number would be none either
        if isinstance(value, int | float) and value != 0:
            number(value, f"ceilings.{name}", low=1e-6)
    for i, item in enumerate(expect(tuple[Any, ...], header.get("plan", ()), "plan")):
        planned = expect(Mapping[str, Any], item, f"plan[{i}]")
        text(planned.get("reason", ""), f"plan[{i}].reason")
        Case.from_json(expect(Mapping[str, Any], planned.get("case"), f"plan[{i}].case"))


def _read_record(place: str, line: bytes) -> Record:
    try:
        return _record(line)
    except SchemaError as error:
        raise UsageError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: isn't a record: {error} (delete this line)") from None


def _record(line: bytes) -> Record:
    """The record of a line; ValueError where it is none, or not as it was written."""
    if len(line) > MAX_LINE_BYTES:
        raise Refused(f"the line is longer than {MAX_LINE_BYTES // MIB} MiB")
    data = parse(line)
    # asked first: of a line that was changed, the change is what matters
    if isinstance(data, dict) and CHECKSUM in data:
        _expect_checksum(line)
    return Record.from_json(data)


def _finding(line: bytes) -> Finding:
    """The finding of a line; ValueError where it is none, or not as it was written."""
    if len(line) > MAX_LINE_BYTES:
        raise Refused(f"the line is longer than {MAX_LINE_BYTES // MIB} MiB")
    data = parse(line)
    _expect_checksum(line)
    return Finding.from_json(data)


def _expect_checksum(line: bytes) -> None:
    field = _CHECKSUM_FIELD.search(line)
    if field is None:
        raise Refused(f"{CHECKSUM} must be the last field, as dsa-bench writes it")
    expected = f"{zlib.crc32(line[: field.start()] + b'}'):08x}"
    if field[1].decode() != expected:
        raise Refused(f"its {CHECKSUM} is {field[1].decode()}, that of its text is {expected}:"
                      " the line was changed or damaged")  # fmt: skip
