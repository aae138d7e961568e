"""What the CPU kernels on weights of 4 and 8 bits are meant to reach, beside the kernels on bfloat16, in turns as in targets.py:

python benchmarks/quantized_targets.py
"""

from __future__ import annotations

import argparse
import itertools
import sys

import common
import torch
from targets import RANK, READ_BYTES, Call, K, N, ratio, read_from_memory, rotating, rounds

from lorap.kernels import packing
from lorap.nn import implementations, native
from lorap.reports.run import format_table

WIDE = 11008
GROUPS = {4: 64, 8: 128}
LEAST = {(1, 4): 3.0, (1, 8): 1.8}


def quantized_bytes(rows: int, columns: int, bits: int) -> int:
    """Of words, and of scales in 16 bits."""
    return rows * (4 * packing.words(columns, bits) + 2 * -(-columns // GROUPS[bits]))


def rotating_quantized(*shapes: tuple[int, int], bits: int) -> itertools.cycle:
    def make(rows: int, columns: int) -> list[torch.Tensor]:
        words = torch.randint(-(2**31), 2**31 - 1, (rows, packing.words(columns, bits)), dtype=torch.int32)
        return [words, common.random(rows, -(-columns // GROUPS[bits]), dtype=torch.bfloat16).div(2**bits)]

    nbytes = sum(quantized_bytes(*shape, bits) for shape in shapes)
    return itertools.cycle(
        [[tensor for shape in shapes for tensor in make(*shape)] for _ in range(common.copies_needed(nbytes))]
    )


def kernel(op: str) -> Call:
    return implementations.implementation(op, "cpu")


def low_rank(tokens: int) -> tuple[dict[str, Call], dict[int, int]]:
    """The projection of targets.py; contenders, and bytes of the weights by bits."""
    shapes = (RANK, K), (N, RANK)
    x, pairs = common.random(tokens, K, dtype=torch.bfloat16), rotating(*shapes, dtype=torch.bfloat16)
    calls: dict[str, Call] = {"16": lambda: kernel("low_rank_linear")(x, *next(pairs))}
    for bits, group in GROUPS.items():
        weights = rotating_quantized(*reversed(shapes), bits=bits)
        calls[str(bits)] = lambda weights=weights, bits=bits, group=group: kernel("quantized_low_rank_linear")(
            x, *next(weights), None, bits, group
        )
    return calls, {bits: sum(quantized_bytes(*shape, bits) for shape in shapes) for bits in GROUPS}


def dense(tokens: int) -> tuple[dict[str, Call], dict[int, int]]:
    """A down projection of LLaMA-7B."""
    x, weights16 = common.random(tokens, WIDE, dtype=torch.bfloat16), rotating((N, WIDE), dtype=torch.bfloat16)
    calls: dict[str, Call] = {"16": lambda: kernel("linear")(x, *next(weights16))}
    for bits, group in GROUPS.items():
        weights = rotating_quantized((N, WIDE), bits=bits)
        calls[str(bits)] = lambda weights=weights, bits=bits, group=group: kernel("quantized_linear")(
            x, *next(weights), None, bits, group
        )
    return calls, {bits: quantized_bytes(N, WIDE, bits) for bits in GROUPS}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    wanted = parser.parse_args()
    print(f"measuring {common.measured()}")
    rows, read = [], read_from_memory()
    for title, make in ((f"{K} x {N}, rank {RANK}", low_rank), (f"{N} x {WIDE}, dense", dense)):
        for tokens in wanted.tokens:
            calls, nbytes = make(tokens)
            seconds = rounds({"read": read} | calls, count=wanted.rounds)
            for bits, group in GROUPS.items():
                least = LEAST.get((tokens, bits)) if make is low_rank else None
                share = ratio(seconds, "read", str(bits)) * nbytes[bits] / READ_BYTES
                found = [f"{ratio(seconds, '16', str(bits)):.2f} x", f"{share:.0%}"]
                rows.append(
                    [
                        f"{title}, M = {tokens}, {bits} bits in groups of {group}",
                        *found,
                        f">= {least} x" if least else "",
                    ]
                )
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(format_table(["", "faster than bfloat16", "share of reading", "wanted"], rows))
    isa = native.quantized_cpu_isa()
    print(f"\n{torch.get_num_threads()} threads, {native.cpu_isa(torch.bfloat16)} for bfloat16, {isa} for 4 and 8 bits")


if __name__ == "__main__":
    main()
