"""y = silu(x @ gate.T) * (x @ up.T) with gate and up in 4 or 8 bits, in one launch: the first half of a gated FFN.

The products are those of :mod:`lorap.kernels.quantized_linear`; a program reads the same rows of both weights, one after the
other, and K is not split, since partial products could not go through silu.

Compiled for sm_80, 90 and 100 and interpreted, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .aot import Variant
from .cost import FUSED_TOKENS
from .low_rank_linear import Launch, run
from .quantized_kernels import quantized_silu_gated_kernel
from .quantized_linear import Weight, as_rows, checked, dequantized, meta_weight, stored_as, unique
from .quantized_settings import settings


def quantized_silu_gated_linear(
    x: Tensor, gate_packed: Tensor, gate_scales: Tensor, up_packed: Tensor, up_scales: Tensor, bits: int, group: int
) -> Tensor:
    """See :func:`lorap.kernels.reference.quantized_silu_gated_linear`."""
    gate = checked(gate_packed, gate_scales, bits, group, x.shape[-1], x.dtype)
    up = checked(up_packed, up_scales, bits, group, x.shape[-1], x.dtype)
    if len(gate_packed) != len(up_packed):
        raise ValueError(f"gate has {len(gate_packed)} rows, up has {len(up_packed)}")
    tokens = as_rows(x)
    if len(tokens) > FUSED_TOKENS:
        return F.silu(F.linear(x, dequantized(gate, x.shape[-1]))) * F.linear(x, dequantized(up, x.shape[-1]))
    y = x.new_empty(*x.shape[:-1], len(gate_packed))
    run(gated_launches(tokens, gate, up, y.view(len(tokens), len(gate_packed))), x)
    return y


def gated_launches(x: Tensor, gate: Weight, up: Weight, y: Tensor) -> list[Launch]:
    """What writes y (M, N) for x (M, K); nothing where y has no elements."""
    if not y.numel():
        return []
    (m, k), n = x.shape, len(gate.packed)
    chosen = settings(m, k, n, gate.bits, gate.group, weights=2)
    stored, options = stored_as(gate, m, chosen)
    sizes = (m, n, k, stored.shape[1] // options["ALIGN"], gate.scales.shape[1], x.stride(0))
    arguments = (x, stored, gate.scales, stored_as(up, m, chosen)[0], up.scales, y, *sizes)
    grid = (triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(m, options["BLOCK_M"]))
    return [Launch(quantized_silu_gated_kernel, grid, arguments, options)]


def shipped_configs() -> Iterator[Variant]:
    """The kernels as launched on an H200 for the FFNs of LLaMA-7B and LLaMA-3-8B."""
    yield from unique(_shipped_launches())


def _shipped_launches() -> Iterator[tuple[str, Sequence[Launch]]]:
    for bits in (4, 8):
        for n in (5504, 14336):
            for m in (1, 16):
                x, y = (torch.empty(m, size, dtype=torch.bfloat16, device="meta") for size in (4096, n))
                weight = meta_weight(n, 4096, bits, 64)
                yield f"int{bits}-m{m}-{n}x4096", gated_launches(x, weight, weight, y)
