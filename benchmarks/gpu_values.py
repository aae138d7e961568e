"""The correctness steps of gpu_check.sh: every op and backend against float64 on shapes that are no powers of two, in CUDA
graphs, on other streams, repeated, and under compute-sanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_timings
import torch
from gpu_timings import Item, Row
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # relative error in the norm


def load_lorap() -> Any:
    """lorap.nn.ops from the working tree, without lorap's __init__, which needs transformers: a GPU machine may lack it."""
    if "lorap.nn.ops" in sys.modules:
        return sys.modules["lorap.nn.ops"]
    for name, folder in (("lorap", "lorap"), ("lorap.kernels", "kernels/triton")):
        spec = importlib.util.spec_from_file_location(name, ROOT / folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # found, and not run
    from lorap.nn import native, ops

    extra = os.environ.get("LORAP_CHECK_CUDA_LIBRARY", "")  # built by gpu_check.sh where CMake is missing
    if not native.HAS_CUDA and Path(extra).is_file():
        torch.ops.load_library(extra)
        native.HAS_CUDA = True
    return ops


TOKENS = (1, 2, 3, 4, 6, 8, 16, 17, 32)  # for which kernels differ, or models run them
RAGGED = (1, 3)


def cases(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(op, description, arguments): sizes that models have, and ragged ones; biases, pivots, empty gaps. Few in float32."""
    fitting = tuple(max(16, size // scale) for size in (2048, 352, 1056))
    tokens = TOKENS if dtype != torch.float32 else (1, 16)
    for m in tokens:
        yield from _cases_of(m, *fitting, device=device, dtype=dtype)
    for m in RAGGED if dtype != torch.float32 else ():
        yield from _cases_of(m, 333, 77, 129, device=device, dtype=dtype)
    for rows, channels in ((1, 40), (1025, 300), (5000, 576)):
        x = gpu_timings.random(rows, channels, device=device, dtype=dtype)
        mask = torch.arange(rows, device=device) % 3 < 2
        yield "channel_sq_norm", f"{rows}x{channels}", (x,)
        yield (
            "channel_sq_norm",
            f"{rows}x{channels}, NaN where masked",
            (x.masked_fill(~mask[:, None], float("nan")), mask),
        )


def _cases_of(
    m: int, k: int, r: int, n: int, *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    def random(*shape: int) -> Tensor:
        return gpu_timings.random(*shape, device=device, dtype=dtype)

    def pivots(rank: int, n: int) -> Tensor:
        return torch.randperm(n, device=device)[:rank].sort().values

    sizes, biased = f"M={m} K={k} R={r} N={n}", m % 2 == 0
    none, no_rows = torch.empty(0, device=device, dtype=dtype), torch.empty(0, device=device, dtype=torch.int64)
    x, s = random(m, k), r + 16
    yield "linear", sizes, (x, random(n, k), random(n) if biased else None)
    yield "low_rank_linear", sizes, (x, random(r, k), random(n, r), random(n) if biased else None)
    yield (
        "low_rank_linear",
        f"{sizes} pivoted",
        (x, random(r, k), random(n - r, r), random(n) if biased else None, pivots(r, n)),
    )
    right = [random(r, k), random(s, k), random(48, k)]
    left = [random(n, r), random(64, s), random(n, 48)]
    yield "low_rank_linear_group", sizes, (x, right, left, [], [])
    mixed = [right[0], right[1], random(48, k)], [left[0], left[1], random(0, 48)]
    rows = [no_rows, pivots(s, 64 + s), torch.arange(48, device=device)]
    yield (
        "low_rank_linear_group",
        f"{sizes} one bias missing, one pivoted, one dense",
        (x, *mixed, [random(n), none, random(48)], rows),
    )
    yield "silu_gated_linear", sizes, (x, random(n, k), random(n, k), random(n), random(n))
    yield from _quantized_cases(m, k, r, n, device=device, dtype=dtype)
    bits = (2, 3, 4, 5, 6)[m % 5]
    weight = gpu_timings.on_trellis(n, k, bits, device=device, dtype=dtype)
    group = gpu_timings.TRELLIS_GROUP
    yield "trellis_linear", f"{sizes} tcq{bits}", (x, *weight, random(n) if biased else None, bits, group)
    pair = [random(r, k), random(32, k)], [random(n, r), random(n, 32)]
    yield "low_rank_silu_gated_linear", sizes, (x, *pair, [random(n), random(n)] if biased else [])


def _quantized_cases(
    m: int, k: int, r: int, n: int, *, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Weights of 4 bits, and of 8; pairs of factors of 8 bits are pivoted."""
    bias, x = gpu_timings.random(n, device=device, dtype=dtype), gpu_timings.random(m, k, device=device, dtype=dtype)

    def weight(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
        return gpu_timings.quantized(rows, columns, bits, device=device, dtype=dtype)

    pivots = torch.randperm(n, device=device)[:r].sort().values
    sizes, group = f"M={m} K={k} R={r} N={n}", gpu_timings.GROUP
    yield "quantized_linear", f"{sizes} int4", (x, *weight(n, k, 4), bias, 4, group)
    yield "quantized_low_rank_linear", f"{sizes} int4", (x, *weight(n, r, 4), *weight(r, k, 4), bias, 4, group)
    factors = *weight(n - r, r, 8), *weight(r, k, 8)
    yield "quantized_low_rank_linear", f"{sizes} int8 pivoted", (x, *factors, bias, 8, group, pivots)
    yield "quantized_silu_gated_linear", f"{sizes} int8", (x, *weight(n, k, 8), *weight(n, k, 8), 8, group)


def runner(ops: Any, op: str, backend: str, arguments: tuple[Any, ...]) -> Callable[[], Any] | str:
    """The call, or why this backend does not take these arguments."""
    x = arguments[0]
    if backend == "reference":
        return lambda: ops.implementations.implementation(op, "reference")(*arguments)
    if not x.is_cuda:
        return "no GPU"
    if reason := gpu_timings.distrust(op, backend):
        return reason
    if backend == "triton":
        return lambda: ops.implementations.implementation(op, "triton")(*arguments)
    if op == "quantized_low_rank_linear":
        from lorap.nn import cuda_limits

        if x.dtype in (torch.bfloat16, torch.float16) and cuda_limits.takes_packed(len(x), x, [arguments[1:]]):
            return lambda: torch.ops.lorap_cuda.quantized_low_rank_linear(*arguments)
        return "for 16 bits, at most 8 tokens, K and R multiples of 32 in 4 bits and of 16 in 8"
    from lorap.kernels import low_rank_fused, low_rank_linear

    if backend == "triton, no pdl":
        some = arguments if op == "low_rank_linear_group" else (*arguments, [], [])[:4]
        return lambda: getattr(low_rank_linear, op)(*some)
    if backend == "triton one launch":
        return "no pivots" if len(arguments) > 4 else lambda: low_rank_fused.low_rank_fused(*arguments)
    right = arguments[1] if op == "low_rank_linear_group" else [arguments[1]]
    odd = any(size % 8 for size in (x.shape[1], *map(len, right)))
    if x.dtype not in (torch.bfloat16, torch.float16) or len(x) > 16 or odd:
        return "for 16 bits, at most 16 tokens, K and R multiples of 8"
    return lambda: getattr(torch.ops.lorap_cuda, op)(*arguments)


def backends_of(ops: Any, op: str, *, cuda: bool) -> list[str]:
    """Those that have this op. The CUDA kernels are kept apart: their barrier could hang, and take along what comes after it."""
    if cuda:
        return ["cuda"] if op in ops.implementations.IMPLEMENTATIONS["cuda"] else []
    found = ["triton"] if op in ops.implementations.IMPLEMENTATIONS["triton"] else []
    if op in ("low_rank_linear_group", "low_rank_silu_gated_linear"):
        found.append("triton, no pdl")
    return [*found, "triton one launch"] if op == "low_rank_linear" else found


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next outputs will be made of, so that an element not written shows."""
    for numel in (2**10, 2**14, 2**18, 2**22):
        torch.full((numel,), float("nan"), device=device)


def relative_error(got: Any, exact: Any) -> float:
    """||got - exact|| / ||exact||; infinite where got is not finite. Of a tuple the first."""
    got, exact = (value[0] if isinstance(value, tuple) else value for value in (got, exact))
    error = (got.double() - exact).norm() / exact.norm()
    return float(error) if torch.isfinite(got).all() else float("inf")


def exact_value(op: str, arguments: tuple[Any, ...]) -> Any:
    """The float64 reference."""
    from lorap.kernels import reference
    from lorap.nn import dispatch

    return getattr(reference, op)(*dispatch._to_double(arguments))


def self_check_rows(device: torch.device, _scale: int, *, cuda: bool) -> Iterator[Item]:
    """Every op and backend on its small example, which is also what the library itself checks before the first use."""
    ops = load_lorap()
    from lorap.nn import dispatch

    for op in ops.SCHEMAS:
        for backend in backends_of(ops, op, cuda=cuda):
            for dtype in DTYPES:
                what, check = _checked(ops, op, backend, ops.implementations.example(op, device, dtype))

                def both(check=check, arguments=(op, backend, device, dtype)) -> Row:
                    found = check()
                    if dispatch.ABLE.get(arguments[1]):
                        found["self_check"] = dispatch.self_check(*arguments) or "passes"
                    return found

                yield {"op": op, "backend": backend, "dtype": _name(dtype)} | what, check and both


def value_rows(device: torch.device, scale: int, *, cuda: bool) -> Iterator[Item]:
    """Values of odd shapes against float64, on memory poisoned with NaN. Without a GPU, the reference in their place."""
    ops = load_lorap()
    for dtype in DTYPES:
        torch.manual_seed(0)
        for op, description, arguments in cases(device, dtype, scale):
            about = {"op": op, "case": description, "dtype": _name(dtype)}
            backends = backends_of(ops, op, cuda=cuda)
            for backend in [*backends, "reference"] if device.type == "cpu" and not cuda else backends:
                what, check = _checked(ops, op, backend, arguments)
                yield about | {"backend": backend} | what, check


def _checked(ops: Any, op: str, backend: str, arguments: tuple[Any, ...]) -> Item:
    call = runner(ops, op, backend, arguments)
    if isinstance(call, str):
        return {"not_run": call}, None

    def check() -> Row:
        poison(arguments[0].device)
        error = relative_error(call(), exact_value(op, arguments))
        return {"error": error, "ok": error <= LIMITS[arguments[0].dtype]}

    return {}, check


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def graph_rows(device: torch.device, _scale: int, *, cuda: bool) -> Iterator[Item]:
    """Replays of a captured call on new inputs, other streams, and the same bits fifty times."""
    ops = load_lorap()
    for op in ops.SCHEMAS:
        for backend in backends_of(ops, op, cuda=cuda):
            arguments = ops.implementations.example(op, device, torch.bfloat16)
            call = runner(ops, op, backend, arguments)
            what = {"op": op, "backend": backend}
            if isinstance(call, str):
                yield what | {"not_run": call}, None
                continue
            for check in (_replays, _on_another_stream, _repeats):
                found = lambda check=check, call=call, x=arguments[0]: {"ok": check(call, x)}  # noqa: E731
                yield what | {"check": check.__name__[1:]}, found


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _replays(call: Callable[[], Any], x: Tensor) -> bool:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _first(call())
    for _ in range(3):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(y, _first(call())):
            return False
    return True


def _on_another_stream(call: Callable[[], Any], _x: Tensor) -> bool:
    expected = _first(call())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = _first(call())
    torch.cuda.synchronize()
    return torch.equal(y, expected)


def _repeats(call: Callable[[], Any], _x: Tensor) -> bool:
    expected = _first(call())
    return all(torch.equal(_first(call()), expected) for _ in range(50))


def program_rows(device: torch.device, _scale: int, *, work: Path) -> Iterator[Item]:
    """The CUDA kernels without torch: every allocation is the driver's, values against double, repeated launches, times."""
    program = work / "check_decode"
    sources = [ROOT / "benchmarks/check_decode.cu", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    nvcc = _tool("nvcc") or "nvcc"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        f"-I{ROOT / 'csrc/cuda'}",
    ]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        about, found, _ = line.partition(": error ")
        if found:
            us = re.search(r"([\d.]+) us", line)
            row: Row = {"case": about, "error": float(line.split(": error ")[1].split()[0]), "ok": " ok" in line}
            yield row | ({"us": float(us[1])} if us else {}), None
    yield (
        {"case": "the program as a whole", "ok": done.returncode == 0, "says": (done.stdout + done.stderr)[-200:]},
        None,
    )


def sanitizer_rows(device: torch.device, _scale: int, *, work: Path) -> Iterator[Item]:
    """compute-sanitizer on that program, all four tools side by side: accesses out of bounds, races, barriers, unset memory."""
    found, program = _tool("compute-sanitizer"), work / "check_decode"
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    if found is None or not program.is_file():
        reason = "compute-sanitizer is not installed" if found is None else "check_decode was not built"
        yield from (({"tool": tool, "not_run": reason}, None) for tool in tools)
        return
    # Errors that CUDA's own start-up provokes and handles are not ours.
    options = [
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
        "--kernel-name",
        "kernel_substring=low_rank_decode",
    ]
    started = {
        tool: subprocess.Popen(
            [found, "--tool", tool, *options, str(program), "quick"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in tools
    }
    for tool, process in started.items():
        output = process.communicate()[0]
        lines = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        clean = process.returncode == 0 and bool(lines) and bool(re.search(r" 0 (errors|hazards)", lines[-1]))
        yield {"tool": tool, "ok": clean, "summary": lines[-1] if lines else output[-300:]}, None


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
