"""The native library: what it links to, every instruction set of this processor, memory safety, and determinism.

The kernels are tested twice. Through torch, in one process for each instruction set, because the choice is made once; and
without torch, by ``csrc/cpu/test_decode.cpp`` under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorap.nn import implementations, native

ROOT = Path(__file__).parents[1]
CPU_SOURCES = ROOT / "csrc/cpu"
# Flags in /proc/cpuinfo that each instruction set needs.
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}
NEEDS = {"scalar": set(), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512 | {"avx512_bf16"}}
TRELLIS_NEEDS = {"scalar": set(), "avx2": AVX2, "avx512": AVX512, "avx512_vbmi": AVX512 | {"avx512_vnni", "avx512vbmi"}}
QUANTIZED_NEEDS = {"scalar": set(), "avx2": AVX2, "avx512": AVX512, "avx512_vnni": AVX512 | {"avx512_vnni"}}

needs_library = pytest.mark.skipif(not native.HAS_CPU, reason="lorap/_native.so is not built")


def processor_flags() -> set[str]:
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


def supported(needs: dict[str, set[str]] = NEEDS) -> list[str]:
    return [isa for isa, needed in needs.items() if needed <= processor_flags()]


def run_with_isa(code: str, isa: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORAP_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment |= variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


# --- the library -----------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("c++filt"), reason="nm and c++filt are not installed")
def test_the_library_needs_torch_s_stable_symbols_only() -> None:
    """at:: and c10:: change with every torch, Py with every Python."""
    nm = subprocess.run(["nm", "-D", "--undefined-only", native.LIBRARY], capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=nm.stdout, capture_output=True, text=True, check=True).stdout
    assert "torch_library_impl" in names
    unstable = [
        line.split(maxsplit=1)[1] for line in names.splitlines() if re.search(r"\b(at|c10)::|\b_?Py[A-Z_]", line)
    ]
    assert not unstable


@needs_library
def test_without_a_wish_the_best_instruction_set_runs() -> None:
    if os.environ.get("LORAP_CPU_ISA"):
        pytest.skip("LORAP_CPU_ISA is set")
    best = supported()[-1]
    assert native.cpu_isa(torch.bfloat16) == best
    assert native.cpu_isa(torch.float32) == native.cpu_isa(torch.float16) == best.removesuffix("_bf16")
    assert native.quantized_cpu_isa() == supported(QUANTIZED_NEEDS)[-1]


# --- instruction sets ------------------------------------------------------------------------------------------------------

EVERY_VALUE = """
import itertools, sys, torch
from test_ops import DTYPES, MATMULS, arguments_of, assert_close_to_float64
from lorap.nn import implementations, native
isa = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)
dtypes = [torch.bfloat16] if isa == "avx512_bf16" else DTYPES
assert {native.cpu_isa(dtype) for dtype in dtypes} == {isa}
cases = 0
for op, dtype, m, k in itertools.product(MATMULS, dtypes, (1, 2, 5, 17), (1, 7, 8, 31, 33, 100, 289)):
    for arguments in arguments_of(op, m, k, 17, 63, dtype, bias=cases % 2 == 0):
        assert_close_to_float64(op, implementations.implementation(op, "cpu")(*arguments), arguments)
        cases += 1
for dtype in dtypes:  # sums of two, rounded once: every pair of the numbers at the edges of the format
    info = torch.finfo(dtype)
    numbers = [0.0, 1.0, 1 + info.eps, info.eps / 2, info.tiny, info.tiny * info.eps, info.tiny * (1 - info.eps), info.max]
    numbers = torch.tensor([*numbers, info.max * info.eps / 4, torch.inf, torch.nan], dtype=torch.float64)
    numbers = torch.cat((numbers, -numbers)).to(dtype)
    pairs = torch.cartesian_prod(numbers, numbers)
    expected = pairs.float().sum(1).to(dtype)
    for tokens in (1, 2, 5):
        y = implementations.implementation("linear", "cpu")(torch.ones(tokens, 2, dtype=dtype), pairs)
        # That instruction set takes numbers below the smallest normal one for zero.
        atol = 2 * info.tiny if isa == "avx512_bf16" else 0
        torch.testing.assert_close(y, expected.expand(tokens, -1), rtol=0, atol=atol, equal_nan=True)
if isa == "avx512_bf16":
    try:
        native.cpu_isa(torch.float32)
    except RuntimeError as error:
        assert "no instructions called LORAP_CPU_ISA=avx512_bf16 for this dtype" in str(error), error
    else:
        raise AssertionError("avx512_bf16 has no float32")
print(cases, "cases")
"""


@needs_library
@pytest.mark.parametrize("isa", NEEDS)
def test_every_instruction_set_equals_float64_and_rounds_like_torch(isa: str) -> None:
    if isa not in supported():
        pytest.skip(f"this processor has no {isa}")
    run = run_with_isa(EVERY_VALUE.replace("sys.argv[1]", repr(isa)), isa)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("cases\n")


QUANTIZED = """
import itertools, sys, torch, test_quantized_ops
from lorap.nn import native
isa = sys.argv[1]
torch.set_num_threads(1)
assert native.quantized_cpu_isa() == isa.replace("_bf16", "")
for bits, dtype in itertools.product((4, 8), test_quantized_ops.DTYPES):
    test_quantized_ops.test_values_equal_float64_for_odd_shapes_and_ragged_groups("cpu", bits, dtype)
    test_quantized_ops.assert_same_weights(bits, dtype)
"""


@needs_library
@pytest.mark.parametrize("isa", [*QUANTIZED_NEEDS, "avx512_bf16"])
def test_every_instruction_set_has_weights_of_4_and_8_bits(isa: str) -> None:
    if isa not in supported(QUANTIZED_NEEDS | NEEDS):
        pytest.skip(f"this processor has no {isa}")
    run = run_with_isa(QUANTIZED.replace("sys.argv[1]", repr(isa)), isa)
    assert run.returncode == 0, run.stderr


EIGHT_BITS = """
import itertools, sys, torch
from torch.nn import functional as F
from test_quantized_ops import DTYPES, assert_close, quantized
from lorap.nn import dispatch, implementations, native
isa = sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)
bytes_too = isa != "scalar"
assert native.quantized_cpu_isa() == isa + ", int8 activations" * bytes_too
reasons = [rule.reason for rule in dispatch.RULES if rule.device == "cpu" and "quantized_linear" in rule.ops]
assert all(("LORAP_ACTIVATIONS" in reason) == bytes_too for reason in reasons) and len(reasons) == 3
run = {op: implementations.implementation(op, "cpu") for op in implementations.QUANTIZED_OPS}

def rounded(x, group):
    block = next(size for size in (128, 64, 32) if group > x.shape[1] or group % size == 0)
    blocks = F.pad(x.float(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (blocks * (1 / scales)).round()
    assert numbers.abs().max() <= 127
    return (numbers.double() * scales.double()).flatten(1)[:, : x.shape[1]]

for bits, dtype, m, k, group in itertools.product((4, 8), DTYPES, (1, 3, 4, 17), (1, 63, 100, 289), (32, 64, 96, 128)):
    x = torch.randn(m, k).to(dtype)
    left, right = quantized(63, 33, bits, group, dtype), quantized(33, k, bits, group, dtype)
    packed, scales, weight = quantized(63, k, bits, group, dtype)
    up = quantized(63, k, bits, group, dtype)
    given = rounded(x, group) if bits == 4 and bytes_too else x.double()
    size = given.abs() @ weight.abs().T
    assert_close(run["quantized_linear"](x, packed, scales, None, bits, group), given @ weight.T, size)
    gated = run["quantized_silu_gated_linear"](x, packed, scales, *up[:2], bits, group)
    assert_close(gated, F.silu(given @ weight.T) * (given @ up[2].T), (1 + size) * (given.abs() @ up[2].abs().T))
    # The second factor rounds what the first one has computed, where the last digit decides.
    inner = given @ right[2].T
    inner = rounded(inner, group) if bits == 4 and bytes_too else inner
    y = run["quantized_low_rank_linear"](x, *left[:2], *right[:2], None, bits, group).double()
    exact = inner @ left[2].T
    assert (y - exact).norm() <= (5e-3 if bits == 4 or dtype != torch.float32 else 1e-5) * exact.norm()
"""


@needs_library
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512_vnni"])
def test_activations_of_8_bits_are_rounded_to_the_nearest_of_their_block(isa: str) -> None:
    if isa not in supported(QUANTIZED_NEEDS):
        pytest.skip(f"this processor has no {isa}")
    run = run_with_isa(EIGHT_BITS.replace("sys.argv[1]", repr(isa)), isa, LORAP_ACTIVATIONS="int8")
    assert run.returncode == 0, run.stderr


@needs_library
def test_unknown_activations_are_named() -> None:
    load = f"import torch; torch.ops.load_library({str(native.LIBRARY)!r})"
    for code in (f"{load}; torch.ops.lorap_cpu.quantized_isa(4)", "import lorap; lorap.LowRankLinear"):
        run = run_with_isa(code, "", LORAP_ACTIVATIONS="int2")
        assert run.returncode != 0
        assert "LORAP_ACTIVATIONS=int2" in run.stderr


@needs_library
def test_an_unknown_instruction_set_is_named() -> None:
    load = f"import torch; torch.ops.load_library({str(native.LIBRARY)!r})"
    code = f"{load}; x = torch.ones(1, 2); torch.ops.lorap_cpu.linear(x, x)"
    run = run_with_isa(code, "mmx")
    assert run.returncode != 0
    assert "this processor or build has no instructions called LORAP_CPU_ISA=mmx for this dtype" in run.stderr


# --- without torch, under the sanitizers -----------------------------------------------------------------------------------

COMPILE = ["g++", "-std=c++20", "-O1", "-g1", "-pthread", "-w", "-fno-sanitize-recover=all"]
SANITIZE = ["-fsanitize=address,undefined"]


def instruction_set_flags() -> dict[str, list[str]]:
    """Compiler flags of each file, from CMakeLists.txt."""
    found = re.findall(r"^\s*add_isa\((\w+) ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text("utf-8"), re.M)
    return {name: flags.split() for name, flags in found}


def can_sanitize(folder: Path) -> bool:
    (folder / "empty.cpp").write_text("int main() { return 0; }")
    built = subprocess.run(
        [*COMPILE, *SANITIZE, "empty.cpp", "-o", "empty"], cwd=folder, capture_output=True, check=False
    )
    return built.returncode == 0 and subprocess.run(["./empty"], cwd=folder, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_kernels_alone_pass_the_sanitizers(tmp_path: Path) -> None:
    if not can_sanitize(tmp_path):
        pytest.skip("g++ has no sanitizers here")
    isas = instruction_set_flags() if platform.machine() in ("x86_64", "AMD64") else {}
    assert set(isas) in ({"avx2", "avx512", "avx512_bf16", "avx512_vnni", "avx512_vbmi"}, set())
    # What cannot run here need not be compiled here: the build does, without sanitizers.
    here = {*supported(), *supported(QUANTIZED_NEEDS), *supported(TRELLIS_NEEDS)}
    isas = {name: flags for name, flags in isas.items() if name in here}
    common = [*COMPILE, *SANITIZE, *(f"-DLORAP_HAVE_{name.upper()}" for name in isas)]
    kernels = {name: [] for name in ("decode", "quantized", "trellis", "scalar")} | isas
    for name, flags in kernels.items():
        command = [*common, *flags, "-c", CPU_SOURCES / f"{name}.cpp", "-o", f"{name}.o"]
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
    objects = [f"{name}.o" for name in kernels]
    # Leaks need ptrace, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    for program, needs in (
        ("test_decode", NEEDS),
        ("test_quantized", QUANTIZED_NEEDS),
        ("test_trellis", TRELLIS_NEEDS),
    ):
        subprocess.run([*common, CPU_SOURCES / f"{program}.cpp", *objects, "-o", program], cwd=tmp_path, check=True)
        run = subprocess.run(
            [f"./{program}"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.endswith("all passed\n")
        tested = {line.split()[0] for line in run.stdout.splitlines()[:-1]}
        assert tested == {isa for isa in supported(needs) if isa == "scalar" or isa in isas}


# --- determinism -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_the_same_bytes_twice_and_with_any_number_of_threads(tokens: int, dtype: torch.dtype, threads: None) -> None:
    torch.manual_seed(0)
    x, weight, up = (torch.randn(size, 577).to(dtype) for size in (tokens, 700, 700))
    right, left = (
        [torch.randn(rank, 577).to(dtype) for rank in (200, 301)],
        [torch.randn(700, r).to(dtype) for r in (200, 301)],
    )
    calls = {
        "linear": (x, weight),
        "low_rank_linear": (x, right[0], left[0]),
        "low_rank_linear_group": (x, right, left, [], []),
        "silu_gated_linear": (x, weight, up),
        "low_rank_silu_gated_linear": (x, right, left, []),
    }
    scales = torch.rand(700, 10)
    four, eight = (torch.randint(-(2**31), 2**31, (700, n), dtype=torch.int64).int() for n in (73, 145))
    calls |= {
        "quantized_linear": (x, eight, scales, None, 8, 64),
        "quantized_silu_gated_linear": (x, four, scales, four.flip(0), scales, 4, 64),
    }
    for op, arguments in calls.items():
        results = []
        for count in (1, 1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(implementations.implementation(op, "cpu")(*arguments))
        assert all(torch.equal(result, results[0]) for result in results), op


@needs_library
def test_a_token_s_output_does_not_depend_on_its_neighbours() -> None:
    """Within one pass over the weights, whichever tokens share it."""
    torch.manual_seed(0)
    x, weight = torch.randn(16, 100), torch.randn(63, 100)
    run = implementations.implementation("linear", "cpu")
    together = run(x, weight)
    x[1:] = torch.nan
    assert torch.equal(run(x, weight)[0], together[0])


@needs_library
def test_many_threads_call_at_once() -> None:
    torch.manual_seed(0)
    inputs, right, left = torch.randn(8, 3, 577), torch.randn(200, 577), torch.randn(700, 200)
    run = implementations.implementation("low_rank_linear", "cpu")
    expected, wrong = [run(x, right, left) for x in inputs], []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(50) if not torch.equal(run(inputs[index], right, left), expected[index]))

    workers = [threading.Thread(target=work, args=[index]) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
