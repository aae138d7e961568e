"""The kernels on weights of 4 and 8 bits against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorap.kernels import cost, packing, quantized_settings
from lorap.kernels import quantized_linear as module
from lorap.kernels.quantized_linear import quantized_linear as linear
from lorap.kernels.quantized_low_rank_linear import quantized_low_rank_linear as low_rank_linear
from lorap.kernels.quantized_silu_gated_linear import quantized_silu_gated_linear as silu_gated_linear

DTYPES = [torch.float16, torch.bfloat16]  # the latter is computed in float32 here
pytestmark = pytest.mark.usefixtures("poison", "few_programs")


@pytest.fixture
def few_programs(monkeypatch):
    """Blocks as large as they get: a program takes the interpreter a quarter of a second."""
    monkeypatch.setattr(quantized_settings, "NUM_SMS", 0)
    quantized_settings._settings.cache_clear()
    yield
    quantized_settings._settings.cache_clear()


def quantized(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Packed numbers, scales, and the exact weight in float64, made element by element."""
    half = 2 ** (bits - 1)
    if not columns:
        return torch.empty(rows, 0, dtype=torch.int32), torch.empty(rows, 0, dtype=dtype), torch.empty(rows, 0).double()
    numbers = torch.randint(-half, half, (rows, columns))
    if numbers.numel():
        numbers[0, 0], numbers[-1, -1] = -half, half - 1  # both ends of the range
    scales = (torch.rand(rows, -(-columns // group)) + 0.5).mul(columns**-0.5 / half).to(dtype)
    exact = numbers.double() * scales.double()[:, torch.arange(columns) // group]
    return packing.pack(numbers, bits), scales, exact


def assert_close(y: Tensor, exact: Tensor, size: Tensor, *, roundings: float = 1.0) -> None:
    """Within half a unit of the last place of each result for each rounding, and of float32 sums of ``size``."""
    limit = roundings * torch.finfo(y.dtype).eps * exact.abs() + 1e-5 * size + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape
    assert float(((y.double() - exact).abs() / limit).max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 100), (20, 300)])
def test_linear(n, k, m, bits, dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    for group, added in ((32, None), (64, bias), (128, bias)):
        packed, scales, exact = quantized(n, k, bits, group, dtype)
        wanted, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
        y = linear(x, packed, scales, added, bits, group)
        assert_close(y, wanted if added is None else wanted + added.double(), size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("pivoted", [False, True])
def test_low_rank_linear(pivoted, m, bits, dtype):
    torch.manual_seed(0)
    for index, (n, r, k) in enumerate([(63, 17, 100), (1, 33, 63)]):
        group = (32, 64, 128)[index % 3]
        right_packed, right_scales, right = quantized(r, k, bits, group, dtype)
        left_packed, left_scales, left = quantized(n, r, bits, group, dtype)
        x, rows = torch.randn(m, k).to(dtype), torch.randperm(n + r)[:r].sort().values if pivoted else None
        bias = torch.randn(n + r * pivoted).to(dtype) if index % 2 else None
        y = low_rank_linear(x, left_packed, left_scales, right_packed, right_scales, bias, bits, group, rows)
        shrunk = x.double() @ right.T
        exact, size = shrunk @ left.T, x.double().abs() @ right.abs().T @ left.abs().T
        if rows is not None:
            order = torch.full((n + r,), -1)
            order[rows] = torch.arange(r)
            order[order < 0] = torch.arange(n) + r
            exact = torch.cat((shrunk, exact), 1)[:, order]
            size = torch.cat((x.double().abs() @ right.abs().T, size), 1)[:, order]
        # Several tokens meet left with T in the dtype of x, rounded.
        rounded = 1e5 * torch.finfo(dtype).eps * size if m > 1 else 0
        assert_close(y, exact + (0 if bias is None else bias.double()), size + rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("m", [1, 6])
def test_silu_gated_linear(m, bits, dtype):
    torch.manual_seed(0)
    for group, (n, k) in ((32, (63, 100)), (64, (33, 1))):
        x = torch.randn(m, k).to(dtype)
        gate_packed, gate_scales, gate = quantized(n, k, bits, group, dtype)
        up_packed, up_scales, up = quantized(n, k, bits, group, dtype)
        y = silu_gated_linear(x, gate_packed, gate_scales, up_packed, up_scales, bits, group)
        size = (x.double().abs() @ gate.abs().T + 1) * (x.double().abs() @ up.abs().T + 1)
        assert_close(y, F.silu(x.double() @ gate.T) * (x.double() @ up.T), size)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("m", [1, 3, 70])
def test_programs_that_share_k(m, bits, monkeypatch):
    """K = 1000 of 256 is 4 steps, so one of 8 parts has none of its own; the bias must be added once."""
    torch.manual_seed(0)
    found = module.settings(m, 1000, 20, bits, 96) | {"SPLIT_K": 3, "BLOCK_N": 32 if m > 1 else 4}
    found |= {"BLOCK_K": 256, "TILES": 1} if m == 1 else {}
    monkeypatch.setattr(module, "settings", lambda *_: found)
    assert quantized_settings.parts(1000, found) in (2, 3)
    x, bias = torch.randn(m, 1000), torch.randn(20)
    packed, scales, exact = quantized(20, 1000, bits, 96, torch.float32)
    size = x.double().abs() @ exact.abs().T
    assert_close(linear(x, packed, scales, bias, bits, 96), x.double() @ exact.T + bias.double(), size)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 100), (7, 300)])
def test_more_tokens_than_are_multiplied_as_weights_are_read(n, k, bits):
    torch.manual_seed(0)
    packed, scales, exact = quantized(n, k, bits, 64, torch.float32)
    weight = module.Weight(packed, scales, bits, 64)
    torch.testing.assert_close(module.dequantized(weight, k), exact.float(), rtol=0, atol=0)
    x, bias = torch.randn(cost.FUSED_TOKENS + 1, k), torch.randn(n)
    y = linear(x, packed, scales, bias, bits, 64)
    torch.testing.assert_close(y.double(), x.double() @ exact.T + bias.double(), rtol=1e-5, atol=1e-5)


def test_groups_of_any_size_and_strided_tensors():
    torch.manual_seed(0)
    for bits, k, group in ((4, 100, 96), (8, 200, 160), (4, 3, 2**40), (8, 3, 2**31 - 32)):
        packed, scales, exact = quantized(5, k, bits, group, torch.float32)
        strided = torch.stack((packed, -packed), dim=-1)[..., 0]
        for m in (1, 2):
            x = torch.randn(2, k, m).transpose(1, 2)
            y = linear(x, strided, scales.t().contiguous().t(), None, bits, group)
            torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 5, 0)])
def test_empty(m, n, k):
    packed, scales, _ = quantized(n, k, 4, 32, torch.float32)
    x, bias = torch.randn(m, k), torch.randn(n)
    y = linear(x, packed, scales, bias, 4, 32)
    assert y.shape == (m, n)
    assert k or torch.equal(y, bias.expand(m, n))
    assert silu_gated_linear(x, packed, scales, packed, scales, 4, 32).shape == (m, n)


@pytest.mark.parametrize("m", [1, 3])
def test_rank_of_nothing_is_the_bias(m):
    right, left = quantized(0, 40, 4, 32, torch.float32), quantized(6, 0, 4, 32, torch.float32)
    bias = torch.randn(6)
    y = low_rank_linear(torch.randn(m, 40), *left[:2], *right[:2], bias, 4, 32)
    assert torch.equal(y, bias.expand(m, 6))


def test_what_does_not_fit_is_refused():
    x, (packed, scales, _) = torch.randn(2, 40), quantized(6, 40, 4, 32, torch.float32)
    for wrong in ((packed[:, 1:], scales), (packed, scales[:, 1:]), (packed, scales[1:]), (packed.long(), scales)):
        with pytest.raises(ValueError, match=r"4 bits in groups of 32 do not fit together: \(\(\d, 5\), \(\d, 2\)\)"):
            linear(x, *wrong, None, 4, 32)
    square, rows = quantized(6, 6, 4, 32, torch.float32), torch.arange(6)
    for bias, pivots, said in (
        (None, rows[1:], "pivot_rows has shape"),
        (x[0, :6], rows, r"bias has shape \(6,\), \(12,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            low_rank_linear(x, *square[:2], packed, scales, bias, 4, 32, pivots)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\), \(6,\) is needed"):
        linear(x, packed, scales, x[0, :5], 4, 32)
    with pytest.raises(ValueError, match="gate has 6 rows, up has 5"):
        silu_gated_linear(x, packed, scales, packed[1:], scales[1:], 4, 32)
