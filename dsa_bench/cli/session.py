"""From the parameters of a command to an ended run: what several commands do alike."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa_bench.cli.exits import Exit

if TYPE_CHECKING:
    from dsa_bench.examination import Pair
    from dsa_bench.finding import Finding
    from dsa_bench.job import Job, Request
    from dsa_bench.runner import Progress
    from dsa_bench.store import Run


def request(verb: str, given: Mapping[str, Any]) -> "Request":
    """What was asked for, from the parameters of a command."""
    from dsa_bench.job import Request
    from dsa_bench.sweep import FLAGS

    overrides = {key: given[key] for key in FLAGS if given.get(key) is not None}
    rest = {
        key: given[key]
        for key in ("effort", "replicates", "output", "gpu_hour_usd", "hostile")
        if key in given
    }
    return Request(
        verb=verb,
        sweep=given["sweep"],
        overrides=overrides,
        argv=tuple(sys.argv[1:]),
        device=given["device"],
        timeout=given["timeout"],
        **rest,
    )


def execute(ready: "Job", *, as_json: bool, no_progress: bool) -> "tuple[Run, bool]":
    from dsa_bench import job
    from dsa_bench.cli import terminal

    if ready.busy:
        print(f"dsa-bench: {ready.busy}; times will be noisy", file=sys.stderr)
    with terminal.progress(
        ready.planned, num_endings=ready.num_endings, is_live=not no_progress
    ) as show:

        def tell(progress: "Progress") -> None:
            if as_json and progress.record is not None:
                print(json.dumps(progress.record.to_json()), flush=True)
            show(progress)

        return job.execute(ready, tell)


def examine(
    pairs: "Sequence[Pair]", device: str, *, folder: Path | None, as_json: bool
) -> "tuple[list[Finding], bool]":
    """Findings on these implementations, and whether nobody interrupted; each is told on stderr."""
    from dsa_bench import examination, show

    found, finished = examination.examine(
        pairs,
        device,
        folder=folder,
        tell=lambda found: print(show.examined(found), file=sys.stderr, flush=True),
    )
    if as_json:
        print(json.dumps({"hostile": [asdict(finding) for finding in found]}))
    return found, finished


def examine_run(result: "Run", device: str, *, as_json: bool) -> "tuple[Run, bool]":
    """The run with findings on all that was ok in it, and whether nobody interrupted."""
    from dsa_bench import examination
    from dsa_bench.store import read_run

    pairs = examination.of_run(result)
    _, finished = examine(pairs, device, folder=result.path, as_json=as_json)
    return read_run(result.path), finished


def exit_code(result: "Run", finished: bool) -> Exit:
    """Of cases, and of hostile inputs where the run holds findings."""
    if not finished:
        return Exit.INTERRUPTED
    fine = all(record.status in ("ok", "skipped") for record in result.records)
    fine &= not any(finding.is_bad for finding in result.findings)
    return Exit.OK if fine else Exit.FAILED


def finish(result: "Run", finished: bool, *, as_json: bool, hostile: bool = False) -> Exit:
    """Write and print the report of a run that has ended."""
    from dsa_bench import job
    from dsa_bench.cli import terminal

    failures = job.write_all_reports(result)
    for form, reason in failures.items():
        text = f"the {form} report failed: {reason} (the records in {result.path} are safe)"
        print(f"dsa-bench: {text}", file=sys.stderr)
    if not as_json:
        with contextlib.suppress(*[Exception] if failures else []):
            terminal.print_report([result])
    page = result.path / job.REPORTS["html"]
    print(page if "html" not in failures else result.path, file=sys.stderr if as_json else None)
    if not finished:
        again = f"{result.path}{' --hostile' * hostile}"
        print(f"dsa-bench: stopped; go on with dsa-bench run --resume {again}", file=sys.stderr)
    return exit_code(result, finished)
