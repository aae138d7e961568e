"""The tables of docs/kernels.md that need no GPU: what the compiler made of each form of the kernels, and modelled times.

    python benchmarks/kernel_table.py --write docs/kernels.md --also PYTHON    replace the text between the markers there
    python benchmarks/kernel_table.py --write docs/kernels.md --keep-triton    the same, but for the table of the Triton kernels
    python benchmarks/kernel_table.py                                          print it

PYTHON is an interpreter with another version of triton, whose numbers stand beside those of this one. Registers, shared memory
and loads are read from machine code for sm_90; times are kernels/triton/cost.py's. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorap.kernels import cost

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("low_rank_linear", "low_rank_fused", "silu_gated_linear", "linear", "channel_sq_norm")
BEGIN, END = "<!-- begin: benchmarks/kernel_table.py -->", "<!-- end: benchmarks/kernel_table.py -->"
ARCH = 90
# M: rank: microseconds modelled for what ran before the model had a limit on what one SM reads, and before one launch put
# pivots in order.
BEFORE = {
    1: {512: 6.5, 1024: 8.6, 1632: 13.9},
    16: {512: 9.5, 1024: 12.7, 1632: 18.4},
    2048: {512: 63.0, 1024: 86.0, 1632: 112.0},
}
GROUPS = {  # (K, ranks, rows of the left factors, pivots)
    "LLaMA-7B q, k, v": (4096, (512, 512, 1536), (4096, 4096, 4096), (0, 0, 0)),
    "the same, pivoted": (4096, (512, 512, 1536), (3584, 3584, 2560), (512, 512, 1536)),
    "LLaMA-3-8B q, k, v": (4096, (1024, 512, 768), (4096, 1024, 1024), (0, 0, 0)),
    "LLaMA-3-8B k alone": (4096, (512,), (1024,), (0,)),
    "LLaMA-7B down": (11008, (1472,), (4096,), (0,)),
}


def variants() -> Iterator[Any]:
    """One of each form in 16 bits: the others differ in sizes, and ``make test-all`` says of all what a table could."""
    seen = set()
    for module in MODULES:
        for variant in import_module(f"lorap.kernels.{module}").shipped_configs():
            told = ("GEMV", "PDL", "WHOLE", "NUM_LAYERS", "BLOCK_M", "BLOCK_N")
            pivoted, half = variant.constexprs.get("PIVOTED", 0) > 0, "fp32" not in variant.name
            form = (variant.kernel.__name__, pivoted, *(variant.constexprs.get(name) for name in told))
            if half and "fp16" not in variant.name and form not in seen:
                seen.add(form)
                yield variant


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def compiled() -> dict[str, str]:
    """Of each kernel: registers / bytes spilled / shared KB / 16-byte loads before the first multiply-add, of all / its unit."""
    from lorap.kernels.aot import SHARED_LIMIT

    cells = {}
    for variant in variants():
        code = variant.compile(ARCH)
        if code.shared_bytes > SHARED_LIMIT[ARCH]:
            raise SystemExit(f"{variant.name} does not fit sm_{ARCH}: {code}")
        unit = "wgmma" if code.uses_hgmma else "mma" if code.uses_hmma else "fma"
        loads = f"{code.loads_in_flight} of {code.wide_loads}"
        cells[variant.name] = (
            f"{code.registers} / {code.spill_bytes} / {code.shared_bytes / 1024:.0f} / {loads} / {unit}"
        )
    return {"triton": version("triton"), **cells}


def triton_table(others: list[str]) -> str:
    """A row for each kernel, a column for each version of triton."""
    columns = [compiled()]
    for python in others:
        run = subprocess.run([python, __file__, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
        columns.append(json.loads(run.stdout))
    names = [name for name in columns[0] if name != "triton"]
    rows = [[f"`{name}`", *(column.get(name, "") for column in columns)] for name in names]
    return markdown(["kernel", *(f"triton {column['triton']}" for column in columns)], rows)


def cuda_table() -> str:
    """What ptxas made of csrc/cuda: one row per instance of a kernel."""
    from lorap.nn.cuda_limits import MMA_SHARED_BYTES

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "nvcc was not there when this table was made.\n"
    pattern, rows = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            command = [
                nvcc,
                "-std=c++17",
                "-cubin",
                f"-gencode=arch=compute_{ARCH}a,code=sm_{ARCH}a",
                "-Xptxas",
                "-v",
                "-O3",
            ]
            report = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True, check=True).stderr
            code = _machine_code(cubin)
            for name, spilled, registers in re.findall(pattern, report, re.DOTALL):
                loads = max(
                    part.count("LDG.E.EF.128") for part in code[name].split("FFMA")
                )  # issued with no use between
                groups = re.findall(r"DEPBAR\.LE SB0, (0x\w+)", code[name])  # those that need not have arrived
                if "HMMA" in code[name]:
                    shared, unit = f"{MMA_SHARED_BYTES // 1024}, pivoted + R / 128", "mma"
                    flight = f"{min(int(group, 16) for group in groups)} KB a warp"
                else:
                    shared, unit, flight = "all, for `left`", "fma", f"{loads} loads a thread"
                cells = [f"{registers} / {spilled}", shared, flight, unit]
                rows.append([f"`{_demangle(name)}`", *cells])
    return markdown(["instance", "registers / spilled", "shared KB", "weights on their way", "unit"], rows)


def _machine_code(cubin: Path) -> dict[str, str]:
    """The instructions of each function, by the disassembler that comes with triton."""
    from triton import knobs

    tool = [knobs.nvidia.cuobjdump.path, "--dump-sass", str(cubin)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL))


def _demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    full = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip() if tool else name
    found = re.search(r"\w+<.*>", full)
    return found[0] if found else full


def layer_table() -> str:
    """4096 x 4096 in bfloat16: what ran before, what runs now, and everything that could."""
    rows = []
    for m, ranks in BEFORE.items():
        for rank, before in ranks.items():
            sizes, left = (m, 4096, (rank,)), 4096 - rank if m == 2048 else 4096
            two = cost.two_gemms_seconds(*sizes, (left,)) + (cost.order_seconds(m, 4096) if left < 4096 else 0)
            ours = m <= 32 and cost.worth("low_rank_linear", *sizes, (left,), (4096 - left,))
            now = cost.pair_seconds(*sizes, (left,)) if ours else two
            others = (
                cost.dense_seconds(m, 4096, [4096]),
                cost.two_gemms_seconds(*sizes, (4096,)),
                cost.one_launch_seconds(m, 4096, (rank,), (4096,)) if m <= 16 else None,
            )
            cells = ["" if us is None else f"{1e6 * us:.1f}" for us in others]
            name = f"{m}, r {rank}" + (", pivoted" if left < 4096 else "")
            rows.append([name, f"{before:.1f}", f"{1e6 * now:.1f}", "Triton" if ours else "two GEMMs", *cells, ""])
    return markdown(
        ["tokens", "before", "now", "by", "dense", "two GEMMs, plain", "CUDA, one launch", "measured"], rows
    )


def group_table() -> str:
    """Projections that run as one op, and who gets them."""
    rows = []
    for name, (k, ranks, left, pivots) in GROUPS.items():
        outputs = [count + more for count, more in zip(left, pivots, strict=True)]
        for m in (1, 8, 16, 32):
            two = cost.two_gemms_seconds(m, k, ranks, left)
            two += sum(cost.order_seconds(m, n) for n, more in zip(outputs, pivots, strict=True) if more)
            times = [cost.pair_seconds(m, k, ranks, left), two, cost.dense_seconds(m, k, outputs)]
            if m <= 16:
                layers = zip(ranks, left, strict=True)
                times.append(sum(cost.one_launch_seconds(m, k, (rank,), (count,)) for rank, count in layers))
                times.append(cost.one_launch_seconds(m, k, ranks, left))
            cells = [f"{1e6 * us:.1f}" for us in times] + [""] * (5 - len(times))
            ours = cost.worth("low_rank_linear_group", m, k, ranks, left, pivots)
            rows.append([name, str(m), *cells, "Triton" if ours else "torch", ""])
    for n in (5504, 11008):
        for m in (1, 8, 16, 32):
            torch_us = cost.dense_seconds(m, 4096, [n, n]) + 2 * cost.LAUNCH
            ours = cost.worth("silu_gated_linear", m, 4096, (), (n, n), (0, 0))
            times = (cost.gated_seconds(m, 4096, n), torch_us, torch_us)
            row = [
                f"gate and up of {n}, dense",
                str(m),
                *(f"{1e6 * us:.1f}" for us in times),
                *["", ""],
                "Triton" if ours else "torch",
                "",
            ]
            rows.append(row)
    cuda = ["CUDA, a launch each", "CUDA, one launch"]
    return markdown(["projections", "tokens", "Triton", "torch", "dense", *cuda, "runs in", "measured"], rows)


def standing_triton_table(old: str) -> str:
    """The table of the Triton kernels in what this program wrote before."""
    rows = re.search(r"^\| kernel \|.*\n(?:\|.*\n)+", old, re.MULTILINE)
    if rows is None:
        raise SystemExit("there is no table of Triton kernels to keep; run without --keep-triton")
    return rows[0]


def text(triton: str) -> str:
    return "\n".join(
        [
            f"sm_{ARCH}: registers per thread / bytes spilled / shared memory in KB / 16-byte loads issued before the first "
            "multiply-add, of all / unit that multiplies.\n",
            triton,
            f"`csrc/cuda`, sm_{ARCH}a:\n",
            cuda_table(),
            "One layer of 4096 x 4096 in bfloat16 on an H200, modelled, in microseconds, in a CUDA graph. Never run on a GPU.\n",
            layer_table(),
            "Projections that run as one op, likewise. `RULES` of `lorap/nn/dispatch.py` gives them to Triton where that is 5 % "
            "faster than torch on the factors and on the dense weights.\n",
            group_table(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the markers in FILE")
    parser.add_argument("--also", action="append", default=[], metavar="PYTHON", help="with another version of triton")
    parser.add_argument("--json", action="store_true", help="only this interpreter's column, for another one")
    parser.add_argument("--keep-triton", action="store_true", help="keep their table: none of them has changed")
    options = parser.parse_args()
    if options.keep_triton and options.write is None:
        parser.error("--keep-triton needs --write: the file that has the table")
    if options.json:
        json.dump(compiled(), sys.stdout)
    elif options.write is None:
        print(text(triton_table(options.also)))
    else:
        before, _, rest = options.write.read_text().partition(BEGIN)
        old, _, after = rest.partition(END)
        triton = standing_triton_table(old) if options.keep_triton else triton_table(options.also)
        options.write.write_text(f"{before}{BEGIN}\n{text(triton)}{END}{after}")


if __name__ == "__main__":
    main()
