#!/usr/bin/env bash
# mlx-lm 0.32.2 (models/llama.py, ModelArgs) depends on transformers 5, and reads the base of rotary positions of Llama models only
# from the key that transformers 5 no longer writes.
#
# Source: transformers 5 documents `rope_parameters` as the one place of base and scaling (its migration guide and
# `RotaryEmbeddingConfigMixin`); mlx_lm/models/qwen3.py has a comment saying so, and reads it.
# Expected: a config.json that the transformers of the same environment wrote is read with its base, 500000, and its llama3 scaling,
# or refused. That is what mlx_lm/models/qwen3.py does with the same fields.
# Seen: Llama and Qwen2 models get the default of the class, 10000 and 1000000, and no scaling; nothing is printed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import json
from mlx_lm.models import llama, qwen2, qwen3
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
seen = {}
for config, module in ((LlamaConfig, llama), (Qwen2Config, qwen2), (Qwen3Config, qwen3)):
    written = config(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=16, vocab_size=100, max_position_embeddings=512, rope_parameters=dict(rope))
    written.save_pretrained("model")
    assert config.from_pretrained("model").rope_parameters["rope_theta"] == 500000.0
    args = module.ModelArgs.from_dict(json.load(open("model/config.json")))
    seen[written.model_type] = (args.rope_theta, bool(args.rope_scaling))
print(seen)
assert seen == {"llama": (10000, False), "qwen2": (1000000, False), "qwen3": (500000.0, True)}, "another behaviour than was seen"
PYTHON
