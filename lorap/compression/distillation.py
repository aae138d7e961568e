"""After all layers are compressed: a few steps of their weights, or scales, towards what the dense model predicts on the windows.

Least squares repairs each layer by itself, towards what the dense layer gave. What all layers together have lost shows in the
predictions, and only there. The loss is their Kullback-Leibler divergence from the dense model's, which teaches fidelity and
nothing else (cf. Hinton et al., arXiv 1503.02531). Each step takes a part of the windows and moves every weight by the same small
amount against the sign of its gradient (sign descent; Bernstein et al., arXiv 1802.04434), so that nothing but the weights
outlives a step and one decoder layer is in memory at a time. A weight moves where both folds of the text, which differ in kind,
want it to. Whether the steps are kept is decided on windows that nothing has seen (:func:`divergences`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import Architecture
from lorap.calibration.backward import backward_pass
from lorap.calibration.context import DecoderContext
from lorap.calibration.offload import IN_MEMORY, HiddenStateStore, OffloadedTensor
from lorap.calibration.stream import Batch, CalibrationStream, logits_of
from lorap.checkpoint.paging import offloaded_tensors
from lorap.distributed import Processes
from lorap.errors import CalibrationError
from lorap.nn.quantized import QuantizedLinear

# Sums of more numbers are float32: two numbers of processes may then differ in the sign of what is next to 0.
EXACT_NUMBERS = 2**22
# Share of the divergence that each fold has to gain somewhere on the way. SmolLM2-135M at sparsity 0.3: steps from one window
# gain 0.1 and 0.4 % on 1,536 unseen tokens, and change the loss on other texts by -0.006 to +0.003 nats; those from 8 windows on
# gain 0.8 % and more, and the loss falls on all.
WORTHWHILE = 0.005


def distill(
    context: DecoderContext,
    streams: Iterable[CalibrationStream],
    targets: Sequence[CalibrationStream],
    rates: Sequence[float],
    roles: Sequence[str],
    *,
    keep: Callable[[int, int, nn.Module], None] = lambda step, index, layer: None,
) -> None:
    """Move the weights of ``roles`` in all layers, in place: as many steps as there are ``rates``.

    Args:
        context: the compressed model.
        streams: the windows of each step, see :func:`lorap.compression.correction.step_windows`, before the first layer.
        targets: the same windows, behind the last layer of the dense model.
        rates: sizes of the steps, as shares of what moves an output by as much as independent weights give.
        roles: projections that are corrected; of a low-rank one both factors.
        keep: called with (step, layer index, layer) after each change, before the layer may leave memory.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    exact = _ExactWeights(context.store)

    def move(index: int, name: str, linear: Any, gradients: _Gradients, rate: float) -> bool:
        signs = gradients.agreed_signs(name)
        if signs is not None:
            exact.move(index, name, context.layers[index], linear, signs, rate)
        return signs is not None

    def moved(layer: nn.Module) -> dict[str, nn.Linear]:
        return corrected_linears(layer, context.architecture, roles)

    _take_steps(context, streams, targets, rates, moved, move, keep, option="--correction-steps")


def rescale(
    context: DecoderContext,
    streams: Iterable[CalibrationStream],
    targets: Sequence[CalibrationStream],
    rates: Sequence[float],
    *,
    keep: Callable[[int, int, nn.Module], None] = lambda step, index, layer: None,
) -> None:
    """Move the scales of all rounded weights in place, each by a share of itself; the numbers and codes stay.

    Args:
        context: the rounded model.
        streams: the windows of each step, before the first layer.
        targets: the same windows, behind the last layer of the dense model.
        rates: sizes of the steps, as shares of a scale.
        keep: called with (step, layer index, layer) after each change, before the layer may leave memory.

    Raises:
        CalibrationError: a gradient is not finite.
    """
    exact = _ExactWeights(context.store)

    def move(index: int, name: str, linear: Any, gradients: _Gradients, rate: float) -> bool:
        signs = gradients.agreed_signs(name, lambda each: growth(each, linear))
        if signs is not None:
            exact.change(
                (index, name), context.layers[index], linear.weight_scale, lambda scales: scales.mul_(1 - rate * signs)
            )
        return signs is not None

    _take_steps(context, streams, targets, rates, rounded_linears, move, keep, option="--scale-steps")


def _take_steps(
    context: DecoderContext,
    streams: Iterable[CalibrationStream],
    targets: Sequence[CalibrationStream],
    rates: Sequence[float],
    linears_of: Callable[[nn.Module], Mapping[str, Any]],
    move: Callable[[int, str, Any, _Gradients, float], bool],
    keep: Callable[[int, int, nn.Module], None],
    *,
    option: str,
) -> None:
    """A backward pass for each step; ``move`` is called for each linear layer and says whether the gradient was finite."""
    for step, (stream, target, rate) in enumerate(zip(streams, targets, rates, strict=True)):
        passing = backward_pass(
            context,
            stream,
            linears_of,
            lambda count=stream.folds: _Gradients(count),  # type: ignore[misc]
            targets=target,
            desc=f"Correcting, step {step + 1} of {len(rates)}",
        )
        for index, linears, gradients in passing:
            gradients.add_up(linears, context.device, stream.processes)
            for name, linear in linears.items():
                if not move(index, name, linear, gradients, rate):
                    raise CalibrationError(
                        f"the gradients at {name} of layer {index} are not finite in {context.model.dtype}: try --dtype float32 "
                        f"or bfloat16, or do without them: {option} 0"
                    )
            keep(step, index, context.layers[index])


@torch.no_grad()
def divergences(context: DecoderContext, stream: CalibrationStream, target: CalibrationStream) -> tuple[float, ...]:
    """Kullback-Leibler divergence of the predictions from the dense model's, in nats per token, for each fold of the windows.

    It is what the steps minimise. All processes get the same numbers, whatever their number.

    Args:
        context: the compressed model; its last norm and head are still to come.
        stream: windows behind its last layer.
        target: the same windows, behind the last layer of the dense model.

    Returns:
        One for each fold.
    """
    found = []
    with context.head_in_memory():
        for ours, dense in zip(stream.batches, target.batches, strict=True):
            each = _divergence(context, ours, dense)
            tokens = each.numel() if ours.mask is None else int(ours.mask.sum())
            found.append((ours.fold, float(each.sum(dtype=torch.float64)), tokens))
    every = [entry for part in stream.processes.all_gather(found) for entry in part]
    # Exact sums do not depend on who had which batch.
    return tuple(
        math.fsum(total for at, total, _ in every if at == fold) / max(1, sum(n for at, _, n in every if at == fold))
        for fold in range(stream.folds)
    )


def _divergence(context: DecoderContext, ours: Batch, dense: Batch) -> Tensor:
    """(windows, seq_len) float32, 0 on padding."""
    home = context.model.get_output_embeddings().weight.device
    q, p = (logits_of(context, batch.hidden.to(home)).log_softmax(-1, dtype=torch.float32) for batch in (ours, dense))
    each = q.sub_(p).neg_().mul_(p.exp_()).sum(-1)
    return each if ours.mask is None else each.masked_fill(~ours.mask.to(home), 0.0)


def agree(before: Sequence[float], after: Sequence[float], gain: float = 0.0) -> bool:
    """Whether every fold of the unseen windows is closer to the dense model, by the share ``gain``; never if not finite."""
    return all(now < (1 - gain) * then for then, now in zip(before, after, strict=True))


def corrected_linears(layer: nn.Module, architecture: Architecture, roles: Sequence[str]) -> dict[str, nn.Linear]:
    """What the steps move in a decoder layer, by name within it: the projections of ``roles``, of a low-rank one both factors."""
    paths = [architecture.projections[role] for role in roles]
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(name == path or name.startswith(path + ".") for path in paths)
    }


def rounded_linears(layer: nn.Module) -> dict[str, QuantizedLinear]:
    """Whose scales the steps move in a decoder layer, by name within it: all in few bits."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, QuantizedLinear)}


def growth(gradient: Tensor, linear: QuantizedLinear) -> Tensor:
    """(N, groups): how the loss changes as each group of weights grows, with ``gradient`` (N, K) that of the weights."""
    each = gradient * linear.dequantize(gradient.dtype)
    columns, groups = each.shape[1], linear.weight_scale.shape[1]
    group = min(linear.group_size, columns)
    return nn.functional.pad(each, (0, groups * group - columns)).unflatten(1, (groups, group)).sum(-1)


class _Gradients:
    """Of the weights of one decoder layer, by name, a sum for each fold."""

    def __init__(self, folds: int) -> None:
        self.folds = folds
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None, fold: int, *routing: Tensor) -> None:
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
            processes.all_reduce(*self._sums(name, linear.out_features, linear.in_features, device))

    def agreed_signs(self, name: str, of: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """(out_features, in_features) float32: 1 or -1 where the folds agree on the sign, 0 elsewhere; None if not finite.

        With ``of`` they are those of what it makes of each sum.
        """
        sums = self.sums.pop(name)
        sums = sums if of is None else [of(each) for each in sums]
        if not all(math.isfinite(each.sum()) for each in sums):  # in one pass; what overflows here is of no use either
            return None
        total = sums[0].sign_()
        for each in sums[1:]:
            total += each.sign_()
        return total.to(torch.int8).div(len(sums), rounding_mode="trunc").float()  # bytes: a third of the time


class _ExactWeights:
    """16 bits are too coarse for small steps, so float32 copies of such weights are moved, and the weights rounded from them."""

    def __init__(self, store: HiddenStateStore) -> None:
        # Beside a model that is paged because it is large, copies go to files.
        self.files = HiddenStateStore(budget_bytes=0, folder=None if store.folder is None else store.folder / "weights")
        self.copies: dict[tuple[int, str], OffloadedTensor] = {}

    def move(self, index: int, name: str, layer: nn.Module, linear: nn.Linear, signs: Tensor, rate: float) -> None:
        def step(exact: Tensor) -> None:
            size = rate * float(exact.norm()) / math.sqrt(exact.numel() * linear.in_features)
            exact.add_(signs.to(exact.device), alpha=-size)

        self.change((index, name), layer, linear.weight.data, step)

    def change(self, key: tuple[int, str], layer: nn.Module, weight: Tensor, step: Callable[[Tensor], object]) -> None:
        """``step`` changes the copy in place, and ``weight``, of ``layer``, becomes what is nearest to it."""
        rounded = weight.dtype in (torch.float16, torch.bfloat16)
        copy = self.copies.pop(key, None)
        exact = copy.get().to(weight.device) if copy else weight.float() if rounded else weight
        step(exact)
        if rounded:
            weight.copy_(exact)
            store = IN_MEMORY if offloaded_tensors(layer) is None else self.files
            self.copies[key] = store.put(exact)
