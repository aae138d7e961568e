"""The steps of gpu_check.sh: what can only be known on a GPU. Each step appends rows to WORK/STEP.jsonl as it finds them.

    python benchmarks/gpu_check.py STEP --work DIR [--dry-run] [--shard I/N]

A step that is cut off keeps the rows it has, and gpu_report.py says what is missing. With --dry-run everything runs on the
CPU with a 32nd of the sizes, to test this program; its numbers mean nothing. --shard runs every N-th group of rows, in which
kernels repeat.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_decode
import gpu_timings
import gpu_tune
import gpu_values
import torch
from gpu_timings import Item, Row
from torch import Tensor

PACKAGES = ("triton", "numpy", "transformers", "pytest", "pytest-benchmark", "setuptools")
TOOLS = ("nvcc", "cmake", "ninja", "g++", "compute-sanitizer", "nsys", "ncu")
SCALE = 32  # of a dry run


def environment_rows(device: torch.device, _scale: int) -> Iterator[Item]:
    """What this machine has, and what is missing."""
    gpu_values.load_lorap()
    from lorap.nn import native

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["CUDA of torch"] = torch.version.cuda or "none: a CPU build"
    found["GPU"] = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"GPU": gpu.name, "compute capability": f"{gpu.major}.{gpu.minor}", "L2 bytes": gpu.L2_cache_size}
        found |= {"multiprocessors": gpu.multi_processor_count}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found |= {name: shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") for name in TOOLS}
    found["lorap's CUDA kernel"] = "built" if native.HAS_CUDA else None
    for what, value in found.items():
        yield ({"what": what, "found": value} if value is not None else {"what": what, "not_run": "not there"}), None


def factorization_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """Ours by method, shape and batch; then torch's drivers. Predicted: eigh in float64 takes at most 0.8 s."""
    n, wide = 4096 // scale, 11008 // scale
    torch.linalg.eigh(torch.eye(64, device=device, dtype=torch.float64))  # loads the library
    yield from _our_factorizations(device, scale)
    drivers = {"gesvdj": {"driver": "gesvdj"}, "gesvd": {"driver": "gesvd"}} if device.type == "cuda" else {"gesdd": {}}
    weight = torch.randn(n, wide, device=device)
    square = weight[:, :n].contiguous()

    def gram(matrix: Tensor) -> Tensor:
        matrix = matrix.double()
        return matrix @ matrix.T

    timed: list[tuple[str, float | None, Callable[[], Any]]] = [
        (f"Gram matrix of {n}x{wide}, float64", None, lambda: gram(weight)),
        (f"eigh of {n}x{n}, float64", 0.8, lambda: torch.linalg.eigh(gram(square))),
        (f"eigh of {n}x{n}, float32", None, lambda: torch.linalg.eigh(gram(square).float())),
    ]
    for name, options in drivers.items():
        timed.append((f"svd of {n}x{n}, {name}, float32", None, lambda options=options: _svd(square, options)))
    for name, prediction, call in timed:

        def measure(call: Callable[[], Any] = call) -> Row:
            return {"seconds": _seconds(call, device)[0]}

        yield {"kind": name} | ({"predicted_seconds": prediction} if prediction else {}), measure


# Seconds a matrix on an H100, from operation counts (docs/factorization.md); nobody has measured them.
PREDICTED = {"eigh": 0.9, "mixed": 0.6, "subspace": 0.4}


def _our_factorizations(device: torch.device, scale: int) -> Iterator[Item]:
    """lorap.factorize_batch: seconds a matrix, the weighted error over that of eigh, and what the certificate says."""
    import lorap

    shapes = {(4096, 4096, 1024): (1, 4), (4096, 11008, 1492): (1,), (1024, 4096, 409): (1, 8)}
    for (out_features, in_features, rank), batches in shapes.items():
        shape = (out_features // scale, in_features // scale)
        weight = torch.randn(shape, device=device)
        sq_norm = torch.randn(shape[1], device=device).mul(2).exp()
        exact: list[float] = []
        for method, count in itertools.product(PREDICTED, batches):

            def measure(
                weight: Tensor = weight,
                sq_norm: Tensor = sq_norm,
                rank: int = rank // scale,
                method: str = method,
                count: int = count,
                exact: list[float] = exact,
            ) -> Row:
                inputs = [weight] * count, [rank] * count, [sq_norm] * count
                lorap.factorize_batch(*inputs, method=method)  # loads libraries, finds workspaces
                seconds, found = _seconds(lambda: lorap.factorize_batch(*inputs, method=method), device)
                if method == "eigh":
                    exact.append(found[0].error)
                row = {"seconds": seconds / count, "solved by": found[0].solver, "excess": found[0].excess}
                return row | {"error_over_eigh": found[-1].error / exact[0]}

            prediction = {"predicted_seconds": PREDICTED[method]} if out_features == 4096 and scale == 1 else {}
            kind = f"factorize {shape[0]}x{shape[1]} rank {rank // scale}, {method}, {count} together"
            yield {"kind": kind} | prediction, measure


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - start, result


def _svd(matrix: Tensor, options: dict[str, str]) -> Any:
    return torch.linalg.svd(matrix, full_matrices=False, **options)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def out_dtype_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """X^T X of bfloat16 with float32 sums: is it there, and how exact."""
    for tokens in (1024, 8192):
        x = torch.randn(tokens // scale, 4096 // scale, device=device, dtype=torch.bfloat16)

        def measure(x: Tensor = x) -> Row:
            exact = x.double().T @ x.double()
            error = gpu_values.relative_error(torch.mm(x.T, x, out_dtype=torch.float32), exact)
            seconds = gpu_timings.seconds_of(lambda x: torch.mm(x.T, x, out_dtype=torch.float32), [(x,)])
            return {"error": error, "us": 1e6 * seconds, "tflop_per_s": 2 * x.numel() * x.shape[1] / seconds / 1e12}

        yield {"kind": "mm(out_dtype=float32)", "tokens": len(x)}, measure


def timed(rows: Callable[..., Iterator[Item]]) -> Callable[..., Iterator[Item]]:
    """A step of gpu_timings, which needs the ops loaded."""

    def step(device: torch.device, scale: int, **options: Any) -> Iterator[Item]:
        gpu_values.load_lorap()
        yield from rows(device, scale, **options)

    return step


def build_rows(device: torch.device, _scale: int, *, work: Path) -> Iterator[Item]:
    """lorap/_native.so with its CUDA part: the one that is there, else built by setup.py, else its CUDA part by nvcc alone."""
    load = (
        "import torch; torch.ops.load_library('lorap/_native.so'); torch.ops.lorap_cuda.quantized_low_rank_linear_group"
    )
    root, library = gpu_values.ROOT, os.environ.get("LORAP_CHECK_CUDA_LIBRARY", str(work / "lorap_cuda.so"))

    def loads() -> bool:
        return subprocess.run([sys.executable, "-c", load], cwd=root, capture_output=True, check=False).returncode == 0

    if loads():
        yield {"kind": "lorap/_native.so", "found": "was there"}, None
        return
    major, minor = torch.cuda.get_device_capability(device)
    arch, home = f"{major}{minor}" + ("a" if major == 9 else ""), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    environment = os.environ | {"LORAP_CUDA_ARCHS": arch, "PATH": f"{os.environ['PATH']}:{home}/bin"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root, env=environment, check=False)
    if loads():
        yield {"kind": "lorap/_native.so", "found": "built"}, None
        return
    torch_home = Path(torch.__file__).parent
    command = [
        "nvcc",
        "-O3",
        "-std=c++20",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_home / "include")]
    command += [
        *map(str, sorted((root / "csrc/cuda").glob("*.cu"))),
        "csrc/cuda/ops.cpp",
        "-L",
        str(torch_home / "lib"),
        "-ltorch_cpu",
        "-ltorch_cuda",
    ]
    done = subprocess.run([*command, "-o", library], cwd=root, env=environment, check=False)
    yield (
        {"kind": "CUDA part by nvcc alone"} | ({"not_run": "nvcc failed"} if done.returncode else {"found": library}),
        None,
    )


LAYERS = timed(gpu_timings.layer_rows)
STEPS: dict[str, Callable[..., Iterator[Item]]] = {
    "environment": environment_rows,
    "build": build_rows,
    "program": gpu_values.program_rows,
    "sanitizer": gpu_values.sanitizer_rows,
    "compile": functools.partial(LAYERS, kinds=gpu_timings.KINDS, compile_only=True),
    "self-check": functools.partial(gpu_values.self_check_rows, cuda=False),
    "self-check-cuda": functools.partial(gpu_values.self_check_rows, cuda=True),
    "values": functools.partial(gpu_values.value_rows, cuda=False),
    "values-cuda": functools.partial(gpu_values.value_rows, cuda=True),
    "graphs": functools.partial(gpu_values.graph_rows, cuda=False),
    "graphs-cuda": functools.partial(gpu_values.graph_rows, cuda=True),
    "timings": functools.partial(LAYERS, kinds=gpu_timings.KINDS),
    "timings-cuda": functools.partial(LAYERS, kinds=("cuda", "cuda, pivoted")),
    "merged": functools.partial(timed(gpu_timings.merged_rows), cuda=False),
    "merged-cuda": functools.partial(timed(gpu_timings.merged_rows), cuda=True),
    "quantized": functools.partial(timed(gpu_timings.quantized_rows), cuda=False),
    "quantized-cuda": functools.partial(timed(gpu_timings.quantized_rows), cuda=True),
    "trellis": timed(gpu_timings.trellis_rows),
    "squares": timed(gpu_timings.squares_rows),
    "launches": timed(gpu_timings.launch_rows),
    "out-dtype": out_dtype_rows,
    "factorization": factorization_rows,
    "sweep-compile": functools.partial(timed(gpu_tune.sweep_rows), compile_only=True),
    "sweep": timed(gpu_tune.sweep_rows),
    "models": gpu_decode.model_rows,
    "layer": gpu_decode.layer_rows,
}
WITH_WORK = ("build", "program", "sanitizer", "sweep")


def verdicts(work: Path) -> dict[tuple[str, str], bool] | None:
    """(op, backend) -> whether it was right in bfloat16 in the self-check; those that it did not reach are missing."""
    files = [work / f"{step}.jsonl" for step in ("self-check", "self-check-cuda")]
    rows = [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]
    found = {(row["op"], row["backend"]): bool(row["ok"]) for row in rows if "ok" in row and row["dtype"] == "bfloat16"}
    return found or None


def shard_of(what: Row) -> tuple[Any, ...]:
    """Rows with equal ones run the same kernels, and so belong into one process."""
    return tuple(what.get(name) for name in ("op", "backend", "dtype", "tokens", "kind", "layers", "kernel"))


def run(what: Row, find: Callable[[], Row] | None) -> Row:
    """The whole row, or the reason why it did not run."""
    try:
        return what | (find() if find and "not_run" not in what else {})
    except Exception as failure:  # one kernel that fails must not cost the others their numbers
        return what | {"not_run": f"{type(failure).__name__}: {str(failure)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--work", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small: tests this program")
    parser.add_argument("--skip", type=int, default=0, help="rows that are there already")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th group of rows, from the I-th on")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit(3)
    if not arguments.step.startswith(("self-check", "compile")):
        gpu_timings.verdicts = verdicts(arguments.work)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    shard, shards = map(int, arguments.shard.split("/"))
    groups: dict[tuple[Any, ...], int] = {}
    # A line at a time is appended whole, by however many processes.
    with (arguments.work / f"{arguments.step}.jsonl").open("a") as file:
        options = {"work": arguments.work} if arguments.step in WITH_WORK else {}
        items = STEPS[arguments.step](device, SCALE if arguments.dry_run else 1, **options)
        for number, (what, find) in enumerate(items):
            group = groups.setdefault(shard_of(what), len(groups))
            if number < arguments.skip or group % shards != shard:
                continue
            row = run(what, find)
            print(json.dumps(row), file=file, flush=True)
            if any(
                sign in row.get("not_run", "") for sign in ("CUDA error", "[CUDA]")
            ):  # nothing works in this process any more: go on in a new one
                options = [argument for argument in sys.argv if not argument.startswith("--skip")]
                os.execv(sys.executable, [sys.executable, *options, f"--skip={number + 1}"])


if __name__ == "__main__":
    main()
