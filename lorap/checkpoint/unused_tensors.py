"""Stored tensors that the model's class has no place for: passed over where they mean nothing, else refused.

transformers drops them with at most a warning, and what is left is another model than the one that was saved: without its biases,
its adapters, its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.errors import CheckpointError
from lorap.jsonio import named
from lorap.nn.low_rank_tensors import FACTORS, NAMED_GUARD, OUTPUT_BIAS, PIVOT_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INV_FREQ = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# Masks and positions that older versions of transformers computed and saved along.
MASK = re.compile(r"\.attn\.(masked_)?bias$")
POSITIONS = re.compile(r"(^|\.)position_ids$")
# A vector of zeros that is added changes nothing; larger ones are not looked at.
MAX_BIAS = 2**20
# What a name tells about where such a tensor comes from, and the way out.
ORIGINS = (
    (
        r"lora_|\.base_layer\.|modules_to_save",
        "belongs to an adapter; merge it into the model first (merge_and_unload)",
    ),
    (
        r"scale|SCB|absmax|quant_|qweight|qzeros|g_idx|weight_packed|weight_shape|zero_point",
        "belongs to quantized weights; start from the model in floating point",
    ),
    (
        r"^(score|classifier|v_head|value_head|reward_head)\b",
        "is the head of a classifier or reward model, no language model",
    ),
    (r"\.bias$", "is not zero; if the model has such biases, say so in config.json (attention_bias, mlp_bias)"),
    (
        rf"\.({'|'.join(FACTORS)})\.|{PIVOT_ROWS}|{OUTPUT_BIAS}|{NAMED_GUARD}",
        "belongs to a low-rank layer, but quantization_config names no such layer",
    ),
    (r"", "changes the model; use the config.json that the weights were saved with, or take it out of the files"),
)


def check_unused(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], unused: Iterable[str]) -> None:
    """Refuse ``unused`` tensors of a model's files, but for those that mean nothing.

    Args:
        model: empty, as config.json describes it.
        tensors: all that are stored.
        unused: names among them that the model has no place for.

    Raises:
        CheckpointError: naming the first tensor, the number of them and the way out.
    """
    extra = sorted(name for name in unused if not _means_nothing(model, name, tensors.get(name)))
    if extra:
        more = f" and {len(extra) - 1:,} more" if extra[1:] else ""
        raise CheckpointError(
            f"the model that config.json describes has no place for {named(extra[0])}{more}: it {origin_of(extra[0])}"
        )


def origin_of(name: str) -> str:
    """Where a tensor that the model has no place for comes from, and the way out, as far as its name tells."""
    return next(text for pattern, text in ORIGINS if re.search(pattern, name))


def unused_names(model: PreTrainedModel, tensors: Mapping[str, TensorInfo] | Mapping[str, StoredTensor]) -> list[str]:
    """Stored names that are none of ``model``'s, also where it was saved without its head; not those its class passes over."""
    prefix = model.base_model_prefix + "."
    own = set(model.state_dict())
    if not any(name.startswith(prefix) for name in tensors):
        own |= {name.removeprefix(prefix) for name in own}
    declared = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [name for name in tensors if name not in own and not any(one.search(name) for one in declared)]


def _means_nothing(model: PreTrainedModel, name: str, stored: StoredTensor | None) -> bool:
    if stored is None:
        return False
    shape = stored.shape
    if INV_FREQ.search(name):
        _check_frequencies(model, stored)
        return True
    if POSITIONS.search(name) or (MASK.search(name) and (len(shape) == 4 or stored.info.numel == 1)):
        return True
    return name.endswith(".bias") and stored.info.numel <= MAX_BIAS and not bool(stored.read().any())


def _check_frequencies(model: PreTrainedModel, stored: StoredTensor) -> None:
    """Stored frequencies of rotary embeddings are those that config.json gives, before or after scaling.

    Older versions saved them along; they scaled positions instead of frequencies.

    Raises:
        CheckpointError: they differ, as where config.json has lost the base or the scaling that the model was trained with.
    """
    rotary = next((part for name, part in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    computed: Tensor | None = None if rotary is None else type(rotary)(config=model.config).inv_freq
    if computed is None:
        return
    found = stored.read().double().flatten()
    base = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")
    candidates = [computed.double()]
    if base:
        steps = torch.arange(len(computed), dtype=torch.float64) / len(computed)
        candidates.append(float(base) ** -steps)
    # Of the least precise dtype that they may have been in: float16, with its smallest number, or bfloat16.
    close = [
        one for one in candidates if one.shape == found.shape and torch.allclose(found, one, rtol=2**-7, atol=2**-24)
    ]
    if not close:
        raise CheckpointError(
            f"{named(stored.name)} has {len(found)} frequencies from {found.max():.6g} to {found.min():.6g}, but config.json "
            f"gives {len(computed)} from {computed.max():.6g} to {computed.min():.6g}: it lost rope_theta or rope_scaling; put "
            "them back, or take the tensor out of the files"
        )
