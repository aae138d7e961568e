"""llama.cpp's names for architectures and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# transformers' model_type -> what llama.cpp calls the architecture. Mistral differs from Llama by its window only.
WRITTEN: Mapping[str, str] = MappingProxyType(
    {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
)
# llama.cpp's architecture -> the class that computes the same.
READ: Mapping[str, str] = MappingProxyType({"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"})
# Rotary pairs are neighbours there; transformers keeps the halves of a head apart.
INTERLEAVED = ("llama", "deci")


def gguf_names(architecture: str, num_layers: int, keys: Iterable[str]) -> dict[str, str | None]:
    """llama.cpp's name of each key of a state dict.

    Args:
        architecture: llama.cpp's name of it.
        num_layers: of the model.
        keys: names in its state dict.

    Returns:
        By key; None where the architecture has no place for it.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, num_layers)
    return {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in keys}


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (halves, pairs) to (pairs, halves); the tensor has heads * 2 * pairs rows."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def halved(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`interleaved`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
