"""y = x @ right.T @ left.T + bias for a few rows of x, in two launches, for up to three layers that read the same x.

Shrink: T (M, R) = x (M, K) @ right.T, where R counts the ranks of all layers, side by side.
Expand: y (M, N) = T @ left.T + bias, each layer from its own columns of T into its own columns of y.

At 1 <= M <= 32, where a model generates text, the time goes into reading every weight once, so everything here serves
to keep enough of those reads in flight on every SM:

- A layer has few rank rows (512 to 1536) for the 132 SMs of an H100. Shrink therefore may split K as well, leaving
  several float32 parts of T in a workspace. Expand adds the parts up as it reads T, always in the same order: no
  atomics, no third launch, the same bytes on every run. But every expand program reads the parts again, so the split
  must not be deep: low_rank_settings.py weighs the two.
- The weights are the tall side of the product. For M = 1 these are multiply-adds on 16-byte loads, one tile ahead. For
  more rows it is tl.dot with 64 weight rows and x^T as 16 or 32 columns: wgmma needs 64 rows, which x does not have.
- q, k, v (or gate, up) share both launches; a program finds its layer by its index.

Any M, K, N and rank work, in float32, float16 and bfloat16; but where K or a rank is no multiple of 16, weights are read
two bytes at a time, which is slow. Compiled and interpreted, never run on a GPU: settings follow a model, not timings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import configs
from .aot import Variant
from .low_rank_kernels import expand_kernel, shrink_kernel, silu_gated_expand_kernel
from .low_rank_settings import NUM_SMS, block_m, cdiv, expand_config, part_length, parts, power_of_2, shrink_config

MAX_LAYERS = 3
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
POINTERS |= {torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8"}  # packed weights
# Triton's interpreter holds bfloat16 as integers and computes nonsense with them, without an error.
INTERPRETED = triton.knobs.runtime.interpret


def low_rank_linear_group(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    pivot_rows: Sequence[Tensor] = (),
    *,
    pdl: bool = False,
) -> Tensor:
    """:func:`lorap.kernels.reference.low_rank_linear_group` for one to three layers.

    ``pdl`` (programmatic dependent launch) lets expand start and read its first weights before shrink has ended, on
    GPUs from sm_90 on. It helps where launches follow each other at once, as in a CUDA graph.
    """
    y, launches = group_launches(x, right, left, bias, pivot_rows, pdl=pdl)
    run(launches, x)
    return y


def low_rank_silu_gated_linear(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] = (), *, pdl: bool = False
) -> Tensor:
    """:func:`lorap.kernels.reference.low_rank_silu_gated_linear`; ``pdl`` as in low_rank_linear_group."""
    y, launches = silu_gated_launches(x, right, left, bias, pdl=pdl)
    run(launches, x)
    return y


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def run(launches: Sequence[Launch], x: Tensor) -> None:
    """Launch on the device of x, which need not be the current one."""
    with torch.cuda.device_of(x):
        for kernel, grid, arguments, options in launches:
            kernel[grid](*arguments, **options)


def group_launches(
    x: Tensor,
    right: Sequence[Tensor],
    left: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    pivot_rows: Sequence[Tensor] = (),
    *,
    pdl: bool = False,
) -> tuple[Tensor, list[Launch]]:
    """The output of low_rank_linear_group, not yet written, and the launches that write it."""
    tokens, right, left = checked(x, right, left)
    bias, biased = _fill_gaps(bias)
    pivots, pivoted = _fill_gaps(pivot_rows)
    ranks = tuple(factor.shape[0] for factor in right)
    rows = tuple(factor.shape[0] for factor in left)
    num_pivots = [rank if pivoted >> i & 1 else 0 for i, rank in enumerate(ranks)]
    out_features = sum(rows) + sum(num_pivots)
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y, []
    shrink, expand = _settings(tokens.device, tokens.dtype, *tokens.shape, ranks, rows, pdl)
    t, first = _shrink_launch(tokens, right, shrink)
    layers = (*_padded(left, None), *_padded(bias, None), *_padded(pivots, None))
    sizes = (len(tokens), *_padded(ranks, 0), *_padded(rows, 0), t.stride(1), t.stride(0), out_features)
    flags = {"NUM_LAYERS": len(right), "BIASED": biased, "PIVOTED": pivoted, "PARTS": len(t), "BLOCK_P": 1}
    if pivoted:  # an element at least for every thread
        searched = [count for count, others in zip(num_pivots, rows, strict=True) if others]
        flags["BLOCK_P"] = power_of_2(max(32 * expand["num_warps"], *searched, 0))
    blocks = sum(cdiv(count, expand["BLOCK_N"]) for count in (*rows, *num_pivots))
    grid = (blocks, cdiv(len(tokens), expand["BLOCK_M"]))
    return y, [first, Launch(expand_kernel, grid, (t, *layers, y, *sizes), expand | flags)]


def silu_gated_launches(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor], bias: Sequence[Tensor] = (), *, pdl: bool = False
) -> tuple[Tensor, list[Launch]]:
    """The output of low_rank_silu_gated_linear, not yet written, and the launches that write it."""
    tokens, right, left = checked(x, right, left)
    rows = tuple(factor.shape[0] for factor in left)
    if len(rows) != 2 or rows[0] != rows[1]:
        raise ValueError(f"gate and up must be two layers of equal size, got out_features={rows}")
    y = x.new_empty(*x.shape[:-1], rows[0])
    if y.numel() == 0:
        return y, []
    ranks = tuple(factor.shape[0] for factor in right)
    shrink, expand = _settings(tokens.device, tokens.dtype, *tokens.shape, ranks, rows, pdl)
    t, first = _shrink_launch(tokens, right, shrink)
    biases = [b.contiguous() if b.numel() else None for b in bias] or [None, None]
    arguments = (t, *left, *biases, y, len(tokens), rows[0], *ranks, t.stride(1), t.stride(0), rows[0])
    grid = (cdiv(rows[0], expand["BLOCK_N"]), cdiv(len(tokens), expand["BLOCK_M"]))
    return y, [first, Launch(silu_gated_expand_kernel, grid, arguments, expand | {"PARTS": len(t)})]


def _shrink_launch(tokens: Tensor, right: Sequence[Tensor], settings: dict[str, Any]) -> tuple[Tensor, Launch]:
    """T in parts, (PARTS, M, sum of the ranks) float32, and the launch that writes it."""
    m, k = tokens.shape
    ranks = [factor.shape[0] for factor in right]
    t = torch.empty(parts(k, settings), m, sum(ranks), dtype=torch.float32, device=tokens.device)
    grid = (sum(cdiv(rank, settings["BLOCK_N"]) for rank in ranks), len(t), cdiv(m, settings["BLOCK_M"]))
    sizes = (m, k, part_length(k, settings), *_padded(ranks, 0), tokens.stride(0), t.stride(1), t.stride(0))
    options = {name: value for name, value in settings.items() if name != "SPLIT_K"} | {"NUM_LAYERS": len(right)}
    return t, Launch(shrink_kernel, grid, (tokens, *_padded(right, None), t, *sizes), options)


@lru_cache(4096)
def _settings(
    device: torch.device, dtype: torch.dtype, m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], pdl: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of both launches that do not depend on biases and pivots.

    A file of tuned settings calls the kernels "shrink" and "expand", and knows m, k, the sum of the ranks, the sum of
    the rows of the left factors (n) and the dtype.
    """
    name, num_sms, dependent = _device_info(device)
    pdl = pdl and dependent
    sizes = {"m": m, "k": k, "rank": sum(ranks), "n": sum(rows), "dtype": str(dtype).removeprefix("torch.")}
    model = {"itemsize": dtype.itemsize, "num_sms": num_sms}
    shrink = configs.lookup("shrink", name, **sizes) or shrink_config(m, k, ranks, rows, **model)
    expand = configs.lookup("expand", name, **sizes) or expand_config(m, k, ranks, rows, **model, pdl=pdl)
    common = {"GEMV": m == 1, "BLOCK_M": block_m(m), "PDL": pdl, "UPCAST": INTERPRETED, "enable_fp_fusion": True}
    whole = {"WHOLE": pdl and m == 1 and expand["BLOCK_K"] >= max(ranks)}
    return shrink | common, expand | common | whole | ({"launch_pdl": True} if pdl else {})


@cache
def _device_info(device: torch.device) -> tuple[str, int, bool]:
    """The name of a GPU, its SMs, and whether it has dependent launches; an H100's numbers where there is no GPU."""
    if device.type != "cuda":
        return device.type, NUM_SMS, True
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count, properties.major >= 9


def checked(
    x: Tensor, right: Sequence[Tensor], left: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """x as (M, K) and the factors, each with its last dimension contiguous."""
    if not 1 <= len(right) == len(left) <= MAX_LAYERS:
        raise ValueError(f"one to {MAX_LAYERS} layers share a launch, got {len(right)} right and {len(left)} left")
    for first, second in zip(right, left, strict=True):
        if first.shape[1] != x.shape[-1] or second.shape[1] != first.shape[0]:
            shapes = f"x {tuple(x.shape)}, right {tuple(first.shape)}, left {tuple(second.shape)}"
            raise ValueError(f"{shapes} do not fit together")
        if not x.dtype == first.dtype == second.dtype or x.dtype not in POINTERS:
            raise TypeError(f"x is {x.dtype}, right {first.dtype}, left {second.dtype}")
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return tokens, tuple(factor.contiguous() for factor in right), tuple(factor.contiguous() for factor in left)


def _fill_gaps(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The tensors, with one of them in place of each that has no elements, and a bit for each that has."""
    real = [tensor.contiguous() for tensor in tensors if tensor.numel()]
    filled = [tensor.contiguous() if tensor.numel() else real[0] for tensor in tensors] if real else []
    return filled, sum(1 << i for i, tensor in enumerate(tensors) if tensor.numel())


def _padded(items: Sequence[Any], filler: Any) -> list[Any]:
    return [*items, *[filler] * (MAX_LAYERS - len(items))]


def variant(launch: Launch, name: str) -> Variant:
    """What Triton compiles for a launch whose tensors are all aligned."""
    kernel = launch.kernel
    arguments = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    given = {key: value for key, value in arguments.items() if value is not None}
    constexprs = arguments | launch.options
    return Variant(
        name=f"{kernel.__name__.removesuffix('_kernel')}-{name}",
        kernel=kernel,
        signature={key: "i32" if isinstance(value, int) else POINTERS[value.dtype] for key, value in given.items()},
        constexprs={key: constexprs[key] for key in kernel.arg_names if key not in given},
        divisible=[
            key for key, value in given.items() if key != "M" and (isinstance(value, Tensor) or value % 16 == 0)
        ],
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
    )


def shipped_configs() -> Iterator[Variant]:
    """The kernels as launched on an H100 for layers of known models, each machine code once."""
    seen = set()
    for name, launches in _model_launches():
        for launch in launches:
            made = variant(launch, name)
            code = repr((made.kernel, made.signature, made.constexprs, made.divisible, made.num_warps, made.num_stages))
            if code not in seen:
                seen.add(code)
                yield made


def _model_launches() -> Iterator[tuple[str, list[Launch]]]:
    llama, llama_3, smollm = (
        ((512, 512, 1536), (4096,) * 3),
        ((1024, 512, 768), (4096, 1024, 1024)),
        ((64, 64, 128), (576, 192, 192)),
    )
    for m in (1, 8, 16, 32):
        for rank in (512, 1024, 1536):
            yield _layers(m, 4096, (rank,), (4096,))
        yield _layers(m, 4096, *llama)
        yield _layers(m, 4096, *llama_3)
        yield _layers(m, 576, *smollm)
    for m in (1, 16):
        yield _layers(m, 4096, (1472, 1472), (11008, 11008), kind="gated")
        yield _layers(m, 4096, *llama, kind="pivoted")
        yield _layers(m, 4096, *llama, kind="pivoted", pdl=True)
        yield _layers(m, 4096, (1024,), (4096,), dtype=torch.float32)
    yield _layers(16, 4096, (1024,), (4096,), dtype=torch.float16)


def _layers(
    m: int,
    k: int,
    ranks: Sequence[int],
    rows: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    kind: str = "plain",
    pdl: bool = False,
) -> tuple[str, list[Launch]]:
    """A name and the launches for layers of these sizes; kind "pivoted" also has biases."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    pivoted = kind == "pivoted"
    right = [meta(rank, k) for rank in ranks]
    left = [meta(n - rank * pivoted, rank) for n, rank in zip(rows, ranks, strict=True)]
    name = "-".join([POINTERS[dtype][1:], f"m{m}-k{k}", *(f"{n}r{r}" for n, r in zip(rows, ranks, strict=True)), kind])
    if kind == "gated":
        return name, silu_gated_launches(meta(m, k), right, left, pdl=pdl)[1]
    bias = [meta(n) for n in rows] if pivoted else ()
    pivots = [meta(rank, dtype=torch.int64) for rank in ranks] if pivoted else ()
    return name + "-pdl" * pdl, group_launches(meta(m, k), right, left, bias, pivots, pdl=pdl)[1]
