"""Projections that a family stores as one matrix, split into the linear layers that lorap works on, and joined again.

A split module keeps its class's own forward: where that calls ``qkv_proj``, it finds a method that calls q, k and v and puts
their outputs side by side. So nothing of the class is written again, and names, low-rank layers and pruned widths are as
everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorap.errors import ArchitectureError

if TYPE_CHECKING:  # names alone take no torch
    from torch import Tensor, nn

# What is stored as one matrix, and the projections whose rows follow each other in it.
QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))
Fused = Mapping[str, tuple[str, tuple[str, ...]]]

# Where the class of a split module keeps the one that it was.
SPLIT = "split_from"


def split(layers: Iterable[nn.Module], fused: Fused) -> None:
    """Give the modules of decoder layers a linear layer for each projection; one that has them is left alone.

    Args:
        layers: with or without weights; changed.
        fused: path of a module in a layer, the name of its matrix, and the projections in that.
    """
    for layer in layers:
        for path, (name, parts) in fused.items():
            module = layer.get_submodule(path)
            if name in module._modules:
                _split(module, name, parts)


def join(layers: Iterable[nn.Module], fused: Fused) -> None:
    """What :func:`split` has split is as it was.

    Raises:
        ArchitectureError: a projection is no dense linear layer any more.
    """
    for layer in layers:
        for path, (name, parts) in fused.items():
            module = layer.get_submodule(path)
            if name in module._modules:
                continue
            if not hasattr(module, SPLIT):
                raise ArchitectureError(
                    f"{path} is a {type(module).__name__}, whose {' and '.join(parts)} cannot be joined into one {name}; "
                    "do that before optimize_for_inference"
                )
            _join(module, name, parts)


def row_ranges(out_features: Sequence[int]) -> list[tuple[int, int]]:
    """Where the rows of each projection begin and end in the matrix."""
    ends = [sum(out_features[: index + 1]) for index in range(len(out_features))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _split(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    whole: Any = module._modules.pop(name)
    for part, (begin, end) in zip(parts, row_ranges(_sizes(module, whole.out_features, parts)), strict=True):
        module.add_module(part, _linear(whole, [one[begin:end].clone() for one in _tensors(whole)]))
    stock: Any = type(module)
    module.__class__ = _split_class(stock, name, parts)


def _join(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    from torch import cat, nn

    linears: list[Any] = [module._modules[part] for part in parts]
    for part, linear in zip(parts, linears, strict=True):
        if (
            not isinstance(linear, nn.Linear)
            or linear.weight.is_meta
            or len(_tensors(linear)) != len(_tensors(linears[0]))
        ):
            raise ArchitectureError(
                f"{part} is a {type(linear).__name__}, which cannot be joined with {' and '.join(parts)} into one {name}"
            )
    whole = _linear(linears[0], [cat(tensors) for tensors in zip(*map(_tensors, linears), strict=True)])
    for part in parts:
        del module._modules[part]
    module.__class__ = getattr(module, SPLIT)  # first: the split class has a method of that name
    module.add_module(name, whole)


def _sizes(module: Any, rows: int, parts: tuple[str, ...]) -> list[int]:
    """Rows of each projection: q has what keys and values leave, gate and up are alike."""
    if parts != QKV[1]:
        return [rows // len(parts)] * len(parts)
    shared = module.num_key_value_heads * module.head_dim
    return [rows - 2 * shared, shared, shared]


def _tensors(linear: Any) -> list[Tensor]:
    return [linear.weight.data] + ([] if linear.bias is None else [linear.bias.data])


def _linear(like: Any, tensors: Sequence[Tensor]) -> nn.Linear:
    """A linear layer of these tensors, in the mode of another one."""
    from torch import nn

    rows, columns = tensors[0].shape
    linear = nn.Linear(columns, rows, bias=len(tensors) > 1, device="meta", dtype=tensors[0].dtype)
    for leaf, tensor in zip(("weight", "bias"), tensors, strict=False):
        setattr(linear, leaf, nn.Parameter(tensor, requires_grad=like.weight.requires_grad))
    return linear.train(like.training)


@functools.cache
def _split_class(stock: Any, name: str, parts: tuple[str, ...]) -> type:
    """The class ``stock`` with the matrix called ``name`` in ``parts``; its name stays, for who looks at names."""
    from torch import cat

    def whole(self: Any, x: Tensor) -> Tensor:
        return cat([getattr(self, part)(x) for part in parts], dim=-1)

    def reduce(self: Any, protocol: Any) -> Any:
        # By the name that it has, pickle would find the class ``stock``.
        return _restore, (stock, name, parts), self.__dict__

    told = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), {name: whole, SPLIT: stock, "__reduce_ex__": reduce, **told})


def _restore(stock: Any, name: str, parts: tuple[str, ...]) -> Any:
    """A split module without contents, for copy and pickle."""
    found: Any = _split_class(stock, name, parts)
    return found.__new__(found)
