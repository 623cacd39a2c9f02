"""The command line: each command parses, calls the library, and prints what it returns.

typer and rich live here alone, and everything heavier is imported inside the command that needs it,
so that `--help` answers at once. Results go to stdout, progress and warnings to stderr.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dsa_bench.cli import session
from dsa_bench.cli.compare import compare
from dsa_bench.cli.exits import Exit
from dsa_bench.cli.options import (
    AsJson,
    Batch,
    Device,
    Effort,
    Heads,
    Impl,
    ImplFiles,
    Inputs,
    LengthKinds,
    Lengths,
    Mode,
    NoProgress,
    Op,
    Output,
    Phase,
    Precision,
    PresetName,
    Replicates,
    Seed,
    SeqLenQ,
    SweepName,
    TensorParallel,
    Timeout,
    Topk,
    Weights,
)
from dsa_bench.cli.verify import verify
from dsa_bench.operator import UsageError

# the parser's errors derive from this class, which typer doesn't export
PARSER_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])


app = typer.Typer(
    name="dsa-bench",
    help="Benchmark complete DeepSeek Sparse Attention against dense attention.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Benchmark complete DeepSeek Sparse Attention against dense attention."""
    if version:
        from dsa_bench import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    context: typer.Context,
    sweep: SweepName = None,
    phase: Phase = None,
    seq_len_kv: Lengths = None,
    topk: Topk = None,
    precision: Precision = None,
    op: Op = None,
    impl: Impl = None,
    impl_file: ImplFiles = None,
    batch_size: Batch = None,
    lengths: LengthKinds = None,
    seq_len_q: SeqLenQ = None,
    num_heads: Heads = None,
    tensor_parallel: TensorParallel = None,
    inputs: Inputs = None,
    weights: Weights = None,
    preset: PresetName = None,
    seed: Seed = None,
    mode: Mode = None,
    device: Device = "auto",
    effort: Effort = "quick",
    replicates: Replicates = 1,
    timeout: Timeout = None,
    hostile: Annotated[
        bool,
        typer.Option("--hostile", help="Then examine what is ok over hostile inputs (minutes)."),
    ] = False,
    output: Output = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Finish this run, as it was begun.",
                     show_default=False),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the cases and stop.")] = False,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
    gpu_hour_usd: Annotated[
        float,
        typer.Option("--gpu-hour-usd", metavar="USD", min=0.0, envvar="DSA_BENCH_GPU_HOUR_USD",
                     help="Price of a GPU for an hour."),
    ] = 2.0,
) -> Exit:  # fmt: skip
    """Measure a sweep and report where sparse attention beats dense."""
    from dsa_bench import job
    from dsa_bench.cli import terminal

    request = session.request("run", locals())
    if resume is not None:
        if request.overrides or sweep or output:
            raise UsageError("--resume takes its cases from the folder (leave the selection out)")
        _refuse_given(context, "effort", "device", "replicates", "gpu_hour_usd")
        ready = job.prepare_resume(resume, timeout=timeout)
    else:
        ready = job.prepare(request, is_dry=plan)
    if plan:
        terminal.print_plan(ready, as_json)
        return Exit.OK
    hostile |= ready.is_hostile
    result, finished = session.execute(ready, as_json=as_json, no_progress=no_progress)
    if finished and hostile:
        result, finished = session.examine_run(result, ready.device, as_json=as_json)
    return session.finish(result, finished, as_json=as_json, hostile=hostile)


@app.command()
def profile(
    sweep: SweepName = None,
    phase: Phase = None,
    seq_len_kv: Lengths = None,
    topk: Topk = None,
    precision: Precision = None,
    op: Op = None,
    impl: Impl = None,
    impl_file: ImplFiles = None,
    batch_size: Batch = None,
    lengths: LengthKinds = None,
    seq_len_q: SeqLenQ = None,
    num_heads: Heads = None,
    tensor_parallel: TensorParallel = None,
    inputs: Inputs = None,
    weights: Weights = None,
    preset: PresetName = None,
    seed: Seed = None,
    device: Device = "auto",
    timeout: Timeout = None,
    output: Output = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
) -> Exit:
    """Trace one case or a few: kernels by stage, memory, chrome trace."""
    from dsa_bench import job
    from dsa_bench.cli import terminal

    ready = job.prepare(session.request("profile", locals()))
    result, finished = session.execute(ready, as_json=as_json, no_progress=no_progress)
    if not as_json:
        from dsa_bench import show

        for record in result.records:
            terminal.draw(*show.profile(record, result.path / job.TRACES))
    return session.exit_code(result, finished)


@app.command()
def check(
    sweep: SweepName = None,
    phase: Phase = None,
    seq_len_kv: Lengths = None,
    topk: Topk = None,
    precision: Precision = None,
    op: Op = None,
    impl: Impl = None,
    impl_file: ImplFiles = None,
    batch_size: Batch = None,
    lengths: LengthKinds = None,
    seq_len_q: SeqLenQ = None,
    num_heads: Heads = None,
    tensor_parallel: TensorParallel = None,
    inputs: Inputs = None,
    weights: Weights = None,
    preset: PresetName = None,
    seed: Seed = None,
    device: Device = "auto",
    timeout: Timeout = None,
    hostile: Annotated[
        bool,
        typer.Option("--hostile", help="Hostile inputs too (those of an --impl-file always)."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            show_default=False,
            help="Keep the findings: in this run, or in a run folder of their own.",
        ),
    ] = None,
    as_json: AsJson = False,
    no_progress: NoProgress = False,
) -> Exit:
    """Compare every implementation with the reference; no times."""
    from dsa_bench import examination, job, show
    from dsa_bench.cli import terminal
    from dsa_bench.store import is_run

    is_examined = hostile or bool(impl_file)
    is_added = output is not None and is_run(output)
    given = locals() | ({"output": None} if is_added else {})
    if is_added and not is_examined:
        raise UsageError(f"{output} is a run: only findings can join it (pass --hostile)")
    ready = job.prepare(session.request("check", given))
    if output is not None and is_added:
        job.expect_measured_here(output, ready)
    result, finished = session.execute(ready, as_json=as_json, no_progress=no_progress)
    if not as_json:
        terminal.draw(show.checks(result.records))
    code = session.exit_code(result, finished)
    if code == Exit.INTERRUPTED or not is_examined:
        return code
    pairs = examination.selected(ready, everything=hostile)
    found, finished = session.examine(pairs, ready.device, folder=output, as_json=as_json)
    if not as_json:
        terminal.draw(show.findings_table(found))
    if not finished:
        return Exit.INTERRUPTED
    return Exit.FAILED if any(finding.is_bad for finding in found) else code


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="One self-contained page.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Figures as PNG and SVG.")
    ] = None,
    md: Annotated[Path | None, typer.Option("--md", metavar="FILE", help="Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="CSV.")] = None,
    rest_usd: Annotated[
        str | None,
        typer.Option("--rest-usd", metavar="PHASE=USD,...", show_default=False,
                     help="What is no attention layer, per million tokens: prefill=0.03"),
    ] = None,
    link_gbps: Annotated[
        float | None,
        typer.Option("--link-gbps", metavar="GB/S", min=1.0, show_default=False,
                     help="Bandwidth of a GPU's links, for --tp (450)"),
    ] = None,
) -> Exit:  # fmt: skip
    """Show finished runs, or write HTML, figures, Markdown, CSV."""
    from dsa_bench import job
    from dsa_bench.cli import terminal

    read = job.read_finished(runs)
    if rest_usd is not None or link_gbps is not None:
        from dsa_bench.reports.estimate import assume

        read = [
            replace(run, header=assume(run.header, rest_usd=rest_usd, link_gbps=link_gbps))
            for run in read
        ]
    asked = zip(job.REPORTS, (html, png, md, csv), strict=True)
    wanted = {form: path for form, path in asked if path is not None}
    for form, path in wanted.items():
        job.write_report(read, form, path)
        print(path)
    if not wanted:
        terminal.print_report(read)
    return Exit.OK


app.command()(compare)
app.command()(verify)


@app.command("list")
def list_all(device: Device = "auto", impl_file: ImplFiles = None, as_json: AsJson = False) -> Exit:
    """What there is, and what of it runs here, or why not."""
    from dsa_bench import show
    from dsa_bench.cli import terminal

    found = show.inventory(device)
    terminal.print_tables(found, show.inventory_tables(found), as_json)
    return Exit.OK


@app.command()
def doctor(
    device: Device = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the ceilings anew (some ten seconds).")
    ] = False,
    as_json: AsJson = False,
) -> Exit:
    """The machine, its ceilings, and what makes times noisy."""
    from dsa_bench import show
    from dsa_bench.cli import terminal

    found = show.diagnosis(device, measure=measure)
    terminal.print_tables(found, show.diagnosis_tables(found), as_json)
    return Exit.OK


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the command and leave with its exit code."""
    sys.exit(call(arguments))


def call(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command; what a person got wrong is one sentence on stderr."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except UsageError as error:
        return _say(str(error))
    except PARSER_ERROR as error:
        return _say(_parser_sentence(cast(Any, error)))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OSError as error:
        return _say(f"{error.filename or 'the run'}: {error.strerror or error}")
    return int(code or 0)


def _parser_sentence(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "dsa-bench"
    return f"{error.format_message().rstrip('.')} (see {command} --help)"


def _say(sentence: str) -> int:
    print(f"dsa-bench: {' '.join(sentence.split())}", file=sys.stderr)
    return Exit.USAGE


def _refuse_given(context: typer.Context, *names: str) -> None:
    """UsageError for an option that the run was begun with; an environment variable may stand."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"--resume takes {flag} from the folder (leave {flag} out)")
