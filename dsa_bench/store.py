"""A run folder: its header `run.json`, written once, and `records.jsonl`, a line for each ending.

One record is one `write` on an append-only descriptor followed by `fsync`, so a run that is killed
at any moment loses at most the case in flight. A last line without its newline is torn: reading
leaves it out and says so, and writing again cuts it off. Where a case ended more than once (after a
resume), its newest record holds.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_bench.operator import UsageError
from dsa_bench.record import RUN_SCHEMA, Record, SchemaError, check_schema

HEADER = "run.json"
RECORDS = "records.jsonl"
# statuses that a resume leaves alone; the others may end differently another time
ENDED = frozenset({"ok", "wrong", "skipped"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run folder holds."""

    path: Path
    header: Mapping[str, Any]
    records: tuple[Record, ...]
    """One for each case, in the order in which the cases first ended."""
    torn: bool = False
    """The last line was cut off by a crash; it is not among the records."""

    @property
    def ended(self) -> frozenset[str]:
        """Keys of the cases that a resume need not run again."""
        return frozenset(r.case.key for r in self.records if r.status in ENDED)


@dataclass(frozen=True, slots=True)
class Writer:
    """Appends records to one run folder."""

    descriptor: int

    def append(self, record: Record) -> None:
        """Save one record so that it outlives this process and a power cut."""
        line = json.dumps(_finite(record.to_json()), allow_nan=False, separators=(",", ":"))
        data = line.encode() + b"\n"
        written = os.write(self.descriptor, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written (is the disk full?)")
        os.fsync(self.descriptor)


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities, which JSON doesn't have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def expect_free(path: Path) -> None:
    """UsageError if there is anything in this place."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(
            f"{path} exists and isn't empty (choose another folder with -o,"
            f" or continue that run with --resume {path})"
        )


def create_run(path: Path, header: Mapping[str, Any]) -> None:
    """Make the folder with its header; refuse one that holds anything."""
    expect_free(path)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": RUN_SCHEMA} | dict(header), indent=1, allow_nan=False) + "\n"
    temporary = path / f".{HEADER}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / HEADER)
    (path / RECORDS).touch()


@contextlib.contextmanager
def open_writer(path: Path) -> Iterator[Writer]:
    """Append to the records of a run folder; a torn last line is cut off first.

    The folder is locked as long as the writer is open, so two runs cannot mix their records.
    """
    descriptor = os.open(path / RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{path} is being written by another dsa-bench (wait for its end, or use -o)"
            ) from None
        data = (path / RECORDS).read_bytes()
        os.ftruncate(descriptor, data.rfind(b"\n") + 1)
        yield Writer(descriptor)
    finally:
        os.close(descriptor)


def read_run(path: Path) -> Run:
    """The run in this folder; UsageError if it isn't one, or not one that this version can read."""
    header = _read_header(path)
    file = path / RECORDS
    data = file.read_bytes() if file.exists() else b""
    *lines, rest = data.split(b"\n")
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        record = _read_record(f"{file}:{number}", line)
        records[record.case.key] = record
    return Run(path=path, header=header, records=tuple(records.values()), torn=bool(rest))


def _read_header(path: Path) -> dict[str, Any]:
    file = path / HEADER
    if not path.exists():
        raise UsageError(f"{path} doesn't exist (give the folder that dsa-bench run has written)")
    if not file.is_file():
        state = "is empty" if path.is_dir() and not any(path.iterdir()) else f"has no {HEADER}"
        raise UsageError(f"{path} {state} (give the folder that dsa-bench run has written)")
    try:
        header = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} isn't JSON: {error} (cut off? run the sweep again)") from None
    if not isinstance(header, dict):
        raise UsageError(f"{file} must hold a JSON object (is this a dsa-bench run folder?)")
    try:
        check_schema(header.get("schema"), RUN_SCHEMA)
    except SchemaError as error:
        raise UsageError(f"{file}: {error}") from None
    return header


def _read_record(place: str, line: bytes) -> Record:
    try:
        return Record.from_json(json.loads(line))
    except SchemaError as error:
        raise UsageError(f"{place}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{place}: isn't a record: {type(error).__name__}: {error} (delete this line)"
        ) from None
