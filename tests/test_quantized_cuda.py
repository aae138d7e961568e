"""The CUDA decode kernel on weights of 4 and 8 bits without a GPU: its machine code, and its source run on the host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_sources import (
    QUANTIZED_KERNEL,
    broken_emulator,
    build_operators,
    compiled,
    every_arch,
    needs_gxx,
    needs_nvcc,
    run,
    run_emulated,
)

from lorap.nn import cuda_limits

# Numbers that a thread unpacks in the code of each kernel: four rows of what one load brings, in 4 and in 8 bits; then eight
# of each row, from shared memory or from where the rest of `left` is.
UNPACKED = 4 * (32 + 16) + 2 * 2 * 4 * 8


@needs_nvcc
@every_arch
def test_machine_code(arch: str, tmp_path: Path) -> None:
    log, functions = compiled(QUANTIZED_KERNEL, arch, tmp_path / "kernel.cubin")
    instances = set(re.findall(r"Function properties for \S*low_rank_decode_kernelI(\w+?Li\d)E", log))
    assert instances == {f"{scalar}Li{m}" for scalar in ("13__nv_bfloat16", "6__half") for m in (1, 2, 4, 8)}
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames == [("0", "0", "0")] * 8
    registers = dict(
        re.findall(r"Function properties for \S*kernelI(\w+?Li\d)E.*?Used (\d+) registers", log, re.DOTALL)
    )
    # A block has a multiprocessor to itself, 255 registers a thread; for 1 and 2 tokens the loads are few.
    assert max(int(count) for name, count in registers.items() if name[-1] in "12") <= 208, registers
    assert max(map(int, registers.values())) <= 255

    if functions is None:
        pytest.skip("registers and spills hold; the instructions need cuobjdump")
    for name, code in functions:
        loads = re.findall(r"\b(LDG\.\S+|LDGSTS\S+|LDL\S*)", code)
        assert loads.count("LDG.E.EF.128") == 2 * 4, name  # words of right: of four rows at once, in 4 and in 8 bits
        first = code[: code.index("FFMA")]
        assert first.count("LDG.E.EF.128") == 4, name  # all on their way before the first is used
        assert "LDGSTS.E.BYPASS.128" in loads, name  # left
        assert "LDGSTS.E.BYPASS.128.ZFILL" in loads, name  # its scales, which need not end where 16 bytes do
        narrow = {load for load in loads if "128" not in load and "STRONG" not in load}
        # scales, the bias, and rows of left that did not fit, in 4 and in 8 bits
        assert narrow == {"LDG.E.EF.U16", "LDG.E.U16", "LDG.E.EF", "LDG.E.EF.64"}, name
        assert len(re.findall(r"LOP3\.LUT R\d+, R\d+(?:\.reuse)?, 0xf+0*, R\d+(?:\.reuse)?, 0xea", code)) == UNPACKED, (
            name
        )
        assert "I2F" not in code, name
        assert ("UBLKPF" in code) == (arch != "80"), name  # both factors are fetched to L2 at the start


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    return run_emulated(tmp_path_factory)


# As in test_cuda_compile.py; then 0, bits and groups, one for each layer.
CASES = {
    "one token, 4 bits": "bfloat16 1 64 32 63 1 3 65536 0 0 4 32",
    "one token, 8 bits": "float16 1 64 16 63 1 3 65536 0 0 8 32",
    "K of one vector": "float16 2 32 32 33 0 3 65536 0 0 4 64",
    "K longer than a block, 4 bits": "bfloat16 1 8256 96 63 1 3 65536 0 0 4 64",
    "K longer than a block, 8 bits": "float16 1 4176 80 63 1 3 65536 0 0 8 128",
    "K and R end within a group": "float16 3 160 96 101 1 3 65536 0 0 4 64",
    "groups that are no power of two": "bfloat16 4 416 224 65 0 2 65536 0 0 4 96",
    "a group longer than a row": "bfloat16 2 96 64 40 1 3 65536 0 0 8 4096",
    "five tokens": "float16 5 288 160 100 1 3 65536 0 0 4 32",
    "six tokens, all warps share a row": "bfloat16 6 7936 32 47 0 3 65536 0 0 4 128",
    "seven tokens, four warps share a row": "float16 7 4096 256 21 1 3 65536 0 0 4 64",
    "eight tokens, each warp has rows of its own": "bfloat16 8 64 1056 65 1 2 200000 0 0 8 64",
    "one output": "float16 8 64 96 1 1 2 65536 0 0 4 32",
    "one block": "bfloat16 2 64 96 70 1 1 65536 0 0 4 32",
    "rank 16 and more blocks than that": "float16 3 64 16 5 1 20 65536 0 0 8 32",
    "rank 32 and more blocks than rows of left": "bfloat16 1 64 32 9 1 12 65536 0 0 4 32",
    "left prefetched in part, 4 bits": "bfloat16 1 256 96 333 1 3 4500 0 0 4 64",
    "left prefetched in part, 8 bits": "float16 3 256 48 333 1 3 5000 1 0 8 32",
    "left not prefetched": "bfloat16 8 64 32 333 1 4 2100 0 0 4 32",
    "scales of left that begin and end anywhere": "bfloat16 1 64 32 113 1 7 65536 0 0 4 32",
    "pivots between the others": "bfloat16 1 256 96 333 1 3 65536 1 0 8 64",
    "pivots first": "float16 3 256 64 333 0 3 65536 2 0 8 128",
    "pivots last, 4 bits": "bfloat16 8 96 32 99 1 4 65536 3 0 4 64",
    "all rows are pivots": "float16 2 160 64 64 1 3 65536 1 0 4 32",
    "three layers": "bfloat16 1 288 96,32,64 70,33,65 1 3 65536 0 0 4 64",
    "three layers of different bits and groups": "float16 8 352 32,64,96 40,65,101 1,0 4 65536 0,1,3 0 4,8,4 32,64,128",
    "three layers, left prefetched in part": "float16 3 96 32,64,96 66,99,125 1 3 10000 0,1,3 0 8,4,8 32,64,96",
    "two layers, the second without rank": "bfloat16 4 96 64,0 63,41 1 3 65536 0 0 4 64",
    "three layers, one of nothing but pivots": "bfloat16 8 96 0,32,32 13,32,37 0,1,0 2 65536 0,1,2 0 8,4,8 64",
    "three layers, more blocks than rows of any": "float16 2 64 16,32,16 20,40,17 1 16 65536 1,0,3 0 8 32",
}
EACH_M = {
    f"{m} tokens": (
        f"{('bfloat16', 'float16')[m % 2]} {m} {32 * (3 * m % 17 + 1)} {32 * (m % 3 + 1)},{32 * (m % 5)},{32 * (m % 2 + 1)} "
        f"{32 * (m % 3) + m % 7 + 33},{32 * (m % 5) + 5},{32 * (m % 2 + 1) + 11 * (m // 4 % 2)} {m % 2},1,{m // 2 % 2} "
        f"{3 + m // 4} 200000 {m % 4},{(m + 1) % 4},{(m + 2) % 4} 0 {4 + 4 * (m % 2)},4,{8 - 4 * (m // 2 % 2)} 64,32,{32 * m}"
    )
    for m in range(1, 9)
}


@needs_gxx
@pytest.mark.parametrize("case", [*CASES.values(), *EACH_M.values()], ids=[*CASES, *EACH_M])
def test_emulated_kernel_matches_float64(case: str, emulate) -> None:
    """Errors are relative to the sum of absolute products, for y beyond its rounding to 16 bits."""
    _, tokens, _, ranks, outputs, _, blocks, limit, pivoted, *_ = case.split()
    ranks, outputs, pivoted = ([int(number) for number in one.split(",")] for one in (ranks, outputs, pivoted))
    pivots = [rank if (pivoted * 3)[i] else 0 for i, rank in enumerate(ranks)]
    rows = [n - count for n, count in zip((outputs * 3)[: len(ranks)], pivots, strict=True)]
    shrunk_error, y_error, shared_bytes, grid_barriers = emulate(case)
    assert shrunk_error < 3e-7
    assert y_error < 3e-7
    assert grid_barriers == 1
    needed = cuda_limits.shared_bytes(int(tokens), ranks, rows, pivots, int(blocks))
    assert needed <= shared_bytes <= int(limit)


@needs_gxx
def test_emulated_prefetch_uses_the_shared_memory_there_is(emulate) -> None:
    """111 rows of left a block, of 48 bytes and two scales; the scales begin and end anywhere, so they take 16 bytes more."""
    exchange = 4 * 8 * 32
    assert emulate("bfloat16 1 256 96 333 1 3 65536 0 0 4 64")[2] == exchange + 111 * 48 + 16 * -(-(111 * 4 + 16) // 16)
    assert emulate("bfloat16 1 256 96 333 1 3 4500 0 0 4 64")[2] == exchange + 64 * 48 + 64 * 4 + 16
    assert emulate("bfloat16 8 64 32 333 1 4 2100 0 0 4 32")[2] == 4 * 8 * 8 * 8


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        CASES["scales of left that begin and end anywhere"],
        CASES["left prefetched in part, 8 bits"],
        CASES["three layers of different bits and groups"],
        CASES["three layers, more blocks than rows of any"],
    ],
)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_no_races_and_no_access_out_of_bounds(case: str, sanitizer: str, emulate) -> None:
    emulate(case, sanitizer)


BROKEN = {  # what, instead of what, in which case it shows
    "a scale of another group": ("inverse, v * (128", "inverse, v * (64", "K longer than a block, 4 bits"),
    "scales of left from where 16 bytes begin": (
        "prefetched + layer.scales_at) + first_scale % int(sizeof(uint4) / sizeof(Scalar))",
        "prefetched + layer.scales_at)",
        "scales of left that begin and end anywhere",
    ),
    "a number that is not centered": ("(1 << (kBits - 1)))", "(1 << (kBits - 2)))", "one token, 4 bits"),
    "warps add up rows of others": (
        "if (warp < 1 << warps_log2<kPacked>(layer)) sum",
        "sum",
        "seven tokens, four warps share a row",
    ),
}


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_emulator_notices_a_fault(fault: str, tmp_path: Path) -> None:
    right, wrong, case = BROKEN[fault]
    program = broken_emulator(tmp_path, right, wrong)
    result = subprocess.run([program, *CASES[case].split()], capture_output=True, text=True)
    assert result.returncode == 1 or float(result.stdout.split()[1]) > 1e-4, result.stdout


@needs_gxx
def test_operators_around_the_emulated_kernel(tmp_path: Path) -> None:
    """cuda/ops.cpp with the CPU in place of the GPU, in its own process, since it takes the operators' names."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(QUANTIZED_KERNEL.parents[2])}
    run([sys.executable, "-c", OPERATOR_SCRIPT, build_operators(tmp_path)], env=environment)


@needs_gxx
def test_projections_of_a_model_reach_the_emulated_kernel(tmp_path: Path) -> None:
    """lorap's own calls, single and merged, with the library of this machine out of sight and tensors that pass for a GPU's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(QUANTIZED_KERNEL.parents[2])}
    run([sys.executable, "-c", LAYER_SCRIPT, build_operators(tmp_path)], env=environment)


LAYER_SCRIPT = """
import pathlib, sys, types, torch
there = pathlib.Path.exists
pathlib.Path.exists = lambda path, **options: path.name != "_native.so" and there(path, **options)
torch.ops.load_library(sys.argv[1])
from lorap.nn import cuda_limits, dispatch
from lorap.nn.fused import SharedInput
from lorap.nn.linear import LowRankLinear
from lorap.nn.quantized import QuantizedLinear

gpu = types.SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024, multi_processor_count=132)
torch.cuda.get_device_properties = lambda _: gpu
dispatch.choose = lambda op, *_, without=None: "reference" if without or not op.startswith("quantized") else "cuda"
pays = cuda_limits.pays_packed
calls = []
cuda_limits.pays_packed = lambda tokens, x, layers: calls.append(len(layers)) or pays(tokens, x, layers)

def projection(n, rank, bits, group, bias, pivoted):
    rows = torch.randperm(n)[:rank].sort().values if pivoted else None
    left_rows = n - rank if pivoted else n
    some = torch.randn(n).bfloat16() if bias else None
    layer = LowRankLinear.from_factors(torch.zeros(left_rows, rank), torch.zeros(rank, 192), some, rows)
    for name, shape in (("right", (rank, 192)), ("left", (left_rows, rank))):
        numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
        scales = torch.rand(shape[0], -(-shape[1] // group)).mul(2.0**-bits).bfloat16()
        own = getattr(layer, name).bias
        setattr(layer, name, QuantizedLinear.from_numbers(numbers, scales, bits=bits, group_size=group, bias=own))
    return layer

sizes = (112, 96, 4, 64, True, False), (80, 32, 8, 32, True, True), (63, 64, 4, 128, False, False)
layers = [projection(*one) for one in sizes]
x = torch.randn(2, 192).bfloat16()
exact = [x.double() @ layer.reconstruct(dtype=torch.float64).T for layer in layers]
exact = [y if layer.bias is None else y + layer.bias.double() for y, layer in zip(exact, layers)]
with torch.no_grad():
    for merged in (False, True):
        if merged:
            SharedInput(layers)
            torch.Tensor.is_cuda = property(lambda _: True)
        for layer, wanted in zip(layers, exact):
            torch.testing.assert_close(layer(x).double(), wanted, rtol=2**-7, atol=2e-3)
assert calls == [1, 1, 1, 3], calls
"""


OPERATOR_SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from lorap.kernels import packing, reference
one, group = torch.ops.lorap_cuda.quantized_low_rank_linear, torch.ops.lorap_cuda.quantized_low_rank_linear_group

def weight(rows, columns, bits, size, dtype):
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))
    scales = torch.rand(rows, -(-columns // size)).add(0.5).mul(2.0 ** (1 - bits) * columns**-0.5)
    return packing.pack(numbers, bits), scales.to(dtype)

def exact(x, left, right, bias, bits, size, rows=None):
    double = [t.double() if t.is_floating_point() else t for t in (*left, *right)]
    return reference.quantized_low_rank_linear(x.double(), *double, None if bias is None else bias.double(), bits, size, rows)

for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
    x, bias = torch.randn(2, 3, 160).to(dtype), torch.randn(100).to(dtype)
    for bits, size in ((4, 64), (8, 32), (8, 96)):
        right, left = weight(96, 160, bits, size, dtype), weight(100, 96, bits, size, dtype)
        for b in (bias, None):
            y = one(x, *left, *right, b, bits, size)
            assert y.dtype == dtype and y.shape == (2, 3, 100)
            torch.testing.assert_close(y.double(), exact(x, left, right, b, bits, size), rtol=tolerance, atol=1e-4)
    rows = torch.arange(96) * 2
    y = one(x, *left, *right, None, bits, size, rows)
    torch.testing.assert_close(y.double(), exact(x, left, right, None, bits, size, rows), rtol=tolerance, atol=1e-4)
    assert one(x[0, 0], *left, *right, bias, bits, size).shape == (100,)
    assert one(x[:0], *left, *right, bias, bits, size).shape == (0, 3, 100)

    few, some = (weight(64, 160, 4, 32, dtype), weight(33, 64, 4, 32, dtype)), (right, left)
    dense = weight(48, 160, 8, 64, dtype)  # every row a pivot
    gap = torch.empty(0, 12, dtype=torch.int32), torch.empty(0, 1, dtype=dtype)
    none, no_rows, all_rows = bias[:0], rows[:0], torch.arange(48)
    rights, lefts = zip(few[0], dense, some[0]), zip(few[1], gap, some[1])
    (rp, rs), (lp, ls) = map(list, rights), map(list, lefts)
    y = group(x, lp, ls, rp, rs, [bias[:33], none, none], [4, 8, 8], [32, 64, 96], [no_rows, all_rows, rows])
    assert y.shape == (2, 3, 33 + 48 + 196)
    first = exact(x, few[1], few[0], bias[:33], 4, 32)
    second = x.double() @ packing.dequantize(*dense, 8, 64, 160, torch.float64).T
    torch.testing.assert_close(y[..., :33].double(), first, rtol=tolerance, atol=1e-4)
    torch.testing.assert_close(y[..., 33:81].double(), second, rtol=tolerance, atol=1e-4)
    assert torch.equal(y[..., 81:], one(x, *left, *right, None, 8, 96, rows))

def refuses(message, op, *args):
    try:
        op(*args)
    except RuntimeError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(f"accepted: {message}")

words, scales = right
odd = torch.empty(words.numel() + 1, dtype=torch.int32)[1:].view(words.shape)
refuses("x has 12 tokens, at most 8", one, x.repeat(2, 1, 1), *left, *right, None, 8, 96)
refuses("weights have 4 or 8 bits, not 6", one, x, *left, *right, None, 6, 96)
refuses("a group of 48 weights is no multiple of 32", one, x, *left, *right, None, 8, 48)
refuses("right_packed must have rows of 20 words for 160 columns of 4 bits", one, x, *left, *right, None, 4, 96)
refuses("right_scales must be (96, 3) for 160 columns in groups of 64", one, x, *left, *right, None, 8, 64)
refuses("left_scales must be (100, 1) for 96 columns in groups of 96", one, x, left[0], left[1][:, :0], *right, None, 8, 96)
refuses("left_packed must have rows of 24 words for 96 columns of 8 bits", one, x, left[0][:, :20], left[1], *right, None, 8, 96)
refuses("right_packed must be int32", one, x, *left, words.float(), scales, None, 8, 96)
refuses("right_packed must be contiguous", one, x, *left, words.T.contiguous().T, scales, None, 8, 96)
refuses("right_packed must start at a multiple of 16 bytes", one, x, *left, odd, scales, None, 8, 96)
late = torch.ones(101, dtype=dtype)[1:, None]
refuses("left_scales must start at a multiple of 16 bytes", one, x, left[0], late, *right, None, 8, 96)
refuses("right_scales and x must have the same dtype", one, x, *left, words, scales.float(), None, 8, 96)
wide, narrow = weight(96, 176, 4, 32, dtype), (*weight(9, 40, 8, 32, dtype), *weight(40, 160, 8, 32, dtype))
wide_x = torch.zeros(1, 176).to(dtype)
refuses("K = 176 and R = 96 must be multiples of 32 for weights of 4 bits", one, wide_x, *left, *wide, None, 4, 32)
refuses("K = 160 and R = 40 must be multiples of 16 for weights of 8 bits", one, x, *narrow, None, 8, 32)
refuses("bias has 99 elements, the output 100 rows", one, x, *left, *right, bias[1:], 8, 96)
refuses("pivot_rows must be 96 int64", one, x, *left, *right, None, 8, 96, rows[1:])
refuses("x must be bfloat16 or float16", one, x.float(), left[0], left[1].float(), words, scales.float(), None, 8, 96)
four = [[tensor] * 4 for tensor in (*left, *right)]
refuses("a group has 1 to 3 layers, not 4", group, x, *four, [], [8] * 4, [96] * 4, [])
two = [some[:2] for some in four]
refuses("2 layers, 2 left_scales, 1 right_scales, 2 bits, 2 group", group, x, *two[:3], [scales], [], [8] * 2, [96] * 2, [])
refuses("weights have 4 or 8 bits, not 5", group, x, *two, [], [8, 5], [96] * 2, [])
wide = weight(8, 8192, 8, 64, dtype), weight(8192, 32, 8, 64, dtype)
refuses("rank 8192 is too large for 8 tokens", one, torch.zeros(8, 32).to(dtype), *wide[0], *wide[1], None, 8, 64)
"""
