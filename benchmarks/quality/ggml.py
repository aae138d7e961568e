"""Dense matrices as llama.cpp stores them: which type `llama-quantize` chooses for each, and the numbers that it makes of them.

The choice is that of `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, for models of
Llama's kind without experts, with an importance matrix. The numbers are its own: `ggml_quantize_chunk`, which the package
`xllamacpp` exports. tests/test_quality_budgets.py finds the bits per weight again that llama.cpp documents.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

# Types that need rows of whole blocks of 256, and what takes their place in other rows: blocks of 32, and about a bit more.
FALLBACKS = {
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


@dataclass(frozen=True)
class Place:
    """Where a matrix is.

    Args:
        role: of the projection, such as ``v_proj``.
        layer: from 0 on.
        layers: of the model.
        sharing: query heads for each head of keys and values.
    """

    role: str
    layer: int
    layers: int
    sharing: int

    @property
    def is_sensitive(self) -> bool:
        """The first eighth of the layers, the last, and every third between them."""
        eighth = self.layers // 8
        middle = eighth <= self.layer < 7 * self.layers // 8
        return not middle or (self.layer - eighth) % 3 == 2


def _sensitive(more: str) -> Callable[[Place], str | None]:
    """More bits for what values and the FFN write, in the sensitive layers."""
    return lambda place: more if place.role in ("v_proj", "down_proj") and place.is_sensitive else None


def _q4_0(place: Place) -> str | None:
    return "Q4_1" if place.role == "down_proj" and place.layer < place.layers // 8 else None


def _q3_k_m(place: Place) -> str | None:
    first = {"v_proj": place.layer < 2, "down_proj": place.layer < place.layers // 16}
    if place.role in first:
        return "Q5_K" if first[place.role] else "Q4_K"
    return "Q4_K" if place.role == "o_proj" else None


def _q2_k(place: Place) -> str | None:
    if place.role == "v_proj":
        return "Q4_K" if place.sharing >= 4 else "Q3_K"
    return "Q3_K" if place.role in ("o_proj", "down_proj") else None


def _shared_values(more: str) -> Callable[[Place], str | None]:
    """More bits for values that four query heads or more share."""
    return lambda place: more if place.role == "v_proj" and place.sharing >= 4 else None


# What `llama-quantize` is asked for: the type of most matrices, and which get another one.
MIXTURES: dict[str, tuple[str, Callable[[Place], str | None]]] = {
    "Q8_0": ("Q8_0", lambda _: None),
    "Q6_K": ("Q6_K", lambda _: None),
    "Q5_K_M": ("Q5_K", _sensitive("Q6_K")),
    "Q4_K_M": ("Q4_K", _sensitive("Q6_K")),
    "IQ4_NL": ("IQ4_NL", _shared_values("Q5_K")),
    "IQ4_XS": ("IQ4_XS", _shared_values("Q5_K")),
    "Q4_0": ("Q4_0", _q4_0),
    "Q3_K_M": ("Q3_K", _q3_k_m),
    "Q3_K_S": ("Q3_K", lambda _: None),
    "IQ3_S": ("IQ3_S", _shared_values("Q4_K")),
    "Q2_K": ("Q2_K", _q2_k),
}


def chosen_type(mixture: str, place: Place, columns: int) -> str:
    """ggml's name of the type that a matrix with rows of ``columns`` gets; F16 where rows are no whole blocks of any kind."""
    usual, other = MIXTURES[mixture]
    kind = other(place) or usual
    for found in (kind, FALLBACKS.get(kind, kind)):
        if columns % block(found)[0] == 0:
            return found
    return "F16"


def across_rows(mixture: str, place: Place) -> str:
    """The same for a matrix whose blocks may go on in the next row, which no host opens: no rows are too short then."""
    usual, other = MIXTURES[mixture]
    return other(place) or usual


def block(kind: str) -> tuple[int, int]:
    """Numbers in a block, and its bytes."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def stored_bytes(kind: str, numbers: int) -> int:
    """Of so many numbers in whole blocks."""
    size, taken = block(kind)
    if numbers % size:
        raise ValueError(f"{numbers:,} numbers are no whole blocks of {size} of {kind}")
    return numbers // size * taken


def round_trip(weight: Tensor, kind: str, importance: Tensor, *, across: bool = False) -> Tensor:
    """What is left of a matrix that llama.cpp has stored.

    Args:
        weight: (N, K).
        kind: ggml's name of a type.
        importance: (K,), the mean square of each input.
        across: blocks may go on in the next row.
    """
    shape = (1, weight.numel()) if across else tuple(weight.shape)
    source = np.ascontiguousarray(weight.detach().float().numpy()).reshape(shape)
    counts = np.ascontiguousarray(np.tile(importance.float().numpy(), len(weight) if across else 1))
    packed = np.zeros((shape[0], stored_bytes(kind, shape[1])), dtype=np.uint8)
    number = gguf.GGMLQuantizationType[kind]
    quantize = library().ggml_quantize_chunk
    taken = quantize(int(number), _at(source), _at(packed), 0, *shape, _at(counts))
    if taken != packed.nbytes:
        raise ValueError(f"{kind} took {taken:,} bytes in place of {packed.nbytes:,}")
    return torch.from_numpy(gguf.quants.dequantize(packed, number).reshape(tuple(weight.shape))).clone()


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None:
        raise SystemExit("llama.cpp's types need the package xllamacpp: pip install -e '.[dev]'")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.so")  # type: ignore[index]
    loaded = ctypes.CDLL(str(path))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return loaded
