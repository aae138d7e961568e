"""``lorap.warm_up``: compile and check the GPU kernels that a CUDA graph is to use, before it is captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.errors import ConfigError
from lorap.nn import graphs
from lorap.nn.linear import Linear, LowRankLinear
from lorap.nn.quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm_up(model: nn.Module, *, tokens: int | Sequence[int] = 1) -> None:
    """Compile, load and check every Triton kernel that ``model`` can use inside a CUDA graph.

    A capture cannot compile: of lorap's ops it takes the kernels for the numbers of tokens that were warmed, and torch's
    matmuls for all others. Outside of graphs nothing changes: there torch does this work, in every call. On a CPU there is
    nothing to do. :func:`lorap.optimize_for_inference` calls this for one token.

    Args:
        model: as it will be captured: merged, and on its device.
        tokens: how many a step brings, batch times positions; or several such numbers.

    Raises:
        ConfigError: a number of tokens that is not positive.
    """
    numbers = [tokens] if isinstance(tokens, int) else list(tokens)
    if any(number < 1 for number in numbers):
        raise ConfigError(f"cannot warm up for {min(numbers)} tokens; a step of a model brings 1 or more")
    inputs: dict[tuple[Any, ...], Tensor] = {}
    for number in numbers:
        for layer, weight in _layers(model):
            key = (number, layer.in_features, weight.dtype, weight.device)
            if key not in inputs:  # merged projections know each other by their input
                inputs[key] = weight.new_zeros(number, layer.in_features)
            warm(getattr(layer, "gated", layer.forward), inputs[key])


def capture_steps(model: PreTrainedModel) -> None:
    """Let ``model.generate`` capture its steps in a CUDA graph, which transformers does with a static cache on a GPU."""
    if _compiles_on(model.device):
        model.generation_config.cache_implementation = "static"


def warm(run: Callable[[Tensor], Any], x: Tensor) -> None:
    """Call ``run`` with x (tokens, in_features) so that a CUDA graph may use the kernels of its ops."""
    try:
        with torch.no_grad(), graphs.warming():
            run(x)
    except Exception as failure:  # whatever a compiler throws must not stop a model that torch can run
        _tell_once(f"for {len(x)} tokens: {type(failure).__name__}: {failure}")


@cache
def _tell_once(why: str) -> None:
    message = f"lorap's kernels could not be prepared, and CUDA graphs leave their work to torch, {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _layers(model: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """The modules that run ops of lorap on a GPU, and a weight of each."""
    for module in model.modules():
        if isinstance(module, (LowRankLinear, Linear, QuantizedLinear)) or hasattr(module, "gated"):
            tensors = chain(module.parameters(), module.buffers())  # scales, where there are no parameters
            weight = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
            if weight is not None and _compiles_on(weight.device):
                yield module, weight


def _compiles_on(device: torch.device) -> bool:
    return device.type == "cuda"
