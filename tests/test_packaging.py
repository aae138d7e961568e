"""What is installed: the package imports from anywhere, ships its texts and kernels, and hides no foreign package.

``kernels/`` and ``tests/`` must never become packages: transformers imports an installed package called ``kernels``.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lorap
from lorap.calibration.sources import shipped_texts

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> str:
    """stdout of a fresh interpreter, started outside the repository."""
    run = subprocess.run([sys.executable, *arguments], cwd="/tmp", capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_imports_from_anywhere():
    assert python("-c", "import lorap, lorap.kernels; print(lorap.kernels.__name__)") == "lorap.kernels"


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lorap, lorap.cli; print(lorap.LowRankLinear.__name__)"
    assert python("-c", code) == "LowRankLinear"


@pytest.mark.parametrize("path", ["kernels/__init__.py", "tests/__init__.py", "conftest.py"])
def test_no_stray_package(path):
    assert not (ROOT / path).exists()


def test_version_is_printed():
    assert python("-m", "lorap", "--version") == f"lorap {lorap.__version__}"
    command = Path(sys.executable).with_name("lorap")
    printed = subprocess.run([command, "--version"], cwd="/tmp", capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"lorap {lorap.__version__}"


def test_wheel_holds_code_texts_and_marker(tmp_path):
    """Built from a copy of the sources, so that no build folder appears in the repository."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "lorap", "kernels"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    python("-m", "pip", "wheel", *options, str(source))
    (wheel,) = tmp_path.glob("lorap-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    texts = {f"lorap/calibration/texts/{path.name}" for path in (ROOT / "lorap/calibration/texts").iterdir()}
    assert len(texts) == len(shipped_texts()) + 2  # the held-out text and SOURCES.md
    assert texts | {"lorap/py.typed", "lorap/__main__.py", "lorap/kernels/__init__.py"} <= files
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lorap").rglob("*.py")}
    assert modules <= files  # setup.py names packages one by one
    assert {name.split("/")[0] for name in files} == {"lorap", f"lorap-{lorap.__version__}.dist-info"}
