"""What a model consists of, from its config and the headers of its weight files: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorap.architectures import MLP, find_architecture, text_config
from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.gguf.reading import gguf_config
from lorap.checkpoint.load import DTYPES, ModelSource, dtype_name
from lorap.checkpoint.paging import main_dtype
from lorap.checkpoint.validate import empty_model
from lorap.compression.allocation import Shape
from lorap.compression.stored_bytes import DenseModel
from lorap.errors import ArchitectureError, CheckpointError
from lorap.evaluation.info import counted_name, gguf_tensors, kind_of, kinds_of
from lorap.nn.linear import model_numbers


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense model, whose decoder layers are mostly alike; where they are not, those of the largest, and :attr:`kinds`.

    Args:
        name: what to call the model.
        config: of transformers.
        dense: the same model as what its bytes depend on.
        dtype: in which it is computed and saved.
        num_layers: decoder layers.
        projections: (out_features, in_features) by role, of each expert where there are several.
        biases: roles that have one.
        experts: of each layer's FFN; 1 where it is one.
        experts_per_token: that one token is sent to at most.
        hidden_size, vocab_size: of the embedding.
        tied: the head is the embedding.
        params: parameters by kind; tied weights count once.
        stored_bytes: by kind, in the files.
        resident_params: outside of decoder layers, embedding and head, which stay in memory: vision, embeddings of single layers.
        own_inputs: numbers that all layers together read for a token besides hidden states.
        paged: whether weights can be left in the files until they are used, as in safetensors.
        mixture: whether its FFNs are mixtures of experts, be it of one.
        first: index of the first layer that is like this.
        kinds: the same model as if it had no other layers than those of one kind, with their number; empty where all are alike.
    """

    name: str
    config: Any
    dense: DenseModel
    dtype: str
    num_layers: int
    projections: Mapping[str, Shape]
    biases: frozenset[str]
    experts: int
    experts_per_token: int
    hidden_size: int
    vocab_size: int
    tied: bool
    params: Mapping[str, int]
    stored_bytes: Mapping[str, int]
    resident_params: int = 0
    own_inputs: int = 0
    paged: bool = True
    mixture: bool = False
    first: int = 0
    kinds: tuple[ModelShape, ...] = ()

    @classmethod
    def read(cls, source: ModelSource, *, dtype: str = "auto") -> ModelShape:
        """The shape of a local model.

        Raises:
            CheckpointError: the model is not local.
            ArchitectureError: the family is unknown, or a projection is missing, fused, quantized or already compressed.
            ConfigError: there is no such dtype.
        """
        wanted = DTYPES.get(dtype_name(dtype))
        if source.folder is None:
            raise CheckpointError(f"no model folder {source.location}; `plan` reads local folders and .gguf files only")
        if source.checked:
            config, tensors = source.checked.config, source.checked.headers
            wanted = wanted or getattr(config, "dtype", None) or main_dtype(source.checked.tensors)
        else:
            path = source.folder / str(source.gguf_file)
            config, tensors = gguf_config(read_gguf(path)), gguf_tensors(path)
            wanted = wanted or DTYPES["float32"]
        model = empty_model(config, wanted)
        architecture = find_architecture(model)
        dense = DenseModel.of(model, architecture)
        if not dense.shapes:
            raise ArchitectureError(f"{source.name} has no decoder layers")
        params, stored = Counter[str](), Counter[str]()
        resident, text = 0, text_config(config)
        for name, parameter in model_numbers(model):
            key = counted_name(name, architecture)
            elsewhere = key.startswith(f"{architecture.layers}.") or kind_of(key) in ("embed_tokens", "lm_head")
            resident += 0 if elsewhere else parameter.numel()
            for kind in kinds_of(key):
                params[kind] += parameter.numel() // len(kinds_of(key))
        for name, info in tensors.items():
            key = counted_name(name, architecture)
            for kind in kinds_of(key):
                stored[kind] += info.nbytes // len(kinds_of(key))
        vocab_size, hidden_size = model.get_input_embeddings().weight.shape
        whole = cls(
            name=source.name,
            config=config,
            dense=dense,
            dtype=str(model.dtype).removeprefix("torch."),
            num_layers=len(dense.shapes),
            projections=dense.shapes[0],
            biases=dense.biases[0],
            experts=dense.experts[0],
            experts_per_token=_most(text.num_experts_per_tok) if dense.packed else 1,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            tied=bool(config.tie_word_embeddings),
            params=params,
            stored_bytes=stored,
            resident_params=resident,
            own_inputs=len(dense.shapes) * getattr(text, architecture.own_inputs) if architecture.own_inputs else 0,
            paged=source.checked is not None,
        )
        kinds = tuple(_kinds(whole))
        largest = max(kinds, key=lambda kind: kind.layer_params)
        return replace(largest, num_layers=whole.num_layers, kinds=kinds if kinds[1:] else ())

    @property
    def of_each_kind(self) -> tuple[ModelShape, ...]:
        """:attr:`kinds`, or the model itself."""
        return self.kinds or (self,)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in ``dtype``."""
        return DTYPES[self.dtype].itemsize

    @property
    def width(self) -> int:
        """FFN channels, of each expert where there are several."""
        return self.projections["gate_proj"][0]

    def per_layer(self, role: str) -> int:
        """How many matrices of a role a layer has."""
        return self.experts if role in MLP else 1

    @property
    def layer_params(self) -> int:
        """Of one decoder layer's matrices."""
        return sum(self.per_layer(role) * out * inner for role, (out, inner) in self.projections.items())

    @property
    def head_params(self) -> int:
        """Of the head, which may be the embedding."""
        return self.hidden_size * self.vocab_size

    @property
    def computed_bytes(self) -> int:
        """Of the whole model in memory."""
        return sum(self.params.values()) * self.itemsize


def _most(asked: int | Sequence[int]) -> int:
    """A number of experts; some families have one for each layer."""
    return int(asked) if isinstance(asked, int) else max(asked)


def _kinds(whole: ModelShape) -> Iterator[ModelShape]:
    """The model by kinds of layers, in the order of their first ones."""
    dense = whole.dense
    layers = list(zip(dense.shapes, dense.biases, dense.experts, dense.mixtures, strict=True))
    for first in (index for index, layer in enumerate(layers) if layers.index(layer) == index):
        shapes, biases, experts, mixture = layers[first]
        yield replace(
            whole,
            num_layers=layers.count(layers[first]),
            projections=shapes,
            biases=biases,
            experts=experts,
            experts_per_token=whole.experts_per_token if mixture else 1,
            mixture=mixture,
            first=first,
        )
