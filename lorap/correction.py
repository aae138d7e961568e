"""After all layers are compressed: a few steps of their weights towards what the dense model predicts on the calibration windows.

Least squares repairs each layer by itself, towards what the dense layer gave. What all layers together have lost shows in the
predictions, and only there. The loss is their Kullback-Leibler divergence from the dense model's, which teaches fidelity and
nothing else (cf. Hinton et al., arXiv 1503.02531). Each step takes a part of the windows and moves every weight by the same small
amount against the sign of its gradient (sign descent; Bernstein et al., arXiv 1802.04434), so that nothing but the weights
outlives a step and one decoder layer is in memory at a time. A weight moves where both folds of the text, which differ in kind,
want it to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import Architecture
from lorap.calibration.backward import walk_back
from lorap.calibration.data import TokenWindows
from lorap.calibration.shelf import IN_MEMORY, Held, Shelf
from lorap.calibration.stream import CalibrationStream
from lorap.errors import CalibrationError
from lorap.paging import pages_of
from lorap.processes import Processes

# The first step moves an output by at most this share of what independent weights give; later ones by less, down to none. Gain of
# SmolLM2-135M on five other texts, in nats: 0.127, 0.136 and 0.136 at 0.024, 0.036 and 0.048 from sparsity 0.5, and 0.048, 0.049
# and 0.050 from 0.2. At 0.096 steps overshoot: 0.018 worse than none from 0.2.
RATE = 0.036
# Of a step. With few, signs are noise too often, and time grows with them: 8 steps of 1,024 tokens gained 0.125 nats where 8 of
# 2,048 gained 0.148; so many are between. More and smaller steps are no way out (docs/recipes.md).
STEP_TOKENS = 1536
# Sums of more numbers are float32: two numbers of processes may then differ in the sign of what is next to 0.
EXACT_NUMBERS = 2**22


def correct(
    model: Any,
    layers: Sequence[nn.Module],
    streams: Iterable[CalibrationStream],
    targets: Sequence[CalibrationStream],
    architecture: Architecture,
    roles: Sequence[str],
    *,
    device: torch.device,
    keep: Callable[[int, int, nn.Module], None] = lambda step, index, layer: None,
    progress: Callable[[int], Any] = lambda step: iter,
    shelf: Shelf = IN_MEMORY,
) -> None:
    """Move the weights of ``roles`` in all ``layers``, in place: as many steps as there are ``targets``.

    Args:
        model: compressed, in evaluation mode.
        layers: its decoder layers.
        streams: the windows of each step, see :func:`dealt`, before the first layer.
        targets: the same windows, behind the last layer of the dense model.
        architecture: where the projections are.
        roles: projections that are corrected; of a low-rank one both factors.
        device: where layers are worked on.
        keep: called with (step, layer index, layer) after each change, before the layer may leave memory.
        progress: gives what wraps the layer indices of a step.
        shelf: keeps hidden states.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    exact = _ExactWeights(shelf)
    for step, (stream, target) in enumerate(zip(streams, targets, strict=True)):
        walk = walk_back(
            model,
            layers,
            stream,
            lambda layer: _linears(layer, architecture, roles),
            lambda count=stream.folds: _Gradients(count),  # type: ignore[misc]
            device=device,
            targets=target,
            progress=progress(step),
            shelf=shelf,
        )
        for index, linears, gradients in walk:
            gradients.add_up(linears, device, stream.processes)
            for name, linear in linears.items():
                votes = gradients.votes(name)
                if votes is None:
                    raise CalibrationError(
                        f"the gradients at {name} of layer {index} are not finite in {model.dtype}: try --dtype float32 or "
                        "bfloat16, or do without them: --correction-steps 0"
                    )
                exact.move(index, name, layers[index], linear, votes, RATE * (1 - step / len(targets)))
            keep(step, index, layers[index])


def dealt(windows: TokenWindows, folds: Tensor, steps: int) -> Iterator[tuple[TokenWindows, Tensor | None]]:
    """Windows of each step, and which of them form a second fold, if any do: about ``STEP_TOKENS`` tokens, none of them twice.

    Args:
        windows: those that are not needed are left out; where there are few, there are fewer steps.
        folds: (windows,) bool, see :func:`lorap.calibration.data.fold_of`.
        steps: how many at most.
    """
    count, steps = shares(len(folds), windows.input_ids.shape[1], steps)
    order = torch.argsort(folds.int(), stable=True)
    for step in range(steps):
        # Every so many-th window: each step has some of all sources, and of both folds where it can.
        rows = order[step * count // steps :: count]
        yield windows.rows(rows), folds[rows] if len(folds[rows].unique()) == 2 else None


def shares(windows: int, seq_len: int, steps: int) -> tuple[int, int]:
    """Into how many parts the windows are dealt out, and how many of these parts, one each, are for steps.

    A part has ``STEP_TOKENS``, but at least two windows, so that there may be one of each fold.
    """
    parts = max(1, windows // max(2, STEP_TOKENS // seq_len))
    return parts, min(steps, parts)


def _linears(layer: nn.Module, architecture: Architecture, roles: Sequence[str]) -> dict[str, nn.Linear]:
    paths = [architecture.projections[role] for role in roles]
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(name == path or name.startswith(path + ".") for path in paths)
    }


class _Gradients:
    """Of the weights of one decoder layer, by name, a sum for each fold."""

    def __init__(self, folds: int) -> None:
        self.folds = folds
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None, fold: int) -> None:
        x, g = x.flatten(0, -2).float(), g.flatten(0, -2).float()
        if mask is not None:
            g = g * mask.flatten()[:, None]
        sums = self._sums(role, g.shape[-1], x.shape[-1], x.device)[fold]
        if sums.dtype == torch.float32:
            sums.addmm_(g.T, x)  # the product alone would be as large
        else:
            sums += g.T @ x

    def _sums(self, role: str, out_features: int, in_features: int, device: torch.device) -> list[Tensor]:
        if role not in self.sums:
            dtype = torch.float64 if out_features * in_features <= EXACT_NUMBERS else torch.float32
            self.sums[role] = [
                torch.zeros(out_features, in_features, dtype=dtype, device=device) for _ in range(self.folds)
            ]
        return self.sums[role]

    def add_up(self, linears: Mapping[str, nn.Linear], device: torch.device, processes: Processes) -> None:
        """Sums over all processes, of which some may have seen nothing."""
        for name, linear in linears.items():
            processes.sum(*self._sums(name, linear.out_features, linear.in_features, device))

    def votes(self, name: str) -> Tensor | None:
        """(out_features, in_features) float32: 1 or -1 where the folds agree on the sign, 0 elsewhere; None if not finite."""
        sums = self.sums.pop(name)
        if not all(math.isfinite(each.sum()) for each in sums):  # in one pass; what overflows here is of no use either
            return None
        total = sums[0].sign_()
        for each in sums[1:]:
            total += each.sign_()
        return total.to(torch.int8).div(len(sums), rounding_mode="trunc").float()  # bytes: a third of the time


class _ExactWeights:
    """16 bits are too coarse for small steps, so float32 copies of such weights are moved, and the weights rounded from them."""

    def __init__(self, shelf: Shelf) -> None:
        # Beside a model that is paged because it is large, copies go to files.
        self.files = Shelf(budget_bytes=0, folder=None if shelf.folder is None else shelf.folder / "weights")
        self.copies: dict[tuple[int, str], Held] = {}

    def move(self, index: int, name: str, layer: nn.Module, linear: nn.Linear, votes: Tensor, rate: float) -> None:
        weight = linear.weight.data
        rounded = weight.dtype in (torch.float16, torch.bfloat16)
        copy = self.copies.pop((index, name), None)
        exact = copy.get().to(weight.device) if copy else weight.float() if rounded else weight
        size = rate * float(exact.norm()) / math.sqrt(exact.numel() * linear.in_features)
        exact.add_(votes.to(exact.device), alpha=-size)
        if rounded:
            weight.copy_(exact)
            shelf = IN_MEMORY if pages_of(layer) is None else self.files
            self.copies[index, name] = shelf.put(exact)
