"""Implementations that others bring: found, refused, named when broken, and examined."""

import json
import os
import sys
from pathlib import Path

import pytest

from dsa_bench import conformance, plugins, registry
from dsa_bench.cli import call
from dsa_bench.operator import UsageError

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "my_topk.py"
WRONG = """
import torch
from dsa_bench.kernels.topk import TopkOutputs
from dsa_bench.operator import Implementation
def run(inputs):
    best = inputs.index_logits.topk(inputs.topk, dim=1).indices
    return TopkOutputs(best.to(torch.int32))
IMPLEMENTS = "topk"
IMPLEMENTATIONS = (Implementation(name="careless", run=run),)
"""


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that --impl-file sets is put back after each test."""
    monkeypatch.setenv(plugins.ENVIRONMENT, "")


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_joins_its_operator() -> None:
    plugins.use([EXAMPLE])
    assert "by_sorting" in registry.implementations("topk")
    assert registry.brought_by_files() == {"topk": ("by_sorting",)}
    assert [item["path"] for item in plugins.digests()] == [str(EXAMPLE)]
    os.environ[plugins.ENVIRONMENT] = ""
    assert "by_sorting" not in registry.implementations("topk")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\ny = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("import no_such_library\n", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "has no IMPLEMENTATIONS"),
        ("IMPLEMENTATIONS = ()\n", "must name its operator"),
        ("IMPLEMENTS = 'topq'\nIMPLEMENTATIONS = ()\n", "there is no operator 'topq'"),
        ("IMPLEMENTATIONS = {'topk': (3,)}\n", "topk: 3 is no Implementation"),
        (WRONG.replace("careless", "reference"), "has an implementation 'reference' already"),
    ],
)
def test_a_bad_file_ends_in_one_sentence(tmp_path: Path, text: str, sentence: str, capsys) -> None:
    path = written(tmp_path, "bad.py", text)
    assert call(["list", "--impl-file", str(path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and str(path) in said and said.count("\n") == 1


def test_a_missing_file_is_refused(capsys) -> None:
    assert call(["list", "--impl-file", "/no/such.py"]) == 2
    assert "/no/such.py is no file" in capsys.readouterr().err


def installed(folder: Path, module: str, text: str) -> None:
    """A distribution `other` 1.0 whose entry point names this module."""
    written(folder, f"{module}.py", text)
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    written(info, "METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    written(info, "entry_points.txt", f"[{plugins.GROUP}]\nnice = {module}\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (WRONG, ""),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("x = 1\n", "has no IMPLEMENTATIONS"),
        (WRONG.replace("careless", "reference"), "already"),
    ],
)
def test_an_entry_point_is_found_and_a_broken_one_breaks_nothing(
    tmp_path: Path, monkeypatch, text: str, problem: str
) -> None:
    module = f"other_{abs(hash(text))}"
    installed(tmp_path, module, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._catalogue.cache_clear()
    try:
        (plugin,) = registry.catalogue().plugins
        assert (plugin.name, plugin.source) == ("nice", "other 1.0")
        assert problem in plugin.problem and bool(problem) == bool(plugin.problem)
        assert ("careless" in registry.implementations("topk")) == (not problem)
    finally:
        registry._catalogue.cache_clear()
        sys.modules.pop(module, None)


def test_the_example_passes_the_hostile_inputs_and_a_careless_one_does_not(tmp_path: Path) -> None:
    plugins.use([EXAMPLE, written(tmp_path, "careless.py", WRONG)])
    found = conformance.examine({"topk": ("by_sorting", "careless")}, "cpu")
    verdicts = {(f.impl, f.name.split()[-1], f.name.split()[0]): f.verdict for f in found}
    assert {v for (impl, *_), v in verdicts.items() if impl == "by_sorting"} == {"ok"}
    assert verdicts["careless", "random", "decode"] == "ok"
    assert verdicts["careless", "constant", "prefill"] == "wrong"
    assert verdicts["careless", "special", "decode"] == "wrong"
    assert len(found) == 2 * 2 * 11


def test_a_crash_is_a_finding(tmp_path: Path) -> None:
    text = WRONG.replace("    best =", "    import os; os._exit(7)\n    best =")
    plugins.use([written(tmp_path, "crash.py", text)])
    (finding,) = conformance.examine({"topk": ("careless",)}, "cpu")
    assert finding.is_bad and "exit code 7" in finding.reason


def test_check_examines_the_file_and_fails_with_it(tmp_path: Path, capsys) -> None:
    small = ["--op", "topk", "-L", "64", "--seq-len-q", "8", "-k", "16", "--device", "cpu"]
    good = ["check", "--impl-file", str(EXAMPLE), "--impl", "by_sorting", *small]
    assert call([*good, "--no-progress"]) == 0
    assert "prefill bf16 L=300 two-valued" in capsys.readouterr().out
    careless = written(tmp_path, "careless.py", WRONG)
    bad = ["check", "--impl-file", str(careless), "--impl", "reference", *small]
    assert call([*bad, "--no-progress"]) == 3
    assert "wrong_values" in capsys.readouterr().out


def test_a_run_measures_the_file_and_resume_wants_it_unchanged(tmp_path: Path, capsys) -> None:
    mine = written(tmp_path, "mine.py", EXAMPLE.read_text())
    folder = tmp_path / "run"
    small = ["--op", "topk", "--phase", "prefill", "-L", "64", "--seq-len-q", "8", "-k", "16"]
    arguments = ["run", "--impl-file", str(mine), "--impl", "by_sorting", *small]
    assert call([*arguments, "--device", "cpu", "--no-progress", "-o", str(folder)]) == 0
    (line,) = (folder / "records.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["status"] == "ok" and record["reproduce"].endswith(f"--impl-file {mine}")
    header = json.loads((folder / "run.json").read_text())
    assert header["impl_files"] == plugins.digests()
    os.environ[plugins.ENVIRONMENT] = ""
    capsys.readouterr()
    assert call(["run", "--resume", str(folder)]) == 2
    assert f"was begun with --impl-file {mine}" in capsys.readouterr().err
    mine.write_text(mine.read_text() + "# changed\n")
    assert call(["run", "--resume", str(folder), "--impl-file", str(mine)]) == 2


def test_use_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(plugins.BrokenPlugin, match="is no file"):
        plugins.use([tmp_path])
    plugins.use([written(tmp_path, "broken.py", "1 / 0\n")])
    with pytest.raises(UsageError, match="line 1"):
        registry.catalogue()
