"""The C++ operators under the address and undefined-behaviour sanitizers, with tensors of every kind of trouble:

    python tests/fuzz/fuzz_native.py --minutes 2

builds csrc/cpu into build/sanitize and calls the operators through Python. Each call must end in a clear Python error or equal
the float64 reference; a sanitizer's report ends the run with exit code 1, and the case can be repeated with --seed and --first.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/sanitize"


# --- outside: build, and run this file again with the sanitizers loaded first ---------------------------------------------------


def why_not() -> str | None:
    """What is missing here to build and run with the sanitizers."""
    for tool in ("g++", "cmake"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    return None if _runtimes() else "g++ has no libasan here"


def build() -> None:
    """csrc/cpu as BUILD/_native.so; nothing is done where it is up to date."""
    torch = Path(find_spec("torch").origin).parent
    options = [
        f"-DTORCH_INCLUDE={torch / 'include'}",
        f"-DTORCH_LIB={torch / 'lib'}",
        f"-DCMAKE_CXX_COMPILER={shutil.which('g++')}",
    ]
    options += ["-DLORAP_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    for command in (["cmake", "-S", ROOT, "-B", BUILD, *options], ["cmake", "--build", BUILD, "--parallel"]):
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if run.returncode:
            raise SystemExit(run.stdout)


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, with lorap's own and the library of :func:`build`."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "lorap"
        package.mkdir()
        for path in (ROOT / "lorap").iterdir():
            if path.name not in ("_native.so", "__pycache__"):
                (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(ROOT / "kernels/triton")
        (package / "_native.so").symlink_to(BUILD / "_native.so")
        environment = os.environ | {
            "LD_PRELOAD": " ".join(_runtimes()),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=512",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "2",
            "MKL_NUM_THREADS": "1",
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def run_cases_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This file again, under the sanitizers."""
    return run_sanitized(str(Path(__file__).resolve()), "--child", *arguments)


def _runtimes() -> list[str]:
    """libasan must come before everything else, and libstdc++ with it: exceptions are thrown by it."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        run = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        found.append(run.stdout.strip())
    return found if all(Path(path).is_absolute() for path in found) else []


# --- inside ---------------------------------------------------------------------------------------------------------------------

TOKENS, COLUMNS, RANKS, ROWS = (
    (0, 1, 2, 3, 5, 16, 17, 33),
    (0, 1, 7, 8, 31, 33, 64),
    (0, 1, 2, 5, 17),
    (0, 1, 2, 15, 16, 17, 40),
)
STATISTICS = ("channel_sq_norm", "second_moment")
HUGE = (2**31, 2**40, 2**62, 2**63 - 1)


class Case:
    """Arguments of one op from a seed: most fit, in storage of any layout; about half have something wrong somewhere."""

    def __init__(self, seed: int) -> None:
        import torch

        self.torch, self.random = torch, random.Random(seed)
        torch.manual_seed(seed % 2**63)
        self.dtype = self.random.choice((torch.float32, torch.bfloat16, torch.float16))
        self.exact = True  # whether the result can be compared: no NaN, no infinity
        self.faults = self.random.choice((0, 0, 1, 1, 2))

    def arguments(self, op: str) -> tuple[Any, ...]:
        pick = self.random.choice
        self.huge = op not in STATISTICS  # which read any number of tokens, as they should, for as long as that takes
        m, k, r, n = pick(TOKENS), pick(COLUMNS), pick(RANKS), pick(ROWS)
        batch = pick(((m,), (m,), (2, m), (m, 1), ()))
        x = self.tensor(*batch, k)
        if op in STATISTICS:
            return x, pick((None, self.mask(batch), self.mask((*batch, 2))))
        bias = bool(pick((0, 1)))
        if op.startswith("trellis_"):
            return self.trellis_arguments(op, x, k, n, bias)
        if op.startswith("quantized_"):
            return self.quantized_arguments(op, x, k, r, n, bias)
        if op == "linear":
            return x, self.tensor(n, k), self.tensor(n) if bias else None
        if op == "silu_gated_linear":
            return (
                x,
                self.tensor(n, k),
                self.tensor(n, k),
                *([self.tensor(n) for _ in range(2)] if bias else [None, None]),
            )
        if op == "low_rank_linear":
            pivots = self.pivots(r, n) if pick((0, 1)) else None
            rows = n if pivots is None else n + r
            return x, self.tensor(r, k), self.tensor(n, r), self.tensor(rows) if bias else None, pivots
        count = 2 if op == "low_rank_silu_gated_linear" else pick((1, 2, 3))
        ranks = [pick(RANKS) for _ in range(count)]
        rows = [n if op == "low_rank_silu_gated_linear" else pick(ROWS) for _ in range(count)]
        right = [self.tensor(rank, k) for rank in ranks]
        left = [self.tensor(row, rank) for row, rank in zip(rows, ranks, strict=True)]
        if self.faults and not self.random.randrange(12):
            self.random.choice((right, left)).pop()
        if op == "low_rank_silu_gated_linear":
            return x, right, left, [self.tensor(row) for row in rows] if bias else []
        pivots = [self.pivots(rank, row) for rank, row in zip(ranks, rows, strict=True)] if pick((0, 1)) else []
        sizes = [row + (rank if pivots else 0) for row, rank in zip(rows, ranks, strict=True)]
        return x, right, left, [self.tensor(size) for size in sizes] if bias else [], pivots

    def quantized_arguments(self, op: str, x: Any, k: int, r: int, n: int, bias: bool) -> tuple[Any, ...]:
        bits, group = self.random.choice((4, 8)), self.random.choice((32, 64, 96, 128))
        shapes = {"quantized_linear": [(n, k)], "quantized_low_rank_linear": [(n, r), (r, k)]}.get(op, [(n, k)] * 2)
        weights = [tensor for shape in shapes for tensor in self.quantized(*shape, bits, group)]
        if self.faults and not self.random.randrange(8):
            bits, group = self.random.choice(
                ((3, group), (12 - bits, group), (bits, 0), (bits, -32), (bits, 2**63 - 1))
            )
        biases = () if op == "quantized_silu_gated_linear" else (self.tensor(n) if bias else None,)
        return x, *weights, *biases, bits, group

    def trellis_arguments(self, op: str, x: Any, k: int, n: int, bias: bool) -> tuple[Any, ...]:
        torch, pick, bits, group = (
            self.torch,
            self.random.choice,
            self.random.choice((2, 3, 4, 5, 6)),
            self.random.choice((32, 64, 96, 128)),
        )
        if op == "trellis_search":
            return self.tensor(n, min(k, 5)), self.tensor(n, min(k, 5)), bits if self.random.randrange(9) else 7
        words = torch.randint(-(2**31), 2**31, (-(-n // 64), k * 2 * bits), dtype=torch.int64).int()
        scales = torch.rand(n, -(-k // group)).add(0.5).mul(max(k, 1) ** -0.5)
        scales = self.laid_out(scales.to(pick((self.dtype, torch.float32))))
        words = self.laid_out(words)
        if self.faults and not self.random.randrange(6):
            words, scales = pick(((self.wrong(words.shape), scales), (words, self.wrong(scales.shape))))
        if self.faults and not self.random.randrange(8):
            bits, group = pick(((7, group), (bits % 5 + 2, group), (bits, 0), (bits, -32), (bits, 2**63 - 1)))
        return x, words, scales, self.tensor(n) if bias else None, bits, group

    def quantized(self, rows: int, columns: int, bits: int, group: int) -> tuple[Any, Any]:
        """Any words are a weight; its scales may have a dtype of their own."""
        torch, pick = self.torch, self.random.choice
        words = torch.randint(-(2**31), 2**31, (rows, -(-columns * bits // 32)), dtype=torch.int64).int()
        scales = torch.rand(rows, -(-columns // group)).add(0.5).mul(max(columns, 1) ** -0.5 / 2**bits)
        scales = self.laid_out(scales.to(pick((self.dtype, torch.float32))))
        if self.faults and not self.random.randrange(6):
            return pick(((self.wrong(words.shape), scales), (self.laid_out(words), self.wrong(scales.shape))))
        return self.laid_out(words), scales

    def tensor(self, *shape: int) -> Any:
        if self.faults and not self.random.randrange(8):
            return self.wrong(shape)
        return self.laid_out(self.torch.randn(shape).mul(max(shape[-1], 1) ** -0.5 if shape else 1).to(self.dtype))

    def wrong(self, shape: tuple[int, ...]) -> Any:
        """One that does not fit in shape, dtype, device or kind, or is full of what is no number."""
        torch, pick = self.torch, self.random.choice
        value = torch.randn(shape)
        kind = pick(
            ("dtype", "size", "size", "dims", "meta", "none", "huge", "huge", "not-finite", "sparse", "overlap")
        )
        if kind == "dtype":
            self.exact = False  # where torch itself does the work it promotes, as it always does
            return value.to(
                pick((torch.float64, torch.int32, torch.bool, torch.complex64, torch.float16, torch.bfloat16))
            )
        if kind == "size":
            return torch.randn([max(0, size + pick((-1, 0, 1))) for size in shape]).to(self.dtype)
        if kind == "dims":
            return pick((value.unsqueeze(0), value.flatten(), value.sum())).to(self.dtype)
        if kind == "meta":
            return value.to("meta", self.dtype)
        if kind == "none":
            return None
        if kind == "huge" and self.huge:  # a terabyte that takes four bytes
            sizes, most = list(shape), 2**63 - 1
            for at in self.random.sample(range(len(shape)), len(shape)):
                sizes[at] = min(pick((*HUGE, sizes[at])), most)
                most //= max(sizes[at], 1)
            return torch.ones((1,) * len(shape), dtype=self.dtype).expand(sizes)
        if kind == "not-finite":
            self.exact = False
            return value.fill_(pick((float("nan"), float("inf"), -float("inf"), 1e38))).to(self.dtype)
        if kind == "sparse" and value.dim() == 2:
            self.exact = False
            return value.to(self.dtype).to_sparse()
        flat = torch.randn(max(value.numel(), 1) + 3).to(self.dtype)
        return flat.as_strided(shape, [1] * len(shape))

    def laid_out(self, value: Any) -> Any:
        """The same values in other storage: transposed, with gaps, offset, expanded, or at an odd address."""
        torch = self.torch
        filler = float("nan") if value.is_floating_point() else -1
        kind = self.random.choice(("plain", "plain", "transposed", "gaps", "offset", "rows", "expanded", "unaligned"))
        if kind == "transposed" and value.dim() >= 2:
            return value.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "gaps":
            wide = value.new_full([2 * size for size in value.shape], filler)
            view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        elif kind == "rows" and value.dim():
            view = value.new_full((*value.shape[:-1], value.shape[-1] + 3), filler)[..., 1:-2]
        elif kind == "offset":
            view = value.new_full((value.numel() + 5,), filler)[3 : 3 + value.numel()].view(value.shape)
        elif kind == "expanded" and value.dim() >= 2 and value.numel():
            return value[:1].expand(value.shape) if self.random.randrange(2) else value[..., :1].expand(value.shape)
        elif kind == "unaligned" and value.numel():
            raw = bytearray(1 + value.numel() * value.element_size())
            view = torch.frombuffer(raw, dtype=value.dtype, offset=1).view(value.shape)
        else:
            return value
        return view.copy_(value)

    def pivots(self, rank: int, rows: int) -> Any:
        torch, pick = self.torch, self.random.choice
        good = torch.tensor(sorted(self.random.sample(range(rank + rows), rank)), dtype=torch.int64)
        if not self.faults or self.random.randrange(3):
            return torch.stack((good, good - 1), dim=1)[:, 0] if self.random.randrange(3) == 0 else good
        if rank and self.random.randrange(2):
            good[self.random.randrange(rank)] = pick((-1, rank + rows, 0, 2**63 - 1, -(2**63), rank + rows - 1))
            return good
        wrong = (
            good.flip(0),
            good.int(),
            good.double(),
            good[:-1],
            good.to("meta"),
            good.unsqueeze(0),
            torch.arange(rank + 1),
        )
        return pick((*wrong, good[:1].expand(rank) if rank else good, None))

    def mask(self, shape: tuple[int, ...]) -> Any:
        mask = self.torch.randn(shape) > 0
        return self.laid_out(mask.to(self.random.choice((self.torch.float32, self.dtype)))).to(
            self.random.choice((self.torch.bool, self.torch.int64, self.torch.float32, self.torch.complex64))
        )


def run_cases(seed: int, first: int, seconds: float, most: int) -> None:
    import torch
    from test_ops import assert_close_to_float64

    from lorap.nn import implementations, native, ops

    assert native.HAS_CPU, native.MISSING
    assert native.LIBRARY.resolve() == (BUILD / "_native.so").resolve()
    end, outcomes, number = time.monotonic() + seconds, Counter(), first
    while number < first + most and time.monotonic() < end:
        op = random.Random(f"{seed} {number}").choice(list(ops.SCHEMAS))
        case = Case(hash((seed, number)))
        sys.stderr.write(f"case {number} {op}\n")
        faulthandler.dump_traceback_later(60, exit=True)
        arguments = case.arguments(op)
        matmul = op in (*implementations.LINEAR_OPS, *implementations.QUANTIZED_OPS, "trellis_linear")
        direct = matmul and number % 2
        call = implementations.implementation(op, "cpu") if direct else getattr(torch.ops.lorap, op)
        try:
            y = call(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, lorap_error()) as error:
            if not str(error) or "INTERNAL ASSERT" in str(error):
                raise AssertionError(f"an error that explains nothing: {error!r}") from error
            if isinstance(error, AttributeError) and "'NoneType'" not in str(
                error
            ):  # torch's dispatcher lets None through
                raise
            outcomes["refused"] += 1
        else:
            if matmul and isinstance(arguments[0], torch.Tensor) and not arguments[0].is_meta:
                if case.exact and y.numel():
                    with torch.no_grad():
                        assert_close_to_float64(*with_floats(op, y, arguments))
                outcomes["equal"] += 1
            else:
                outcomes["returned"] += 1
        number += 1
    print(
        f"{number - first:,} calls from seed {seed}: "
        + ", ".join(f"{n:,} {what}" for what, n in sorted(outcomes.items()))
    )


def with_floats(op: str, y: Any, arguments: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """The same op on the weights that packed words and scales stand for, in float64."""
    import torch

    from lorap.kernels import packing, trellis

    if not op.startswith(("quantized_", "trellis_")):
        return op, y, arguments
    (x, *rest), (bits, group) = arguments[:-2], arguments[-2:]
    if op == "trellis_linear":
        return "linear", y, (x, trellis.dequantize(rest[0], rest[1], bits, group, torch.float64), rest[2])

    def weight(at: int, columns: int) -> Any:
        return packing.dequantize(rest[at], rest[at + 1], bits, group, columns, torch.float64)

    k = x.shape[-1]
    if op == "quantized_linear":
        return "linear", y, (x, weight(0, k), rest[2])
    if op == "quantized_silu_gated_linear":
        return "silu_gated_linear", y, (x, weight(0, k), weight(2, k))
    return "low_rank_linear", y, (x, weight(2, k), weight(0, len(rest[2])), rest[4], None)


def lorap_error() -> type[Exception]:
    from lorap.errors import LoRAPError

    return LoRAPError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="at most so many calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        run_cases(wanted.seed, wanted.first, 60 * wanted.minutes, wanted.cases)
        return
    if reason := why_not():
        raise SystemExit(reason)
    build()
    run = run_cases_apart(*sys.argv[1:])
    print(run.stdout, end="")
    if run.returncode:
        report = run.stderr[run.stderr.rfind("\ncase ") + 1 :]
        raise SystemExit("\n".join(report.splitlines()[:60]))


if __name__ == "__main__":
    main()
