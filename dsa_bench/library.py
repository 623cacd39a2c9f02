"""Other people's libraries: is one installed, does it load, and if not, what to type.

A wheel that is present need not work: built against another torch, without a system library, for
another CUDA. So each is loaded once to see, in a process of its own unless this one is a worker: a
library that crashes while it loads takes no run with it.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

LOAD_TIMEOUT = 120.0
"""Seconds; some libraries build a part of themselves when first imported."""

_loads_here = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One foreign package and how to get it."""

    title: str
    """As its authors write it: FlashMLA."""
    modules: tuple[str, ...]
    """Modules, any of which provides it; the first that is found counts."""
    distributions: tuple[str, ...]
    """Names on PyPI, in the same order; of which the version is told."""
    install: str
    """What to type: `pip install fa3-fwd`."""
    load: Callable[[], object]
    """Imports it and returns what its user needs; any exception means that it is broken. A function
    of a module, so that another process can find it by name."""

    def found(self) -> str | None:
        """The module that would provide it, or None; nothing but parents of it is imported."""
        return next((m for m in self.modules if _is_there(m)), None)

    def version(self) -> str | None:
        """The version of the distribution that is installed, or None where none is recorded."""
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def obstacle(self) -> str | None:
        """Why it cannot be used here, in a sentence; None where it can."""
        if self.found() is None:
            return f"{self.title} is not installed ({self.install})"
        error = _error_here(self.load) if _loads_here else _error_elsewhere(self.load)
        if error is None:
            return None
        version = self.version()
        named = f"{self.title} {version}" if version else self.title
        return f"{named} is installed but does not load: {error} (try {self.install})"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # a parent that is missing or does not load, or a module without a spec
        return False


def load_here() -> None:
    """From now on load libraries in this process: for workers, which may die."""
    global _loads_here
    _loads_here = True


def first_line(error: BaseException) -> str:
    """Type and first line of the message of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@cache
def _error_here(load: Callable[[], object]) -> str | None:
    try:
        load()
    except Exception as error:
        return first_line(error)
    return None


PROBE = """
import json, sys
from dsa_bench.library import first_line
from dsa_bench.plugins import import_named
module, name = sys.argv[1:]
try:
    getattr(import_named(module), name)()
    print(json.dumps(None))
except Exception as error:
    print(json.dumps(first_line(error)))
"""


@cache
def _error_elsewhere(load: Callable[[], object]) -> str | None:
    command = [sys.executable, "-c", PROBE, load.__module__, load.__qualname__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"it did not load within {LOAD_TIMEOUT:.0f} s"
    if done.returncode < 0:
        return f"its import was killed by signal {-done.returncode}"
    try:
        # libraries print too; the verdict is the last line
        verdict = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return f"its import ended the process with exit code {done.returncode}"
    return None if verdict is None else str(verdict)
