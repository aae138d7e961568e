"""Sum of squares of every channel over the tokens that count: x (..., K) to (K,) float64, in one read of x.

A program owns BLOCK_K channels and at most 1024 tokens. It squares and adds in float32 registers, BLOCK_T tokens side by
side, so that each sum runs over at most 64 squares, and writes one row of partial sums; torch adds the rows in float64,
in a fixed order. No atomics, hence the same bits on every run. Squares are taken of float32: 300^2 is infinite in
float16, and a square in bfloat16 is off by up to 0.4 %. Compiled for sm_80, 90 and 100, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant
from .reference import CHUNK_TOKENS, token_count

BLOCK_T = 16
BLOCK_K = 256  # at 16 bits, 32 threads times 16 bytes: each warp reads whole rows of 512 bytes
NUM_WARPS = 4
MIN_PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit(do_not_specialize=["T"])
def channel_sq_norm_kernel(
    x_ptr,  # (T, K), rows x_stride apart
    mask_ptr,  # (T,) uint8, or None: every token counts
    partial_ptr,  # (S, K) float32
    T,
    K,
    x_stride,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)  # tokens times channels can exceed 2^31
    channels = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptr += chunk * TOKENS * x_stride
    tokens_left = T - chunk * TOKENS
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, TOKENS, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        counts = tokens < tokens_left
        if mask_ptr is not None:
            counts = counts & (tl.load(mask_ptr + chunk * TOKENS + tokens, mask=counts, other=0) != 0)
        # What does not count is not loaded, rather than multiplied by zero: it may be NaN.
        x_ptrs = x_ptr + tokens[:, None].to(tl.int64) * x_stride + channels[None, :]
        x = tl.load(x_ptrs, mask=counts[:, None] & (channels < K)[None, :], other=0.0)  # (BLOCK_T, BLOCK_K)
        x = x.to(tl.float32)
        acc += x * x
    tl.store(partial_ptr + chunk * K + channels, tl.sum(acc, axis=0), mask=channels < K)


def channel_sq_norm(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`lorap.kernels.reference.channel_sq_norm`."""
    tokens, channels = x.shape[:-1].numel(), x.shape[-1]
    x = x.reshape(tokens, channels)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if mask is not None and mask.numel() != tokens:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for {tokens} tokens")
    count = token_count(x, mask)
    if mask is not None:
        mask = mask.reshape(-1).bool().contiguous().view(torch.uint8)
    if x.numel() == 0:
        return torch.zeros(channels, dtype=torch.float64, device=x.device), count

    per_program = _tokens_per_program(tokens, channels)
    grid = (triton.cdiv(tokens, per_program), triton.cdiv(channels, BLOCK_K))
    partial = torch.empty(grid[0], channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        channel_sq_norm_kernel[grid](
            x,
            mask,
            partial,
            tokens,
            channels,
            x.stride(0),
            TOKENS=per_program,
            BLOCK_T=BLOCK_T,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return partial.sum(0, dtype=torch.float64), count


def _tokens_per_program(tokens: int, channels: int) -> int:
    """As many as float32 sums may run over, or fewer if programs would be lacking to fill a GPU."""
    per_program = CHUNK_TOKENS
    blocks = triton.cdiv(channels, BLOCK_K)
    while per_program > 4 * BLOCK_T and triton.cdiv(tokens, per_program) * blocks < MIN_PROGRAMS:
        per_program //= 2
    return per_program


def shipped_configs() -> Iterator[Variant]:
    """What a long stretch of calibration tokens runs, in bfloat16 with and without a mask, and in float32."""
    pointers = {"x_ptr": "*bf16", "partial_ptr": "*fp32"}
    sizes = dict.fromkeys(("T", "K", "x_stride"), "i32")
    tile = {"TOKENS": CHUNK_TOKENS, "BLOCK_T": BLOCK_T, "BLOCK_K": BLOCK_K}
    for name, changed in (("bf16", {}), ("bf16-mask", {"mask_ptr": "*u8"}), ("fp32", {"x_ptr": "*fp32"})):
        signature = {**pointers, **sizes, **changed}
        yield Variant(
            name=f"channel_sq_norm_kernel-{name}",
            kernel=channel_sq_norm_kernel,
            signature=signature,
            constexprs=tile if "mask_ptr" in signature else {"mask_ptr": None, **tile},
            divisible=[argument for argument in signature if argument != "T"],
            num_warps=NUM_WARPS,
            num_stages=3,
        )
