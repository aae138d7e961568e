"""q, k and v, which read the same x: dense, each by itself, and as one op, at the paper's ranks for sparsity 0.5.

pytest benchmarks/bench_low_rank_linear_group.py --benchmark-only
"""

import common
import pytest
import torch
import torch.nn.functional as F
from random_models import SIZES, plan

from lorap.kernels import reference
from lorap.nn import ops

MODELS = ("llama-7b", "llama-3-8b")


def dense(x, right, left):
    """``right`` holds the dense weights."""
    return torch.cat([F.linear(x, weight) for weight in right], dim=-1)


def separate(x, right, left):
    return torch.cat([ops.low_rank_linear(x, *pair) for pair in zip(right, left, strict=True)], dim=-1)


CALLS = {
    "dense": dense,
    "two matmuls each": reference.low_rank_linear_group,
    "lorap, separate": separate,
    "lorap": ops.low_rank_linear_group,
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("tokens", [1, 4, 16], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def bench_low_rank_linear_group(benchmark, name, dtype, tokens, kind):
    as_dtype = common.DTYPES[dtype]
    shapes, layer = plan(SIZES[name], 0.5)
    roles = ("q_proj", "k_proj", "v_proj")
    rows = [common.size(benchmark, shapes[role][0]) for role in roles]
    ranks = [common.size(benchmark, layer.ranks[role], multiple=1) for role in roles]
    k = common.size(benchmark, shapes["q_proj"][1])
    x = common.random(tokens, k, dtype=as_dtype)

    def factors():
        if kind == "dense":
            return [common.random(n, k, dtype=as_dtype) for n in rows], []
        right = [common.random(rank, k, dtype=as_dtype) for rank in ranks]
        return right, [common.random(n, rank, dtype=as_dtype) for n, rank in zip(rows, ranks, strict=True)]

    arguments = common.copies(benchmark, factors)
    weights = sum(weight.numel() for weight in common.tensors(arguments[0]))
    y = common.measure(
        benchmark,
        lambda right, left: CALLS[kind](x, right, left),
        arguments,
        group=f"{name} q, k, v of ranks {', '.join(map(str, ranks))}, {dtype}, {tokens} tokens",
        nbytes=(weights + tokens * (k + sum(rows))) * x.element_size(),
        flops=2 * tokens * weights,
    )
    right, left = ([weight.double() for weight in weights] for weights in arguments[0])
    exact = dense(x.double(), right, left) if kind == "dense" else separate(x.double(), right, left)
    common.assert_same(y, exact)
