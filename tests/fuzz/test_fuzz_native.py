"""The C++ operators with tensors of every kind of trouble: under the sanitizers for a moment, and what was found there before."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import fuzz_native
import pytest
import torch
from safetensors.torch import load_file

from lorap.errors import ShapeError
from lorap.nn import native, ops
from lorap.nn.implementations import implementation

needs_library = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")
CALLS = 4000


@pytest.mark.slow  # `make test` has the kernels alone, in tests/test_native.py
@pytest.mark.skipif(fuzz_native.why_not() is not None, reason=str(fuzz_native.why_not()))
def test_the_operators_pass_the_sanitizers() -> None:
    fuzz_native.build()
    run = fuzz_native.run_cases_apart("--cases", str(CALLS), "--minutes", "0.7")
    assert run.returncode == 0, run.stderr[run.stderr.rfind("\ncase ") :][:8000]
    counts = {
        word: int(number.replace(",", ""))
        for number, word in (part.split() for part in run.stdout.split(": ")[1].split(", "))
    }
    assert counts["equal"] > counts["refused"] > sum(counts.values()) // 10


@pytest.mark.slow
@pytest.mark.skipif(fuzz_native.why_not() is not None, reason=str(fuzz_native.why_not()))
def test_the_steps_of_layers_pass_the_sanitizers() -> None:
    """The tests of the operator that computes a whole layer, which has too many arguments to be called with anything."""
    fuzz_native.build()
    tests = Path(__file__).parents[1] / "test_decoder_layer.py"
    run = fuzz_native.run_sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "passed" in run.stdout


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@needs_library
def test_weights_may_lie_at_any_byte_of_a_file(dtype: torch.dtype, shift: int, tmp_path: Path) -> None:
    """safetensors maps files into memory, and nothing makes a header end at a multiple of 8."""
    torch.manual_seed(0)
    weight, x = torch.randn(17, 33).to(dtype), torch.randn(3, 33).to(dtype)
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header = json.dumps({"w": {"dtype": name, "shape": [17, 33], "data_offsets": [0, weight.nbytes]}})
    header += " " * (-len(header) % 8 + shift)
    data = bytes(weight.view(torch.uint8).numpy())
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    stored = load_file(tmp_path / "w.safetensors")["w"]
    assert stored.data_ptr() % 8 == shift
    assert torch.equal(implementation("linear", "cpu")(x, stored), implementation("linear", "cpu")(x, weight))


@needs_library
def test_the_stride_of_a_single_row_means_nothing() -> None:
    row = torch.arange(8.0).as_strided((1, 8), (2**61, 1))
    assert implementation("linear", "cpu")(torch.ones(2, 8), row).tolist() == [[28.0], [28.0]]


@needs_library
def test_nothing_to_read_is_no_trouble() -> None:
    bias = torch.arange(3.0)
    assert implementation("linear", "cpu")(torch.ones(2, 0), torch.ones(3, 0), bias).tolist() == [[0.0, 1.0, 2.0]] * 2
    through_nothing = implementation("low_rank_linear", "cpu")(
        torch.ones(2, 5), torch.ones(0, 5), torch.ones(3, 0), bias
    )
    assert through_nothing.tolist() == [[0.0, 1.0, 2.0]] * 2
    assert implementation("linear", "cpu")(torch.ones(1).expand(2**40, 0), torch.ones(0, 0)).shape == (2**40, 0)


@needs_library
def test_more_elements_than_can_be_counted_are_refused() -> None:
    linear, group = (implementation(op, "cpu") for op in ("linear", "low_rank_linear_group"))
    huge = torch.ones(1, 1).expand(2**62, 1)
    with pytest.raises(RuntimeError, match="elements are too many"):
        linear(torch.ones(3, 5, 1), huge)
    with pytest.raises(RuntimeError, match="elements are too many"):
        group(torch.ones(1, 1), [torch.ones(1, 1)] * 2, [huge] * 2, [], [])


@needs_library
def test_what_the_reference_refuses_the_kernels_refuse() -> None:
    x, weight, right = torch.ones(2, 5), torch.ones(3, 5), torch.ones(2, 5)
    for bias in (torch.ones(0), torch.ones(1, 3), torch.ones(3, 1)):
        with pytest.raises(ShapeError, match="bias has shape"):
            ops.linear(x, weight, bias)
    for pivots in (torch.empty(0, dtype=torch.int64), torch.tensor([[0, 1]])):
        with pytest.raises(ShapeError, match="pivot_rows has shape"):
            ops.low_rank_linear(x, right, torch.ones(3, 2), None, pivots)


def test_a_meta_tensor_among_real_ones_is_refused() -> None:
    """Otherwise the result would be memory that nobody has written."""
    with pytest.raises(ShapeError, match="the tensors are on different devices: cpu, meta"):
        torch.ops.lorap.linear(torch.ones(2, 5), torch.ones(3, 5, device="meta"))
