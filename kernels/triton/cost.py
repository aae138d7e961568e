"""Modelled seconds on an H200 inside a CUDA graph: bytes in flight, launches and FLOPs. Arithmetic; no number here was measured.

It decides two things: which settings the low-rank kernels get (low_rank_settings.py), and which calls they get at all
(``worth``): those that they are modelled to compute at least 5 % faster than torch's matmuls do. Needs neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from .hardware import (
    CLUSTER_BARRIER,
    DEPENDENT_LAUNCH,
    FMA_RATE,
    L2_BANDWIDTH,
    LAUNCH,
    MEMORY_BANDWIDTH,
    MEMORY_LATENCY,
    NUM_SMS,
    RAMP,
    SM_BANDWIDTH,
    read_seconds,
)
from .low_rank_settings import plan_seconds
from .quantized_settings import parts, settings
from .trellis_settings import settings as trellis_settings

CUBLAS_RAMP = 0.7e-6
CUBLAS_DENSE = 0.9  # share of the bandwidth that cuBLAS reaches on a dense weight
CUBLAS_FACTOR = 0.8  # and on a factor of 8 MB
CUBLAS_FLOPS = 0.95 * 790e12
LEAST_GAIN = 1.05
FUSED_TOKENS = 128  # up to which weights of few bits are multiplied as they are read
# Instructions for each weight of few bits, counted in the machine code of the loops for sm_90 (quantized_product.py): one token,
# up to 16, up to 64. Then the share of the tensor cores' rate that the last reaches, a guess.
UNPACKING = {4: (5.1, 6.0, 9.1), 8: (5.7, 6.6, 9.8)}
TILE_FLOPS = 0.4 * 790e12
# What torch moves for each of them to write the matrix in 16 bits, and in how many launches (packing.py).
TORCH_UNPACKING = {4: (17, 7), 8: (13, 4)}
# The same of both halves of csrc/cuda/quantized_low_rank_decode.cu, by tokens, which are filled up to 1, 2, 4 or 8.
ONE_LAUNCH_UNPACKING = {
    4: {1: (4.4, 5.0), 2: (6.0, 6.3), 4: (9.1, 8.8), 8: (15.4, 13.8)},
    8: {1: (5.2, 5.0), 2: (6.8, 6.3), 4: (9.9, 8.8), 8: (16.3, 13.8)},
}
# The same of weights on a trellis (trellis_kernels.py, trellis.py), by tokens of a program.
DECODING = {
    2: {16: 8.2, 32: 8.7, 64: 10.1},
    3: {16: 8.3, 32: 9.0, 64: 10.8},
    4: {16: 7.9, 32: 8.5, 64: 9.8},
    5: {16: 9.3, 32: 10.0, 64: 11.4},
    6: {16: 9.3, 32: 10.0, 64: 11.4},
}
TORCH_DECODING = 154, 45
CLUSTER = 4  # blocks of one in csrc/cuda/low_rank_decode_mma.cu
GATED = ("silu_gated_linear", "low_rank_silu_gated_linear")


def gemm_seconds(m: int, k: int, n: int, *, share: float = CUBLAS_FACTOR, itemsize: int = 2) -> float:
    """Seconds of one cuBLAS product of x (m, k) and a weight (n, k)."""
    moved = itemsize * (k * n + m * (k + n))
    ramp = CUBLAS_RAMP if share == CUBLAS_FACTOR else 0.0
    return LAUNCH + ramp + max(moved / (share * MEMORY_BANDWIDTH), 2 * m * k * n / CUBLAS_FLOPS)


def dense_seconds(m: int, k: int, outputs: Iterable[int]) -> float:
    """Seconds of dense layers that read the same x, as one product."""
    return gemm_seconds(m, k, sum(outputs), share=CUBLAS_DENSE)


def two_gemms_seconds(m: int, k: int, ranks: Sequence[int], rows: Sequence[int]) -> float:
    """Seconds of low-rank layers in cuBLAS, two products each; ``rows`` are those of their left factors."""
    pairs = zip(ranks, rows, strict=True)
    return sum(gemm_seconds(m, k, rank) + (gemm_seconds(m, rank, count) if count else 0.0) for rank, count in pairs)


def pair_seconds(m: int, k: int, ranks: Sequence[int], rows: Sequence[int], *, pdl: bool = True) -> float:
    """Seconds of the shrink/expand pair, which all layers of a group share."""
    second = DEPENDENT_LAUNCH if pdl and m == 1 else LAUNCH  # which has all of its weights on their way before it waits
    return LAUNCH + second + 2 * RAMP + plan_seconds(m, k, tuple(ranks), tuple(rows), pdl=pdl)


def order_seconds(m: int, n: int) -> float:
    """Seconds to put the columns of a (m, n) output into their order: written once, read once."""
    return LAUNCH + 4 * m * n / L2_BANDWIDTH


def one_launch_seconds(m: int, k: int, ranks: Sequence[int], rows: Sequence[int]) -> float:
    """Seconds of the persistent CUDA kernels for layers that read the same x; ``rows`` are those of their left factors.

    One launch, its ramp, a barrier as long as the latency of memory, and the bytes. Up to 8 tokens also what is multiplied after
    the barrier, when the weights are there. From 9 tokens on each cluster reads x for each layer and the intermediates once, from
    L2, which they cross together with the weights; its blocks meet twice in each product, once in the first before and after the
    barrier, and at the end.
    """
    lefts = sum(rank * count for rank, count in zip(ranks, rows, strict=True))
    weights = 2 * (k * sum(ranks) + lefts)
    seconds = LAUNCH + RAMP + MEMORY_LATENCY
    if m <= 8:
        return seconds + weights / MEMORY_BANDWIDTH + (1 << (m - 1).bit_length()) * lefts / FMA_RATE
    clusters = NUM_SMS // CLUSTER
    read_from_l2 = k * len(ranks) + sum(rank for rank, count in zip(ranks, rows, strict=True) if count)
    crossing = weights + clusters * 2 * m * read_from_l2
    read = max(weights / MEMORY_BANDWIDTH, crossing / L2_BANDWIDTH, crossing / (clusters * CLUSTER * SM_BANDWIDTH))
    products = len(ranks) + sum(map(bool, rows))
    halves = 1 + any(rows)
    return seconds + (2 * products - halves + 1) * CLUSTER_BARRIER + read


def gated_seconds(m: int, k: int, n: int) -> float:
    """Seconds of the kernel for a dense gate, up and the product of the two."""
    programs = -(-n // (4 if m == 1 else 64))
    programs = -(-n // 32) if m > 1 and programs <= NUM_SMS else programs
    return LAUNCH + RAMP + read_seconds(4 * k * n * -(-m // 32), programs, 48 * 1024, per_sm=1)


def quantized_seconds(m: int, k: int, n: int, bits: int, group: int, *, weights: int = 1, split: bool = True) -> float:
    """Seconds of one product with ``weights`` matrices (n, k) of few bits, up to ``FUSED_TOKENS`` tokens.

    The bytes, or the instructions that make numbers of them, or the products, whichever takes longest. Partial sums of a split K
    are written and read once, by a launch of their own; ``split``: whether K may be.
    """
    chosen = settings(m, k, n, bits, group, weights=weights)
    count = parts(k, chosen) if split else 1
    programs = count * -(-n // chosen["BLOCK_N"]) * -(-m // chosen["BLOCK_M"])
    nbytes = weights * n * (k * bits / 8 + 2 * -(-k // group))
    tile = chosen["BLOCK_N"] * chosen["BLOCK_K"] * chosen["TILES"] * bits / 8
    read = read_seconds(nbytes * -(-m // chosen["BLOCK_M"]), programs, tile if m == 1 else 2 * tile)
    form = 0 if m == 1 else 1 if m <= 16 else 2
    unpack = weights * n * k * -(-m // chosen["BLOCK_M"]) * UNPACKING[bits][form] / FMA_RATE
    products = 2 * m * weights * n * k / TILE_FLOPS if m > 1 else 0.0
    partial = LAUNCH + 8 * m * n * count / L2_BANDWIDTH if count > 1 else 0.0
    return LAUNCH + RAMP + max(read, unpack, products) + partial


def quantized_pair_seconds(m: int, k: int, rank: int, n: int, bits: int, group: int) -> float:
    """Seconds of both factors; for one token the second product adds up the parts of the first as it reads them."""
    if m > 1:
        return quantized_seconds(m, k, rank, bits, group) + quantized_seconds(m, rank, n, bits, group)
    count = parts(k, settings(m, k, rank, bits, group))
    added_up = LAUNCH + 8 * rank * count / L2_BANDWIDTH if count > 1 else 0.0
    blocks = -(-n // settings(m, rank, n, bits, group)["BLOCK_N"])
    t_seconds = 4 * rank * count * (1 + blocks) / L2_BANDWIDTH
    second = quantized_seconds(m, rank, n, bits, group, split=False)
    return quantized_seconds(m, k, rank, bits, group) - added_up + t_seconds + second


def quantized_one_launch_seconds(
    m: int, k: int, ranks: Sequence[int], rows: Sequence[int], bits: Sequence[int], group: Sequence[int]
) -> float:
    """Seconds of the persistent CUDA kernel for at most 8 tokens; each layer has its rank, rows of left, bits and group.

    One launch, its ramp, a barrier as long as the latency of memory, and the bytes of both factors, or the instructions for
    ``right`` where these take longer; then those for ``left``. Four rows are a warp's unit, so that some lanes are idle.
    """
    nbytes, halves = 0.0, [0.0, 0.0]
    for rank, count, each, size in zip(ranks, rows, bits, group, strict=True):
        nbytes += rank * (k * each / 8 + 2 * -(-k // size)) + count * (rank * each / 8 + 2 * -(-rank // size))
        numbers, cost = 128 // each, ONE_LAUNCH_UNPACKING[each][1 << (m - 1).bit_length()]
        groups = [-(-total // (4 * NUM_SMS)) for total in (rank, count)]
        rounds = min(-(-k // (32 * numbers * warps)) * -(-groups[0] * warps // 8) for warps in (1, 2, 4, 8))
        halves[0] += 4 * numbers * cost[0] * rounds
        halves[1] += 4 * 8 * cost[1] * -(-groups[1] // 8) * -(-rank // 256)
    first, second = (8 * 32 * NUM_SMS * instructions / FMA_RATE for instructions in halves)  # of 8 warps
    return LAUNCH + RAMP + MEMORY_LATENCY + max(nbytes / MEMORY_BANDWIDTH, first) + second


@lru_cache(4096)
def one_launch_pays(
    m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], bits: tuple[int, ...], group: tuple[int, ...]
) -> bool:
    """Whether that kernel is modelled at least 5 % faster than the Triton kernels, layer by layer; arguments likewise."""
    layers = zip(ranks, rows, bits, group, strict=True)
    pairs = sum(
        quantized_pair_seconds(m, k, max(1, rank), max(1, count), each, size) for rank, count, each, size in layers
    )
    return LEAST_GAIN * quantized_one_launch_seconds(m, k, ranks, rows, bits, group) <= pairs


def dequantized_seconds(m: int, k: int, n: int, bits: int) -> float:
    """Seconds to write a matrix of few bits in 16, in one launch of ours, and of torch's product with it."""
    return LAUNCH + RAMP + n * k * (2 + bits / 8) / MEMORY_BANDWIDTH + dense_seconds(m, k, [n])


def torch_quantized_seconds(m: int, k: int, n: int, bits: int) -> float:
    """The same where torch writes the matrix."""
    moved, launches = TORCH_UNPACKING[bits]
    return launches * LAUNCH + n * k * moved / MEMORY_BANDWIDTH + dense_seconds(m, k, [n])


def trellis_seconds(m: int, k: int, n: int, bits: int, group: int) -> float:
    """Seconds of one product with a weight (n, k) on a trellis, up to ``FUSED_TOKENS`` tokens; as ``quantized_seconds``."""
    chosen = trellis_settings(m, k, n, group)
    count, blocks_m = parts(k, chosen), -(-m // chosen["BLOCK_M"])
    programs, step = count * -(-n // 64) * blocks_m, 8 * bits * chosen["BLOCK_K"]
    read = read_seconds(blocks_m * n * (k * bits / 8 + 2 * -(-k // group)), programs, step, per_sm=5)
    decode = n * k * blocks_m * DECODING[bits][chosen["BLOCK_M"]] / FMA_RATE
    products = 2 * max(16, m) * n * k / TILE_FLOPS
    partial = LAUNCH + 8 * m * n * count / L2_BANDWIDTH if count > 1 else 0.0
    return LAUNCH + RAMP + max(read, decode, products) + partial


def torch_trellis_seconds(m: int, k: int, n: int) -> float:
    """The same where torch writes the matrix."""
    moved, launches = TORCH_DECODING
    return launches * LAUNCH + n * k * moved / MEMORY_BANDWIDTH + dense_seconds(m, k, [n])


@lru_cache(4096)
def worth(op: str, m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], pivots: tuple[int, ...]) -> bool:
    """Whether our kernel is modelled at least 5 % faster than cuBLAS, on the factors and on the dense weights.

    Args:
        op: one of ``lorap.nn.implementations.LINEAR_OPS`` but ``linear``.
        m: tokens.
        k: size of the last axis of x.
        ranks: of each layer; empty for ``silu_gated_linear``.
        rows: of each left factor, or of gate and up.
        pivots: rows of each output that are rows of the shrink stage.
    """
    outputs = [count + more for count, more in zip(rows, pivots, strict=True)]
    torch_seconds = dense_seconds(m, k, outputs)
    if op == "silu_gated_linear":
        ours = gated_seconds(m, k, rows[0])
    else:
        ours = pair_seconds(m, k, ranks, rows)
        factors = two_gemms_seconds(m, k, ranks, rows) + LAUNCH * sum(
            bool(p and r) for p, r in zip(pivots, rows, strict=True)
        )
        torch_seconds = min(torch_seconds, factors)
    return LEAST_GAIN * ours <= torch_seconds + (2 * LAUNCH if op in GATED else 0.0)
