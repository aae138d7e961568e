"""The calibration statistic, the sum of squares of each input channel: as published, in chunks of torch, and our kernel.

    pytest benchmarks/bench_channel_sq_norm.py --benchmark-only

Without a GPU ``lorap`` is the torch reference itself.
"""

import common
import pytest
import torch

from lorap.kernels import reference
from lorap.nn import ops

SHAPES = {"smollm2": (2048, 576), "llama7b-attention": (2048, 4096), "llama7b-ffn": (2048, 11008)}  # tokens, channels


def published(x):
    """What the program of the paper does in a forward hook: a float32 copy, norms along its rows, and squares of them."""
    x = x.t().type(torch.float32)
    return torch.norm(x, p=2, dim=1) ** 2


CALLS = {
    "published": published,
    "reference": lambda x: reference.channel_sq_norm(x)[0],
    "lorap": lambda x: ops.channel_sq_norm(x)[0],
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def bench_channel_sq_norm(benchmark, shape, dtype, kind):
    if kind == "lorap" and common.DEVICE.type == "cpu":
        pytest.skip("no kernel of ours on a CPU: the same as reference")
    tokens, channels = (common.size(benchmark, full) for full in SHAPES[shape])
    arguments = common.copies(benchmark, lambda: (common.random(tokens, channels, dtype=common.DTYPES[dtype]),))
    found = common.measure(
        benchmark,
        CALLS[kind],
        arguments,
        group=f"squares of {shape}, {tokens} tokens x {channels} channels, {dtype}",
        nbytes=arguments[0][0].nbytes,
        flops=2 * tokens * channels,
    )
    torch.testing.assert_close(found.double(), arguments[0][0].double().square().sum(0), rtol=1e-4, atol=0)
