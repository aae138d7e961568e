"""The timings of gpu_check.sh: one low-rank layer in every way we have, on weights that come from memory, in CUDA graphs.

Each time stands beside a prediction: the larger of bytes over an H100's 3.0 TB/s and FLOPs over its 798 TFLOP/s in bfloat16,
plus 1.3 us for each kernel of a graph. The predictions are arithmetic, made before anything was measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BANDWIDTH, FLOPS, LAUNCH = 3.0e12, 798e12, 1.3e-6
TOKENS = (1, 8, 32, 64, 2048)
SHAPES = {  # (in_features K, rank R, out_features N)
    "square, mean rank": (4096, 1024, 4096),
    "q, k": (4096, 512, 4096),
    "v, o": (4096, 1536, 4096),
    "gate, up": (4096, 1492, 11008),
    "down": (11008, 1492, 4096),
}
LAUNCHES = {"dense": 1, "two GEMMs": 2, "triton": 2, "triton pdl": 2, "cuda": 1}
TRITON_TOKENS, CUDA_TOKENS = 64, 8
CHECKED = {  # way -> the op and backend whose self-check it must have passed
    "triton": ("low_rank_linear", "triton"),
    "triton pdl": ("low_rank_linear_group", "triton pdl"),
    "cuda": ("low_rank_linear", "cuda"),
}
Row = dict[str, Any]
Item = tuple[Row, Callable[[], Row] | None]  # what a row is about, and how to find the rest of it
allowed: set[tuple[str, str]] | None = None  # (op, backend) that passed; None before the self-check


def predicted(kind: str, m: int, k: int, r: int, n: int) -> float:
    """Seconds, from bytes, FLOPs and launches alone."""
    launches = LAUNCHES[kind.removeprefix("compiled ")]
    weights = k * n if kind.endswith("dense") else r * (k + n)
    # What one kernel hands to the next is written and read; a single kernel keeps it.
    moved = 2 * (weights + m * (k + n)) + (4 * m * r if launches == 2 else 0)
    return max(moved / BANDWIDTH, 2 * m * weights / FLOPS) + launches * LAUNCH


def seconds_of(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> float:
    """Median time of ``call``, over all arguments in one CUDA graph; without a GPU, of ten plain calls."""
    if not arguments[0][0].is_cuda:
        return statistics.median(_plain(call, arguments[i % len(arguments)]) for i in range(10))
    repeats = math.ceil(20 / len(arguments))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*arguments[0])  # compiles, checks and fills caches, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in [*arguments] * repeats:
            call(*one)
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:]) / (repeats * len(arguments))


def _plain(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def rotating(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Copies that together exceed the last-level cache three times; two where there is no GPU."""
    first = make()
    if not first[0].is_cuda:
        return [first, make()]
    cache = torch.cuda.get_device_properties(first[0].device).L2_cache_size
    needed = math.ceil(3 * cache / sum(tensor.nbytes for tensor in first))
    return [first, *(make() for _ in range(needed - 1))]


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal, scaled so that a matmul keeps the size of its input."""
    return torch.randn(*shape, device=device, dtype=dtype) * shape[-1] ** -0.5


def two_gemms(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    return F.linear(F.linear(x, right), left)


def layer_rows(device: torch.device, scale: int, *, kinds: Sequence[str]) -> Iterator[Item]:
    """Every shape, number of tokens and way, M = 1 first. ``scale`` divides the sizes in a dry run."""
    for m in TOKENS if scale == 1 else TOKENS[:2]:
        for name, sizes in SHAPES.items():
            k, r, n = (size // scale for size in sizes)
            x = random(m, k, device=device)
            dense = rotating(lambda n=n, k=k: (random(n, k, device=device),))
            pairs = rotating(lambda r=r, k=k, n=n: (random(r, k, device=device), random(n, r, device=device)))
            for kind in kinds:
                what = {"shape": name, "K": k, "R": r, "N": n, "tokens": m, "kind": kind}
                what["predicted_us"] = 1e6 * predicted(kind, m, k, r, n)
                if reason := why_not(kind, m, k, r, device):
                    yield what | {"not_run": reason}, None
                    continue
                weights = dense if kind.endswith("dense") else pairs

                def measure(kind=kind, weights=weights, x=x) -> Row:
                    call = the_call(kind)
                    return {"us": 1e6 * seconds_of(lambda *factors: call(x, *factors), weights)}

                yield what, measure


def why_not(kind: str, m: int, k: int, r: int, device: torch.device) -> str | None:
    """The reason why a way of ours does not run here; the others always do."""
    if kind not in CHECKED:
        return None
    if device.type != "cuda":
        return "no GPU"
    if kind == "triton pdl" and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs sm_90"
    limit = CUDA_TOKENS if kind == "cuda" else TRITON_TOKENS
    if m > limit:
        return f"for at most {limit} tokens"
    if kind == "cuda" and (k % 8 or r % 8):
        return "K and R must be multiples of 8"
    return None if allowed is None or CHECKED[kind] in allowed else "did not pass its self-check"


def the_call(kind: str) -> Callable[..., Tensor]:
    """The way as a function of x and the weights; torch's compiler in the mode that tries all its kernels."""
    if kind.startswith("compiled"):
        torch.compiler.reset()  # after eight shapes of one function it would quietly stop compiling
        call = F.linear if kind.endswith("dense") else two_gemms
        return torch.compile(lambda *arguments: call(*arguments), mode="max-autotune-no-cudagraphs", dynamic=False)
    calls = {"dense": F.linear, "two GEMMs": two_gemms, "triton": triton_pair, "triton pdl": triton_pdl}
    return calls.get(kind, one_launch)


def triton_pair(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    from lorap.kernels.low_rank_linear import low_rank_linear_group

    return low_rank_linear_group(x, [right], [left])


def triton_pdl(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    from lorap.kernels.low_rank_linear import low_rank_linear_group

    return low_rank_linear_group(x, [right], [left], pdl=True)


def one_launch(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    return torch.ops.lorap_cuda.low_rank_linear(x, right, left, None)


def merged_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """q, k, v of LLaMA-7B as one op or three, and the dense gate and up with SiLU, for 1, 8 and 32 tokens."""
    from lorap.kernels import reference

    gpu = device.type == "cuda"
    k, width, ranks = 4096 // scale, 5504 // scale, [512 // scale, 512 // scale, 1536 // scale]
    for m in (1, 8, 32):
        x = random(m, k, device=device)
        dense = rotating(lambda: (random(3 * k, k, device=device),))
        factors = rotating(
            lambda: (*(random(r, k, device=device) for r in ranks), *(random(k, r, device=device) for r in ranks))
        )
        gated = rotating(lambda: tuple(random(width, k, device=device) for _ in range(2)))

        def group(x: Tensor, *weights: Tensor) -> Tensor:
            from lorap.kernels.low_rank_linear import low_rank_linear_group

            return low_rank_linear_group(x, list(weights[:3]), list(weights[3:]))

        def separate(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [triton_pair(x, weights[i], weights[3 + i]) for i in range(3)]

        def separate_gemms(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [two_gemms(x, weights[i], weights[3 + i]) for i in range(3)]

        def triton_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
            from lorap.kernels.silu_gated_linear import silu_gated_linear

            return silu_gated_linear(x, gate, up)

        for layer, kind, call, weights, needs_gpu in (
            ("q, k, v", "dense", F.linear, dense, False),
            ("q, k, v", "two GEMMs each", separate_gemms, factors, False),
            ("q, k, v", "triton, separate", separate, factors, True),
            ("q, k, v", "triton, merged", group, factors, True),
            ("gate, up of 5504", "torch", reference.silu_gated_linear, gated, False),
            ("gate, up of 5504", "triton", triton_gated, gated, True),
        ):
            what = {"layer": layer, "tokens": m, "kind": kind}
            if needs_gpu and not gpu:
                yield what | {"not_run": "no GPU"}, None
                continue

            def measure(call=call, weights=weights, x=x) -> Row:
                return {"us": 1e6 * seconds_of(lambda *some: call(x, *some), weights)}

            yield what, measure


def squares_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """The sum of squares of each channel: published way, torch in chunks, Triton. Predicted for Triton: 2.9 TB/s."""
    from lorap.kernels import reference

    def published(x: Tensor) -> Tensor:
        return torch.norm(x.t().type(torch.float32), p=2, dim=1) ** 2

    def triton(x: Tensor) -> tuple[Tensor, Tensor]:
        from lorap.kernels.channel_sq_norm import channel_sq_norm

        return channel_sq_norm(x)

    calls = {"published": published, "torch": reference.channel_sq_norm, "triton": triton}
    for tokens, channels in ((2048, 4096), (16384, 4096), (16384, 11008)):
        inputs = rotating(lambda t=tokens, c=channels: (random(t // scale, c // scale, device=device),))
        for kind, call in calls.items():
            what = {"tokens": tokens // scale, "channels": channels // scale, "kind": kind}
            if kind == "triton" and device.type != "cuda":
                yield what | {"not_run": "no GPU"}, None
                continue

            def measure(call=call, inputs=inputs) -> Row:
                seconds = seconds_of(call, inputs)
                return {"us": 1e6 * seconds, "tb_per_s": inputs[0][0].nbytes / seconds / 1e12}

            yield what, measure


def launch_rows(device: torch.device, _scale: int) -> Iterator[Item]:
    """What a kernel costs in a graph, and what the barrier of the one-launch kernel costs on top. Predicted: 1.3 and 1 to 2."""
    one = [(torch.zeros(1, device=device),)] * 500
    small = [tuple(random(*size, device=device) for size in ((1, 64), (64, 64), (64, 64)))] * 500
    yield {"kind": "smallest kernel of torch"}, lambda: {"us": 1e6 * seconds_of(lambda x: x.add_(1), one)}
    what = {"kind": "one-launch kernel, 64x64 rank 64"}
    reason = why_not("cuda", 1, 64, 64, device)
    yield what | ({"not_run": reason} if reason else {}), lambda: {"us": 1e6 * seconds_of(one_launch, small)}
    for kind in ("two GEMMs", "triton", "cuda"):
        what = {"kind": f"{kind}, called from Python, 64x64 rank 64"}
        reason = why_not(kind, 1, 64, 64, device)
        find = lambda kind=kind: {"us": 1e6 * launch_seconds(the_call(kind), small[0])}  # noqa: E731
        yield what | ({"not_run": reason} if reason else {}), find


def launch_seconds(call: Callable[..., Any], arguments: tuple[Any, ...], calls: int = 200) -> float:
    """Time until a call returns, its kernels queued and not waited for."""
    call(*arguments)
    if arguments[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(*arguments)
    return (time.perf_counter() - start) / calls
