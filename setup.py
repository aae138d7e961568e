"""Builds csrc with CMake and names the packages.

    pip install --no-build-isolation -e .      with torch installed: builds the C++ part, and the CUDA part where nvcc is
    LORAP_SKIP_CUDA_BUILD=1 pip install ...    no CUDA part
    LORAP_SKIP_BUILD=1 pip install ...         Python only
    LORAP_REQUIRE_BUILD=1 pip install ...      stop where native code cannot be built

torch's headers come from the installed torch, hence ``--no-build-isolation``. Without torch, CMake or a compiler the package
is installed without native code and works: torch and Triton do the work then. The end of the build says so, which pip shows
with -v, and so do the first use and ``lorap env``.

The Triton kernels live in kernels/triton and are shipped as lorap.kernels. ``kernels/`` itself must never become a package,
because transformers imports an installed package of that name.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # --no-build-isolation does not look at pyproject.toml's requirement
    raise SystemExit(
        f"lorap needs setuptools >= 77, this is {setuptools.__version__}: pip install --upgrade setuptools"
    )
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> str | None:
    """nvcc, unless LORAP_SKIP_CUDA_BUILD=1; no GPU is needed to build for one."""
    if os.environ.get("LORAP_SKIP_CUDA_BUILD") == "1":
        return None
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def reason_not_to_build() -> str | None:
    if os.environ.get("LORAP_SKIP_BUILD") == "1":
        return "LORAP_SKIP_BUILD=1"
    if find_torch() is None:
        return "torch is not importable here; use pip install --no-build-isolation with torch installed"
    if not shutil.which("cmake"):
        return "cmake is not installed"
    return None


class CMakeBuild(build_ext):
    """Builds lorap/_native.so, a plain shared library that torch.ops.load_library opens: no Python.h, any Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # build/ may hold the library of an earlier build, which must not be packed if this one fails.
        target.unlink(missing_ok=True)
        torch = find_torch()
        options = [f"-DTORCH_INCLUDE={torch / 'include'}", f"-DTORCH_LIB={torch / 'lib'}"]
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        attempts = [options]
        if nvcc := find_nvcc():
            cuda = [*options, "-DLORAP_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if archs := os.environ.get("LORAP_CUDA_ARCHS"):
                cuda.append(f"-DLORAP_CUDA_ARCHS={archs}")
            attempts.insert(0, cuda)
        for attempt in attempts:
            if self.build_with_cmake(attempt, target):
                return
            print("lorap: this build failed, trying with less", file=sys.stderr)
        if os.environ.get("LORAP_REQUIRE_BUILD") == "1":
            raise SystemExit("lorap: native code was not built (LORAP_REQUIRE_BUILD=1)")
        global reason
        reason = "the compiler or CMake failed, as printed above"

    def copy_extensions_to_source(self) -> None:
        """Of an editable installation: what was built, or nothing instead of what an earlier build left."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            Path(inplace).unlink(missing_ok=True)
            if Path(built).exists():
                self.copy_file(built, inplace)

    def build_with_cmake(self, options: list[str], target: Path) -> bool:
        with tempfile.TemporaryDirectory(prefix="lorap-build-") as build:
            try:
                subprocess.run(["cmake", "-S", ROOT, "-B", build, *options], check=True)
                subprocess.run(["cmake", "--build", build, "--parallel"], check=True)
            except subprocess.CalledProcessError:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(build) / "_native.so", target)
            return True


class Wheel(bdist_wheel):
    """One wheel per platform for every Python: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.ext_modules else (python, abi, platform)


reason = reason_not_to_build()
distribution = setup(
    packages=[*find_packages(include=["lorap", "lorap.*"]), "lorap.kernels"],
    package_dir={"lorap": "lorap", "lorap.kernels": "kernels/triton"},
    package_data={
        "lorap": ["py.typed"],
        "lorap.calibration": ["texts/*"],
        "lorap.evaluation": ["instructions.txt"],
        "lorap.kernels": ["configs/*.json"],
        "lorap.reports.html": ["*.j2"],
    },
    ext_modules=[] if reason else [Extension("lorap._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
if reason and {"build", "build_py", "editable_wheel"} & set(distribution.have_run):
    print(
        f"lorap: installed without C++ kernels: {reason}. Models run through torch, several times slower on CPUs. To have them:\n"
        "    pip install torch 'setuptools>=77' wheel 'cmake>=3.24' ninja\n"
        "and a C++ compiler; then install lorap again with --no-build-isolation",
        file=sys.stderr,
    )
