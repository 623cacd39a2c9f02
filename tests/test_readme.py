"""What the README says is what the tool does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_bench import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HELP_BLOCK = re.search(r"```\n(Usage: .*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^dsa-bench ((?:run|profile) [^#\n]*)", README, re.MULTILINE)


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsa_bench", *words], capture_output=True, text=True, cwd=ROOT
    )


def test_readme_shows_the_help_of_today():
    assert HELP_BLOCK is not None
    shown = HELP_BLOCK.group(1).replace("dsa-bench", "python -m dsa_bench", 1)
    assert shown.split() == call("--help").stdout.split()


def test_readme_has_commands_to_try():
    assert len(COMMANDS) >= 3


@pytest.mark.usefixtures("probed_once")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("run")])
def test_commands_of_the_readme_plan_cases(command: str, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = cli.call([*command.split(), "--plan", "--device", "cpu"])
    planned = capsys.readouterr()
    assert code == 0, planned.err
    counts = re.search(r"^to run: (\d+), skipped: (\d+)", planned.out, re.MULTILINE)
    assert counts is not None
    # a mode of the GPU makes cases that a CPU skips
    assert int(counts[1]) + int(counts[2]) > 0


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_of_the_readme_lead_somewhere(link: str):
    assert link.startswith("https://") or (ROOT / link).exists()
