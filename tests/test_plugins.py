"""Implementations that others bring: found, refused, named when broken, and examined."""

import contextlib
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsa_bench import conformance, machine, plugins, registry, store
from dsa_bench.cli import call
from dsa_bench.finding import Finding
from dsa_bench.kernels.hostile import MUTATIONS
from dsa_bench.kernels.paging import unpack_mla_rows
from dsa_bench.operator import Implementation, Machine, Unsupported, UsageError

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "examples" / "my_topk.py"
COMMANDS = re.findall(r"^dsa-bench (.*)$", (DOCS / "implementations.md").read_text(), re.MULTILINE)
KINDS = 1 + len(MUTATIONS["topk"])
"""Of hostile inputs of topk, the random ones among them."""
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
        ("IMPLEMENTS = 3\nIMPLEMENTATIONS = ()\n", "must name its operator"),
        ("IMPLEMENTATIONS = {'topk': (3,)}\n", "topk: 3 is no Implementation"),
        (WRONG.replace("run=run),", "run=run)"), "write a comma behind a single one"),
        (WRONG.replace("careless", "auto"), "topk: 'auto' is no name"),
        (WRONG.replace("careless", "a=b"), "topk: 'a=b' is no name"),
        (WRONG + "IMPLEMENTATIONS *= 2\n", "there is an implementation 'careless' already"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        (WRONG.replace("careless", "reference"), "there is an implementation 'reference' already"),
    ],
)
def test_a_bad_file_ends_in_one_sentence(tmp_path: Path, text: str, sentence: str, capsys) -> None:
    path = written(tmp_path, "bad.py", text)
    assert call(["list", "--impl-file", str(path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and str(path) in said and said.count("\n") == 1


def test_a_file_is_a_module_like_any_other(tmp_path: Path) -> None:
    """Dataclasses with late annotations look their module up by name; two files, one stem each."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += WRONG + "@dataclass\nclass Tile:\n    rows: int = 3\n"
    (tmp_path / "a").mkdir()
    first = written(tmp_path, "mine.py", text)
    second = written(tmp_path / "a", "mine.py", text.replace("careless", "hasty"))
    plugins.use([first, second])
    assert {"careless", "hasty"} <= set(registry.implementations("topk"))
    name = registry.implementation("topk", "hasty").run.__module__  # type: ignore[attr-defined]
    del sys.modules[name]
    assert plugins.import_named(name).__file__ == str(second)


@pytest.mark.parametrize(
    ("supports", "reason"),
    [
        ("lambda s, m: s.nothing", "supports of careless raised AttributeError"),
        ("lambda s, m: False", "supports of careless gave False (it must give None or a reason)"),
        ("lambda s, m: 'too wide'", "too wide"),
        ("lambda s, m: LIBRARY.obstacle()", ""),
        ("lambda s, m: BROKEN.obstacle()", "It 1 is installed but does not load: KeyError: 'x'"),
    ],
)
def test_supports_of_others_ends_no_plan(tmp_path: Path, supports: str, reason: str) -> None:
    library = """
from dsa_bench.library import Library
class Found(Library):
    def found(self): return "it"
    def version(self): return "1"
def load(): return None
def fail(): raise KeyError("x")
names = dict(title="It", modules=("it",), distributions=("it",), install="pip install it")
LIBRARY, BROKEN = Found(load=load, **names), Found(load=fail, **names)
"""
    text = library + WRONG.replace("run=run)", f"run=run, supports={supports})")
    plugins.use([written(tmp_path, "mine.py", text)])
    rows = registry.list_rows(Machine(device="cpu", name="test"))
    (row,) = [row for row in rows if row["implementation"] == "careless"]
    assert row["reason"].startswith(reason)
    assert row["available"] == (not reason)


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
        (WRONG.replace("run=run),", "run=run)"), "write a comma"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
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


def verdict_of(found: list[Finding], impl: str, kind: str) -> str:
    (verdict,) = [f.verdict for f in found if f.impl == impl and f.name.endswith(kind)]
    return verdict


def test_the_example_passes_the_hostile_inputs_and_a_careless_one_does_not(tmp_path: Path) -> None:
    plugins.use([EXAMPLE, written(tmp_path, "careless.py", WRONG)])
    found = conformance.examine({"topk": ("by_sorting", "careless")}, "cpu")
    assert sum(f.name.endswith("odd") for f in found) == 2 * 4
    # the example too reads no column behind the end of a short sequence
    assert verdict_of(found, "by_sorting", "one-long") == "ok"
    assert verdict_of(found, "careless", "one-long") == "wrong"
    found = [f for f in found if not f.name.endswith(("odd", "one-long"))]
    verdicts = {(f.impl, f.name.split()[-1], f.name.split()[0]): f.verdict for f in found}
    assert {v for (impl, *_), v in verdicts.items() if impl == "by_sorting"} == {"ok"}
    assert verdicts["careless", "random", "decode"] == "ok"
    assert verdicts["careless", "constant", "prefill"] == "wrong"
    assert verdicts["careless", "special", "decode"] == "wrong"
    assert len(found) == 2 * 2 * KINDS


def test_a_crash_is_a_finding_on_its_input_alone(tmp_path: Path, monkeypatch) -> None:
    crash = "    if inputs.index_logits.isnan().any():\n        import os; os._exit(7)\n    best ="
    text = WRONG.replace("    best =", crash)
    plugins.use([written(tmp_path, "crash.py", text)])
    found = conformance.examine({"topk": ("careless",)}, "cpu")
    crashes = {f.name for f in found if "exit code 7" in f.reason and f.verdict == "raised"}
    with_nan = {f"bf16 L=300 {kind}" for kind in ("special", "infinities")}
    assert crashes == {f"{phase} {kind}" for phase in ("prefill", "decode") for kind in with_nan}
    assert len(found) == 4 + 2 * KINDS + 1
    monkeypatch.setattr(conformance, "TIMEOUT", 0.01)
    (finding,) = conformance.examine({"topk": ("careless",)}, "cpu")
    assert finding.is_bad and finding.reason == "no end within 0 s"


def judged(op: str, run: Any) -> dict[str, str]:
    """Name of each hostile input on a CPU -> the verdict on this function."""
    owner, here = registry.operator(op), machine.detect("cpu")
    part = Implementation(name="mine", run=run)
    return {
        item.name: conformance.judge(owner, part, item, here, seed=place)[0]
        for place, item in enumerate(conformance.inputs_of(owner, "cpu"))
    }


@pytest.mark.parametrize(
    "op", ["indexer", "page_slots", "paged_indexer", "sparse_decode", "sparse_prefill", "topk"]
)
def test_the_reference_is_right_on_every_hostile_input(op: str) -> None:
    verdicts = judged(op, registry.operator(op).reference)
    assert set(verdicts.values()) == {"ok"} and any(name.endswith("odd") for name in verdicts)


def ignoring(op: str, **fields: Any) -> Any:
    return lambda inputs: registry.operator(op).reference(dataclasses.replace(inputs, **fields))


@pytest.mark.parametrize("op", ["sparse_prefill", "sparse_decode"])
def test_each_hostility_is_seen_by_itself(op: str) -> None:
    def bad(run: Any) -> set[str]:
        verdicts = judged(op, run)
        return {name.split()[-1] for name, verdict in verdicts.items() if verdict != "ok"}

    indices, keys = ("topk_indices", "kv") if op == "sparse_prefill" else ("topk_slots", "kv_cache")
    assert bad(ignoring(op, attn_sink=None)) == {"sink", "wild"}
    assert bad(ignoring(op, topk_lens=None)) == {"short", "wild"}

    def clamped(inputs: Any) -> Any:
        """Invalid entries read the first key."""
        num_keys = getattr(inputs, keys).flatten(0, -2).shape[0]
        listed = getattr(inputs, indices)
        listed = torch.where((listed < 0) | (listed >= num_keys), 0, listed)
        return registry.operator(op).reference(dataclasses.replace(inputs, **{indices: listed}))

    assert bad(clamped) >= {"empty-rows", "gaps", "invalid", "wild"}
    assert not bad(clamped) & {"random", "repeated", "sink", "unread-nan"}

    def reads_all(inputs: Any) -> Any:
        """0 · NaN of keys that nobody lists reaches the output."""
        outputs = registry.operator(op).reference(inputs)
        cache = getattr(inputs, keys)
        rows = unpack_mla_rows(cache) if op == "sparse_decode" else cache
        return outputs._replace(out=outputs.out + 0 * rows.sum())

    of_others = {"paged"} if op == "sparse_prefill" else set()
    assert bad(reads_all) == {"unread-nan", "wild", *of_others}

    def refuses(inputs: Any) -> Any:
        if inputs.attn_sink is not None:
            raise Unsupported("takes no attn_sink")
        return registry.operator(op).reference(inputs)

    verdicts = judged(op, refuses)
    assert {n.split()[-1] for n, verdict in verdicts.items() if verdict == "refused"} == {
        "sink", "wild"
    }  # fmt: skip
    assert "wrong" not in verdicts.values()


def test_an_error_of_the_device_ends_the_process() -> None:
    owner, here = registry.operator("topk"), machine.detect("cpu")
    item = next(conformance.inputs_of(owner, "cpu"))

    def run(inputs: Any, /) -> Any:
        raise RuntimeError(message)

    for message, goes_on in (("boom", True), ("CUDA error: an illegal memory access", False)):
        part = Implementation(name="mine", run=run)
        verdict, reason, can_go_on = conformance.judge(owner, part, item, here, seed=0)
        assert (verdict, can_go_on) == ("raised", goes_on) and message in reason


def test_outputs_that_put_off_their_work_are_wrong() -> None:
    class Lazy(torch.Tensor):
        pass

    def run(inputs: Any, /) -> Any:
        outputs = registry.operator("topk").reference(inputs)
        return type(outputs)(outputs.topk_indices.as_subclass(Lazy))

    assert set(judged("topk", run).values()) == {"wrong"}


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_make_cases(command: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(conformance, "examine", lambda wanted, device: [])
    verb, *words = command.split()
    if verb == "run":
        words += ["--plan"]
    elif verb == "check":
        words += ["-L", "64", "--seq-len-q", "8", "-k", "16", "--no-progress"]
    with contextlib.chdir(EXAMPLE.parents[2]):
        assert call([verb, *words, "--device", "cpu"]) == 0
    expected = {"list": "my_topk", "run": "to run:", "check": "hostile inputs"}
    assert expected[verb] in capsys.readouterr().out


@pytest.mark.usefixtures("probed_once")
def test_check_examines_the_file_and_fails_with_it(tmp_path: Path, capsys) -> None:
    small = ["--op", "topk", "-L", "64", "--seq-len-q", "8", "-k", "16", "--device", "cpu"]
    good = ["check", "--impl-file", str(EXAMPLE), "--impl", "by_sorting", *small]
    assert call([*good, "--no-progress"]) == 0
    assert "prefill bf16 L=300 two-valued" in capsys.readouterr().out
    careless = written(tmp_path, "careless.py", WRONG)
    bad = ["check", "--impl-file", str(careless), "--impl", "reference", *small]
    assert call([*bad, "--no-progress"]) == 3
    assert "wrong_values" in capsys.readouterr().out


@pytest.mark.usefixtures("probed_once")
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


@pytest.mark.usefixtures("probed_once")
def test_a_report_says_which_file_fails_on_hostile_inputs(tmp_path: Path, capsys) -> None:
    careless = written(tmp_path, "careless.py", WRONG)
    small = ["--op", "topk", "--phase", "decode", "-L", "64", "-k", "16", "--device", "cpu"]
    arguments = ["run", "--impl-file", str(careless), "--impl", "reference,careless", *small]
    folder = tmp_path / "run"
    assert call([*arguments, "--no-progress", "--hostile", "-o", str(folder)]) == 3
    found = [f for f in store.read_run(folder).findings if f.impl == "careless"]
    count, bad = len(found), sum(f.verdict == "wrong" for f in found)
    assert count > bad > 20
    sentence = f"hostile inputs: topk careless fails {bad} of {count}; the other fails none."
    assert sentence in capsys.readouterr().out.splitlines()
    markdown = (folder / "report.md").read_text()
    assert sentence in markdown
    assert f"| careless† | {count} | {count - bad} | {bad} | 0 | 0 | prefill" in markdown
    assert f"| reference | {count} | {count} | 0 | 0 | 0 |" in markdown
    assert f"topk careless fails {bad} of {count}" in (folder / "report.html").read_text()
    assert call(["verify", str(folder)]) == 0
    assert "findings.jsonl" in capsys.readouterr().out


def test_use_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(plugins.BrokenPlugin, match="is no file"):
        plugins.use([tmp_path])
    plugins.use([written(tmp_path, "broken.py", "1 / 0\n")])
    with pytest.raises(UsageError, match="line 1"):
        registry.catalogue()
