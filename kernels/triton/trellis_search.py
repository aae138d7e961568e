"""The windows of a ring that are nearest to wanted numbers, see :mod:`lorap.kernels.trellis`; in plain torch.

A dynamic programme (Viterbi, 1967) over the windows of a column, from its last row to its first: of all windows of the row below
that may stand before a window, the one with the least error so far is kept. On a ring the first and the last row share bits, so
there are two passes: one with free ends that goes around the ring one and a half times, in which the shared bits are in the
middle, far from both ends, and one in which both ends have the bits that the first has found there. Ties go to the lower bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import trellis

# Rows on each side of a ring's seam in the first pass. With 32 the squared error of Gaussian numbers is 0.6 to 1.1 % larger, with
# 64 it is 0.1 to 0.4 % smaller and the search 22 % longer.
SEAM = 48
# Columns of tiles that are searched together: errors of all windows of one row stay in a CPU's cache, and fill a GPU.
CPU_CHUNK, GPU_CHUNK = 64, 4096


@torch.no_grad()
def search(wanted: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The windows with (nearly) the least sum of importance * (wanted - number)^2 in each column of a tile.

    Args:
        wanted: (N, C), floating point, in units of the numbers: already divided by the scales.
        importance: (N, C), at least 0. A row of importance 0 costs nothing, whatever is wanted there.
        bits: 2 to 6.

    Returns:
        (ceil(N / 64) * 64, C) int32, on rings also where what is wanted is no number. Rows beyond N have importance 0.
    """
    rows, columns = wanted.shape
    count = trellis.tiles(rows)
    missing = (0, 0, 0, count * trellis.TILE - rows)

    def by_column(tensor: Tensor) -> Tensor:  # (64, tiles * C)
        return F.pad(tensor.float(), missing).view(count, trellis.TILE, columns).transpose(0, 1).flatten(1)

    weights = by_column(importance)
    numbers = by_column(wanted).where(weights > 0, 0.0)
    chunk = GPU_CHUNK if wanted.is_cuda else CPU_CHUNK
    found = [_rings(*some, bits) for some in zip(numbers.split(chunk, 1), weights.split(chunk, 1), strict=True)]
    by_row = torch.cat(found, 1).view(trellis.TILE, count, columns).transpose(0, 1)
    return by_row.reshape(count * trellis.TILE, columns)


def _rings(wanted: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Windows (64, B) int32 of B columns."""
    around = torch.arange(-SEAM, SEAM, device=wanted.device) % trellis.TILE
    turned = _path(wanted[around], importance[around], bits, None)
    ends = turned[SEAM] & 2 ** (trellis.WINDOW - bits) - 1
    own = _path(wanted, importance, bits, ends) & 2**bits - 1
    rows = -(-trellis.WINDOW // bits)  # that a window has bits of
    return (sum(own.roll(-i, 0) << bits * i for i in range(rows)) & 2**trellis.WINDOW - 1).int()


def _path(wanted: Tensor, importance: Tensor, bits: int, ends: Tensor | None) -> Tensor:
    """The best path through the windows of B columns.

    Args:
        wanted: (rows, B) float32.
        importance: (rows, B) float32.
        bits: of a row.
        ends: (B,) the upper bits of the last row's windows, which are the lower bits of the first row's; None for any.

    Returns:
        Windows (rows, B) int64.
    """
    (rows, batch), high, kept = wanted.shape, 2**bits, 2 ** (trellis.WINDOW - bits)
    numbers = trellis.numbers(wanted.device)
    least = wanted.new_zeros(batch, kept)  # over the windows of the rows below, by the bits that they leave to this row
    if ends is not None:
        least = least.fill_(torch.inf).scatter_(1, ends[:, None], 0.0)
    before = torch.empty(rows, batch, kept, dtype=torch.uint8, device=wanted.device)
    for row in reversed(range(rows)):
        error = (wanted[row, :, None] - numbers).square_().mul_(importance[row, :, None])
        cost = error.view(batch, kept, high).add_(least[:, :, None]).view(batch, high, kept)
        if row:
            least, before[row] = cost.min(dim=1)
    if ends is None:
        window = cost.flatten(1).argmin(1)
    else:
        window = cost.gather(2, ends[:, None, None].expand(-1, high, -1)).flatten(1).argmin(1) * kept + ends
    windows = [window]
    for row in range(1, rows):
        shared = windows[-1] >> bits
        windows.append(before[row].gather(1, shared[:, None])[:, 0].long() * kept + shared)
    return torch.stack(windows)
