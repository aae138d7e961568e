"""Keys of a model folder under the names by which older hosts know them, beside those that transformers writes today.

transformers 5 keeps the base and the scaling of rotary positions in ``rope_parameters``. transformers 4, mlx-lm and llama.cpp's
converter look for ``rope_theta`` and ``rope_scaling``, and take a base of 10000 where there is none, without a word. Newer
versions read both and make the same config of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorap.jsonio import write_json

# What transformers 5 calls a tokenizer of no class of its own, and the name that both versions know.
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def complete(folder: Path, tokenizer: Any = None) -> None:
    """Add the tokenizer, where given, to a folder whose model was just written, and the keys of older hosts to both configs.

    Raises:
        OSError: a file cannot be read or written.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _rewrite(folder / "config.json", _old_config)
    _rewrite(folder / "tokenizer_config.json", _old_tokenizer)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if not path.is_file():
        return
    fields = json.loads(path.read_text("utf-8"))
    before = dict(fields)
    change(fields)
    if fields != before:
        write_json(path, fields, sort_keys=True, ensure_ascii=False)


def _old_config(config: dict[str, Any]) -> None:
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if (
        not isinstance(rope, dict) or "rope_theta" not in rope
    ):  # none, or one for each kind of layer: no old key can say that
        return
    config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    config["rope_scaling"] = scaling | {"rope_type": kind, "type": kind}  # "type" is older still
    if kind == "longrope":  # where the scale of attention is computed from the ratio of both lengths
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]


def _old_tokenizer(config: dict[str, Any]) -> None:
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = TOKENIZER_CLASSES.get(str(name), name)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 wants an object there, and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
