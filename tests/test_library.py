"""Foreign libraries: missing, broken, crashing and well, told apart in one sentence each."""

import sys
from pathlib import Path

import pytest

from dsa_bench import library
from dsa_bench.library import Library


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a Library whose `load` has this body, importable here and in a process of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")

    def make(name: str, body: str) -> Library:
        (tmp_path / f"{name}.py").write_text(f"def load():\n    {body}\n")
        module = __import__(name)
        return Library(
            title="Foreign",
            modules=(name,),
            distributions=(name,),
            install=f"pip install {name}",
            load=module.load,
        )

    yield make
    for name in [n for n in sys.modules if n.startswith("foreign_")]:
        del sys.modules[name]


def test_a_missing_library_says_what_to_type() -> None:
    missing = Library(
        title="Foreign",
        modules=("no_such_module",),
        distributions=("no-such",),
        install="pip install no-such",
        load=lambda: None,
    )
    assert missing.obstacle() == "Foreign is not installed (pip install no-such)"
    assert missing.version() is None


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_broken_library_is_named_with_its_error(loader, monkeypatch, in_worker: bool) -> None:
    monkeypatch.setattr(library, "_loads_here", in_worker)
    broken = loader(f"foreign_broken_{in_worker}", "raise OSError('undefined symbol: x')")
    assert broken.obstacle() == (
        "Foreign is installed but does not load: OSError: undefined symbol: x"
        f" (try {broken.install})"
    )


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_library_that_loads_is_no_obstacle(loader, monkeypatch, in_worker: bool) -> None:
    monkeypatch.setattr(library, "_loads_here", in_worker)
    assert loader(f"foreign_well_{in_worker}", "print('it also prints')").obstacle() is None


def test_a_library_that_crashes_takes_only_its_own_process(loader) -> None:
    crashing = loader("foreign_crash", "import os; os.kill(os.getpid(), 11)")
    assert "its import was killed by signal 11" in str(crashing.obstacle())


def test_a_library_that_leaves_the_process_is_no_success(loader) -> None:
    leaving = loader("foreign_exit", "import os; os._exit(0)")
    assert "ended the process with exit code 0" in str(leaving.obstacle())


def test_a_library_that_hangs_is_given_up(loader, monkeypatch) -> None:
    monkeypatch.setattr(library, "LOAD_TIMEOUT", 0.2)
    hanging = loader("foreign_hang", "import time; time.sleep(60)")
    assert "did not load within 0 s" in str(hanging.obstacle())
