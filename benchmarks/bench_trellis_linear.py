"""Weights of 2 to 6 bits on a trellis beside weights of 4 bits and of bfloat16, by the C++ kernels, in turns:

    python benchmarks/bench_trellis_linear.py

Sizes of LLaMA-7B with one thread, times in processor time. Ratios are medians over the rounds, so that they stand while other
programs run. The search for codes is measured beside its plain torch twin. As a test of itself:
pytest benchmarks/bench_trellis_linear.py --benchmark-disable
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import common
import pytest
import torch
from torch import Tensor

from lorap.kernels import packing, reference, trellis
from lorap.nn import implementations, native, ops
from lorap.reports.run import format_table

GROUP = 64
SHAPES = ((4096, 4096), (4096, 11008))  # (N, K)
Call = Callable[[], Tensor]


def on_trellis(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(-(2**31), 2**31 - 1, trellis.packed_shape(rows, columns, bits), dtype=torch.int32)
    return words, common.random(rows, -(-columns // GROUP), dtype=torch.bfloat16)


def in_4_bits(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(-(2**31), 2**31 - 1, (rows, packing.words(columns, 4)), dtype=torch.int32)
    return words, common.random(rows, -(-columns // GROUP), dtype=torch.bfloat16).div(4)


def rotating(make: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """As many copies as do not fit into a cache, one after the other."""
    first = make()
    more = [make() for _ in range(1, common.copies_needed(sum(tensor.nbytes for tensor in first)))]
    return itertools.cycle([first, *more])


def contenders(rows: int, columns: int, tokens: int) -> dict[str, Call]:
    x = common.random(tokens, columns, dtype=torch.bfloat16)
    run = {op: implementations.implementation(op, "cpu") for op in ("linear", "quantized_linear", "trellis_linear")}
    dense = rotating(lambda: (common.random(rows, columns, dtype=torch.bfloat16),))
    four = rotating(lambda: in_4_bits(rows, columns))
    calls: dict[str, Call] = {
        "bfloat16": lambda: run["linear"](x, *next(dense)),
        "int4": lambda: run["quantized_linear"](x, *next(four), None, 4, GROUP),
    }
    for bits in trellis.BITS:
        weights = rotating(lambda bits=bits: on_trellis(rows, columns, bits))
        calls[f"tcq{bits}"] = lambda weights=weights, bits=bits: run["trellis_linear"](
            x, *next(weights), None, bits, GROUP
        )
    return calls


def rounds(calls: dict[str, Call], count: int) -> dict[str, list[float]]:
    """Seconds of this process for each call of each contender, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(count + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[name], strict=True))


def search_row(bits: int, count: int) -> list[str]:
    wanted = torch.randn(640, 8)
    find = {name: implementations.implementation("trellis_search", name) for name in ("cpu", "reference")}
    calls = {name: lambda run=run: run(wanted, torch.ones_like(wanted), bits) for name, run in find.items()}
    seconds = rounds(calls, count)
    each = 1e6 * statistics.median(seconds["cpu"]) / wanted.numel()
    return [f"{bits} bits", f"{each:.2f} us", f"{ratio(seconds, 'reference', 'cpu'):.0f} x"]


@pytest.mark.parametrize("tokens", [1, 8, 512], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("bits", trellis.BITS)
@torch.inference_mode()
def bench_trellis_linear(benchmark, bits, tokens):
    rows, columns = (common.size(benchmark, size) for size in SHAPES[0])
    tokens = common.tokens_of(benchmark, tokens)
    x = common.random(tokens, columns, dtype=torch.bfloat16)
    arguments = common.copies(benchmark, lambda: on_trellis(rows, columns, bits))
    y = common.measure(
        benchmark,
        lambda *weights: ops.trellis_linear(x, *weights, None, bits, GROUP),
        arguments,
        group=f"{rows}x{columns}, {bits} bits, {tokens} tokens",
        nbytes=sum(tensor.nbytes for tensor in arguments[0]) + x.nbytes + 2 * tokens * rows,
        flops=2 * tokens * rows * columns,
    )
    words, scales = arguments[0]
    common.assert_same(y, reference.trellis_linear(x.double(), words, scales.double(), None, bits, GROUP))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(f"measuring {common.measured()}; {native.quantized_cpu_isa()} for 4 bits")
    rows = []
    for (n, k), tokens in itertools.product(SHAPES, wanted.tokens):
        seconds = rounds(contenders(n, k, tokens), wanted.rounds)
        for bits in trellis.BITS:
            name = f"tcq{bits}"
            took = f"{1e3 * statistics.median(seconds[name]):.2f} ms"
            ratios = [f"{ratio(seconds, other, name):.2f} x" for other in ("bfloat16", "int4")]
            rows.append([f"{n} x {k}, {tokens} tokens, {bits} bits", took, *ratios])
    print(format_table(["one thread", "takes", "faster than bfloat16", "than int4"], rows))
    searches = [search_row(bits, max(wanted.rounds // 5, 1)) for bits in trellis.BITS]
    print(format_table(["search", "a weight", "faster than torch"], searches))


if __name__ == "__main__":
    main()
