"""The timings of gpu_check.sh: one low-rank layer in every way we have, on weights that come from memory, in CUDA graphs.

Each time stands beside the error against float64, and beside a prediction (kernels/triton/cost.py): arithmetic, made before
anything was measured.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = (1, 4, 8, 16, 32, 2048)
SHAPES = {  # (in_features K, rank R, out_features N)
    "LLaMA-7B r512": (4096, 512, 4096),
    "LLaMA-7B r1024": (4096, 1024, 4096),
    "LLaMA-7B r1472": (4096, 1472, 4096),
    "LLaMA-7B r1632": (4096, 1632, 4096),
    "LLaMA-7B up": (4096, 1472, 11008),
    "LLaMA-7B down": (11008, 1472, 4096),
    "LLaMA-3-8B k": (4096, 512, 1024),
    "Qwen3-8B up": (4096, 1632, 12288),
}
TRITON_TOKENS, CUDA_TOKENS = 64, 16
CHECKED = {  # way -> the op and backend whose self-check it must have passed
    "triton": ("low_rank_linear", "triton"),
    "triton, no pdl": ("low_rank_linear_group", "triton, no pdl"),
    "triton, pivoted": ("low_rank_linear", "triton"),
    "cuda": ("low_rank_linear", "cuda"),
    "cuda, pivoted": ("low_rank_linear", "cuda"),
}
PIVOTED = ", pivoted"
KINDS = ("dense", "two GEMMs", "two GEMMs, pivoted", "triton", "triton, no pdl", "triton, pivoted")
GROUP = 64  # weights of few bits that share a scale
TRELLIS_GROUP = 256  # and those on a trellis
Row = dict[str, Any]
Item = tuple[Row, Callable[[], Row] | None]  # what a row is about, and how to find the rest of it
verdicts: dict[tuple[str, str], bool] | None = None  # (op, backend) -> passed; None before the self-check


def distrust(op: str, backend: str) -> str | None:
    """Why a backend should not run an op here: it failed its self-check, or was not reached by it."""
    if verdicts is None or verdicts.get((op, backend)):
        return None
    return "did not pass its self-check" if (op, backend) in verdicts else None


def predicted(kind: str, m: int, k: int, r: int, n: int) -> float:
    """Seconds, from bytes in flight, FLOPs and launches alone."""
    from lorap.kernels import cost

    rows = n - r if kind.endswith(PIVOTED) else n
    if kind == "dense":
        return cost.dense_seconds(m, k, [n])
    if kind.startswith("two GEMMs"):
        return cost.two_gemms_seconds(m, k, [r], [rows]) + (cost.order_seconds(m, n) if rows < n else 0.0)
    if kind.startswith("cuda"):
        return cost.one_launch_seconds(m, k, [r], [rows])
    return cost.pair_seconds(m, k, [r], [rows], pdl="no pdl" not in kind)


def seconds_of(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> float:
    """Median time of ``call``, over all arguments in one CUDA graph; without a GPU, of ten plain calls."""
    if not arguments[0][0].is_cuda:
        return statistics.median(_plain(call, arguments[i % len(arguments)]) for i in range(10))
    repeats = math.ceil(100 / len(arguments))
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


def quantized(
    rows: int, columns: int, bits: int, *, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Packed numbers of any value, and scales that keep the size of an input."""
    from lorap.kernels import packing

    words = torch.empty(rows, packing.words(columns, bits), dtype=torch.int32, device=device).random_(
        -(2**31), 2**31 - 1
    )
    scales = torch.rand(rows, -(-columns // GROUP), device=device).add(0.5) * columns**-0.5 / 2 ** (bits - 1)
    return words, scales.to(dtype)


def on_trellis(
    rows: int, columns: int, bits: int, *, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Codes of any value, and scales that keep the size of an input."""
    from lorap.kernels import trellis

    shape = trellis.packed_shape(rows, columns, bits)
    words = torch.empty(shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
    scales = torch.rand(rows, -(-columns // TRELLIS_GROUP), device=device).add(0.5) * columns**-0.5
    return words, scales.to(dtype)


def two_gemms(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    return F.linear(F.linear(x, right), left)


def layer_rows(device: torch.device, scale: int, *, kinds: Sequence[str], compile_only: bool = False) -> Iterator[Item]:
    """Every shape, number of tokens and way, M = 1 first. ``scale`` divides the sizes in a dry run."""
    for m in TOKENS if scale == 1 else TOKENS[:2]:
        for name, sizes in SHAPES.items():
            k, r, n = (size // scale for size in sizes)
            weights = {False: _Weights(device, k, r, n), True: _Weights(device, k, r, n - r)}
            x = random(m, k, device=device)
            for kind in kinds:
                what = {"shape": name, "K": k, "R": r, "N": n, "tokens": m, "kind": kind}
                what["predicted_us"] = 1e6 * predicted(kind, m, k, r, n)
                if reason := why_not(kind, m, k, r, device):
                    yield what | {"not_run": reason}, None
                    continue

                of_kind = weights[kind.endswith(PIVOTED)]

                def measure(kind=kind, weights=of_kind, x=x) -> Row:
                    call, some = the_call(kind), weights.dense() if kind == "dense" else weights.factors()
                    if compile_only:
                        return {"kernels": call(x, *some[0]) is not None}
                    found = {"us": 1e6 * seconds_of(lambda *one: call(x, *one), some)}
                    return found | {"error": _error(call(x, *some[0]), x, some[0])}

                yield what, measure


class _Weights:
    """Copies of the weights of one shape, made when they are first wanted."""

    def __init__(self, device: torch.device, k: int, r: int, n: int) -> None:
        self.shapes, self.device, self.found = ((n, k), (r, k), (n, r)), device, {}

    def dense(self) -> list[tuple[Tensor, ...]]:
        return self._of("dense", self.shapes[:1])

    def factors(self) -> list[tuple[Tensor, ...]]:
        return self._of("factors", self.shapes[1:])

    def _of(self, name: str, shapes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
        if name not in self.found:
            self.found[name] = rotating(lambda: tuple(random(*shape, device=self.device) for shape in shapes))
        return self.found[name]


def _error(y: Tensor, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Relative error of the norm against float64; of a pivoted layer, whose first rows are the pivots, as it is made here."""
    exact = x.double()
    for weight in weights:
        shrunk, exact = exact, exact @ weight.double().T
    if y.shape[-1] != exact.shape[-1]:
        exact = torch.cat((shrunk, exact), dim=-1)
    return float((y.double() - exact).norm() / exact.norm())


def why_not(kind: str, m: int, k: int, r: int, device: torch.device) -> str | None:
    """The reason why a way of ours does not run here; the others always do."""
    if kind not in CHECKED:
        return None
    if device.type != "cuda":
        return "no GPU"
    limit = CUDA_TOKENS if kind.startswith("cuda") else TRITON_TOKENS
    if m > limit:
        return f"for at most {limit} tokens"
    if kind.startswith("cuda") and (k % 8 or r % 8):
        return "K and R must be multiples of 8"
    return distrust(*CHECKED[kind])


def the_call(kind: str) -> Callable[..., Tensor]:
    """The way as a function of x and the weights; the first rows of a pivoted layer are its pivots."""
    if kind == "dense":
        return F.linear
    if kind == "two GEMMs":
        return two_gemms
    if kind == "triton, no pdl":
        return triton_plain
    if kind == "cuda":
        return one_launch
    backend = {"two GEMMs, pivoted": "reference", "cuda, pivoted": "cuda"}.get(kind, "triton")
    from lorap.nn.implementations import implementation

    run, rows = implementation("low_rank_linear", backend), {}

    def call(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
        if not kind.endswith(PIVOTED):
            return run(x, right, left)
        if len(right) not in rows:
            rows[len(right)] = torch.arange(len(right), device=x.device)
        return run(x, right, left, None, rows[len(right)])

    return call


def triton_plain(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    from lorap.kernels.low_rank_linear import low_rank_linear_group

    return low_rank_linear_group(x, [right], [left])


def one_launch(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
    return torch.ops.lorap_cuda.low_rank_linear(x, right, left, None, None)


def merged_rows(device: torch.device, scale: int, *, cuda: bool) -> Iterator[Item]:
    """q, k, v of LLaMA-7B as one op or three, and the dense gate and up with SiLU, for 1, 8, 16 and 32 tokens.

    ``cuda``: only what the CUDA kernels compute of it.
    """
    from lorap.kernels import reference

    gpu, pair = device.type == "cuda", the_call("triton")
    k, width, ranks = 4096 // scale, 5504 // scale, [512 // scale, 512 // scale, 1536 // scale]
    for m in (1, 8, 16, 32):
        x = random(m, k, device=device)
        dense = rotating(lambda: (random(3 * k, k, device=device),))
        factors = rotating(
            lambda: (*(random(r, k, device=device) for r in ranks), *(random(k, r, device=device) for r in ranks))
        )
        gated = rotating(lambda: tuple(random(width, k, device=device) for _ in range(2)))

        def group(x: Tensor, *weights: Tensor) -> Tensor:
            from lorap.kernels.low_rank_linear import low_rank_linear_group

            return low_rank_linear_group(x, list(weights[:3]), list(weights[3:]), pdl=True)

        def separate(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [pair(x, weights[i], weights[3 + i]) for i in range(3)]

        def separate_gemms(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [two_gemms(x, weights[i], weights[3 + i]) for i in range(3)]

        def one_launch_group(x: Tensor, *weights: Tensor) -> Tensor:
            return torch.ops.lorap_cuda.low_rank_linear_group(x, list(weights[:3]), list(weights[3:]), [], [])

        def one_launch_each(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [one_launch(x, weights[i], weights[3 + i]) for i in range(3)]

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
            ("q, k, v", "cuda, separate", one_launch_each, factors, True),
            ("q, k, v", "cuda, merged", one_launch_group, factors, True),
        ):
            if cuda != kind.startswith("cuda"):
                continue
            what = {"layer": layer, "tokens": m, "kind": kind}
            op = "low_rank_linear" + "_group" * kind.endswith("merged")
            reason = f"for at most {CUDA_TOKENS} tokens" if m > CUDA_TOKENS else distrust(op, "cuda")
            reason = "no GPU" if needs_gpu and not gpu else reason if cuda else None
            if reason:
                yield what | {"not_run": reason}, None
                continue

            def measure(call=call, weights=weights, x=x) -> Row:
                return {"us": 1e6 * seconds_of(lambda *some: call(x, *some), weights)}

            yield what, measure


def quantized_rows(device: torch.device, scale: int, *, cuda: bool) -> Iterator[Item]:
    """Dense layers and pairs of factors in 4 and 8 bits, by our kernels and where torch unpacks them.

    ``cuda``: only what the CUDA kernel computes of it, q, k and v in one launch too, beside three calls of Triton's kernels.
    """
    from lorap.kernels import cost
    from lorap.nn.implementations import implementation

    if cuda:
        yield from _one_launch_rows(device, scale)
        return
    k, rank, n = (size // scale for size in (4096, 1024, 4096))
    for m, bits in ((m, bits) for m in (1, 4, 8, 16, 64, 512) for bits in (4, 8)):
        x = random(m, k, device=device)
        shapes = {"quantized_linear": ((n, k),), "quantized_low_rank_linear": ((n, rank), (rank, k))}
        modelled = {
            "quantized_linear": cost.quantized_seconds(m, k, n, bits, GROUP),
            "quantized_low_rank_linear": cost.quantized_pair_seconds(m, k, rank, n, bits, GROUP),
        }
        for op, sizes in shapes.items():
            weights = rotating(
                lambda sizes=sizes, bits=bits: tuple(t for size in sizes for t in quantized(*size, bits, device=device))
            )
            for kind in ("torch", "triton"):
                what = {"op": op, "bits": bits, "tokens": m, "kind": kind}
                if kind == "triton" and m <= cost.FUSED_TOKENS:
                    what["predicted_us"] = 1e6 * modelled[op]
                reason = "no GPU" if device.type != "cuda" else distrust(op, "triton")
                if kind == "triton" and reason:
                    yield what | {"not_run": reason}, None
                    continue
                run = implementation(op, "triton" if kind == "triton" else "reference")

                def measure(run=run, x=x, weights=weights, bits=bits) -> Row:
                    return {"us": 1e6 * seconds_of(lambda *some: run(x, *some, None, bits, GROUP), weights)}

                yield what, measure


def _one_launch_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """Pairs of factors in 4 and 8 bits, single ones and those of LLaMA-7B's q, k and v, by the CUDA kernel and by Triton's."""
    from lorap.kernels import cost
    from lorap.nn.implementations import implementation

    k, op = 4096 // scale, "quantized_low_rank_linear"
    layers = {"r 1024": (1024,), "q, k, v": (512, 512, 1536)}
    for (name, ranks), bits, m in itertools.product(layers.items(), (4, 8), (1, 4, 8)):
        ranks = tuple(rank // scale for rank in ranks)
        count = len(ranks)
        x = random(m, k, device=device)
        weights = rotating(
            lambda ranks=ranks, bits=bits: tuple(
                t for r in ranks for size in ((k, r), (r, k)) for t in quantized(*size, bits, device=device)
            )
        )
        each = implementation(op, "triton")

        def one_launch(x: Tensor, *some: Tensor, bits: int = bits, count: int = count) -> Tensor:
            lists = [list(some[i::4]) for i in range(4)]
            group = torch.ops.lorap_cuda.quantized_low_rank_linear_group
            return group(x, *lists, [], [bits] * count, [GROUP] * count, [])

        def triton(x: Tensor, *some: Tensor, bits: int = bits, count: int = count, each: Any = each) -> list[Tensor]:
            return [each(x, *some[4 * i : 4 * i + 4], None, bits, GROUP) for i in range(count)]

        alike = (bits,) * count, (GROUP,) * count
        modelled = {
            "cuda": cost.quantized_one_launch_seconds(m, k, ranks, (k,) * count, *alike),
            "triton": sum(cost.quantized_pair_seconds(m, k, rank, k, bits, GROUP) for rank in ranks),
        }
        for kind, call in (("triton", triton), ("cuda", one_launch)):
            what = {
                "op": op,
                "layers": name,
                "bits": bits,
                "tokens": m,
                "kind": kind,
                "predicted_us": 1e6 * modelled[kind],
            }
            if reason := "no GPU" if device.type != "cuda" else distrust(op, kind):
                yield what | {"not_run": reason}, None
                continue

            def measure(call=call, x=x, weights=weights) -> Row:
                return {"us": 1e6 * seconds_of(lambda *some: call(x, *some), weights)}

            yield what, measure


def trellis_rows(device: torch.device, scale: int) -> Iterator[Item]:
    """A dense layer on a trellis, by our kernel and where torch writes the matrix; beside the same layer in 16 bits."""
    from lorap.kernels import cost
    from lorap.nn.implementations import implementation

    k, n = 4096 // scale, 4096 // scale
    for m, bits in ((m, bits) for m in (1, 8, 32, 64, 512) for bits in (2, 3, 4)):
        x = random(m, k, device=device)
        dense = rotating(lambda: (random(n, k, device=device),))
        codes = rotating(lambda bits=bits: on_trellis(n, k, bits, device=device))
        for kind in ("dense", "torch", "triton"):
            what = {"op": "trellis_linear", "bits": bits, "tokens": m, "kind": kind}
            if kind == "triton" and m <= cost.FUSED_TOKENS:
                what["predicted_us"] = 1e6 * cost.trellis_seconds(m, k, n, bits, TRELLIS_GROUP)
            reason = "no GPU" if device.type != "cuda" else distrust("trellis_linear", "triton")
            if kind == "triton" and reason:
                yield what | {"not_run": reason}, None
                continue

            def measure(kind=kind, x=x, bits=bits, weights=dense if kind == "dense" else codes) -> Row:
                if kind == "dense":
                    return {"us": 1e6 * seconds_of(lambda weight: F.linear(x, weight), weights)}
                run = implementation("trellis_linear", "triton" if kind == "triton" else "reference")
                return {"us": 1e6 * seconds_of(lambda *some: run(x, *some, None, bits, TRELLIS_GROUP), weights)}

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
