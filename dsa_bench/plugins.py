"""Implementations that others bring: files given with --impl-file, and installed entry points.

Both hold what a module of baselines/ holds: `IMPLEMENTATIONS`, a dict from operators to tuples of
`Implementation`, or a tuple for the operator that `IMPLEMENTS` names.

Files are the word of the person at the keyboard: what is wrong with one ends the command with a
sentence. They reach the workers by an environment variable. A package that is installed may have
nothing to do with the command, so a broken entry point is only listed with its error.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "dsa_bench.implementations"
ENVIRONMENT = "DSA_BENCH_IMPL_FILES"


class BrokenPlugin(Exception):
    """A file that was asked for cannot be used; the text says where and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """One file or entry point."""

    name: str
    source: str
    """The path of the file, or the distribution of the entry point."""
    offer: Any = None
    """A module or another object with `IMPLEMENTATIONS`; None of a broken one."""
    problem: str = ""
    is_file: bool = False


def use(paths: Iterable[Path]) -> None:
    """Take these files from now on, here and in the processes that this one starts."""
    absolute = [path.expanduser().resolve() for path in paths]
    for path in absolute:
        if not path.is_file():
            raise BrokenPlugin(f"--impl-file {path} is no file (give the path of a Python file)")
    os.environ[ENVIRONMENT] = os.pathsep.join(map(str, absolute))


def files() -> tuple[Path, ...]:
    """The files in use."""
    named = os.environ.get(ENVIRONMENT, "")
    return tuple(Path(name) for name in named.split(os.pathsep) if name)


def digests() -> list[dict[str, str]]:
    """Path and SHA-256 of each file in use, as run.json keeps them."""
    return [
        {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files()
    ]


def load() -> tuple[Plugin, ...]:
    """Every file in use and every entry point that is installed; BrokenPlugin for a bad file."""
    return (*map(_load_file, files()), *map(_load_entry, _entry_points()))


def _load_file(path: Path) -> Plugin:
    spec = importlib.util.spec_from_file_location(f"dsa_bench_impl_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BrokenPlugin(f"--impl-file {path} is no Python file (its name must end in .py)")
    module: ModuleType = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BrokenPlugin(
            f"--impl-file {path}, line {_line_in(error, path)}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, "IMPLEMENTATIONS"):
        raise BrokenPlugin(
            f"--impl-file {path} has no IMPLEMENTATIONS (see docs/implementations.md)"
        )
    return Plugin(name=path.stem, source=str(path), offer=module, is_file=True)


def _line_in(error: Exception, path: Path) -> int | str:
    """The last line of this file that the error went through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or "?"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return (lines[-1] or "?") if lines else "?"


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value))


def _load_entry(entry: importlib.metadata.EntryPoint) -> Plugin:
    source = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
    try:
        offer = entry.load()
    except Exception as error:
        return Plugin(name=entry.name, source=source, problem=f"{type(error).__name__}: {error}")
    problem = "" if hasattr(offer, "IMPLEMENTATIONS") else f"{entry.value} has no IMPLEMENTATIONS"
    return Plugin(name=entry.name, source=source, offer=offer, problem=problem)
