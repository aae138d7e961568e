"""A decoder layer's step of one token per sequence in one C++ call, with no Python between norms, projections and attention.

A layer of LLaMA's kind calls some forty operators for a token, and each takes longer to call than to compute in a small model.
``torch.ops.lorap_cpu.decoder_layer`` (csrc/cpu/decoder_layer.h) computes all of it, appends to the cache in place, and rounds
where the layer itself does. What else there is runs the layer's own forward: prompts, gradients, adapters, hooks, windows that
forget, other caches, other attention, other devices. A layer computes its first step both ways, and again after its parts were
replaced, and is left alone where they differ.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorap.nn import dispatch, native
from lorap.nn.layer_weights import Weights, collect
from lorap.nn.linear import is_autocast

# Where the decoder layers are whose classes compute what the op does, and how their names begin. Qwen3 has norms of heads.
FAMILIES = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}": name
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
MAX_SEQUENCES = 16
# What a layer may be given besides its cache: the rest of it changes nothing of what it computes.
KNOWN = {"attention_mask", "position_embeddings", "position_ids", "use_cache", "cache_position"}
# Positions that a cache gets room for at least, beside half of those it has.
GROWTH = 64
_op: Any = torch.ops.lorap_cpu.decoder_layer.default if native.HAS_CPU else None


class Room:
    """Memory for keys and values of one layer of a cache, and for more of them.

    Args:
        keys: (sequences, heads, capacity, head_dim).
        values: (sequences, heads, head_dim, capacity): transposed, so that attention reads both along their rows.
    """

    __slots__ = ("capacity", "keys", "shown", "values")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.capacity = keys, values, keys.shape[2]
        # The views that the cache has of both. Where it has other tensors, somebody else changed it.
        self.shown: tuple[Tensor | None, Tensor | None] = (None, None)

    def show(self, entry: Any, length: int) -> None:
        """Let the cache have so many positions."""
        sequences, heads, capacity, head_dim = self.keys.shape
        strides = (heads * head_dim * capacity, head_dim * capacity, 1, capacity)
        keys = entry.keys = self.keys.narrow(2, 0, length)
        values = entry.values = self.values.as_strided((sequences, heads, length, head_dim), strides)
        self.shown = keys, values


class Step:
    """What all layers share in one step of a model; ``added``: to scores, (sequences, positions) float32 or None."""

    __slots__ = ("added", "mask", "positions", "rotation", "sequences")

    def __init__(self, rotation: tuple[Tensor, Tensor], mask: Tensor | None, sequences: int, positions: int) -> None:
        self.rotation, self.mask, self.sequences, self.positions = rotation, mask, sequences, positions
        self.added = None
        if mask is not None:
            added = (
                mask.float() if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            )
            self.added = added.expand(sequences, -1, -1, -1).reshape(sequences, positions).contiguous()


_rooms: MutableMapping[DynamicLayer, Room] = WeakKeyDictionary()
# Decoder layer -> whether its first step was right; its weights.
_verdicts: MutableMapping[nn.Module, bool] = WeakKeyDictionary()
_collected: MutableMapping[nn.Module, Weights] = WeakKeyDictionary()
_current = threading.local()


def fuse_decoder_layer(layer: nn.Module) -> None:
    """Let ``layer`` run its steps in one op, where its family is known for it; weights, names and the class's name stay."""
    kind: Any = type(layer)
    known = FAMILIES.get(kind.__module__)
    if native.HAS_CPU and known and kind.__qualname__ == f"{known}DecoderLayer" and not hasattr(kind, "layer_class"):
        layer.__class__ = _stepping(kind)


def runs_in_one_call(layer: nn.Module) -> bool:
    """Whether ``layer`` has run its step in the op, which was right."""
    return _verdicts.get(layer) is True


@functools.cache
def _stepping(base: Any) -> type[nn.Module]:
    """The class ``base`` of a decoder layer, with the op in its forward; called as it is, since hosts go by the name."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, hidden_states: Tensor, *rest: Any, **arguments: Any) -> Any:
        y = None if rest or torch.compiler.is_compiling() else _step(self, base.forward, hidden_states, arguments)
        return base.forward(self, hidden_states, *rest, **arguments) if y is None else y

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _restore, (base,), self.__dict__

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "layer_class": base}
    return type(base.__name__, (base,), members)


def _restore(base: Any) -> nn.Module:
    """A layer without contents, for copy and pickle."""
    found = _stepping(base)
    return found.__new__(found)


def _step(layer: nn.Module, by_itself: Callable[..., Any], x: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """The output of ``layer`` for x (sequences, 1, hidden); None where the op does not compute it."""
    if type(x) is not Tensor or x.dim() != 3 or x.shape[1] != 1 or torch.is_grad_enabled() or layer.training:
        return None
    verdict = _verdicts.get(layer)
    if verdict is False:
        return None
    name = "cache" if "cache" in arguments else "past_key_values"
    for key, value in arguments.items():
        if value is not None and key not in KNOWN and key != name:
            return None
    attention: Any = layer._modules["self_attn"]
    entry = _cached(arguments.get(name), attention, x)
    step = None if entry is None else _shared(x, arguments, entry.keys, attention)
    if step is None:
        return None
    weights = _collected.get(layer)
    if weights is None or weights.dtype is not x.dtype or not weights.hold():
        weights = collect(layer, x.dtype)
        if weights is None:
            _collected.pop(layer, None)
            return None
        _collected[layer] = weights
        verdict = None  # what the layer is made of now may compute something else
    if verdict is None:
        return _first_step(layer, by_itself, x, arguments, name, step, weights)
    return _run(layer, x, step, entry, weights)


def _run(layer: Any, x: Tensor, step: Step, entry: Any, weights: Weights) -> Tensor:
    room, length = _rooms.get(entry), step.positions - 1
    if room is None or entry.keys is not room.shown[0] or entry.values is not room.shown[1] or length >= room.capacity:
        room = _rooms[entry] = _move(entry, length)
    modules = layer._modules
    epsilon, scaling = modules["input_layernorm"].variance_epsilon, modules["self_attn"].scaling
    memory = room.keys, room.values, length
    y: Tensor = _op(x, *step.rotation, step.added, *memory, weights.tensors, weights.forms, epsilon, scaling)
    room.show(entry, length + 1)
    return y


def _first_step(
    layer: Any,
    by_itself: Callable[..., Any],
    x: Tensor,
    arguments: dict[str, Any],
    name: str,
    step: Step,
    weights: Weights,
) -> Tensor | None:
    """The step, after the layer's own forward on a copy of the cache has agreed with it; None where it does not."""
    index = layer._modules["self_attn"].layer_idx
    cache, twin = arguments[name], copy.copy(arguments[name])
    entry = cache.layers[index]
    before = entry.keys, entry.values
    twin.layers = list(cache.layers)
    twin.layers[index] = own = copy.copy(entry)
    expected = by_itself(layer, x, **(arguments | {name: twin}))
    try:
        y = _run(layer, x, step, entry, weights)
        problem = None if type(expected) is Tensor else f"the layer returns a {type(expected).__name__}"
        problem = problem or _difference(y, expected, x)
        problem = problem or _difference(entry.keys, own.keys) or _difference(entry.values, own.values)
    except RuntimeError as error:
        problem = str(error)
    _verdicts[layer] = problem is None
    if problem is None:
        return y
    entry.keys, entry.values = before
    _rooms.pop(entry, None)
    _tell_once(type(layer).__name__, problem)
    return None


def _difference(found: Tensor, expected: Tensor, base: Tensor | None = None) -> str | None:
    """What is wrong with ``found``, in words: more than rounding, beside what was added to ``base``."""
    if found.shape != expected.shape:
        return f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    limit = 1e-4 if found.dtype == torch.float32 else 3e-2
    error = float((found.float() - expected.float()).norm())
    size = float((expected.float() - (0 if base is None else base.float())).norm())
    rounding = 2 * torch.finfo(found.dtype).eps * float(expected.float().norm())
    broken = not expected.isfinite().all()  # the layer's own numbers; nothing can be told from them, and nothing is
    return None if broken or error <= limit * size + rounding else f"an error of {error:.3g} beside {size:.3g}"


@functools.cache
def _tell_once(kind: str, problem: str) -> None:
    reason = f"which computes something else: {problem}"
    if newer := native.newer_source():
        reason = f"since {native.LIBRARY} was built before {newer.name} changed and does not fit ({problem}): {native.REBUILD}"
    message = f"lorap's C++ step is not used in a {kind}, {reason}; its own forward runs"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _cached(cache: Any, attention: Any, x: Tensor) -> Any:
    """What ``cache`` holds of a layer, where it is the ordinary kind and has something of each sequence."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    index = attention.layer_idx
    entry = cache.layers[index] if index < len(cache.layers) else None
    if type(entry) is not DynamicLayer or not entry.is_initialized:
        return None
    keys, values = entry.keys, entry.values
    if type(keys) is not Tensor or type(values) is not Tensor or keys.dim() != 4 or keys.shape != values.shape:
        return None
    fits = keys.dtype == values.dtype == x.dtype and keys.is_cpu and values.is_cpu and keys.shape[0] == x.shape[0]
    return entry if fits and keys.shape[2] > 0 else None


def _shared(x: Tensor, arguments: dict[str, Any], keys: Tensor, attention: Any) -> Step | None:
    """What the layers of this step share: found out by the first of them; None where the op cannot run it."""
    rotation: Any = arguments.get("position_embeddings")
    mask: Any = arguments.get("attention_mask")
    sequences, positions = x.shape[0], keys.shape[2] + 1
    step: Step | None = getattr(_current, "step", None)
    same = step is not None and step.rotation is rotation and step.mask is mask and step.rotation[0].dtype is x.dtype
    if same and step.positions == positions and step.sequences == sequences:  # type: ignore[union-attr]
        return step
    _current.step = step = None
    if 0 < sequences <= MAX_SEQUENCES and not is_autocast(x) and forward_ad._current_level < 0:
        usual = attention.config._attn_implementation in ("sdpa", "eager")
        served = usual and dispatch.choose("linear", x, sequences) == "cpu"
        if served and _fits(rotation, mask, sequences, keys.shape[3], positions, x.dtype):
            _current.step = step = Step(rotation, mask, sequences, positions)
    return step


def _fits(rotation: Any, mask: Any, sequences: int, head_dim: int, positions: int, dtype: torch.dtype) -> bool:
    """Whether rotation (1 or sequences, 1, head_dim) and mask (1 or sequences, 1, 1, positions) are what the op takes."""
    if type(rotation) is not tuple or len(rotation) != 2:
        return False
    for one in rotation:
        fits = type(one) is Tensor and one.dtype == dtype and one.is_cpu
        if not fits or one.shape not in ((1, 1, head_dim), (sequences, 1, head_dim)) or one.shape != rotation[0].shape:
            return False
    if mask is None:
        return True
    known = type(mask) is Tensor and mask.is_cpu and (mask.dtype == torch.bool or mask.is_floating_point())
    return known and mask.shape in ((1, 1, 1, positions), (sequences, 1, 1, positions))


def _move(entry: Any, length: int) -> Room:
    """New memory with what the cache holds."""
    sequences, heads, _, head_dim = entry.keys.shape
    capacity = length + max(GROWTH, length // 2)
    keys = entry.keys.new_empty(sequences, heads, capacity, head_dim)
    values = entry.values.new_empty(sequences, heads, head_dim, capacity)
    keys[:, :, :length] = entry.keys
    values[..., :length] = entry.values.transpose(2, 3)
    return Room(keys, values)
