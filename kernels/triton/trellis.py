"""Weights as codes on a trellis: a number of 2 to 6 bits stands for one of 4,096 values, by the bits that its neighbours have.

The 64 weights of a column that are in one tile of rows have ``64 * bits`` stored bits in a ring. The window of row r is the
``WINDOW`` bits from bit ``bits * r`` on, lowest first; so each row brings ``bits`` new ones, and shares the others with the rows
after it. A window stands for one of :func:`numbers`, which are spread like a Gaussian, and the weight is that number times the
scale of its group of columns. Any path around the ring may be stored, and :func:`lorap.kernels.trellis_search.search` finds the
one that is nearest to the weights: that loses less than rounding each weight by itself could. Trellis-coded quantization
(Marcellin and Fischer, 1990), with windows of a stream of bits as states and values that are computed from them as in QTIP (arXiv
2406.11235).

Layout: ``packed`` is (ceil(N / 64), K * 2 * bits) int32. Column k of a tile has the words from ``2 * bits * k`` on; rows that are
missing in the last tile are searched for with weight zero, and stand for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import by_column

BITS = (2, 3, 4, 5, 6)
# Rows of a tile. With 32 the squared error of Gaussian numbers is 7 % larger, since a ring is closed twice as often.
TILE = 64
# Bits of a window. 14 would take 4 % of the squared error off, and make the search 4 times as long.
WINDOW = 12
# A number is the sum of the four bytes, signed, of the window times this. The factor was drawn at random: of 40 odd ones most
# are within 2 % of the best in squared error; in 5 and 6 bits it is within 2 % of the best of 60. Its unit brings the numbers to
# a standard deviation of about 1.
FACTOR = 1007213647
UNIT = 1 / 128


def tiles(rows: int) -> int:
    """Tiles that so many rows take."""
    return -(-rows // TILE)


def words(bits: int) -> int:
    """int32 words of one column of a tile."""
    return TILE * bits // 32


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Of the packed weight (rows, columns)."""
    return tiles(rows), columns * words(bits)


def numbers(device: torch.device | str | None = None) -> Tensor:
    """(2^WINDOW,) float32: what each window stands for. All are whole multiples of ``UNIT``."""
    windows = torch.arange(2**WINDOW, dtype=torch.int64, device=device)
    product = (windows * FACTOR) & 0xFFFFFFFF
    signed = [((product >> shift & 0xFF) ^ 0x80) - 0x80 for shift in (0, 8, 16, 24)]
    return sum(signed[1:], signed[0]).float() * UNIT


def pack(windows: Tensor, bits: int) -> Tensor:
    """Windows (N, K) of any integer type, N a multiple of 64, that lie on rings, as int32 ``packed_shape(N, K, bits)``."""
    rows, columns = windows.shape
    # The lowest bits of a window are those that no later row has: rings of them, one after the other.
    own = (windows.to(torch.int32) & (2**bits - 1)).view(rows // TILE, TILE, columns)
    each = torch.stack([own >> bit & 1 for bit in range(bits)], dim=2)  # (tiles, 64, bits, K)
    stream = each.flatten(1, 2).transpose(1, 2).reshape(rows // TILE, columns * words(bits), 32).to(torch.int64)
    found = (stream << torch.arange(32, device=stream.device)).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The windows (rows, K) int32 of a packed weight; of ``rows`` where there are fewer than all tiles have."""
    count, size = packed.shape
    ring = packed.reshape(count, size // words(bits), words(bits)).to(torch.int64) & 0xFFFFFFFF
    ring = torch.cat((ring, ring[..., :1]), dim=-1)
    first = bits * torch.arange(TILE, device=packed.device)
    place, shift = first // 32, first % 32
    both = ring[..., place] | ring[..., place + 1] << 32
    windows = (both >> shift & (2**WINDOW - 1)).to(torch.int32)
    return windows.transpose(1, 2).flatten(0, 1)[:rows]


def dequantize(packed: Tensor, scales: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) that codes and scales (N, ceil(K / group)) stand for, in ``dtype``."""
    found = numbers(packed.device)[unpack(packed, bits, len(scales)).long()].to(dtype)
    return found * by_column(scales.to(dtype), group, found.shape[1])
