#!/usr/bin/env bash
# transformers 5.24.0 opens a GGUF file of Llama 3.1's kind (one tensor `rope_freqs.weight`, which holds the scaling of rotary
# positions) as a model without scaling.
#
# Source: llama.cpp's converter (conversion of LlamaForCausalLM, "llama3" rope type) writes the factors as that tensor and nothing
# about them in the header; transformers' integrations/ggml.py and modeling_gguf_pytorch_utils.py map header keys only. Its GGUF page
# lists Llama as supported.
# Expected: rope_parameters of type llama3, or an error, or at least the tensor among the unexpected keys of the loading report.
# Seen: rope_type "default"; nothing among missing or unexpected keys; the logits are those of another model.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np, torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     vocab_size=300, max_position_embeddings=2048, rope_parameters=rope)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.normal_(0, 0.12) if p.ndim == 2 else None
plain = 1 / 1e4 ** (np.arange(0, 16, 2) / 16)
factors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
w = GGUFWriter("model.gguf", "llama")
w.add_block_count(2); w.add_context_length(2048); w.add_vocab_size(300); w.add_embedding_length(64); w.add_feed_forward_length(96)
w.add_head_count(4); w.add_head_count_kv(2); w.add_rope_freq_base(1e4); w.add_rope_dimension_count(16); w.add_layer_norm_rms_eps(1e-6)
names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
for name, t in model.state_dict().items():
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    if heads:
        t = t.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(t.shape)
    w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(t.numpy()))
w.add_tensor("rope_freqs.weight", factors)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
opened, found = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True)
ids = torch.arange(200)[None]
with torch.no_grad():
    wrong = float((opened(ids).logits - model(ids).logits).abs().max())
    opened.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    with_factors = float((opened(ids).logits - model(ids).logits).abs().max())
kind = opened.config.rope_parameters["rope_type"]
print(f"rope_type {kind}, unexpected {sorted(found['unexpected_keys'])}, logits off by {wrong:.3f}; by {with_factors:.1e} with the factors")
assert kind == "default" and not found["unexpected_keys"] and wrong > 0.1 and with_factors < 1e-3, "another behaviour than was seen"
PYTHON
