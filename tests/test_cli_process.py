"""The command in a process of its own: what it loads, and the real operators end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsa_bench import sweep
from dsa_bench.store import read_run

ROOT = Path(__file__).parents[1]


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dsa_bench import cli; assert cli.call(['run', '--help']) == 0;"
        "heavy = {'torch', 'triton', 'numpy', 'pandas', 'matplotlib', 'rich', 'jinja2', 'altair'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = python("-c", code)
    assert done.stderr == "[]\n"
    assert "--gpu-hour-usd" in done.stdout


def test_bare_command_prints_help_and_version_prints_itself() -> None:
    done = python("-m", "dsa_bench")
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in ("run", "profile", "check", "doctor"))
    assert re.fullmatch(r"\d+\.\d+.*\n", python("-m", "dsa_bench", "--version").stdout)


def test_tiny_sweep_end_to_end(tmp_path: Path) -> None:
    """The real operators, worker and reports, on the CPU."""
    tiny = tmp_path / "tiny.toml"
    tiny.write_text(
        'preset = "v3.2-cpu"\nphase = "decode"\nseq_len_kv = 256\ntopk = 64\n'
        "[decode]\nbatch_size = 1\n"
    )
    folder = tmp_path / "r"
    done = python("-m", "dsa_bench", "run", str(tiny), "--device", "cpu", "-o", str(folder))
    assert done.returncode == 0, done.stderr
    run = read_run(folder)
    assert {r.case.op: r.status for r in run.records} == {"dsa": "ok", "dense_attention": "ok"}
    assert all(r.time and r.memory and r.stages for r in run.records)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"report.html", "figures", "report.md", "report.csv"}
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    assert "\x1b" not in done.stdout + done.stderr
    assert any(line.startswith("On ") and "DSA" in line for line in done.stdout.splitlines())


def test_ragged_batch_end_to_end(tmp_path: Path) -> None:
    """The real operators, by their references: reports say the lengths, and verify agrees."""
    folder = tmp_path / "r"
    words = ("--phase", "decode", "-L", "256", "-k", "64", "--batch", "1,3", "--device", "cpu")
    done = python(
        "-m", "dsa_bench", "run", "--preset", "v3.2-cpu", "--lengths", "one-long", *words,
        "-o", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = read_run(folder)
    ended = {(r.case.op, r.case.batch_size, r.status) for r in run.records}
    assert ended == {
        (op, *end) for op in ("dsa", "dense_attention") for end in ((1, "skipped"), (3, "ok"))
    }
    skipped = {r.reason for r in run.records if r.status == "skipped"}
    assert skipped == {
        "lengths one-long need a batch of 2 sequences or more, this case has 1"
        " (pass --batch, or --lengths equal)"
    }
    # one sequence of 256 keys, two of 8: 272 pairs of 16 heads
    (dense,) = [r for r in run.records if (r.case.op, r.status) == ("dense_attention", "ok")]
    assert dense.cost["flops"] == 2 * 16 * (576 + 512) * 272
    for name in ("report.md", "report.csv", "report.html"):
        assert "one-long" in (folder / name).read_text(encoding="utf-8")
    assert "lengths" in done.stdout and "one-long" in done.stdout
    assert python("-m", "dsa_bench", "verify", str(folder)).returncode == 0


def call_json(*words: str) -> Any:
    done = python("-m", "dsa_bench", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_list_names_operators_presets_and_sweeps() -> None:
    found = call_json("list", "--device", "cpu")
    assert {"dsa", "dense_attention"} <= {row["operator"] for row in found["implementations"]}
    assert {row["preset"] for row in found["presets"]} >= {"v3.2", "v3.2-cpu"}
    assert {row["sweep"] for row in found["sweeps"]} == set(sweep.shipped())


def test_doctor_measures_the_ceilings() -> None:
    found = call_json("doctor", "--device", "cpu", "--measure")
    assert found["ceilings"] and all(value > 0 for value in found["ceilings"].values())
    assert found["rows"][0]["item"] == "device"
