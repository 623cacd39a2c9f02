"""docs/method.md says what the code does."""

from pathlib import Path

from dsa_bench import doubt, measure
from tests import cheats, faulty_worker

TEXT = (Path(__file__).parents[1] / "docs" / "method.md").read_text()


def test_every_flag_stands_there_with_its_rule():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `") and line.count("|") == 4]
    flags = [row for row in rows if row.split("`")[1] in doubt.FLAGS]
    assert flags == [f"| `{f.name}` | {f.severity} | {f.rule} |" for f in doubt.FLAGS.values()]


def test_numbers_are_those_of_the_code():
    efforts = [f"{100 * effort.half_width:g} %" for effort in measure.EFFORTS.values()]
    assert (
        f"`--effort quick` {efforts[0]}, `standard` {efforts[1]}, `precise` {efforts[2]}"
        in " ".join(TEXT.split())
    )
    seconds = " / ".join(f"{effort.max_seconds:g}" for effort in measure.EFFORTS.values())
    assert f"at {seconds} s or {measure.MAX_SAMPLES} samples" in " ".join(TEXT.split())
    num_faults = len(faulty_worker.RUNS) - 1  # one of them is well
    assert f"{len(cheats.GPU_CHEATS)} cheats and {num_faults} faults" in " ".join(TEXT.split())


def test_every_mode_is_explained():
    from dsa_bench.record import MODES

    assert all(f"| `{mode}`" in TEXT for mode in MODES)
