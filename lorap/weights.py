"""Weights in few bits: the kinds that configs and checkpoints name, and the sizes of their tensors; it takes no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Coding:
    """What numbers of few bits stand for. Those of one coding can be in one folder, matrix by matrix.

    Args:
        name: what the names of its kinds begin with, before their bits.
        bits: that a number may have.
        mix: kind of weights that a budget of bytes chooses the bits of, matrix by matrix.
        group_size: weights of a row that share a scale, where nothing else is asked for.
        tile: rows that share words; 1 where each row has words of its own.
    """

    name: str
    bits: tuple[int, ...]
    mix: str
    group_size: int
    tile: int = 1

    def kind(self, bits: int) -> str:
        """The name of its weights in so many bits, such as ``int4``."""
        return f"{self.name}{bits}"

    @property
    def kinds(self) -> str:
        """The names of all its weights in words, such as ``int4 or int8``."""
        *others, last = map(self.kind, self.bits)
        return f"{', '.join(others)} or {last}"

    def packed_shape(self, rows: int, columns: int, bits: int) -> tuple[int, int]:
        """Of the int32 words of a weight (rows, columns)."""
        if self.tile == 1:
            return rows, -(-columns * bits // 32)
        return -(-rows // self.tile), columns * self.tile * bits // 32


# Whole numbers (lorap/nn/quantized.py), and codes on a trellis (lorap/nn/trellis.py), whose scales cost less in larger groups.
INTEGERS = Coding("int", (4, 8), "mixed", 64)
TRELLIS = Coding("tcq", (2, 3, 4, 5, 6), "tcq", 256, tile=64)
CODINGS = (INTEGERS, TRELLIS)
# By the name of each kind: its coding, and its bits.
KINDS: Mapping[str, tuple[Coding, int]] = MappingProxyType(
    {coding.kind(bits): (coding, bits) for coding in CODINGS for bits in coding.bits}
)
MIXES: Mapping[str, Coding] = MappingProxyType({coding.mix: coding for coding in CODINGS})


def coding_of(weights: str) -> Coding | None:
    """Of a kind of weights, or of a mix; None of others, such as ``float``."""
    return MIXES[weights] if weights in MIXES else KINDS[weights][0] if weights in KINDS else None


def bits_of(weights: str) -> int | None:
    """Of a kind of weights, of a mix the fewest; None of others, such as ``float``."""
    return min(MIXES[weights].bits) if weights in MIXES else KINDS[weights][1] if weights in KINDS else None
