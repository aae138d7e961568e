"""The gate/up decode kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorap.kernels.silu_gated_linear import silu_gated_linear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
pytestmark = pytest.mark.usefixtures("poison")


def check(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *biases: torch.Tensor | None) -> None:
    y = silu_gated_linear(x, gate, up, *biases)
    gate_bias, up_bias = (None if bias is None else bias.double() for bias in (*biases, None, None)[:2])
    expected = F.silu(F.linear(x.double(), gate.double(), gate_bias)) * F.linear(x.double(), up.double(), up_bias)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    limit = TOLERANCE[x.dtype] * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected, rtol=0.0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 100), (100, 63), (130, 300)])
@pytest.mark.parametrize("m", [1, 2, 7, 32, 65])
def test_values(m, n, k, dtype):
    x = torch.randn(m, k, dtype=dtype)
    gate, up = torch.randn(2, n, k, dtype=dtype) / k**0.5
    check(x, gate, up)
    check(x, gate, up, *torch.randn(2, n, dtype=dtype))


@pytest.mark.parametrize("m", [1, 5])
def test_each_bias_alone(m):
    x, gate, up, bias = torch.randn(m, 40), torch.randn(50, 40), torch.randn(50, 40), torch.randn(50)
    check(x, gate, up, bias, None)
    check(x, gate, up, None, bias)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("m", [1, 5])
def test_gates_far_from_zero_neither_overflow_nor_leak(m):
    """exp(1000) is infinite; silu(-1000) is 0, and 0 times an up of any size stays 0."""
    x, up = torch.ones(m, 16), torch.full((4, 16), 1e4)
    gate = torch.tensor([-1000.0, -100.0, 100.0, 1000.0])[:, None].expand(4, 16) / 16
    check(x, gate, up)


def test_leading_shapes_and_views():
    gate, up = torch.randn(2, 40, 30)
    check(torch.randn(2, 3, 30), gate, up)
    check(torch.randn(30), gate, up)
    check(torch.randn(3, 60)[:, ::2], gate, up)
    check(torch.randn(3, 30), torch.randn(30, 40).T, torch.randn(80, 30)[::2])
    check(torch.randn(3, 30), gate, up, *torch.randn(40, 2).T)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 5, 0)])
def test_empty(m, n, k):
    check(torch.randn(m, k), torch.randn(n, k), torch.randn(n, k))
    check(torch.randn(m, k), torch.randn(n, k), torch.randn(n, k), torch.randn(n), torch.randn(n))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        silu_gated_linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(5, 8))
    with pytest.raises(TypeError, match="bfloat16"):
        silu_gated_linear(torch.randn(2, 8), torch.randn(4, 8), torch.randn(4, 8).bfloat16())
