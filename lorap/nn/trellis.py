"""``TrellisLinear``: a linear layer whose weight is codes on a trellis and scales (:mod:`lorap.kernels.trellis`).

Its tensors have the names of those of :class:`QuantizedLinear`, and all but one their shapes::

    down_proj.weight_packed   (ceil(out_features / 64), in_features * 2 * bits) int32
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorap.kernels import trellis
from lorap.nn import ops
from lorap.nn.low_rank_tensors import WEIGHT_PACKED, WEIGHT_SCALE
from lorap.nn.quantized import QuantizedLinear
from lorap.weights import TRELLIS, Coding


class TrellisLinear(QuantizedLinear):
    """y = x @ (numbers * scales).T + bias through ``torch.ops.lorap.trellis_linear``, for inference.

    Arguments are those of :class:`QuantizedLinear`, with 2 to 6 bits. The numbers of :meth:`from_numbers` are windows
    (ceil(out_features / 64) * 64, in_features) that lie on rings. But for the step of a decoder layer on a CPU, no
    op takes several of these layers at once, so that each runs by itself, in a low-rank pair or an FFN too.
    """

    coding: ClassVar[Coding] = TRELLIS

    @staticmethod
    def pack(numbers: Tensor, bits: int) -> Tensor:
        """The windows of whole tiles as int32 words."""
        return trellis.pack(numbers, bits)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in_features) to (..., out_features), with this bias (out_features,) or none in place of its own."""
        buffers = self._buffers  # as in QuantizedLinear
        packed: Any = buffers[WEIGHT_PACKED]
        scale: Any = buffers[WEIGHT_SCALE]
        return ops.trellis_linear(x, packed, scale, bias, self.bits, self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out_features, in_features), in ``dtype`` or that of the scales."""
        scale = self.weight_scale
        return trellis.dequantize(self.weight_packed, scale, self.bits, self.group_size, dtype or scale.dtype)


# The layer of each coding.
LAYERS: dict[str, type[QuantizedLinear]] = {kind.coding.name: kind for kind in (QuantizedLinear, TrellisLinear)}


def layer_of(coding: Coding) -> type[QuantizedLinear]:
    """The class of linear layers whose weights are in a coding."""
    return LAYERS[coding.name]
