"""``LowRankLinear``: what a compressed ``nn.Linear`` becomes.

The two factors are ordinary ``nn.Linear`` children, so that adapters and quantizers find them by name and type.
What a checkpoint holds of it is in :mod:`lorap.nn.low_rank_tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lorap.algorithms.factorization import factorize
from lorap.algorithms.pivoting import pivot
from lorap.kernels import reference
from lorap.nn import ops, padding, shape_checks
from lorap.nn.implementations import output_order
from lorap.nn.low_rank_tensors import GUARD_VALUE, LEFT, LEFT_BIAS, NAMED_GUARD, OUTPUT_BIAS, LowRankTensors
from lorap.nn.quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRankLinear(nn.Module):
    """y = x @ right.T @ left.T + bias, the drop-in for ``nn.Linear(in_features, out_features)``.

    Runs ``torch.ops.lorap.low_rank_linear``: one fused call where a kernel of ours is the fastest, two matmuls elsewhere.
    Adapters, quantizers, hooks and offloading work on the children ``right`` and ``left`` as on any ``nn.Linear``: as soon as
    one of them is no longer a plain one, the layer simply calls both. Where both are quantized (:mod:`lorap.nn.quantized`), that
    is one call, too.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        rank: inner size; the layer holds rank * (in_features + out_features) weights, rank^2 fewer when pivoted.
        bias: whether the layer adds a bias.
        device: where the parameters are created.
        dtype: of the parameters.
        pivoted: whether rank of the output rows are the outputs of ``right`` itself, see ``lorap.kernels.reference``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivoted: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        shapes = LowRankTensors(out_features, in_features, rank, bias, pivoted).shapes()
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, shapes[LEFT][0], bias=LEFT_BIAS in shapes, device=device, dtype=dtype)
        own = torch.zeros(out_features, device=device, dtype=dtype) if OUTPUT_BIAS in shapes else None
        self.output_bias: nn.Parameter | None
        self.register_parameter(OUTPUT_BIAS, None if own is None else nn.Parameter(own))
        self.weight: Tensor
        self.register_buffer("weight", torch.full((1,), GUARD_VALUE, device=device, dtype=dtype))
        self.register_buffer(NAMED_GUARD, self.weight.clone())
        self.pivot_rows: Tensor | None
        self.register_buffer("pivot_rows", torch.arange(rank, device=device) if pivoted else None)
        self.group: Any = None  # a lorap.nn.fused.SharedInput, when q, k and v run as one
        self.padded: tuple[Tensor, Tensor] | None = None  # see lorap.nn.padding

    @classmethod
    def empty(cls, tensors: LowRankTensors, *, device: torch.device | str, dtype: torch.dtype) -> LowRankLinear:
        """A layer for ``tensors``, whose values are still to come.

        Args:
            tensors: its sizes, and which tensors it has.
            device: for its parameters.
            dtype: of its parameters.
        """
        sizes = (tensors.in_features, tensors.out_features, tensors.rank)
        module = cls(*sizes, bias=tensors.bias, device=device, dtype=dtype, pivoted=tensors.pivoted)
        module.put_named_guard(tensors.guarded)
        return module

    @property
    def bias(self) -> Tensor | None:
        """(out_features,) or None."""
        inner: Tensor | None = getattr(self.left, "bias", None)  # an adapter in place of left may have none
        return inner if self.output_bias is None else self.output_bias

    @classmethod
    def from_factors(
        cls, left: Tensor, right: Tensor, bias: Tensor | None = None, pivot_rows: Tensor | None = None
    ) -> LowRankLinear:
        """Wrap two factors; the tensors are used, not copied.

        Args:
            left: (out_features, rank); with ``pivot_rows`` (out_features - rank, rank).
            right: (rank, in_features).
            bias: (out_features,) or None.
            pivot_rows: (rank,), ascending int64: the output rows that right gives itself; None for plain factors.

        Raises:
            ShapeError: the tensors do not fit together.
        """
        rank, in_features = right.shape
        out_features = shape_checks.low_rank_linear(right.new_empty(0, in_features), right, left, bias, pivot_rows)
        pivoted = pivot_rows is not None
        module = cls(in_features, out_features, rank, bias is not None, "meta", left.dtype, pivoted)
        module.left.weight = nn.Parameter(left)
        module.right.weight = nn.Parameter(right)
        if bias is not None:
            owner, name = (module, "output_bias") if pivoted else (module.left, "bias")
            setattr(owner, name, nn.Parameter(bias))
        module.weight = torch.full((1,), GUARD_VALUE, device=left.device, dtype=left.dtype)
        setattr(module, NAMED_GUARD, module.weight.clone())
        module.pivot_rows = pivot_rows
        return module

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, metric: Tensor | None = None, *, pivoted: bool = False
    ) -> LowRankLinear:
        """Factorize a dense layer.

        Args:
            linear: the dense layer, which stays as it is.
            rank: of the factors.
            metric: of the inputs, as in :func:`lorap.factorize`.
            pivoted: store rows and coefficients, see :func:`lorap.algorithms.pivoting.pivot`.

        Raises:
            FactorizationError: the rank is impossible, or an entry is NaN or infinite.
        """
        weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        if not pivoted:
            factors = factorize(weight, rank, metric)
            return cls.from_factors(factors.left, factors.right, bias)
        # In float64, so that only the rows and coefficients that are stored get rounded.
        exact = factorize(weight.double(), rank, metric)
        stored = pivot(exact.left, exact.right)
        return cls.from_factors(stored.left.to(weight.dtype), stored.right.to(weight.dtype), bias, stored.pivot_rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.group is not None:
            merged: Tensor | None = self.group.output(self, x)
            if merged is not None:
                return merged
        # Straight from the dictionaries: nn.Module's attribute access would take 6 us of a call, more than a small layer.
        right: Any = self._modules["right"]
        left: Any = self._modules["left"]
        if is_plain(right) and is_plain(left) and not is_autocast(x):
            bias = left._parameters["bias"]
            first, second = right._parameters["weight"], left._parameters["weight"]
            if self.padded is not None:
                first, second = padding.factors(self, first, second)
            bias = self._parameters["output_bias"] if bias is None else bias
            return ops.low_rank_linear(x, first, second, bias, self._buffers["pivot_rows"])
        packed = self._packed_factors(right, left)
        return self._forward_by_children(x) if packed is None else ops.quantized_low_rank_linear(x, *packed)

    def packed_arguments(self) -> tuple[Any, ...] | None:
        """What follows x in :func:`lorap.nn.ops.quantized_low_rank_linear`; None where calling this means something else."""
        return self._packed_factors(self.right, self.left) if is_untouched(self) else None

    def _packed_factors(self, right: Any, left: Any) -> tuple[Any, ...] | None:
        quantized = type(right) is type(left) is QuantizedLinear
        alike = quantized and (left.bits, left.group_size) == (right.bits, right.group_size)
        if not (alike and is_untouched(right) and is_untouched(left)):
            return None
        weights = (left.weight_packed, left.weight_scale, right.weight_packed, right.weight_scale)
        bias = self._parameters["output_bias"] if left.bias is None else left.bias
        return *weights, bias, left.bits, left.group_size, self._buffers["pivot_rows"]

    def _forward_by_children(self, x: Tensor) -> Tensor:
        shrunk = self.right(x)
        y: Tensor = self.left(shrunk)
        if self.pivot_rows is not None:
            y = torch.cat((shrunk, y), dim=-1)
            y = y.index_select(-1, output_order(self.pivot_rows, self.out_features))
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """right (rank, in_features) and left (out_features, rank); with zeros, and a larger rank, where they are padded."""
        right, left = self.right.weight, self.left.weight
        return (right, left) if self.padded is None else padding.factors(self, right, left)

    def put_named_guard(self, on: bool) -> None:
        """Have the guard whose name says what is missing in the state dict, or not."""
        if on != (self._buffers[NAMED_GUARD] is not None):
            setattr(self, NAMED_GUARD, self.weight.clone() if on else None)

    def reconstruct(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out_features, in_features) that this layer stands for, in ``dtype`` or that of the factors."""
        right, left = weight_of(self.right, dtype), weight_of(self.left, dtype)
        if self.pivot_rows is None:
            return left @ right
        rows = torch.cat((right, left @ right))
        return rows[reference.output_order(self.pivot_rows, self.out_features)]

    def extra_repr(self) -> str:
        """Sizes, and how adapters find the two halves."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        pivoted = ", pivoted=True" if self.pivot_rows is not None else ""
        # PEFT shows this where it is pointed at the layer and not at its two halves.
        return (
            f"{sizes}, bias={self.bias is not None}{pivoted}, adapters: target_modules='all-linear', or right and left"
        )


class Linear(nn.Linear):
    """``nn.Linear`` through ``torch.ops.lorap.linear``: the same parameters, faster for few tokens on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group: Any = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Linear:
        """Take over the parameters of ``linear``; nothing is copied."""
        module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.training = linear.training
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.group is not None:
            merged: Tensor | None = self.group.output(self, x)
            if merged is not None:
                return merged
        own = self._parameters
        weight: Any = own.get("weight")
        # Parametrized and masked weights and biases are no parameters but computed by each call.
        if is_autocast(x) or type(weight) is not nn.Parameter or "bias" not in own:
            return super().forward(x)
        return ops.linear(x, weight, own["bias"])


def keep_outputs(linear: nn.Linear, channels: Tensor) -> nn.Linear:
    """``linear`` with only the given output channels."""
    bias = None if linear.bias is None else linear.bias.data[channels]
    return new_linear(linear.weight.data[channels], bias)


def new_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around the given tensors, which are used, not copied."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


def is_plain(linear: Any) -> bool:
    """True where calling ``linear`` means no more than x @ weight.T + bias: no adapter, quantizer, hook or offloading."""
    return type(linear) is nn.Linear and is_untouched(linear) and type(linear._parameters["weight"]) is nn.Parameter


def has_plain_factors(layer: LowRankLinear) -> bool:
    """True where calling ``layer`` means no more than its two matmuls."""
    return is_untouched(layer) and is_plain(layer.right) and is_plain(layer.left)


def is_untouched(module: nn.Module) -> bool:
    """True where calling ``module`` runs its class's forward and nothing else: no hook, no replaced forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks or has_global_hooks()
    return not hooked and "forward" not in module.__dict__


def has_global_hooks() -> bool:
    """Whether every call of every module means more than its forward (``torch.nn.modules.module.register_module_*_hook``)."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def is_autocast(x: Tensor) -> bool:
    """True where torch would choose another dtype for a linear layer on x."""
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """(vocabulary, hidden_size): what token ids are looked up in. It may have more rows than the tokenizer has tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def weight_of(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (out_features, in_features) of a linear layer, quantized or not, in ``dtype`` or its own."""
    if isinstance(linear, QuantizedLinear):
        return linear.dequantize(dtype)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight if dtype is None else weight.to(dtype)


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, quantized ones included; tied ones count once, as they are saved once."""
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(tensor.numel() for _, tensor in model_numbers(model)) + sum(
        linear.out_features * linear.in_features for linear in packed
    )


def model_numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, and buffers of transformers' own modules that a file holds as it holds those; tied ones come once.

    Such a buffer is the bias by which routers choose experts, which training moves without a gradient. One of a single number
    would count as a guard where it is stored, so it counts as none here.
    """
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if type(module).__module__.startswith("lorap."):
            continue
        for name, buffer in module._buffers.items():
            stored = buffer is not None and name not in module._non_persistent_buffers_set
            if stored and buffer.is_floating_point() and buffer.shape != (1,):  # type: ignore[union-attr]
                yield f"{path}.{name}", buffer  # type: ignore[misc]
