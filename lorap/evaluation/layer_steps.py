"""The time of a decoder layer's step in one C++ call (:mod:`lorap.nn.decoder_layer`), beside that of a dense layer.

Ranges around attention and FFN are hooks, with which a layer runs in pieces, so these steps are timed by themselves. All layers
take turns: one alone would be read from the caches of the processor.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from lorap.architectures import Architecture
from lorap.checkpoint.hf_quantizer import get_quantization_config
from lorap.evaluation.profile_results import StepTime
from lorap.nn.decoder_layer import runs_in_one_call
from lorap.nn.fused import optimize_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense layers take turns as well: as many as are in the model, or have so many bytes, which no processor keeps.
ENOUGH_BYTES = 2**28


def time_steps(
    model: PreTrainedModel, architecture: Architecture, *, tokens: int, new_tokens: int
) -> dict[str, StepTime]:
    """Steps behind ``tokens`` others: ``layer``, and ``dense_layer`` with random weights where that is another one.

    Empty where a layer of ``model`` has not run its step in one call before.

    Args:
        model: that has decoded some tokens.
        architecture: of it.
        tokens: in the cache.
        new_tokens: steps that are timed.
    """
    layers = [*architecture.decoder_layers(model)]
    if not all(map(runs_in_one_call, layers)):
        return {}
    with torch.inference_mode():
        x, arguments = _arguments(model, layers[0])
        found = {"layer": _time(layers, x, arguments, tokens, new_tokens)}
        dense = _dense_layers(model, layers[0], architecture, x.dtype, len(layers))
        if weight_bytes(dense[0]) != weight_bytes(layers[0]):
            found["dense_layer"] = _time(dense, x, arguments, tokens, new_tokens)
    return found


def weight_bytes(*modules: nn.Module) -> int:
    """Of their tensors, each counted once."""
    tensors = (tensor for module in modules for tensor in module.state_dict().values())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _arguments(model: PreTrainedModel, first: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the model calls a layer with for one token, x (1, 1, hidden) and the rest."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def keep(_layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        calls.append((inputs[0], arguments))

    with first.register_forward_pre_hook(keep, with_kwargs=True):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    return calls[0]


def _dense_layers(
    model: PreTrainedModel, like: Any, architecture: Architecture, dtype: torch.dtype, most: int
) -> list[Any]:
    """Layers of the class of ``like`` and as large as before it was compressed, up to ``most``."""
    layers: list[Any] = []
    config, compression = copy.copy(like.self_attn.config), get_quantization_config(model)
    if compression and compression.dense_intermediate_size:
        config.intermediate_size = compression.dense_intermediate_size
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        while len(layers) < most and weight_bytes(*layers) < ENOUGH_BYTES:
            layer = like.layer_class(config, len(layers)).to(dtype).eval()
            optimize_layer(layer, architecture)
            layers.append(layer)
    return layers


def _time(layers: Sequence[Any], x: torch.Tensor, arguments: dict[str, Any], tokens: int, new_tokens: int) -> StepTime:
    """The mean over layers of the median over steps."""
    cache = DynamicCache()
    for layer in layers:
        attention = layer.self_attn
        shape = (1, attention.config.num_key_value_heads, tokens, attention.head_dim)
        cache.update(torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=x.dtype), attention.layer_idx)
    arguments = arguments | {"cache" if "cache" in arguments else "past_key_values": cache}
    took: list[list[float]] = [[] for _ in layers]
    for _ in range(2 + new_tokens):  # in the first one a layer is checked, in the second its cache moves
        for layer, mine in zip(layers, took, strict=True):
            start = time.perf_counter()
            layer(x, **arguments)
            mine.append(time.perf_counter() - start)
    seconds = statistics.fmean(statistics.median(mine[2:]) for mine in took)
    return StepTime(seconds, weight_bytes(*layers) / len(layers))
