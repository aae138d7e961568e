"""The tensors of a low-rank layer as a checkpoint holds them: names, shapes, and what each is for.

Keys of a projection ``q_proj``::

    q_proj.right.weight   (rank, in_features)      shrink: x to rank
    q_proj.left.weight    (out_features, rank)     expand: rank to out
    q_proj.left.bias      (out_features,)          where the dense layer had one
    q_proj.pivot_rows     (rank,) int64            only in pivoted storage, where left.weight is (out_features - rank, rank)
    q_proj.output_bias    (out_features,)          instead of left.bias in pivoted storage, whose bias covers more than left
    q_proj.weight         (1,)                     guard, see below
    q_proj.needs_import_lorap  (1,)                its name in plain words; not in checkpoints before format version 4

All but the row numbers have the dtype of the model.

The guard makes a host that does not know lorap fail: it looks for a ``q_proj.weight`` of shape (out, in), finds one of shape
(1,), and stops. Without it, transformers would start with random projections and only print a warning. What else keeps such
hosts out is in lorap/checkpoint/guards.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorap.errors import CheckpointError

# Linear layers within a low-rank one.
FACTORS = ("right", "left")
RIGHT, LEFT = (f"{factor}.weight" for factor in FACTORS)
LEFT_BIAS, OUTPUT_BIAS = "left.bias", "output_bias"
# int64.
PIVOT_ROWS, INDEX_ITEMSIZE = "pivot_rows", 8
GUARD, NAMED_GUARD = "weight", "needs_import_lorap"
# Value of a guard; the format's version is in config.json.
GUARD_VALUE = 1.0
# Of a layer of int8 rows (lorap/checkpoint/int8_rows.py), low-rank or not. Here, where nothing needs torch to know them.
INT8_DATA, INT8_SCALE = "_weight_qdata", "_weight_scale"
# The same of one in packed words (lorap/nn/quantized.py).
WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE = "weight_packed", "weight_scale", "weight_shape"
# Endings of the tensors that are no floating point numbers.
INTEGERS = (f".{PIVOT_ROWS}", f".{INT8_DATA}", f".{WEIGHT_PACKED}", f".{WEIGHT_SHAPE}")
# What no dense layer has.
LOW_RANK_ONLY = (RIGHT, LEFT, LEFT_BIAS, PIVOT_ROWS, OUTPUT_BIAS, NAMED_GUARD)


@dataclass(frozen=True)
class LowRankTensors:
    """What the files hold of one low-rank layer.

    Args:
        out_features: rows of the dense weight.
        in_features: columns of the dense weight.
        rank: inner size of the two factors.
        bias: whether the layer has one.
        pivoted: whether ``rank`` of the output rows are stored by their numbers (:mod:`lorap.algorithms.pivoting`).
        guarded: whether the guard in words is there; format versions before 4 have only the other.
    """

    out_features: int
    in_features: int
    rank: int
    bias: bool = False
    pivoted: bool = False
    guarded: bool = True

    @classmethod
    def of_stored(cls, shapes: Mapping[str, tuple[int, ...]], layer: str) -> LowRankTensors:
        """The layer whose tensors have these names, without that of the layer, and shapes.

        Args:
            shapes: with an entry ``RIGHT`` at least.
            layer: full name, for messages.

        Raises:
            CheckpointError: ``LEFT`` is missing, or one of the two is no matrix.
        """
        right, left = shapes[RIGHT], shapes.get(LEFT)
        if left is None:
            raise CheckpointError(f"the model is damaged: it has {layer}.{RIGHT} but no {layer}.{LEFT}; copy it again")
        if not len(left) == len(right) == 2:
            raise CheckpointError(f"the model is damaged: {layer}.{RIGHT} has shape {right}, {layer}.{LEFT} {left}")
        pivoted = PIVOT_ROWS in shapes
        bias = LEFT_BIAS in shapes or OUTPUT_BIAS in shapes
        out_features = left[0] + (right[0] if pivoted else 0)
        return cls(out_features, right[1], right[0], bias, pivoted, NAMED_GUARD in shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in the order of the layer's state dict; names are without that of the layer."""
        rows = self.out_features - self.rank if self.pivoted else self.out_features
        found: dict[str, tuple[int, ...]] = {self.bias_name: (self.out_features,)} if self.bias and self.pivoted else {}
        found |= dict.fromkeys(self.guards, (1,))
        if self.pivoted:
            found[PIVOT_ROWS] = (self.rank,)
        found |= {RIGHT: (self.rank, self.in_features), LEFT: (rows, self.rank)}
        return found | ({self.bias_name: (self.out_features,)} if self.bias else {})

    def names(self) -> list[str]:
        """Name of each tensor, without that of the layer."""
        return list(self.shapes())

    @property
    def bias_name(self) -> str:
        """What the bias is called where there is one."""
        return OUTPUT_BIAS if self.pivoted else LEFT_BIAS

    @property
    def guards(self) -> tuple[str, ...]:
        """What keeps hosts without lorap out."""
        return (GUARD, NAMED_GUARD) if self.guarded else (GUARD,)

    @property
    def factor_params(self) -> int:
        """Parameters of both factors; the bias is not counted, and row numbers and guards are none."""
        return self.rank * (self.out_features + self.in_features - (self.rank if self.pivoted else 0))

    @property
    def index_bytes(self) -> int:
        """Bytes of the row numbers."""
        return INDEX_ITEMSIZE * self.rank if self.pivoted else 0

    def check_rank(self, layer: str) -> None:
        """Refuse a rank that is no smaller than the sides of the weight of ``layer``.

        Raises:
            CheckpointError: naming layer, rank and shape.
        """
        if self.rank >= min(self.out_features, self.in_features):
            raise CheckpointError(
                f"rank {self.rank} of {layer} does not fit its shape ({self.out_features}, {self.in_features})"
            )
