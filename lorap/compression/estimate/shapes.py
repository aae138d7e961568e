"""What a model consists of, from its config and the headers of its weight files: no weight is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorap.architectures import ARCHITECTURES, PROJECTIONS
from lorap.checkpoint.folders import TensorInfo
from lorap.checkpoint.gguf.header import read_gguf
from lorap.checkpoint.gguf.reading import gguf_config
from lorap.checkpoint.load import DTYPES, ModelSource, dtype_name
from lorap.compression.allocation import Shape
from lorap.errors import ArchitectureError, CheckpointError
from lorap.evaluation.info import gguf_tensors, kind_of

# safetensors' names for what a model can be computed in.
HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Where llama.cpp keeps its decoder layers.
GGUF_LAYERS = "blk"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense model whose decoder layers are all alike, as those of every supported family are.

    Args:
        name: what to call the model.
        model_type: as ``config.json`` has it.
        dtype: in which it is computed and saved.
        num_layers: decoder layers.
        projections: (out_features, in_features) by role.
        biases: roles that have one.
        hidden_size, vocab_size: of the embedding.
        tied: the head is the embedding.
        params: parameters by kind; tied weights count once.
        stored_bytes: by kind, in the files.
        paged: whether weights can be left in the files until they are used, as in safetensors.
    """

    name: str
    model_type: str
    dtype: str
    num_layers: int
    projections: Mapping[str, Shape]
    biases: frozenset[str]
    hidden_size: int
    vocab_size: int
    tied: bool
    params: Mapping[str, int]
    stored_bytes: Mapping[str, int]
    paged: bool = True

    @classmethod
    def read(cls, source: ModelSource, *, dtype: str = "auto") -> ModelShape:
        """The shape of a local model.

        Raises:
            CheckpointError: the model is not local, or its files are damaged.
            ArchitectureError: the family is unknown, or a projection is missing, fused, quantized or already compressed.
            ConfigError: there is no such dtype.
        """
        if source.folder is None:
            raise CheckpointError(f"no model folder {source.location}; `plan` reads local folders and .gguf files only")
        if source.checked:
            config = {**source.checked.settings, "tie_word_embeddings": source.checked.config.tie_word_embeddings}
            return cls.from_tensors(source.name, config, source.checked.headers, dtype=dtype)
        assert source.gguf_file is not None
        path = source.folder / source.gguf_file
        tensors, config = gguf_tensors(path), {"model_type": gguf_config(read_gguf(path)).model_type}
        dtype = "float32" if dtype_name(dtype) == "auto" else dtype
        return cls.from_tensors(source.name, config, tensors, dtype=dtype, layers=GGUF_LAYERS, paged=False)

    @classmethod
    def from_tensors(
        cls,
        name: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        *,
        dtype: str = "auto",
        layers: str | None = None,
        paged: bool = True,
    ) -> ModelShape:
        """The same from what a config and headers say; errors as :meth:`read`.

        Args:
            name: of the model, for messages.
            config: of the model.
            tensors: what headers say, by names with the roles of Hugging Face.
            dtype: to compute in; ``auto`` for the checkpoint's own.
            layers: path to the decoder layers in these names; None for that of the family.
            paged: whether layers are read when they are used.
        """
        _check_family(config)
        prefix = f"{layers or ARCHITECTURES[config['model_type']].layers}."
        numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
        found = [_projections(tensors, f"{prefix}{number}.") for number in sorted(numbers, key=int)]
        if not found or any(one != found[0] for one in found):
            raise ArchitectureError(
                f"{name} has no decoder layers, or layers of different shapes, which plan does not know"
            )
        embedding = next((info for key, info in tensors.items() if kind_of(key) == "embed_tokens"), None)
        if embedding is None:
            raise CheckpointError(f"{name} is incomplete: it has no embed_tokens")
        tied = bool(config.get("tie_word_embeddings", not any(kind_of(key) == "lm_head" for key in tensors)))
        params: dict[str, int] = defaultdict(int)
        stored: dict[str, int] = defaultdict(int)
        for key, info in tensors.items():
            stored[kind_of(key)] += info.nbytes
            if not (tied and kind_of(key) == "lm_head"):
                params[kind_of(key)] += info.numel
        shapes, biases = found[0]
        own = config.get("dtype") or config.get("torch_dtype") or HEADER_DTYPES.get(embedding.dtype, "float32")
        return cls(
            name=name,
            model_type=config["model_type"],
            dtype=dtype_name(own if dtype_name(dtype) == "auto" else dtype),
            num_layers=len(found),
            projections=shapes,
            biases=biases,
            hidden_size=embedding.shape[1],
            vocab_size=embedding.shape[0],
            tied=tied,
            params=params,
            stored_bytes=stored,
            paged=paged,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a number in ``dtype``."""
        return DTYPES[self.dtype].itemsize

    @property
    def width(self) -> int:
        """FFN channels."""
        return self.projections["gate_proj"][0]

    @property
    def layer_params(self) -> int:
        """Of one decoder layer's matrices."""
        return sum(out * inner for out, inner in self.projections.values())

    @property
    def head_params(self) -> int:
        """Of the head, which may be the embedding."""
        return self.hidden_size * self.vocab_size

    @property
    def computed_bytes(self) -> int:
        """Of the whole model in memory."""
        return sum(self.params.values()) * self.itemsize


def _check_family(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(f"cannot compress model type {model_type!r}; supported: {', '.join(ARCHITECTURES)}")
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "lorap":
        raise ArchitectureError(
            "this model was compressed by lorap already; start from the dense model and ask for a higher sparsity instead"
        )
    if quantization:
        raise ArchitectureError(
            f"the model is quantized ({quantization.get('quant_method')}); start from the dense one"
        )


def _projections(tensors: Mapping[str, TensorInfo], prefix: str) -> tuple[dict[str, Shape], frozenset[str]]:
    """Shapes by role of one layer, and the roles that have a bias."""
    shapes, biases = {}, set()
    for key, info in tensors.items():
        role = kind_of(key)
        if not key.startswith(prefix) or role not in PROJECTIONS:
            continue
        if key.endswith(f"{role}.weight") and len(info.shape) == 2:
            shapes[role] = (info.shape[0], info.shape[1])
        elif key.endswith(f"{role}.bias"):
            biases.add(role)
    missing = [role for role in PROJECTIONS if role not in shapes]
    if missing:
        raise ArchitectureError(
            f"{prefix}{missing[0]} does not exist: the projections of this model are fused or named otherwise; "
            "lorap needs separate q, k, v, o, gate, up and down"
        )
    return {role: shapes[role] for role in PROJECTIONS}, frozenset(biases)
