"""The CUDA decode kernels without a GPU: what the compiler made of them, and their own source run on the host.

``csrc/emulation`` executes every CUDA thread of ``csrc/cuda/*.cu`` as a fiber; see the head of
``cuda_emulation.h`` for what that shows. Speed is not tested here. Parts skip where nvcc or g++ is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from cuda_sources import (
    CSRC,
    KERNEL,
    MMA_KERNEL,
    NVCC,
    STABLE_ABI,
    broken_emulator,
    build_operators,
    compiled,
    every_arch,
    link_torch,
    needs_gxx,
    needs_nvcc,
    run,
    run_emulated,
)

from lorap.nn import cuda_limits

# What the compiler made of the kernels


@needs_nvcc
@every_arch
def test_machine_code(arch, tmp_path):
    log, functions = compiled(KERNEL, arch, tmp_path / "kernel.cubin")
    instances = set(re.findall(r"Function properties for \S*low_rank_decode_kernelI(\w+?Li\d)E", log))
    assert instances == {f"{scalar}Li{m}" for scalar in ("13__nv_bfloat16", "6__half") for m in (1, 2, 4, 8)}
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames == [("0", "0", "0")] * 8
    # One block of 256 threads per multiprocessor may use 255 registers a thread; a reserve, so that no change spills.
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == 8
    assert max(registers) <= 232

    if functions is None:
        pytest.skip("registers and spills hold; the instructions need cuobjdump")
    for name, code in functions:
        loads = re.findall(r"\b(LDG\.\S+|LDGSTS\S+|LDL\S*)", code)
        assert any(load.startswith("LDG.E.EF.128") for load in loads), name  # weights: evict first
        assert any(load.startswith("LDGSTS.E.BYPASS.128") for load in loads), name  # prefetch of left
        narrow = [load for load in loads if "128" not in load and "STRONG" not in load]
        assert set(narrow) == {"LDG.E.U16"}, name  # the bias, once per output


@needs_nvcc
@every_arch
def test_machine_code_for_tensor_cores(arch, tmp_path):
    """Weights are copied asynchronously, eight units ahead of the one that is multiplied, and nothing waits for more."""
    log, functions = compiled(MMA_KERNEL, arch, tmp_path / "kernel.cubin")
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        == [("0",) * 3] * 2
    )
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 168
    if functions is None:
        pytest.skip("registers and spills hold; the instructions need cuobjdump")
    assert len(functions) == 2
    for name, code in functions:
        assert "HMMA.16816.F32" + ".BF16" * ("bfloat16" in name) + " " in code, name
        loads = re.findall(r"\b(LDG\.\S+|LDGSTS\S+|LDL\S*)", code)
        assert set(loads) == {"LDGSTS.E.BYPASS.128", "LDG.E.128.STRONG.GPU", "LDG.E.U16"}, name  # the last is the bias
        assert set(re.findall(r"DEPBAR\.LE SB0, (\S+)", code)) == {"0x8"}, name  # groups that may be on their way
        before = code[: code.index("HMMA")]
        assert before.index("LDGSTS") < before.index("LDGDEPBAR") < before.index("DEPBAR.LE"), name
        assert len(re.findall(r"LDG\.E\.128", before)) >= 8, name  # x of two steps
        assert ("UCGABAR" in code) == (arch != "80"), name  # clusters


@needs_nvcc
@pytest.mark.slow
def test_the_program_that_checks_the_kernels_on_a_gpu_compiles(tmp_path):
    source = CSRC.parent / "benchmarks" / "check_decode.cu"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-I", CSRC / "cuda"]
    run([NVCC, "-std=c++17", *target, "-c", "-o", tmp_path / "check_decode.o", source])


@needs_nvcc
@needs_gxx
def test_stable_abi(tmp_path):
    """The object that meets torch needs nothing but torch's C interface, and loads into a torch without CUDA."""
    operators, kernel, library = tmp_path / "ops.o", tmp_path / "kernel.cpp", tmp_path / "lorap_cuda.so"
    run([NVCC, *STABLE_ABI, "-Xcompiler", "-fPIC", "-c", "-o", operators, CSRC / "cuda" / "ops.cpp"])
    undefined = run(["nm", "-uC", operators])
    assert "torch_library_impl" in undefined
    assert not re.search(r"\b(at|c10|torch)::|\bPy", undefined), undefined

    kernel.write_text(
        f'#include "{KERNEL.with_suffix(".h")}"\nnamespace lorap {{ {LAUNCHER} {{ return cudaSuccess; }} }}'
    )
    compile_and_link = [NVCC, "-std=c++20", "-Xcompiler", "-fPIC", "-shared", "-cudart", "static"]
    run([*compile_and_link, "-o", library, operators, kernel, *link_torch("-Xlinker")])
    script = (
        f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.lorap_cuda.low_rank_linear.default)"
    )
    assert "lorap_cuda.low_rank_linear.default" in run([sys.executable, "-c", script])


LAUNCHER = "cudaError_t low_rank_decode(const LowRankDecode&, DecodeType, cudaStream_t)"


# The kernel's source on the host


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    return run_emulated(tmp_path_factory)


# type, M, K, R, N, bias, blocks, shared memory of a block, pivots: 0 none, 1 every N/R-th row, 2 the first R, 3 the last R.
# R, N, bias and pivots have a number for each layer.
CASES = {
    "one token": "bfloat16 1 64 8 63 1 3 65536 0",
    "K longer than a block": "bfloat16 1 4104 264 63 1 3 65536 0",
    "two tokens": "float16 2 2056 24 100 0 2 65536 0",
    "tokens filled up to four": "bfloat16 3 72 40 130 1 3 65536 0",
    "four tokens": "float16 4 136 64 33 1 2 65536 0",
    "five tokens": "bfloat16 5 8 104 100 0 3 65536 0",
    "six tokens": "float16 6 520 16 63 1 3 65536 0",
    "seven tokens": "float16 7 2200 24 100 1 3 65536 0",
    "eight tokens": "bfloat16 8 64 264 65 1 2 65536 0",
    "one block": "bfloat16 2 64 72 70 1 1 65536 0",
    "one output": "float16 8 64 104 1 1 2 65536 0",
    "more blocks than rows": "float16 3 64 8 5 1 6 65536 0",
    "left prefetched in part": "bfloat16 1 256 40 333 1 3 4000 0",
    "left not prefetched": "bfloat16 5 8 16 333 1 4 1100 0",
    "pivots between the others": "bfloat16 1 256 40 333 1 3 65536 1",
    "pivots first, left prefetched in part": "float16 3 256 40 333 0 3 4400 2",
    "pivots last, left not prefetched": "bfloat16 8 72 16 99 1 4 1300 3",
    "more blocks than rows of left": "bfloat16 6 64 24 27 1 5 65536 1",
    "all rows are pivots": "float16 2 136 40 40 1 3 65536 1",
    "three layers": "bfloat16 1 264 40,16,72 70,33,65 1 3 65536 0",
    "three layers, left prefetched of the first and in part of the second": "float16 3 72 40,16,24 66,39,45 1 3 4300 0,1,3",
    "two layers, the second without rank": "bfloat16 4 72 24,0 63,41 1 3 65536 0",
    "three layers, the first without rank, one of nothing but pivots": "bfloat16 8 72 0,16,24 13,16,37 0,1,0 2 65536 0,1,2",
    "three layers of nothing but pivots": "float16 5 72 24,16,8 24,16,8 1,0,1 2 65536 1",
    "three layers, more blocks than rows of any": "bfloat16 2 64 8,16,8 9,20,11 1 6 65536 1,0,3",
}


# The same and at last: 1 for the kernel on tensor cores, 2 for it on a GPU that has clusters.
MMA_CASES = {
    "one token": "bfloat16 1 72 40 130 1 4 200000 0 2",
    "two tokens": "float16 2 264 24 100 0 3 200000 0 1",
    "eight tokens, one row of right for a cluster": "bfloat16 8 520 8 63 1 8 200000 0 2",
    "nine tokens": "float16 9 136 104 65 1 4 200000 0 2",
    "nine tokens, chosen for their number": "bfloat16 9 72 40 130 0 4 200000 0",
    "thirteen tokens, pivots between the others": "bfloat16 13 328 72 333 1 4 200000 1 2",
    "sixteen tokens, pivots first": "float16 16 1000 152 401 0 4 200000 2 2",
    "sixteen tokens, pivots last": "bfloat16 16 72 40 41 1 4 200000 3 2",
    "fewer multiprocessors than a cluster has": "bfloat16 16 72 40 130 1 3 200000 0 2",
    "warps split K, three rounds": "bfloat16 9 4104 136 63 1 1 200000 0 1",
    "two rounds of left": "bfloat16 16 8 8 1101 1 2 200000 0 1",
    "two rounds of left in a cluster": "float16 16 8 16 560 0 4 200000 1 2",
    "one output": "float16 16 64 104 1 1 2 200000 0 1",
    "all rows are pivots": "float16 12 136 40 40 1 4 200000 1 2",
    "three layers": "bfloat16 16 264 40,16,72 130,33,65 1 4 200000 0 2",
    "three layers, the first without rank, one of nothing but pivots": "bfloat16 11 136 0,40,24 33,40,77 0,1,0 8 200000 0,1,2 2",
    "two layers, the second without rank": "float16 9 72 24,0 63,41 1 4 200000 3,0 2",
    "three layers of nothing but pivots": "float16 10 72 40,16,8 40,16,8 1,0,1 3 200000 1 1",
    "three layers, several rounds of two": "bfloat16 16 8 16,8,8 560,24,401 1,0,1 4 200000 1,0,2 2",
    "three layers, more clusters than rows of any": "float16 14 520 8,16,8 9,20,11 1 12 200000 1,0,3 2",
}

# Each number of tokens, in the kernel that it gets: three layers whose sizes, biases and pivots change with it.
EACH_M = {
    f"{m} tokens, kernel {kernel}": (
        f"{('bfloat16', 'float16')[m % 2]} {m} {8 * (3 * m % 17 + 1)} {8 * (m % 3 + 1)},{8 * (m % 5)},{8 * (m % 2 + 1)} "
        f"{8 * (m % 3) + m % 7 + 10},{8 * (m % 5) + 5},{8 * (m % 2 + 1) + 11 * (m // 4 % 2)} {m % 2},1,{m // 2 % 2} "
        f"{(3 if kernel == 0 else 4) + m // 8} 200000 {m % 4},{(m + 1) % 4},{(m + 2) % 4} {kernel}"
    )
    for m in range(1, 17)
    for kernel in (0 if m <= 8 else 2,)
}


@needs_gxx
@pytest.mark.parametrize(
    "case",
    [*CASES.values(), *MMA_CASES.values(), *EACH_M.values()],
    ids=[*CASES, *(f"tensor cores, {name}" for name in MMA_CASES), *EACH_M],
)
def test_emulated_kernels_match_float64(case, emulate):
    """Errors are relative to the sum of absolute products, for y beyond its rounding to 16 bits.

    On tensor cores for `shrunk` beyond its rounding too; y is that of the `shrunk` that was found.
    """
    _, tokens, _, *lists, blocks, limit, pivoted, kernel = [*case.split(), "0"][:10]
    ranks, outputs, _, pivoted = [[int(number) for number in one.split(",")] for one in (*lists, pivoted)]
    pivots = [rank if (pivoted * 3)[i] else 0 for i, rank in enumerate(ranks)]
    rows = [n - count for n, count in zip((outputs * 3)[: len(ranks)], pivots, strict=True)]
    shrunk_error, y_error, shared_bytes, grid_barriers = emulate(case)
    assert shrunk_error < 3e-7
    assert y_error < 3e-7
    assert grid_barriers == 1
    many = int(tokens) if kernel == "0" else 16
    needed = cuda_limits.shared_bytes(many, ranks, rows, pivots, int(blocks))
    assert needed == shared_bytes if many > 8 else needed <= shared_bytes <= int(limit)


@needs_gxx
def test_emulated_prefetch_uses_the_shared_memory_there_is(emulate):
    rank, rows_per_block, row_bytes = 40, 111, 80
    exchange = 4 * max(rank, 8 * 14)  # `shrunk`, or one partial sum per warp and row: 14 rows of right per block
    assert emulate("bfloat16 1 256 40 333 1 3 65536 0")[2] == exchange + rows_per_block * row_bytes
    assert emulate("bfloat16 1 256 40 333 1 3 4000 0")[2] == exchange + 44 * row_bytes  # whole groups of 4 rows
    assert emulate("bfloat16 5 8 16 333 1 4 1100 0")[2] == 8 * 8 * 4 * 4
    pivots = 8 * rank  # which also leave fewer rows of left: 293 on three blocks
    assert emulate("bfloat16 1 256 40 333 1 3 65536 1")[2] == exchange + pivots + 98 * row_bytes


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        CASES["tokens filled up to four"],
        CASES["pivots first, left prefetched in part"],
        MMA_CASES["sixteen tokens, pivots last"],
        MMA_CASES["two rounds of left in a cluster"],
        CASES["three layers, left prefetched of the first and in part of the second"],
        MMA_CASES["three layers, the first without rank, one of nothing but pivots"],
    ],
)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_no_races_in_the_kernels_and_no_access_out_of_bounds(case, sanitizer, emulate):
    emulate(case, sanitizer)


@needs_gxx
def test_emulator_notices_a_missing_barrier(tmp_path):
    program = broken_emulator(tmp_path, "__pipeline_wait_prior(0);\n  __syncthreads();", "__pipeline_wait_prior(0);")
    result = subprocess.run([program, *CASES["one token"].split()], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout


TWO_LAYERS = "two layers, the second without rank"
BROKEN = {  # what, instead of what, in which case it shows
    "a unit is read before it has arrived": ("wait_prior(kRing - 1)", "wait_prior(kRing)", "nine tokens"),
    "sums of other blocks are read before they are there": ("  cluster_barrier();\n  const", "  const", "one token"),
    "sums are overwritten before they are read": (
        "if (read) cluster_barrier();",
        "",
        "two rounds of left in a cluster",
    ),
    "those of the layer before": ("      read = true;\n", "", "three layers"),
    "the ring does not know where the next layer begins": ("product.next = next;", "product.next = i + 1;", TWO_LAYERS),
}


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_emulator_notices_a_missing_wait(fault, tmp_path):
    right, wrong, case = BROKEN[fault]
    program = broken_emulator(tmp_path, right, wrong)
    result = subprocess.run([program, *MMA_CASES[case].split()], capture_output=True, text=True)
    assert result.returncode == 1 or float(result.stdout.split()[1]) > 1e-3, result.stdout


@needs_gxx
def test_operator_around_the_emulated_kernel(tmp_path):
    """cuda/ops.cpp with the CPU in place of the GPU, in its own process, since it takes the operator's name."""
    library = build_operators(tmp_path)
    run([sys.executable, "-c", OPERATOR_SCRIPT, library], env={**os.environ, "OMP_NUM_THREADS": "1"})


OPERATOR_SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op = torch.ops.lorap_cuda.low_rank_linear

x, right, left, bias = (torch.randn(size) for size in ((2, 3, 64), (24, 64), (100, 24), (100,)))
for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
    args = [tensor.to(dtype) for tensor in (x, right, left, bias)]
    exact = args[0].double() @ args[1].double().T @ args[2].double().T
    for b in (args[3], None):
        y = op(*args[:3], b)
        assert y.dtype == dtype and y.shape == (2, 3, 100)
        torch.testing.assert_close(y.double(), exact + (0 if b is None else b), rtol=tolerance, atol=1e-4)
x, right, left, bias = args
rows = torch.arange(24) * 5  # of the 124 rows of the output
others = torch.tensor([row for row in range(124) if row not in set(rows.tolist())])
exact = torch.empty(2, 3, 124, dtype=torch.float64)
exact[..., rows] = args[0].double() @ args[1].double().T
exact[..., others] = exact[..., rows] @ args[2].double().T
b = torch.cat((bias, bias[:24])).to(x.dtype)
for b in (b, None):
    y = op(*args[:3], b, rows)
    torch.testing.assert_close(y.double(), exact + (0 if b is None else b), rtol=tolerance, atol=1e-4)
many = x.repeat(2, 1, 1)  # for tensor cores, where what the first factor gives is rounded too
y = op(many, right, left, b, rows).double()
assert y.shape == (4, 3, 124)
assert float((y - exact.repeat(2, 1, 1)).norm() / exact.norm()) < 2 * tolerance
torch.testing.assert_close(y[:2], y[2:], rtol=0, atol=0)
assert op(x[0, 0], right, left, bias).shape == (100,)
assert op(x[:0], right, left, bias).shape == (0, 3, 100)
torch.testing.assert_close(op(x, right, left[:99], bias[1:]), op(x, right, left[:99], bias[1:].clone()))  # odd start

group = torch.ops.lorap_cuda.low_rank_linear_group
none, no_rows = x.new_empty(0), rows[:0]
dense, tiny = torch.randn(40, 64).to(x.dtype), x.new_empty(0, 64)
layers = [x, [right, dense, tiny], [left, x.new_empty(0, 40), x.new_empty(7, 0)]]
for b in (bias[:100].repeat(2)[:124], none):
    for many in (x, x.repeat(2, 1, 1)):
        y = group(many, *layers[1:], [b, none, bias[1:8]], [rows, torch.arange(40), no_rows])
        first = op(many, right, left, b if len(b) else None, rows)
        torch.testing.assert_close(y[..., :124], first, rtol=0, atol=0)
        exact = many.double() @ dense.double().T
        torch.testing.assert_close(y[..., 124:164].double(), exact, rtol=2 * tolerance, atol=1e-4)
        torch.testing.assert_close(y[..., 164:], bias[1:8].expand(*many.shape[:-1], 7), rtol=0, atol=0)
        assert y.shape == (*many.shape[:-1], 171)
many = x[:1]  # three with values of their own
y = group(many, [right] * 3, [left, left[:40], left[60:].contiguous()], [], [])
for part, (start, end) in zip(y.split((100, 40, 40), -1), ((0, 100), (0, 40), (60, 100))):
    torch.testing.assert_close(part, op(many, right, left, None)[..., start:end], rtol=0, atol=0)
assert group(x[:0], [right], [left], [], []).shape == (0, 3, 100)

def refuses(message, *args, op=op):
    try:
        op(*args)
    except RuntimeError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(f"accepted: {message}")

refuses("x has 18 tokens, at most 16", x.repeat(3, 1, 1), right, left, None)
refuses("K = 64 and R = 20 must be multiples of 8, K a positive one", x, right[:20], left[:, :20].contiguous(), None)
refuses("x (..., 64), right (24, 64) and left (100, 16) do not fit together", x, right, left[:, :16], None)
refuses("expected x (..., K), right (R, K) and left (N, R), got 3, 1 and 2 dimensions", x, right[0], left, None)
refuses("right must be contiguous", x, right.T.contiguous().T, left, None)
refuses("left and x must have the same dtype", x, right, left.float(), None)
refuses("x must be bfloat16 or float16", x.float(), right.float(), left.float(), None)
refuses("bias has 99 elements, the output 100 rows", x, right, left, bias[1:])
refuses("pivot_rows must be 24 int64, one per rank; there are 23", x, right, left, None, torch.arange(23))
refuses("pivot_rows must be contiguous and start at a multiple of 16 bytes", x, right, left, None, torch.arange(25)[1:])
refuses("right must start at a multiple of 16 bytes", x, torch.cat((bias[:1], right.flatten()))[1:].view(24, 64), left, None)
big = [torch.zeros(size, dtype=dtype) for size in ((8, 8), (8192, 8), (8, 8192))]
refuses("rank 8192 is too large for 8 tokens", *big, None)
two = [right] * 2, [left] * 2
refuses("a group has 1 to 3 layers, not 4", x, [right] * 4, [left] * 4, [], [], op=group)
refuses("got 2 right, 1 left, 0 bias, 0 pivot_rows", x, two[0], [left], [], [], op=group)
refuses("got 2 right, 2 left, 0 bias, 1 pivot_rows", x, *two, [], [rows], op=group)
refuses("bias has 99 elements, the output 100 rows", x, *two, [none, bias[1:]], [], op=group)
refuses("right (24, 64) and left (100, 16) do not fit", x, two[0], [left, left[:, :16]], [], [], op=group)
wide = [x.new_zeros(3072, 8)] * 3, [x.new_zeros(8, 3072)] * 3
refuses("rank 9216 is too large for 8 tokens", x.new_zeros(8, 8), *wide, [], [], op=group)
"""
