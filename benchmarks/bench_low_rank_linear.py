"""One projection: dense nn.Linear against LowRankLinear, at the ranks of the paper's allocation.

    pytest benchmarks/bench_low_rank_linear.py --benchmark-only

Each call uses the next of several copies of the weights, so that they come from memory, as they do in a model.
"""

import itertools

import pytest
import torch
from torch import nn

import lorap

SHAPES = {  # (out_features, in_features, rank)
    "smollm2-q-20%": (576, 576, 172),
    "llama7b-q-50%": (4096, 4096, 512),
    "llama7b-v-50%": (4096, 4096, 1536),
}
COPIES = 4


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
@pytest.mark.parametrize("tokens", [1, 16, 512], ids=lambda tokens: f"M{tokens}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.inference_mode()
def bench_projection(benchmark, shape, tokens, kind):
    out_features, in_features, rank = shape
    benchmark.group = f"{out_features}x{in_features} rank {rank}, {tokens} tokens, float32"
    if kind == "dense":
        modules = [nn.Linear(in_features, out_features, bias=False) for _ in range(COPIES)]
    else:
        modules = [lorap.LowRankLinear(in_features, out_features, rank, bias=False) for _ in range(COPIES)]
    weights = sum(parameter.numel() for parameter in modules[0].parameters())
    benchmark.extra_info |= {"weight_bytes": 4 * weights, "flops": 2 * tokens * weights}
    x = torch.randn(tokens, in_features)
    turn = itertools.cycle(modules)
    y = benchmark(lambda: next(turn)(x))
    assert y.shape == (tokens, out_features)
