"""Weights of 4 and 8 bits: as they are, unpacked by torch in each call, and the same layer in bfloat16.

    pytest benchmarks/bench_quantized_linear.py --benchmark-only

Dense, and low-rank with both factors in few bits, at the sizes of LLaMA-7B.
"""

import common
import pytest
import torch

from lorap.kernels import packing, reference
from lorap.nn import ops

GROUP = 64
SHAPES = {
    "dense": ((4096, 4096),),
    "rank 1024": ((4096, 1024), (1024, 4096)),
}  # (N, K) of each weight, the last one first to run
OPS = {1: "quantized_linear", 2: "quantized_low_rank_linear"}


def quantized(rows, columns, bits):
    words = torch.randint(
        -(2**31), 2**31 - 1, (rows, packing.words(columns, bits)), dtype=torch.int32, device=common.DEVICE
    )
    scales = common.random(rows, -(-columns // GROUP), dtype=torch.bfloat16)
    return words, scales.mul(GROUP**-0.5 / 2 ** (bits - 2))


@pytest.mark.parametrize("kind", ["bfloat16", "torch", "lorap"])
@pytest.mark.parametrize("tokens", [1, 8, 512], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("bits", packing.BITS, ids=lambda bits: f"int{bits}")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def bench_quantized_linear(benchmark, shape, bits, tokens, kind):
    shapes = [tuple(common.size(benchmark, size) for size in one) for one in SHAPES[shape]]
    tokens = common.tokens_of(benchmark, tokens)
    x = common.random(tokens, shapes[-1][1], dtype=torch.bfloat16)
    op, plain = OPS[len(shapes)], ("linear", "low_rank_linear")[len(shapes) - 1]

    def make():
        packed = [quantized(*one, bits) for one in shapes]
        if kind != "bfloat16":
            return tuple(tensor for pair in packed for tensor in pair)
        weights = [
            packing.dequantize(*pair, bits, GROUP, k, x.dtype) for pair, (_, k) in zip(packed, shapes, strict=True)
        ]
        return tuple(reversed(weights))

    def call(*weights):
        if kind == "bfloat16":
            return getattr(ops, plain)(x, *weights)
        run = getattr(reference if kind == "torch" else ops, op)
        return run(x, *weights, None, bits, GROUP)

    arguments = common.copies(benchmark, make)
    y = common.measure(
        benchmark,
        call,
        arguments,
        group=f"{shape} {shapes[0][0]}x{shapes[-1][1]}, {bits} bits, {tokens} tokens",
        nbytes=sum(tensor.nbytes for tensor in arguments[0]) + x.nbytes + 2 * tokens * shapes[0][0],
        flops=2 * tokens * sum(n * k for n, k in shapes),
    )
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments[0]]
    rest = () if kind == "bfloat16" else (None, bits, GROUP)
    common.assert_same(y, getattr(reference, plain if kind == "bfloat16" else op)(x.double(), *exact, *rest))
