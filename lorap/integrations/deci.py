"""Folders for vLLM's DeciLMForCausalLM, which has an FFN width per layer, and needs no lorap.

transformers has no such class, so the folder brings the Python of its config: ``configuration_deci.py`` beside this file, in a
copy, which hosts run if they are told to trust it. lorap itself opens no such folder and never runs what is in one.
Sources: vLLM's model_executor/models/nemotron_nas.py, which reads ``block_configs`` as attributes; mlx-lm's
models/nemotron-nas.py, which reads it as JSON and knows widths by ``ffn_mult`` only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.architectures import ATTENTION, MLP, known_architecture
from lorap.checkpoint import host_keys
from lorap.checkpoint.gguf.architecture import IN_DECI, check_llama_graph, head_dim
from lorap.checkpoint.guards import activation_of
from lorap.checkpoint.reconstruct import reconstruct
from lorap.checkpoint.save import SPARE_BYTES
from lorap.checkpoint.write import write_model
from lorap.errors import ArchitectureError
from lorap.integrations import configuration_deci
from lorap.integrations.stock import give_biases
from lorap.jsonio import write_json
from lorap.nn.linear import count_parameters
from lorap.outputs import staged_folder
from lorap.reports.model_card import CARD, stock_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE, DECI_CLASS = "configuration_deci.py", "DeciLMForCausalLM"
# Widths that ``ffn_mult`` can say, which all hosts of the format read: they round 2 / 3 * ffn_mult * hidden_size up to these.
_MULTIPLE = 256
# Fields of config.json that mean the same in Llama's config; the others are of no use to Llama's graph.
_KEPT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings"),
    *(
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
    ),
)
_USE = f"""## Use

```bash
vllm serve "this folder" --trust-remote-code
```

vLLM reads the config of this folder by running `{CONFIG_FILE}`, and no other code: look at it first.
"""


def export_deci(
    model: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: Any = None,
    card: str = "",
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write ``model`` as a folder of class DeciLMForCausalLM, in which every FFN stays as narrow as it is.

    Args:
        model: compressed, loaded or dense; changed in place: low-rank projections become dense.
        out: a new or empty folder, as for :func:`lorap.export_stock`.
        tokenizer: saved beside the model where given.
        card: README.md of the compressed checkpoint; empty for a short one.
        overwrite: replace an existing folder.
        max_shard_size: largest safetensors file.

    Raises:
        ArchitectureError: DeciLM's graph does not compute this family; the model is as it was then.
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
    """
    out, config = Path(out), model.config
    if config.model_type not in IN_DECI:
        raise ArchitectureError(
            f"DeciLM's graph is not that of {config.model_type} models; possible: {', '.join(IN_DECI)}; use --format stock"
        )
    check_llama_graph(config, host="vLLM")
    compressed_params = count_parameters(model)
    reconstruct(model)
    roles = _roles_with_bias(model)
    give_biases(model, roles)
    with staged_folder(out, overwrite=overwrite, needed_bytes=model.get_memory_footprint() + SPARE_BYTES) as stage:
        write_model(model, stage, max_shard_size=max_shard_size)
        host_keys.complete(stage, tokenizer)
        path = stage / "config.json"
        fields = _config(model, roles, json.loads(path.read_text("utf-8")))
        write_json(path, fields, sort_keys=True)
        (stage / CONFIG_FILE).write_bytes(Path(configuration_deci.__file__).read_bytes())
        text = stock_card(
            card, out.name, f"a {DECI_CLASS} with an FFN width per layer, for vLLM", count_parameters(model),
            compressed_params, kind="deci", use=_USE,
        )  # fmt: skip
        (stage / CARD).write_text(text, "utf-8")
    return out


def _roles_with_bias(model: PreTrainedModel) -> set[str]:
    """Those that the class gives a bias as soon as one of them has one: all of the FFN, q, k and v, or all of attention."""
    has = known_architecture(model, to="export").roles_with_bias(model)
    attention = ATTENTION if "o_proj" in has else ATTENTION[:3] if has & set(ATTENTION) else ()
    return {*attention, *(MLP if has & set(MLP) else ())}


def _config(model: PreTrainedModel, roles: set[str], fields: dict[str, Any]) -> dict[str, Any]:
    """config.json, from the one that transformers wrote."""
    widths = known_architecture(model, to="export").ffn_widths(model)
    hidden, group = fields["hidden_size"], fields["num_attention_heads"] // fields["num_key_value_heads"]
    whole = not any(width % _MULTIPLE for width in widths)
    return {
        **{name: fields[name] for name in _KEPT if name in fields},
        "model_type": configuration_deci.DeciConfig.model_type,
        "architectures": [DECI_CLASS],
        "auto_map": {"AutoConfig": f"{Path(CONFIG_FILE).stem}.{configuration_deci.DeciConfig.__name__}"},
        "hidden_act": activation_of(model.config),
        "head_dim": head_dim(model.config),
        "intermediate_size": max(widths),
        "attention_bias": "o_proj" in roles,
        "qkv_bias": "q_proj" in roles,
        "mlp_bias": "down_proj" in roles,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": group},
                "ffn": {"no_op": False, "ffn_mult": 3 * width / (2 * hidden)}
                if whole
                else {"no_op": False, "intermediate_size": width},
            }
            for width in widths
        ],
    }
