#!/usr/bin/env bash
# transformers 5.24.0 opens a GGUF file of an ordinary LLaMA as a dense model, and then holds it for a quantized one: it cannot be
# saved nor trained, even where the file has no quantized tensor at all.
#
# Source: quantizers/quantizer_gguf.py. Every gguf_file brings a GgufHfQuantizer, also for architectures that are left to the older
# loader, which makes plain linear layers of all tensors (all but Qwen 3.5 and LFM2); validate_environment returns before it could
# note that, and what it did not note is neither serializable nor trainable. The pages on GGUF up to release 4 name further training
# and saving as what it is for.
# Expected: a dense model like any other, as with quantization_config=GgufConfig(dequantize=True).
# Seen: plain linear layers in bfloat16, and a warning that the weights stay quantized; save_pretrained raises ValueError, and so
# does Trainer. With that option the same layers come out and both work.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np, torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
                                     num_key_value_heads=1, vocab_size=300, max_position_embeddings=128)).eval()
w = GGUFWriter("model.gguf", "llama")
w.add_block_count(2); w.add_context_length(128); w.add_vocab_size(300); w.add_embedding_length(64); w.add_feed_forward_length(96)
w.add_head_count(1); w.add_head_count_kv(1); w.add_rope_freq_base(1e4); w.add_rope_dimension_count(64); w.add_layer_norm_rms_eps(1e-6)
names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
for name, t in model.state_dict().items():
    if "q_proj" in name or "k_proj" in name:
        t = t.unflatten(0, (1, 2, -1)).transpose(1, 2).reshape(t.shape)
    w.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(t.numpy()))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
for options in ({}, {"quantization_config": GgufConfig(dequantize=True)}):
    opened = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.bfloat16, **options)
    kinds = {type(m).__name__ for m in opened.modules() if hasattr(m, "in_features")}
    assert kinds == {"Linear"} and opened.dtype == torch.bfloat16, "another behaviour than was seen"
    refused = []
    for act in (lambda: opened.save_pretrained("saved"),
                lambda: Trainer(opened, args=TrainingArguments("out", use_cpu=True, report_to=[]))):
        try:
            act()
        except ValueError as error:
            refused.append(str(error).partition(" - ")[0])
    print(kinds, opened.dtype, refused)
    assert len(refused) == (0 if options else 2), "another behaviour than was seen"
PYTHON
