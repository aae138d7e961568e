"""transformers: ``import lorap`` teaches ``from_pretrained`` to open compressed checkpoints.

The checkpoint says ``quantization_config.quant_method = "lorap"``; transformers then builds the dense model on the meta
device, this plug-in swaps the compressed projections in, and the weights are loaded as usual: sharded, in any dtype, with a
device map.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorap.errors import CheckpointError
from lorap.folders import read_header
from lorap.integrations import torchao
from lorap.modules import LowRankLinear

QUANT_METHOD = "lorap"
# How low-rank layers are stored, and the first format version that has it. A checkpoint says the lowest version that can
# describe it, so that an older lorap opens whatever it understands.
STORAGES = {"factors": 1, "pivoted": 2}
# The same for how weights are stored: in the model's dtype, or as int8 (lorap/integrations/torchao.py).
WEIGHTS = {"float": 1, "int8": 3}
FORMAT_VERSIONS = (1, 2, 3)


class LoRAPConfig(QuantizationConfigMixin):
    """The shapes of a compressed checkpoint, as stored in config.json under ``quantization_config``.

    Args:
        format_version: of the checkpoint; a newer one than this library knows is refused. None for the lowest that fits.
        ranks: rank of each low-rank projection, by full module name.
        intermediate_sizes: width of each FFN, by full module name, where it differs from ``config.intermediate_size``.
        biases: full names of linear layers that have a bias although the model's own config gives them none.
        dense_intermediate_size: FFN width before compression, so that the kept share can be told from the checkpoint alone.
        sparsity: what was asked for.
        recipe: what was run.
        lorap_version: what ran it.
        storage: of every low-rank layer: ``factors``, or ``pivoted`` (:mod:`lorap.pivoting`).
        weights: of every linear layer in the decoder: ``float``, or ``int8`` (:func:`lorap.quantize_int8`).

    Raises:
        CheckpointError: a version, storage or field is unknown, version and storage contradict each other, or a size is not a
            positive whole number.
    """

    def __init__(
        self,
        format_version: int | None = None,
        ranks: Mapping[str, int] | None = None,
        intermediate_sizes: Mapping[str, int] | None = None,
        biases: Sequence[str] = (),
        dense_intermediate_size: int | None = None,
        sparsity: float | None = None,
        recipe: str | None = None,
        lorap_version: str | None = None,
        storage: str = "factors",
        weights: str = "float",
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version is not None and format_version not in FORMAT_VERSIONS:
            raise CheckpointError(
                f"this checkpoint has format version {format_version} and this lorap reads "
                f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}; "
                f"it was written by lorap {lorap_version}: install that version or a newer one"
            )
        if unknown:
            raise CheckpointError(f"unknown field in quantization_config: {', '.join(sorted(unknown))}")
        if storage not in STORAGES:
            raise CheckpointError(f"quantization_config.storage is {storage!r}; known: {', '.join(STORAGES)}")
        if weights not in WEIGHTS:
            raise CheckpointError(f"quantization_config.weights is {weights!r}; known: {', '.join(WEIGHTS)}")
        lowest = max(STORAGES[storage], 2 if biases else 1, WEIGHTS[weights])
        if format_version is None:
            format_version = lowest
        if format_version < lowest:
            raise CheckpointError(
                f"quantization_config says {storage} storage{' and added biases' if biases else ''}"
                f"{' and int8 weights' if weights == 'int8' else ''} and format version {format_version}, which has none; "
                f"it must be {lowest}"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.ranks = _positive(ranks or {}, "ranks")
        self.intermediate_sizes = _positive(intermediate_sizes or {}, "intermediate_sizes")
        self.biases = list(biases)
        self.dense_intermediate_size = dense_intermediate_size
        self.sparsity = sparsity
        self.recipe = recipe
        self.lorap_version = lorap_version
        self.storage = storage
        self.weights = weights

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; what format version 1 does not know only where it is not the default."""
        fields: dict[str, Any] = super().to_dict()
        if fields["storage"] == "factors":
            del fields["storage"]
        if not fields["biases"]:
            del fields["biases"]
        if fields["weights"] == "float":
            del fields["weights"]
        return fields


class LoRAPHfQuantizer(HfQuantizer):
    """Swaps compressed layers into the empty model before its weights are loaded."""

    requires_calibration = True
    quantization_config: LoRAPConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        pivoted = self.quantization_config.storage == "pivoted"
        wanted: list[str] = []
        for name, rank in self.quantization_config.ranks.items():
            dense = _linear(model, name)
            if rank >= min(dense.in_features, dense.out_features):
                raise CheckpointError(
                    f"rank {rank} of {name} does not fit its shape ({dense.out_features}, {dense.in_features})"
                )
            low_rank = LowRankLinear(
                dense.in_features,
                dense.out_features,
                rank,
                bias=dense.bias is not None,
                device=dense.weight.device,
                dtype=dense.weight.dtype,
                pivoted=pivoted,
            )
            model.set_submodule(name, low_rank)
            wanted += [f"{name}.{key}" for key in low_rank.state_dict()]
        for name, width in self.quantization_config.intermediate_sizes.items():
            resize_mlp(model, name, width)
        for name in self.quantization_config.biases:
            old = _linear(model, name)
            weight = old.weight
            model.set_submodule(
                name, nn.Linear(old.in_features, old.out_features, bias=True, device=weight.device, dtype=weight.dtype)
            )
            wanted.append(f"{name}.bias")
        if self.quantization_config.weights == "int8":
            slots = torchao.put_slots(model)
            weights = {f"{name}.weight" for name in (slot.rsplit(".", 1)[0] for slot in slots)}
            wanted = [name for name in wanted if name not in weights] + slots
        check_complete(checkpoint_files or (), wanted)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name in self.quantization_config.ranks:
            check_pivot_rows(model.get_submodule(name), name)
        torchao.fill_slots(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, str]]:
        int8 = self.quantization_config.weights == "int8"
        return (torchao.flat_state_dict(model) if int8 else None), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def check_complete(files: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse safetensors ``files`` that lack a wanted tensor, which transformers would replace by random numbers.

    Raises:
        CheckpointError: naming the first that is missing.
    """
    paths = [Path(file) for file in files]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return
    stored = {name for path in paths for name in read_header(path)}
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(
            f"{paths[0].parent} is incomplete: {len(missing)} tensors of low-rank layers are missing, first {missing[0]}; "
            "download or copy it again"
        )


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
    """Give the FFN ``name`` empty linear layers of another width, keeping device, dtype and biases."""
    mlp = model.get_submodule(name)
    mlp.intermediate_size = width  # type: ignore[assignment]
    for role in ("gate_proj", "up_proj", "down_proj"):
        old = _linear(model, f"{name}.{role}")
        sizes = (width, old.out_features) if role == "down_proj" else (old.in_features, width)
        new = nn.Linear(*sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        setattr(mlp, role, new)


def mark_compressed(model: Any, config: LoRAPConfig) -> None:
    """Make ``model.save_pretrained`` write a checkpoint that the plug-in opens again."""
    model.config.quantization_config = config
    model.hf_quantizer = LoRAPHfQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD


def find_marks(model: Any) -> LoRAPConfig | None:
    """What :func:`mark_compressed` or loading put on the model; None where lorap left no mark."""
    found = getattr(model.config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        found = LoRAPConfig(**found)
    return found if isinstance(found, LoRAPConfig) else None


def unmark(model: Any) -> None:
    """Make ``model.save_pretrained`` write an ordinary checkpoint again; only for what opens without the plug-in."""
    LoRAPHfQuantizer(LoRAPConfig(), pre_quantized=True).remove_quantization_config(model)


def register() -> None:
    """Make the plug-in known to transformers; safe to call twice (it refuses a second registration by itself)."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LoRAPConfig)
        register_quantizer(QUANT_METHOD)(LoRAPHfQuantizer)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"quantization_config names {name}, but the model has no such layer") from None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"quantization_config names {name}, which is a {type(module).__name__}, not a linear layer"
        )
    return module


def _positive(sizes: Mapping[str, int], field: str) -> dict[str, int]:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"quantization_config.{field}: {name} is {size!r}, not a positive whole number")
    return dict(sizes)
