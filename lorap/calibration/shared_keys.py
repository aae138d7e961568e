"""Keys and values that a layer hands over to later ones, for one batch: they travel beside its hidden states."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor

from lorap.calibration.offload import HiddenStateStore, OffloadedTensor

States = tuple[Tensor, ...]  # keys and values, (windows, heads, seq_len, head_dim)


class SharedStates(UserDict[str, Any]):
    """By kind of attention, what the last layer that gave any gave; kept where hidden states are.

    Args:
        argument: of a decoder layer, that it is.
        store: keeps the tensors.
    """

    def __init__(self, argument: str, store: HiddenStateStore) -> None:
        super().__init__()
        self.argument, self.store = argument, store

    def __setitem__(self, kind: str, states: States) -> None:
        self.data[kind] = tuple(self.store.put(one.detach()) for one in states)

    def __getitem__(self, kind: str) -> States:
        held: tuple[OffloadedTensor, ...] = self.data[kind]
        return tuple(one.get() for one in held)

    def copied(self) -> SharedStates:
        """Another one, which later layers of another stream may write to."""
        found = SharedStates(self.argument, self.store)
        found.data = dict(self.data)
        return found


class SilentStates(UserDict[str, Any]):
    """The same with values that are zero.

    Args:
        states: what they are.
    """

    def __init__(self, states: SharedStates) -> None:
        super().__init__()
        self.states = states

    def __getitem__(self, kind: str) -> States:
        keys, values = self.states[kind]
        return keys, torch.zeros_like(values)


class TracedStates(UserDict[str, Any]):
    """What one layer reads and gives on its way back, for gradients to flow from the layers that read to the one that gave.

    Args:
        states: those of the forward pass.
    """

    def __init__(self, states: SharedStates) -> None:
        super().__init__()
        self.states = states
        self.read: dict[str, States] = {}
        self.given: dict[str, States] = {}

    def __setitem__(self, kind: str, states: States) -> None:
        self.given[kind] = states

    def __getitem__(self, kind: str) -> States:
        if kind not in self.read:
            self.read[kind] = tuple(one.detach().requires_grad_(True) for one in self.states[kind])
        return self.read[kind]


class SharedGradients:
    """Gradients of one batch's keys and values, summed over the layers that read them, until the layer comes that gave them."""

    def __init__(self) -> None:
        self.sums: dict[str, States] = {}

    def add(self, kind: str, gradients: States) -> None:
        """Those of one layer that read."""
        before = self.sums.get(kind)
        self.sums[kind] = gradients if before is None else tuple(a + b for a, b in zip(before, gradients, strict=True))

    def of_given(self, traced: TracedStates) -> tuple[list[Tensor], list[Tensor]]:
        """What the layer gave that others read, and the gradients; these are used up."""
        kinds = [kind for kind in traced.given if kind in self.sums]
        given = [one for kind in kinds for one in traced.given[kind]]
        return given, [one for kind in kinds for one in self.sums.pop(kind)]
