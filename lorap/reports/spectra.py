"""The singular values of a projection, thinned out for a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorap.jsonio import Count

if TYPE_CHECKING:
    from torch import Tensor

# Significant digits that are kept; a chart shows fewer.
DIGITS = 4


@dataclass(frozen=True)
class Spectrum:
    """A few singular values, relative to the largest.

    Args:
        count: how many were known. All of them, or, where a solver looked for the first only, little more than the rank.
        values: those at :func:`spectrum_indices` of ``count``, each divided by the largest; all 0 where that is 0.

    Raises:
        ValueError: there are more or fewer values than ``count`` asks for.
    """

    count: Count
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        wanted = len(self.indices)
        if len(self.values) != wanted or not wanted:
            raise ValueError(
                f"a sample of {self.count} singular values has {wanted} numbers, but {len(self.values)} were given"
            )

    @property
    def indices(self) -> tuple[int, ...]:
        """Which singular values these are, the largest being number 1."""
        return spectrum_indices(self.count)


def spectrum_indices(count: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... and ``count``, the last: at most 32 numbers up to 49,151.

    The steps are even on a logarithmic axis, and the numbers are the same for all matrices, so that a table can have columns.
    """
    powers = [2**exponent for exponent in range(count.bit_length())]
    between = [3 * power // 2 for power in powers[1:]]
    return tuple(sorted({index for index in (*powers, *between, count) if 1 <= index <= count}))


def sampled_spectrum(singular_values: Tensor) -> Spectrum:
    """What a report keeps of singular values.

    Args:
        singular_values: (count,), descending, at least one, as in :class:`lorap.algorithms.factorization.Factorization`.
    """
    count = len(singular_values)
    picked = singular_values[[index - 1 for index in spectrum_indices(count)]].tolist()
    largest = picked[0]
    return Spectrum(count, tuple(float(f"{value / largest:.{DIGITS}g}") if largest > 0 else 0.0 for value in picked))
