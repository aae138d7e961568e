"""Opening a model, for the commands that run one."""

from __future__ import annotations

from typing import Any

from lorap.checkpoint.load import ModelSource, check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.nn.linear import embedding_weight


def open_model(model: str | ModelSource, device: str, dtype: str) -> tuple[Any, Any, ModelSource]:
    """The model, its tokenizer (None where it has none), and where they came from; what was found is not looked for again."""
    source = model if isinstance(model, ModelSource) else find_model(model)
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype=dtype, device=resolve_device(device))
    check_tokenizer(tokenizer, len(embedding_weight(loaded)))
    return loaded, tokenizer, source
