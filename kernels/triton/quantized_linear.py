"""y = x @ (numbers * scales).T + bias with a weight of 4 or 8 bits: x (M, K), packed (N, words), y (M, N).

One token: multiply-adds of float32 on words as they come, 16 bytes a thread. More: the numbers become 16-bit ones in registers,
exactly, and meet x^T in ``tl.dot`` group by group, the weight being the tall side as in :mod:`lorap.kernels.linear`. Where N
alone gives too few programs they share K, and :func:`lorap.kernels.linear.sum_partials_kernel` adds up. Beyond ``FUSED_TOKENS``
tokens each number would be made anew for every 64 of them: there one launch writes them all (:func:`dequantized`), and torch
multiplies.

Compiled for sm_80, 90 and 100 and interpreted, never run on a GPU: settings are a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant
from .cost import FUSED_TOKENS
from .linear import BLOCK_SUM, INTERPRETED, TYPES, sum_partials_kernel
from .low_rank_linear import Launch, run, variant
from .packing import words
from .quantized_kernels import dequantize_kernel, quantized_linear_kernel
from .quantized_settings import Settings, parts, settings, steps_per_part

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

ELEMENTS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class Weight(NamedTuple):
    """A weight as :mod:`lorap.kernels.packing` or :mod:`lorap.kernels.trellis` has it; the scales have the dtype of x."""

    packed: Tensor
    scales: Tensor
    bits: int
    group: int


def quantized_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """See :func:`lorap.kernels.reference.quantized_linear`."""
    weight = checked(packed, scales, bits, group, x.shape[-1], x.dtype)
    tokens = as_rows(x)
    check_vector("bias", bias, len(packed))
    if len(tokens) > FUSED_TOKENS:
        return F.linear(x, dequantized(weight, x.shape[-1]), bias)
    y = x.new_empty(*x.shape[:-1], len(packed))
    run(linear_launches(tokens, weight, bias, y.view(len(tokens), len(packed))), x)
    return y


def linear_launches(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> list[Launch]:
    """What writes y (M, N) for x (M, K); nothing where y has no elements."""
    (m, k), n = x.shape, len(weight.packed)
    if not y.numel():
        return []
    chosen = settings(m, k, n, weight.bits, weight.group)
    count = parts(k, chosen)
    bias = None if bias is None else bias.contiguous()
    if count == 1:
        return [product_launch(x[None], weight, y[None], chosen, bias=bias)]
    partial = torch.empty(count, m, n, dtype=torch.float32, device=x.device)
    return [product_launch(x[None], weight, partial, chosen), sum_launch(partial, bias, y)]


def sum_launch(partial: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
    """What adds up ``partial`` (parts, M, N) and a bias in y (M, N)."""
    count, m, n = partial.shape
    options = {"SPLIT_K": count, "BLOCK": BLOCK_SUM, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return Launch(sum_partials_kernel, (m, triton.cdiv(n, BLOCK_SUM)), (partial, bias, y, m, n), options)


def product_launch(
    x: Tensor,
    weight: Weight,
    y: Tensor,
    chosen: Settings,
    *,
    bias: Tensor | None = None,
    pivot_rows: Tensor | None = None,
) -> Launch:
    """The launch of one product.

    Args:
        x: (parts, M, K), whose sum is multiplied.
        weight: (N, K).
        y: (parts, M, N) to write to, one for each part of K; with pivots (1, M, N + K).
        chosen: from :func:`lorap.kernels.quantized_settings.settings`.
        bias: (N,), with pivots (N + K,), or None.
        pivot_rows: (K,): the columns of the output that are the columns of x themselves; None for no such.
    """
    _, m, k = x.shape
    n = len(weight.packed)
    stored, options = stored_as(weight, m, chosen)
    options |= {"PARTS": len(x), "BLOCK_P": 1}
    blocks = triton.cdiv(n, options["BLOCK_N"])
    if pivot_rows is not None:
        blocks += triton.cdiv(k, options["BLOCK_N"])
        options["BLOCK_P"] = triton.next_power_of_2(max(32 * options["num_warps"], k))  # one for each thread at least
    sizes = (m, n, k, stored.shape[1] // options["ALIGN"], weight.scales.shape[1], steps_per_part(k, chosen))
    strides = (x.stride(1), x.stride(0), y.stride(1))
    arguments = (x, stored, weight.scales, bias, pivot_rows, y, *sizes, *strides)
    grid = (blocks, len(y), triton.cdiv(m, options["BLOCK_M"]))
    return Launch(quantized_linear_kernel, grid, arguments, options)


def stored_as(weight: Weight, m: int, chosen: Settings) -> tuple[Tensor, dict[str, object]]:
    """The packed numbers as the kernel for m tokens reads them, and the options of a launch."""
    element = 32 if m == 1 else chosen["BLOCK_K"] * weight.bits // 16
    stored = weight.packed.view(ELEMENTS[element])
    wide = 16 // stored.element_size()
    dtype = torch.float32 if INTERPRETED and weight.scales.dtype == torch.bfloat16 else weight.scales.dtype
    options = {name: value for name, value in chosen.items() if name != "SPLIT_K"}
    options |= {"BITS": weight.bits, "DTYPE": DTYPES[dtype], "enable_fp_fusion": True}
    # Rows that begin at multiples of 16 bytes are read 16 at a time.
    return stored, options | {"ALIGN": wide if stored.shape[1] % wide == 0 else wide // 4}


def dequantized(weight: Weight, k: int) -> Tensor:
    """The weight (N, k) in the dtype of its scales, in one launch."""
    dense = weight.scales.new_empty(len(weight.packed), k)
    if dense.numel():
        run([dequantize_launch(weight, dense)], dense)
    return dense


def dequantize_launch(weight: Weight, dense: Tensor) -> Launch:
    """What writes ``dense`` (N, K)."""
    n, k = dense.shape
    stored = weight.packed.view(torch.uint8)
    group = min(weight.group, max(128, triton.next_power_of_2(k)))
    options = {"BITS": weight.bits, "GROUP": group, "BLOCK_N": 4, "BLOCK_K": 2048}
    arguments = (stored, weight.scales, dense, n, k, stored.shape[1] // 4, weight.scales.shape[1])
    grid = (triton.cdiv(n, 4), triton.cdiv(k, 2048))
    return Launch(
        dequantize_kernel, grid, arguments, options | {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    )


def as_rows(x: Tensor) -> Tensor:
    """x as (M, K), with its last dimension contiguous."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_vector(name: str, vector: Tensor | None, size: int) -> None:
    """A ValueError where there is a vector of another size."""
    if vector is not None and tuple(vector.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, ({size},) is needed")


def checked(packed: Tensor, scales: Tensor, bits: int, group: int, k: int, dtype: torch.dtype) -> Weight:
    """A weight of k columns, contiguous, with scales in ``dtype``; a ValueError where its tensors do not fit together."""
    shapes = ((len(packed), words(k, bits)), (len(packed), -(-k // group)))
    if (tuple(packed.shape), tuple(scales.shape)) != shapes or packed.dtype != torch.int32 or dtype not in DTYPES:
        found = f"packed {tuple(packed.shape)} {packed.dtype}, scales {tuple(scales.shape)}, x (..., {k}) {dtype}"
        raise ValueError(f"{found} with {bits} bits in groups of {group} do not fit together: {shapes} are needed")
    if (
        packed.stride(-1) != 1 or not packed.is_contiguous()
    ):  # one column is contiguous with any stride, but has no bytes
        packed = packed.clone(memory_format=torch.contiguous_format)
    return Weight(packed, scales.to(dtype).contiguous(), bits, group)


# (N, K) of projections of LLaMA-7B and of LLaMA-3-8B, and of a factor whose rows are no multiple of 64 bytes.
SHIPPED_SHAPES = ((4096, 4096), (4096, 11008), (1024, 4096), (4096, 1472))
SHIPPED_GROUPS = {4: 64, 8: 64}


def meta_weight(n: int, k: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    """A weight that has sizes and no values."""
    packed = torch.empty(n, words(k, bits), dtype=torch.int32, device="meta")
    return Weight(packed, torch.empty(n, -(-k // group), dtype=dtype, device="meta"), bits, group)


def unique(launches: Iterator[tuple[str, Sequence[Launch]]]) -> Iterator[Variant]:
    """What Triton compiles for named launches, each machine code once."""
    seen = set()
    for name, some in launches:
        for made in (variant(launch, name) for launch in some):
            code = repr((made.kernel, made.signature, made.constexprs, made.divisible, made.num_warps, made.num_stages))
            if code not in seen:
                seen.add(code)
                yield made


def shipped_configs() -> Iterator[Variant]:
    """The kernels as launched on an H200 for layers of known models, and in float16 and float32 for one of them."""
    yield from unique(_shipped_launches())


def _shipped_launches() -> Iterator[tuple[str, Sequence[Launch]]]:
    cases = [(m, *shape, bits, torch.bfloat16) for bits in (4, 8) for shape in SHIPPED_SHAPES for m in (1, 8, 32, 128)]
    cases += [
        (m, 4096, 4096, bits, dtype) for m in (1, 16) for bits in (4, 8) for dtype in (torch.float16, torch.float32)
    ]
    for m, n, k, bits, dtype in cases:
        weight = meta_weight(n, k, bits, SHIPPED_GROUPS[bits], dtype)
        x, y = (torch.empty(m, size, dtype=dtype, device="meta") for size in (k, n))
        name = f"{TYPES[dtype]}-int{bits}-m{m}-{n}x{k}"
        yield name, linear_launches(x, weight, None, y)
        if m == 128:
            yield name, [dequantize_launch(weight, weight.scales.new_empty(n, k))]
