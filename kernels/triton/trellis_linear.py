"""y = x @ weight.T + bias with a weight on a trellis: x (M, K), packed (ceil(N / 64), K * 2 * bits), y (M, N).

A program takes one tile of 64 rows and some of its columns, 128 at a time, whose words lie in a row. The numbers meet x in
``tl.dot``, for one token too: with 15 absent ones tensor cores take one instruction for four weights, and multiply-adds would
take four. Where N alone gives too few programs they share K, and :func:`lorap.kernels.linear.sum_partials_kernel` adds up. Beyond
``FUSED_TOKENS`` tokens each number would be made anew for every 64 of them: there one launch writes them all
(:func:`dequantized`), and torch multiplies.

Compiled for sm_80, 90 and 100 and interpreted, never run on a GPU: settings are a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import trellis
from .aot import Variant
from .cost import FUSED_TOKENS
from .linear import INTERPRETED, TYPES
from .low_rank_linear import Launch, run
from .quantized_linear import DTYPES, Weight, as_rows, check_vector, sum_launch, unique
from .quantized_settings import clipped, parts, steps_per_part
from .trellis_kernels import dequantize_trellis_kernel, trellis_linear_kernel
from .trellis_settings import block_k, settings


def trellis_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """See :func:`lorap.kernels.reference.trellis_linear`."""
    weight = checked(packed, scales, bits, group, x.shape[-1], x.dtype)
    n, tokens = len(scales), as_rows(x)
    check_vector("bias", bias, n)
    if len(tokens) > FUSED_TOKENS:
        return F.linear(x, dequantized(weight, x.shape[-1]), bias)
    y = x.new_empty(*x.shape[:-1], n)
    run(linear_launches(tokens, weight, bias, y.view(len(tokens), n)), x)
    return y


def linear_launches(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> list[Launch]:
    """What writes y (M, N) for x (M, K); nothing where y has no elements."""
    (m, k), n = x.shape, len(weight.scales)
    if not y.numel():
        return []
    chosen = settings(m, k, n, weight.group)
    count = parts(k, chosen)
    bias = None if bias is None else bias.contiguous()
    if count == 1:
        return [_product_launch(x, weight, y[None], bias, chosen)]
    partial = torch.empty(count, m, n, dtype=torch.float32, device=x.device)
    return [_product_launch(x, weight, partial, None, chosen), sum_launch(partial, bias, y)]


def _product_launch(x: Tensor, weight: Weight, y: Tensor, bias: Tensor | None, chosen: dict[str, int]) -> Launch:
    """x (M, K), and y (parts, M, N) to write to, one for each part of K."""
    (m, k), (n, row_groups) = x.shape, weight.scales.shape
    options = {name: value for name, value in chosen.items() if name != "SPLIT_K"}
    dtype = torch.float32 if INTERPRETED and x.dtype == torch.bfloat16 else x.dtype
    options |= {"BITS": weight.bits, "DTYPE": DTYPES[dtype], "enable_fp_fusion": True}
    arguments = (x, weight.packed, weight.scales, bias, y, m, n, k, row_groups, steps_per_part(k, chosen), x.stride(0))
    grid = (trellis.tiles(n), len(y), triton.cdiv(m, options["BLOCK_M"]))
    return Launch(trellis_linear_kernel, grid, arguments, options)


def dequantized(weight: Weight, k: int) -> Tensor:
    """The weight (N, k) in the dtype of its scales, in one launch."""
    dense = weight.scales.new_empty(len(weight.scales), k)
    if dense.numel():
        run([dequantize_launch(weight, dense)], dense)
    return dense


def dequantize_launch(weight: Weight, dense: Tensor) -> Launch:
    """What writes ``dense`` (N, K)."""
    (n, k), block = dense.shape, block_k(weight.group)
    options = {"BITS": weight.bits, "GROUP": clipped(weight.group, k), "BLOCK_K": block}
    options |= {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    arguments = (weight.packed, weight.scales, dense, n, k, weight.scales.shape[1])
    return Launch(dequantize_trellis_kernel, (trellis.tiles(n), triton.cdiv(k, block)), arguments, options)


def checked(packed: Tensor, scales: Tensor, bits: int, group: int, k: int, dtype: torch.dtype) -> Weight:
    """A weight of k columns, contiguous, with scales in ``dtype``; a ValueError where its tensors do not fit together."""
    shapes = (trellis.packed_shape(len(scales), k, bits), (len(scales), -(-k // group)))
    if (tuple(packed.shape), tuple(scales.shape)) != shapes or packed.dtype != torch.int32 or dtype not in DTYPES:
        found = f"packed {tuple(packed.shape)} {packed.dtype}, scales {tuple(scales.shape)}, x (..., {k}) {dtype}"
        raise ValueError(f"{found} with {bits} bits in groups of {group} do not fit together: {shapes} are needed")
    return Weight(packed.contiguous(), scales.to(dtype).contiguous(), bits, group)


# (N, K) of projections of LLaMA-7B and of LLaMA-3-8B, and one of SmolLM2-135M, whose rows no tile and no step divides.
SHIPPED_SHAPES = ((4096, 4096), (4096, 11008), (1024, 4096), (576, 1536))
SHIPPED_GROUP = 256


def meta_weight(n: int, k: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    """A weight that has sizes and no values."""
    packed = torch.empty(trellis.packed_shape(n, k, bits), dtype=torch.int32, device="meta")
    return Weight(packed, torch.empty(n, -(-k // group), dtype=dtype, device="meta"), bits, group)


def shipped_configs() -> Iterator[Variant]:
    """The kernels as launched on an H200 for layers of known models, and in float16 and float32 for one of them."""
    yield from unique(_shipped_launches())


def _shipped_launches() -> Iterator[tuple[str, Sequence[Launch]]]:
    cases = [
        (m, *shape, bits, torch.bfloat16) for bits in trellis.BITS for shape in SHIPPED_SHAPES for m in (1, 32, 64)
    ]
    cases += [(1, 4096, 4096, bits, dtype) for bits in trellis.BITS for dtype in (torch.float16, torch.float32)]
    for m, n, k, bits, dtype in cases:
        weight = meta_weight(n, k, bits, SHIPPED_GROUP, dtype)
        x, y = (torch.empty(m, size, dtype=dtype, device="meta") for size in (k, n))
        name = f"{TYPES[dtype]}-tcq{bits}-m{m}-{n}x{k}"
        yield name, linear_launches(x, weight, None, y)
        if m == 64:
            yield name, [dequantize_launch(weight, weight.scales.new_empty(n, k))]
