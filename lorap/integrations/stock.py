"""Compressed models for hosts that do not know lorap: ordinary checkpoints of the model's own class.

Low-rank projections become dense again, so what is saved is what the FFNs gave up. Nothing is approximated: what the class
cannot hold is refused, or filled up with zeros that change no output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.architectures import ATTENTION, MLP, PROJECTIONS, STOCK_MULTIPLES, Architecture, known_architecture
from lorap.checkpoint import host_keys
from lorap.checkpoint.folders import read_tensors
from lorap.checkpoint.gguf.writing import FILE_TYPES, check_gguf, write_gguf
from lorap.checkpoint.hf_quantizer import detach_quantization_config
from lorap.checkpoint.reconstruct import reconstruct
from lorap.checkpoint.save import SPARE_BYTES
from lorap.checkpoint.write import write_model
from lorap.errors import ArchitectureError, CheckpointError
from lorap.nn.linear import count_parameters, new_linear
from lorap.outputs import staged_folder
from lorap.reports.model_card import stock_card
from lorap.reports.run import CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Other texts than the calibration's reach higher.
NEAR_OVERFLOW = torch.finfo(torch.float16).max / 2
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
        saved = sum(tensor.numel for tensor in read_tensors(stage).values())
        if saved != params:
            raise CheckpointError(f"{saved:,} parameters reached the disk, but the model has {params:,}")
        text = stock_card(card, out.name, type(model).__name__, params, compressed_params)
        (stage / "README.md").write_text(text, "utf-8")
    return out


def export_gguf(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: Any,
    card: str = "",
    pad_widths: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` and its tokenizer as one GGUF file for llama.cpp, ``NAME-F16.gguf`` and the like, into the folder
    ``out``.

    The file has the dtype of the model.

    Args:
        model: compressed, loaded or dense; changed in place by :func:`make_stock`.
        out: a new or empty folder, as for :func:`export_stock`.
        tokenizer: of the model, a fast one.
        card: README.md of the compressed checkpoint; empty for a short one.
        pad_widths: as for :func:`make_stock`.
        overwrite: replace an existing folder.

    Raises:
        ArchitectureError: the class, or llama.cpp, cannot hold the model or its tokenizer.
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
        ConfigError: the ``gguf`` package is not installed.
    """
    out = Path(out)
    check_gguf(model)
    compressed_params = count_parameters(model)
    make_stock(model, pad_widths=pad_widths)
    with staged_folder(out, overwrite=overwrite, needed_bytes=model.get_memory_footprint() + SPARE_BYTES) as stage:
        file = stage / f"{out.name}-{FILE_TYPES[model.dtype]}.gguf"
        write_gguf(model, file, tokenizer=tokenizer, name=out.name)
        text = stock_card(
            card, out.name, "GGUF file for llama.cpp", count_parameters(model), compressed_params, file.name
        )
        (stage / "README.md").write_text(text, "utf-8")
    return out


def width_cost(model: PreTrainedModel) -> str:
    """One sentence on what the FFN width means for quantized formats, whose blocks of 32 or 256 numbers lie along a row.

    Sources: llama.cpp's src/llama-quant.cpp (which types take over, and that rows of no whole block stay in 16 bits).
    """
    architecture = known_architecture(model, to="export")
    down = [architecture.linears(layer)["down_proj"] for layer in architecture.decoder_layers(model)]
    width, numel = down[0].in_features, sum(linear.weight.numel() for linear in down)
    large, small = STOCK_MULTIPLES
    what = f"the {len(down)} down projections ({numel:,} parameters)"
    if width % small:
        return (
            f"FFN width {width:,} is no multiple of {small}: quantized by llama.cpp, {what} stay in 16 bits, {2 * numel:,} bytes "
            f"in place of {numel * 9 // 16:,} in Q4_0; --target stock, or --width-multiple {small}, makes whole blocks"
        )
    if width % large:
        return (
            f"FFN width {width:,} is a multiple of {small}, as Q4_0 and Q8_0 need, but not of {large}: K-quants store {what} "
            f"in a larger format, {numel * 11 // 16:,} bytes in Q5_0 in place of {numel * 9 // 16:,} in Q4_K"
        )
    return f"FFN width {width:,} is a multiple of {large}: every quantized format takes it"


def overflow_warning(report: CompressionReport | None, dtype: torch.dtype) -> str | None:
    """One sentence where inputs seen during calibration come near the end of float16; None where they do not.

    llama.cpp rounds the inputs of F16 matrices to float16: beyond 65,504 they are infinite, and what follows is NaN.
    """
    projections = report.projections if report else []
    worst = max(projections, key=lambda projection: projection.largest_input, default=None)
    if dtype != torch.float16 or worst is None or worst.largest_input < NEAR_OVERFLOW:
        return None
    return (
        f"{worst.role} of layer {worst.layer} read activations up to {worst.largest_input:,.0f} during calibration, and float16 "
        f"ends at {torch.finfo(torch.float16).max:,.0f}: hosts that compute in it, as llama.cpp does with F16 matrices, may give "
        "NaN; use --dtype bfloat16, or quantize the file to Q8_0"
    )


def make_stock(model: PreTrainedModel, *, pad_widths: bool = False) -> Any:
    """Everything that the model's own class cannot hold becomes what it can; changes ``model`` and returns it.

    Low-rank layers are reconstructed. Added biases switch on the class's own biases, which are zero where none was added.
    With ``pad_widths``, FFNs narrower than the widest get channels of zeros, which output nothing.

    Raises:
        ArchitectureError: the family is unknown, FFN widths differ, or the class has no place for a bias; the model may be
            changed then.
    """
    architecture = known_architecture(model, to="export")
    widest = _widest(model, architecture, pad_widths)
    reconstruct(model)
    for index, layer in enumerate(architecture.decoder_layers(model)):
        _pad(model, index, architecture.linears(layer), architecture, widest)
    model.config.intermediate_size = widest
    _fit_biases(model, architecture)
    detach_quantization_config(model)
    _check_class(model)
    return model


def _widest(model: PreTrainedModel, architecture: Architecture, pad_widths: bool) -> int:
    down = [architecture.linears(layer)["down_proj"] for layer in architecture.decoder_layers(model)]
    widths = [linear.in_features for linear in down]
    if min(widths) < max(widths) and not pad_widths:
        zeros = 3 * down[0].out_features * sum(max(widths) - width for width in widths)
        raise ArchitectureError(
            f"FFN widths run from {min(widths):,} to {max(widths):,}, and a stock {type(model).__name__} has one for all layers: "
            f"fill up the narrower ones (--pad-widths: {zeros:,} more parameters, all zero), or compress again with "
            "--shapes uniform or --target stock"
        )
    return max(widths)


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
    has = _roles_with_bias(model, architecture)
    for field, roles in _BIAS_FIELDS.items():
        if has & set(roles) - _roles_with_bias(_stock_twin(model), architecture) and hasattr(model.config, field):
            setattr(model.config, field, True)
    room = _roles_with_bias(_stock_twin(model), architecture)
    homeless = [role for role in PROJECTIONS if role in has - room]
    if homeless:
        raise ArchitectureError(
            f"{', '.join(homeless)} have gained biases, and a stock {type(model).__name__} has no place for them; "
            "compress again with --no-bias-compensation"
        )
    for layer in architecture.decoder_layers(model):
        for role in room:
            linear = architecture.linears(layer)[role]
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.data.new_zeros(linear.out_features))


def _roles_with_bias(model: PreTrainedModel, architecture: Architecture) -> set[str]:
    layers = architecture.decoder_layers(model)
    return {role for layer in layers for role, linear in architecture.linears(layer).items() if linear.bias is not None}


def _stock_twin(model: PreTrainedModel) -> Any:
    """What the model's class makes of its config, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _check_class(model: PreTrainedModel) -> None:
    def shapes(state: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
        return {(name, tuple(tensor.shape)) for name, tensor in state.items()}

    different = sorted(shapes(model.state_dict()) ^ shapes(_stock_twin(model).state_dict()))
    if different:
        name, shape = different[0]
        raise ArchitectureError(
            f"a stock {type(model).__name__} cannot hold this model: {len(different)} tensors differ, first {name} {shape}"
        )
