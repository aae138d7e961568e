"""What all benchmarks share: the device, weights that come from memory, and bytes and FLOPs beside each time.

In a model every weight is read once per token, so it never sits in a cache. Each call here therefore takes the next of
several copies of its weights, as many as together exceed the last-level cache three times, or one and a half times where that of
a CPU is known and large.

On a GPU the calls over all copies are captured into one CUDA graph, because a single launch from Python takes longer than a
small kernel: one round replays the graph and waits, and ``extra_info["calls"]`` says how many calls that was
(``benchmarks/table.py`` divides by it). On a CPU one round is one call.

With ``--benchmark-disable`` every size is divided by 16 and every function called once, as a test.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import lorap
from lorap.errors import BackendError
from lorap.nn import dispatch, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CACHE_BYTES = 32 * 2**20  # last-level cache of a server CPU, at least; an H100's L2 is 50 MB, read below
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as 491520K
SECONDS = 0.4  # of measuring per benchmark; at least 5 rounds, fewer where one takes seconds
GRAPH_CALLS = 20  # at least so many calls in one graph, so that waiting for its end is a small part of the time
SMALLER = 16  # by how much sizes shrink with --benchmark-disable


def measured() -> str:
    """What stands behind the name lorap in the rows, for people who read them later.

    Raises:
        BackendError: lorap's kernels are missing, so that torch would be measured under its name.
    """
    where, forced = f"lorap {lorap.__version__} in {Path(lorap.__file__).parent}", dispatch.current()
    if forced == "reference":
        return f"{where}: torch alone, as LORAP_BACKEND=reference asks"
    if DEVICE.type == "cpu" and native.MISSING:
        raise BackendError(f"there is nothing to measure, the C++ kernels of {where} are missing: {native.MISSING}")
    used = {"auto": "as lorap env says"}.get(forced, f"LORAP_BACKEND={forced}")
    instructions = ", ".join(f"{native.cpu_isa(dtype)} for {name}" for name, dtype in DTYPES.items())
    return f"{where}, {used}, on {DEVICE.type}: C++ kernels {native.MISSING or instructions}"


def size(benchmark: Any, full: int, *, multiple: int = 8) -> int:
    """``full``; with --benchmark-disable a 16th of it, rounded up to a multiple."""
    return math.ceil(full / SMALLER / multiple) * multiple if benchmark.disabled else full


def tokens_of(benchmark: Any, tokens: int) -> int:
    """``tokens``; with --benchmark-disable at most 20, which is past the limit of the decode kernels."""
    return min(tokens, 20) if benchmark.disabled else tokens


def copies(benchmark: Any, make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """``make()`` as often as the results together exceed the last-level cache three times; once when disabled."""
    first = make()
    if benchmark.disabled:
        return [first]
    return [first, *(make() for _ in range(1, copies_needed(sum(t.nbytes for t in tensors(first)))))]


def copies_needed(nbytes: int) -> int:
    """How many tensors of ``nbytes`` exceed the last-level cache three times."""
    return math.ceil(3 * cache_bytes() / nbytes)


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache; half of a CPU's large one: past 480 MiB of it, 800 MB were read as slowly as 1600."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size
    large = int(CACHE_SIZE.read_text().strip().removesuffix("K")) * 2**10 if CACHE_SIZE.exists() else 0
    return max(CACHE_BYTES, large // 2)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Uniform, of variance 1 / columns, so that a matmul keeps the size of its input."""
    limit = (3 / shape[-1]) ** 0.5
    return torch.empty(*shape, dtype=dtype, device=DEVICE).uniform_(-limit, limit)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def measure(
    benchmark: Any,
    call: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    group: str,
    nbytes: int,
    flops: int = 0,
    graph: bool = True,
    **extra: Any,
) -> Any:
    """Time ``call(*arguments[i])``, i running through the copies; returns the first result.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: what is measured.
        arguments: one tuple per copy of the weights.
        group: benchmarks of one group are compared with each other.
        nbytes: that one call has to move, for GB/s.
        flops: of one call.
        graph: False where the call cannot be captured into a CUDA graph.
        extra: more values for ``extra_info``.
    """
    benchmark.group = group
    if benchmark.disabled:
        return benchmark.pedantic(call, args=arguments[0])
    start = time.perf_counter()
    result = call(*arguments[0])  # warm-up: compilation, self-checks, caches of sizes
    synchronize()
    seconds = time.perf_counter() - start
    calls = 1
    if DEVICE.type == "cuda" and graph:
        repeats = math.ceil(GRAPH_CALLS / len(arguments))
        run, calls = capture(call, [*arguments] * repeats), repeats * len(arguments)
    else:
        turn = itertools.cycle(arguments)

        def run() -> None:
            call(*next(turn))
            synchronize()

    if seconds < 1:  # the first call tells nothing about fast ones
        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    least = 5 if seconds < 1 else 2
    benchmark.pedantic(run, rounds=max(least, min(1000, int(SECONDS / seconds))))
    # What turns a time into GB/s, FLOP/s and a share of this machine's bandwidth.
    found = {
        "bytes": nbytes,
        "flops": flops,
        "calls": calls,
        "allocated_bytes": peak_allocated(lambda: call(*arguments[0])),
    }
    machine = {"bandwidth": memory_bandwidth(), "threads": torch.get_num_threads()}
    benchmark.extra_info |= found | machine | extra
    return result


def peak_allocated(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``call`` holds at once, beyond its arguments; buffers inside C++ kernels do not count."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def capture(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """One CUDA graph of ``call`` over all arguments; the result replays it and waits for its end."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in arguments[:3]:
            call(*one)
    stream.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for one in arguments:
            call(*one)

    def replay() -> None:
        recorded.replay()
        torch.cuda.synchronize()

    return replay


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@functools.cache
def memory_bandwidth() -> float:
    """Bytes per second of this machine's memory: the better of a copy (read and write) and a sum (read), median of nine."""
    source = torch.ones(2**26 if DEVICE.type == "cpu" else 2**28, device=DEVICE)
    target = torch.empty_like(source)
    found = []
    for moved, call in ((2 * source.nbytes, lambda: target.copy_(source)), (source.nbytes, source.sum)):
        rates = []
        for _ in range(9):
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            rates.append(moved / (time.perf_counter() - start))
        found.append(statistics.median(rates))
    return max(found)


def skip_if_slow(benchmark: Any, dtype: torch.dtype, flops: int) -> None:
    """Leave out what takes many seconds a call: over 40 GFLOP on a CPU, in bfloat16 over 8 where it is emulated."""
    if benchmark.disabled or DEVICE.type == "cuda":
        return
    emulated = dtype == torch.bfloat16 and not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    if flops > (8e9 if emulated else 40e9):
        pytest.skip(f"{flops / 1e9:.0f} GFLOP a call: for a GPU")


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Both finite, and equal up to what their dtype resolves."""
    assert torch.isfinite(result).all()
    difference = (result.double() - expected.double()).norm() / expected.double().norm()
    limit = 1e-4 if result.dtype == torch.float32 else 3e-2
    assert difference < limit, f"relative difference {float(difference):.3g}"
