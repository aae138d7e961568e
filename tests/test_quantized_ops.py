"""The ops on weights of 4 and 8 bits: values against float64, odd shapes, gradients, and what does not fit.

What torch does with an op besides is in tests/test_ops.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lorap import ShapeError
from lorap.kernels import packing, reference
from lorap.nn import dispatch, implementations, native, ops, unpacked

# Backends that have these ops here.
BACKENDS = [
    "reference",
    *(["cpu"] if native.HAS_CPU and implementations.QUANTIZED_OPS[0] in implementations.IMPLEMENTATIONS["cpu"] else []),
]
needs_library = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
FEATURES, RANKS, OUTPUTS = (1, 31, 32, 63, 100, 192), (1, 17, 33), (1, 63)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Packed numbers, scales, and the exact weight in float64, made element by element."""
    half = 2 ** (bits - 1)
    numbers = torch.randint(-half, half, (rows, columns))
    numbers[0, 0], numbers[-1, -1] = -half, half - 1  # both ends of the range
    scales = (torch.rand(rows, -(-columns // group)) + 0.5).mul(columns**-0.5 / half).to(dtype)
    exact = numbers.double() * scales.double()[:, torch.arange(columns) // group]
    return packing.pack(numbers, bits), scales, exact


def assert_close(y: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within a few roundings of the sums of absolute values, and of one weight each."""
    limit = 8 * torch.finfo(y.dtype).eps * (size + exact.abs()) + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape
    assert float(((y.double() - exact).abs() / limit).max()) <= 1


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 63, 100])
def test_packed_words_are_those_of_the_layout(bits: int, columns: int) -> None:
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns))
    packed = packing.pack(numbers, bits)
    assert packed.dtype == torch.int32
    for row, words in zip(numbers.tolist(), packed.tolist(), strict=True):
        stream = sum((q + 2 ** (bits - 1)) << (bits * i) for i, q in enumerate(row))
        assert words == [((stream >> 32 * w & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 for w in range(len(words))]
        assert len(words) == -(-columns * bits // 32)
    assert torch.equal(packing.unpack(packed, bits, columns).long(), numbers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_word_a_row_with_any_stride_and_a_group_that_no_row_fills(backend: str) -> None:
    torch.manual_seed(0)
    packed, scales, exact = quantized(5, 3, 8, 2**40, torch.float32)
    strided = torch.stack((packed, -packed), dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    x = torch.randn(2, 3)
    y = implementations.implementation("quantized_linear", backend)(x, strided, scales, None, 8, 2**40)
    assert_close(y, x.double() @ exact.T, x.double().abs() @ exact.abs().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_equal_float64_for_odd_shapes_and_ragged_groups(backend: str, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    run = {op: implementations.implementation(op, backend) for op in implementations.QUANTIZED_OPS}
    for index, (k, r, n) in enumerate((k, r, n) for k in FEATURES for r in RANKS for n in OUTPUTS):
        m, group = (1, 2, 5, 17)[index % 4], (32, 64, 128)[index % 3]
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if index % 2 else None
        added = 0.0 if bias is None else bias.double()
        packed, scales, weight = quantized(n, k, bits, group, dtype)
        other_packed, other_scales, other = quantized(n, k, bits, group, dtype)
        right_packed, right_scales, right = quantized(r, k, bits, group, dtype)
        left_packed, left_scales, left = quantized(n, r, bits, group, dtype)
        xd = x.double()
        y = run["quantized_linear"](x, packed, scales, bias, bits, group)
        assert_close(y, xd @ weight.T + added, xd.abs() @ weight.abs().T)
        y = run["quantized_low_rank_linear"](x, left_packed, left_scales, right_packed, right_scales, bias, bits, group)
        assert_close(y, xd @ right.T @ left.T + added, xd.abs() @ right.abs().T @ left.abs().T)
        y = run["quantized_silu_gated_linear"](x, packed, scales, other_packed, other_scales, bits, group)
        gate, up = xd @ weight.T, xd @ other.T
        sizes = (xd.abs() @ weight.abs().T + 1) * (xd.abs() @ other.abs().T + 1)
        assert_close(y, torch.nn.functional.silu(gate) * up, sizes)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", packing.BITS)
def test_the_weight_made_in_one_op_is_that_of_the_reference(bits: int, dtype: torch.dtype) -> None:
    assert_same_weights(bits, dtype)


def assert_same_weights(bits: int, dtype: torch.dtype) -> None:
    """Bit by bit, of scales in other dtypes, and of views that do not begin where their memory does."""
    torch.manual_seed(0)
    make, threads = torch.ops.lorap_cpu.quantized_weight.default, torch.get_num_threads()
    for index, (n, k) in enumerate((n, k) for n in (1, 63, 100) for k in (1, 63, 100, 577)):
        group, scale_dtype = (32, 64, 96, 4224)[index % 4], DTYPES[index % 3]
        packed, scales, _ = quantized(n + 3, k, bits, group, scale_dtype)
        packed, scales = packed[3:], torch.cat((scales, scales), dim=1)[3:, -scales.shape[1] :]
        expected = packing.dequantize(packed, scales, bits, group, k, dtype)
        for count in (1, 2):
            torch.set_num_threads(count)
            found = make(packed, scales, k, bits, group, dtype)
            assert found.dtype == dtype
            assert torch.equal(found, expected)
    torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("op", implementations.FEW_BITS_OPS)
def test_many_tokens_are_multiplied_with_some_rows_after_the_other(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks of 64, the last one smaller, equal those of the whole weight."""
    monkeypatch.setattr(unpacked, "BLOCK_BYTES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for pivoted in (False, True):
            x, *weights = implementations.example(op, torch.device("cpu"), dtype, 40, 100, pivoted)
            x = torch.cat((x, x), dim=1)[:, :100]  # gaps between its rows
            with torch.no_grad():
                y = getattr(unpacked, op)(x, *weights)
            expected = getattr(reference, op)(x, *weights)
            torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pivots_are_the_outputs_of_the_first_factor(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    run = implementations.implementation("quantized_low_rank_linear", backend)
    for m, k, r, n in ((1, 100, 17, 63), (3, 63, 1, 1), (2, 33, 40, 5)):
        right_packed, right_scales, right = quantized(r, k, 8, 64, dtype)
        left_packed, left_scales, left = quantized(n, r, 8, 64, dtype)
        x, rows = torch.randn(m, k).to(dtype), torch.randperm(n + r)[:r].sort().values
        others = torch.tensor(sorted({*range(n + r)} - {*rows.tolist()}))
        bias = torch.randn(n + r).to(dtype)
        exact, sizes = torch.empty(m, n + r).double(), torch.empty(m, n + r).double()
        xd = x.double()
        exact[:, rows], sizes[:, rows] = xd @ right.T, xd.abs() @ right.abs().T
        exact[:, others], sizes[:, others] = xd @ right.T @ left.T, xd.abs() @ right.abs().T @ left.abs().T
        for added in (None, bias):
            y = run(x, left_packed, left_scales, right_packed, right_scales, added, 8, 64, rows)
            total = 0 if added is None else added.double()
            assert_close(y, exact + total, sizes + abs(total))
    with pytest.raises(ShapeError, match="pivot_rows has shape \\(39,\\); one row per rank is needed"):
        ops.quantized_low_rank_linear(x, left_packed, left_scales, right_packed, right_scales, bias, 8, 64, rows[1:])


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("op", implementations.QUANTIZED_OPS)
def test_any_leading_shape(op: str, shape: tuple[int, ...]) -> None:
    x, *weights = implementations.example(op, torch.device("cpu"), torch.float32)
    x = torch.randn(*shape, x.shape[-1])
    y = getattr(ops, op)(x, *weights)
    with dispatch.use("reference"):
        rows = getattr(ops, op)(x.reshape(-1, x.shape[-1]), *weights)
    assert y.shape == (*shape, rows.shape[-1])
    torch.testing.assert_close(y, rows.reshape(y.shape))


@pytest.mark.parametrize("op", implementations.QUANTIZED_OPS)
def test_gradients_of_x_and_of_scales(op: str) -> None:
    arguments = implementations.example(op, torch.device("cpu"), torch.float64)

    def run(*floats: Tensor) -> Any:
        given = iter(floats)
        filled = [next(given) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        return getattr(torch.ops.lorap, op)(*filled)

    floats = [a.clone().requires_grad_() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    floats[0] = floats[0].detach()[:1, :].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, floats, fast_mode=True)


@pytest.mark.parametrize("call", [torch.ops.lorap.quantized_linear, ops.quantized_linear])
def test_what_does_not_fit_is_refused_with_its_numbers(call: Any) -> None:
    x, packed, scales, bias, bits, group = implementations.example(
        "quantized_linear", torch.device("cpu"), torch.float32
    )
    for wrong, said in [
        ((x, packed[:, :-1], scales, bias, bits, group), "packed: shape (112, 21), but 176 columns of 4 bits"),
        (
            (x, packed, scales[:, :-1], bias, bits, group),
            "(112, 5), but 176 columns of 4 bits in groups of 32 make (112, 6)",
        ),
        ((x, packed, scales, bias, bits, 64), "(112, 6), but 176 columns of 4 bits in groups of 64 make (112, 3)"),
        ((x, packed, scales, bias, 8, group), "packed: shape (112, 22), but 176 columns of 8 bits"),
        ((x, packed, scales, bias, 3, group), "3 bits"),
        ((x, packed, scales, bias, bits, 48), "groups of 48"),
        ((x, packed.long(), scales, bias, bits, group), "packed is torch.int64, not int32"),
        ((x.int(), packed, scales, bias, bits, group), "x is torch.int32, not floating point"),
        ((x, packed, scales.int(), bias, bits, group), "scales of packed are torch.int32"),
        ((x, packed, scales, bias[:-1], bits, group), "bias has shape (111,), the output has 112"),
    ]:
        with pytest.raises(ShapeError, match=re.escape(said)):
            call(*wrong)
