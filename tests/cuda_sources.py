"""For tests of csrc/cuda without a GPU: its compiler, and its sources run on the host by csrc/emulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
KERNEL, MMA_KERNEL = CSRC / "cuda" / "low_rank_decode.cu", CSRC / "cuda" / "low_rank_decode_mma.cu"
QUANTIZED_KERNEL = CSRC / "cuda" / "quantized_low_rank_decode.cu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
TORCH = Path(torch.__file__).parent
STABLE_ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
EMULATION = ["-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-DLORAP_EMULATE_CUDA"]

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run(command: Sequence[object], **options: Any) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


every_arch = pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=pytest.mark.slow), "90a", pytest.param("100", marks=pytest.mark.slow)]
)


def compiled(kernel: Path, arch: str, cubin: Path) -> tuple[str, list[tuple[str, str]] | None]:
    """ptxas's report, and the machine code of each function; None without cuobjdump, which comes with triton."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    log = run([NVCC, "-std=c++20", "-cubin", target, "-Xptxas", "-v", "-o", cubin, kernel])
    triton = find_spec("triton")
    cuobjdump = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump or not cuobjdump.exists():
        return log, None
    return log, re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", run([cuobjdump, "-sass", cubin]), re.DOTALL)


def link_torch(prefix: str = "") -> list[str]:
    """libtorch brings libtorch_cuda where there is one; the linker must not drop it for being unused."""
    no_as_needed = [prefix, "--no-as-needed"] if prefix else ["-Wl,--no-as-needed"]
    return ["-L", str(TORCH / "lib"), *no_as_needed, "-ltorch", "-ltorch_cpu"]


@cache
def emulator(folder: Path, sanitizer: str = "", sources: Path = CSRC / "cuda") -> Path:
    program = folder / f"run_{sanitizer or 'plain'}"
    options = [*EMULATION, *(["-g", f"-fsanitize={sanitizer}"] if sanitizer else [])]
    files = [CSRC / "emulation" / "run_low_rank_decode.cpp", "-x", "c++", *sorted(sources.glob("*.cu"))]
    run(["g++", "-std=c++17", *options, "-I", CSRC / "cuda", "-o", program, *files])
    return program


def broken_emulator(folder: Path, right: str, wrong: str) -> Path:
    """The emulator of sources in which the one place that says ``right`` says ``wrong``."""
    sources = folder / "cuda"
    (folder / "emulation").mkdir()
    shutil.copytree(CSRC / "cuda", sources)
    shutil.copy(CSRC / "emulation" / "cuda_emulation.h", folder / "emulation")
    found = [file for file in sources.iterdir() if right in file.read_text()]
    assert [file.read_text().count(right) for file in found] == [1]
    found[0].write_text(found[0].read_text().replace(right, wrong))
    return emulator(folder, sources=sources)


def run_emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[float, float, int, int]]:
    """What runs a case in the emulator: the errors of `shrunk` and y, bytes of shared memory, barriers of the grid."""
    folder = tmp_path_factory.getbasetemp() / "emulation"
    folder.mkdir(exist_ok=True)

    def start(case: str, sanitizer: str = "") -> tuple[float, float, int, int]:
        result = subprocess.run([emulator(folder, sanitizer), *case.split()], capture_output=True, text=True)
        if "FATAL: ThreadSanitizer" in result.stderr:  # some kernels place memory where it does not expect any
            pytest.skip(result.stderr.splitlines()[0])
        assert result.returncode == 0, result.stdout + result.stderr[:4000]
        shrunk_error, y_error, shared_bytes, grid_barriers = result.stdout.split()
        return float(shrunk_error), float(y_error), int(shared_bytes), int(grid_barriers)

    return start


def build_operators(folder: Path) -> Path:
    """A library with cuda/ops.cpp for tensors on the CPU around the emulated kernels."""
    library = folder / "emulated_ops.so"
    sources = [CSRC / "emulation" / "ops_on_cpu.cpp", "-x", "c++", *sorted((CSRC / "cuda").glob("*.cu")), "-x", "none"]
    run(["g++", *STABLE_ABI, *EMULATION, "-fPIC", "-shared", "-o", library, *sources, *link_torch()])
    return library
