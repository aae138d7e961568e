"""A GPU that is not there: Triton's own compiler makes every kernel that gpu_check.sh launches, for sm_90; nothing is launched.

    python benchmarks/fake_gpu.py [STEP ...]      compilations, seconds and shared memory of each step, one JSON line each

A kernel that does not compile, or wants more shared memory than a block may have, ends up in "failed". The tensors are on the
meta device and call themselves CUDA tensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gpu_timings
import gpu_tune
import gpu_values
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

META = torch.device("meta")
CORES = 16  # of the machine that is meant
STEPS = ("self-check", "values", "timings", "merged", "sweep")


@dataclass
class Seen:
    """What the driver was given: names of the kernels that were compiled, and the most shared memory of one."""

    kernels: list[str] = field(default_factory=list)
    shared: int = 0


class _Driver:
    """As much of a driver as Triton asks for between a call and its launch."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.utils = seen, self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, name: str, _binary: bytes, shared: int, _device: int) -> tuple[int, int, int, int, int]:
        self.seen.kernels.append(name)
        self.seen.shared = max(self.seen.shared, shared)
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def fake_gpu() -> Iterator[Seen]:
    """Inside, launches are compiled for an H200 and not run; tensors of the meta device pass for tensors on it."""
    seen, before = Seen(), (vars(Tensor).get("is_cuda"), torch.cuda.device_of, torch.cuda.is_current_stream_capturing)
    Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    torch.cuda.device_of = lambda _tensor: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    triton.runtime.driver.set_active(_Driver(seen))
    try:
        yield seen
    finally:
        triton.runtime.driver.set_active(None)  # the next who asks finds the real one, if there is one
        del Tensor.is_cuda
        if before[0] is not None:
            Tensor.is_cuda = before[0]
        torch.cuda.device_of, torch.cuda.is_current_stream_capturing = before[1:]


def calls(step: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a step of gpu_check.sh runs of Triton, with a name."""
    from lorap.nn import implementations as found

    if step == "self-check":
        for op, dtype in ((op, dtype) for op in found.IMPLEMENTATIONS["triton"] for dtype in gpu_values.DTYPES):
            for tokens, k, pivoted in found.examples_of(op):
                arguments = found.example(op, META, dtype, tokens, k, pivoted)
                yield f"{op} {dtype} {tokens}", lambda a=arguments, op=op: found.implementation(op, "triton")(*a)
    elif step == "values":
        ops = gpu_values.load_lorap()
        for dtype in gpu_values.DTYPES:
            for op, about, arguments in gpu_values.cases(META, dtype, 1):
                for backend in gpu_values.backends_of(ops, op, cuda=False):
                    call = gpu_values.runner(ops, op, backend, arguments)
                    if not isinstance(call, str):
                        yield f"{backend} {op} {dtype} {about}", call
    elif step == "timings":
        for name, sizes in gpu_timings.SHAPES.items():
            for m, kind in ((m, kind) for m in gpu_timings.TOKENS for kind in gpu_timings.KINDS if "triton" in kind):
                if m <= gpu_timings.TRITON_TOKENS:
                    k, r, n = sizes
                    rows = n - r if kind.endswith(gpu_timings.PIVOTED) else n
                    tensors = [gpu_timings.random(*shape, device=META) for shape in ((m, k), (r, k), (rows, r))]
                    yield f"{kind} {name} M={m}", lambda kind=kind, t=tensors: gpu_timings.the_call(kind)(*t)
    elif step == "merged":
        for m in (1, 8, 16, 32):
            x, gate = (gpu_timings.random(*shape, device=META) for shape in ((m, 4096), (5504, 4096)))
            right = [gpu_timings.random(r, 4096, device=META) for r in (512, 512, 1536)]
            left = [gpu_timings.random(4096, r, device=META) for r in (512, 512, 1536)]
            group = found.implementation("low_rank_linear_group", "triton")
            yield f"q, k, v M={m}", lambda x=x, r=right, s=left, run=group: run(x, r, s)
            yield f"gated M={m}", lambda x=x, g=gate: found.implementation("silu_gated_linear", "triton")(x, g, g)
    else:
        from lorap.kernels import low_rank_linear

        for m, (shape, (k, ranks, rows)) in ((m, one) for m in gpu_tune.TOKENS for one in gpu_tune.SHAPES.items()):
            tensors = [gpu_timings.random(*size, device=META) for size in [(rank, k) for rank in ranks]]
            tensors += [gpu_timings.random(n, rank, device=META) for n, rank in zip(rows, ranks, strict=True)]
            for number, (shrink, expand) in enumerate(gpu_tune.candidates(m, k, ranks, rows, pdl=True)):
                call = gpu_tune.with_settings(low_rank_linear, shrink, expand, len(ranks))
                x = gpu_timings.random(m, k, device=META)
                yield f"{shape} M={m} {number}", lambda call=call, x=x, t=tensors: call(x, *t)


def compile_step(step: str) -> dict[str, Any]:
    """Compile everything of one step: how many kernels, how long, the most shared memory, and what failed."""
    start, failed = time.perf_counter(), []
    with fake_gpu() as seen:
        for name, call in calls(step):
            try:
                call()
            except Exception as failure:
                failed.append(f"{name}: {type(failure).__name__}: {str(failure)[:200]}")
    seconds = time.perf_counter() - start
    return {
        "step": step,
        "kernels": len(seen.kernels),
        "seconds": round(seconds, 1),
        "shared": seen.shared,
        "failed": failed,
    }


def main() -> None:
    for step in sys.argv[1:] or STEPS:
        print(json.dumps(compile_step(step)), flush=True)


if __name__ == "__main__":
    main()
