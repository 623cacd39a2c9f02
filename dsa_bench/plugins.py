"""Implementations that others bring: files given with --impl-file, and installed entry points.

Both hold what a module of baselines/ holds: `IMPLEMENTATIONS`, a dict from operators to tuples of
`Implementation`, or a tuple for the operator that `IMPLEMENTS` names.

Files are the word of the person at the keyboard: what is wrong with one ends the command with a
sentence. They reach the workers by an environment variable. A package that is installed may have
nothing to do with the command, so a broken entry point is only listed with its error.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dsa_bench.library import first_line
from dsa_bench.operator import Implementation, Machine

GROUP = "dsa_bench.implementations"
ENVIRONMENT = "DSA_BENCH_IMPL_FILES"
PREFIX = "dsa_bench_impl_file_"
"""Of the names of modules that are made from files."""
NAME = re.compile(r"(?!(auto|all)$)[\w.-]+")
"""What --impl can name."""


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
        if os.pathsep in str(path):
            raise BrokenPlugin(f"--impl-file {path} has a {os.pathsep!r} in its path (move it)")
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


def import_named(name: str) -> ModuleType:
    """Import a module by name, also one made from a file in use: for another process."""
    if name.startswith(PREFIX) and name not in sys.modules:
        for path in files():
            _load_file(path)
    return importlib.import_module(name)


def _load_file(path: Path) -> Plugin:
    # two files may have one name
    name = f"{PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BrokenPlugin(f"--impl-file {path} is no Python file (its name must end in .py)")
    module: ModuleType = importlib.util.module_from_spec(spec)
    # dataclasses, pickle and torch.compile look a module up by its name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise BrokenPlugin(
            f"--impl-file {path}, line {_line_in(error, path)}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, "IMPLEMENTATIONS"):
        raise BrokenPlugin(
            f"--impl-file {path} has no IMPLEMENTATIONS (see docs/implementations.md)"
        )
    return Plugin(name=path.stem, source=str(path), offer=module, is_file=True)


def _line_in(error: BaseException, path: Path) -> int | str:
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
    except (Exception, SystemExit) as error:
        return Plugin(name=entry.name, source=source, problem=first_line(error))
    problem = "" if hasattr(offer, "IMPLEMENTATIONS") else f"{entry.value} has no IMPLEMENTATIONS"
    return Plugin(name=entry.name, source=source, offer=offer, problem=problem)


def offered(name: str, module: Any) -> Mapping[str, tuple[Implementation, ...]]:
    """Operator -> what a module has for it; ValueError where it names none."""
    found = getattr(module, "IMPLEMENTATIONS", None)
    if found is None:
        return {}
    if isinstance(found, Mapping):
        return found
    if not isinstance(getattr(module, "IMPLEMENTS", None), str):
        raise ValueError(f'{name}.py must name its operator (IMPLEMENTS = "topk")')
    return {module.IMPLEMENTS: found}


def join(offers: dict[str, dict[str, Implementation]], plugin: Plugin) -> str:
    """Add what a plug-in offers to `offers`, all or nothing; why not, or an empty text."""
    try:
        brought = offered(plugin.name, plugin.offer)
    except ValueError as error:
        return str(error)
    joined = {}
    for name, parts in brought.items():
        if name not in offers:
            return f"there is no operator {name!r} (known: {', '.join(offers)})"
        if not isinstance(parts, tuple | list):
            return f"{name}: {parts!r} must be a tuple (write a comma behind a single one)"
        joined[name] = dict(offers[name])
        for part in parts:
            problem = _misfit(joined[name], part)
            if problem:
                return f"{name}: {problem}"
            joined[name][part.name] = _guarded(part)
    offers |= joined
    return ""


def _misfit(offer: Mapping[str, Implementation], part: object) -> str:
    """Why this can't be one more implementation beside these, or an empty text."""
    if not isinstance(part, Implementation):
        return f"{part!r} is no Implementation (from dsa_bench.operator)"
    if not isinstance(part.name, str) or not NAME.fullmatch(part.name):
        return f"{part.name!r} is no name (letters, digits, '_', '-' and '.', not auto or all)"
    if part.name in offer:
        return f"there is an implementation {part.name!r} already (choose another name)"
    return ""


def _guarded(part: Implementation) -> Implementation:
    """The same with a `supports` that never raises: what others wrote must not end a plan."""

    def supports(shape: Any, machine: Machine) -> str | None:
        try:
            reason = part.supports(shape, machine)
        except Exception as error:
            return f"supports of {part.name} raised {first_line(error)}"
        if reason is None or isinstance(reason, str):
            return reason
        return f"supports of {part.name} gave {reason!r} (it must give None or a reason)"

    return dataclasses.replace(part, supports=supports)
