"""What is installed: the package imports from anywhere, ships its texts and kernels, and hides no foreign package.

``kernels/`` and ``tests/`` must never become packages: transformers imports an installed package called ``kernels``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the sources, without what the native code is made of, but with libraries of earlier builds."""
    pytest.importorskip("setuptools")
    clone = tmp_path_factory.mktemp("packaging") / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "lorap", "kernels"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    (clone / "CMakeLists.txt").write_text('message(FATAL_ERROR "no")')
    platform = sysconfig.get_platform()
    for old in ("lorap", f"build/lib.{platform}-{sys.implementation.cache_tag}/lorap", "build/lib/lorap"):
        (clone / old).mkdir(parents=True, exist_ok=True)
        (clone / old / "_native.so").write_bytes(b"old")
    return clone


@pytest.fixture(scope="module")
def built(clone):
    """The wheel of it, and what the build said."""
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(clone.parent)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(clone)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert run.returncode == 0, run.stdout
    (wheel,) = clone.parent.glob("lorap-*.whl")
    return wheel, run.stdout


def test_a_failed_build_packs_no_old_library_and_says_what_is_missing(built):
    wheel, said = built
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "installed without C++ kernels" in said
    assert "--no-build-isolation" in said


IN_A_CLONE = """
import warnings
from pathlib import Path
import torch
import lorap, lorap.kernels.reference
from lorap.nn import dispatch
from lorap.evaluation import environment
from lorap.nn import native
from lorap.nn import ops
clone, installed = Path.cwd(), Path({installed!r})
assert Path(lorap.__file__) == clone / "lorap/__init__.py", lorap.__file__
assert Path(lorap.kernels.reference.__file__) == clone / "kernels/triton/reference.py", lorap.kernels.reference.__file__
assert str(installed / "lorap") in native.MISSING and str(clone / "lorap") in native.MISSING, native.MISSING
assert native.MISSING in environment.format_environment(environment.describe_environment())
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for size in (8, 9):
        ops.linear(torch.randn(2, size), torch.randn(3, size))
assert [native.MISSING in str(one.message) for one in told] == [True], told
"""


def test_a_clone_runs_itself_beside_an_installed_copy(clone, built, tmp_path):
    """Python, `python -m lorap` and `torchrun -m lorap` take the code of the folder that they are started in."""
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    (tmp_path / "lorap" / "_native.so").write_bytes(b"of the installed copy")
    (clone / "lorap" / "_native.so").unlink()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "LORAP_BACKEND": "auto"}
    code = IN_A_CLONE.format(installed=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_wheel_holds_code_texts_and_marker(built):
    wheel, _ = built
    files = set(zipfile.ZipFile(wheel).namelist())
    texts = {f"lorap/calibration/texts/{path.name}" for path in (ROOT / "lorap/calibration/texts").iterdir()}
    assert len(texts) == len(shipped_texts()) + 2  # the held-out text and SOURCES.md
    others = {"lorap/py.typed", "lorap/__main__.py", "lorap/kernels/__init__.py", "lorap/reports/html/page.html.j2"}
    assert texts | others <= files
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lorap").rglob("*.py")}
    assert modules <= files
    assert {name.split("/")[0] for name in files} == {"lorap", f"lorap-{lorap.__version__}.dist-info"}
