"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _text(*names: str, metavar: str, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=False)


def _use_files(paths: list[Path] | None) -> list[Path] | None:
    from dsa_bench import plugins
    from dsa_bench.operator import UsageError

    if paths:
        try:
            plugins.use(paths)
        except plugins.BrokenPlugin as error:
            raise UsageError(str(error)) from error
    return paths


SweepName = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]", help="A shipped sweep (see list) or a TOML file.", show_default=False
    ),
]
Phase = Annotated[str | None, _text("--phase", metavar="LIST", help="Phases: prefill,decode")]
Lengths = Annotated[
    str | None, _text("-L", "--seq-len-kv", metavar="SIZES", help="Sequence lengths: 4k:128k:x2")
]
Topk = Annotated[
    str | None, _text("-k", "--topk", metavar="SIZES", help="Selected keys of a query: 512,2k")
]
Precision = Annotated[
    str | None, _text("--precision", metavar="LIST", help="Of indexer and caches: bf16,fp8")
]
Op = Annotated[
    str | None, _text("--op", metavar="LIST", help="Operators (see list): dsa,topk or all")
]
Impl = Annotated[
    str | None, _text("--impl", metavar="LIST", help="auto, all, a name, operator=name")
]
ImplFiles = Annotated[
    list[Path] | None,
    typer.Option("--impl-file", metavar="FILE", help="A Python file with more implementations.",
                 show_default=False, callback=_use_files),
]  # fmt: skip
Batch = Annotated[str | None, _text("--batch", metavar="SIZES", help="Sequences in decode: 1,32")]
LengthKinds = Annotated[
    str | None, _text("--lengths", metavar="LIST", help="Their lengths: equal,spread,one-long")
]
SeqLenQ = Annotated[
    str | None, _text("--seq-len-q", metavar="SIZES", help="Queries of a chunk, of a sequence.")
]
Heads = Annotated[str | None, _text("--heads", metavar="SIZES", help="Query heads: 128,64")]
TensorParallel = Annotated[
    str | None, _text("--tp", metavar="SIZES", help="Ranks that share the heads: 1,8")
]
Inputs = Annotated[
    str | None,
    _text(
        "--inputs",
        metavar="LIST",
        help="random,needle,local,heavy,overlap=0.9 or a .safetensors file",
    ),
]
Weights = Annotated[
    str | None, _text("--weights", metavar="FILE[:LAYER]", help="Weights of a layer (.safetensors)")
]
PresetName = Annotated[
    str | None, _text("--preset", metavar="NAME", help="Model sizes: v3.2 or v3.2-cpu")
]
Mode = Annotated[
    str | None,
    _text("--mode", metavar="LIST", help="auto, or cold,warm,graph,sustained,cpu (how to time)"),
]
Replicates = Annotated[
    int,
    typer.Option("--replicates", metavar="N", min=1, max=100,
                 help="Repeats in fresh processes, order shuffled."),
]  # fmt: skip
Seed = Annotated[int | None, _text("--seed", metavar="N", help="Seed of the inputs.")]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cuda|cpu", envvar="DSA_BENCH_DEVICE",
                 help="Where the cases run."),
]  # fmt: skip
Effort = Annotated[
    str,
    typer.Option("--effort", metavar="quick|standard|precise",
                 help="How narrow the confidence interval of a time gets."),
]  # fmt: skip
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", min=0.001, help="Seconds a case may take (120).",
                 show_default=False),
]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", show_default=False,
                 help="Run folder; results/<time>-<machine> by default."),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of tables.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Plain lines on stderr.")]
