"""Which implementation runs an op: one table, with the reason beside each row.

``LORAP_BACKEND`` in the environment, or :func:`use`, forces one: ``reference`` (plain torch), ``cpu`` (C++), ``triton``,
``cuda`` (C++), or ``auto``. A forced backend that cannot run the call raises; ``auto`` falls back to the reference.
``LORAP_ACTIVATIONS=int8`` lets the C++ kernels on weights of 4 bits round what they multiply to 8 bits.

Nothing on a GPU is trusted unseen: the first use of a kernel per device and dtype runs a small example beside the reference,
and a kernel that fails or differs is never used again in this process, with one warning that shows the numbers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorap.errors import BackendError
from lorap.nn import graphs, native
from lorap.nn.cuda_limits import FMA_TOKENS
from lorap.nn.implementations import (
    FEW_BITS_OPS,
    FLOATS,
    HALVES,
    LINEAR_OPS,
    PIVOTED_OPS,
    QUANTIZED_OPS,
    example,
    examples_of,
    form_of,
    implementation,
)

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Rule:
    """``backend`` serves ``ops`` on ``device`` in ``dtypes`` for at most ``max_tokens`` tokens, None for any number."""

    ops: tuple[str, ...]
    device: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    max_tokens: int | None
    reason: str


def _eight_bits() -> bool:
    asked = os.environ.get("LORAP_ACTIVATIONS") or ""
    if asked not in ("", "int8"):
        raise BackendError(f"LORAP_ACTIVATIONS={asked} is not known; it is int8, or not set for 16 bits")
    return asked == "int8"


EIGHT_BITS = _eight_bits()
_ROUNDED = "activations of 8 bits beside weights of 4, as LORAP_ACTIVATIONS asks: 1.3 x from 4 tokens on with AVX2; "


def _units() -> tuple[bool, bool, bool]:
    """Whether this processor has dot products of bfloat16, tiles of AMX for it, and arithmetic in float16."""
    bf16 = native.cpu_isa(torch.bfloat16) == "avx512_bf16"
    tiles = bf16 and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return bf16, tiles, bool(getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", bool)())


def _cpu_rules() -> tuple[Rule, ...]:
    """4096 x 4096 at rank 1024 beside torch on two Zen 4 cores, and two with AMX, gave the numbers (docs/kernels.md)."""
    bf16_unit, bf16_tiles, fp16_unit = _units()
    no_unit = (
        "torch computes {} without hardware for it 2.4 to 4 times slower than these kernels, at 16 tokens and at 512"
    )
    few = "reads weights at memory speed where torch reaches half of it; {}"
    rows: tuple[tuple[torch.dtype, int | None, str], ...] = (
        (torch.float32, 32, few.format("1.6 x at 32 tokens, even at 64, torch wins at 512")),
        (torch.bfloat16, 8, few.format("even at 8 tokens, torch's AMX wins 1.5 x at 16 and 2.8 x at 32"))
        if bf16_tiles
        else (torch.bfloat16, 32, few.format("even at 32 tokens"))
        if bf16_unit
        else (torch.bfloat16, None, no_unit.format("bfloat16")),
        (torch.float16, 32, few.format("beyond 32 unmeasured"))
        if fp16_unit
        else (torch.float16, None, no_unit.format("float16")),
    )
    return tuple(Rule(LINEAR_OPS, "cpu", "cpu", (dtype,), tokens, reason) for dtype, tokens, reason in rows)


def _few_bits_cpu_rules() -> tuple[Rule, ...]:
    """Beyond these numbers of tokens torch multiplies rows of the weight that are made in each call, see lorap/nn/unpacked.py."""
    bf16_unit, bf16_tiles, fp16_unit = _units()
    made = "beyond, torch multiplies rows that are made in each call: {}"
    bf16, estimated = made.format("5 to 19 % faster at 256"), made.format("estimated for AMX, not measured")
    tiles = native.quantized_cpu_isa().startswith("avx512")
    no_unit = "torch multiplies in {} without hardware for it"
    # dtype -> tokens for weights of 4 and 8 bits, and on a trellis, which takes three times as long to make rows of.
    most: dict[torch.dtype, tuple[tuple[int | None, int | None], str]] = {
        torch.float32: ((128, 128), made.format("even from 128 to 512"))
        if tiles
        else ((12, 12), made.format("1.4 x at 32 with AVX2")),
        torch.bfloat16: ((16, 32), estimated)
        if bf16_tiles
        else ((96, 160), bf16)
        if bf16_unit
        else ((None, None), no_unit),
        torch.float16: ((32, 32), made.format("unmeasured")) if fp16_unit else ((None, None), no_unit),
    }
    rounded = _ROUNDED if EIGHT_BITS and native.quantized_cpu_isa().endswith(native.EIGHT_BITS) else ""
    return tuple(
        Rule(ops, "cpu", "cpu", (dtype,), tokens[place], more + reason.format(str(dtype).removeprefix("torch.")))
        for ops, place, more in ((QUANTIZED_OPS, 0, rounded), (("trellis_linear",), 1, ""))
        for dtype, (tokens, reason) in most.items()
    )


_DECODE_GPU = (
    "modelled, not measured: in a CUDA graph, for sizes where it is 5 % faster than two cuBLAS calls and than dense"
)
_ONE_LAUNCH = (
    "modelled, not measured: both factors in one launch, where that is 5 % faster than the next row, K and each R are multiples "
    "of 32 (4 bits) or 16 (8), and tokens times R fit the shared memory; all else goes to the next row"
)
_IN_REGISTERS = "modelled, not measured: numbers become floats in registers; torch writes the matrix in 16 bits first"
_SEARCH = "40 to 70 times as fast as torch on one core, which writes the errors of all windows to memory"
_ONE_READ = "modelled, not measured: one read of x; torch reads it twice and writes a float32 copy"

# The first row that fits wins; everything else is torch's. On a GPU, from 256 tokens on, two cuBLAS GEMMs are within 7 % of
# anything fused.
RULES = (
    *_cpu_rules(),
    *_few_bits_cpu_rules(),
    Rule(("trellis_search",), "cpu", "cpu", (torch.float32,), None, _SEARCH),
    Rule(tuple(op for op in LINEAR_OPS if op != "linear"), "cuda", "triton", HALVES, 32, _DECODE_GPU),
    Rule(("quantized_low_rank_linear",), "cuda", "cuda", HALVES, FMA_TOKENS, _ONE_LAUNCH),
    Rule(FEW_BITS_OPS, "cuda", "triton", HALVES, None, _IN_REGISTERS),
    Rule(("channel_sq_norm",), "cuda", "triton", FLOATS, None, _ONE_READ),
)

# What a forced backend can run at all, whether or not it wins. The one-launch CUDA kernels for 16 bits, modelled as fast as the
# Triton pair, stay out of RULES until they have been measured faster.
ABLE: dict[str, dict[tuple[str, str], tuple[torch.dtype, ...]]] = {
    "cpu": {(op, "cpu"): FLOATS for op in (*LINEAR_OPS, *QUANTIZED_OPS, "trellis_linear")}
    | {("trellis_search", "cpu"): (torch.float32,)},
    "triton": {(op, "cuda"): FLOATS for op in (*LINEAR_OPS, *FEW_BITS_OPS, "channel_sq_norm")},
    "cuda": {(op, "cuda"): HALVES for op in (*PIVOTED_OPS, "quantized_low_rank_linear")},
}


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is none of {', '.join(BACKENDS)} (LORAP_BACKEND)")
    return name


_FROM_ENVIRONMENT = _checked(os.environ.get("LORAP_BACKEND") or "auto")
_forced: ContextVar[str] = ContextVar("lorap_backend", default=_FROM_ENVIRONMENT)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block.

    Raises:
        BackendError: there is no backend of that name.
    """
    token = _forced.set(_checked(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def current() -> str:
    """The backend that is forced, or ``auto``."""
    return _forced.get()


def choose(op: str, x: Tensor, tokens: int, *, without: str | None = None) -> str:
    """Name of the backend that runs an op.

    Args:
        op: one of ``lorap.nn.implementations.OPS``.
        x: its first argument, for device and dtype.
        tokens: how many tokens x holds.
        without: a backend that does not take the arguments, or is known to fail; where none is forced, the others are asked.

    Raises:
        BackendError: the forced backend cannot run this call.
    """
    forced = _forced.get()
    if forced == "reference" or tokens == 0:
        return "reference"
    device = "cpu" if x.is_cpu else x.device.type  # the property alone takes half a microsecond
    backend = _best(op, device, x.dtype, tokens, without) if forced == "auto" else _able(forced, op, x)
    if backend == "triton" and forced == "auto" and op in graphs.OPS and not graphs.wanted():
        return "reference"
    if backend not in ("triton", "cuda") or _trusted(op, backend, x, tokens, forced):
        return backend
    return choose(op, x, tokens, without=backend) if backend == "cuda" and forced == "auto" else "reference"


@functools.lru_cache(maxsize=4096)
def _best(op: str, device: str, dtype: torch.dtype, tokens: int, without: str | None = None) -> str:
    for rule in RULES:
        fits = op in rule.ops and rule.device == device and dtype in rule.dtypes and rule.backend != without
        if fits and (rule.max_tokens is None or tokens <= rule.max_tokens):
            if missing(rule.backend) is None:
                return rule.backend
            if rule.backend == "cpu" and native.MISSING:
                _tell_once(native.MISSING)
    return "reference"


@functools.cache
def _tell_once(reason: str) -> None:
    """An installation without kernels works, several times slower: pip hides what the build said of it."""
    message = f"lorap's C++ kernels are missing, so torch does their work, more slowly: {reason}"
    warnings.warn(message + " (LORAP_BACKEND=reference: do without and be silent)", RuntimeWarning, stacklevel=5)


def missing(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all."""
    if backend == "triton":
        return None if _has_triton() else "triton is not installed"
    if backend == "cuda" and not native.HAS_CUDA:
        return native.MISSING or "this build has no CUDA part (nvcc was not there), or an older one"
    if backend == "cpu" and native.cpu_isa(torch.float32) == "scalar":
        return "no vector instructions that lorap knows; torch has better kernels than its plain C++"
    return native.MISSING if backend == "cpu" else None


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # some hosts put an empty module of that name in the way
        return False


def _able(backend: str, op: str, x: Tensor) -> str:
    device = "cuda" if backend == "triton" and _interpreting() else x.device.type
    if reason := missing(backend):
        raise BackendError(f"LORAP_BACKEND={backend}: {reason}")
    if x.dtype not in ABLE[backend].get((op, device), ()):
        raise BackendError(f"LORAP_BACKEND={backend} cannot run {op} on {x.device.type} in {x.dtype}; use auto")
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# What is wrong with a kernel on a device; None where it has passed.
_verdicts: dict[tuple[str, str, torch.device, torch.dtype, int], str | None] = {}


def _trusted(op: str, backend: str, x: Tensor, tokens: int, forced: str) -> bool:
    if x.device.type == "cpu":
        return True  # the interpreter
    key = (op, backend, x.device, x.dtype, form_of(op, tokens))
    first = key not in _verdicts
    if first:
        if torch.cuda.is_current_stream_capturing():
            return False  # compiling and comparing inside a graph capture would break it; warm up before capturing
        _verdicts[key] = self_check(op, backend, x.device, x.dtype, tokens=tokens)
    problem = _verdicts[key]
    if problem is None:
        return True
    message = f"lorap's {backend} kernel {op} is not used on {x.device} in {x.dtype}: {problem}"
    if forced != "auto":
        raise BackendError(message)
    if first:
        others = "Triton or torch does" if backend == "cuda" else "torch does"
        warnings.warn(f"{message}; {others} its work", RuntimeWarning, stacklevel=4)
    return False


def self_check(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, *, tokens: int | None = None
) -> str | None:
    """Run small examples of an op beside the float64 reference.

    Args:
        op: one of ``lorap.nn.implementations.OPS``.
        backend: that has it.
        device: to run on.
        dtype: of the arguments.
        tokens: check the form of the kernels for so many, which takes a few compilations; None for all forms.

    Returns:
        What is wrong with the results, in words, or None.
    """
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for count, k, pivoted in examples_of(op):
        if tokens is not None and form_of(op, tokens) != form_of(op, count):
            continue
        arguments = example(op, device, dtype, count, k, pivoted)
        try:
            got = _as_tuple(implementation(op, backend)(*arguments))
            exact = _as_tuple(implementation(op, "reference")(*_to_double(arguments)))
            error = max(float((g.double() - e).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True))
        except Exception as failure:  # whatever a driver or compiler throws must not stop a model that torch can run
            return f"{type(failure).__name__}: {failure}"
        if not error <= limit:
            case = f"{count} tokens of {k} features" + ", pivoted" * pivoted
            return f"relative error {error:.3g} with {case}, more than {limit:g}"
    return None


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(_to_double, value)) if isinstance(value, (list, tuple)) else value
