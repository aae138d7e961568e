"""A dense projection for few tokens: F.linear against ops.linear, which reads each weight once from memory.

pytest benchmarks/bench_linear.py --benchmark-only
"""

import common
import pytest
import torch
import torch.nn.functional as F

from lorap.kernels import reference
from lorap.nn import ops

SHAPES = {  # (out_features N, in_features K)
    "llama7b-o": (4096, 4096),
    "llama7b-down-pruned": (4096, 5504),
    "smollm2-head": (49152, 576),
}


@pytest.mark.parametrize("kind", ["torch", "lorap"])
@pytest.mark.parametrize("tokens", [1, 4, 16], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def bench_linear(benchmark, shape, dtype, tokens, kind):
    n, k = (common.size(benchmark, full) for full in SHAPES[shape])
    as_dtype = common.DTYPES[dtype]
    x = common.random(tokens, k, dtype=as_dtype)
    arguments = common.copies(benchmark, lambda: (common.random(n, k, dtype=as_dtype),))
    call = F.linear if kind == "torch" else ops.linear
    y = common.measure(
        benchmark,
        lambda weight: call(x, weight),
        arguments,
        group=f"dense {shape} {n}x{k}, {dtype}, {tokens} tokens",
        nbytes=(n * k + tokens * (k + n)) * x.element_size(),
        flops=2 * tokens * n * k,
    )
    common.assert_same(y, reference.linear(x.double(), arguments[0][0].double()))
