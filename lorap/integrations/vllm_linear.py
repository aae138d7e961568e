"""One linear layer of vLLM that holds projections of a compressed checkpoint: q, k and v; gate and up; or one alone.

Each projection keeps its own factors (:mod:`lorap.integrations.vllm_projection`), because ranks differ and some projections stay
dense. They are loaded by the names in the checkpoint and run by ``torch.ops.lorap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, ReplicatedLinear, RowParallelLinear

from lorap.checkpoint.format import LoRAPConfig
from lorap.errors import CheckpointError
from lorap.integrations.vllm_packed import PackedProjection, merge_dense
from lorap.integrations.vllm_projection import Projection, Share, frozen
from lorap.nn import ops
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import LowRankTensors
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import layer_of
from lorap.nn.warming import warm

# vLLM's names of the parts of a fused attention layer; those of a fused FFN are numbers already.
SHARD_NUMBERS = {"q": 0, "k": 1, "v": 2}
# Numbers of tokens for which vLLM captures CUDA graphs, as far as kernels of ours may serve them.
GRAPH_TOKENS = (1, 2, 4, 8, 16, 24, 32)


class LoRAPLinearMethod(LinearMethodBase):
    """Creates, loads and runs the weights of one vLLM layer.

    Args:
        checkpoint: ``quantization_config`` of config.json.
        names: the projections that the layer holds, in the order of its outputs.
    """

    def __init__(self, checkpoint: LoRAPConfig, names: Sequence[str]) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.dense: Tensor | None = None  # all projections as one matrix, where all are dense
        self.factors: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])  # right, left, pivot rows

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Empty tensors in the shapes that config.json gives, which are not always those that vLLM expects."""
        if len(output_partition_sizes) != len(self.names):
            raise CheckpointError(f"vLLM's layer has {len(output_partition_sizes)} outputs, the model {self.names}")
        pivoted = self.checkpoint.storage == "pivoted"
        layer.projections = nn.ModuleList()
        for index, name in enumerate(self.names):
            rows, columns = (
                self._rows(layer, index, output_partition_sizes[index]),
                self._columns(layer, name, input_size),
            )
            rank = self.checkpoint.ranks.get(name)
            if rank is not None:
                LowRankTensors(rows.size, columns.size, rank).check_rank(name)
            bias = layer.has_bias or name in self.checkpoint.biases
            layer.projections.append(self._projection(name, rank, pivoted, rows, columns, bias, params_dtype))
        layer.load_weights = partial(self._load, layer)  # vLLM asks a module for it before it looks for parameters

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and lay it out for :meth:`apply`.

        Raises:
            CheckpointError: a tensor is missing or cannot be used.
        """
        config = get_current_vllm_config_or_none()
        parts = list(layer.projections)
        for part in parts:
            if config is not None and config.load_config.load_format == "dummy":
                part.missing.clear()
            part.finish()
        biases = [part.bias for part in parts]
        if (some := next((bias for bias in biases if bias is not None), None)) is not None:
            lengths = [part.rows.length for part in parts]
            all_biases = [some.new_zeros(n) if bias is None else bias for n, bias in zip(lengths, biases, strict=True)]
            layer.bias = frozen(torch.cat(all_biases))
        self._lay_out(layer, parts)

    def _projection(self, *arguments: Any) -> nn.Module:
        return Projection(*arguments)

    def _lay_out(self, layer: Any, parts: list[Any]) -> None:
        if all(part.rank is None for part in parts):
            self.dense = parts[0].right if len(parts) == 1 else frozen(torch.cat([part.right for part in parts]))
            lengths = [part.rows.length for part in parts]
            for part, rows in zip(parts, self.dense.split(lengths), strict=True):
                part.right.data = rows
            return
        # In a group a dense projection is a pivoted one whose every row is a pivot.
        none = parts[0].right.new_empty(0)
        for part in parts:
            right, left, pivot_rows = part.right, part.left, part.pivot_rows
            if part.rank is None:
                left, pivot_rows = right.new_empty(0, right.shape[0]), torch.arange(right.shape[0], device=right.device)
            for found, tensor in zip(
                self.factors, (right, left, none if pivot_rows is None else pivot_rows), strict=True
            ):
                found.append(tensor)
        if not any(rows.numel() for rows in self.factors[2]):
            self.factors[2].clear()
        if right.is_cuda:
            for tokens in GRAPH_TOKENS:
                warm(
                    lambda x: self.apply(layer, x, getattr(layer, "bias", None)),
                    right.new_zeros(tokens, right.shape[1]),
                )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(tokens, input of this worker) to (tokens, outputs of this worker side by side)."""
        if self.dense is not None:
            return ops.linear(x, self.dense, bias)
        right, left, pivot_rows = self.factors
        if len(right) == 1:
            return ops.low_rank_linear(x, right[0], left[0], bias, pivot_rows[0] if pivot_rows else None)
        if (run := ops.served("low_rank_linear_group", x)) is not None:
            biases = [] if bias is None else list(bias.split([part.rows.length for part in layer.projections]))
            return run(x, right, left, biases, pivot_rows)
        y = torch.cat([part(x) for part in layer.projections], dim=-1)
        return y if bias is None else y + bias

    def _load(self, layer: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for key, tensor in weights:
            shard = getattr(tensor, "shard_id", None)  # vLLM's note on which part of a fused layer this is
            if shard is None and len(self.names) > 1:
                raise CheckpointError(
                    f"{key} of {' and '.join(self.names)} is fused in the checkpoint; lorap writes them apart"
                )
            index = SHARD_NUMBERS.get(shard, shard) if shard is not None else 0
            yield f"projections.{index}.{layer.projections[index].load(key, tensor)}"

    def _rows(self, layer: Any, index: int, length: int) -> Share:
        if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
            return Share(0, length, length)
        # With more workers than key heads, several hold the same ones.
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
        parts = layer.tp_size // copies
        parent, _, role = self.names[index].rpartition(".")
        width = self.checkpoint.intermediate_sizes.get(parent) if role in ("gate_proj", "up_proj") else None
        return Share.of(width or length * parts, layer.tp_rank // copies, parts)

    def _columns(self, layer: Any, name: str, input_size: int) -> Share:
        if not isinstance(layer, RowParallelLinear):
            return Share(0, input_size, input_size)
        parent, _, role = name.rpartition(".")
        width = self.checkpoint.intermediate_sizes.get(parent) if role == "down_proj" else None
        return Share.of(width or input_size, layer.tp_rank, layer.tp_size)


class PackedLinearMethod(LoRAPLinearMethod):
    """The same of weights in few bits, on one worker."""

    def __init__(self, checkpoint: LoRAPConfig, names: Sequence[str]) -> None:
        super().__init__(checkpoint, names)
        self.layers: list[QuantizedLinear | LowRankLinear] = []

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(tokens, input) to (tokens, outputs side by side)."""
        first, *others = self.layers
        if not others and isinstance(first, QuantizedLinear):
            return first.product(x, bias)
        y: Tensor = torch.cat([one(x) for one in self.layers], dim=-1) if others else first(x)
        return y if bias is None else y + bias

    def _projection(self, name: str, *arguments: Any) -> nn.Module:
        coding = self.checkpoint.coding
        # Without one it is int8 with one scale a row.
        how: Any = {"kind": layer_of(coding), "bits": self.checkpoint.bits_of(name)} if coding else {"bits": 8}
        return PackedProjection(name, *arguments, **how, group_size=self.checkpoint.group_size)

    def _lay_out(self, layer: Any, parts: list[Any]) -> None:
        self.layers = merge_dense(parts)
