"""MoDeGPT (arXiv 2408.09632): pairs of matrices lose inner dimensions together, such that the output of the pair changes least.

With C the sum of x x^T over the tokens that a pair reads, of each decoder layer:

- up, gate and down (Nystrom): channels of the highest ridge leverage ``diag(C (C + r I)^-1)`` stay, C being that of the inner
  activations, and down becomes ``down C[:, S] C[S, S]^-1``.
- query and key (CR): of each head the dimensions i of the highest ``sqrt(C_q[i, i] C_k[i, i])``, C_q and C_k being those of
  queries and keys. Two dimensions that rotary embeddings turn stay or go together, by the products of their energies, which no
  rotation changes; heads that share a key add theirs.
- value and output (SVD): of each head the best rank-k stand-in for ``C^(1/2) V^T O^T``; heads that share a value side by side.

All three keep the same share in a layer. Layers get theirs from their block influence s, one minus the cosine between what enters
and what leaves them: sparsities are L phi softmax(-s / epsilon), of which none is above ``MOST``. Statistics are taken behind the
compressed layers before, as lorap takes them. What the ranks' roundings leave goes to the FFN's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.calibration.context import DecoderContext
from lorap.calibration.stream import CalibrationStream, Probe, run_layer
from lorap.calibration.windows import TokenWindows
from lorap.errors import ConfigError
from lorap.nn.linear import keep_outputs, new_linear

MOST = 0.8


@dataclass(frozen=True, kw_only=True)
class MoDeGPT:
    """Options of one compression.

    Args:
        sparsity: of the parameters of the decoder layers' projections.
        epsilon: how evenly layers share it; 0 gives all of them the same.
        ridge: of the leverage, for C summed over tokens.
    """

    sparsity: float
    epsilon: float = 0.1
    ridge: float = 1.0

    @torch.no_grad()
    def compress(self, context: DecoderContext, windows: TokenWindows) -> int:
        """Change the model of ``context``; returns how many parameters its decoder layers' projections would be saved in.

        Attention keeps its shapes in memory, with zeros where a head lost dimensions.
        """
        sparsities = [self.sparsity] * len(context.layers)
        if self.epsilon:
            influences = block_influences(context, CalibrationStream.from_windows(context, windows))
            sparsities = shared_out(influences, self.sparsity, self.epsilon)
        stream, saved = CalibrationStream.from_windows(context, windows), 0
        for index, (layer, sparsity) in enumerate(zip(context.layers, sparsities, strict=True)):
            saved += self._compress_layer(index, layer, stream, 1 - sparsity)
            stream.advance(index, layer)
        return saved

    def _compress_layer(self, index: int, layer: Any, stream: CalibrationStream, kept: float) -> int:
        attention, mlp = layer.self_attn, layer.mlp
        probes = {"x": Probe(attention.q_proj, moments=True), "inner": Probe(mlp.down_proj, moments=True)}
        sums = {name: folds[0].outer.double() for name, (*folds,) in stream.observe(index, layer, probes).items()}
        size = attention.head_dim
        heads, keys = (linear.out_features // size for linear in (attention.q_proj, attention.k_proj))
        pairs, rank = max(1, round(kept * size / 2)), max(1, round(kept * size))
        keep_pairs(attention.q_proj, attention.k_proj, sums["x"], size, pairs)
        share_values(attention.v_proj, attention.o_proj, sums["x"], size, rank)
        hidden, width = mlp.down_proj.weight.shape
        saved = (heads + keys) * hidden * (2 * pairs + rank)
        budget = int(kept * ((heads + keys) * 2 * size + 3 * width) * hidden)
        narrower = min(width, max(1, (budget - saved) // (3 * hidden)))
        prune_ffn(mlp, sums["inner"], narrower, self.ridge)
        return saved + 3 * hidden * narrower


def shared_out(influences: Sequence[float], sparsity: float, epsilon: float) -> list[float]:
    """Sparsities of layers, of mean ``sparsity``: L phi softmax(-s / epsilon); what is above ``MOST`` goes to the others.

    Raises:
        ConfigError: all layers at ``MOST`` are not enough.
    """
    if sparsity > MOST:
        raise ConfigError(
            f"sparsity {sparsity:g} is more than the {MOST:g} that every layer may give at most; use epsilon=0"
        )
    scores = (-torch.tensor(influences, dtype=torch.float64) / epsilon).softmax(0)
    found, free = torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)
    while True:
        left = sparsity * len(scores) - MOST * int((~free).sum())
        found = torch.where(free, left * scores / scores[free].sum(), MOST)
        if not bool((found > MOST).any()):
            return [float(one) for one in found]
        free &= found < MOST


def block_influences(context: DecoderContext, stream: CalibrationStream) -> list[float]:
    """Of each dense layer: one minus the mean cosine between a token's hidden state before it and behind it."""
    influences = []
    for index, layer in enumerate(context.layers):
        cosines = []
        for batch in stream.batches:
            before = batch.hidden
            batch.hidden = run_layer(layer, before, batch, index)
            cosine = torch.cosine_similarity(before, batch.hidden, dim=-1)
            cosines.append(cosine.flatten() if batch.mask is None else cosine[batch.mask])
        influences.append(1 - float(torch.cat(cosines).double().mean()))
    return influences


def keep_pairs(query: nn.Linear, key: nn.Linear, sums: Tensor, size: int, pairs: int) -> None:
    """All but the best rotary pairs of each key's heads become 0.

    Args:
        query, key: (heads size, hidden) and (keys size, hidden); heads of one key stand together.
        sums: C (hidden, hidden) of what both read.
        size: of a head, whose dimensions i and i + size / 2 are a pair.
        pairs: that stay, of size / 2.
    """
    energies = []
    for linear in (query, key):
        assert linear.bias is None, "queries and keys with biases are not covered"
        weight = linear.weight.data.double()
        energies.append(((weight @ sums) * weight).sum(1).view(-1, 2, size // 2).sum(1))
    queries, keys = energies
    group = len(queries) // len(keys)
    scores = (queries.view(len(keys), group, -1) * keys[:, None]).sum(1)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(pairs).indices, value=True)
    of_keys = kept[:, None].expand(-1, 2, -1)  # both halves of a pair
    key.weight.data *= of_keys.reshape(-1, 1)
    query.weight.data *= of_keys.repeat_interleave(group, 0).reshape(-1, 1)


def share_values(value: nn.Linear, output: nn.Linear, sums: Tensor, size: int, rank: int) -> None:
    """Of each value's head only the first ``rank`` rows are not 0, nor the columns of the outputs that read them.

    Args:
        value: (values size, hidden).
        output: (hidden, heads size); heads of one value stand together.
        sums: C (hidden, hidden) of what values are made of.
        size: of a head.
        rank: that stays, of ``size``.
    """
    spectrum, vectors = torch.linalg.eigh(sums)
    roots = spectrum.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-7 * roots[-1], 1 / roots, 0)
    values = value.weight.data.double().view(-1, size, value.in_features)
    outputs = output.weight.data.double().view(len(output.weight), len(values), -1, size)
    assert value.bias is None, "values with biases are not covered"
    for head, v in enumerate(values):
        o = outputs[:, head].reshape(-1, size)  # (hidden group, size)
        u, s, vh = torch.linalg.svd((vectors * roots).T @ v.T, full_matrices=False)
        left, strength, right = torch.linalg.svd((s[:, None] * vh) @ o.T, full_matrices=False)
        balance = strength[:rank].sqrt()
        new_v = torch.zeros_like(v)
        new_v[:rank] = ((vectors * inverse) @ u @ left[:, :rank] * balance).T
        new_o = torch.zeros_like(o)
        new_o[:, :rank] = (balance[:, None] * right[:rank]).T
        value.weight.data.view_as(values)[head] = new_v.to(value.weight.dtype)
        output.weight.data.view_as(outputs)[:, head] = new_o.view_as(outputs[:, head]).to(output.weight.dtype)


def prune_ffn(mlp: Any, sums: Tensor, width: int, ridge: float) -> None:
    """The channels of highest leverage stay, and down reads them as if all were there.

    Args:
        mlp: with gate, up and down.
        sums: C (intermediate, intermediate) of the inner activations.
        width: how many stay.
        ridge: of the leverage.
    """
    identity = torch.eye(len(sums), dtype=sums.dtype)
    leverage = 1 - ridge * torch.cholesky_inverse(torch.linalg.cholesky(sums + ridge * identity)).diagonal()
    kept = leverage.topk(width).indices.sort().values
    down = mlp.down_proj
    inner = sums[kept][:, kept]
    inner.diagonal().add_(1e-9 * sums.diagonal().mean())
    refitted = torch.cholesky_solve(sums[kept] @ down.weight.data.double().T, torch.linalg.cholesky(inner)).T
    mlp.gate_proj, mlp.up_proj = keep_outputs(mlp.gate_proj, kept), keep_outputs(mlp.up_proj, kept)
    mlp.down_proj = new_linear(refitted.to(down.weight.dtype), down.bias)
