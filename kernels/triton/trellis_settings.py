"""Launch settings of the kernels on weights on a trellis, by rule of thumb: nothing here was timed on a GPU."""

from __future__ import annotations

from functools import lru_cache

from .hardware import NUM_SMS
from .low_rank_settings import Settings, cdiv, power_of_2
from .quantized_settings import MAX_BLOCK_M, clipped
from .trellis import TILE

COLUMNS = 128  # of one step: 64 weights for each of 128 threads
PROGRAMS_PER_SM = 2  # or more: five fit, and one that waits for its words should find others that do not


def settings(m: int, k: int, n: int, group: int) -> Settings:
    """BLOCK_M, BLOCK_K, GROUP, SPLIT_K, num_warps and num_stages.

    Args:
        m: tokens.
        k: columns of the weight.
        n: its rows.
        group: numbers of a row that share a scale, a multiple of 32.
    """
    return dict(_settings(m, k, n, group))


@lru_cache(4096)
def _settings(m: int, k: int, n: int, group: int) -> Settings:
    block_m, step, split = min(MAX_BLOCK_M, max(16, power_of_2(m))), block_k(group), 1
    programs = cdiv(n, TILE) * cdiv(m, block_m)
    while programs * split <= PROGRAMS_PER_SM * NUM_SMS and k >= 2 * split * step:
        split *= 2
    found = {"BLOCK_M": block_m, "BLOCK_K": step, "GROUP": clipped(group, k), "SPLIT_K": split}
    return found | {"num_warps": 4, "num_stages": 1}


def block_k(group: int) -> int:
    """Columns of one step, which have one scale for a row: a power of two that divides the group."""
    return min(COLUMNS, group & -group)
