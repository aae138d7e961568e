"""The plan of the package: what may import from what, no circles, few modules at the top; and names in texts exist.

A package here is one within ``lorap``, or the modules beside these. Imports in functions and for type checkers count like others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lorap

ROOT = Path(lorap.__file__).parent
KERNELS = ROOT.parent / "kernels" / "triton"  # shipped as lorap.kernels
# From top to bottom: a package imports from itself and from those after it.
PACKAGES = (
    *("lorap.__main__", "lorap.cli", "lorap.__init__"),
    *(
        "lorap.compression.estimate",
        "lorap.compression.runs",
        "lorap.compression",
        "lorap.recovery",
        "lorap.evaluation",
    ),
    *("lorap.calibration", "lorap.integrations", "lorap.checkpoint", "lorap.reports", "lorap.nn", "lorap.kernels"),
    *("lorap.algorithms", "lorap"),
)


def read_imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """What each module imports of the others. Those of packages are called ``PACKAGE.__init__``."""
    found = {}
    for module, source in sources.items():
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
                names |= {
                    inner if _is_module(inner := f"{base}.{alias.name}", sources) else base for alias in node.names
                }
        found[module] = {name if name in sources else f"{name}.__init__" for name in names if _is_module(name, sources)}
    return found


def _is_module(name: str, sources: dict[str, str]) -> bool:
    return name in sources or f"{name}.__init__" in sources


def package_of(module: str) -> str:
    return next(package for package in PACKAGES if module == package or module.startswith(f"{package}."))


def upwards(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Who imports what from a package above."""
    return {
        (module, other)
        for module, others in imports.items()
        for other in others
        if PACKAGES.index(package_of(other)) < PACKAGES.index(package_of(module))
    }


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = {path.relative_to(ROOT.parent): path for path in ROOT.rglob("*.py")}
    files |= {Path("lorap", "kernels", path.relative_to(KERNELS)): path for path in KERNELS.rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path.read_text("utf-8") for name, path in files.items()}


@pytest.fixture(scope="module")
def imports(sources) -> dict[str, set[str]]:
    return read_imports(sources)


def test_imports_go_downwards(imports):
    wrong = upwards(imports)
    assert not wrong, "\n".join(f"{module} imports {other} from above" for module, other in sorted(wrong))


def test_no_circles(imports):
    TopologicalSorter(imports).prepare()


def test_kernels_import_nothing_of_lorap_but_themselves(imports):
    outside = {
        other
        for module, others in imports.items()
        if package_of(module) == "lorap.kernels"
        for other in others
        if package_of(other) != "lorap.kernels"
    }
    assert not outside


def test_files_and_folders_are_renamed_in_two_modules():
    """What appears whole or not at all: a file by ``files``, a folder by ``outputs``."""
    renaming = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        if node.attr in ("rename", "renames") or (node.attr == "replace" and ast.unparse(node.value) == "os")
    }
    assert renaming == {"files.py", "outputs.py"}


def test_only_the_command_prints():
    """A library has loggers."""
    outside = [path for path in ROOT.rglob("*.py") if ROOT / "cli" not in path.parents]
    assert [path.name for path in outside if re.search(r"(?<![\w.])print\(", path.read_text("utf-8"))] == []


def test_few_modules_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 12


# A file or folder of this repository, and a name in the package; not those with a placeholder in capitals (OP.py).
PATH = re.compile(r"(?<![\w/.])(?:lorap|kernels|csrc|tests|benchmarks|docs|findings)/[\w./-]*\w")
NAME = re.compile(r"(?<![\w/.])lorap(?:\.[A-Za-z]\w*)+")
BUILT = ("lorap/_native.so",)


@cache
def names_of(source: str) -> set[str]:
    """What a module defines or imports at its top."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def missing_names(text: str, sources: dict[str, str]) -> Iterator[str]:
    """Paths and dotted names in a text that lead nowhere."""
    for path in PATH.findall(text):
        if not re.search(r"[A-Z]{2,}(?!\w*\.md)", path) and path not in BUILT and not (ROOT.parent / path).exists():
            yield path
    for name in NAME.findall(text):
        module = name.removesuffix(".py")
        while module != "lorap" and not _is_module(module, sources):
            module = module.rpartition(".")[0]
        first = name.removeprefix(module).strip(".").partition(".")[0]
        known = set(dir(lorap)) if module == "lorap" else names_of(sources.get(module) or sources[f"{module}.__init__"])
        if first and first not in known:
            yield name


def test_paths_and_names_in_documents_and_docstrings_exist(sources):
    documents = [ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md"))]
    texts = {path.name: path.read_text("utf-8") for path in documents}
    wrong = [f"{where}: {name}" for where, text in (texts | sources).items() for name in missing_names(text, sources)]
    assert not wrong, "\n".join(wrong)


def test_a_name_that_leads_nowhere_is_found(sources):
    text = "lorap/nn/lineal.py, `lorap.nn.linear.LowRank`, lorap.judge, kernels/triton/OP.py, lorap/nn/, lorap.nn.ops.linear"
    assert list(missing_names(text, sources)) == ["lorap/nn/lineal.py", "lorap.nn.linear.LowRank", "lorap.judge"]


def test_every_kind_of_import_is_seen():
    """In a function, for type checkers, relative, of a module and of a name in it."""
    sources = {
        "lorap.__init__": "",
        "lorap.files": "def f():\n    from lorap.nn import linear",
        "lorap.nn.__init__": "from . import linear",
        "lorap.nn.linear": "if TYPE_CHECKING:\n    import lorap.cli.main",
        "lorap.cli.__init__": "",
        "lorap.cli.main": "import torch, lorap\nfrom lorap.files import move\nfrom lorap.cli import name",
    }
    imports = read_imports(sources)
    assert imports == {
        "lorap.__init__": set(),
        "lorap.files": {"lorap.nn.linear"},
        "lorap.nn.__init__": {"lorap.nn.linear"},
        "lorap.nn.linear": {"lorap.cli.main"},
        "lorap.cli.__init__": set(),
        "lorap.cli.main": {"lorap.__init__", "lorap.files", "lorap.cli.__init__"},
    }
    assert upwards(imports) == {("lorap.files", "lorap.nn.linear"), ("lorap.nn.linear", "lorap.cli.main")}
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


def test_modules_beside_the_package_have_names_of_their_own() -> None:
    """Tests import from benchmarks/: of two modules of one name, the first that was imported would answer for both."""
    repository = ROOT.parent
    tests, benchmarks = (
        {path.stem for path in (repository / folder).rglob("*.py")} for folder in ("tests", "benchmarks")
    )
    assert {"tiny_models"} <= tests - benchmarks
    assert {"random_models", "table"} <= benchmarks - tests
    assert tests & benchmarks == {"conftest"}
