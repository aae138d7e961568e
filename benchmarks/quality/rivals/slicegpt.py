"""SliceGPT (arXiv 2401.15024): the residual stream is rotated onto its principal components, and the last of them are left out.

The norm's weights go into the matrices that read it, after which a norm commutes with rotations. Each block (attention, FFN) gets
the rotation of the signal that it reads, the output of its norm, behind the sliced blocks before it; between two rotations the
residual passes through a matrix of its own. Every block keeps the same number of components.

Embeddings are left as they are: where they are tied to the head, as in small models, two sliced copies would be larger than one
whole. Instead two more matrices rotate what is looked up and what the head reads. These and those of the residual count as
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows
from lorap.errors import ConfigError
from lorap.nn.linear import new_linear


@dataclass(frozen=True, kw_only=True)
class SliceGPT:
    """Options of one compression.

    Args:
        sparsity: of the parameters of the decoder layers' projections, what is added for rotations counted in.
        kept: components; None for as many as the sparsity leaves.
    """

    sparsity: float
    kept: int | None = None

    @torch.no_grad()
    def compress(self, context: DecoderContext, windows: TokenWindows) -> int:
        """Change the model of ``context``; returns how many parameters its decoder layers' projections have now."""
        size = context.model.get_input_embeddings().weight.shape[1]
        kept = self.kept or self._components(context, size)
        stream = CalibrationStream.from_windows(context, windows)
        basis = components(stream, context.model.model.norm.variance_epsilon, kept)
        context.model.model.embed_tokens = RotatedEmbedding(context.model.get_input_embeddings(), basis)
        for batch in stream.batches:
            batch.hidden = batch.hidden @ basis.to(batch.hidden.dtype)
        layers = context.model.model.layers
        for index, layer in enumerate(context.layers):
            layers[index], basis = sliced(layer, stream, basis, index)
        head, norm = context.model.lm_head, context.model.model.norm
        context.model.lm_head = RotatedHead(head, norm.weight.data[:, None] * basis.to(norm.weight))
        context.model.model.norm = Norm(size, norm.variance_epsilon)
        matrices = (one for layer in layers for one in layer.parameters() if one.ndim == 2)  # biases are not compressed
        return sum(one.numel() for one in matrices) + 2 * size * kept

    def _components(self, context: DecoderContext, size: int) -> int:
        """The most that the sparsity leaves room for."""
        shapes = [shape for layer in context.layers for shape in context.architecture.shapes(layer).values()]
        dense = sum(out * inner for out, inner in shapes)
        # Of each matrix the side that is the residual stream is sliced, and each block has a matrix for the residual.
        per_component, blocks = dense // size + 2 * size, 2 * len(context.layers)
        fits = [k for k in range(1, size + 1) if k * per_component + blocks * k * k <= (1 - self.sparsity) * dense]
        if not fits:
            raise ConfigError(f"sparsity {self.sparsity:g} leaves less than one component; use a lower one")
        return fits[-1]


class Norm(nn.Module):
    """RMSNorm without weights, of what is left of ``size`` components.

    Args:
        size: the components that the mean is taken over.
        epsilon: of the model's own norms.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.size, self.epsilon = size, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.size + self.epsilon)


class RotatedEmbedding(nn.Embedding):
    """(tokens, kept): an embedding times a rotation."""

    def __init__(self, embedding: nn.Module, basis: Tensor) -> None:
        super().__init__(*embedding.weight.shape, _weight=embedding.weight.data)
        self.weight = embedding.weight  # the head may share it
        self.rotation = nn.Parameter(basis.to(embedding.weight.dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ self.rotation


class RotatedHead(nn.Module):
    """Logits of what is rotated back, (..., kept) to (..., vocab_size)."""

    def __init__(self, head: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.head = head
        self.rotation = nn.Parameter(rotation, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.rotation.T)


class SlicedLayer(nn.Module):
    """A decoder layer between its two rotations.

    Args:
        layer: whose attention and FFN read and write sliced streams already.
        norm: of both blocks.
        attention_shortcut, ffn_shortcut: (kept, kept), from the rotation of a block to that of the next.
    """

    def __init__(self, layer: Any, norm: Norm, attention_shortcut: Tensor, ffn_shortcut: Tensor) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, norm
        self.attention_type = getattr(layer, "attention_type", "full_attention")
        self.attention_shortcut = nn.Parameter(attention_shortcut, requires_grad=False)
        self.ffn_shortcut = nn.Parameter(ffn_shortcut, requires_grad=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = block_output(self.self_attn, self.norm(hidden_states), kwargs)
        between = hidden_states @ self.attention_shortcut + attended
        return between @ self.ffn_shortcut + self.mlp(self.norm(between))


@torch.no_grad()
def components(stream: CalibrationStream, epsilon: float, kept: int) -> Tensor:
    """(size, kept) float64: principal directions of the normed hidden states, strongest first."""
    size = stream.batches[0].hidden.shape[-1]
    norm, moment = Norm(size, epsilon), torch.zeros(size, size, dtype=torch.float64)
    for batch in stream.batches:
        x = norm(batch.hidden.double())
        x = x.flatten(0, -2) if batch.mask is None else x[batch.mask]
        moment += x.T @ x
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :kept]


@torch.no_grad()
def sliced(layer: Any, stream: CalibrationStream, basis: Tensor, index: int) -> tuple[SlicedLayer, Tensor]:
    """A layer in the rotation of its inputs, and the rotation of its outputs; the stream goes through it.

    Args:
        layer: of the dense model.
        stream: sliced hidden states before it, (..., kept).
        basis: B (size, kept), their rotation.
        index: of the layer.
    """
    norm = Norm(len(basis), layer.input_layernorm.variance_epsilon)
    _read_rotated(layer.self_attn, ("q_proj", "k_proj", "v_proj"), layer.input_layernorm.weight, basis)
    between = _through(layer.self_attn, stream, norm, basis, index)
    _write_rotated(layer.self_attn, "o_proj", between)
    _read_rotated(layer.mlp, ("gate_proj", "up_proj"), layer.post_attention_layernorm.weight, between)
    last = _through(layer.mlp, stream, norm, between, index)
    _write_rotated(layer.mlp, "down_proj", last)
    dtype = layer.mlp.down_proj.weight.dtype
    return SlicedLayer(layer, norm, (basis.T @ between).to(dtype), (between.T @ last).to(dtype)), last


def _read_rotated(block: nn.Module, roles: tuple[str, ...], gains: Tensor, basis: Tensor) -> None:
    """W diag(g) B in place of W, where the normed stream is read."""
    for role in roles:
        linear = getattr(block, role)
        weight = (linear.weight.data.double() * gains.data.double()) @ basis
        setattr(block, role, new_linear(weight.to(linear.weight.dtype), linear.bias))


def _write_rotated(block: nn.Module, role: str, basis: Tensor) -> None:
    """B^T W in place of W, where the stream is added to."""
    linear = getattr(block, role)
    weight, bias = basis.T @ linear.weight.data.double(), linear.bias
    bias = None if bias is None else (basis.T @ bias.data.double()).to(bias.dtype)
    setattr(block, role, new_linear(weight.to(linear.weight.dtype), bias))


def _through(block: nn.Module, stream: CalibrationStream, norm: Norm, basis: Tensor, index: int) -> Tensor:
    """Send the stream through a block, in all components again; returns those that stay, (size, kept)."""
    for batch in stream.batches:
        out = block_output(block, norm(batch.hidden), batch.layer_kwargs[index])
        batch.hidden = batch.hidden @ basis.T.to(out.dtype) + out
    found = components(stream, norm.epsilon, basis.shape[1])
    for batch in stream.batches:
        batch.hidden = batch.hidden @ found.to(batch.hidden.dtype)
    return found


def block_output(block: nn.Module, x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Of an FFN, or of attention, which wants what a layer is called with."""
    return block(x) if hasattr(block, "down_proj") else block(hidden_states=x, **given)[0]
