"""Experts of a mixture: FFNs of one shape whose weights a family keeps in two packed tensors.

They are no linear layers, so whoever works on those passes them by (:meth:`lorap.architectures.Architecture.roles`); who works on
experts reads and writes them here. The router, and what else is beside the experts, is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from lorap.errors import ArchitectureError

if TYPE_CHECKING:  # names and shapes alone take no torch
    from torch import Tensor, nn

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Rows of packed tensors are whole blocks of 16 bytes, in 16 bits: torch's grouped_mm, with which transformers runs experts,
# refuses others ("strides should be multiple of 16 bytes", torch 2.13).
ROW_MULTIPLE = 8


@dataclass(frozen=True)
class PackedExperts:
    """Where a family keeps its experts.

    Args:
        path: from a decoder layer to the module with the packed tensors.
        stored: what files call that module, in which each expert has three matrices of its own.
        parts: what files call gate, up and down.
        width_field: of the config, the width of an expert.
        shares_width: the field says the width of other FFNs as well, which stay as they are.
    """

    path: str = "mlp.experts"
    stored: str = "mlp.experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width_field: str = "moe_intermediate_size"
    shares_width: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of one decoder layer.

    Args:
        module: has ``gate_up_proj`` (experts, 2 * width, hidden_size), the rows of gate before those of up, and ``down_proj``
            (experts, hidden_size, width).
    """

    module: Any

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.module.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Channels of each."""
        return int(self.module.down_proj.shape[2])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each expert's projections, by role."""
        _, hidden, width = self.module.down_proj.shape
        return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function between gate and up."""
        return self.module.act_fn  # type: ignore[no-any-return]

    def weights(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and up (width, hidden_size) and down (hidden_size, width) of one expert; views."""
        gate_up, down = self.module.gate_up_proj.data[expert], self.module.down_proj.data[expert]
        return gate_up[: self.width], gate_up[self.width :], down

    def replace(self, gate_up: Tensor, down: Tensor) -> None:
        """Give all experts other weights, of one width."""
        from torch import nn

        for name, tensor in ((GATE_UP, gate_up), (DOWN, down)):
            old = getattr(self.module, name)
            setattr(self.module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
        self.module.intermediate_dim = self.width

    def resize(self, width: int) -> None:
        """Give all experts empty weights of another width, keeping device and dtype."""
        count, hidden, _ = self.module.down_proj.shape
        gate_up, down = self.module.gate_up_proj, self.module.down_proj
        self.replace(gate_up.new_empty(count, 2 * width, hidden), down.new_empty(count, hidden, width))


def row_multiple(width: int) -> int:
    """What widths of pruned experts are multiples of, given the dense width: ``ROW_MULTIPLE``, where the dense ones are."""
    return gcd(ROW_MULTIPLE, width)


def check_packed(module: nn.Module, name: str) -> None:
    """Refuse experts that are packed in another way.

    Args:
        module: what has the packed tensors.
        name: of it, for the message.

    Raises:
        ArchitectureError: naming it, its parameters and their shapes.
    """
    shapes = {key: tuple(one.shape) for key, one in module.named_parameters(recurse=False)}
    experts, hidden, width = shapes.get(DOWN, (0, 0, 0)) if len(shapes.get(DOWN, ())) == 3 else (0, 0, 0)
    if shapes != {GATE_UP: (experts, 2 * width, hidden), DOWN: (experts, hidden, width)}:
        raise ArchitectureError(
            f"{name} is a {type(module).__name__} with {shapes}, not the packed experts that lorap knows: {GATE_UP} (experts, "
            f"2 * width, hidden_size) and {DOWN} (experts, hidden_size, width), without biases"
        )
