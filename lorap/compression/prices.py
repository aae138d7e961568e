"""Prices of sizes: every rank and width by the increase of the loss to expect, under one budget for all.

The budget counts parameters (a sparsity) or bytes on disk (a size, or bits per weight), and so do the candidates.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lorap.algorithms.factorization import spectrum, suffix_sums
from lorap.algorithms.moments import Moment
from lorap.algorithms.refit import output_scores, repaired_tail
from lorap.architectures import ATTENTION, PROJECTIONS
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
from lorap.requirements import compressed_roles

Key = tuple[int, str]  # (layer index, role); the FFN of a layer goes by the name of its down projection

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
        self.curves: dict[Key, list[Candidate]] = {}
        sizes = [math.prod(shape[role]) for shape in self.shapes for role in compressed_roles(config) if role in shape]
        self.total = sum(sizes)
        uniform = config.shapes == "uniform"
        self.multiples = {}
        for role in (*ATTENTION, "down_proj"):
            if having := [shape[role] for shape in self.shapes if role in shape]:
                together = len(having) if uniform else 1
                self.multiples[role] = _multiple(role, having[0], config, total=self.total, together=together)

    def add(self, index: int, role: str, weight: Tensor, sensitivity: Sensitivity, metric: Tensor) -> None:
        """The candidates of one matrix, or of the FFN that ends with it.

        Args:
            index: of the layer.
            role: of the matrix.
            weight: (out_features, in_features).
            sensitivity: second moments of its inputs and of the gradients of its outputs.
            metric: (out_features, out_features) of the outputs.
        """
        # Second order of the loss: half the mean square of what the error moves along the gradient.
        if role == "down_proj":
            moment = Moment(sensitivity.input.to(weight.device), shrinkage=PRICE_SHRINKAGE)
            order = output_scores(weight, moment.diagonal, metric).argsort(descending=True, stable=True)
            tail = repaired_tail(weight, moment, order, ridge=PRICE_RIDGE, output_metric=metric)
        else:
            tail = suffix_sums(spectrum(weight, shrunk(sensitivity.input.to(weight.device), PRICE_SHRINKAGE), metric))
        self.curves[index, role] = self._candidates(index, role, tail / 2)

    def _candidates(self, index: int, role: str, tail: Tensor) -> list[Candidate]:
        """By the cost at each size, from 0 on; in the unit of the budget."""
        shape, multiple = self.shapes[index][role], self.multiples[role]
        if role == "down_proj":
            candidates = width_candidates(shape[0], tail, multiple=multiple)
        else:
            candidates = rank_candidates(shape, tail, pivoted=self.config.storage == "pivoted", multiple=multiple)
        if not self.config.has_byte_budget:
            return candidates
        return [replace(each, params=self._bytes(index, role, each.size)) for each in candidates]

    def _bytes(self, index: int, role: str, size: int) -> int:
        shapes, biases = self.shapes[index], self.dense.biases[index]
        shape = shapes[role]
        if role != "down_proj":
            return self.storage.matrix(shape) if size == min(shape) else self.storage.pair(shape, size)
        gained = role not in biases and gains_bias(role, shapes, LayerPlan({}, size), self.config)
        return self.storage.ffn(shape[0], size, biases=biases) + gained * shape[0] * self.storage.itemsize

    @property
    def budget(self) -> float:
        """Parameters, or bytes, that the matrices may have at most."""
        if self.config.has_byte_budget:
            return self.dense.matrix_budget(self.config, compressed_roles(self.config))
        return (1 - self.config.sparsity) * self.total

    def smallest(self) -> dict[Key, Candidate]:
        """The smallest candidates of all matrices, which no weight has a say in."""
        roles = [role for role in self.multiples if role in compressed_roles(self.config)]
        found = {}
        for index, shapes in enumerate(self.shapes):
            for role in [role for role in roles if role in shapes]:
                count = shapes[role][1] if role == "down_proj" else min(shapes[role])
                candidates = self._candidates(index, role, torch.zeros(count + 1))
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
        if self.config.shapes == "uniform":
            roles = dict.fromkeys(role for _, role in self.curves)  # a set would break ties by the hash seed
            layers = range(len(self.shapes))
            of_role = {role: [self.curves[i, role] for i in layers if (i, role) in self.curves] for role in roles}
            shared = allocate_budget(
                {role: shared_across_layers(curves) for role, curves in of_role.items()}, self.budget
            )
            taken = {(index, role): shared[role].size for index, role in self.curves}
        else:
            taken = {key: candidate.size for key, candidate in allocate_budget(self.curves, self.budget).items()}
        plans = []
        for index, shapes in enumerate(self.shapes):
            ranks = {role: taken[index, role] for role in ATTENTION if (index, role) in taken}
            plans.append(
                LayerPlan(
                    ranks={role: rank for role, rank in ranks.items() if rank < min(shapes[role])},
                    intermediate_size=taken.get((index, "down_proj"), shapes["gate_proj"][0]),
                )
            )
        return plans


def _multiple(role: str, shape: Shape, config: CompressionConfig, *, total: int, together: int) -> int:
    asked = config.width_multiple if role == "down_proj" else config.rank_multiple
    if asked != "auto":
        return int(asked)
    if role == "down_proj":
        return affordable_multiple(shape[1], 3 * shape[0] * together, total, smallest=1)
    smallest = min(SMALLEST_RANK_MULTIPLE, max(1, min(shape) // 8))
    return affordable_multiple(min(shape), sum(shape) * together, total, smallest=smallest)
