"""One projection: dense, as two matmuls of torch, and through ops.low_rank_linear, at the ranks of the paper's allocation.

    pytest benchmarks/bench_low_rank_linear.py --benchmark-only

512 and 1536 are the ranks of q, k and of v, o in LLaMA-7B at sparsity 0.5; 1024 is their mean.
"""

import common
import pytest
import torch
import torch.nn.functional as F

from lorap.kernels import reference
from lorap.nn import ops

SHAPES = {  # (out_features N, in_features K, rank R)
    "smollm2-q": (576, 576, 172),
    "llama7b-q": (4096, 4096, 512),
    "llama7b-mean": (4096, 4096, 1024),
    "llama7b-v": (4096, 4096, 1536),
}
CALLS = {"dense": F.linear, "two matmuls": reference.low_rank_linear, "lorap": ops.low_rank_linear}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("tokens", [1, 4, 16, 512], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def bench_low_rank_linear(benchmark, shape, dtype, tokens, kind):
    n, k, rank = (common.size(benchmark, full) for full in SHAPES[shape])
    tokens, as_dtype = common.tokens_of(benchmark, tokens), common.DTYPES[dtype]
    weights = n * k if kind == "dense" else rank * (n + k)
    common.skip_if_slow(benchmark, as_dtype, 2 * tokens * weights)
    x = common.random(tokens, k, dtype=as_dtype)
    sizes = [(n, k)] if kind == "dense" else [(rank, k), (n, rank)]
    arguments = common.copies(benchmark, lambda: tuple(common.random(*size, dtype=as_dtype) for size in sizes))
    y = common.measure(
        benchmark,
        lambda *factors: CALLS[kind](x, *factors),
        arguments,
        group=f"{shape} {n}x{k} rank {rank}, {dtype}, {tokens} tokens",
        nbytes=(weights + tokens * (k + n)) * x.element_size(),
        flops=2 * tokens * weights,
    )
    assert y.shape == (tokens, n)
    exact = x.double() @ arguments[0][0].double().T
    common.assert_same(y, exact if kind == "dense" else exact @ arguments[0][1].double().T)
