"""Compressed models for hosts that do not know lorap: ordinary checkpoints of the model's own class.

Low-rank projections become dense again, so what is saved is what the FFNs gave up. Nothing is approximated: what the class
cannot hold is refused, or filled up with zeros that change no output.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.architectures import ATTENTION, MLP, PROJECTIONS, Architecture, known_architecture, text_config
from lorap.checkpoint import host_keys
from lorap.checkpoint.folders import stored_parameters
from lorap.checkpoint.hf_quantizer import detach_quantization_config
from lorap.checkpoint.reconstruct import check_floating_point, reconstruct
from lorap.checkpoint.save import SPARE_BYTES
from lorap.checkpoint.write import write_model
from lorap.errors import ArchitectureError, CheckpointError
from lorap.nn.linear import count_parameters, new_linear
from lorap.outputs import staged_folder
from lorap.reports.model_card import CARD, opened_as, stock_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# config fields by which a class gives all projections of a sub-layer a bias, where it has such a field.
_BIAS_FIELDS = {"attention_bias": ATTENTION, "mlp_bias": MLP}


def export_stock(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: Any = None,
    card: str = "",
    pad_widths: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write ``model`` as an ordinary folder of its class, which opens in every host, without lorap.

    Args:
        model: compressed, loaded or dense; changed in place by :func:`make_stock`.
        out: a new or empty folder; with ``overwrite`` an existing one is replaced, at the end and in one step.
        tokenizer: saved beside the model where given. The generation config goes along by itself.
        card: README.md of the compressed checkpoint, which is rewritten for the new one; empty for a short one.
        pad_widths: as for :func:`make_stock`.
        overwrite: replace an existing folder.
        max_shard_size: largest safetensors file.

    Raises:
        ArchitectureError: the class cannot hold the model.
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
    """
    out = Path(out)
    compressed_params = count_parameters(model)
    make_stock(model, pad_widths=pad_widths)
    params = count_parameters(model)
    with staged_folder(out, overwrite=overwrite, needed_bytes=model.get_memory_footprint() + SPARE_BYTES) as stage:
        write_model(model, stage, max_shard_size=max_shard_size)
        host_keys.complete(stage, tokenizer)
        saved = stored_parameters(stage)
        if saved != params:
            raise CheckpointError(f"{saved:,} parameters reached the disk, but the model has {params:,}")
        what = f"an ordinary {type(model).__name__} with one FFN width, which opens without lorap"
        text = stock_card(card, out.name, what, params, compressed_params)
        (stage / CARD).write_text(opened_as(text, type(model).__name__), "utf-8")
    return out


def make_stock(model: PreTrainedModel, *, pad_widths: bool = False) -> Any:
    """Everything that the model's own class cannot hold becomes what it can; changes ``model`` and returns it.

    Low-rank layers are reconstructed. Added biases switch on the class's own biases, which are zero where none was added.
    With ``pad_widths``, FFNs narrower than the widest get channels of zeros, which output nothing.

    Raises:
        ArchitectureError: the family is unknown, weights are quantized, FFN widths differ, or the class has no place for a bias;
            the model may be changed then.
    """
    architecture = known_architecture(model, to="export")
    check_floating_point(model)
    widths, own = architecture.ffn_widths(model), architecture.ffn_widths(_split_twin(model))
    if own != widths and len({*own}) > 1:
        raise ArchitectureError(
            f"FFN widths are {', '.join(map(str, widths))}, and a stock {model.config.model_type} model of this config has "
            f"{', '.join(map(str, own))}: compress attention alone (--sublayers self_attn), or keep the folder for lorap"
        )
    if own != widths and min(widths) < max(widths) and not pad_widths:
        raise ArchitectureError(
            f"FFN widths run from {min(widths):,} to {max(widths):,}, and a stock {type(model).__name__} has one for all layers: "
            f"fill up the narrower ones (--pad-widths: {architecture.zeros_to_pad(model):,} more parameters, all zero), choose a "
            "format that has a width per layer (--format gguf for llama.cpp, deci for vLLM), or compress again with --shapes "
            "uniform or --target stock"
        )
    reconstruct(model)
    if own != widths:
        fill_up(model)
    _fit_biases(model, architecture)
    detach_quantization_config(model)
    _check_class(model)
    return model


def fill_up(model: PreTrainedModel) -> None:
    """Give FFNs narrower than the widest channels of zeros, which output nothing; changes ``model``."""
    architecture = known_architecture(model, to="export")
    widest = max(architecture.ffn_widths(model))
    for index, layer in enumerate(architecture.decoder_layers(model)):
        _pad(model, index, architecture.linears(layer), architecture, widest)
    text_config(model.config).intermediate_size = widest


def _pad(
    model: PreTrainedModel, index: int, linears: Mapping[str, nn.Linear], architecture: Architecture, width: int
) -> None:
    missing = width - linears["down_proj"].in_features
    if not missing:
        return
    for role in MLP:
        old = linears[role]
        rows, columns = (0, missing) if role == "down_proj" else (missing, 0)
        weight = nn.functional.pad(old.weight.data, (0, columns, 0, rows))
        bias = None if old.bias is None else nn.functional.pad(old.bias.data, (0, rows))
        model.set_submodule(architecture.module_name(index, role), new_linear(weight, bias).train(old.training))
    mlp = architecture.decoder_layers(model)[index].get_submodule(architecture.mlp)
    if "intermediate_size" in vars(mlp):
        mlp.intermediate_size = width  # type: ignore[assignment]


def _fit_biases(model: PreTrainedModel, architecture: Architecture) -> None:
    """Biases that the class has only if its config says so; zeros where a projection has none of its own."""
    has, text = architecture.roles_with_bias(model), text_config(model.config)
    for field, roles in _BIAS_FIELDS.items():
        if has & set(roles) - architecture.roles_with_bias(_split_twin(model)) and hasattr(text, field):
            setattr(text, field, True)
    room = architecture.roles_with_bias(_split_twin(model))
    homeless = [role for role in PROJECTIONS if role in has - room]
    if homeless:
        raise ArchitectureError(
            f"{', '.join(homeless)} have gained biases, and a stock {type(model).__name__} has no place for them; "
            "compress again with --no-bias-compensation"
        )
    give_biases(model, room)


def give_biases(model: PreTrainedModel, roles: Collection[str]) -> None:
    """A bias for each of these projections in every layer, zero where it had none; changes ``model``."""
    architecture = known_architecture(model, to="export")
    for layer in architecture.decoder_layers(model):
        for role in {*roles} & {*architecture.roles(layer)}:
            linear = architecture.linears(layer)[role]
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.data.new_zeros(linear.out_features))


def _stock_twin(model: PreTrainedModel) -> Any:
    """What the model's class makes of its config, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _split_twin(model: PreTrainedModel) -> Any:
    """The same with a linear layer for each projection."""
    twin = _stock_twin(model)
    known_architecture(twin, to="export")
    return twin


def _check_class(model: PreTrainedModel) -> None:
    def shapes(state: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
        return {(name, tuple(tensor.shape)) for name, tensor in state.items()}

    different = sorted(shapes(model.state_dict()) ^ shapes(_stock_twin(model).state_dict()))
    if different:
        name, shape = different[0]
        raise ArchitectureError(
            f"a stock {type(model).__name__} cannot hold this model: {len(different)} tensors differ, first {name} {shape}"
        )
