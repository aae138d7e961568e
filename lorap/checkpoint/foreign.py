"""Folders whose weights another program has quantized: which of them are read as floating-point numbers, and from which tensors.

fp8 (DeepSeek, Qwen), compressed-tensors (its 8-bit formats and ``pack-quantized``), AWQ and GPTQ. All others are refused, and
so is a scale that belongs to no weight: what is read is what the quantized model computes with, or nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.quantized_weights import QuantizedWeight, Tensors, awq, gptq, packed, scaled
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.errors import CheckpointError
from lorap.jsonio import named, shown
from lorap.kernels.packing import words

Shape = tuple[int, int]
Leaves = Mapping[str, StoredTensor]
READ = "fp8, compressed-tensors, awq and gptq"
# Numbers of 8 bits that are weights once they are scaled.
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
# Scales of activations: no part of a weight.
ACTIVATIONS = ("activation_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point")
SCALES = ("weight_scale_inv", "weight_scale", "scales")
FLOATS = ("F64", "F32", "F16", "BF16")
# Powers of two, of fp8 alone: as they are, or as bytes.
EXPONENTS = ("F8_E8M0", "U8")
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


@dataclass(frozen=True)
class Layout:
    """How one kind of folder stores a weight.

    Args:
        leaf: the last part of the name of the tensor that holds the numbers.
        dtypes: that this has, where the weight is quantized at all.
        needed: other parts that there must be.
        optional: others that there may be.
        shape: of the weight, from its parts.
        formula: the weight, from its shape and the values of its parts.
    """

    leaf: str
    dtypes: tuple[str, ...]
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Leaves], Shape]
    formula: Callable[..., Any]


def floating_point(tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """``tensors`` with each quantized weight in place of its parts, under the name of a weight in floating point.

    Args:
        tensors: of the weight files, by name.
        quantization: ``quantization_config``, of another program.

    Raises:
        CheckpointError: lorap does not read weights of this kind, or a part of one is missing or misshapen.
    """
    layout = _layout(quantization)
    layers: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, stored in tensors.items():
        layer, _, leaf = name.rpartition(".")
        layers[layer][leaf] = stored
    found: dict[str, StoredTensor] = {}
    for layer, leaves in layers.items():
        numbers = leaves.get(layout.leaf)
        if numbers is not None and numbers.info.dtype in layout.dtypes:
            weight = _weight(f"{layer}.weight", layout, leaves)
            parts = {*weight.sources, *ACTIVATIONS}
            leaves = {leaf: stored for leaf, stored in leaves.items() if leaf not in parts} | {"weight": weight}
        found |= {f"{layer}.{leaf}" if layer else leaf: stored for leaf, stored in leaves.items()}
    return found


def is_floating_point_read(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether :func:`floating_point` has put a weight among these."""
    return any(isinstance(stored, QuantizedWeight) for stored in tensors.values())


def refusal(quantization: Mapping[str, Any], why: str) -> CheckpointError:
    """The sentence for a quantized model that is not read."""
    return CheckpointError(
        f"the model is quantized ({named(quantization.get('quant_method'))}) in a way that lorap does not read: {why}; start "
        "from the model in floating point"
    )


def _weight(name: str, layout: Layout, leaves: Leaves) -> QuantizedWeight:
    missing = [leaf for leaf in layout.needed if leaf not in leaves]
    if missing:
        raise CheckpointError(
            f"{named(name)} is quantized, but its {missing[0]} is not in the files; download or copy them again, or start from "
            "the model in floating point"
        )
    names = (layout.leaf, *layout.needed, *(leaf for leaf in layout.optional if leaf in leaves))
    sources = {leaf: leaves[leaf] for leaf in names}
    main = sources[layout.leaf]
    if any(len(sources[leaf].shape) != 2 for leaf in (layout.leaf, "qzeros") if leaf in sources):
        raise CheckpointError(f"{named(name)} is stored in the shape {main.shape}; two dimensions are needed")
    for leaf in SCALES:
        if leaf in sources and sources[leaf].info.dtype not in FLOATS + (EXPONENTS if leaf == SCALES[0] else ()):
            raise CheckpointError(
                f"{named(sources[leaf].name)} is stored as {sources[leaf].info.dtype}; it is no scale"
            )
    shape = layout.shape(sources)
    nbytes = sum(stored.info.nbytes for stored in sources.values())
    info = TensorInfo(main.info.dtype, shape, nbytes, main.info.offset)
    formula = partial(layout.formula, shape=shape)
    return QuantizedWeight(main.path, name, info, main.stamp, sources, formula=formula)


def _layout(quantization: Mapping[str, Any]) -> Layout:
    method = quantization.get("quant_method")
    layouts = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}
    if method not in layouts:
        raise refusal(quantization, f"it reads {READ}")
    return layouts[method](quantization)


def _fp8(quantization: Mapping[str, Any]) -> Layout:
    block = quantization.get("weight_block_size")
    if block is not None and not _are_sizes(block, 2):
        raise refusal(quantization, f"weight_block_size is {shown(block)}")
    return _in_blocks("weight_scale_inv", (block[0], block[1]) if block else None, EIGHT_BITS[:2], zeros=())


def _compressed_tensors(quantization: Mapping[str, Any]) -> Layout:
    weights, kind = _scheme(quantization)
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    blocks: dict[str, Any] = {
        "tensor": (-1, -1),
        "channel": (1, -1),
        "group": (1, group),
        "block": weights.get("block_structure"),
    }
    block: Any = blocks.get(strategy) if isinstance(strategy, str) else None
    if block is None or (strategy in ("group", "block") and not _are_sizes(block, 2)):
        raise refusal(quantization, f"strategy {shown(strategy)} with group_size {shown(group)}")
    zeros = ("weight_zero_point",) if weights.get("symmetric") is False else ()
    if kind != "pack-quantized":
        return _in_blocks(
            "weight_scale", None if strategy == "tensor" else (block[0], block[1]), EIGHT_BITS, zeros=zeros
        )
    bits = weights.get("num_bits")
    if bits not in (4, 8) or strategy not in ("channel", "group") or weights.get("type", "int") != "int":
        raise refusal(quantization, f"{kind} weights of {shown(bits)} bits with strategy {shown(strategy)}")

    def shape(parts: Leaves) -> Shape:
        rows, columns = (int(size) for size in parts["weight_shape"].read().flatten().tolist())
        sides = (rows, words(columns, bits))
        groups = _blocks(columns, block[1])
        _check(parts, {"weight_packed": sides, "weight_scale": (rows, groups), "weight_g_idx": (columns,)})
        _check(parts, {"weight_zero_point": (words(rows, bits), groups)})
        return rows, columns

    def formula(tensors: Tensors, *, shape: Shape) -> Any:
        return packed(tensors, bits=bits, group=shape[1] if block[1] == -1 else block[1], shape=shape)

    needed = ("weight_scale", "weight_shape", *zeros)
    return Layout("weight_packed", ("I32",), needed, ("weight_g_idx",), shape, formula)


def _scheme(quantization: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """How compressed-tensors stores the weights, the same in all groups of layers: arguments, and the name of the format."""
    groups = quantization.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    schemes = [
        (group["weights"], group.get("format") or quantization.get("format"))
        for group in groups
        if group.get("weights")
    ]
    if not schemes or not all(isinstance(weights, dict) for weights, _ in schemes):
        raise refusal(quantization, "config_groups say nothing of weights")
    fields = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")
    kinds = {str([kind, *(weights.get(field) for field in fields)]) for weights, kind in schemes}
    if kinds != {min(kinds)}:
        raise refusal(quantization, "its config_groups store weights in several ways")
    weights, kind = schemes[0]
    if kind not in FORMATS:
        raise refusal(quantization, f"format {shown(kind)}, of {', '.join(FORMATS)}")
    sparse = quantization.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense" or quantization.get("transform_config"):
        raise refusal(quantization, "its weights are sparse or rotated besides")
    return weights, kind


def _in_blocks(scale: str, block: Shape | None, dtypes: tuple[str, ...], *, zeros: tuple[str, ...]) -> Layout:
    """Numbers of 8 bits, and one scale for each block of them: -1 is the whole side, None a single one for all."""

    def sizes(shape: Shape) -> Shape:
        rows, columns = (whole if size == -1 else size for size, whole in zip(block or (-1, -1), shape, strict=True))
        return rows, columns

    def grid(shape: Shape) -> Shape:
        rows, columns = sizes(shape)
        return _blocks(shape[0], rows), _blocks(shape[1], columns)

    def shape_of(parts: Leaves) -> Shape:
        rows, columns = parts["weight"].shape
        for leaf in (scale, *zeros):
            if block or parts[leaf].info.numel != 1:
                _check(parts, {leaf: grid((rows, columns))})
        return rows, columns

    def formula(tensors: Tensors, *, shape: Shape) -> Any:
        grids = [tensors[leaf].reshape(grid(shape)) for leaf in (scale, *zeros)]
        return scaled(tensors["weight"], grids[0], grids[1] if zeros else None, sizes(shape))

    return Layout("weight", dtypes, (scale, *zeros), (), shape_of, formula)


def _awq(quantization: Mapping[str, Any]) -> Layout:
    bits, group = quantization.get("bits", quantization.get("w_bit")), _group(quantization, "q_group_size")
    version = str(quantization.get("version", "gemm")).lower()
    if (
        bits != 4
        or version != "gemm"
        or quantization.get("backend") == "llm-awq"
        or not quantization.get("zero_point", True)
    ):
        raise refusal(
            quantization, f"version {shown(version)} of {shown(bits)} bits; gemm of 4 bits with zero points is read"
        )

    def shape(parts: Leaves) -> Shape:
        columns, rows = parts["qweight"].shape[0], 8 * parts["qweight"].shape[1]
        groups = _blocks(columns, group)
        _check(parts, {"qzeros": (groups, rows // 8), "scales": (groups, rows)})
        return rows, columns

    def formula(tensors: Tensors, *, shape: Shape) -> Any:
        return awq(tensors, group=shape[1] if group == -1 else group)

    return Layout("qweight", ("I32",), ("qzeros", "scales"), (), shape, formula)


def _gptq(quantization: Mapping[str, Any]) -> Layout:
    bits, group = quantization.get("bits"), _group(quantization, "group_size")
    kind = quantization.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or kind not in ("gptq", "gptq_v2"):
        raise refusal(
            quantization,
            f"checkpoint_format {shown(kind)} of {shown(bits)} bits; gptq and gptq_v2 of 2, 4 and 8 are read",
        )
    per_word = 32 // bits

    def shape(parts: Leaves) -> Shape:
        columns, rows = per_word * parts["qweight"].shape[0], parts["qweight"].shape[1]
        groups = _blocks(columns, group)
        _check(parts, {"qzeros": (groups, words(rows, bits)), "scales": (groups, rows), "g_idx": (columns,)})
        return rows, columns

    def formula(tensors: Tensors, *, shape: Shape) -> Any:
        return gptq(tensors, bits=bits, group=shape[1] if group == -1 else group, stored_less=int(kind == "gptq"))

    # Without g_idx nobody knows which inputs share a scale once they were ordered by their activations.
    needed = ("qzeros", "scales", *(("g_idx",) if quantization.get("desc_act") else ()))
    return Layout("qweight", ("I32",), needed, ("g_idx",), shape, formula)


def _group(quantization: Mapping[str, Any], other_name: str) -> int:
    group = quantization.get("group_size", quantization.get(other_name))
    if type(group) is not int or (group < 1 and group != -1):
        raise refusal(quantization, f"group_size is {shown(group)}")
    return group


def _blocks(whole: int, size: int) -> int:
    return 1 if size == -1 else -(-whole // size)


def _are_sizes(value: Any, count: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(type(size) is int and size > 0 for size in value)
    )


def _check(parts: Leaves, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse parts of other shapes than these; a part that is not there is none of them."""
    for leaf, shape in wanted.items():
        if leaf in parts and parts[leaf].shape != shape:
            raise CheckpointError(
                f"{named(parts[leaf].name)} has the shape {parts[leaf].shape}, but quantization_config makes it {shape}"
            )
