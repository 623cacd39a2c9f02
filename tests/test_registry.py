"""What the registry finds, chooses and refuses, on fake operators and on the real folders."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dsa_bench import registry
from dsa_bench.library import Library
from dsa_bench.operator import Machine, Unsupported, UsageError
from dsa_bench.preset import PRESETS
from tests import fake_operator
from tests.fake_operator import CPU, case

PRESET = PRESETS["v3.2"]
GPU = Machine(device="cuda", name="test", capability=(9, 0))


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_operator.catalogue()
    monkeypatch.setattr(registry, "catalogue", lambda: found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A namespace package `fake_kernels` to write modules into."""
    root = tmp_path / "fake_kernels"
    root.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [n for n in sys.modules if n.partition(".")[0] == "fake_kernels"]:
        del sys.modules[name]


def test_unknown_operator_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown operator 'doubel'; did you mean 'double'"):
        registry.operator("doubel")
    with pytest.raises(UsageError, match="unknown operator 'xyz'; known: double, shift, affine"):
        registry.operator("xyz")


def test_unknown_implementation_lists_the_known_ones() -> None:
    expected = "unknown implementation 'gluoon' of shift; known: reference, best"
    with pytest.raises(UsageError, match=expected):
        registry.implementation("shift", "gluoon")


def test_every_operator_has_its_reference() -> None:
    inputs = fake_operator.make_inputs(fake_operator.FakeShape(num_rows=3), seed=0, device="cpu")
    reference = registry.implementation("shift", "reference")
    assert (reference.run(inputs).out == inputs.x + 1).all()
    assert list(registry.implementations("affine")) == ["reference"]


@pytest.mark.parametrize(("machine", "expected"), [(CPU, "best"), (GPU, "gpu")])
def test_auto_is_the_highest_priority_that_is_supported(machine: Machine, expected: str) -> None:
    assert registry.choose("double", case(), PRESET, machine) == expected


def test_auto_of_a_composition_names_every_stage() -> None:
    chosen = registry.choose("affine", case(op="affine"), PRESET, GPU)
    assert chosen == {"double": "gpu", "shift": "best"}


def test_auto_of_a_senseless_shape_is_the_reference() -> None:
    senseless = case(op="affine", seq_len_q=300)
    assert registry.choose("double", senseless, PRESET, CPU) == "reference"
    assert registry.choose("affine", senseless, PRESET, CPU) == {
        "double": "reference",
        "shift": "reference",
    }


def test_available_is_best_first_and_without_reference() -> None:
    names = registry.available("double", case(), PRESET, GPU)
    assert names[:2] == ["gpu", "best"]
    assert "reference" not in names and "triton" not in names
    assert registry.available("affine", case(op="affine"), PRESET, CPU) == ["reference"]


def test_resolve_a_composition_runs_its_stages_in_order() -> None:
    wanted = case({"double": "best", "shift": "reference"}, op="affine")
    found = registry.resolve(wanted, CPU)
    inputs = found.operator.make_inputs(found.shape, seed=0, device="cpu")
    assert found.reason is None
    assert (found.run(inputs).out == 2 * inputs.x + 1).all()
    assert {stage: part.name for stage, part in found.parts.items()} == wanted.impl


def test_one_name_stands_for_all_stages_of_a_composition() -> None:
    found = registry.resolve(case("best", op="affine"), CPU)
    assert {stage: part.name for stage, part in found.parts.items()} == {
        "double": "best",
        "shift": "best",
    }
    with pytest.raises(UsageError, match="unknown implementation 'good' of shift"):
        registry.resolve(case("good", op="affine"), CPU)


def test_resolve_tells_the_stage_of_an_obstacle() -> None:
    single = registry.resolve(case("gpu"), CPU)
    assert single.reason == "needs a CUDA GPU"
    composed = registry.resolve(case({"double": "gpu", "shift": "best"}, op="affine"), CPU)
    assert composed.reason == "double: needs a CUDA GPU"


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        (case(phase="train"), Unsupported, "double has no phase train"),
        (case(seq_len_q=300), Unsupported, "more queries than keys"),
        (case(preset="v9"), UsageError, "unknown preset 'v9'; known: v3.2, v3.2-cpu"),
        (case({"a": "b"}), UsageError, "double has no stages"),
        (case({"double": "best"}, op="affine"), UsageError, "has the stages double, shift"),
    ],
)
def test_resolve_refuses(wanted: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        registry.resolve(wanted, CPU)  # type: ignore[arg-type]


def test_a_phase_that_an_operator_lacks_may_have_a_sentence_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = registry.catalogue().operators
    hinted = dataclasses.replace(known["double"], instead={"train": "take shift"})
    monkeypatch.setitem(known, "double", hinted)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=r"^take shift$"):
        registry.resolve(case(phase="train"), CPU)


def test_obstacles_are_those_of_the_parts_that_only_the_reference_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    affine = case(op="affine")
    assert registry.obstacles("affine", affine, PRESET, CPU) == []
    parts = registry.catalogue().implementations["shift"]
    refusing = dataclasses.replace(parts["best"], supports=lambda shape, machine: "not here")
    monkeypatch.setitem(parts, "best", refusing)  # type: ignore[arg-type]
    # those of `double`, which something can do, are left out
    assert registry.obstacles("affine", affine, PRESET, CPU) == ["not here"]


def test_workspace_limit_reaches_the_shape() -> None:
    assert registry.resolve(case(), CPU, workspace_bytes=77).shape.workspace_bytes == 77


def test_missing_library_keeps_the_name_known_and_says_why() -> None:
    rows = {(r["operator"], r["implementation"]): r for r in registry.list_rows(CPU)}
    broken = rows["double", "triton"]
    assert not broken["available"]
    assert broken["reason"] == (
        "triton cannot be imported: No module named 'triton' (pip install triton)"
    )
    assert rows["double", "best"]["available"] and rows["double", "best"]["reason"] == ""
    assert rows["double", "gpu"]["reason"] == "needs a CUDA GPU"


@pytest.mark.parametrize(
    ("found", "version", "install"), [(None, None, "pip install it"), ("it", "1.2", "")]
)
def test_list_says_what_to_type_for_a_missing_library(monkeypatch, found, version, install) -> None:
    library = Library(
        title="It", modules=("it",), distributions=("it",), install="pip install it", load=object
    )
    monkeypatch.setattr(Library, "found", lambda self: found)
    monkeypatch.setattr(Library, "version", lambda self: version)
    known = registry.catalogue().implementations["double"]
    part = dataclasses.replace(known["gpu"], library=library)
    monkeypatch.setitem(known, "gpu", part)
    row = next(r for r in registry.list_rows(CPU) if r["implementation"] == "gpu")
    assert (row["library"], row["version"], row["install"]) == ("It", version or "", install)
    assert row["reason"] == "needs a CUDA GPU"


def test_scan_reads_a_folder_and_survives_a_missing_library(folder: Path) -> None:
    (folder / "double.py").write_text("from tests.fake_operator import DOUBLE as OPERATOR\n")
    (folder / "double_fast.py").write_text(
        "from dsa_bench.operator import Implementation\nfrom tests.fake_operator import good\n"
        "IMPLEMENTS = 'double'\nIMPLEMENTATIONS = (Implementation(name='fast', run=good),)\n"
    )
    (folder / "double_other.py").write_text("import a_library_that_nobody_has\n")
    (folder / "subject.py").write_text("SIZE = 3\n")
    import fake_kernels  # type: ignore[import-not-found]

    found = registry.scan([fake_kernels])
    assert list(found.operators) == ["double"]
    assert sorted(found.implementations["double"]) == ["fast", "other", "reference"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("import dsa_bench.kernels.no_such_thing\n", ModuleNotFoundError, "no_such_thing"),
        ("import a_library_that_nobody_has\n", ModuleNotFoundError, "nobody_has"),
        ("IMPLEMENTATIONS = ()\n", ValueError, "must name its operator"),
        ("IMPLEMENTATIONS = {'tripel': ()}\n", ValueError, "implements 'tripel'"),
    ],
)
def test_scan_does_not_hide_our_own_mistakes(
    folder: Path, text: str, kind: type[Exception], message: str
) -> None:
    (folder / "stray.py").write_text(text)
    import fake_kernels

    with pytest.raises(kind, match=message):
        registry.scan([fake_kernels])


def test_the_folders_hold_what_the_tool_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsa_bench.baselines
    import dsa_bench.kernels

    packages: tuple[ModuleType, ...] = (dsa_bench.kernels, dsa_bench.baselines)
    found = registry.scan(packages)
    wanted = {"indexer", "topk", "sparse_prefill", "paged_indexer", "sparse_decode", "dsa"}
    assert wanted <= set(found.operators)
    for operator in found.operators.values():
        for phase in operator.phases if operator.stages is not None else ():
            assert operator.stages is not None
            assert set(operator.stages(phase)) <= set(found.operators)
