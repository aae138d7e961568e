"""Models that are plain enough to be described from JSON and headers, without torch and transformers, which take seconds.

A model that passes here passes every check of lorap/checkpoint/validate.py as well: each field of config.json is known and of its
type, and the files hold exactly the tensors that it describes. All others, damaged ones among them, are for the full checks
to judge, which know what transformers makes of a field and say what is wrong. So nothing is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorap.checkpoint.find import Contents, ModelSource, locate
from lorap.checkpoint.folders import CONFIG, INDEX, WEIGHTS, read_tensors
from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.gguf.keys import gguf_settings, tensor_sources
from lorap.checkpoint.gguf.names import READ
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.layouts import PLAIN, compressed_shapes, dense_shapes
from lorap.checkpoint.quantization_fields import QUANT_METHOD, QuantizationFields
from lorap.jsonio import read_json
from lorap.nn.low_rank_tensors import INTEGERS

FLOATS = ("F64", "F32", "F16", "BF16")
# The fields of a config.json that are known here, by what they hold.
FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), (int,)
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "pretraining_tp"), (int,)),
    **dict.fromkeys(
        ("sliding_window", "max_window_layers", "no_rope_layer_interval", "chunk_size_feed_forward"), (int,)
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (int,)),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta"), (float,)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache", "use_sliding_window"), (bool,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder"), (bool,)),
    **dict.fromkeys(("model_type", "transformers_version", "_name_or_path"), (str,)),
}
# Those that may be null.
NULLABLE = ("head_dim", "sliding_window", "bos_token_id", "pad_token_id")
DTYPES = (None, "float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "silu_needs_import_lorap")
ROPE_NUMBERS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
GENERATION_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "top_k"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (int, float)),
    **dict.fromkeys(
        ("_from_model_config", "do_sample", "use_cache", "output_attentions", "output_hidden_states"), (bool,)
    ),
    "transformers_version": (str,),
}


def find_plain(model: str | Path) -> ModelSource | None:
    """The model at a path with what it holds, where that needs neither torch nor transformers; None where it does.

    Raises:
        CheckpointError: there is no model there, as :func:`lorap.checkpoint.find.locate`.
    """
    source = locate(str(model), Path(model).expanduser())
    if source.folder is None:
        return source
    try:
        if source.gguf_file:
            return source if _is_plain_gguf(source.folder / source.gguf_file) else None
        contents = read_plain(source.folder)
    except Exception:  # whatever a damaged file leads to, the full checks say, in the words of every command
        return None
    return None if contents is None else replace(source, contents=contents)


def read_plain(folder: Path) -> Contents | None:
    """What a folder holds, or None where that is for the full checks to say.

    Raises:
        LoRAPError: a file is damaged.
    """
    settings = read_json(folder / CONFIG, constants=())
    model_type: Any = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in PLAIN:
        return None
    if not _are_plain_files(folder) or not _are_plain_settings(settings):
        return None
    headers = read_tensors(folder)
    layers: Any = settings.get("num_hidden_layers")
    if type(layers) is not int or layers > len(headers):  # before anything is made in their number
        return None
    quantization = settings.get("quantization_config")
    fields = None if quantization is None else QuantizationFields(**quantization)
    shapes = dense_shapes(model_type, settings)
    if shapes is not None and fields is not None:
        shapes = compressed_shapes(shapes, fields)
    if shapes is None or not _holds(headers, shapes, tied=settings.get("tie_word_embeddings") is True):
        return None
    return Contents(settings, headers, fields)


def _holds(headers: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> bool:
    """Whether the files hold these tensors and no others, of the right kind; a tied head may be left out."""
    wanted = dict(shapes)
    if tied and "lm_head.weight" not in headers:
        del wanted["lm_head.weight"]
    return {name: info.shape for name, info in headers.items()} == wanted and all(
        name.endswith(INTEGERS) != (info.dtype in FLOATS) for name, info in headers.items()
    )


def _are_plain_files(folder: Path) -> bool:
    """Safetensors, and nothing beside them that transformers could take in their place, or that names code."""
    others = [*folder.glob("*adapter*"), *folder.glob("shard-*-model-*.safetensors")]
    if others or not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return False
    if not (folder / WEIGHTS).is_file() and not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        return False
    tokenizer, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    if tokenizer.is_file() and "auto_map" in read_json(tokenizer, constants=()):
        return False
    return not generation.is_file() or all(
        _is_plain_generation(name, value) for name, value in read_json(generation, constants=()).items()
    )


def _is_plain_generation(name: str, value: Any) -> bool:
    if name == "eos_token_id":
        return _is_token(value)
    is_count = _is(value, (int, float)) and not name.endswith("_token_id")
    if is_count and not 0 < value <= (1 if name == "top_p" else math.inf):
        return False
    return _is_field(name, value, GENERATION_FIELDS)


def _are_plain_settings(settings: Mapping[str, Any]) -> bool:
    """Whether each field is known here, and has a value of which transformers makes what it says."""
    layers, size, padding = (settings.get(name) for name in ("num_hidden_layers", "vocab_size", "pad_token_id"))
    checks: dict[str, Any] = {
        "architectures": lambda value: value is None or _are(value, (str,)),
        "eos_token_id": _is_token,
        "torch_dtype": lambda value: value in DTYPES,
        "dtype": lambda value: value in DTYPES,
        "hidden_act": lambda value: value in ACTIVATIONS,
        "layer_types": lambda value: (
            value is None or (_are(value, (str,)) and len(value) == layers and {*value} <= {*LAYER_TYPES})
        ),
        "no_rope_layers": lambda value: value is None or (_are(value, (int,)) and len(value) == layers),
        "rope_parameters": _is_plain_rope,
        "rope_scaling": _is_plain_rope,
        "quantization_config": lambda value: isinstance(value, dict) and value.get("quant_method") == QUANT_METHOD,
    }
    for name, value in settings.items():
        if not (checks[name](value) if name in checks else _is_field(name, value, FIELDS)):
            return False
    return padding is None or (type(size) is int and -size <= padding < size)


def _is_plain_rope(value: Any) -> bool:
    if value is None:
        return True
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else ""
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS or not {*ROPE_NUMBERS[kind]} <= value.keys():
        return False
    numbers = (*ROPE_NUMBERS[kind], "rope_theta")
    return all(
        _is(entry, (int, float)) if name in numbers else name in ("type", "rope_type") for name, entry in value.items()
    )


def _is_field(name: str, value: Any, fields: Mapping[str, tuple[type, ...]]) -> bool:
    return name in fields and ((value is None and name in NULLABLE) or _is(value, fields[name]))


def _is_token(value: Any) -> bool:
    return value is None or _is(value, (int,)) or _are(value, (int,))


def _are(values: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(_is(value, kinds) for value in values)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value))


def _is_plain_gguf(path: Path) -> bool:
    """Whether a file's keys and tensors are those of a model that can be read from it.

    Raises:
        LoRAPError: they are not, or the file is damaged.
    """
    header = read_gguf(path)
    settings = gguf_settings(header)
    shapes = dense_shapes(READ[header.architecture].lower(), settings)
    if shapes is None:
        return False
    tensor_sources(header, settings, shapes)
    return True
