"""What a call costs before any arithmetic: a layer so small that the time is Python and torch's dispatch.

    pytest benchmarks/bench_overhead.py --benchmark-only

On a GPU this is the time to launch, not to finish: the queue is not waited for.
"""

import common
import pytest
import torch

import lorap
from lorap.kernels import reference
from lorap.nn import ops

KINDS = ("two matmuls", "lorap", "lorap, module", "lorap, torch.ops")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", common.DTYPES)
@torch.inference_mode()
def bench_overhead(benchmark, dtype, kind):
    benchmark.group = f"overhead of a call, 1 token, 64x64 rank 16, {dtype}"
    as_dtype = common.DTYPES[dtype]
    x, right, left = (common.random(*size, dtype=as_dtype) for size in ((1, 64), (16, 64), (64, 16)))
    module = lorap.LowRankLinear.from_factors(left, right)
    calls = {
        "two matmuls": lambda: reference.low_rank_linear(x, right, left),
        "lorap": lambda: ops.low_rank_linear(x, right, left),
        "lorap, module": lambda: module(x),
        "lorap, torch.ops": lambda: torch.ops.lorap.low_rank_linear(x, right, left),
    }
    y = benchmark(calls[kind])
    common.assert_same(y, x.double() @ right.double().T @ left.double().T)
