"""The kernels on weights on a trellis against float64, in Triton's interpreter.

There the bytes of a product are added up by shifts: the instruction that does it on a GPU is inline assembly.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorap.kernels import cost, quantized_settings, trellis, trellis_settings
from lorap.kernels import trellis_linear as module
from lorap.kernels.trellis_linear import trellis_linear as linear

DTYPES = [torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("poison", "few_programs")


@pytest.fixture
def few_programs(monkeypatch):
    """K is not split: a program takes the interpreter a tenth of a second."""
    monkeypatch.setattr(trellis_settings, "NUM_SMS", 0)
    trellis_settings._settings.cache_clear()
    yield
    trellis_settings._settings.cache_clear()


def on_trellis(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes of any value, scales, and the exact weight in float64, made window by window."""
    words = torch.randint(-(2**31), 2**31, trellis.packed_shape(rows, columns, bits), dtype=torch.int64)
    scales = (torch.rand(rows, -(-columns // group)) + 0.5).mul(max(columns, 1) ** -0.5).to(dtype)
    ring = words.view(trellis.tiles(rows), columns, trellis.words(bits)) & 0xFFFFFFFF
    stream = (ring[..., None] >> torch.arange(32) & 1).flatten(2)  # (tiles, K, 64 * bits)
    places = (bits * torch.arange(64)[:, None] + torch.arange(12)) % (64 * bits)
    windows = (stream[..., places] << torch.arange(12)).sum(-1).transpose(1, 2).flatten(0, 1)[:rows]
    products = windows * 1007213647
    signed = [((products >> shift) + 128) % 256 - 128 for shift in (0, 8, 16, 24)]
    exact = sum(signed).double() / 128 * scales.double()[:, torch.arange(columns) // group]
    return words.to(torch.int32), scales, exact


def assert_close(y: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within half a unit of the last place of each result, and of float32 sums of ``size``."""
    limit = torch.finfo(y.dtype).eps * exact.abs() + 1e-5 * size + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape
    assert float(((y.double() - exact).abs() / limit).max()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("n", "k"), [(1, 33), (63, 100), (100, 300)])
def test_linear(n, k, m, bits, dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    for group, added in ((32, None), (96, bias), (256, bias)):
        packed, scales, exact = on_trellis(n, k, bits, group, dtype)
        wanted, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
        y = linear(x, packed, scales, added, bits, group)
        assert_close(y, wanted if added is None else wanted + added.double(), size)


@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize("m", [1, 70])
def test_programs_that_share_k(m, bits, monkeypatch):
    """K = 1000 of 128 is 8 steps, so 3 parts have 3, 3 and 2; the bias must be added once."""
    torch.manual_seed(0)
    found = module.settings(m, 1000, 20, 256) | {"SPLIT_K": 3}
    monkeypatch.setattr(module, "settings", lambda *_: found)
    assert quantized_settings.parts(1000, found) == 3
    x, bias = torch.randn(m, 1000), torch.randn(20)
    packed, scales, exact = on_trellis(20, 1000, bits, 256, torch.float32)
    size = x.double().abs() @ exact.abs().T
    assert_close(linear(x, packed, scales, bias, bits, 256), x.double() @ exact.T + bias.double(), size)


@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 33, 32), (63, 100, 96), (100, 300, 256)])
def test_more_tokens_than_are_multiplied_as_weights_are_read(n, k, group, bits):
    torch.manual_seed(0)
    packed, scales, exact = on_trellis(n, k, bits, group, torch.float32)
    weight = module.Weight(packed, scales, bits, group)
    torch.testing.assert_close(module.dequantized(weight, k), exact.float(), rtol=0, atol=0)
    x, bias = torch.randn(cost.FUSED_TOKENS + 1, k), torch.randn(n)
    y = linear(x, packed, scales, bias, bits, group)
    torch.testing.assert_close(y.double(), x.double() @ exact.T + bias.double(), rtol=1e-5, atol=1e-5)


def test_every_window_stands_for_its_number():
    """All 4,096, as the lowest rows of a tile that holds each of them once in some column."""
    windows = torch.arange(4096)
    packed = torch.zeros(1, 4096, 8, dtype=torch.int32)
    packed[0, :, 0] = windows
    weight = module.Weight(packed.flatten(1), torch.ones(1, 1), 4, 4096)
    assert torch.equal(module.dequantized(weight, 4096)[0], trellis.numbers())


def test_groups_larger_than_a_row_and_strided_tensors():
    torch.manual_seed(0)
    for bits, k, group in ((2, 100, 160), (3, 200, 2**31 - 32), (4, 3, 2**40)):
        packed, scales, exact = on_trellis(5, k, bits, group, torch.float32)
        strided = torch.stack((packed, -packed), dim=-1)[..., 0]
        for m in (1, 2):
            x = torch.randn(2, k, m).transpose(1, 2)
            y = linear(x, strided, scales.t().contiguous().t(), None, bits, group)
            torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 8), (3, 0, 8), (3, 5, 0), (1, 5, 0)])
def test_empty(m, n, k):
    packed, scales, _ = on_trellis(n, k, 3, 32, torch.float32)
    x, bias = torch.randn(m, k), torch.randn(n)
    y = linear(x, packed, scales, bias, 3, 32)
    assert y.shape == (m, n)
    assert k or torch.equal(y, bias.expand(m, n))


def test_what_does_not_fit_is_refused():
    x, (packed, scales, _) = torch.randn(2, 40), on_trellis(70, 40, 3, 32, torch.float32)
    for wrong in ((packed[:, 1:], scales), (packed, scales[:, 1:]), (packed, scales[:60]), (packed.long(), scales)):
        with pytest.raises(
            ValueError, match=r"3 bits in groups of 32 do not fit together: \(\(\d, 240\), \(\d\d, 2\)\)"
        ):
            linear(x, *wrong, None, 3, 32)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\), \(70,\) is needed"):
        linear(x, packed, scales, x[0, :5], 3, 32)
