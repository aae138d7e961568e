"""Is a model folder safe to open, and do its config.json and its weight files describe the same model?

transformers trusts config.json: it builds whatever model is described there and fills with random numbers what the files do not
hold. So the description is compared with the headers first, on a model without memory.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lorap.architectures import ARCHITECTURES, split_model, text_config
from lorap.checkpoint.build import check_stored, check_whole, put_layers
from lorap.checkpoint.expert_tensors import pack_experts
from lorap.checkpoint.folders import CONFIG, CONTAINERS, read_files, weight_files
from lorap.checkpoint.foreign import floating_point, is_floating_point_read
from lorap.checkpoint.format import QUANT_METHOD, LoRAPConfig
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.renaming import renamed
from lorap.checkpoint.rows import split_tensors
from lorap.checkpoint.stored_tensors import STORED_DTYPES, Stamp, StoredTensor, same_values
from lorap.checkpoint.unused_tensors import check_unused, origin_of, unused_names
from lorap.errors import CheckpointError
from lorap.jsonio import INFINITY, named, read_json, shown
from lorap.nn.dtypes import float32_names
from lorap.nn.linear import embedding_weight
from lorap.nn.low_rank_tensors import INTEGERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
# Fields that make transformers read other files than those which were checked.
OTHER_FILES = ("configuration_files", "transformers_weights")
# Fields that can name code on the hub, and the values that need none.
IMPLEMENTATIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
# Fields over which transformers loops in Python before there is any tensor.
LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth"),
    *("num_decoder_layers", "num_encoder_layers", "num_nextn_predict_layers"),
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")
# Every layer holds at least one tensor, unless layers share theirs; no model comes near.
MAX_SHARED_LAYERS = 1000
MAX_LABELS = 1_000_000
# Elements that are computed instead of stored, such as causal masks and rotary tables.
MAX_COMPUTED = 2**28
# Elements that other formats pack into a byte: 2 bits each, and room for what they drop.
MAX_PACKED = 8
# Numbers of 8 bits mean nothing without scales.
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json that makes transformers run no code and read no file but those which lorap checks.

    Infinity is let through: some families (Mamba 2) have it in ``time_step_limit``.

    Raises:
        CheckpointError: it is damaged, or asks for code or files from elsewhere.
    """
    config = read_json(path, constants=INFINITY)
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"{path}: model_type is {shown(model_type)}, not a string")
    if config.get("auto_map") is not None and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: model type {named(model_type)} needs code from its own folder, which lorap never runs; "
            "use a version of transformers that knows this model type"
        )
    if model_type in ARCHITECTURES and not _follows(layers := config.get("per_layer_config"), str(model_type)):
        # transformers takes it (5.24), and builds layers of most families without it, or fails on a field that it has.
        raise CheckpointError(
            f"{path}: per_layer_config is {shown(layers)}, and layers of {model_type} models do not follow it in transformers; "
            "remove the field if all layers are alike, or start from the dense model"
        )
    for name, value in _fields(config):
        if name in OTHER_FILES:
            raise CheckpointError(f"{path}: {name} names other files than lorap checks; remove the field")
        if name.lstrip("_") in ("attn_implementation", "experts_implementation"):
            asked = value.values() if isinstance(value, dict) else [value]
            if unknown := [choice for choice in asked if choice not in IMPLEMENTATIONS]:
                raise CheckpointError(
                    f"{path}: {name} is {shown(unknown[0])}, which may be code from the hub; remove the field"
                )
    return config


def _follows(layers: Any, model_type: str) -> bool:
    """Whether layers of a family are what ``per_layer_config`` makes of them: all are where there is none."""
    if not layers:
        return True
    known = ARCHITECTURES[model_type].layer_fields
    return isinstance(layers, dict) and all(isinstance(each, dict) and {*each} <= {*known} for each in layers.values())


def lorap_config(config: Mapping[str, Any]) -> LoRAPConfig | None:
    """What config.json says about compression by lorap; None where it says nothing.

    Raises:
        CheckpointError: as :class:`LoRAPConfig`, or quantization_config is no object.
    """
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"config.json: quantization_config is {shown(quantization)}, not an object")
    if quantization and not isinstance(quantization.get("quant_method", ""), str):
        raise CheckpointError(f"config.json: quant_method is {shown(quantization['quant_method'])}, not a string")
    return LoRAPConfig(**quantization) if quantization and quantization.get("quant_method") == QUANT_METHOD else None


@dataclass(frozen=True)
class CheckedFolder:
    """A model folder that has passed every check there is, and what was learned on the way.

    Args:
        folder: with config.json and weights.
        settings: config.json.
        config: the same as transformers reads it, but for what the tensors say better: whether the head is the embedding.
        tensors: all that the weight files hold, by name.
        compression: what lorap has done to the model; None for others.
        widths: of each layer's FFN as config.json alone has it; empty where lorap does not know the family.
    """

    folder: Path
    settings: Mapping[str, Any]
    config: Any
    tensors: Mapping[str, StoredTensor]
    compression: LoRAPConfig | None = None
    widths: Sequence[int] = ()

    @property
    def headers(self) -> dict[str, TensorInfo]:
        """Dtype, shape and size of every tensor."""
        return {name: stored.info for name, stored in self.tensors.items()}


def check_folder(folder: Path) -> CheckedFolder:
    """Refuse a folder that asks for code or other files, or whose config.json does not fit what its weight files hold.

    For the families that lorap compresses every name and shape must agree. Of others only the size of the whole is known.

    Raises:
        CheckpointError: naming the field or the tensor and the numbers.
        Exception: whatever transformers raises on a config that it cannot make sense of.
    """
    settings = read_config(folder / CONFIG)
    _check_neighbours(folder)
    tensors = _stored(folder)
    headers = {name: stored.info for name, stored in tensors.items()}
    check_counts(settings, headers)
    compression = lorap_config(settings)
    known = settings.get("model_type") in ARCHITECTURES
    if known:
        _check_finite(settings)
        _check_padding(settings)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    foreign = (
        settings["quantization_config"] if known and settings.get("quantization_config") and not compression else None
    )
    if foreign and any(stored.info.dtype not in FLOATS for stored in tensors.values()):
        tensors = floating_point(tensors, foreign)
        del config.quantization_config
    if hasattr(config, "auto_map"):
        # What is written has no such files; and whoever lets code run would get another model than the one compressed here.
        del config.auto_map
        warnings.warn(
            f"{folder / CONFIG} names code of its own (auto_map), which lorap never runs: the model is the "
            f"{settings.get('model_type')} of transformers",
            RuntimeWarning,
            stacklevel=2,
        )
    model = empty_model(config)
    widths = ARCHITECTURES[config.model_type].ffn_widths(model) if known else []
    wanted = put_layers(model, compression) if compression else {}
    tensors = pack_experts(model, renamed(model, tensors))
    if known and not compression:
        tensors = split_tensors(tensors, model)
    headers = {name: stored.info for name, stored in tensors.items()}
    unused = unused_names(model, tensors)
    read = is_floating_point_read(tensors)
    if foreign and not read:
        _refuse_quantized(foreign, headers, unused)
    if known:
        integers = [name for name in wanted if name.endswith(INTEGERS)]
        integers += [name for name, stored in tensors.items() if is_floating_point_read({name: stored})]
        _check_shapes(model, headers, integers, unused)
    if compression:
        check_stored(model, [str(path) for path in weight_files(folder)], wanted)
    if known or model.state_dict().keys() <= tensors.keys():  # else transformers has other names for some of them
        check_unused(model, tensors, unused)
    _check_total(model, headers, 1 if known and not read else MAX_PACKED)
    untie_stored_head(model, config, tensors)
    return CheckedFolder(folder, settings, config, tensors, compression, widths)


def _check_neighbours(folder: Path) -> None:
    """Refuse files that transformers would take in place of those that are checked, or on top of them."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(f"{folder} holds an adapter ({ADAPTER}); merge it into its model first, or remove it")
    _check_index(folder)
    _check_tokenizer_code(folder)
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise CheckpointError(f"{folder} holds a distributed checkpoint beside its weights; save it as one model first")
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)
        try:
            GenerationConfig.from_pretrained(str(folder))
        except Exception as error:  # whatever transformers makes of a value
            raise CheckpointError(
                f"{folder / GENERATION}: {' '.join(str(error).split())[:300]}; correct the file, or remove it"
            ) from error


def _check_tokenizer_code(folder: Path) -> None:
    """Refuse a tokenizer that is a class of the folder's own."""
    if not (folder / TOKENIZER).is_file():
        return
    settings = read_json(folder / TOKENIZER, constants=INFINITY)
    code, name = settings.get("auto_map"), settings.get("tokenizer_class")
    if code and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        raise CheckpointError(
            f"{folder / TOKENIZER}: tokenizer_class {named(str(name))} needs code from its own folder, which lorap never runs; "
            "save the tokenizer as PreTrainedTokenizerFast"
        )


def _check_index(folder: Path) -> None:
    for single, index in CONTAINERS:
        if (folder / single).is_file():
            return
        if (folder / index).is_file():
            if not isinstance(read_json(folder / index).get("metadata"), dict):
                raise CheckpointError(
                    f'{folder / index} has no metadata, which transformers asks for; add "metadata": {{}} to it'
                )
            return


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files; errors as :func:`lorap.checkpoint.folders.read_tensors`."""
    tensors: dict[str, StoredTensor] = {}
    for path, headers in read_files(folder).items():
        stamp = Stamp.of(path)
        tensors |= {name: StoredTensor(path, name, info, stamp) for name, info in headers.items()}
    return tensors


def check_counts(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse more layers, experts or labels than the files can mean, before anything is built in their number.

    Raises:
        CheckpointError: naming the field and the numbers.
    """
    largest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    limits = dict.fromkeys(LAYER_COUNTS, max(len(tensors), MAX_SHARED_LAYERS))
    limits |= dict.fromkeys(EXPERT_COUNTS, max(len(tensors), largest)) | {"num_labels": MAX_LABELS}
    if config.get("model_type") == "doge" and config.get("is_moe") is False:  # it names experts that it does not build
        del limits["num_experts"]
    for name, value in _fields(config):
        if name in limits and isinstance(value, (int, float)) and value > limits[name]:
            raise CheckpointError(
                f"config.json: {name} is {shown(value)}, but the files hold {len(tensors):,} tensors, the largest side of which "
                f"is {largest:,}; the folder is damaged"
            )
    if config.get("model_type") in ARCHITECTURES and "text_config" not in config:
        path = ARCHITECTURES[config["model_type"]].layers.rsplit(".", 1)[-1]
        indexed = re.compile(rf"(?:^|\.)(?:{path}|h)\.([0-9]{{1,9}})\.")  # h: in files of EXAONE 3
        found = [int(match[1]) for name in tensors if (match := indexed.search(name))]
        layers, stored = config.get("num_hidden_layers"), max(found, default=-1) + 1
        if layers is not None and (type(layers) is not int or layers != stored):
            raise CheckpointError(
                f"config.json: num_hidden_layers is {shown(layers)}, but the files hold {stored:,} layers"
            )


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model that a config describes, on the meta device, in ``dtype`` or what the config says, split as lorap has it.

    As with ``from_pretrained`` what its class wants in float32 has that dtype.
    """
    if dtype is not None:
        # transformers writes the dtype into it, and who opens the folder next would get that one.
        config = copy.deepcopy(config)
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=False, **({"dtype": dtype} if dtype else {}))
    state = model.state_dict(keep_vars=True)
    for name in float32_names(model, model.dtype):
        state[name].data = state[name].data.float()
    if config.model_type in ARCHITECTURES:
        split_model(model)
    return model


def model_class(config: Any) -> Any:
    """What of transformers opens the models of a config: those that write text, seeing images where the config says how."""
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees and config is not text_config(config) else AutoModelForCausalLM


def _check_shapes(
    model: PreTrainedModel, tensors: Mapping[str, TensorInfo], integers: Sequence[str], unused: Sequence[str]
) -> None:
    """Every tensor of ``model`` is stored, in its shape; all but ``integers`` as floating point, and words as whole numbers."""
    stored = dict(tensors)
    prefix = model.base_model_prefix + "."
    if not any(name.startswith(prefix) for name in stored):  # saved without the head
        stored = {prefix + name: tensor for name, tensor in tensors.items()}
    missing = []
    for names, tensor in _state(model):
        found = [name for name in names if name in stored]
        if not found:
            missing.append(names[0])
        for name in found:
            shape, dtype = stored[name].shape, stored[name].dtype
            if shape != tensor.shape:
                raise CheckpointError(f"{name} has the shape {shape}, but config.json makes it {tuple(tensor.shape)}")
            if dtype not in FLOATS and name not in integers:
                raise CheckpointError(f"{name} is stored as {dtype}; floating point is needed")
            check_whole(name, dtype)
    if missing:
        instead = f"; it holds {named(unused[0])}, which {origin_of(unused[0])}" if unused else ""
        raise CheckpointError(
            f"the folder is incomplete: {len(missing)} tensors are missing, first {missing[0]}{instead}"
        )


def _check_total(model: nn.Module, tensors: Mapping[str, TensorInfo], per_byte: int) -> None:
    """What would be allocated may not exceed what the files hold, and a bit for what is computed."""
    state = [tensor for _, tensor in _state(model)]
    persistent = {id(tensor) for tensor in state}
    wanted = sum(tensor.numel() for tensor in state)
    computed = sum(buffer.numel() for buffer in model.buffers() if id(buffer) not in persistent)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    if wanted > per_byte * stored or computed > MAX_COMPUTED:
        raise CheckpointError(
            f"config.json describes {wanted:,} parameters and {computed:,} computed numbers, but the files hold {stored:,} bytes"
        )


def _state(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """The tensors of a state dict with all their names: tied ones have two."""
    by_id: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(by_id.values())


def _refuse_quantized(quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], unused: list[str]) -> None:
    """Weights in another format than floating point: reading such formats would begin here."""
    method = named(quantization.get("quant_method"))
    if not unused and all(tensor.dtype in FLOATS for tensor in tensors.values()):
        raise CheckpointError(
            f"config.json says that the weights are quantized ({method}), but they are floating-point numbers: remove "
            "quantization_config from it"
        )
    raise CheckpointError(f"the model is quantized ({method}); start from the one in floating point")


def untie_stored_head(model: PreTrainedModel, config: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Where config.json says that the head is the embedding, and the files hold another head: ``config`` says so no more.

    Args:
        model: built from ``config``, without weights.
        config: is changed: ``tie_word_embeddings`` becomes False.
        tensors: of the weight files, by name.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(config, "tie_word_embeddings", False):
        return
    stored = [tensors.get(f"{module_name(model, part)}.weight") for part in (head, embedding)]
    readable = [one for one in stored if one is not None and one.info.dtype in STORED_DTYPES]
    if len(readable) == 2 and not same_values(*readable):
        config.tie_word_embeddings = False


def untie_own_head(model: PreTrainedModel) -> None:
    """The same for a model in memory: transformers opens such files rightly, but leaves the config as it is."""
    head, embedding = model.get_output_embeddings(), embedding_weight(model)
    if head is None or not getattr(model.config, "tie_word_embeddings", False) or head.weight is embedding:
        return
    if not head.weight.is_meta and not torch.equal(head.weight.to(embedding), embedding):
        model.config.tie_word_embeddings = False


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """Full name of a module of ``model``."""
    return next(name for name, module in model.named_modules() if module is wanted)


def _check_padding(config: Mapping[str, Any]) -> None:
    padding, size = config.get("pad_token_id"), config.get("vocab_size")
    if type(padding) is int and type(size) is int and not -size <= padding < size:
        raise CheckpointError(
            f"config.json: pad_token_id is {padding:,}, but there are {size:,} embeddings; set it to null"
        )


def _check_finite(config: Mapping[str, Any]) -> None:
    for name, value in _fields(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"config.json: {named(name)} is {value}")


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of an object, those of objects in it included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _fields(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item, name)
