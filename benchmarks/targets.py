"""What the CPU kernels are meant to reach, measured side by side: make targets.

Each round runs every contender six times, one contender after the other, so that a machine that slows down slows all of them; a
figure is the median over rounds of the ratio within a round. Weights rotate through several copies and come from memory. (Six
times, because after another contender has swept the caches, the first call waits 0.1 ms for the interpreter's own code.)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import bench_decoder_layer
import common
import torch
import torch.nn.functional as F
from random_models import decoder_layers, optimized, random_model

import lorap
from lorap.nn import native, ops
from lorap.reports.run import format_table

Call = Callable[[], object]
K = N = 4096
RANK = 1024
READ_BYTES = 2**28
REPEATS = 6


def rounds(calls: dict[str, Call], *, count: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(count + 1):
        for name, call in calls.items():
            repeats = 1 if name == "read" else REPEATS  # one read is long enough
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if turn:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(seconds: dict[str, list[float]], other: str, ours: str = "ours") -> float:
    """How many times as long ``other`` takes, median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[other], seconds[ours], strict=True))


def rotating(*shapes: tuple[int, int], dtype: torch.dtype) -> itertools.cycle:
    nbytes = sum(rows * columns for rows, columns in shapes) * dtype.itemsize
    copies = common.copies_needed(nbytes)
    return itertools.cycle([[common.random(*shape, dtype=dtype) for shape in shapes] for _ in range(copies)])


def read_from_memory() -> Call:
    """One pass over a buffer larger than any cache, by torch's sum on all threads."""
    buffer = torch.ones(READ_BYTES // 4)
    return lambda: buffer.sum()


def projection(tokens: int, count: int) -> dict[str, float]:
    dtype = torch.bfloat16
    pairs, dense16 = rotating((RANK, K), (N, RANK), dtype=dtype), rotating((N, K), dtype=dtype)
    dense32 = rotating((N, K), dtype=torch.float32)
    x = common.random(tokens, K, dtype=dtype)
    x32 = x.float()
    calls: dict[str, Call] = {
        "float32 dense": lambda: F.linear(x32, *next(dense32)),
        "bfloat16 dense": lambda: F.linear(x, *next(dense16)),
        "two matmuls": lambda: F.linear(F.linear(x, (pair := next(pairs))[0]), pair[1]),
        "read": read_from_memory(),
        "ours": lambda: ops.low_rank_linear(x, *next(pairs)),
    }
    seconds = rounds(calls, count=count)
    found = {name: ratio(seconds, name) for name in ("float32 dense", "bfloat16 dense", "two matmuls")}
    nbytes = RANK * (K + N) * dtype.itemsize
    return found | {"share of reading": ratio(seconds, "read") * nbytes / READ_BYTES}


def group(count: int) -> float:
    """Time of q, k and v of LLaMA-7B at the paper's 50 % over the time of reading their bytes."""
    ranks, dtype = (512, 512, 1536), torch.bfloat16
    weights = rotating(*((rank, K) for rank in ranks), *((N, rank) for rank in ranks), dtype=dtype)
    x = common.random(1, K, dtype=dtype)

    def ours() -> object:
        factors = next(weights)
        return ops.low_rank_linear_group(x, factors[:3], factors[3:])

    seconds = rounds({"read": read_from_memory(), "ours": ours}, count=count)
    return 1 / (ratio(seconds, "read") * sum(ranks) * (K + N) * dtype.itemsize / READ_BYTES)


@torch.inference_mode()
def layer(count: int) -> dict[str, float]:
    """One LLaMA-7B decoder layer at sparsity 0.5, decoding one token: dense in torch and in our kernels, over ours."""
    hidden = common.random(1, 1, K, dtype=torch.bfloat16)
    calls: dict[str, Call] = {}
    for name, sparsity, ours in (("torch dense", 0.0, False), ("our dense", 0.0, True), ("ours", 0.5, True)):
        model = random_model("llama-7b", sparsity, torch.bfloat16, layers=1)
        one = decoder_layers(optimized(model) if ours else model)[0]
        cache = bench_decoder_layer.FixedCache(model.config, 1, 1)
        rotary = model.model.rotary_emb(hidden, torch.tensor([[bench_decoder_layer.CACHE_LENGTH]]))
        calls[name] = lambda one=one, cache=cache, rotary=rotary: one(
            hidden, position_embeddings=rotary, past_key_values=cache
        )
    seconds = rounds(calls, count=count)
    return {name: ratio(seconds, name) for name in ("torch dense", "our dense")}


def prefill(count: int) -> float:
    """float32, 512 tokens: LowRankLinear over two matmuls."""
    right, left = common.random(RANK, K, dtype=torch.float32), common.random(N, RANK, dtype=torch.float32)
    module, x = lorap.LowRankLinear.from_factors(left, right), common.random(512, K, dtype=torch.float32)
    calls: dict[str, Call] = {"two": lambda: F.linear(F.linear(x, right), left), "ours": lambda: module(x)}
    return 1 / ratio(rounds(calls, count=count), "two")


def overhead(count: int) -> tuple[float, float]:
    """Microseconds that a call takes longer than two F.linear, and a module longer than two nn.Linear, at 8 features."""
    right, left = common.random(4, 8, dtype=torch.float32), common.random(8, 4, dtype=torch.float32)
    module, x = lorap.LowRankLinear.from_factors(left, right), common.random(1, 8, dtype=torch.float32)
    calls: dict[str, Call] = {
        "two F.linear": lambda: F.linear(F.linear(x, right), left),
        "op": lambda: ops.low_rank_linear(x, right, left),
        "two nn.Linear": lambda: module.left(module.right(x)),
        "module": lambda: module(x),
    }

    def thousand(call: Call) -> Call:
        return lambda: [call() for _ in range(1000)]

    seconds = rounds({name: thousand(call) for name, call in calls.items()}, count=count)
    us = {name: 1e3 * min(values) for name, values in seconds.items()}
    return us["op"] - us["two F.linear"], us["module"] - us["two nn.Linear"]


@torch.no_grad()
def main() -> None:
    print(f"measuring {common.measured()}")
    rows = []
    for tokens in (1, 4, 16):
        found = projection(tokens, count=15)
        wanted = ("3", "10") if tokens == 1 else ("1", "1")
        title = f"4096 x 4096, rank 1024, bfloat16, M = {tokens}"
        for name, least in zip(("float32 dense", "bfloat16 dense"), wanted, strict=True):
            rows.append([f"{title}: faster than torch {name}", f"{found[name]:.2f} x", f">= {least} x"])
        rows.append([f"{title}: faster than two torch matmuls", f"{found['two matmuls']:.2f} x", ""])
        if tokens == 1:
            rows.append([f"{title}: share of read bandwidth", f"{found['share of reading']:.0%}", ">= 85 %"])
    rows.append(["LLaMA-7B q, k, v at 50 %, grouped: time over reading the bytes", f"{group(15):.2f}", "<= 1.15"])
    found = layer(15)
    title = "LLaMA-7B decoder layer at 0.5, decode 1, bfloat16: faster than dense"
    rows.append([f"{title} in our kernels", f"{found['our dense']:.2f} x", ">= 1.8 x"])
    rows.append([f"{title} in torch", f"{found['torch dense']:.2f} x", ">= 4 x"])
    rows.append(["float32, 512 tokens: time over two torch matmuls", f"{prefill(7):.2f}", "<= 1.05"])
    op, module = overhead(20)
    rows.append(["call at 8 features: over two F.linear", f"{op:+.1f} us", "<= 2 us"])
    rows.append(["module at 8 features: over two nn.Linear", f"{module:+.1f} us", ""])
    print(format_table(["", "measured", "wanted"], rows))
    print(
        f"\n{torch.get_num_threads()} threads, {native.cpu_isa(torch.bfloat16)} for bfloat16, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
