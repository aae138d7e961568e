"""The compiled part, lorap/_native.so: found and opened once; its absence is normal and never an error."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_native.so"
SOURCES = LIBRARY.parents[1] / "csrc" / "cpu"  # in a clone
REBUILD = f"build it again with pip install --no-build-isolation --editable {SOURCES.parents[1]}"


def _load() -> str | None:
    """Open the library; the reason why there is none, or None."""
    if not LIBRARY.exists():
        how = "not built; install with pip install --no-build-isolation, with torch, CMake and a C++ compiler at hand"
        return how + _elsewhere()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be opened by torch {torch.__version__}: {error}"
    if not hasattr(torch.ops.lorap_cpu, "quantized_weight"):  # the youngest operator that any build has
        return f"{LIBRARY.name} is older than this code; {REBUILD}"
    return None


def newer_source() -> Path | None:
    """The youngest source file, where it was written after the library was built; None elsewhere, and where there are none.

    Not every change of a source is one of what the library computes, so this explains a failure and is none by itself.
    """
    files = [*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]
    youngest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    older = youngest is not None and LIBRARY.exists() and LIBRARY.stat().st_mtime < youngest.stat().st_mtime
    return youngest if older else None


def _elsewhere() -> str:
    """Names another copy of lorap that has the library: in a clone, Python takes the clone's code and not the installed one.

    Its library is not borrowed: the operators of another version may have other arguments.
    """
    for entry in sys.path:
        other = Path(entry or ".").resolve() / LIBRARY.parent.name
        if other != LIBRARY.parent and (other / LIBRARY.name).exists():
            return f"; {other} has them, but this is {LIBRARY.parent}: run from another folder, or install this copy"
    return ""


# Why the C++ and CUDA kernels are missing; None where they are there.
MISSING = _load()
HAS_CPU = MISSING is None
HAS_CUDA = HAS_CPU and hasattr(torch.ops.lorap_cuda, "quantized_low_rank_linear_group")


def cpu_isa(dtype: torch.dtype) -> str:
    """The instruction set the CPU kernels use here for a dtype, e.g. ``avx512_bf16``."""
    isa: str = torch.ops.lorap_cpu.isa(dtype) if HAS_CPU else "none"
    return isa


# How the name of a kernel ends that rounds activations to 8 bits.
EIGHT_BITS = ", int8 activations"


def quantized_cpu_isa() -> str:
    """The same for weights of 4 bits, e.g. ``avx512_vnni``, or ``avx2, int8 activations`` where these are asked for.

    Those of 8 bits have the same instructions, without the addition.
    """
    isa: str = torch.ops.lorap_cpu.quantized_isa(4) if HAS_CPU else "none"
    return isa
