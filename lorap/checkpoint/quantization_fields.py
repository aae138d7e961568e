"""What config.json says about a compressed checkpoint (docs/checkpoint-format.md), and what it may say; it takes no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from annotated_types import Interval, MultipleOf

from lorap.errors import CheckpointError
from lorap.jsonio import named, read_as, shown
from lorap.weights import TRELLIS, Coding, bits_of, coding_of

QUANT_METHOD: Final = "lorap"
# How low-rank layers are stored, and the first format version that has it.
STORAGES = {"factors": 1, "pivoted": 2}
# The same for how weights are stored: in the model's dtype, as int8 with a scale for each row (lorap/checkpoint/int8_rows.py), or
# packed, with a scale for each group of a row (lorap/nn/quantized.py).
WEIGHTS = {"float": 1, "int8": 3}
PACKED = 5
# Several bits in one folder. Who does not know the field would take all of them for the one width.
MIXED = 6
# Codes on a trellis (lorap/nn/trellis.py), in one kind of bits or several.
ON_TRELLIS = 7
# More bits of them than four.
MORE_ON_TRELLIS = 8
FORMAT_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
# From here on checkpoints that need lorap carry all guards (docs/checkpoint-format.md); older ones only those in shapes.
GUARDED = 4
# Ranks and widths beyond this are damage: the largest matrices have some 100,000 rows.
MAX_SIZE = 2**31 - 1
Width = Annotated[int, Interval(ge=1, le=MAX_SIZE)]
GroupSize = Annotated[int, Interval(ge=32, le=MAX_SIZE), MultipleOf(32)]


@dataclass(eq=False)
class _Fields:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    quant_method: Literal["lorap"] = QUANT_METHOD
    recipe: str | None = None
    lorap_version: str | None = None
    storage: Literal["factors", "pivoted"] = "factors"
    weights: Literal["float", "int8", "int4", "tcq2", "tcq3", "tcq4", "tcq5", "tcq6"] = "float"
    group_size: GroupSize | None = None
    biases: list[str] = field(default_factory=list)
    ranks: dict[str, Width] = field(default_factory=dict)
    intermediate_sizes: dict[str, Width] = field(default_factory=dict)
    other_bits: dict[str, Literal[2, 3, 4, 5, 6, 8]] = field(default_factory=dict)
    format_version: int | None = None
    dense_intermediate_size: Width | None = None
    sparsity: float | None = None


class QuantizationFields(_Fields):
    """The shapes of a compressed checkpoint, as stored in config.json under ``quantization_config``, checked.

    Args:
        format_version: of the checkpoint; a newer one than this library knows is refused. None for that of a new checkpoint.
        ranks: rank of each low-rank projection, by full module name.
        intermediate_sizes: width of each FFN, by full module name, where it differs from ``config.intermediate_size``.
        biases: full names of linear layers that have a bias although the model's own config gives them none.
        dense_intermediate_size: FFN width before compression, so that the kept share can be told from the checkpoint alone; None
            where layers had different ones, which the model's own config still says.
        sparsity: what was asked for.
        recipe: what was run.
        lorap_version: what ran it.
        storage: of every low-rank layer: ``factors``, or ``pivoted`` (:mod:`lorap.algorithms.pivoting`).
        weights: of every linear layer in the decoder: ``float``; ``int4`` or ``int8``, or on the trellis ``tcq2`` to ``tcq6``,
            in groups (:func:`lorap.quantize`); or ``int8`` without a ``group_size``, which is read and no longer written.
        group_size: weights of a row that share a scale, a multiple of 32; None where they are not packed.
        other_bits: for each projection that is packed in other bits than ``weights`` says, by full module name, 4 or 8, on the
            trellis 2 to 6; both factors of a low-rank one are.

    Raises:
        CheckpointError: a version, storage or field is unknown or of the wrong type, version and storage contradict each
            other, or a size is not a positive whole number.
    """

    def __init__(self, /, **fields: Any) -> None:  # "/", so that a field called "self" is an unknown field
        _check_version(fields.get("format_version"), fields.get("lorap_version"))
        super().__init__(**vars(read_as(_Fields, fields, "quantization_config")))
        if len(set(self.biases)) < len(self.biases):
            raise CheckpointError(f"quantization_config.biases has a name twice: {shown(self.biases)}")
        if self.format_version is None and self.needs_lorap and not self.group_size:
            self.format_version = GUARDED
        if (self.group_size is None) != (self.weights == "float") and self.weights != "int8":
            raise CheckpointError(
                f"quantization_config says {self.weights} weights and group_size {self.group_size}; int4 and tcq "
                "weights have one, float weights have none"
            )
        self._check_other_bits()
        self.format_version = _format_version(self)

    @property
    def needs_lorap(self) -> bool:
        """Whether a host that knows nothing of lorap would compute something else than lorap does."""
        return bool(self.ranks or self.intermediate_sizes or self.biases) or self.weights != "float"

    @property
    def bits(self) -> int | None:
        """Of packed weights; None where the weights are not packed."""
        return None if self.group_size is None else bits_of(self.weights)

    @property
    def coding(self) -> Coding | None:
        """Of packed weights; None where the weights are not packed."""
        return None if self.group_size is None else coding_of(self.weights)

    def bits_of(self, name: str) -> int | None:
        """Of a packed projection, or of a factor of one, by full module name; None where the weights are not packed."""
        return self.other_bits.get(projection_of(name), self.bits)

    @property
    def has_row_scales(self) -> bool:
        """Whether the weights are int8 with a scale for each row (lorap/checkpoint/int8_rows.py)."""
        return self.weights == "int8" and self.group_size is None

    @property
    def weights_text(self) -> str:
        """How weights are stored, in words."""
        *others, last = dict.fromkeys((self.weights, *self.other_kinds.values()))
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def other_kinds(self) -> dict[str, str]:
        """The kind of weights of each projection in ``other_bits``, such as ``int8``."""
        coding = coding_of(self.weights)
        return {name: coding.kind(bits) for name, bits in self.other_bits.items()} if coding else {}

    def _check_other_bits(self) -> None:
        for name, bits in self.other_bits.items():
            if self.coding is None or bits == self.bits or bits not in self.coding.bits:
                packed = (
                    "are not packed"
                    if self.coding is None
                    else f"are in {bits} bits already"
                    if bits == self.bits
                    else f"go with {self.coding.kinds} alone"
                )
                raise CheckpointError(
                    f"quantization_config.other_bits says {bits} for {named(name)}, but {self.weights} weights {packed}; "
                    "only packed projections with other bits are named there"
                )

    @property
    def is_guarded(self) -> bool:
        """Whether the checkpoint carries the guards in words (lorap/checkpoint/guards.py)."""
        return self.needs_lorap and (self.format_version or 0) >= GUARDED


def projection_of(name: str) -> str:
    """The projection that a linear layer is, or is a factor of."""
    return name.removesuffix(".left").removesuffix(".right")


def _check_version(version: Any, written_by: Any) -> None:
    if version is not None and (type(version) is not int or version not in FORMAT_VERSIONS):
        raise CheckpointError(
            f"this checkpoint has format version {shown(version)} and this lorap reads "
            f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}; "
            f"it was written by lorap {named(written_by)}: install that version or a newer one"
        )


def _format_version(fields: QuantizationFields) -> int:
    """The version, or the lowest that fits where there is none."""
    lowest = (
        (MORE_ON_TRELLIS if max(fields.bits or 0, *fields.other_bits.values(), 0) > 4 else ON_TRELLIS)
        if fields.coding is TRELLIS
        else MIXED
        if fields.other_bits
        else PACKED
        if fields.group_size
        else max(STORAGES[fields.storage], 2 if fields.biases else 1, WEIGHTS[fields.weights])
    )
    version = fields.format_version
    if version is not None and version < lowest:
        raise CheckpointError(
            f"quantization_config says {fields.storage} storage{' and added biases' if fields.biases else ''}"
            f"{f' and {fields.weights} weights' if fields.weights != 'float' else ''}"
            f"{f' in groups of {fields.group_size}' if fields.group_size else ''}{' and other_bits' if fields.other_bits else ''}"
            f" and format version {version}, which has none; "
            f"it must be {lowest}"
        )
    return lowest if version is None else version
