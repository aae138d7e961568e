"""The layers of a compressed checkpoint in an empty dense model, and whether the files hold what these need."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorap.architectures import ARCHITECTURES, ATTENTION, MLP, split_model
from lorap.architectures.experts import DOWN, GATE_UP, Experts
from lorap.architectures.splitting import join
from lorap.checkpoint.expert_tensors import pack_experts
from lorap.checkpoint.finite import check_scales
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.int8_rows import put_rows
from lorap.checkpoint.quantization_fields import projection_of
from lorap.checkpoint.renaming import renamed
from lorap.checkpoint.stored_tensors import stored_tensors
from lorap.errors import CheckpointError
from lorap.jsonio import named
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import (
    INTEGERS,
    LOW_RANK_ONLY,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    LowRankTensors,
)
from lorap.nn.quantized import QuantizedLinear, packed_linears, put_empty
from lorap.nn.trellis import layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_layers(model: PreTrainedModel, config: LoRAPConfig) -> dict[str, tuple[int, ...]]:
    """Swap empty layers as ``config`` describes them into an empty dense model.

    Returns:
        The shape of each tensor that the checkpoint must hold for them, by full name.

    Raises:
        CheckpointError: a name is no linear layer or FFN of the dense model, or a rank does not fit.
    """
    if model.config.model_type in ARCHITECTURES:
        split_model(model)
    bare = bare_prefix(model)
    wanted = _put_low_rank(model, config, bare)
    for full_name, width in config.intermediate_sizes.items():
        wanted += _put_width(model, full_name.removeprefix(bare), width)
    for full_name in config.biases:
        name = full_name.removeprefix(bare)
        old = _linear(model, name)
        weight = old.weight
        model.set_submodule(
            name, nn.Linear(old.in_features, old.out_features, bias=True, device=weight.device, dtype=weight.dtype)
        )
        wanted += [f"{name}.weight", f"{name}.bias"]
    if config.weights != "float":
        if model.config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"{config.weights} weights in a model of type {named(model.config.model_type)}, which lorap does not know"
            )
        wanted += _put_quantized(model, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {bare + name: shapes[name] for name in wanted}


def _put_width(model: PreTrainedModel, name: str, width: int) -> list[str]:
    """An FFN, or the experts of a layer, of another width; returns the names of their tensors in ``model``."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is not None and architecture.packed and name.endswith(f".{architecture.packed.path}"):
        Experts(_module(model, name)).resize(width)
        return [f"{name}.{leaf}" for leaf in (GATE_UP, DOWN)]
    resize_mlp(model, name, width)
    return [f"{name}.{role}.weight" for role in MLP]


def join_model(model: PreTrainedModel) -> None:
    """Join what the family of ``model`` stores as one matrix; the opposite of :func:`lorap.architectures.split_model`.

    Raises:
        ArchitectureError: a projection is no dense linear layer any more.
    """
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is not None and architecture.fused:
        join(architecture.decoder_layers(model), architecture.fused)


def _put_quantized(model: PreTrainedModel, config: LoRAPConfig) -> list[str]:
    """Room for quantized weights; returns the names of their tensors in ``model``."""
    if config.group_size is None or config.coding is None:
        return put_rows(model)
    check_other_bits(model, config)
    bare = bare_prefix(model)
    bits = {name: config.bits_of(bare + name) for name, _ in packed_linears(model)}
    return put_empty(model, bits, kind=layer_of(config.coding), group_size=config.group_size)


def check_other_bits(model: PreTrainedModel, config: LoRAPConfig) -> None:
    """Refuse bits for a projection that the decoder layers of ``model`` do not have.

    Raises:
        CheckpointError: naming the first such entry.
    """
    if not config.other_bits:
        return
    known = {projection_of(bare_prefix(model) + name) for name, _ in packed_linears(model)}
    if unknown := [name for name in config.other_bits if name not in known]:
        raise CheckpointError(
            f"quantization_config.other_bits names {named(unknown[0])}, but the decoder layers have no such projection"
        )


def _put_low_rank(model: PreTrainedModel, config: LoRAPConfig, bare: str) -> list[str]:
    """The low-rank layers among them; returns the names of their tensors in ``model``."""
    # All of them first: a factor that is a linear layer itself was not one of the dense model.
    ranks = {name.removeprefix(bare): rank for name, rank in config.ranks.items()}
    dense = {name: _linear(model, name) for name in ranks}
    wanted: list[str] = []
    for name, old in dense.items():
        bias, pivoted = old.bias is not None, config.storage == "pivoted"
        tensors = LowRankTensors(old.out_features, old.in_features, ranks[name], bias, pivoted, config.is_guarded)
        tensors.check_rank(name)
        new = LowRankLinear.empty(tensors, device=old.weight.device, dtype=old.weight.dtype)
        model.set_submodule(name, new)
        wanted += [f"{name}.{key}" for key in tensors.names()]
    return wanted


def bare_prefix(model: PreTrainedModel) -> str:
    """What the names in a checkpoint have before those of ``model``: "model." where it is a base model (``AutoModel``), or ""."""
    prefix = str(model.base_model_prefix)
    return f"{prefix}." if prefix and prefix not in model._modules else ""


def keep_whole(model: PreTrainedModel, config: LoRAPConfig) -> None:
    """Take out of the plan of tensor parallelism what it would cut wrongly; every worker then holds and computes all of that.

    transformers cuts by the name of a dense projection. A low-rank one has its factors below that name, and a quantized
    one its numbers, so only the guard would be cut; and FFNs of other widths, or with biases that were added, are none of those
    that the plan was made for.
    """
    roles = {name.rsplit(".", 1)[-1] for name in config.ranks}
    quantized = config.weights != "float"
    whole = [".self_attn."] if roles & set(ATTENTION) or quantized else []
    whole += [".mlp."] if roles & set(MLP) or config.intermediate_sizes or config.biases or quantized else []
    plan = getattr(model, "_tp_plan", None) or {}
    for name in [name for name in plan if any(part in name for part in whole)]:
        del plan[name]


def check_stored(model: PreTrainedModel, files: Sequence[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse safetensors ``files`` that lack a tensor of :func:`put_layers`, have it in another shape, or have more of the kind.

    transformers would replace what is missing by random numbers, and pass over factors that the config does not name.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    paths = [Path(file) for file in files]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return
    tensors = {name: one for path in paths for name, one in stored_tensors(path).items()}
    found = {name: one.info for name, one in pack_experts(model, renamed(model, tensors)).items()}
    stored = {name: one.shape for name, one in found.items()}
    folder = paths[0].parent
    first = next(iter(wanted), "")
    if first not in stored and first.partition(".")[2] in stored:  # saved without the head
        wanted = {name.partition(".")[2]: shape for name, shape in wanted.items()}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {len(missing)} tensors of compressed layers are missing, first {missing[0]}; "
            "download or copy it again"
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise CheckpointError(f"{name} has the shape {stored[name]}, but config.json makes it {shape}")
        check_whole(name, found[name].dtype)
    endings = tuple(f".{key}" for key in LOW_RANK_ONLY)
    unnamed = [name for name in stored if name.endswith(endings) and name not in wanted]
    if unnamed:
        raise CheckpointError(f"{folder} holds {unnamed[0]}, but its quantization_config names no such layer")


def check_whole(name: str, dtype: str) -> None:
    """Refuse floating point where whole numbers belong: loading would cast it, and what it rounds to is another weight.

    Args:
        name: of a tensor.
        dtype: as the header of its file says, such as ``I32``.

    Raises:
        CheckpointError: naming both.
    """
    if name.endswith(INTEGERS) and not dtype.startswith(("I", "U")):
        raise CheckpointError(
            f"{name} is stored as {dtype}; whole numbers are needed; the checkpoint is damaged, download or copy it again"
        )


def check_quantized(layer: QuantizedLinear, name: str) -> None:
    """Refuse scales that are no numbers, words of another size, and a shape that is not the layer's.

    Raises:
        CheckpointError: naming the tensor and what is wrong with it.
    """
    shape, scales = layer.weight_shape, layer.weight_scale
    if shape.is_meta or scales.is_meta:  # offloaded to disk
        return
    if layer.weight_packed.dtype != torch.int32:
        raise CheckpointError(f"{name}.{WEIGHT_PACKED} is {layer.weight_packed.dtype}; int32 is needed")
    if shape.tolist() != [layer.out_features, layer.in_features]:
        raise CheckpointError(
            f"{name}.{WEIGHT_SHAPE} says {shape.tolist()}, but config.json makes it {[layer.out_features, layer.in_features]}; "
            "the checkpoint is damaged, download or copy it again"
        )
    check_scales(scales, f"{name}.{WEIGHT_SCALE}")


def check_pivot_rows(layer: Any, name: str) -> None:
    """Refuse rows that the kernels could not scatter to: they must ascend strictly and lie within the output.

    Raises:
        CheckpointError: naming the layer and the offending rows.
    """
    rows = layer.pivot_rows
    if rows is None or rows.is_meta:  # offloaded to disk
        return
    if rows.dtype != torch.int64 or rows.shape != (layer.rank,):
        raise CheckpointError(
            f"{name}.pivot_rows is {rows.dtype} of shape {tuple(rows.shape)}; int64 of shape ({layer.rank},) is needed"
        )
    values = rows.tolist()
    for before, after in itertools.pairwise(values):
        if before >= after:
            raise CheckpointError(
                f"{name}.pivot_rows must ascend, but {after} follows {before}; the checkpoint is damaged, "
                "download or copy it again"
            )
    if values[0] < 0 or values[-1] >= layer.out_features:
        raise CheckpointError(
            f"{name}.pivot_rows run from {values[0]} to {values[-1]}, but the layer has rows 0 to {layer.out_features - 1}; "
            "the checkpoint is damaged, download or copy it again"
        )


def resize_mlp(model: nn.Module, name: str, width: int) -> None:
    """Give the FFN ``name`` empty linear layers of another width, keeping device, dtype and biases.

    Args:
        model: of transformers, without weights yet.
        name: full name of the FFN.
        width: its new number of channels.

    Raises:
        CheckpointError: ``model`` has no such FFN.
    """
    for role in MLP:
        old = _linear(model, f"{name}.{role}")
        sizes = (width, old.out_features) if role == "down_proj" else (old.in_features, width)
        new = nn.Linear(*sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        model.set_submodule(f"{name}.{role}", new)
    model.get_submodule(name).intermediate_size = width  # type: ignore[assignment]


def _module(model: nn.Module, name: str) -> Any:
    module: Any = model
    try:
        for part in name.split("."):
            module = module._modules[part]  # not get_submodule: properties such as base_model are second names
    except (KeyError, AttributeError):
        raise CheckpointError(f"quantization_config names {named(name)}, but the model has no such layer") from None
    return module


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = _module(model, name)
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"quantization_config names {named(name)}, which is a {type(module).__name__}, not a linear layer"
        )
    return module
