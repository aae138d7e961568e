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


def cases(device: torch.device, dtype: torch.dtype, scale: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(op, description, arguments): sizes that are no powers of two, single tokens, biases, pivots, empty gaps."""

    def random(*shape: int) -> Tensor:
        return gpu_timings.random(*shape, device=device, dtype=dtype)

    def pivots(rank: int, n: int) -> Tensor:
        return torch.randperm(n, device=device)[:rank].sort().values

    none = torch.empty(0, device=device, dtype=dtype)
    no_rows = torch.empty(0, device=device, dtype=torch.int64)
    for i, m in enumerate((1, 2, 3, 5, 8, 9, 16, 17, 31, 32)):
        k, r, n = (
            (576, 172, 192),
            (1000, 344, 712),
            (4096 // scale, 512 // scale, 4096 // scale),
            (80, 8, 24),
            (333, 77, 129),
        )[i % 5]
        sizes = f"M={m} K={k} R={r} N={n}"
        x = random(m, k)
        yield "linear", f"{sizes}", (x, random(n, k), random(n) if i % 2 else None)
        yield "low_rank_linear", f"{sizes}", (x, random(r, k), random(n, r), random(n) if i % 2 else None)
        pivoted = (x, random(r, k), random(n - r, r), random(n) if i % 2 else None, pivots(r, n))
        yield "low_rank_linear", f"{sizes} pivoted", pivoted
        right, left = (
            [random(r, k), random(r + 16, k), random(40, k)],
            [random(n, r), random(64, r + 16), random(n, 40)],
        )
        yield "low_rank_linear_group", f"{sizes}", (x, right, left, [], [])
        mixed = [random(n), none, random(n)], [no_rows, pivots(r + 16, 64 + r + 16), no_rows]
        yield "low_rank_linear_group", f"{sizes} one bias missing, one pivoted", (x, right, left, *mixed)
        yield "silu_gated_linear", f"{sizes}", (x, random(n, k), random(n, k), random(n), random(n))
        pair = (
            x,
            [random(r, k), random(24, k)],
            [random(n, r), random(n, 24)],
            [random(n), random(n)] if i % 2 else [],
        )
        yield "low_rank_silu_gated_linear", f"{sizes}", pair
    for tokens, channels in ((1, 40), (1025, 300), (5000, 576)):
        x, mask = random(tokens, channels), torch.arange(tokens, device=device) % 3 < 2
        yield "channel_sq_norm", f"{tokens}x{channels}", (x,)
        x = x.masked_fill(~mask[:, None], float("nan"))
        yield "channel_sq_norm", f"{tokens}x{channels}, NaN where masked", (x, mask)


def runner(ops: Any, op: str, backend: str, arguments: tuple[Any, ...]) -> Callable[[], Any] | str:
    """The call, or why this backend does not take these arguments."""
    x = arguments[0]
    if backend == "reference":
        return lambda: ops.implementations.implementation(op, "reference")(*arguments)
    if not x.is_cuda:
        return "no GPU"
    if gpu_timings.allowed is not None and (op, backend) not in gpu_timings.allowed:
        return "did not pass its self-check"
    if backend == "triton":
        return lambda: ops.implementations.implementation(op, "triton")(*arguments)
    from lorap.kernels import low_rank_fused, low_rank_linear

    if backend == "triton pdl" and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "needs sm_90"
    if backend == "triton pdl" and op == "low_rank_linear_group":
        return lambda: low_rank_linear.low_rank_linear_group(*arguments, pdl=True)
    if backend == "triton pdl":
        return lambda: low_rank_linear.low_rank_silu_gated_linear(*arguments, pdl=True)
    if len(arguments) > 4:
        return "no pivots"
    if backend == "triton one launch":
        return lambda: low_rank_fused.low_rank_fused(*arguments)
    m, k, r = *x.shape, arguments[1].shape[0]
    if x.dtype not in (torch.bfloat16, torch.float16) or m > 8 or k % 8 or r % 8:
        return "for 16 bits, at most 8 tokens, K and R multiples of 8"
    return lambda: torch.ops.lorap_cuda.low_rank_linear(*arguments)


def backends_of(ops: Any, op: str, *, cuda: bool) -> list[str]:
    """Those that have this op. The CUDA kernel is kept apart: its barrier could hang, and take along what comes after it."""
    if cuda:
        return ["cuda"] if op == "low_rank_linear" else []
    found = ["triton"] if op in ops.implementations.IMPLEMENTATIONS["triton"] else []
    if op in ("low_rank_linear_group", "low_rank_silu_gated_linear"):
        found.append("triton pdl")
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


def one_call_rows(device: torch.device, _scale: int) -> Iterator[Item]:
    """The CUDA kernel on a few small shapes; what compute-sanitizer watches."""
    load_lorap()
    for m, k, r, n in ((1, 4096, 512, 1000), (5, 576, 176, 100), (8, 1024, 64, 333)):
        what: Row = {"kind": f"M={m} K={k} R={r} N={n}"}
        if device.type != "cuda":
            yield what | {"not_run": "no GPU"}, None
            continue
        x, right, left = (gpu_timings.random(*size, device=device) for size in ((m, k), (r, k), (n, r)))
        y = torch.ops.lorap_cuda.low_rank_linear(x, right, left, None)
        yield what, lambda y=y: {"ok": bool(torch.isfinite(y).all())}


def sanitizer_rows(device: torch.device, _scale: int) -> Iterator[Item]:
    """compute-sanitizer on the CUDA kernel: accesses out of bounds, and races in shared memory."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool in ("memcheck", "racecheck"):
        what = {"tool": tool}
        if found is None or device.type != "cuda":
            yield what | {"not_run": "no GPU" if device.type != "cuda" else "compute-sanitizer is not installed"}, None
            continue
        program = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "one-call", "--work", os.devnull]
        command = [found, "--tool", tool, "--error-exitcode", "9", *program]

        def watch(command: list[str] = command) -> Row:
            done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
            lines = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
            clean = done.returncode == 0 and bool(lines) and bool(re.search(r" 0 (errors|hazards)", lines[-1]))
            return {"ok": clean, "summary": lines[-1] if lines else (done.stdout + done.stderr)[-300:]}

        yield what, watch
