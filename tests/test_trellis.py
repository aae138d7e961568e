"""Weights on a trellis: the packing by its definition, what the search finds, the ops beside float64, and what does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lorap import ShapeError
from lorap.kernels import trellis, trellis_search
from lorap.nn import dispatch, implementations, native, ops

MASK = 2**trellis.WINDOW - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_OP = {
    op: ["reference", *(["cpu"] if native.HAS_CPU and op in implementations.IMPLEMENTATIONS["cpu"] else [])]
    for op in implementations.TRELLIS_OPS
}
SEARCHES = pytest.mark.parametrize("backend", BY_OP["trellis_search"])
LINEARS = pytest.mark.parametrize("backend", BY_OP["trellis_linear"])
EACH_BITS = pytest.mark.parametrize("bits", trellis.BITS)


def search(backend: str, wanted: Tensor, importance: Tensor, bits: int) -> Tensor:
    return implementations.implementation("trellis_search", backend)(wanted, importance, bits)


def random_packed(rows: int, columns: int, bits: int) -> Tensor:
    """Any words are a weight."""
    return torch.randint(-(2**31), 2**31, trellis.packed_shape(rows, columns, bits)).int()


def costs(windows: Tensor, wanted: Tensor, importance: Tensor) -> Tensor:
    """(tiles, C) float64."""
    errors = importance.double() * (wanted.double() - trellis.numbers().double()[windows.long()][: len(wanted)]) ** 2
    return (
        torch.nn.functional.pad(errors, (0, 0, 0, len(windows) - len(errors)))
        .view(-1, trellis.TILE, errors.shape[1])
        .sum(1)
    )


def assert_close(y: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within a few roundings of the sums of absolute values, and of one weight each."""
    limit = 8 * torch.finfo(y.dtype).eps * (size + exact.abs()) + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape
    assert float(((y.double() - exact).abs() / limit).max()) <= 1


# --- packing ---------------------------------------------------------------------------------------------------------------


@EACH_BITS
def test_a_window_is_twelve_bits_of_a_ring_from_its_own_on(bits: int) -> None:
    torch.manual_seed(0)
    packed = random_packed(100, 3, bits)
    windows = trellis.unpack(packed, bits, 100)
    assert windows.shape == (100, 3)
    assert windows.dtype == torch.int32
    for row, column in ((0, 0), (1, 2), (51, 1), (62, 0), (63, 2), (64, 0), (99, 1)):
        words = packed[row // 64, column * 2 * bits : (column + 1) * 2 * bits].tolist()
        ring = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
        twice = ring | ring << 64 * bits
        assert int(windows[row, column]) == twice >> bits * (row % 64) & MASK


@EACH_BITS
@pytest.mark.parametrize("columns", [0, 1, 63])
def test_packing_is_the_inverse_of_unpacking(columns: int, bits: int) -> None:
    torch.manual_seed(0)
    packed = random_packed(100, columns, bits)
    assert packed.shape == (2, columns * 2 * bits)
    assert torch.equal(trellis.pack(trellis.unpack(packed, bits, 128), bits), packed)


def test_numbers_are_sums_of_the_signed_bytes_of_a_product() -> None:
    numbers = trellis.numbers()
    for window in (0, 1, 5, 2047, 4095):
        bytes_of = (window * trellis.FACTOR % 2**32).to_bytes(4, "little")
        assert float(numbers[window]) == sum(b - 256 if b > 127 else b for b in bytes_of) / 128
    assert float(numbers.std()) == pytest.approx(1.16, abs=0.01)
    assert abs(float(numbers.mean())) < 0.02


@EACH_BITS
def test_dequantized_weights_are_numbers_times_scales_of_ragged_groups(bits: int) -> None:
    torch.manual_seed(0)
    packed, scales = random_packed(100, 63, bits), torch.rand(100, 2)
    weight = trellis.dequantize(packed, scales, bits, 32, torch.float64)
    numbers = trellis.numbers().double()[trellis.unpack(packed, bits, 100).long()]
    assert torch.equal(weight[:, :32], numbers[:, :32] * scales[:, :1].double())
    assert torch.equal(weight[:, 32:], numbers[:, 32:] * scales[:, 1:].double())


@pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
@EACH_BITS
def test_the_weight_made_in_one_op_is_that_of_the_reference(bits: int) -> None:
    assert_same_weights(bits)


def assert_same_weights(bits: int) -> None:
    """Bit by bit, transposed, of scales in other dtypes, and of views that do not begin where their memory does."""
    torch.manual_seed(0)
    make, threads = torch.ops.lorap_cpu.trellis_weight.default, torch.get_num_threads()
    for index, (n, k) in enumerate((n, k) for n in (1, 63, 100) for k in (1, 63, 100, 577)):
        group, scale_dtype = (32, 64, 96, 4224)[index % 4], DTYPES[index // 3 % 3]
        packed = random_packed(n + 64, k, bits)[1:]
        scales = torch.rand(n + 64, -(-k // group)).to(scale_dtype)[64:]
        for dtype, count in ((dtype, count) for dtype in DTYPES for count in (1, 2)):
            torch.set_num_threads(count)
            found = make(packed, scales, k, bits, group, dtype)
            assert found.dtype == dtype
            assert torch.equal(found.T, trellis.dequantize(packed, scales, bits, group, dtype))
    torch.set_num_threads(threads)


# --- search ----------------------------------------------------------------------------------------------------------------


@SEARCHES
@EACH_BITS
def test_what_is_found_lies_on_rings(bits: int, backend: str) -> None:
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (63, 2), (64, 1), (100, 3)):
        wanted = torch.randn(rows, columns)
        wanted[0, 0] = torch.nan
        found = search(backend, wanted, torch.rand(rows, columns), bits)
        assert found.shape == (trellis.tiles(rows) * 64, columns)
        assert found.dtype == torch.int32
        assert torch.equal(trellis.unpack(trellis.pack(found, bits), bits, len(found)), found)


@SEARCHES
@pytest.mark.parametrize(("bits", "error"), [(2, 0.0745), (3, 0.0193), (4, 0.0051), (5, 0.00135), (6, 0.000363)])
def test_squared_error_of_gaussian_numbers(bits: int, error: float, backend: str) -> None:
    """Measured once with 10^5 numbers, scaled as they are best; rounding each by itself leaves 0.1175 to 0.00064."""
    torch.manual_seed(0)
    wanted = torch.randn(64, 80) * {2: 1.15, 3: 1.05, 4: 1.0, 5: 0.95, 6: 0.89}[bits]
    found = trellis.numbers()[search(backend, wanted, torch.ones_like(wanted), bits).long()]
    assert float((found - wanted).square().mean() / wanted.square().mean()) == pytest.approx(error, rel=0.08)


@SEARCHES
@EACH_BITS
def test_numbers_of_a_ring_are_found_again_whatever_their_importance(bits: int, backend: str) -> None:
    torch.manual_seed(0)
    windows = trellis.unpack(random_packed(64, 4, bits), bits, 64)
    wanted = trellis.numbers()[windows.long()]
    importance = (torch.rand(64, 4) + 0.1) * torch.tensor([1e-20, 1e-3, 1.0, 1e20])
    found = search(backend, wanted, importance, bits)
    assert float((trellis.numbers()[found.long()] - wanted).abs().max()) == 0


@SEARCHES
@EACH_BITS
def test_rows_without_importance_have_no_influence(bits: int, backend: str) -> None:
    torch.manual_seed(0)
    wanted, importance = torch.randn(100, 3), torch.rand(100, 3) + 0.1
    importance[[0, 31, 63, 99]] = 0.0
    importance[:64, 2] = 0.0
    found = search(backend, wanted, importance, bits)
    other = wanted.clone()
    for place, useless in zip((importance == 0).nonzero(), 20 * [torch.inf, torch.nan, -1e30, 0.5], strict=False):
        other[tuple(place)] = useless
    assert torch.equal(search(backend, other, importance, bits), found)
    free = costs(found, wanted, importance).sum()
    assert free < costs(search(backend, wanted, torch.ones(100, 3), bits), wanted, importance).sum()


@SEARCHES
@EACH_BITS
def test_important_rows_are_nearer(bits: int, backend: str) -> None:
    torch.manual_seed(0)
    wanted, importance = 0.9 * torch.randn(64, 40), torch.ones(64, 40)
    importance[::4] = 100.0
    errors = (trellis.numbers()[search(backend, wanted, importance, bits).long()] - wanted).square()
    assert float(errors[::4].mean()) < 0.3 * float(errors.mean())


@EACH_BITS
def test_no_other_path_of_a_short_ring_is_better(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows of 4 bits a pass over 6 rows is held against all paths with the same ends; with those of 8 over 2."""
    window = 4 if bits <= 4 else 8
    monkeypatch.setattr(trellis, "WINDOW", window)
    monkeypatch.setattr(trellis, "TILE", 6 if bits < 4 else 3 if bits == 4 else 2)
    torch.manual_seed(0)
    rows, kept = trellis.TILE, 2 ** (window - bits)
    wanted, importance = torch.randn(rows, 3), torch.rand(rows, 3)
    rings = torch.arange(2 ** (bits * rows))
    around = rings | rings << bits * rows
    windows = torch.stack([around >> bits * row & 2**window - 1 for row in range(rows)])
    numbers = trellis.numbers()
    for ends in range(kept):
        found = trellis_search._path(wanted, importance, bits, torch.full((3,), ends))
        allowed = windows[:, windows[0] & kept - 1 == ends]
        for column in range(3):
            w, i = wanted[:, column, None], importance[:, column, None]
            least = (i * (w - numbers[allowed]) ** 2).sum(0).min()
            cost = (i * (w - numbers[found[:, column, None]]) ** 2).sum()
            torch.testing.assert_close(cost, least)
            assert int(found[-1, column]) >> bits == ends == int(found[0, column]) & kept - 1


@pytest.mark.parametrize("backend", BY_OP["trellis_search"][1:])
@EACH_BITS
def test_kernels_find_what_the_reference_finds(bits: int, backend: str) -> None:
    torch.manual_seed(0)
    for rows, columns in ((1, 3), (100, 17), (320, 5)):
        wanted, importance = torch.randn(rows, columns), torch.rand(rows, columns).square()
        got, expected = (search(one, wanted, importance, bits) for one in (backend, "reference"))
        ratio = costs(got, wanted, importance) / costs(expected, wanted, importance)
        assert float((ratio.nan_to_num(1.0) - 1).abs().max()) < 1e-5


@SEARCHES
def test_a_search_of_nothing(backend: str) -> None:
    assert search(backend, torch.zeros(0, 5), torch.zeros(0, 5), 3).shape == (0, 5)
    assert search(backend, torch.zeros(5, 0), torch.zeros(5, 0), 3).shape == (64, 0)
    assert ops.trellis_search(torch.zeros(65, 0), torch.zeros(65, 0), 3).shape == (128, 0)


@SEARCHES
def test_a_search_of_tensors_with_strides(backend: str) -> None:
    torch.manual_seed(0)
    wanted, importance = torch.randn(5, 100), torch.rand(5, 200)
    strided = search(backend, wanted.T, importance.T[::2], 3)
    assert torch.equal(strided, search(backend, wanted.T.contiguous(), importance.T[::2].contiguous(), 3))
    other = torch.rand(100, 1).expand(100, 5)
    assert torch.equal(
        search(backend, wanted.T, other, 3), search(backend, wanted.T.contiguous(), other.contiguous(), 3)
    )


# --- linear ----------------------------------------------------------------------------------------------------------------


@LINEARS
@EACH_BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_equal_float64_for_odd_shapes_and_ragged_groups(dtype: torch.dtype, bits: int, backend: str) -> None:
    torch.manual_seed(0)
    run = implementations.implementation("trellis_linear", backend)
    for index, (k, n) in enumerate((k, n) for k in (1, 31, 32, 63, 100, 192, 321) for n in (1, 63, 64, 65, 200)):
        m, group = (1, 2, 3, 5, 8, 16, 17, 40)[index % 8], (32, 64, 96, 128, 2**40)[index % 5]
        x, packed = torch.randn(m, k).to(dtype), random_packed(n, k, bits)
        scales = (torch.rand(n, -(-k // group)) + 0.5).mul(k**-0.5).to(dtype)
        bias = torch.randn(n).to(dtype) if index % 2 else None
        by_column = scales.double()[:, torch.arange(k) // group]
        weight = trellis.numbers().double()[trellis.unpack(packed, bits, n).long()] * by_column
        y = run(x, packed, scales, bias, bits, group)
        added = 0.0 if bias is None else bias.double()
        assert_close(y, x.double() @ weight.T + added, x.double().abs() @ weight.abs().T)


@LINEARS
def test_any_strides_and_scales_of_another_dtype(backend: str) -> None:
    torch.manual_seed(0)
    run = implementations.implementation("trellis_linear", backend)
    packed, scales, x = random_packed(100, 63, 3), torch.rand(100, 2).half(), torch.randn(3, 63).bfloat16()
    plain = run(x, packed, scales, None, 3, 32)
    strided = torch.stack((packed, -packed), dim=-1)[..., 0], torch.stack((scales, -scales), dim=0)[0].T.contiguous().T
    assert strided[0].stride(-1) == 2
    assert torch.equal(run(x.T.contiguous().T, *strided, None, 3, 32), plain)
    exact = x.double() @ trellis.dequantize(packed, scales, 3, 32, torch.float64).T
    size = x.double().abs() @ trellis.dequantize(packed, scales, 3, 32, torch.float64).abs().T
    assert_close(plain, exact, size)


@pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 29), (torch.bfloat16, 15), (torch.float16, 15)], ids=str)
def test_small_activations_beside_large_ones_lose_what_lies_below_the_last_digit(
    dtype: torch.dtype, digits: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 100).mul(torch.logspace(-6, 2, 100)[torch.randperm(100)]).to(dtype)
    packed, scales = random_packed(65, 100, 3), torch.rand(65, 4)
    weight = trellis.dequantize(packed, scales, 3, 32, torch.float64)
    y = implementations.implementation("trellis_linear", "cpu")(x, packed, scales, None, 3, 32).double()
    lost = sum(
        x.double()[:, k].abs().amax(1, keepdim=True) * weight[:, k].abs().sum(1) * 2.0**-digits
        for k in torch.arange(100).split(32)
    )
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    limit = lost + 8 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * exact.abs()
    assert bool(((y - exact).abs() <= limit).all())


@pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_that_is_not_finite_spoils_its_token_and_no_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, scales = random_packed(65, 100, 3), torch.rand(65, 4)
    run = implementations.implementation("trellis_linear", "cpu")
    for tokens in (1, 2, 4, 9):
        x = torch.randn(tokens, 100).to(dtype)
        clean = run(x, packed, scales, None, 3, 32)
        x[-1, 70] = torch.inf
        y = run(x, packed, scales, None, 3, 32)
        assert torch.equal(y[:-1], clean[:-1])
        assert bool(y[-1].isnan().all())


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, *weights = implementations.example("trellis_linear", torch.device("cpu"), torch.float32)
    x = torch.randn(*shape, x.shape[-1])
    y = ops.trellis_linear(x, *weights)
    with dispatch.use("reference"):
        rows = ops.trellis_linear(x.reshape(-1, x.shape[-1]), *weights)
    assert y.shape == (*shape, rows.shape[-1])
    torch.testing.assert_close(y, rows.reshape(y.shape))


def test_gradients_of_x_of_scales_and_of_bias() -> None:
    x, packed, scales, bias, bits, group = implementations.example("trellis_linear", torch.device("cpu"), torch.float64)
    floats = [tensor.clone().requires_grad_() for tensor in (x, scales, bias)]

    def run(x: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.lorap.trellis_linear(x, packed, scales, bias, bits, group)

    assert torch.autograd.gradcheck(run, floats, fast_mode=True)


@pytest.mark.parametrize("call", [torch.ops.lorap.trellis_linear, ops.trellis_linear])
def test_weights_that_do_not_fit_are_refused_with_their_numbers(call: Any) -> None:
    x, packed, scales, bias, bits, group = implementations.example("trellis_linear", torch.device("cpu"), torch.float32)
    for wrong, said in [
        ((x, packed[:, :-1], scales, bias, bits, group), "packed: shape (2, 1055), but 112 rows and 176 columns of 3 bits"),
        ((x, packed, scales[:, :-1], bias, bits, group), "the scales of packed: shape (112, 5), but 112 rows"),
        ((x, packed, scales[:60], bias[:60], bits, group), "packed: shape (2, 1056), but 60 rows"),
        ((x, packed, scales, bias, 4, group), "columns of 4 bits in groups of 32 make (2, 1408)"),
        ((x, packed, scales, bias, 7, group), "packed has weights of 7 bits; it must be 2 to 6"),
        ((x, packed, scales, bias, bits, 48), "groups of 48"),
        ((x, packed.long(), scales, bias, bits, group), "packed is torch.int64, not int32"),
        ((x.long(), packed, scales, bias, bits, group), "x is torch.int64, not floating point"),
        ((x, packed, scales.int(), bias, bits, group), "scales of packed are torch.int32"),
        ((x, packed, scales, bias[:-1], bits, group), "bias has shape (111,), the output has 112"),
    ]:  # fmt: skip
        with pytest.raises(ShapeError, match=re.escape(said)):
            call(*wrong)


@pytest.mark.parametrize("call", [torch.ops.lorap.trellis_search, ops.trellis_search])
def test_searches_that_do_not_fit_are_refused_with_their_numbers(call: Any) -> None:
    one = torch.ones(5, 3)
    for wrong, said in [
        ((one[0], one[0], 3), "wanted has shape (3,); it must have 2 dimensions"),
        ((one, one[:, :2], 3), "wanted has shape (5, 3), importance (5, 2); they must be the same"),
        ((one, one.int(), 3), "importance is torch.int32, not floating point"),
        ((one, one, 7), "of 7 bits"),
    ]:
        with pytest.raises(ShapeError, match=re.escape(said)):
            call(*wrong)
