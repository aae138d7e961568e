"""Launch settings of the low-rank kernels, by a model of the hardware: nothing here was timed on a GPU.

A launch reads its weights at the speed of the memory, or slower where its programs keep too few bytes in flight to
cover the latency of the memory. To this comes the traffic in L2: every part of T is written once by shrink, and read
again by each expand program of its layer. A deeper split of K helps the first and hurts the second, and so does a
smaller block of expand; of all candidates the one with the least modelled time is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

from .hardware import L2_BANDWIDTH, NUM_SMS, read_seconds

PROGRAMS_PER_SM = 2  # that registers and shared memory have room for
WHOLE_TILE = 4 * 1024  # bytes of weights that a warp holds in registers, 8 loads of 16 bytes for each thread
SHARED_BYTES = 80 * 1024  # so that they do, on an A100 too

Settings = dict[str, int]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def block_m(m: int) -> int:
    """Tokens of one program: 1 means multiply-adds, more means tl.dot, whose sides are at least 16."""
    return 1 if m == 1 else 16 if m <= 16 else 32


def shrink_config(
    m: int, k: int, ranks: Sequence[int], rows: Sequence[int], *, itemsize: int = 2, num_sms: int = NUM_SMS
) -> Settings:
    """BLOCK_N, BLOCK_K, SPLIT_K, num_warps and num_stages of shrink; ``rows`` are those of each layer's left factor."""
    return dict(_plan(m, k, tuple(ranks), tuple(rows), itemsize, num_sms)[0])


def expand_config(
    m: int,
    k: int,
    ranks: Sequence[int],
    rows: Sequence[int],
    *,
    itemsize: int = 2,
    num_sms: int = NUM_SMS,
    pdl: bool = False,
) -> Settings:
    """BLOCK_N, BLOCK_K, num_warps and num_stages of expand; with ``pdl`` for one that starts before shrink has ended."""
    return dict(_plan(m, k, tuple(ranks), tuple(rows), itemsize, num_sms, pdl)[1])


def plan_seconds(m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], *, pdl: bool = False) -> float:
    """Modelled seconds of both launches in bfloat16 without what each launch costs."""
    return _plan(m, k, ranks, rows, 2, NUM_SMS, pdl)[2]


@lru_cache(1024)
def _plan(
    m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], itemsize: int, num_sms: int, pdl: bool = False
) -> tuple[Settings, Settings, float]:
    def seconds(plan: tuple[Settings, Settings]) -> float:
        shrink, expand = plan
        blocks = [cdiv(count, expand["BLOCK_N"]) for count in rows]
        t_bytes = 4 * m * parts(k, shrink) * sum(rank * (1 + count) for rank, count in zip(ranks, blocks, strict=True))
        right_bytes = itemsize * k * sum(ranks)
        left_bytes = itemsize * sum(rank * count for rank, count in zip(ranks, rows, strict=True))
        shrink_programs = parts(k, shrink) * sum(cdiv(rank, shrink["BLOCK_N"]) for rank in ranks)
        return (
            t_bytes / L2_BANDWIDTH
            + _read_seconds(right_bytes, shrink_programs * cdiv(m, 32), shrink, itemsize, num_sms)
            + _read_seconds(left_bytes, sum(blocks) * cdiv(m, 32), expand, itemsize, num_sms)
        )

    expands = _whole_candidates(max(ranks), itemsize) if pdl and m == 1 else _expand_candidates(m, max(ranks), itemsize)
    candidates = product(_shrink_candidates(m, k, itemsize), expands)
    best = min((plan for plan in candidates if _fits(plan, m, k, itemsize)), key=seconds)
    return *best, seconds(best)


def parts(k: int, shrink: Settings) -> int:
    """Into how many parts, each of whole blocks, K is really split."""
    return max(1, cdiv(k, part_length(k, shrink)))


def part_length(k: int, shrink: Settings) -> int:
    """Columns of x in a part."""
    return max(1, cdiv(cdiv(k, shrink["SPLIT_K"]), shrink["BLOCK_K"])) * shrink["BLOCK_K"]


def _shrink_candidates(m: int, k: int, itemsize: int) -> Iterator[Settings]:
    """Few rows and much of K per program, because a layer has few rank rows.

    For M = 1 a block is as long as its threads read with one load of 16 bytes each, so that a thread needs the columns
    of x that it would load anyway: otherwise x goes through shared memory, with two barriers for each block.
    """
    for split in (1, 2, 4, 8, 16):
        if m == 1:
            block_k = min(4096, max(512, power_of_2(cdiv(k, split)) * itemsize)) // itemsize
            num_warps = block_k * itemsize // (32 * 16)
            yield {"SPLIT_K": split, "BLOCK_N": 4, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 1}
        else:
            yield {"SPLIT_K": split, "BLOCK_N": 64, "BLOCK_K": 256 // itemsize, "num_warps": 4, "num_stages": 4}


def _expand_candidates(m: int, rank: int, itemsize: int) -> Iterator[Settings]:
    """Many rows per program, because each program reads all of its layer's T.

    For M = 1 a block has fewer columns than threads. Then Triton lets each thread load what it needs of T, where T
    would otherwise go through shared memory too.
    """
    if m == 1:
        block_k = min(512 // itemsize, max(32, power_of_2(rank)))
        for block_n in (32, 16, 8):
            yield {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": block_k // 16, "num_stages": 1}
    else:
        # A float32 product has no tensor core, and as multiply-adds the larger block does not fit the registers.
        for block_n, stages in product((128, 64) if itemsize < 4 else (64,), (4, 3, 2)):
            yield {"BLOCK_N": block_n, "BLOCK_K": 128 // itemsize, "num_warps": 4, "num_stages": stages}


def _whole_candidates(rank: int, itemsize: int) -> Iterator[Settings]:
    """One token, and a start before T is there: a tile as wide as the rank, so that all of it is on its way before the wait."""
    block_k = max(32, power_of_2(rank))
    for num_warps in (4, 8, 16):
        block_n = min(32, max(4, num_warps * WHOLE_TILE // itemsize // block_k))
        # Two stages: no loop, and of the tiles one is on its way.
        yield {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 2}


def _fits(plan: tuple[Settings, Settings], m: int, k: int, itemsize: int) -> bool:
    """Whether the tiles of expand, weights and parts of T, are small enough for two programs on an SM."""
    shrink, expand = plan
    tile = expand["BLOCK_K"] * (expand["BLOCK_N"] * itemsize + 4 * block_m(m) * parts(k, shrink))
    return m == 1 or expand["num_stages"] * tile <= SHARED_BYTES


def _read_seconds(nbytes: int, programs: int, settings: Settings, itemsize: int, num_sms: int) -> float:
    tiles = 3 if settings["num_stages"] == 1 else settings["num_stages"] - 1  # one token: see weight_product
    ahead = min(settings["BLOCK_N"] * settings["BLOCK_K"] * itemsize * tiles, nbytes / max(1, programs))
    return read_seconds(nbytes, programs, ahead, num_sms=num_sms, per_sm=PROGRAMS_PER_SM)
