"""Compile a Triton kernel for a GPU that need not be present, and read from the machine code what it will do there.

A kernel can be right and still slow for reasons that show in its machine code alone: loads of 2 bytes where 16 fit,
registers spilled to memory, scalar multiply-adds where a tensor core was meant, more shared memory than a block may
have (which Triton reports at the first launch only). ``compile`` counts these on any machine that has triton; a
``Variant`` names one kernel as the library launches it, and every kernel file yields its own in ``shipped_configs()``.

The kernel has to be a compiled one: decorated while ``TRITON_INTERPRET`` is not set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, by architecture
WIDE_LOAD = re.compile(r"\bLDG(?:STS)?\.\S*\b(?:128|256)\b")
MULTIPLY_ADD = re.compile(r"\b(?:FFMA|FMUL|HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Compiled:
    """One kernel in the machine code of one architecture. Counts are of instructions in the code, not of executions."""

    arch: int
    registers: int  # per thread
    spill_bytes: int  # stack and local memory, per thread
    shared_bytes: int
    wide_loads: int  # from global memory, 16 bytes or more per thread
    loads_in_flight: int  # those of them that are issued before the first multiply-add
    narrow_loads: int  # from global memory, less than 4 bytes per thread
    uses_hgmma: bool  # the tensor cores as a warp group drives them: wgmma on sm_90, tcgen05 on sm_100
    uses_hmma: bool  # the tensor cores as one warp drives them
    sass: str = field(repr=False)
    ptx: str = field(repr=False)


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that decides its machine code, under a name to show in tests and tables."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: Collection[str]
    num_warps: int
    num_stages: int

    def compile(self, arch: int) -> Compiled:
        return compile(
            self.kernel,
            signature=self.signature,
            constexprs=self.constexprs,
            divisible=self.divisible,
            arch=arch,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def compile(
    kernel: Any,
    *,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    divisible: Collection[str] = (),
    arch: int,
    num_warps: int,
    num_stages: int,
    **options: Any,
) -> Compiled:
    """Compile ``kernel`` for ``sm_<arch>``.

    ``signature`` maps run-time arguments to Triton types ("*bf16", "i32"), ``constexprs`` the others to values; a
    pointer given as None belongs there. ``divisible`` names the arguments that are multiples of 16, as Triton itself
    finds out at a launch. An argument in neither mapping is an error.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    if problem := set(names) ^ (set(signature) | set(constexprs)):
        raise ValueError(f"{kernel.__name__}: arguments that are missing, or that it does not have: {sorted(problem)}")
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constexprs else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True} | options
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    return Compiled(
        arch=arch,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        wide_loads=len(WIDE_LOAD.findall(sass)),
        loads_in_flight=len(WIDE_LOAD.findall(MULTIPLY_ADD.split(sass, maxsplit=1)[0])),
        narrow_loads=len(re.findall(r"\bLDG\.\S*\b[US](?:8|16)\b", sass)),
        uses_hgmma=bool(re.search(r"\bHGMMA\b|\bUTC\w*MMA\b", sass)),
        uses_hmma=bool(re.search(r"\bHMMA\b", sass)),
        sass=sass,
        ptx=compiled.asm["ptx"],
    )


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage by name, and the machine code, from the disassembler that comes with triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(file)]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"\bREG:.*", text)
    if usage is None:
        raise RuntimeError(f"no resource usage in what cuobjdump printed: {text[:300]}")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage[0])}, text
