"""The tables of docs/kernels.md that need no GPU: what the compiler made of every shipped kernel, and predicted times.

    python benchmarks/kernel_table.py --write docs/kernels.md      replace the text between the markers there
    python benchmarks/kernel_table.py                              print it

Registers, shared memory and loads are read from machine code; times are calculated from bytes and launches, not measured.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from lorap.kernels.aot import ARCHITECTURES, SHARED_LIMIT, Variant

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("low_rank_linear", "low_rank_fused", "silu_gated_linear", "linear", "channel_sq_norm")
BEGIN, END = "<!-- begin: benchmarks/kernel_table.py -->", "<!-- end: benchmarks/kernel_table.py -->"

# Measured by others on an H100 80GB HBM3: copy bandwidth, and the cost of one kernel launch inside a CUDA graph.
H100_BYTES_PER_US = 3.0e6
H100_LAUNCH_US = 1.3

SHAPES = {  # name: (K, R, N)
    "LLaMA-7B q, k at 50 %": (4096, 512, 4096),
    "LLaMA-7B mean at 50 %": (4096, 1024, 4096),
    "LLaMA-7B v, o at 50 %": (4096, 1536, 4096),
    "LLaMA-3-8B k at 50 %": (4096, 204, 1024),
}


def variants() -> Iterator[Variant]:
    for module in MODULES:
        yield from import_module(f"lorap.kernels.{module}").shipped_configs()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def triton_table() -> str:
    """One row per variant; a cell holds registers / shared KB / 16-byte loads / tensor core for one architecture."""
    rows = []
    for variant in variants():
        cells = [f"`{variant.name}`"]
        for arch in ARCHITECTURES:
            if variant.constexprs.get("PDL") and arch < 90:
                cells.append("needs sm_90")
                continue
            code = variant.compile(arch)
            if code.shared_bytes > SHARED_LIMIT[arch]:
                raise SystemExit(f"{variant.name} does not fit sm_{arch}: {code}")
            core = (
                "wgmma"
                if code.uses_hgmma and arch == 90
                else "tcgen05"
                if code.uses_hgmma
                else "mma"
                if code.uses_hmma
                else "fma"
            )
            spilled = f", {code.spill_bytes} bytes spilled" if code.spill_bytes else ""
            cells.append(f"{code.registers} / {code.shared_bytes / 1024:.0f} / {code.wide_loads} / {core}{spilled}")
        rows.append(cells)
    return markdown(["kernel", *(f"sm_{arch}" for arch in ARCHITECTURES)], rows)


def cuda_table() -> str:
    """ptxas's report on csrc/cuda: one row per instance of the kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "nvcc was not there when this table was made.\n"
    rows: dict[str, list[str]] = {}
    archs = ("80", "90a", "100")
    for arch in archs:
        source = ROOT / "csrc/cuda/low_rank_decode.cu"
        command = [nvcc, "-std=c++17", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-O3"]
        report = subprocess.run(
            [*command, "-o", "/dev/null", source], capture_output=True, text=True, check=True
        ).stderr
        pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spills, registers in re.findall(pattern, report, re.DOTALL):
            rows.setdefault(_demangle(name), []).append(f"{registers} / {spills}")
    return markdown(
        ["instance", *(f"sm_{arch}" for arch in archs)], [[f"`{name}`", *cells] for name, cells in rows.items()]
    )


def _demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    full = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip() if tool else name
    found = re.search(r"\w+<.*>", full)
    return found[0] if found else full


def prediction_table() -> str:
    """Times of one layer at M = 1 in bfloat16 on an H100: dense, two launches, one launch."""
    rows = []
    for name, (k, r, n) in SHAPES.items():
        dense = 2 * k * n / H100_BYTES_PER_US + H100_LAUNCH_US
        bytes_us = 2 * r * (k + n) / H100_BYTES_PER_US
        two, one = bytes_us + 2 * H100_LAUNCH_US, bytes_us + H100_LAUNCH_US
        rows.append(
            [
                name,
                f"{k} x {n}, r {r}",
                *(f"{us:.1f}" for us in (dense, two, one)),
                f"{dense / two:.2f} / {dense / one:.2f}",
            ]
        )
    return markdown(["layer", "shape", "dense us", "two launches us", "one launch us", "speedup two / one"], rows)


def text() -> str:
    return "\n".join(
        [
            "Registers per thread / shared memory in KB / 16-byte loads in the code / unit that multiplies.\n",
            triton_table(),
            "`csrc/cuda/low_rank_decode.cu`: registers per thread / bytes spilled.\n",
            cuda_table(),
            "Predicted on an H100, M = 1, bfloat16, inside a CUDA graph: bytes at 3.0 TB/s plus 1.3 us a launch. "
            "Calculated, not measured.\n",
            prediction_table(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the markers in FILE")
    options = parser.parse_args()
    if options.write is None:
        print(text())
        return
    before, _, rest = options.write.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    options.write.write_text(f"{before}{BEGIN}\n{text()}{END}{after}")


if __name__ == "__main__":
    main()
