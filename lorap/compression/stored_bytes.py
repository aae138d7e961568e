"""Bytes on disk, from shapes alone: of one matrix as a run may store it, and of all of a model that no run changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorap.architectures import MLP, Architecture
from lorap.architectures.experts import DOWN, GATE_UP
from lorap.checkpoint.write import model_tensors, nbytes
from lorap.compression.allocation import LayerPlan, Shape
from lorap.config import CompressionConfig
from lorap.nn.low_rank_tensors import INDEX_ITEMSIZE, LEFT, RIGHT, LowRankTensors
from lorap.requirements import compressed_roles
from lorap.weights import Coding, coding_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    Args:
        itemsize: bytes of a number in the dtype of the model.
        coding: of packed weights; None where weights have the dtype of the model.
        bits: of a packed weight.
        group_size: packed weights of a row that share a scale.
        pivoted: whether low-rank layers are rows and coefficients.
        guarded: whether packed weights have a guard.
    """

    itemsize: int
    coding: Coding | None
    bits: int | None
    group_size: int
    pivoted: bool
    guarded: bool

    @classmethod
    def of(cls, config: CompressionConfig, itemsize: int) -> Storage:
        """What ``config`` asks for; its ``weights`` are known."""
        coding = coding_of(config.weights)
        group_size = config.group if coding else 0
        return cls(itemsize, coding, config.bits, group_size, config.storage == "pivoted", config.target != "stock")

    def matrix(self, shape: Shape) -> int:
        """Bytes of a dense weight (out_features, in_features)."""
        rows, columns = shape
        if self.coding is None or self.bits is None:
            return rows * columns * self.itemsize
        words = math.prod(self.coding.packed_shape(rows, columns, self.bits))
        scales = rows * -(-columns // self.group_size)
        # With weight_shape, and a guard.
        return 4 * words + self.itemsize * (scales + self.guarded) + 2 * INDEX_ITEMSIZE

    def pair(self, shape: Shape, rank: int) -> int:
        """Bytes of a low-rank one, with row numbers and guards."""
        tensors = LowRankTensors(*shape, rank, pivoted=self.pivoted)
        stored = tensors.shapes()
        factors = sum(self.matrix((stored[name][0], stored[name][1])) for name in (RIGHT, LEFT))
        return factors + tensors.index_bytes + len(tensors.guards) * self.itemsize

    def ffn(self, hidden_size: int, width: int, *, biases: Collection[str] = (), down: Storage | None = None) -> int:
        """Bytes of three FFN matrices, the last stored as ``down`` says, and of those biases that grow with the width."""
        inner = sum(role in biases for role in MLP[:2]) * width * self.itemsize
        return 2 * self.matrix((width, hidden_size)) + (down or self).matrix((hidden_size, width)) + inner


@dataclass(frozen=True)
class DenseModel:
    """A dense model as what its bytes depend on.

    Args:
        config: of transformers.
        shapes: (out_features, in_features) of the projections of each decoder layer, by role.
        biases: roles that have one, for each layer.
        itemsize: bytes of a number.
        other_bytes: of all that is no projection: embeddings, norms, the head.
        experts: of each layer's FFN; 1 where it is one.
        mixtures: whether each layer's FFN is a mixture of experts, be it of one.
    """

    config: PreTrainedConfig
    shapes: Sequence[Mapping[str, Shape]]
    biases: Sequence[frozenset[str]]
    itemsize: int
    other_bytes: int
    experts: Sequence[int]
    mixtures: Sequence[bool]

    @classmethod
    def of(cls, model: PreTrainedModel, architecture: Architecture) -> DenseModel:
        """That of a model in memory, offloaded, or on the meta device."""
        layers = architecture.decoder_layers(model)
        linears = [architecture.linears(layer) for layer in layers]
        names = (architecture.module_name(index, role) for index, layer in enumerate(linears) for role in layer)
        own = {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}
        experts = [architecture.experts(layer) for layer in layers]
        packed = [architecture.ffn_name(index, layers[index]) for index, found in enumerate(experts) if found]
        own |= {f"{name}.{leaf}" for name in packed for leaf in (GATE_UP, DOWN)}
        return cls(
            config=model.config,
            shapes=[architecture.shapes(layer) for layer in layers],
            biases=[frozenset(role for role, each in layer.items() if each.bias is not None) for layer in linears],
            itemsize=model.dtype.itemsize,
            other_bytes=sum(nbytes(tensor) for name, tensor in model_tensors(model) if name not in own),
            experts=[found.count if found else 1 for found in experts],
            mixtures=[found is not None for found in experts],
        )

    @property
    def packed(self) -> bool:
        """Whether some FFN is a mixture of experts."""
        return any(self.mixtures)

    @property
    def weights(self) -> int:
        """Parameters of all projections, biases included."""
        return sum(
            (out * inner + (out if role in biases else 0)) * (experts if role in MLP else 1)
            for shapes, biases, experts in zip(self.shapes, self.biases, self.experts, strict=True)
            for role, (out, inner) in shapes.items()
        )

    def planned(self, plans: Sequence[LayerPlan], config: CompressionConfig) -> int:
        """Bytes of all projections under a plan.

        Args:
            plans: one per decoder layer.
            config: what is done besides; its ``weights`` are known.
        """
        storage = Storage.of(config, self.itemsize)
        return sum(
            role_bytes(role, shapes, plan, biases, storage, config)
            for shapes, biases, plan in zip(self.shapes, self.biases, plans, strict=True)
            for role in shapes
        )

    def unchanged(self) -> list[LayerPlan]:
        """Nothing is removed."""
        return [LayerPlan(ranks={}, intermediate_size=shapes["gate_proj"][0]) for shapes in self.shapes]

    def matrix_budget(self, config: CompressionConfig, roles: Collection[str]) -> int:
        """Bytes that are left for some projections, without their biases that stay as they are.

        Args:
            config: gives the budget and the sparsity that is the least to remove; its ``weights`` are known.
            roles: projections that share the budget; the others are stored whole.
        """
        dense = self.planned(self.unchanged(), config)
        whole = self.compressible(config, roles)
        left = self.projection_budget(config) - dense + whole
        if config.sparsity == 0:  # bits alone are to be chosen
            return left
        removed = round(config.sparsity * self.compressible(config, compressed_roles(config)))
        return min(whole - removed, left)

    def compressible(self, config: CompressionConfig, roles: Collection[str]) -> int:
        """Bytes of some projections while they are dense; of their biases only those that grow with the FFN."""
        storage = Storage.of(config, self.itemsize)
        total = 0
        for shapes, biases in zip(self.shapes, self.biases, strict=True):
            hidden, width = shapes["down_proj"]
            total += sum(storage.matrix(shapes[role]) for role in roles if role in shapes and role not in MLP)
            total += storage.ffn(hidden, width, biases=biases) if "down_proj" in roles else 0
        return total

    def projection_budget(self, config: CompressionConfig) -> int:
        """Bytes of all projections that the budget of ``config`` leaves at most."""
        if config.size is not None:
            return config.size - self.other_bytes
        assert config.bits_per_weight is not None
        return int(config.bits_per_weight * self.weights / 8)


def role_bytes(
    role: str,
    shapes: Mapping[str, Shape],
    plan: LayerPlan,
    biases: Collection[str],
    storage: Storage,
    config: CompressionConfig,
) -> int:
    """Bytes of one projection of one layer, its bias included.

    Args:
        role: of the projection.
        shapes: of the dense layer's projections, by role.
        plan: what becomes of the layer.
        biases: roles that have one.
        storage: how weights are stored.
        config: says whether ``down_proj`` gains a bias.
    """
    shape = shape_after(role, shapes, plan)
    storage = replace(storage, bits=plan.bits.get(role, storage.bits))
    weight = storage.pair(shape, plan.ranks[role]) if role in plan.ranks else storage.matrix(shape)
    has_bias = role in biases or gains_bias(role, shapes, plan, config)
    return weight + has_bias * shape[0] * storage.itemsize


def shape_after(role: str, shapes: Mapping[str, Shape], plan: LayerPlan) -> Shape:
    """(out_features, in_features) of a projection once channels are gone."""
    out_features, in_features = shapes[role]
    if role not in MLP:
        return out_features, in_features
    width = plan.intermediate_size
    return (out_features, width) if role == "down_proj" else (width, in_features)


def gains_bias(role: str, shapes: Mapping[str, Shape], plan: LayerPlan, config: CompressionConfig) -> bool:
    """Whether a pruned FFN is given one for the mean of what went."""
    return role == "down_proj" and config.bias_compensation and plan.intermediate_size < shapes[role][1]


def without_budget(config: CompressionConfig, dense: DenseModel) -> CompressionConfig:
    """The same sparsity and weights, of another model.

    Args:
        config: its weights and sparsity are known.
        dense: the model that they follow from: mixed bits need a budget, and keep its bits per weight.
    """
    bits = 8 * dense.projection_budget(config) / dense.weights if config.is_mixed else None
    return replace(config, size=None, bits_per_weight=bits)
