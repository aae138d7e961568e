"""Prices of sizes: every rank and width by the increase of the loss to expect, under one budget for all.

The budget counts parameters (a sparsity) or bytes on disk (a size, or bits per weight), and so do the candidates.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorap.algorithms import rounding, trellis
from lorap.algorithms.factorization import spectrum, suffix_sums
from lorap.algorithms.moments import Moment
from lorap.algorithms.refit import output_scores, repaired_tail
from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.architectures.experts import row_multiple
from lorap.calibration.sensitivity import Sensitivity
from lorap.compression.allocation import LayerPlan, Shape
from lorap.compression.budget import (
    SMALLEST_RANK_MULTIPLE,
    Candidate,
    affordable_multiple,
    allocate_budget,
    rank_candidates,
    shared_across_layers,
    width_candidates,
)
from lorap.compression.shrinkage import shrunk
from lorap.compression.stored_bytes import DenseModel, Storage, gains_bias
from lorap.config import CompressionConfig
from lorap.distributed import Processes
from lorap.requirements import compressed_roles, priced_roles
from lorap.weights import TRELLIS

Key = tuple[int, str]  # (layer index, role); the FFN of a layer goes by the name of its down projection
Kind = tuple[str, Shape, int, bool]  # role, shape, how many matrices of a layer, whether they are experts of a mixture
Noise = dict[int, Tensor]  # what rounding costs, by bits: of a matrix, or of each channel of the FFN

# Second moments of so few tokens are noisy; prices need less accuracy than factors do.
PRICE_SHRINKAGE = 0.1
PRICE_RIDGE = 0.01


class Prices:
    """Candidates of all matrices, gathered layer by layer.

    Args:
        config: what is asked for; its ``weights`` and its sparsity are known.
        dense: the model.
    """

    def __init__(self, config: CompressionConfig, dense: DenseModel) -> None:
        self.config, self.dense, self.shapes = config, dense, dense.shapes
        self.storage = Storage.of(config, dense.itemsize)
        coding = self.storage.coding
        self.bits = coding.bits if coding and config.is_mixed else ()
        self.expected_errors = trellis.expected_errors if coding is TRELLIS else rounding.expected_errors
        self.curves: dict[Key, list[Candidate]] = {}
        self.noise: dict[Key, Noise] = {}
        roles = compressed_roles(config)
        self.total = sum(
            math.prod(shape[role]) * self._experts(index, role)
            for index, shape in enumerate(self.shapes)
            for role in roles
            if role in shape
        )
        layers, cut = range(len(self.shapes)), (*ATTENTION, "down_proj")
        kinds = Counter(self._kind(i, role) for i in layers for role in cut if role in self.shapes[i])
        self.multiples = {kind: self._multiple(kind, alike) for kind, alike in kinds.items()}

    def _kind(self, index: int, role: str) -> Kind:
        return role, self.shapes[index][role], self._experts(index, role), role in MLP and self.dense.mixtures[index]

    def _experts(self, index: int, role: str) -> int:
        return self.dense.experts[index] if role in MLP else 1

    def _multiple(self, kind: Kind, alike: int) -> int:
        """What sizes of matrices of one kind, of which there are ``alike``, are multiples of."""
        role, shape, experts, packed = kind
        # Over all experts of a layer one channel is many parameters, and rows are whole blocks.
        together = experts * (alike if self.config.shapes == "uniform" else 1)
        multiple = _multiple(role, shape, self.config, total=self.total, together=together)
        return math.lcm(multiple, row_multiple(shape[1])) if packed else multiple

    def add(self, index: int, role: str, weight: Tensor, sensitivity: Sensitivity, metric: Tensor) -> None:
        """The candidates of one matrix, or of the FFN that ends with it; of gate and up, what their rounding costs.

        Args:
            index: of the layer.
            role: of the matrix; ``down_proj`` comes after gate and up.
            weight: (out_features, in_features).
            sensitivity: second moments of its inputs and of the gradients of its outputs.
            metric: (out_features, out_features) of the outputs; of gate and up its diagonal.
        """
        inputs = sensitivity.input.to(weight.device)
        if self.bits:
            outputs = metric if metric.dim() == 1 else metric.diagonal()
            # Half of it is the loss, as below.
            energies = rounding.column_energies(shrunk(inputs, PRICE_SHRINKAGE)) / 2
            self.noise[index, role] = self._noise(role, weight, outputs, energies)
        if role in MLP[:2]:
            return
        # Second order of the loss: half the mean square of what the error moves along the gradient.
        order = None
        if not self._is_cut(role):
            tail = torch.zeros(self._count(index, role) + 1)
        elif role == "down_proj":
            moment = Moment(inputs, shrinkage=PRICE_SHRINKAGE)
            order = output_scores(weight, moment.diagonal, metric).argsort(descending=True, stable=True)
            tail = repaired_tail(weight, moment, order, ridge=PRICE_RIDGE, output_metric=metric)
        else:
            tail = suffix_sums(spectrum(weight, shrunk(inputs, PRICE_SHRINKAGE), metric))
        self.curves[index, role] = self._candidates(index, role, tail / 2, order)

    def add_experts(self, index: int, sensitivity: Sensitivity, metric: Tensor) -> None:
        """The candidates of all experts of one layer, which have one width; each gives up channels of its own, by its own tokens.

        Errors of several experts for one token are counted as if they were independent. All processes take part.

        Args:
            index: of the layer.
            sensitivity: with what the experts read.
            metric: (hidden_size, hidden_size) of their outputs.
        """
        routed = sensitivity.routed
        assert routed is not None
        tail = torch.zeros(routed.experts.width + 1, dtype=torch.float64, device=metric.device)
        for expert in range(routed.experts.count):
            _, (inner,) = routed.statistics(expert, moments=True)
            assert inner.outer is not None
            moment = Moment(inner.outer / max(sensitivity.tokens, 1), shrinkage=PRICE_SHRINKAGE)
            _, _, down = routed.experts.weights(expert)
            order = output_scores(down, moment.diagonal, metric).argsort(descending=True, stable=True)
            tail += repaired_tail(down, moment, order, ridge=PRICE_RIDGE, output_metric=metric)
        self.curves[index, "down_proj"] = self._candidates(index, "down_proj", tail / 2)

    def add_unseen(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """The candidates of a layer that no text has passed: every matrix is as good as its rounding error is small beside it.

        Args:
            index: of the layer.
            weights: (out_features, in_features), by role.
        """
        for role in sorted(weights, key=PROJECTIONS.index):
            weight = weights[role]
            energy = float(weight.double().square().sum()) or 1.0
            ones = torch.ones(sum(weight.shape), dtype=torch.float64, device=weight.device)
            outputs, energies = ones[: len(weight)] / energy, ones[len(weight) :]
            self.noise[index, role] = self._noise(role, weight, outputs, energies)
            if role not in MLP[:2]:
                self.curves[index, role] = self._candidates(index, role, ones.new_zeros(self._count(index, role) + 1))

    def _noise(self, role: str, weight: Tensor, outputs: Tensor, energies: Tensor) -> Noise:
        """By bits, what rounding costs by channel of the FFN; of attention in all.

        Args:
            role: of the matrix.
            weight: (N, K).
            outputs: (N,), the cost of an error in each.
            energies: (K,) of the inputs.
        """
        found = {}
        for bits in self.bits:
            errors = self.expected_errors(weight.float(), bits=bits, group=self.config.group)
            if role in MLP[:2]:
                found[bits] = (errors @ energies.to(errors)).double() * outputs.double()
            else:
                by_column = (outputs.to(errors) @ errors).double() * energies
                found[bits] = by_column if role == "down_proj" else by_column.sum()
        return found

    def _candidates(self, index: int, role: str, tail: Tensor, order: Tensor | None = None) -> list[Candidate]:
        """By the cost at each size, from 0 on; in the unit of the budget."""
        shape, multiple = self.shapes[index][role], self.multiples[self._kind(index, role)]
        if role == "down_proj":
            candidates = width_candidates(shape[0], tail, matrices=3 * self.dense.experts[index], multiple=multiple)
        else:
            candidates = rank_candidates(shape, tail, pivoted=self.config.storage == "pivoted", multiple=multiple)
        if not self._is_cut(role):
            candidates = candidates[-1:]
        if not self.config.has_byte_budget:
            return candidates
        choices = list(itertools.product(self.bits, repeat=1 + (role == "down_proj"))) if self.bits else [()]
        noise = self._rounding_costs(index, role, order)
        return [
            replace(
                each,
                params=self._bytes(index, role, each.size, bits),
                cost=each.cost + noise(each.size, bits),
                bits=bits,
            )
            for each in candidates
            for bits in choices
        ]

    def _rounding_costs(self, index: int, role: str, order: Tensor | None) -> Callable[[int, tuple[int, ...]], float]:
        """What rounding to some bits costs at some size. Without noise, as where only bytes are asked for, nothing."""
        noise, shape = self.noise.pop((index, role), None), self.shapes[index][role]
        if noise is None:
            return lambda size, bits: 0.0
        if role != "down_proj":
            # A number of a factor stands for more of the matrix than one of the matrix itself: (N + K) / r times as much, if
            # the energy is spread evenly, as the rotated basis of the rank wants it.
            dense = {bits: float(found) for bits, found in noise.items()}
            return lambda size, bits: dense[bits[0]] * (1 if size == min(shape) else sum(shape) / size)
        gate, up = (self.noise.pop((index, inner)) for inner in MLP[:2])

        def at_width(by_channel: Tensor) -> list[float]:
            ordered = by_channel if order is None else by_channel[order]
            return [0.0, *ordered.cumsum(0).tolist()]

        inner = {bits: at_width(gate[bits] + up[bits]) for bits in self.bits}
        down = {bits: at_width(noise[bits]) for bits in self.bits}
        return lambda size, bits: inner[bits[0]][size] + down[bits[1]][size]

    def _bytes(self, index: int, role: str, size: int, bits: tuple[int, ...]) -> int:
        shapes, biases = self.shapes[index], self.dense.biases[index]
        shape, storages = shapes[role], [replace(self.storage, bits=each) for each in bits] or [self.storage]
        if role != "down_proj":
            return storages[0].matrix(shape) if size == min(shape) else storages[0].pair(shape, size)
        gained = role not in biases and gains_bias(role, shapes, LayerPlan({}, size), self.config)
        stored = storages[0].ffn(shape[0], size, biases=biases, down=storages[-1])
        return stored + gained * shape[0] * self.storage.itemsize

    def _is_cut(self, role: str) -> bool:
        """Whether a matrix may get another size, not only other bits."""
        return self.config.sparsity > 0 and role in compressed_roles(self.config)

    def _count(self, index: int, role: str) -> int:
        shape = self.shapes[index][role]
        return shape[1] if role == "down_proj" else min(shape)

    @property
    def budget(self) -> float:
        """Parameters, or bytes, that the matrices may have at most."""
        if self.config.has_byte_budget:
            return self.dense.matrix_budget(self.config, priced_roles(self.config))
        return (1 - self.config.sparsity) * self.total

    def smallest(self) -> dict[Key, Candidate]:
        """The smallest candidates of all matrices, which no weight has a say in."""
        roles = [role for role in (*ATTENTION, "down_proj") if role in priced_roles(self.config)]
        found = {}
        for index, shapes in enumerate(self.shapes):
            for role in [role for role in roles if role in shapes]:
                candidates = self._candidates(index, role, torch.zeros(self._count(index, role) + 1))
                found[index, role] = min(candidates, key=lambda candidate: candidate.params)
        return found

    def check_budget(self) -> None:
        """Refuse a budget below the smallest candidates."""
        allocate_budget({key: [candidate] for key, candidate in self.smallest().items()}, self.budget)

    def allocate(self, processes: Processes) -> list[LayerPlan]:
        """What becomes of each layer, by the candidates of all processes."""
        gathered: dict[Key, list[Candidate]] = {}
        for curves in processes.all_gather(self.curves):
            gathered |= curves
        # In one order, whoever made them: it breaks ties.
        self.curves = {
            key: gathered[key] for key in sorted(gathered, key=lambda key: (-key[0], PROJECTIONS.index(key[1])))
        }
        if self.config.shapes == "uniform" and self.config.sparsity > 0:
            # Layers that are alike in the dense model stay alike; a set would break ties by the hash seed.
            kinds = dict.fromkeys(self._kind(*key) for key in self.curves)
            alike = {kind: [key for key in sorted(self.curves) if self._kind(*key) == kind] for kind in kinds}
            shared = allocate_budget(
                {kind: shared_across_layers([self.curves[key] for key in keys]) for kind, keys in alike.items()},
                self.budget,
            )
            taken = {key: shared[self._kind(*key)] for key in self.curves}
        else:
            taken = allocate_budget(self.curves, self.budget)
        return [self._layer_plan(index, taken) for index in range(len(self.shapes))]

    def _layer_plan(self, index: int, taken: Mapping[Key, Candidate]) -> LayerPlan:
        shapes = self.shapes[index]
        ranks = {role: taken[index, role].size for role in ATTENTION if (index, role) in taken}
        ffn = taken.get((index, "down_proj"))
        bits = {}
        if self.bits:
            bits = {role: taken[index, role].bits[0] for role in ranks}
            bits |= {role: ffn.bits[role == "down_proj"] for role in MLP} if ffn else {}
        return LayerPlan(
            ranks={role: rank for role, rank in ranks.items() if rank < min(shapes[role])},
            intermediate_size=ffn.size if ffn else shapes["gate_proj"][0],
            bits={role: each for role, each in bits.items() if each != self.config.bits},
        )


def _multiple(role: str, shape: Shape, config: CompressionConfig, *, total: int, together: int) -> int:
    asked = config.width_multiple if role == "down_proj" else config.rank_multiple
    if asked != "auto":
        return int(asked)
    if role == "down_proj":
        return affordable_multiple(shape[1], 3 * shape[0] * together, total, smallest=1)
    smallest = min(SMALLEST_RANK_MULTIPLE, max(1, min(shape) // 8))
    return affordable_multiple(min(shape), sum(shape) * together, total, smallest=smallest)
