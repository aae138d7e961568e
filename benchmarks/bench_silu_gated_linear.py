"""The first half of a gated FFN, silu(x gate^T) * (x up^T), dense: in three calls of torch, and as one op.

    pytest benchmarks/bench_silu_gated_linear.py --benchmark-only

5504 is the width of LLaMA-7B's FFN once half of its 11008 channels are pruned, 1536 the whole FFN of SmolLM2-135M.
"""

import common
import pytest
import torch

from lorap.kernels import reference
from lorap.nn import ops

SHAPES = {"llama7b-pruned": (5504, 4096), "smollm2": (1536, 576)}  # (width N, in_features K)
CALLS = {"torch": reference.silu_gated_linear, "lorap": ops.silu_gated_linear}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("tokens", [1, 4, 16], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def bench_silu_gated_linear(benchmark, shape, dtype, tokens, kind):
    n, k = (common.size(benchmark, full) for full in SHAPES[shape])
    as_dtype = common.DTYPES[dtype]
    x = common.random(tokens, k, dtype=as_dtype)
    arguments = common.copies(benchmark, lambda: tuple(common.random(n, k, dtype=as_dtype) for _ in range(2)))
    y = common.measure(
        benchmark,
        lambda gate, up: CALLS[kind](x, gate, up),
        arguments,
        group=f"gate and up, {shape} {n}x{k}, {dtype}, {tokens} tokens",
        nbytes=(2 * n * k + tokens * (k + n)) * x.element_size(),
        flops=4 * tokens * n * k,
    )
    gate, up = arguments[0]
    common.assert_same(y, reference.silu_gated_linear(x.double(), gate.double(), up.double()))
