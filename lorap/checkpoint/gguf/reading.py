"""A GGUF file becomes a transformers model that computes the same, or is refused by the name of what would be lost.

transformers' own reader builds the config from a few keys and drops what it has no place for: scaled rotary positions, biases,
windows, head sizes. Here every key of the architecture and every tensor must be read, or change nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lorap.checkpoint.gguf.header import GGUFHeader, read_gguf
from lorap.checkpoint.gguf.keys import gguf_settings, read_numbers, tensor_sources
from lorap.checkpoint.gguf.names import INTERLEAVED, READ, halved


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of one GGUF file, dequantized to ``dtype``.

    Raises:
        CheckpointError: the file is damaged, of another architecture, or holds what the model would not have.
    """
    header = read_gguf(path)
    config = gguf_config(header)
    places = _places(header, config)
    sources = tensor_sources(header, gguf_settings(header), places)
    state = {key: _read(header, name, config).to(dtype) for key, name in sources.items()}
    for key, shape in places.items():
        if key.endswith(".bias") and key not in state:
            state[key] = torch.zeros(shape, dtype=dtype)  # the class has all of a kind or none; the file has some
    model, info = _model_class(header).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def check_gguf_file(path: Path) -> None:
    """Refuse a file that :func:`load_gguf` would refuse, from its header alone; errors as there."""
    header = read_gguf(path)
    tensor_sources(header, gguf_settings(header), _places(header, gguf_config(header)))


def gguf_config(header: GGUFHeader) -> Any:
    """The config of a file's model, from its header alone; errors as :func:`gguf_settings`."""
    settings = gguf_settings(header)
    return getattr(transformers, f"{READ[header.architecture]}Config")(**settings)


def _model_class(header: GGUFHeader) -> Any:
    return getattr(transformers, f"{READ[header.architecture]}ForCausalLM")


def _places(header: GGUFHeader, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each key of the model's state dict."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in _model_class(header)(config).state_dict().items()}


def _read(header: GGUFHeader, name: str, config: Any) -> Tensor:
    tensor = torch.from_numpy(read_numbers(header, name))
    role = name.split(".")[-2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return halved(tensor, heads[role]) if header.architecture in INTERLEAVED and role in heads else tensor
