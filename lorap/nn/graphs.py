"""Calls in CUDA graphs: which of them Triton kernels get, and how these are prepared before a capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lorap.kernels import cost
from lorap.nn.cuda_limits import is_aligned
from lorap.nn.implementations import FEW_BITS_OPS, LINEAR_OPS, PIVOTED_OPS, tokens_of

# Whose kernels are so short that they pay in a graph only.
OPS = tuple(op for op in LINEAR_OPS if op != "linear")

# Calls whose Triton kernels are compiled and loaded, so that a graph capture can use them.
_warm: set[tuple[Any, ...]] = set()
_warming: ContextVar[bool] = ContextVar("lorap_warming", default=False)


@contextmanager
def warming() -> Iterator[None]:
    """Inside, calls that a CUDA graph would leave to a Triton kernel run it, and may be captured afterwards.

    After an error none of the calls inside counts as warm.
    """
    token, before = _warming.set(True), set(_warm)
    try:
        yield
    except Exception:
        _warm.intersection_update(before)
        raise
    finally:
        _warming.reset(token)


def wanted() -> bool:
    """Whether the kernels of ``OPS`` may run here: a CUDA graph is captured, or they are being prepared for one.

    Launching a Triton kernel from Python takes 15 us and more, two cuBLAS calls about 10, and these kernels save 1 to 5: they win
    inside a graph only (torch.compile with reduce-overhead, vLLM). Outside of one torch computes, in the first call as in all.
    """
    return _warming.get() or torch.cuda.is_current_stream_capturing()


def left_to_torch(op: str, x: Tensor, *rest: Any) -> bool:
    """Whether a Triton kernel that serves ``op`` should leave this call to torch.

    A capture cannot compile: it takes the kernels of calls that :func:`lorap.warm_up` has seen, on tensors that are aligned as
    there, where ``lorap.kernels.cost`` has them faster than torch. Weights of few bits are left to torch in captures
    alone, where no such call came before.

    Args:
        op: one of ``lorap.nn.implementations.OPS``.
        x: its first argument, on a GPU.
        rest: its other arguments.
    """
    always = op in FEW_BITS_OPS  # torch would unpack the matrix first
    if op not in OPS and not always:
        return False
    if not always and (not wanted() or not x.is_contiguous()):
        return True
    leaves = tree_flatten(rest)[0]
    others = [tensor for tensor in leaves if isinstance(tensor, Tensor)]
    sizes = tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    key = (op, x.device, x.dtype, tokens_of(x), sizes)
    aligned = all(map(is_aligned, (x, *others)))
    if torch.cuda.is_current_stream_capturing():
        return not aligned or key not in _warm
    if not always and not (aligned and worth(op, x, rest)):
        return True
    if aligned:
        _warm.add(key)
    return False


def worth(op: str, x: Tensor, rest: tuple[Any, ...]) -> bool:
    """Whether the kernels are modelled to be faster than torch here; arguments as for :func:`left_to_torch`."""
    first, second, *_ = ([one] if isinstance(one, Tensor) else one for one in rest if one is not None)
    ranks = () if op == "silu_gated_linear" else tuple(len(right) for right in first)
    rows = (len(first[0]), len(second[0])) if op == "silu_gated_linear" else tuple(len(left) for left in second)
    pivots = rest[3] if op in PIVOTED_OPS and len(rest) > 3 and rest[3] is not None else ()
    counts = tuple(map(len, [pivots] if isinstance(pivots, Tensor) else pivots))
    return cost.worth(op, tokens_of(x), x.shape[-1], ranks, rows, counts or (0,) * len(rows))
