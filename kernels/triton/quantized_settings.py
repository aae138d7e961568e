"""Launch settings of the kernels on weights of 4 and 8 bits, by rule of thumb: nothing here was timed on a GPU."""

from __future__ import annotations

from functools import lru_cache

from .hardware import NUM_SMS
from .low_rank_settings import Settings, cdiv, power_of_2

WORDS_OF_PROGRAM = 4096  # of four bytes, of one token: eight loads of 16 bytes for each of 128 threads
UNITS = 128  # of 16 bytes: a row of 4,096 numbers of 4 bits
STEP = 256  # columns between two turns of a loop over tiles
MAX_BLOCK_M = 64


def settings(m: int, k: int, n: int, bits: int, group: int, *, weights: int = 1) -> Settings:
    """BLOCK_M, BLOCK_N, BLOCK_K, TILES, GROUP, SPLIT_K, num_warps and num_stages.

    Args:
        m: tokens.
        k: columns of a weight.
        n: its rows.
        bits: of a number, 4 or 8.
        group: numbers of a row that share a scale, a multiple of 32.
        weights: that a program reads side by side; with more than one K is not split.
    """
    return dict(_settings(m, k, n, bits, group, weights))


@lru_cache(4096)
def _settings(m: int, k: int, n: int, bits: int, group: int, weights: int) -> Settings:
    group = clipped(group, k)
    if m == 1:
        found = _row_settings(k, bits, weights)
    else:
        block_k = min(512 // bits, group & -group)  # 16 elements of at most 32 bits
        found = {"BLOCK_M": block_m(m), "BLOCK_N": 64, "BLOCK_K": block_k, "TILES": STEP // block_k, "num_stages": 3}
    blocks_m, least = cdiv(m, found["BLOCK_M"]), 1 if m == 1 else 64
    while cdiv(n, found["BLOCK_N"]) * blocks_m <= NUM_SMS and found["BLOCK_N"] > least:
        found["BLOCK_N"] //= 2
    split, step = 1, found["BLOCK_K"] * found["TILES"]
    while weights == 1 and cdiv(n, found["BLOCK_N"]) * blocks_m * split <= NUM_SMS and k >= 2 * split * step:
        split *= 2
    return found | {"GROUP": group, "SPLIT_K": split, "num_warps": 4}


def _row_settings(k: int, bits: int, weights: int) -> Settings:
    block_u = min(UNITS, power_of_2(cdiv(k, 128 // bits)))
    block_n = min(32, WORDS_OF_PROGRAM // (4 * block_u * weights))
    return {"BLOCK_M": 1, "BLOCK_N": block_n, "BLOCK_K": block_u * 128 // bits, "TILES": 1, "num_stages": 3}


def block_m(m: int) -> int:
    """Tokens of one program; ``tl.dot`` takes 16 at least, and absent ones are not loaded."""
    return 1 if m == 1 else min(MAX_BLOCK_M, max(16, power_of_2(m)))


def clipped(group: int, k: int) -> int:
    """The group, or one that is no smaller than k: all such are one scale a row."""
    return min(group, max(128, power_of_2(k)))


def steps_per_part(k: int, chosen: Settings) -> int:
    """Turns of the loop over K in each of its parts."""
    return max(1, cdiv(_steps(k, chosen), chosen["SPLIT_K"]))


def parts(k: int, chosen: Settings) -> int:
    """Into how many parts K is really split."""
    return max(1, cdiv(_steps(k, chosen), steps_per_part(k, chosen)))


def _steps(k: int, chosen: Settings) -> int:
    return cdiv(k, chosen["BLOCK_K"] * chosen.get("TILES", 1))
