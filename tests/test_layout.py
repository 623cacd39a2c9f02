"""The house is as CONTRIBUTING.md says: links, who may import whom, cheap imports."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "baselines", "reports")

EVERYWHERE = {
    "dsa_bench",
    "dsa_bench.accuracy",
    "dsa_bench.preset",
    "dsa_bench.expect",
    "dsa_bench.library",
}
PLAIN = {"dsa_bench.operator", "dsa_bench.record", "dsa_bench.cost", "dsa_bench.untrusted"}
"""What kernels and baselines may know of the suite."""
REPORTS_MAY_IMPORT = (
    EVERYWHERE | PLAIN | {f"dsa_bench.{name}" for name in ("contest", "doubt", "stats", "store")}
)
ONLY_IN_CLI = {"typer", "rich"}
NEVER_IN_REPORTS = {"torch", "triton"}
PROBES = {"dsa_bench.ceilings": {"dsa_bench.kernels.l2_read_triton"}}
"""Kernels that measure the machine and no operator, and who may launch them."""
LIBRARY = {"dsa_bench.layers", "dsa_bench.conformance"}
"""Put layers, or hostile inputs, and the registry's choice together."""
KERNEL_FOLDERS = ("dsa_bench.kernels.", "dsa_bench.baselines.")


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "dsa_bench")
    return ".".join(parts).removesuffix(".__init__")


def source_files() -> list[Path]:
    """Files of the package, each once: under its folder, not under the link to it."""
    own = [
        path
        for path in (ROOT / "dsa_bench").rglob("*.py")
        if path.relative_to(ROOT / "dsa_bench").parts[0] not in LINKED
    ]
    return sorted(own + [path for folder in LINKED for path in (ROOT / folder).rglob("*.py")])


FILES = {module_name(path): path for path in source_files()}


def imports(tree: ast.AST, *, types_too: bool = False) -> Iterator[str]:
    """Names of imported modules, `from a import b` as both a and a.b; not those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(node, types_too=types_too) if types_too else ()
        else:
            yield from imports(node, types_too=types_too)


def imported_modules(source: str) -> set[str]:
    """Of ours the module of each import, of others the first name."""
    found = set()
    for name in imports(ast.parse(source)):
        if name.startswith("."):
            found.add(name)
            continue
        parts = name.split(".")
        while len(parts) > 1 and ".".join(parts) not in FILES:
            parts.pop()
        found.add(".".join(parts) if parts[0] == "dsa_bench" else name.split(".")[0])
    return found


def kind(module: str) -> str:
    """What a file of kernels/ or baselines/ is, by what it defines at its top level."""
    defined = {
        name.id
        for node in ast.parse(FILES[module].read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    if "OPERATOR" in defined:
        return "definition"
    return "backend" if "IMPLEMENTATIONS" in defined else "subject"


KINDS = {name: kind(name) for name in FILES if name.startswith(KERNEL_FOLDERS)}


def of_kind(wanted: str, folder: str = "") -> set[str]:
    prefix = f"dsa_bench.{folder}"
    return {name for name, kind in KINDS.items() if kind == wanted and name.startswith(prefix)}


def own_definition(backend: str) -> set[str]:
    return {name for name in of_kind("definition") if backend.startswith(f"{name}_")}


def forbidden(module: str, names: set[str]) -> set[str]:
    """Those of the imported names that this module may not import."""
    ours = {name for name in names if name.startswith(("dsa_bench", "."))}
    others = names - ours
    if module.startswith("dsa_bench.reports"):
        siblings = {name for name in FILES if name.startswith("dsa_bench.reports")}
        return (ours - REPORTS_MAY_IMPORT - siblings) | (others & (NEVER_IN_REPORTS | ONLY_IN_CLI))
    if module.startswith(KERNEL_FOLDERS):
        return (ours - allowed_in_kernels(module)) | (others & never_in_kernels(module))
    if module.startswith("dsa_bench.cli"):
        return {name for name in ours if name.startswith(".")}
    stray = {name for name in ours if name.startswith((".", *KERNEL_FOLDERS))}
    if module in LIBRARY:
        stray -= of_kind("definition") | of_kind("subject")
    return stray - PROBES.get(module, set()) | (others & ONLY_IN_CLI)


# a definition that fills two files: topk.py and, say, topk_inputs.py
KINDS |= {name: "definition" for name in of_kind("subject") if own_definition(name)}
# what puts operators together knows them: the layers
KINDS |= {
    f"dsa_bench.kernels.{name}": "definition"
    for name in ("latent_attention", "layer", "layer_calls", "layer_gate", "layer_inputs")
}


def allowed_in_kernels(module: str) -> set[str]:
    allowed = EVERYWHERE | PLAIN | of_kind("subject")
    if KINDS[module] == "definition" or module.startswith("dsa_bench.baselines"):
        return allowed | of_kind("definition")
    return allowed | own_definition(module)


def never_in_kernels(module: str) -> set[str]:
    never = ONLY_IN_CLI | {"pandas", "matplotlib"}
    return never | {"triton"} if KINDS[module] == "definition" else never


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module):
    stray = forbidden(module, imported_modules(FILES[module].read_text()))
    assert not stray, f"{module} imports {', '.join(sorted(stray))}"


@pytest.mark.parametrize(
    ("module", "source", "stray"),
    [
        ("kernels.topk", "from dsa_bench.cli import main", "dsa_bench.cli"),
        ("kernels.topk", "def f():\n    import triton.language as tl", "triton"),
        ("kernels.topk", "from dsa_bench.kernels.topk_triton import topk", "kernels.topk_triton"),
        ("kernels.topk_triton", "from dsa_bench.kernels.topk import OPERATOR", ""),
        ("kernels.topk_triton", "from dsa_bench import runner", "dsa_bench.runner"),
        ("kernels.topk_triton", "from dsa_bench.kernels import paging", ""),
        ("kernels.topk_triton", "import dsa_bench.kernels.indexer", "kernels.indexer"),
        ("kernels.topk_triton", "import dsa_bench.kernels.topk_gluon", "kernels.topk_gluon"),
        ("baselines.sdpa", "from dsa_bench.kernels.topk import OPERATOR", ""),
        ("baselines.sdpa", "import dsa_bench.kernels.topk_triton", "kernels.topk_triton"),
        ("reports.frame", "from torch import Tensor", "torch"),
        ("reports.frame", "if TYPE_CHECKING:\n    from torch import Tensor", ""),
        ("runner", "from .record import Case", ".record.Case"),
        ("runner", "from dsa_bench.kernels.topk import run", "kernels.topk"),
        ("runner", "import typer", "typer"),
        ("ceilings", "from dsa_bench.kernels import l2_read_triton", ""),
        ("runner", "from dsa_bench.kernels import l2_read_triton", "kernels.l2_read_triton"),
        ("show", "from rich.table import Table", "rich"),
        ("cli.terminal", "from rich.table import Table", ""),
    ],
)
def test_a_planted_import_is_caught(module, source, stray, monkeypatch):
    for backend in ("dsa_bench.kernels.topk_triton", "dsa_bench.kernels.topk_gluon"):
        monkeypatch.setitem(FILES, backend, ROOT)
        monkeypatch.setitem(KINDS, backend, "backend")
    found = forbidden(f"dsa_bench.{module}", imported_modules(source))
    assert {name.removeprefix("dsa_bench.") for name in found} == {
        name.removeprefix("dsa_bench.") for name in [stray] if name
    }


@pytest.mark.parametrize("folder", LINKED)
def test_folder_is_linked_and_no_package(folder):
    link = ROOT / "dsa_bench" / folder
    assert str(link.readlink()) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists()


def loaded_by(statement: str, *names: str) -> list[str]:
    """Which of these modules a fresh Python has loaded after the statement."""
    code = (
        f"import sys\n{statement}\nprint([n for n in {names} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[str] = ast.literal_eval(done.stderr.strip().splitlines()[-1])
    return found


def test_help_is_cheap():
    statement = """
from dsa_bench.cli import main
sys.argv = ["dsa-bench", "--help"]
try:
    main()
except SystemExit:
    pass
"""
    heavy = ("torch", "triton", "pandas", "matplotlib", "altair", "numpy")
    assert loaded_by(statement, *heavy) == []


def test_reports_load_no_torch():
    reports = [name for name in FILES if name.startswith("dsa_bench.reports.")]
    assert loaded_by("import dsa_bench.record, " + ", ".join(reports or ["sys"]), "torch") == []


def test_definitions_load_without_triton():
    definitions = sorted(of_kind("definition"))
    # torch may load triton by itself where that is installed: block it instead of looking for it
    block = "sys.modules['triton'] = None"
    statement = f"{block}\nimport {', '.join(definitions)}"
    assert loaded_by(statement, *definitions) == definitions


def test_links_hide_no_installed_package():
    """A package called `kernels` from elsewhere wins over our folder of that name."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))
