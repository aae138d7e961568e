"""Rounding to codes on a trellis, held against float64, against whole numbers of as many bits, and against its own formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lorap.algorithms import rounding
from lorap.algorithms.rounding import round_factors
from lorap.algorithms.trellis import DISTORTION, SPREAD, Trellis, fitted_scales, round_weight, spread_scales
from lorap.kernels import trellis as codes
from lorap.nn import ops

F64 = torch.float64
TRELLIS = Trellis(ops.trellis_search, codes.numbers())
SHAPES = [(1, 33, 32), (63, 100, 64), (100, 70, 256)]


def correlated(columns: int, tokens: int = 400) -> Tensor:
    """Second moment of inputs whose channels share a few directions and have different sizes."""
    x = torch.randn(tokens, columns, dtype=F64) + torch.randn(tokens, 3, dtype=F64) @ torch.randn(3, columns, dtype=F64)
    return (x * torch.logspace(-0.5, 0.5, columns, dtype=F64)[torch.randperm(columns)]).T @ x / tokens


def moment_of(columns: int) -> Tensor:
    """A symmetric one."""
    found = correlated(columns)
    return (found @ found.T) / found.diagonal().mean()


def error(weight: Tensor, stored: Tensor, moment: Tensor) -> float:
    """What the rounding does to the outputs."""
    difference = weight.double() - stored.double()
    return float((difference @ moment * difference).sum())


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_less_is_lost_than_by_whole_numbers_of_as_many_bits(bits: int, rows: int, columns: int, group: int) -> None:
    torch.manual_seed(columns)
    weight, moment = torch.randn(rows, columns), moment_of(columns)
    options = {"bits": bits, "group": group, "scale_dtype": torch.float32}
    found = round_weight(weight, moment, trellis=TRELLIS, **options)
    assert found.scales.shape == (rows, -(-columns // group))
    # What is stored is what was judged.
    packed = codes.pack(found.windows, bits)
    assert packed.shape == codes.packed_shape(rows, columns, bits)
    assert torch.equal(codes.dequantize(packed, found.scales, bits, group, F64), found.weight(F64))
    whole = rounding.round_weight(weight, moment, **options)
    ours, theirs = (error(weight, one.weight(F64), moment) for one in (found, whole))
    alone = error(weight, round_weight(weight, None, trellis=TRELLIS, **options).weight(F64), moment)
    if rows > 1:  # 63 of the 64 rows of one are free
        assert ours < 0.75 * theirs
        assert ours < 0.9 * alone


def test_the_error_of_gaussian_weights_is_the_one_that_budgets_count_with() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 64)
    for bits, expected in DISTORTION.items():
        found = round_weight(weight, None, trellis=TRELLIS, bits=bits, group=64, scale_dtype=torch.float32)
        assert float((weight - found.weight(torch.float32)).square().mean()) == pytest.approx(expected, rel=0.1)


def test_a_weight_that_is_most_of_a_layer_is_reached() -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(64, 100), torch.eye(100, dtype=F64)
    weight[5, 7], moment[7, 7] = 15.0, 1e4
    found = round_weight(weight, moment, trellis=TRELLIS, bits=3, group=64, scale_dtype=torch.bfloat16)
    assert float(found.weight(F64)[5, 7]) == pytest.approx(15, rel=0.02)
    scales = spread_scales(weight, moment.diagonal(), bits=3, group=64, dtype=torch.float32)
    usual = SPREAD * weight[:, :64].square().mean(1).sqrt()
    assert float(scales[5, 0]) == pytest.approx(15 / 3.4, rel=0.1)
    assert torch.allclose(scales[6:, 0], usual[6:])  # the other rows have theirs


def test_scales_are_fitted_to_the_numbers_that_there_are() -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(10, 70), moment_of(70)
    found = round_weight(weight, moment, trellis=TRELLIS, bits=2, group=32, scale_dtype=torch.float32)
    fitted = fitted_scales(weight, found, moment)
    metric = rounding.damped(moment)
    for row in range(10):
        parts = torch.zeros(3, 70, dtype=F64)
        for group in range(3):
            within = slice(32 * group, 32 * group + 32)
            parts[group, within] = found.numbers[row, within].double()
        root = torch.linalg.cholesky(metric)
        wanted = torch.linalg.lstsq((parts @ root).T, (weight[row].double() @ root)[:, None]).solution[:, 0]
        assert torch.allclose(fitted[row].double(), wanted, rtol=1e-4)


def test_groups_of_zeros_have_scales() -> None:
    weight = torch.zeros(3, 40)
    weight[0, :32] = torch.randn(32)
    for dtype in (torch.float16, torch.bfloat16):
        assert bool((spread_scales(weight, torch.ones(40), bits=3, group=32, dtype=dtype) > 0).all())
        found = round_weight(weight, torch.eye(40, dtype=F64), trellis=TRELLIS, bits=3, group=32, scale_dtype=dtype)
        assert bool(torch.isfinite(found.scales).all())
        assert float(found.weight(F64)[1:].abs().max()) < 1e-6


def test_factors_on_the_trellis_are_near_their_product() -> None:
    torch.manual_seed(0)
    left, right, moment = torch.randn(100, 20), torch.randn(20, 70), moment_of(70)
    to_codes = partial(round_weight, trellis=TRELLIS, bits=4, group=64, scale_dtype=torch.bfloat16)
    found = round_factors(left, right, moment, to_codes)
    product = found[0].weight(F64) @ found[1].weight(F64)
    zeros = torch.zeros_like(product)
    assert error(left @ right, product, moment) < 0.02 * error(left @ right, zeros, moment)
